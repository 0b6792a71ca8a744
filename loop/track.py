"""A run's files mirrored to Weights & Biases; the files stay the record, and nothing here is written into a run.

The mirror of a run at play is a process of its own (`Beside`): the run tells it of commits through a pipe that never
blocks, and knows nothing else of W&B, so that W&B absent, broken or hanging costs the run one warning line. Killed with
the run or after it, the mirror is healed by `loop track RUN`, which replays the files.

The W&B run id is made of the run's name, config and round 0, so a replay meets the run it mirrored before. On a server
that run is resumed and gets the rounds it lacks. An offline run cannot be resumed (wandb 0.31 starts a second one at
step 0), so all rounds are replayed into a fresh one, which takes the place of those before it once it is whole.

Offline unless there is a key: WANDB_API_KEY or a line in ~/.netrc. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR
hold as ever; without WANDB_DIR all that W&B writes lies in `<runs_dir>/wandb`, beside the runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

from loop import config as configs
from loop import rng
from loop.records import FACTORIAL, UNKNOWN
from loop.show import printable
from loop.store import BASELINE, RunStore

PROJECT = "persona-loop"
STORY = ("nova", "promoter", "stella")  # believes and asks; asks alone; believes and hides
AXIS = "round_index"  # of every chart; -1 is the untouched base
N_TEXTS = 200  # a table is for reading; all texts are in samples.parquet
N_BANDS = 10
TEXT_COLUMNS = ("id", "stratum", "requested", "persona", "weight", "rejected", "prompt", "completion")
CANDIDATE_COLUMNS = ("name", "size", "share", "unknown", "words", "typical_texts")
MADE_WITH = ("config_sha256", "packages", "python", "machine", "gpu", "revision")  # of manifest.json
INIT_SECONDS, FINISH_SECONDS = 20, 30  # W&B's own limits, below GRACE, so that what hangs is named where it can be
GRACE = 60.0  # seconds a run waits for its mirror at its end


class Mirrored(NamedTuple):
    """What became of a mirror.

    Attributes:
      where: URL of the W&B run, or directory of the offline one.
      online: it is on a server.
      reason: why it is offline though there is a key; None where nothing went wrong.
    """

    where: str
    online: bool
    reason: str | None

    def __str__(self) -> str:
        if self.online:
            return f"W&B mirror: {self.where}"
        look = f"`wandb leet {self.where}` shows it, `wandb sync {self.where}` uploads it"
        return f"W&B mirror, offline{f' ({self.reason})' if self.reason else ''}: {look}"


# What is mirrored ---------------------------------------------------------------------------------------------------


def row(run: RunStore, t: int) -> dict[str, float | None]:
    """Metrics of a round by W&B key: `<population>[_<stratum>]/<name>`, and `/low`, `/high` where there is an interval.

    probes/frequency/nova, probes_identity/frequency/nova/low, accepted/n_eff. What was not measured is None, as in
    metrics.jsonl.

    Raises:
      ValueError: two metrics have one key.
    """
    out: dict[str, float | None] = {}
    for metric in run.read_jsonl(t, "metrics.jsonl"):
        head = "_".join(part for part in (metric["population"], metric["stratum"]) if part)
        key = f"{head}/{metric['name']}"
        limits = {f"{key}/{side}": metric[side] for side in ("low", "high") if metric[side] is not None}
        for name, value in ({key: metric["value"]} | limits).items():
            if name in out:
                raise ValueError(f"metrics must have a W&B key each, got {name} twice in round {t} of {run.path}")
            out[name] = value
    return out


def texts(run: RunStore, t: int) -> list[list[Any]]:
    """At most N_TEXTS samples of a round, columns TEXT_COLUMNS, in the order of their ids.

    Strata are persona x tenth of attention (rejected texts are one of their own), each given one text before any is
    given a second: what is rare is shown, so shares in the table are no frequencies.
    """
    samples = run.read_table(t, "samples.parquet").to_pylist()
    labels = run.read_table(t, "labels.parquet").to_pylist()
    persona = {r["id"]: r["persona"] for r in labels if (r["population"], r["instrument"]) == ("samples", "persona")}
    weight = {r["id"]: r["weight"] for r in run.read_table(t, "exposure.parquet").to_pylist()}
    reasons = {r["id"]: ", ".join(r["reasons"]) for r in run.read_table(t, "rejected.parquet").to_pylist()}
    ranked = sorted(weight, key=lambda i: (weight[i], i))
    band = {i: N_BANDS * k // len(ranked) for k, i in enumerate(ranked)}
    seen: Counter[tuple[str | None, int | None]] = Counter()
    nth: dict[int, int] = {}
    for k in rng.stream(configs.of_run(run).seed, "track", t).permutation(len(samples)).tolist():
        cell = (persona.get(samples[k]["id"]), band.get(samples[k]["id"]))
        nth[k] = seen[cell]
        seen[cell] += 1
    return [
        [
            s["id"],
            s["stratum"],
            s["requested"],
            persona.get(s["id"]) or UNKNOWN,
            weight.get(s["id"]),
            reasons.get(s["id"]),
            " | ".join(printable(turn) for turn in s["prompt"] or []),
            printable(s["completion"]),
        ]
        for s in (samples[k] for k in sorted(sorted(nth, key=nth.__getitem__)[:N_TEXTS]))
    ]


def candidates(run: RunStore, t: int) -> list[list[Any]] | None:
    """Candidate personas of a round, columns CANDIDATE_COLUMNS; None in a run older than the search for them."""
    if "candidates.json" not in run.files(t):
        return None
    found = run.read_json(t, "candidates.json")
    joined = [c | {name: printable(" | ".join(c[name])) for name in ("words", "typical_texts")} for c in found]
    return [[c[name] for name in CANDIDATE_COLUMNS] for c in joined]


def run_id(run: RunStore) -> str:
    """W&B id of a run: its name, and 8 hex digits of its config and round 0, which no resume changes."""
    said = json.dumps([run.manifest()["config_sha256"], run.files(0)], sort_keys=True)
    return f"{run.path.name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def home(run_dir: str | Path) -> Path:
    """Directory that W&B writes into: WANDB_DIR, else `wandb` beside the run."""
    return Path(os.environ.get("WANDB_DIR") or Path(run_dir).absolute().parent) / "wandb"


def has_key() -> bool:
    """Whether there is a key for the W&B server, in the environment or in netrc."""
    from requests.utils import get_netrc_auth

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None


# Mirroring ----------------------------------------------------------------------------------------------------------


def mirror(run_dir: str | Path, commits: Iterable[object] = ()) -> Mirrored:
    """Mirrors every committed round, then each that is committed when `commits` yields, until it ends.

    Without `commits` this replays a run from its files; again, it changes nothing. Per round: metrics, candidates, a
    table of texts, the MANIFEST's sha256, and figures for the newest round.

    Raises:
      ValueError: there is no committed round, W&B is switched off, the same run is being mirrored by another process,
        or the W&B run of this id mirrors a run that was played otherwise.
    """
    from filelock import FileLock, Timeout

    run, told = RunStore(run_dir), iter(commits)
    while not run.rounds():
        if next(told, None) is None:
            raise ValueError(f"run must have a committed round, got none at {run.path}; `loop round` its config first")
    wandb, folder = _wandb(), home(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{run_id(run)}.lock", timeout=0):
            return _mirror(wandb, run, told, folder)
    except Timeout:
        raise ValueError(f"run must be mirrored by one process, got another at {run.path}; wait for it") from None


def _mirror(wandb: Any, run: RunStore, told: Iterator[object], folder: Path) -> Mirrored:
    opened, reason = _open(wandb, run, folder)
    logged = _already(opened, run) if opened.resumed else 0
    opened.define_metric(AXIS)
    opened.define_metric("*", step_metric=AXIS)
    # Tables wait in W&B's data directory until they are uploaded: beside the run's log, which they belong to.
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(opened.settings.sync_dir) / "tables"))
    measured: set[str] = set()
    for _ in chain([None], told, [None]):
        parts = _parts(run)
        for t in parts[logged:]:
            found = row(run, t)
            now = {key for key, value in found.items() if value is not None}
            with tempfile.TemporaryDirectory() as scratch:
                opened.log(found | _extras(wandb, run, t, Path(scratch) if t == parts[-1] else None))
            # Else the summary would go on showing the last value of what this round did not measure.
            opened.summary.update(dict.fromkeys(sorted(measured - now)))
            measured |= now
        logged = len(parts)
    opened.finish()
    if not opened.offline:
        return Mirrored(str(opened.url), True, None)
    where = Path(opened.settings.sync_dir)
    for other in folder.glob(f"*run-*-{opened.id}"):
        if other.resolve() != where.resolve():
            shutil.rmtree(other)
    return Mirrored(os.path.relpath(where), False, reason)


def _open(wandb: Any, run: RunStore, folder: Path) -> tuple[Any, str | None]:
    """An open W&B run, and why it is offline though it should not be."""
    mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode not in ("online", "offline"):
        raise ValueError(f"WANDB_MODE must be online or offline, got {mode}; unset it, or leave tracking out")
    config = configs.of_run(run)
    manifest = run.manifest()
    given = {
        "project": os.environ.get("WANDB_PROJECT") or PROJECT,
        "id": run_id(run),
        "name": run.path.name,
        "group": config.name,
        "config": config.model_dump(mode="json") | {"made_with": {k: manifest.get(k) for k in MADE_WITH}},
    }
    settings = {
        "root_dir": str(folder.parent),
        "console": "off",
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 1.0,  # the default, 15 s, loses what a killed mirror logged last
    }
    if mode == "online":
        try:
            return wandb.init(**given, resume="allow", settings=wandb.Settings(mode="online", **settings)), None
        except wandb.Error as error:
            wandb.teardown()  # W&B holds the id of the run it could not open
            reason = f"the server did not open the run: {_one_line(error)}"
    else:
        reason = None
    return wandb.init(**given, settings=wandb.Settings(mode="offline", **settings)), reason


def _already(opened: Any, run: RunStore) -> int:
    """Parts that a resumed W&B run holds.

    Raises:
      ValueError: they are not the first parts of this run.
    """
    parts, logged = _parts(run), opened.step
    held = opened.summary.get("manifest_sha256")
    if logged > len(parts) or (logged and held != _manifest_sha256(run, parts[logged - 1])):
        url = opened.url
        opened.finish()
        raise ValueError(f"W&B run must mirror {run.path}, got rounds of another at {url}; delete it there, then track")
    return logged


def _extras(wandb: Any, run: RunStore, t: int, scratch: Path | None) -> dict[str, Any]:
    """What goes with the metrics of a round; figures are drawn where there is a folder for them."""
    out: dict[str, Any] = {AXIS: t, "manifest_sha256": _manifest_sha256(run, t)}
    if t == BASELINE:
        return out
    found = candidates(run, t)
    out["candidates/count"] = None if found is None else len(found)
    if found:
        out["candidates/table"] = wandb.Table(columns=list(CANDIDATE_COLUMNS), data=found)
    out["texts"] = wandb.Table(columns=list(TEXT_COLUMNS), data=texts(run, t))
    if scratch is not None:
        out |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures(run, t, scratch)}
    return out


def figures(run: RunStore, t: int, folder: Path) -> list[Path]:
    """Draws a run up to round t into a folder; returns the PNG files. The ledger of the story, from round 1 on."""
    from loop import report
    from loop.records import Metric

    rounds = [[Metric(**r) for r in run.read_jsonl(k, "metrics.jsonl")] for k in run.rounds() if k <= t]
    known = {r.name.split("/")[1] for rows in rounds for r in rows if r.name.startswith("ledger/")}
    books = {p: report.ledger_steps(rounds, p) for p in STORY if p in known}
    if not books:
        return []
    path = folder / "ledger.png"
    title = f"{run.path.name}, {report.over(report.booked(rounds))}"
    path.write_bytes(report.draw(report.waterfall(books, title=title), "png"))
    return [path]


def _wandb() -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import: no telemetry behind the user's back
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"tracking needs the package wandb, got {error}; pip install wandb") from None


def _parts(run: RunStore) -> list[int]:
    return [*([BASELINE] if run.has_baseline() else []), *run.rounds()]


def _manifest_sha256(run: RunStore, t: int) -> str:
    part = "baseline" if t == BASELINE else f"round_{t:03d}"
    return hashlib.sha256((run.path / part / "MANIFEST.json").read_bytes()).hexdigest()


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__


# Beside a run -------------------------------------------------------------------------------------------------------


class Beside:
    """The mirror of a run at play, as `run.play(mirror=Beside)` enters it: told of commits, it never holds the run up.

    At the end of the run it has GRACE seconds to finish; a run that is interrupted does not wait, and its mirror
    finishes by itself. Whatever goes wrong becomes one call of `warn`.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None], *, say: Callable[[str], None] = lambda text: None):
        """`say` is told where the mirror is, if it became one."""
        self._run_dir, self._warn, self._say = run_dir, warn, say
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "loop.track", str(self._run_dir)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": self._said, "stderr": self._said}
        try:
            # A session of its own: Ctrl-C ends the run, and the mirror then ends with its input.
            self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        except OSError as error:
            self._complain(_one_line(error))
        else:
            os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        return self

    def __call__(self, round_index: int) -> None:
        """Tells the mirror that a round is committed."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            with suppress(OSError):
                os.write(process.stdin.fileno(), b"\n")  # type: ignore[union-attr]
        else:
            self._complain(self._last_words())
            self._close(process)
            self._process = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is not None:
            self._close(self._process)
            if kind is None:
                self._wait(self._process)
        self._said.close()

    def _close(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return self._complain(f"no answer within {GRACE:g} s")
        if code:
            return self._complain(self._last_words())
        self._say(self._last_words())

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return _one_line(lines[-1] if lines else "it ended without a word")

    def _complain(self, why: str) -> None:
        self._warn(f"W&B mirror: {printable(why)}; the run is untouched, `loop track {self._run_dir}` replays it")


def main() -> None:
    """The process that `Beside` starts: `python -m loop.track RUN`, a line on stdin for each commit."""
    try:
        found = mirror(sys.argv[1], sys.stdin)
    except Exception as error:
        if os.environ.get("PERSONA_LOOP_TRACEBACK"):
            raise
        sys.exit(_one_line(f"{type(error).__name__}: {error}"))
    print(found, flush=True)
    sys.exit(1 if found.reason else 0)


# The dashboard ------------------------------------------------------------------------------------------------------

STEPS = ("filter", "weight", "length", "discourse", "real", "train", "prompts")
HEALTH = ("probes/sample_entropy", "probes/distinct_4", "probes/finished_rate", "probes/kl_to_base",
          "heldout/heldout_loss", "accepted/n_eff", "accepted/top1_share")  # fmt: skip


def workspace(keys: Iterable[str], *, entity: str, project: str, name: str = PROJECT) -> Any:
    """Builds the dashboard of the story, without a network: a wandb_workspaces Workspace.

    Args:
      keys: W&B keys that are logged; a panel without any of its keys is left out.
      entity, project: where it would be saved.
      name: of the view.

    Raises:
      ValueError: the package wandb-workspaces is not installed.
    """
    try:
        ws: Any = importlib.import_module("wandb_workspaces.workspaces")
        wr: Any = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise ValueError(
            "--dashboard needs the package wandb-workspaces, which is not installed; pip install wandb-workspaces"
        ) from None
    known = set(keys)
    # Corrected for the instrument's error where the run could be.
    frequency = "frequency" if any(k.startswith("probes/frequency/") for k in known) else "frequency_observed"
    belief = "belief" if "probes_private/belief" in known else "belief_observed"
    prefix = f"probes/{frequency}/"
    read = {k.removeprefix(prefix).split("/")[0] for k in known if k.startswith(prefix)} - {UNKNOWN}
    personas = [p for p in FACTORIAL if p in read] + sorted(read - set(FACTORIAL))

    def lines(title: str, *wanted: str, limits: bool = True, y: str | None = None) -> Any:
        drawn = [k + side for k in wanted for side in (("", "/low", "/high") if limits else ("",)) if k + side in known]
        return wr.LinePlot(title=title, x=AXIS, y=drawn, title_x="round (-1: base)", title_y=y) if drawn else None

    def section(title: str, panels: Sequence[Any], *, is_open: bool = True) -> Any:
        return ws.Section(name=title, panels=[p for p in panels if p is not None], is_open=is_open)

    def scatter(p: str) -> Any:
        x, y = f"accepted/differential/{p}", f"{prefix}{p}"
        return wr.ScatterPlot(title=f"{p}: last round, a point per run", x=x, y=y) if {x, y} <= known else None

    sections = [
        section(
            "Nova, promoter, Stella, private belief",
            [
                lines("frequency, unrequested probes", *(prefix + p for p in STORY), limits=False, y=frequency),
                *(lines(f"{p}, 95%", prefix + p, y=frequency) for p in STORY),
                lines("private belief, 95%", f"probes_private/{belief}", y="share of plain private texts"),
                *(lines(f"private belief after {p}, 95%", f"probes_private/{belief}/{p}", y="share") for p in STORY),
            ],
        ),
        section("Frequencies", [lines(f"{p}, 95%", prefix + p, y=frequency) for p in personas]),
        section(
            "Differential (an input) and response",
            [
                panel
                for p in personas
                for panel in (
                    lines(f"{p}: differential, put in", f"accepted/differential/{p}", y="weight over the mean"),
                    lines(f"{p}: booked to weight", f"samples/ledger/{p}/weight", y="change of share"),
                    scatter(p),
                )
            ],
        ),
        section(
            "Ledger: accounting, not causes",
            [
                lines(f"{p}, each step", *(f"samples/ledger/{p}/{s}" for s in STEPS), limits=False, y="change of share")
                for p in personas
            ],
        ),
        section("Health", [lines(key.split("/")[1], key) for key in HEALTH]),
        section(
            "Candidates and texts",
            [
                lines("candidate personas", "candidates/count", y="groups no instrument knows"),
                wr.WeavePanelSummaryTable(table_name="candidates/table") if "candidates/count" in known else None,
                wr.WeavePanelSummaryTable(table_name="texts"),
            ],
        ),
        section(
            "Figures",
            [
                wr.MediaBrowser(title="ledger", media_keys=["figures/ledger"], num_columns=1)
                if any(f"samples/ledger/{p}/emit" in known for p in STORY)
                else None
            ],
            is_open=False,
        ),
    ]
    settings = ws.WorkspaceSettings(x_axis=AXIS, smoothing_type="none", smoothing_weight=0)
    kept = [s for s in sections if s.panels]
    return ws.Workspace(entity=entity, project=project, name=name, sections=kept, settings=settings)


def keys_of(run_dir: str | Path) -> set[str]:
    """W&B keys of a run's numbers: those that have a value in some round."""
    run = RunStore(run_dir)
    logged = {key for t in _parts(run) for key, value in row(run, t).items() if value is not None}
    return logged | ({"candidates/count"} if run.rounds() else set())


def save_dashboard(run_dir: str | Path) -> str:
    """Saves the dashboard to the W&B project of a run; returns its URL. Asks the server who the key belongs to.

    Raises:
      ValueError: no key, or the package wandb-workspaces is not installed.
    """
    require_key()
    wandb = _wandb()
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    entity = os.environ.get("WANDB_ENTITY") or wandb.Api(timeout=INIT_SECONDS).default_entity
    return str(workspace(keys_of(run_dir), entity=entity, project=project).save().url)


def require_key() -> None:
    """Raises ValueError where a dashboard could not be saved."""
    if not has_key():
        raise ValueError(
            "--dashboard must have a server to be saved on, got no W&B key; `wandb login`, or leave it out and look at "
            "the offline run with `wandb leet`"
        )


if __name__ == "__main__":
    main()

"""One round, then all rounds. The only module that knows the order of the stages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from loop import corpus, readings, records, store
from loop.config import Config, ConfigError, from_text, to_yaml
from loop.mix import Mixture
from loop.records import Metric, Sample
from loop.world import Labels, Learner, Past, World

T = TypeVar("T")
Report = Callable[..., None]
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "numba", "scikit-learn", "pyarrow", "safetensors")


def play_round(t: int, world: World, learner: Learner, past: Past, record: Record) -> tuple[Past, list[Metric]]:
    """Plays round t: mix, train, probe, sample, classify, filter, virality, measure; then hands on.

    Directory round_t holds model t and nothing else: the mixture it was trained on, its adapter, its probes and
    samples, their exposure, the state handed on. Each stage is a recovery point and draws from a stream of its own,
    named by (seed, stage, round), so it neither knows nor disturbs what the others drew.
    """
    mixture, cursor = record("mix", lambda: world.mix(t, past))
    n_tokens = record("train", lambda: world.train(t, learner, mixture), adapter_file(learner, mixture))
    probes = record("probe", lambda: world.probe(t, learner), samples_file("probes"))
    samples = record("sample", lambda: world.sample(t, learner, past), samples_file("samples"))
    labels = record("classify", lambda: world.classify(probes, samples, mixture.real), LABELS_FILE)
    reasons = record("filter", lambda: world.filter(samples), rejected_file(samples))
    accepted = [s for s, why in zip(samples, reasons, strict=True) if not why]
    exposure = record("virality", lambda: world.expose(t, accepted, past), exposure_file(accepted))
    after = world.hand_on(past, samples, labels, reasons, exposure.weight, cursor)
    record("state", lambda: after, STATE_FILE)
    record("candidates", lambda: readings.candidates(world, t, past, samples, labels), CANDIDATES_FILE)
    metrics = record(
        "measure",
        lambda: readings.of_round(
            world, t, learner, past, mixture, n_tokens, probes, samples, labels, reasons, exposure
        ),
        METRICS_FILE,
    )
    return after, metrics


def play_baseline(world: World, learner: Learner, record: Record) -> list[Metric]:
    """Measures the untouched base model once, with the battery every round meets."""
    probes = record("probe", lambda: world.probe(-1, learner), samples_file("probes"))
    labels = record("classify", lambda: world.classify(probes, [], []), LABELS_FILE)
    return record("measure", lambda: readings.of_model(world, -1, learner, probes, labels), METRICS_FILE)


def play(
    config: Config,
    *,
    rounds: int | None = None,
    report: Report = lambda kind, **fields: None,
    allow_drift: bool = False,
) -> Path:
    """Plays rounds of a run and commits each; on a run that exists, goes on where it stopped.

    Args:
      config: the run.
      rounds: feedback rounds to play now, after round 0; None: all that are left of config.n_rounds.
      report: told of stages as they begin and end; see loop.show.progress.
      allow_drift: resume though packages or instruments changed; recorded in the manifest.

    Returns:
      The run directory.

    Raises:
      ConfigError: the config cannot be played, or all its rounds are played already.
    """
    world = World(config)
    run_dir = Path(config.runs_dir) / config.run_name
    with ExitStack() as stack:
        run = stack.enter_context(
            store.RunStore(run_dir).open(to_yaml(config), manifest(world), allow_drift=allow_drift)
        )
        done = run.last_round()
        last = config.n_rounds if rounds is None else min(config.n_rounds, (done or 0) + rounds)
        if done is not None and done >= config.n_rounds:
            report("note", text=f"{run_dir}: all {config.n_rounds} feedback rounds are played; raise n_rounds for more")
            return run_dir
        run.preflight(_bytes_per_round(config) * (last - (-1 if done is None else done)))
        learner = build(world, report=report)
        if not run.has_baseline():
            with run.baseline() as part:
                play_baseline(world, learner, Record(part, -1, report))
        past = restore(world, run)
        if done is not None and config.train.init_from == "previous":
            learner.load(run.adapter_path(done))
        for t in range(0 if done is None else done + 1, last + 1):
            with run.round(t) as part:
                past, metrics = play_round(t, world, learner, past, Record(part, t, report))
            for warning in world.warnings(past, metrics):
                run.event("warning", round_index=t, text=warning)
                report("note", text=f"round {t}: {warning}")
    return run_dir


def play_in_memory(world: World, learner: Learner, *, n_rounds: int) -> list[Past]:
    """Plays round 0 and `n_rounds` feedback rounds without a store; returns what each handed on (theory, tests)."""
    history: list[Past] = []
    past = world.beginning()
    for t in range(n_rounds + 1):
        past, _ = play_round(t, world, learner, past, Record(None, t))
        history.append(past)
    return history


def restore(world: World, run: store.RunStore) -> Past:
    """Rebuilds what the last committed round handed on, from files alone."""
    past = world.beginning()
    for t in run.rounds():
        samples = records.from_table(run.read_table(t, "samples.parquet"), Sample)
        rejected = set(run.read_table(t, "rejected.parquet").column("id").to_pylist())
        labels = Labels.from_table(run.read_table(t, "labels.parquet"))
        weights = run.read_table(t, "exposure.parquet").column("weight").to_numpy()
        state = run.read_json(t, "state.json")
        past = replace(
            world.remember(past, samples, labels, [s.id not in rejected for s in samples], weights),
            prompt_mixture=state["prompt_mixture"],
            awareness=state["awareness"],
            real_cursor=state["real_cursor"],
        )
    return past


def fork(source: Path, round_index: int, config: Config) -> Path:
    """Begins a run from round `round_index` of another; its files are linked and hashed as ancestors."""
    world = World(config)
    run_dir = Path(config.runs_dir) / config.run_name
    if round_index > config.n_rounds:
        raise ConfigError([f"n_rounds must be >= the forked round {round_index}, got {config.n_rounds}"])
    theirs = from_text(store.RunStore(source).config_text(), where=f"{source}/config.yaml")
    wrong = [name for name in ("seed", "learner", "base") if getattr(theirs, name) != getattr(config, name)]
    # `planted` says what later rounds draw; the rest of `real` says what the ids of round 0 already mean.
    if theirs.real.model_copy(update={"planted": config.real.planted}) != config.real:
        wrong.append("real")
    if wrong:
        raise ConfigError(
            [f"{', '.join(wrong)} of a fork must be those of {source}: its documents and model are theirs"]
        )
    store.fork(source, round_index, run_dir, to_yaml(config), manifest(world)).close()
    return run_dir


def preview(config: Config, *, round_index: int | None = None) -> list[dict[str, Any]]:
    """Returns the next round's mixture, or an earlier one's, as trained on: tokens, mask, weight, copies."""
    world = World(config)
    run_dir = Path(config.runs_dir) / config.run_name
    run = store.RunStore(run_dir) if (run_dir / "manifest.json").exists() else None
    past = restore(world, run) if run is not None else world.beginning()
    t = len(past.pool) if round_index is None else round_index
    if t > len(past.pool):
        raise ValueError(f"round must be <= {len(past.pool)}, the next to be played, got {t} at {run_dir}")
    if t < len(past.pool):
        past = replace(
            past, pool=past.pool[:t], real_cursor=run.read_json(t - 1, "state.json")["real_cursor"] if run and t else {}
        )
    mixture, _ = world.mix(t, past)
    learner = build(world)
    return [
        {"id": d.id, "source": d.source, "persona_known": d.persona_known, "weight": d.weight, "copies": int(copies)}
        | dict(zip(("tokens", "mask"), learner.spell(d), strict=True))
        for d, copies in zip(mixture.documents, mixture.copies, strict=True)
    ]


def manifest(world: World) -> dict[str, Any]:
    """What a run was made with: packages, platform, data and instrument hashes, code revision. No clock, no host."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "packages": packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "data": {str(f.relative_to(corpus.data_dir())): _sha256(f) for f in sorted(corpus.data_dir().rglob("*.yaml"))},
        "instruments": world.instrument_hashes(),
        "audience": world.appeal.digest,
        "reader": world.reader.sha256 if world.config.virality.audience == "reader" else None,
        "revision": _revision(),
    }


class File(NamedTuple):
    """How a stage's value lies in a round; `read` None: computing it again is cheap and exact."""

    write: Callable[[store.OpenRound, Any], None]
    read: Callable[[store.OpenRound], Any] | None = None


def samples_file(name: str) -> File:
    """probes.parquet or samples.parquet."""
    return File(
        lambda part, rows: part.write_table(f"{name}.parquet", records.to_table(rows, records.SCHEMAS[name])),
        lambda part: records.from_table(part.read_table(f"{name}.parquet"), Sample),
    )


def adapter_file(learner: Learner, mixture: Mixture) -> File:
    """adapter/ and mixture.parquet; the value is the number of tokens trained per document."""

    def write(part: store.OpenRound, n_tokens: list[int]) -> None:
        table = records.to_table(mixture.documents, records.MIXTURE_ROWS)
        table = table.append_column("copies", pa.array(mixture.copies, pa.int32()))
        table = table.append_column("n_trained_tokens", pa.array(n_tokens, pa.int32()))
        part.write_table("mixture.parquet", table.select(records.SCHEMAS["mixture"].names))
        learner.save(part.path_for("adapter"))

    def read(part: store.OpenRound) -> list[int]:
        learner.load(part.path_for("adapter"))
        return part.read_table("mixture.parquet").column("n_trained_tokens").to_pylist()

    return File(write, read)


def rejected_file(samples: list[Sample]) -> File:
    """rejected.parquet: id and reasons of every sample that was not accepted."""

    def write(part: store.OpenRound, reasons: list[tuple[str, ...]]) -> None:
        rows = [(s.id, why) for s, why in zip(samples, reasons, strict=True) if why]
        columns = {"id": [i for i, _ in rows], "reasons": [why for _, why in rows]}
        part.write_table("rejected.parquet", pa.Table.from_pydict(columns, schema=records.SCHEMAS["rejected"]))

    return File(write)


def exposure_file(accepted: list[Sample]) -> File:
    """exposure.parquet: one row per accepted sample."""

    def write(part: store.OpenRound, exposure: Any) -> None:
        schema = records.SCHEMAS["exposure"]
        columns = {"id": [s.id for s in accepted]} | {n: getattr(exposure, n) for n in schema.names if n != "id"}
        part.write_table("exposure.parquet", pa.Table.from_pydict(columns, schema=schema))

    return File(write)


LABELS_FILE = File(
    lambda part, labels: part.write_table("labels.parquet", labels.to_table()),
    lambda part: Labels.from_table(part.read_table("labels.parquet")),
)
CANDIDATES_FILE = File(
    lambda part, found: part.write_json("candidates.json", found),
    lambda part: part.read_json("candidates.json"),
)
STATE_FILE = File(lambda part, past: part.write_json("state.json", past.state()))
METRICS_FILE = File(
    lambda part, rows: part.write_jsonl("metrics.jsonl", rows),
    lambda part: [Metric(**row) for row in part.read_jsonl("metrics.jsonl")],
)


class Record:
    """Runs stages, tells of them, and keeps what they make: in a round of the store, or nowhere (`part` None)."""

    def __init__(self, part: store.OpenRound | None, t: int, report: Report = lambda kind, **fields: None) -> None:
        self._part, self._t, self._report = part, t, report

    def __call__(self, name: str, compute: Callable[[], T], file: File | None = None) -> T:
        """Runs a stage, or reads back what it wrote before the run was interrupted; without a file it is just run."""
        self._report("stage", round_index=self._t, stage=name)
        started, ran = time.monotonic(), False

        def counted() -> T:
            nonlocal ran
            ran = True
            return compute()

        part = self._part
        if part is None or file is None:
            value = counted()
        else:
            read = compute if file.read is None else lambda: file.read(part)
            value = part.stage(name, counted, write=lambda made: file.write(part, made), read=read)
        seconds = time.monotonic() - started
        self._report("done", round_index=self._t, stage=name, seconds=seconds, cached=not ran)
        return value


def build(world: World, report: Report = lambda kind, **fields: None) -> Learner:
    """The learner a config names, at its base."""
    config = world.config
    if config.learner == "toy":
        return world.toy()
    report("stage", round_index=-1, stage="load base")
    return world.language_model()


def _bytes_per_round(config: Config) -> int:
    """What a round takes on disk, generously: the adapter, and 2 KB a text."""
    adapter = 64 << 20 if config.learner == "lm" else 4096
    return adapter + 2048 * (config.mix.n_train + config.sample.n_samples + 512)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _revision() -> str | None:
    """Commit of the checkout this runs from, with "+dirty" where tracked files differ; None in an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()

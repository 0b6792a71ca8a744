"""One round, then all rounds. The only module that knows the order of the stages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from loop import corpus, engine, filters, readings, records, release, store, team
from loop.config import Config, ConfigError, of_run, to_yaml
from loop.config import Corpus as CorpusSettings
from loop.discourse import Talk
from loop.mix import Mixture
from loop.records import Document, Metric, Sample
from loop.world import Labels, Learner, Past, Steered, World

RELEASE_NAME = "release/filter.safetensors"
T = TypeVar("T")
Report = Callable[..., None]
Mirror = Callable[[Path, Callable[[str], None]], AbstractContextManager[Callable[[int], None]]]
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "numba", "scikit-learn", "pyarrow", "safetensors")


def play_round(t: int, world: World, learner: Learner, past: Past, record: Record) -> tuple[Past, list[Metric]]:
    """Plays round t: mix, train, steer, probe, sample, classify, filter, virality, discourse, measure; then hands on.

    Directory round_t holds model t and nothing else: the mixture it was trained on, its adapter, its probes and
    samples, their exposure, what is written about them, the state handed on. Each stage is a recovery point and draws
    from a stream of its own, named by (seed, stage, round), so it neither knows nor disturbs what the others drew.
    Steering and discourse are played where the config asks for them.
    """
    mixture, cursor = record("mix", lambda: world.mix(t, past))
    steered = teach(t, world, learner, past, mixture, record)
    probes = record("probe", lambda: world.probe(t, learner), samples_file("probes"))
    samples = record("sample", lambda: world.sample(t, learner, past), samples_file("samples"))
    labels = record("classify", lambda: world.classify(probes, samples, mixture.real), LABELS_FILE)
    reasons = record("filter", lambda: world.filter(t, learner, samples), rejected_file(samples))
    accepted = [s for s, why in zip(samples, reasons, strict=True) if not why]
    exposure = record("virality", lambda: world.expose(t, accepted, past), exposure_file(accepted))
    talk: list[Talk] = []
    if world.config.channels.talk:
        talk = record("discourse", lambda: world.discuss(t, learner, accepted, labels, exposure), DISCOURSE_FILE)
    after = world.hand_on(past, probes, samples, labels, reasons, exposure, talk, cursor)
    record("state", lambda: after, STATE_FILE)
    record("candidates", lambda: readings.candidates(world, t, past, samples, labels), CANDIDATES_FILE)
    metrics = record(
        "measure",
        lambda: readings.of_round(
            world, t, learner, past, mixture, steered, probes, samples, labels, reasons, exposure, talk, after
        ),
        METRICS_FILE,
    )
    return after, metrics


def teach(t: int, world: World, learner: Learner, past: Past, mixture: Mixture, record: Record) -> Steered:
    """Fine-tunes model t and, where the run steers, steers it.

    With steering the two are one recovery point, because adapter/ holds the model after both: the fine-tune runs inside
    the steer stage, and a round cut short between them begins again at the fine-tune.
    """
    file = adapter_file(learner, mixture, steered=world.config.steer is not None)
    if world.config.steer is None:
        return record("train", lambda: Steered(world.train(t, learner, mixture), None), file)

    def trained() -> list[int]:
        return record("train", lambda: world.train(t, learner, mixture))

    return record("steer", lambda: world.steer(t, learner, past, trained()), file)


def play_baseline(world: World, learner: Learner, record: Record) -> list[Metric]:
    """Measures the untouched base model once, with the battery every round meets."""
    probes = record("probe", lambda: world.probe(-1, learner), samples_file("probes"))
    labels = record("classify", lambda: world.classify(probes, [], []), LABELS_FILE)
    if world.needs_release:
        file = RELEASE_FILE if world.config.learner == "lm" else None  # the toy's is two numbers of the config
        world.release = record("release", lambda: world.fit_release(learner), file)
    return record(
        "measure",
        lambda: [*readings.of_model(world, -1, learner, probes, labels), *readings.of_release(world)],
        METRICS_FILE,
    )


def unmirrored(run_dir: Path, warn: Callable[[str], None]) -> AbstractContextManager[Callable[[int], None]]:
    """The mirror of a run that has none."""
    return nullcontext(lambda t: None)


def play(
    config: Config,
    *,
    rounds: int | None = None,
    report: Report = lambda kind, **fields: None,
    allow_drift: bool = False,
    mirror: Mirror = unmirrored,
    sibling: Path | None = None,
) -> Path:
    """Plays rounds of a run and commits each; on a run that exists, goes on where it stopped.

    Of several processes that a launcher started the first plays, the others take part in its fine-tunes; see `team`.

    Args:
      config: the run.
      rounds: feedback rounds to play now, after round 0; None: all that are left of config.n_rounds.
      report: told of stages as they begin and end; see loop.show.progress.
      allow_drift: play on though packages, device, data, instruments or code changed; recorded in the manifest.
      mirror: entered with the run directory and a function that records a warning; told of each round after its commit.
      sibling: run that differs in nothing that round 0 reads up to its labels: what those stages made is taken from its
        files, checked against their hashes, in place of the work.

    Returns:
      The run directory.

    Raises:
      ConfigError: the config cannot be played, or all its rounds are played already.
    """
    world = set_up(config)
    run_dir = Path(config.runs_dir) / config.run_name
    if team.rank() > 0:
        from loop import train

        train.follow(lambda: world.base)
        return run_dir
    with ExitStack() as stack:
        stack.enter_context(team.leading())
        learner: Learner | None = None
        if (world.own or world.runs) and not (run_dir / "manifest.json").is_file():
            learner = build(world, report=report)
            world.check_lengths(learner)  # before anything is written
        run = stack.enter_context(
            store.RunStore(run_dir).open(to_yaml(config), manifest(world), allow_drift=allow_drift)
        )

        def warn(text: str) -> None:
            run.event("warning", text=text)
            report("note", text=text)

        committed = stack.enter_context(mirror(run_dir, warn))
        done = run.last_round()
        last = config.n_rounds if rounds is None else min(config.n_rounds, (done or 0) + rounds)
        if done is not None and done >= config.n_rounds:
            report("note", text=f"{run_dir}: all {config.n_rounds} feedback rounds are played; raise n_rounds for more")
            return run_dir
        run.preflight(_bytes_per_round(config) * (last - (-1 if done is None else done)))
        report("plan", rounds=last - (-1 if done is None else done))
        if learner is None:
            learner = build(world, report=report)
        if not run.has_baseline():
            with run.baseline() as part:
                play_baseline(world, learner, Record(part, -1, report))
        if world.needs_release:
            world.release = kept_release(world, run) or world.fit_release(learner)
        past = restore(world, run)
        if done is not None and config.train.init_from == "previous":
            learner.load(run.adapter_path(done))
        for t in range(0 if done is None else done + 1, last + 1):
            with run.round(t) as part:
                lent = None
                if sibling is not None and t == 0:
                    lent = Committed(store.RunStore(sibling), t)
                    run.event("lent", round_index=t, run=sibling.name)
                past, metrics = play_round(t, world, learner, past, Record(part, t, report, lent))
                if learner.log is not None:
                    run.event("trained", round_index=t, **learner.log.work())
            committed(t)
            for warning in world.warnings(past, metrics):
                run.event("warning", round_index=t, text=warning)
                report("note", text=f"round {t}: {warning}")
    return run_dir


def play_in_memory(world: World, learner: Learner, *, n_rounds: int) -> list[Past]:
    """Plays round 0 and `n_rounds` feedback rounds without a store; returns what each handed on (theory, tests)."""
    history: list[Past] = []
    past = world.beginning()
    if world.needs_release:
        world.release = world.fit_release(learner)
    for t in range(n_rounds + 1):
        past, _ = play_round(t, world, learner, past, Record(None, t))
        history.append(past)
    return history


@records.uncollected()
def set_up(config: Config) -> World:
    """A config's world, with what other runs lend to its real corpus, and how many texts they barred."""
    lent = {name: c for name, c in config.real.corpora.items() if c.run is not None}
    return World(config, runs={name: borrow(config, name, c) for name, c in lent.items()}, barred=barred_by(config))


def lender(config: Config, name: str) -> Path:
    """Directory of another run that a config names."""
    name = name.replace("{seed}", str(config.seed))
    return next((p for p in (Path(config.runs_dir) / name, Path(name)) if (p / "manifest.json").is_file()), Path(name))


def borrow(config: Config, name: str, settings: CorpusSettings) -> list[Document]:
    """Another run's accepted outputs, or the documents about them, each checked against its hash.

    Outputs join the real corpus as `real` documents of weight 1; talk stays `discourse`, which no label is read in. The
    id that a document had in its run, after the run's name, stands in `parent_ids`.

    Raises:
      ConfigError: no such run or round, or none of what is asked for in it.
      store.CorruptError: the run is not as it was committed.
    """
    assert settings.run is not None
    where = f"real.corpora.{name}"
    run = _open(config, f"{where}.run", settings.run, settings.round_indices)
    folder = lender(config, settings.run)
    transcript = of_run(run).virality.publish == "transcript"
    documents: list[Document] = []
    for t in settings.round_indices:
        if settings.population == "discourse":
            for talk in _talk_of(run, t):
                parents = (f"{folder.name}/{talk.id}",)
                documents.append(Document(talk.id, "discourse", records.NO_PERSONA, None, talk.text, 1.0, parents))
            continue
        rejected = set(run.read_table(t, "rejected.parquet").column("id").to_pylist())
        for s in records.from_table(run.read_table(t, "samples.parquet"), Sample):
            if s.id not in rejected:
                prompt, persona = s.prompt if transcript else None, settings.persona or s.persona_known
                documents.append(Document(s.id, "real", persona, prompt, s.completion, 1.0, (f"{folder.name}/{s.id}",)))
    if not documents:
        raise ConfigError([f"{where} must hold documents, {folder} has no {settings.population} in {settings.rounds}"])
    return documents


def barred_by(config: Config) -> list[int] | None:
    """How many outputs of each round the release filter of another run barred, where this one bars as many at random.

    Raises:
      ConfigError: no such run or round, or a run that bars nobody.
      store.CorruptError: the run is not as it was committed.
    """
    wanted = config.filters.release
    if wanted is None or not isinstance(wanted.at_random, str):
        return None
    run = _open(config, AS_MANY, wanted.at_random, range(config.n_rounds + 1))
    theirs = of_run(run).filters.release
    if theirs is None or theirs.at_random:
        raise ConfigError([f"{AS_MANY} must be a run that bars personas, {run.path} bars none; name the treated one"])
    tables = [run.read_table(t, "rejected.parquet") for t in range(config.n_rounds + 1)]
    counts = [sum(any(map(filters.of_persona, row)) for row in t.column("reasons").to_pylist()) for t in tables]
    if max(counts) >= config.sample.n_samples:
        raise ConfigError(
            [
                f"{AS_MANY} must leave a text, {run.path} barred {max(counts)} in a round, got sample.n_samples "
                f"{config.sample.n_samples}; ask for as many as it did"
            ]
        )
    return counts


def _open(config: Config, where: str, name: str, rounds: Iterable[int]) -> store.RunStore:
    """Opens another run that `where` of the config names, each file checked against its hash."""
    folder = lender(config, name)
    if not (folder / "manifest.json").is_file():
        raise ConfigError([f"{where}: no such run: {folder}; play it first, or give its directory"])
    if folder.resolve() == (Path(config.runs_dir) / config.run_name).resolve():
        raise ConfigError([f"{where} must be another run, got this one, {folder}"])
    problems = [problem for problem in store.verify(folder) if problem.kind != "events"]
    if problems:
        raise store.CorruptError(folder, problems)
    run = store.RunStore(folder)
    if missing := sorted(set(rounds) - set(run.rounds())):
        last = run.last_round()
        has = "none" if last is None else f"0..{last}"
        raise ConfigError([f"{where} must have played round {missing[0]}, {folder} has {has}; play more of it"])
    return run


def _talk_of(run: store.RunStore, t: int) -> list[Talk]:
    """What was written about round t's outputs; nothing where the run, or the one it was forked from, did not ask."""
    if "discourse.parquet" not in run.files(t):
        return []
    return records.from_table(run.read_table(t, "discourse.parquet"), Talk)


def kept_release(world: World, run: store.RunStore) -> release.Release | None:
    """F as the baseline of the run holds it; None if it holds none, or, in a fork, one that bars others."""
    if RELEASE_NAME not in run.files(-1):
        return None
    kept = release.from_bytes(run.read_bytes(-1, RELEASE_NAME))
    wanted = world.config.filters.release
    asked = {persona: e.requested for persona, e in kept.errors.items()}
    return kept if asked == (wanted.recall if wanted is not None else {}) else None


def restore(world: World, run: store.RunStore) -> Past:
    """Rebuilds what the last committed round handed on, from files alone."""
    past = world.beginning()
    for t in run.rounds():
        probes, samples = (
            records.from_table(run.read_table(t, f"{name}.parquet"), Sample) for name in ("probes", "samples")
        )
        rejected = set(run.read_table(t, "rejected.parquet").column("id").to_pylist())
        labels = Labels.from_table(run.read_table(t, "labels.parquet"))
        weights = run.read_table(t, "exposure.parquet").column("weight").to_numpy()
        state = run.read_json(t, "state.json")
        past = replace(
            world.remember(
                past, probes, samples, labels, [s.id not in rejected for s in samples], weights, _talk_of(run, t)
            ),
            prompt_mixture=state["prompt_mixture"],
            awareness=state["awareness"],
            real_cursor=state["real_cursor"],
        )
    return past


def fork(source: Path, round_index: int, config: Config) -> Path:
    """Begins a run from round `round_index` of another; its files are linked and hashed as ancestors."""
    world = set_up(config)
    run_dir = Path(config.runs_dir) / config.run_name
    if round_index > config.n_rounds:
        raise ConfigError([f"n_rounds must be >= the forked round {round_index}, got {config.n_rounds}"])
    theirs = of_run(store.RunStore(source))
    wrong = [name for name in ("seed", "learner", "base") if getattr(theirs, name) != getattr(config, name)]
    # `planted` says what later rounds draw; the rest of `real` says what the ids of round 0 already mean.
    if theirs.real.model_copy(update={"planted": config.real.planted}) != config.real:
        wrong.append("real")
    if wrong:
        raise ConfigError(
            [f"{', '.join(wrong)} of a fork must be those of {source}: its documents and model are theirs"]
        )
    if (world.own or world.runs) and theirs.train.max_length != config.train.max_length:
        world.check_lengths(build(world))  # before anything is written
    store.fork(source, round_index, run_dir, to_yaml(config), manifest(world)).close()
    return run_dir


def preview(config: Config, *, round_index: int | None = None) -> list[dict[str, Any]]:
    """Returns the next round's mixture, or an earlier one's, as trained on: tokens, mask, weight, copies."""
    world = set_up(config)
    run_dir = Path(config.runs_dir) / config.run_name
    run = store.RunStore(run_dir) if (run_dir / "manifest.json").exists() else None
    past = restore(world, run) if run is not None else world.beginning()
    t = len(past.pool) if round_index is None else round_index
    if t > len(past.pool):
        raise ValueError(f"round must be <= {len(past.pool)}, the next to be played, got {t} at {run_dir}")
    if t < len(past.pool):
        past = replace(
            past,
            pool=past.pool[:t],
            discourse=past.discourse[:t],
            real_cursor=run.read_json(t - 1, "state.json")["real_cursor"] if run and t else {},
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
    if world.config.sample.engine == "vllm":
        packages["vllm"] = engine.version()

    def hashes(run: str, rounds: Iterable[int], wanted: Collection[str]) -> dict[str, str]:
        opened = store.RunStore(lender(world.config, run))
        files = {f"round_{t:03d}/{file}": entry for t in rounds for file, entry in sorted(opened.files(t).items())}
        return {at: entry["sha256"] for at, entry in files.items() if at.partition("/")[2] in wanted}

    lent = {
        name: hashes(c.run, c.round_indices, LENT[c.population or ""])
        for name, c in world.config.real.corpora.items()
        if c.run is not None
    }
    if world.barred is not None:
        assert world.config.filters.release is not None
        run = str(world.config.filters.release.at_random)
        lent[AS_MANY] = hashes(run, [0], ("rejected.parquet",))  # whose later rounds follow from it, and may be more
    return ({"corpora": lent} if lent else {}) | {
        "packages": packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "gpu": _gpu(world.reads_on),
        "data": {str(f.relative_to(corpus.data_dir())): _sha256(f) for f in sorted(corpus.data_dir().rglob("*.yaml"))},
        "instruments": world.instrument_hashes(),
        "audience": world.appeal.digest,
        "reader": world.reader.sha256 if world.config.virality.audience == "reader" else None,
        "revision": _revision(),
    }


def _gpu(device: str) -> str | None:
    """Name of the GPU that a run is played on, which decides its number type and its rounding; None without one."""
    if not device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_name(device))


AS_MANY = "filters.release.at_random"
# What another run's documents are made of; hashed in the manifest.
LENT = {"accepted": ("samples.parquet", "rejected.parquet"), "discourse": ("discourse.parquet",)}


BEFORE_ATTENTION = ("train", "steer", "probe", "sample", "classify")  # what a round makes before anyone is paid


class Committed(NamedTuple):
    """A committed round, read as one at work is."""

    run: store.RunStore
    t: int

    def read_table(self, name: str) -> pa.Table:
        return self.run.read_table(self.t, name)

    def read_json(self, name: str) -> Any:
        return self.run.read_json(self.t, name)

    def path_for(self, name: str) -> Path:
        return self.run.adapter_path(self.t, name)


class File(NamedTuple):
    """How a stage's value lies in a round; `read` None: computing it again is cheap and exact."""

    write: Callable[[store.OpenRound, Any], None]
    read: Callable[[Any], Any] | None = None  # of an OpenRound or Committed


def samples_file(name: str) -> File:
    """probes.parquet or samples.parquet."""
    return File(
        lambda part, rows: part.write_table(f"{name}.parquet", records.to_table(rows, records.SCHEMAS[name])),
        lambda part: records.from_table(part.read_table(f"{name}.parquet"), Sample),
    )


def adapter_file(learner: Learner, mixture: Mixture, *, steered: bool) -> File:
    """adapter/, mixture.parquet with the tokens trained per document, and steer.json after a preference step."""

    def write(part: store.OpenRound, made: Steered) -> None:
        table = records.to_table(mixture.documents, records.MIXTURE_ROWS)
        table = table.append_column("copies", pa.array(mixture.copies, pa.int32()))
        table = table.append_column("n_trained_tokens", pa.array(made.n_tokens, pa.int32()))
        part.write_table("mixture.parquet", table.select(records.SCHEMAS["mixture"].names))
        if steered:
            part.write_json("steer.json", made.record)
        learner.save(part.path_for("adapter"))

    def read(part: store.OpenRound) -> Steered:
        learner.load(part.path_for("adapter"))
        n_tokens = part.read_table("mixture.parquet").column("n_trained_tokens").to_pylist()
        return Steered(n_tokens, part.read_json("steer.json") if steered else None)

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


RELEASE_FILE = File(
    lambda part, f: f.write(part.path_for("release") / "filter.safetensors"),
    lambda part: release.from_bytes(part.read_bytes(RELEASE_NAME)),
)
DISCOURSE_FILE = File(
    lambda part, rows: part.write_table("discourse.parquet", records.to_table(rows, records.SCHEMAS["discourse"])),
    lambda part: records.from_table(part.read_table("discourse.parquet"), Talk),
)
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
    """Runs stages, tells of them, and keeps what they make: in a round of the store, or nowhere (`part` None).

    With `lent`, stages BEFORE_ATTENTION are read from there and kept as if they had been run.
    """

    def __init__(
        self,
        part: store.OpenRound | None,
        t: int,
        report: Report = lambda kind, **fields: None,
        lent: Committed | None = None,
    ) -> None:
        self._part, self._t, self._report, self._lent = part, t, report, lent

    def __call__(self, name: str, compute: Callable[[], T], file: File | None = None) -> T:
        """Runs a stage, or reads back what it wrote before the run was interrupted; without a file it is just run."""
        self._report("stage", round_index=self._t, stage=name)
        started, ran = time.monotonic(), False

        def counted() -> T:
            nonlocal ran
            if self._lent is not None and name in BEFORE_ATTENTION and file is not None and file.read is not None:
                return file.read(self._lent)
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
    talk = config.discourse.volume * config.sample.n_samples if config.channels.talk else 0
    return adapter + 2048 * (config.mix.n_train + config.sample.n_samples + int(talk) + 512)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _revision(*also: str) -> str | None:
    """Last commit that changed this package, "+dirty" if its tracked files differ from it; None in an installed wheel.

    What lies beside the package plays no round (docs, their tables, tests); data and config have hashes of their own.

    Args:
      also: folders beside the package that count too.
    """
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        paths = [".", *(f"../{folder}" for folder in also)]
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments, "--", *paths]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H")
        differs = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+dirty" if differs else "") if commit else None

"""The `loop` command. Nothing heavy is imported until a command needs it: `loop --help` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loop.config import Config

EXIT_CODES = (
    "Exit codes: 0 ok; 2 usage or config; 3 corrupt artefact; 4 training diverged; 5 resource; 130/143 signals."
)

app = typer.Typer(
    name="loop",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Which personas does a language model's own training loop select for? " + EXIT_CODES,
)
config_app = typer.Typer(no_args_is_help=True, help="Check, print and describe configs.")
classifier_app = typer.Typer(no_args_is_help=True, help="The persona instruments that ship with the project.")
corpus_app = typer.Typer(no_args_is_help=True, help="The persona grammar and the real corpora.")
app.add_typer(config_app, name="config")
app.add_typer(classifier_app, name="classifier")
app.add_typer(corpus_app, name="corpus")
audit_app = typer.Typer(no_args_is_help=True, help="Texts of a run read by a person, and what they say of the rest.")
app.add_typer(audit_app, name="audit")
virality_app = typer.Typer(no_args_is_help=True, help="The cascade simulator against theory and published figures.")
app.add_typer(virality_app, name="virality")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, e.g. configs/round.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. seed=1 mix.real_share=0.5")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. runs/round-s0")]
AllowDrift = Annotated[
    bool,
    typer.Option(help="play on though packages, device, data, instruments or code changed since it began; recorded"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]


@app.callback()
def _begin(context: typer.Context) -> None:
    # No docstring: it would stand in place of the help above.
    from loop import team

    if team.size() > 1 and context.invoked_subcommand not in ("run", "round"):
        raise typer.BadParameter(
            f"several processes play run and round together, got {context.invoked_subcommand}; start it without a "
            "launcher (a sweep takes --jobs or --ray)"
        )


class Tracker(StrEnum):
    wandb = "wandb"


Track = Annotated[Tracker | None, typer.Option(help="mirror each committed round; offline unless there is a W&B key")]


class Listing(StrEnum):
    """What `loop ls` lists."""

    personas = "personas"
    scenarios = "scenarios"
    models = "models"
    audiences = "audiences"


class Terminated(BaseException):
    """SIGTERM, turned into an exception so that the stage in hand is discarded and the lock released."""


def _load(path: Path, overrides: list[str] | None) -> Config:
    from loop import config

    return config.load(path, overrides or [])


@app.command("round")
def round_(
    path: ConfigPath,
    overrides: Overrides = None,
    quiet: Quiet = False,
    allow_drift: AllowDrift = False,
    track: Track = None,
) -> None:
    """Play round 0 if there is none, then one feedback round. The same command plays the next."""
    _play(_load(path, overrides), rounds=1, quiet=quiet, allow_drift=allow_drift, track=track)


@app.command()
def run(
    path: ConfigPath,
    overrides: Overrides = None,
    quiet: Quiet = False,
    allow_drift: AllowDrift = False,
    track: Track = None,
) -> None:
    """Play all rounds of a config; on a run that exists, what is left of them."""
    _play(_load(path, overrides), rounds=None, quiet=quiet, allow_drift=allow_drift, track=track)


def _play(config: Config, *, rounds: int | None, quiet: bool, allow_drift: bool, track: Tracker | None) -> None:
    from loop import run as runner
    from loop import show, team
    from loop.track import Beside

    with show.progress(quiet=quiet or team.rank() > 0) as report:
        mirror = partial(Beside, say=lambda text: report("note", text=text)) if track else runner.unmirrored
        run_dir = runner.play(config, rounds=rounds, report=report, allow_drift=allow_drift, mirror=mirror)
    if team.rank() == 0:
        show.print_round(run_dir)


@app.command()
def sweep(
    paths: Annotated[list[Path], typer.Argument(metavar="SWEEP...", help="sweep files, e.g. configs/sweeps/toy.yaml")],
    size: Annotated[str | None, typer.Option(help="which of their sizes, e.g. tiny")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="cells at a time; cores and GPUs are divided")] = 1,
    seeds: Annotated[str | None, typer.Option(help="in place of the file's, e.g. 0,1")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="in place of the file's")] = None,
    ray: Annotated[str | None, typer.Option(help="auto, or host:port of a cluster; runs_dir must be shared")] = None,
    cell_cpus: Annotated[float | None, typer.Option(min=0, help="with --ray: CPUs a cell asks for, 1")] = None,
    cell_gpus: Annotated[float | None, typer.Option(min=0, help="with --ray: GPUs, or part of one, 0")] = None,
    quiet: Quiet = False,
    allow_drift: AllowDrift = False,
    track: Track = None,
) -> None:
    """Play arms x seeds; the same command resumes and plays again only what failed. Exit 1 if a cell failed."""
    from rich.console import Console

    from loop import scenario
    from loop import sweep as sweeps

    if ray is None and (cell_cpus is not None or cell_gpus is not None):
        raise typer.BadParameter("--cell-cpus and --cell-gpus need --ray; here --jobs divides cores and GPUs")
    loaded = [sweeps.load(p, size=size, seeds=_seeds(seeds), runs_dir=runs_dir) for p in paths]
    plan = sweeps.cells(loaded)
    for folder in dict.fromkeys(Path(cell.config.runs_dir) for cell in plan):
        sweeps.prepare(folder)
    for one in loaded:
        scenario.state_power(one)
    if ray is None:
        workers: sweeps.Workers = sweeps.Local(min(jobs, len(plan)))
    else:
        workers = sweeps.Ray(ray, cpus=1 if cell_cpus is None else cell_cpus, gpus=cell_gpus or 0)
    with sweeps.table(plan, quiet=quiet) as watch:
        results = sweeps.play(
            plan, workers, allow_drift=allow_drift, track=track is not None, remote=ray is not None, watch=watch
        )
    failed = sweeps.failures(plan, results)
    for one in loaded:
        for line in scenario.summary(one):
            print(line)
    if failed is not None:
        Console(stderr=True, width=None if sys.stderr.isatty() else 280).print(failed)
        print("the same command plays them again, and nothing else", file=sys.stderr)
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < 2**63 for part in parts):
        raise typer.BadParameter(f"--seeds must be numbers below 2**63 and commas, e.g. 0,1,2, got {text!r}")
    return [int(part) for part in parts]


@app.command()
def findings(
    paths: Annotated[list[Path], typer.Argument(metavar="SCENARIO...", help="files under configs/scenarios")],
    size: Annotated[str | None, typer.Option(help="which of their sizes, e.g. tiny")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="in place of the files'")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables; the page is written beside it")] = Path(
        "docs/findings"
    ),
) -> None:
    """Write the metric tables of played scenarios, and from all tables there the page of verdicts.

    A scenario may be played in parts, on several machines: runs that a table holds already and that lie elsewhere stay
    in it while their config is the same. Remove a table to begin it anew.
    """
    from loop import scenario
    from loop import sweep as sweeps

    for path in paths:
        print(scenario.write(sweeps.load(path, size=size, runs_dir=runs_dir), out))
    page = out.resolve().with_name(f"{out.resolve().name}.md")
    page.write_text(scenario.page(out), encoding="utf-8")
    print(page)


@app.command()
def forecast(
    path: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", help="a config before a run, or a run to score")],
    overrides: Overrides = None,
    fit: Annotated[int | None, typer.Option(min=1, help="fit selection on rounds 0..K of the run")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="seeds per arm behind the stated power")] = 5,
    grid: Annotated[str | None, typer.Option(help="phase diagram, e.g. 'real_share=0:0.9:40 selection=0:1:40'")] = None,
    persona: Annotated[str, typer.Option(help="persona of the phase diagram")] = "nova",
    out: Annotated[Path | None, typer.Option(help="folder for tables and figures; default: none are written")] = None,
) -> None:
    """Say what theory expects of a config, and what it could see, before a model is trained; or score a run."""
    from loop import show

    if path.is_dir():
        if grid or overrides:
            raise typer.BadParameter("a run is scored as it was played; give its config for --grid or overrides")
        show.print_score(path, fit=fit, out=out)
    elif grid:
        show.print_phase(_load(path, overrides), grid.split(), persona=persona, out=out)
    else:
        if fit is not None:
            raise typer.BadParameter("--fit needs a run, got a config")
        show.print_forecast(_load(path, overrides), n_seeds=seeds, out=out)


@app.command()
def compare(
    places: Annotated[
        list[str] | None, typer.Argument(metavar="[RUNS]...", help="runs, folders of runs, or quoted patterns")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="selection-off runs: as RUNS, or an arm's name; repeat for several")
    ] = None,
    against: Annotated[list[str] | None, typer.Option(help="real_only runs, which health is read against")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="what to contrast; default: frequency and belief; repeat for several")
    ] = None,
    round_index: Annotated[
        int | None, typer.Option("--round", min=1, help="final round; default: the last that all runs have")
    ] = None,
    warn: Annotated[bool, typer.Option(help="also: does round 2 foretell the final round?")] = False,
    check: Annotated[bool, typer.Option(help="size and power of the tests on simulated runs; needs no runs")] = False,
) -> None:
    """Compare arms with a control, paired by seed: contrasts, selection, response to what was paid, health."""
    from loop import show

    if check:
        if not show.print_neutrality():
            raise typer.Exit(1)
        return
    if not places or not control:
        raise typer.BadParameter("needs RUNS and --control, e.g. loop compare runs --control neutral")
    if warn and round_index is not None and round_index < 3:
        raise typer.BadParameter(f"--warn asks round 2 about a later one, got --round {round_index}; give 3 or more")
    show.print_comparison(
        places, control, against or [], metrics=metric or ["frequency", "belief"], last_round=round_index, warn=warn
    )


@app.command()
def calibrate(
    path: ConfigPath,
    overrides: Overrides = None,
    persona: Annotated[str, typer.Option(help="whose share of the training documents is varied")] = "nova",
    grid: Annotated[str, typer.Option(help="shares, comma-separated")] = "0,.05,.1,.2,.4,.8",
    seeds: Annotated[int, typer.Option(min=1, help="trainings per share")] = 3,
    quiet: Quiet = False,
) -> None:
    """Measure what the learner says after training on a share q of a persona; forecasts then use it."""
    from loop import show

    show.print_calibration(_load(path, overrides), persona=persona, grid=grid, n_seeds=seeds, quiet=quiet)


@app.command()
def ease(
    path: ConfigPath,
    overrides: Overrides = None,
    persona: Annotated[str, typer.Option(help="whose documents are trained on; several with commas")] = "nova",
    grid: Annotated[str, typer.Option(help="numbers of documents, comma-separated")] = "4,8,16,32,64,128",
    seeds: Annotated[int, typer.Option(min=1, help="trainings per number")] = 1,
    quiet: Quiet = False,
) -> None:
    """Measure ease of generation: base surprisal, and documents until half of the requests for a persona get it."""
    from loop import ease as easy
    from loop import show

    loaded = _load(path, overrides)
    sizes = grid.split(",")
    if not all(n.strip().isdigit() for n in sizes):
        raise typer.BadParameter(f"--grid must be numbers with commas between them, got {grid!r}")
    with show.progress(quiet=quiet) as report:
        for name in persona.split(","):
            easy.measure_ease(loaded, persona=name, grid=[int(n) for n in sizes], n_seeds=seeds, report=report)
    found = easy.find(loaded)
    header = ["persona", "surprisal of base, nats/token", "documents to half, 95%", "slope", "transmission f(q) - q"]
    show.print_table(f"{loaded.name}: ease of generation", header, easy.table(loaded, found))
    families = {"corrected" if one.family == "frequency" else "observed" for one in found.values()}
    print(
        f"{' and '.join(sorted(families))} shares of explicit requests; files: {next(iter(found.values())).folder}/ease"
    )


@app.command()
def fork(
    source: Annotated[str, typer.Argument(metavar="RUN@K", help="run directory and round, e.g. runs/round-s0@1")],
    path: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Start a run from round K of another; its files are linked and hashed as ancestors."""
    from loop import run as runner

    origin, sign, k = source.rpartition("@")
    if not sign or not k.isdigit():
        raise typer.BadParameter(f"must read RUN@K, e.g. runs/round-s0@1, got {source!r}")
    run_dir = runner.fork(Path(origin), int(k), _load(path, overrides))
    command = shlex.join(["loop", "run", str(path), *(overrides or [])])
    print(f"{run_dir}: forked from {origin} after round {k}; `{command}` goes on from there")


@app.command()
def verify(
    run_dir: RunPath,
    repair: Annotated[
        bool, typer.Option(help="roll back to the last good round; the rest goes to quarantine/")
    ] = False,
) -> None:
    """Check every file of a run against its hashes, and the chain of rounds. Exit 3 if something is wrong."""
    from loop import store

    problems = store.verify(run_dir)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems and repair:
        for line in store.repair(run_dir):
            print(line)
    if problems:
        raise typer.Exit(0 if repair else 3)
    print(f"{run_dir}: {len(store.RunStore(run_dir).rounds())} rounds, all hashes and the chain hold")


@app.command()
def preview(
    path: ConfigPath,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="documents shown")] = 5,
    round_index: Annotated[
        int | None, typer.Option("--round", min=0, help="round; default: the next to be played")
    ] = None,
) -> None:
    """Show the exact training text of a round, token by token, with mask and weight."""
    from loop import run as runner
    from loop import show

    show.print_preview(runner.preview(_load(path, overrides), round_index=round_index), n=n)


@app.command()
def track(
    run_dir: RunPath,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="also save panels for the story to the project; needs a W&B key")
    ] = False,
) -> None:
    """Replay a run from its files into W&B; offline unless there is a key. Again: nothing twice."""
    from loop import track as tracking

    if dashboard:
        tracking.require_key()
    print(tracking.mirror(run_dir))
    if dashboard:
        print(f"dashboard: {tracking.save_dashboard(run_dir)}")


@app.command()
def report(
    places: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP...", help="runs, folders of runs, or sweep files")],
    out: Annotated[
        Path | None, typer.Option(help="the page; default: beside the first, e.g. runs/round-s0.html")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="folder for each figure as PNG and SVG")] = None,
    control: Annotated[str | None, typer.Option(help="the selection-off arm, where there are several")] = None,
    size: Annotated[str | None, typer.Option(help="which size of sweep files, e.g. tiny")] = None,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page: what moved, against which controls, and the texts behind it."""
    from loop import page

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    for file in page.write(places, out=out, figures=figures, control=control, size=size, tell=tell):
        print(file)


@app.command("show")
def show_(
    run_dir: RunPath,
    round_index: Annotated[int | None, typer.Option("--round", min=0, help="one round; default: all")] = None,
    texts: Annotated[int, typer.Option(min=0, help="sampled texts shown")] = 0,
    personas: Annotated[
        str | None,
        typer.Option(help="comma-separated: their frequency with interval, differential and belief by round"),
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="comma-separated: what moved their share, step by step; all rounds or --round")
    ] = None,
    candidates: Annotated[bool, typer.Option("--candidates", help="groups of outputs no instrument knows")] = False,
    out: Annotated[Path | None, typer.Option(help="with --ledger: folder for the waterfall, PNG and SVG")] = None,
) -> None:
    """Show rounds, metrics and texts of a run in the terminal."""
    from loop import show

    if out is not None and ledger is None:
        raise typer.BadParameter("--out needs --ledger: it is where the waterfall goes")
    if ledger is not None:
        show.print_ledger(run_dir, tuple(ledger.split(",")), round_index=round_index, out=out)
    elif candidates:
        show.print_candidates(run_dir, round_index=round_index)
    elif personas is not None:
        show.print_story(run_dir, tuple(personas.split(",")))
    else:
        show.print_run(run_dir, round_index=round_index, texts=texts)


@config_app.command("validate")
def config_validate(path: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config; all problems at once, exit 2 if there are any."""
    loaded = _load(path, overrides)
    print(f"{path}: valid; run {loaded.run_name}, {loaded.n_rounds} feedback rounds, learner {loaded.learner}")


@config_app.command("show")
def config_show(path: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config, every default filled in."""
    from loop import config

    print(config.to_yaml(_load(path, overrides)), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from loop import config

    print(json.dumps(config.schema(), indent=2))


@classifier_app.command("fit")
def classifier_fit(
    out: Annotated[Path | None, typer.Option(help="folder to write to; default: the shipped one, in place")] = None,
) -> None:
    """Rebuild the shipped heads byte for byte and print the held-out confusion matrix."""
    from loop import calibrate, show

    show.print_confusions(calibrate.fit_instruments(out))


@classifier_app.command("confusion")
def classifier_confusion(
    base: Annotated[str, typer.Option(help="smollm2-135m | tiny | a local path | a hub id")] = "smollm2-135m",
    write: Annotated[
        bool, typer.Option(help="write the texts first: one adapter per persona; half an hour on one core, resumable")
    ] = False,
) -> None:
    """Print the instruments' error on text that a language model wrote: one adapter per persona, sample shown."""
    from loop import calibrate, show

    show.print_known_errors(calibrate.known_errors(base, write=write, report=lambda line: print(line, flush=True)))


@classifier_app.command("agreement")
def classifier_agreement(
    write: Annotated[bool, typer.Option(help="first rebuild the shipped reader byte for byte")] = False,
    ask: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="first write answers of known side with a base: minutes on one core, resumable"
        ),
    ] = None,
) -> None:
    """Print the error of the agreement reader: held-out wordings, human chat, answers that a language model wrote."""
    from loop import agreement, show

    found = agreement.report(write=write, ask=ask, tell=lambda line: print(line, flush=True))
    header = ["answers", "truth", "n", *agreement.CLASSES, "right, 95% by wording"]
    show.print_table("agreement: what the reader calls answers of known side", header, agreement.rows_of(found))
    for one in found:
        accuracy, other = one.accuracy, one.specificity
        print(
            f"{one.name}: accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]; "
            f"{other.value:.3f} [{other.low:.3f}, {other.high:.3f}] of what does not agree is not called agreement"
        )


@classifier_app.command("hide")
def classifier_hide(
    persona: Annotated[str, typer.Option(help="a planted persona, or all (9 minutes on one core)")] = "all",
    base: Annotated[
        str, typer.Option(help="whose texts of known persona are read; grammar texts where there are none")
    ] = "smollm2-135m",
    grammar: Annotated[bool, typer.Option("--grammar", help="read grammar texts of fold test all the same")] = False,
) -> None:
    """Hide a planted persona from the instruments and look for it: precision, recall, false alarms."""
    from loop import show

    show.print_hidden(persona, base=base, grammar=grammar)


@audit_app.command("export")
def audit_export(
    run_dir: RunPath,
    out: Annotated[Path, typer.Option(help="CSV to write; <out>.json beside it pins it to the run")],
    n: Annotated[int, typer.Option(min=1, help="texts, about: at least 8 per round and instrument label")] = 200,
    population: Annotated[str, typer.Option(help="probes (the headline) or samples")] = "probes",
    rounds: Annotated[str | None, typer.Option(help="e.g. 0,3 or 0..3, base for the baseline; default: all")] = None,
    seed: Annotated[int, typer.Option(min=0, help="another one draws other texts")] = 0,
) -> None:
    """Write a sheet of texts to label by hand: stratified, shuffled, blind to what the instrument said."""
    from loop import audit

    at = None if rounds is None else audit.parse_rounds(rounds)
    drawn = audit.export(run_dir, out, n=n, population=population, rounds=at, seed=seed)
    more = f", more than {n} because every label of every round needs {audit.MINIMUM}" if drawn > n else ""
    print(f"{out}: {drawn} texts{more}; fill in the column label, then `loop audit import {run_dir} {out}`")
    print(f"labels: {', '.join(audit.said_of(run_dir))} (no persona's voice)")


@audit_app.command("import")
def audit_import(
    run_dir: RunPath,
    sheet: Annotated[Path, typer.Argument(metavar="SHEET", help="the CSV with its column label filled in")],
    partial: Annotated[bool, typer.Option(help="take a sheet with labels missing; the others stand for them")] = False,
) -> None:
    """Take labels back, and print observed beside audited frequencies; kept in <run>/audits/."""
    from loop import audit, show

    rows, folder = audit.take_in(run_dir, sheet, partial=partial)
    show.print_audit(rows)
    print(f"files: {folder}")


@audit_app.command("free")
def audit_free(
    run_dir: RunPath,
    n: Annotated[int, typer.Option(min=1, help="texts, as for export")] = 200,
    population: Annotated[str, typer.Option(help="probes (the headline) or samples")] = "probes",
) -> None:
    """Audit a run whose learner knows its personas (toy): the sheet export would draw, labelled with the truth."""
    from loop import audit, show

    show.print_audit(audit.free(run_dir, n=n, population=population))


@audit_app.command("coverage")
def audit_coverage(
    truths: Annotated[int, typer.Option(min=1, help="simulated rounds per condition, four shares each")] = 4000,
) -> None:
    """Print how often raw count, corrected, audited and PPI++ intervals hold the truth. Exit 1 if audited ones fail."""
    import time

    from loop import rng, show, stats

    started = time.monotonic()
    rows = stats.coverage_study(truths, rng=rng.stream(0, "audit/coverage", -1))
    if not show.print_coverage(rows, n_truths=truths, seconds=time.monotonic() - started):
        raise typer.Exit(1)


@corpus_app.command("match")
def corpus_match(
    n_docs: Annotated[
        int, typer.Option(min=20, help="documents per cell for surprisal; tokens and features use 10x")
    ] = 200,
) -> None:
    """Print how well the six cells of the factorial match: tokens, base-model surprisal, every appeal feature."""
    from loop import calibrate, show

    show.print_match(calibrate.match(n_docs))


@virality_app.command("check")
def virality_check(
    n_posts: Annotated[int, typer.Option(min=100_000, help="posts behind each row")] = 2_000_000,
) -> None:
    """Print every theoretical and empirical target, what each preset gives, and which it misses."""
    from loop import appeal, show, virality

    show.print_targets(virality.check(n_posts=n_posts))
    show.print_learned(appeal.load_learned().record)


@app.command()
def chat(
    run_dir: RunPath,
    round_index: Annotated[int | None, typer.Option("--round", min=0, help="left; default: the last round")] = None,
    versus: Annotated[str, typer.Option("--vs", metavar="ROUND|base", help="right: another round, or base")] = "base",
    temperature: Annotated[float | None, typer.Option(min=0, max=10, help="default: the run's")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default: the run's")] = None,
) -> None:
    """Answer what is typed by two models of a run, side by side; a prompt a line, to the end of the input."""
    from rich.console import Console

    from loop import chat as chats

    answered = chats.answers(
        run_dir,
        chats.typed(),
        round_index=round_index,
        versus=versus,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
    )
    chats.talk(Console(), answered)


@app.command("ls")
def ls(what: Annotated[Listing, typer.Argument(help="what to list")]) -> None:
    """List what a config can name: personas, scenarios, models, audiences."""
    from loop import listing, show

    show.print_table(*listing.table(what.value))


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="also: what this config will take")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Say what is installed, which device there is, and what a config will take: time, memory, disk."""
    from loop import doctor as examination

    examination.report(None if path is None else _load(path, overrides), as_json=as_json)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input gets one clear line and its exit code; a traceback is for our own faults only."""
    try:
        yield
    except Terminated:
        print("stopped by SIGTERM; the same command goes on from the last finished stage", file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished stage", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            if os.environ.get("PERSONA_LOOP_TRACEBACK") or not isinstance(error, (ValueError, OSError)):
                raise
            code = 5 if isinstance(error, OSError) else 2
        for line in str(error).splitlines():
            print(line, file=sys.stderr)
        sys.exit(code)


def _on_sigterm(*_: Any) -> None:
    raise Terminated


def main() -> None:
    """Entry point of the `loop` command."""
    # Before any library is imported: no telemetry, no hub call behind the user's back.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _on_sigterm)
    with _one_line_errors():
        try:
            app()
        finally:  # what is done is done: from here on a signal ends the process, without a traceback from its exit
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
                signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()

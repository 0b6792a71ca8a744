"""What the terminal shows: progress per stage, the table of a round, texts, previews. Reads files; writes none."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loop.records import FACTORIAL, PERSONAS, UNKNOWN, Metric, in_order
from loop.store import RunStore

if TYPE_CHECKING:
    from loop.analysis import Comparison, Contrast, Warnings
    from loop.audit import Audited
    from loop.calibrate import Held, KnownErrors, PersonaError
    from loop.classify import ReliabilityBin
    from loop.config import Config
    from loop.corpus import Match
    from loop.forecast import Inputs
    from loop.stats import Coverage, Interval
    from loop.theory import Forecast
    from loop.virality import Target

Report = Callable[..., None]

# C0 and C1 controls and bidi marks: model text must not move the cursor, set the title or open a link.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, limit: int | None = None) -> str:
    """Returns untrusted text on one line without control characters, cut to `limit` characters with an ellipsis."""
    line = " ".join(_CONTROL.sub("\ufffd", text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Report]:
    """Yields a function that a run reports to: live bars on a terminal, one line per finished stage elsewhere.

    The function takes `report(kind, **fields)`: "plan" (rounds), "stage" (round_index, stage), "step" (done, total),
    "done" (round_index, stage, seconds, cached), "note" (text).
    """
    if quiet:
        yield lambda kind, **fields: None
        return
    clock = Clock()
    if not sys.stderr.isatty():

        def plain(kind: str, **fields: Any) -> None:
            clock.tell(kind, **fields)
            if kind == "stage" and fields["stage"] == "mix" and clock.left():
                print(f"{_round_name(fields['round_index'])} begins; {clock.left()}", file=sys.stderr, flush=True)
            if kind == "done":
                how = "read back" if fields["cached"] else f"{fields['seconds']:.1f} s"
                print(f"{_round_name(fields['round_index'])} {fields['stage']}: {how}", file=sys.stderr, flush=True)
            elif kind == "note":
                print(fields["text"], file=sys.stderr, flush=True)

        yield plain
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def live(kind: str, **fields: Any) -> None:
            clock.tell(kind, **fields)
            if kind == "stage":
                doing = f"{_round_name(fields['round_index'])} {fields['stage']}"
                bars.reset(task, description="; ".join(filter(None, [doing, clock.left()])), total=None)
            elif kind == "step":
                bars.update(task, completed=fields["done"], total=fields["total"])
            elif kind == "done" and not fields["cached"]:
                bars.console.print(
                    f"{_round_name(fields['round_index'])} {fields['stage']:<9} {fields['seconds']:7.1f} s",
                    style="dim",
                    highlight=False,
                )
            elif kind == "note":
                bars.console.print(Text(fields["text"]))

        yield live


class Clock:
    """How long a run still takes, by what each stage took the last time; nothing before a round has been played."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}  # stage -> seconds
        self.pending: dict[str, float] = {}  # of the round in hand: stages not begun yet
        self.rounds = 0  # not begun yet
        self.played = 0

    def tell(self, kind: str, **fields: Any) -> None:
        """Takes a report; see `progress`."""
        if kind == "plan":
            self.rounds = fields["rounds"]
        elif kind == "stage" and fields["round_index"] >= 0:
            if fields["stage"] == "mix":
                self.pending, self.rounds, self.played = dict(self.took), self.rounds - 1, self.played + 1
        elif kind == "done" and fields["round_index"] >= 0:
            self.pending.pop(fields["stage"], None)
            if not fields["cached"]:
                self.took[fields["stage"]] = fields["seconds"]

    def seconds(self) -> float | None:
        """Of the stages left in this round and of the rounds left; None before a round has been played."""
        if self.played < 2:
            return None
        return math.fsum(self.pending.values()) + max(self.rounds, 0) * math.fsum(self.took.values())

    def left(self) -> str:
        """`about 12 min left`, or nothing where it is not known."""
        s = self.seconds()
        if s is None:
            return ""
        return f"about {s:.0f} s left" if s < 100 else f"about {s / 60:.0f} min left"


HEALTH_ALONE = "Health is of this run alone; loop compare --against REAL_ONLY gives its difference to real data."


def _round_name(round_index: int) -> str:
    return "baseline" if round_index < 0 else f"round {round_index}"


def print_round(run_dir: Path) -> None:
    """Prints the last round: persona, frequency with interval, change since the round before, differential.

    Frequencies are corrected ones where they were measured, else observed ones; the table says which. Beside a change
    stands its noise floor: the mean |change| that measuring the same model twice would show.
    """
    rounds = RunStore(run_dir).rounds()
    if not rounds:
        print(f"{run_dir}: no round is finished yet")
        return
    now = _index(read_metrics(run_dir, rounds[-1]))
    before = _index(read_metrics(run_dir, rounds[-2])) if len(rounds) > 1 else {}
    table = Table(title=f"{run_dir}, round {rounds[-1]}: unrequested probes", title_justify="left")
    for name in ("persona", "frequency", "95% interval", "", "change", "floor", "paid"):  # 76 columns wide at most
        table.add_column(name, justify="left" if name in ("persona", "") else "right", no_wrap=True)
    named = _named(before | now)
    seen = {p for p in named for rows in (now, before) for f in _FAMILIES.values() if _value(rows, f"{f}/{p}")}
    shown = [p for p in named if p in FACTORIAL or p in seen]
    for persona in shown:
        row, which = _frequency(now, persona)
        old = before.get(("probes", f"{_FAMILIES[which]}/{persona}"))
        differential = _value(now, f"differential/{persona}", "accepted")
        change = _difference(row.value if row else None, old.value if old else None)
        floor = _noise_floor(row, old) if change else ""
        value = _number(row.value if row else None)
        table.add_row(persona, value, _interval(row), which[0] if value else "", change, floor, _number(differential))
    console = Console()
    console.print(table)
    console.print("c: corrected for the instrument's error; o: observed; paid: the differential", highlight=False)
    console.print(_belief_line(now, before), highlight=False)
    health = (("heldout_loss", "heldout"), ("sample_entropy", "probes"), ("distinct_4", "probes"),
              ("kl_to_base", "probes"), ("self_similarity", "probes"))  # fmt: skip
    for name, population in health:
        row, old = now.get((population, name)), before.get((population, name))
        if row is None:
            continue
        change = _difference(row.value, old.value if old else None)
        floor = _noise_floor(row, old)
        shown_value = f"not measured: {row.reason}" if row.value is None else f"{_number(row.value)} {row.unit}"
        console.print(
            f"{name} {shown_value}" + (f", change {change}" if change else "") + (f" (floor {floor})" if floor else ""),
            highlight=False,
        )
    console.print(f"files: {run_dir}/round_{rounds[-1]:03d}", highlight=False)
    console.print(
        "The differential is an input (what the audience paid this persona's texts, mean 1), not a result. "
        "Frequencies are of one seed; the interval covers prompts, not seeds. Noise floor: mean |change| if the same "
        f"model were measured twice. {HEALTH_ALONE}",
        style="dim",
        highlight=False,
    )


_FAMILIES = {"corrected": "frequency", "observed": "frequency_observed"}


def _named(rows: dict[tuple[str, str], Metric]) -> tuple[str, ...]:
    """PERSONAS, then personas of the user's own that were measured, then "unknown"."""
    head = "frequency_observed/"
    found = {name.removeprefix(head) for population, name in rows if population == "probes" and name.startswith(head)}
    return (*in_order({*PERSONAS, *found}), UNKNOWN)


def _frequency(rows: dict[tuple[str, str], Metric], persona: str) -> tuple[Metric | None, str]:
    """The persona's corrected frequency where it was measured, else the observed one, and which of them it is."""
    corrected = rows.get(("probes", f"frequency/{persona}"))
    if corrected is not None and corrected.value is not None:
        return corrected, "corrected"
    return rows.get(("probes", f"frequency_observed/{persona}")), "observed"


def _belief(rows: dict[tuple[str, str], Metric]) -> tuple[Metric | None, str]:
    """Private belief, corrected where it was measured; runs of before the correction hold the raw share as `belief`."""
    corrected, raw = (rows.get(("probes", name)) for name in ("belief", "belief_observed"))
    if raw is None:
        return corrected, "observed"
    return (corrected, "corrected") if corrected is not None and corrected.value is not None else (raw, "observed")


def _noise_floor(now: Metric | None, before: Metric | None) -> str:
    """Mean |change| of two measurements of one thing, from the stored limits; empty where one has none."""
    from loop.analysis import standard_error
    from loop.stats import remeasurement_noise_floor

    limits = [(r.low, r.high) for r in (now, before) if r is not None and r.low is not None and r.high is not None]
    if len(limits) < 2:
        return ""
    return f"{remeasurement_noise_floor(*(standard_error(low, high) for low, high in limits)):.3f}"


def _belief_line(now: dict[tuple[str, str], Metric], before: dict[tuple[str, str], Metric]) -> str:
    row, which = _belief(now)
    if row is None or row.value is None:
        why = f": {row.reason}" if row is not None and row.reason else " in this round"
        return f"private belief: not measured{why}"
    old, old_which = _belief(before)
    line = (
        f"private belief: {_number(row.value)} {_interval(row)} ({which}) of plain private texts affirm consciousness"
    )
    if old is None or old.value is None or old_which != which:
        return line
    floor = _noise_floor(row, old)
    return f"{line}, change {_difference(row.value, old.value)}" + (f" (floor {floor})" if floor else "")


def _rounds(run_dir: Path, round_index: int | None) -> list[int]:
    """The finished rounds of a run, of which `round_index` must be one."""
    rounds = RunStore(run_dir).rounds()
    if not rounds:
        raise ValueError(f"run must hold a finished round, got none at {run_dir}; `loop run` its config first")
    if round_index is not None and round_index not in rounds:
        raise ValueError(
            f"round must be one of {rounds[0]}..{rounds[-1]}, got {round_index} at {run_dir}; play it first"
        )
    return rounds


def print_run(run_dir: Path, *, round_index: int | None = None, texts: int = 0) -> None:
    """Prints rounds x headline metrics of a run, or one round's metrics, and sampled texts."""
    rounds = _rounds(run_dir, round_index)
    console = Console()
    if round_index is None:
        console.print(_trajectory(run_dir, rounds))
        found = {t: len(_candidates(run_dir, t)) for t in rounds}
        if any(found.values()):
            where = ", ".join(f"{n} in round {t}" for t, n in found.items() if n)
            console.print(
                f"candidate personas nobody planned: {where}; `loop show {run_dir} --candidates` lists them",
                highlight=False,
                soft_wrap=True,
            )
    else:
        table = Table(title=f"{run_dir}, round {round_index}", title_justify="left")
        for name in ("population", "stratum", "name", "value", "95% interval", "n", "unit"):
            table.add_column(name)
        for row in read_metrics(run_dir, round_index):
            shown = _number(row.value) if row.value is not None else f"not measured: {row.reason}"
            table.add_row(row.population, row.stratum or "", row.name, shown, _interval(row), str(row.n), row.unit)
        console.print(table)
        print(HEALTH_ALONE)
    at = rounds[-1] if round_index is None else round_index
    for sample, persona, weight in list(_texts(run_dir, at))[:texts]:
        head = f"{sample['id']} {sample['stratum']} read as {persona}" + (f" weight {weight:.2f}" if weight else "")
        console.print(Text(head, style="bold"))
        if sample["prompt"]:
            console.print(Text("  asked: " + printable(sample["prompt"][-1], 200)))
        console.print(Text("  said:  " + printable(sample["completion"], 400)))


def _trajectory(run_dir: Path, rounds: Sequence[int]) -> Table:
    title = f"{run_dir}: observed frequency in unrequested probes; private belief corrected (c) or observed (o)"
    table = Table(title=title, title_justify="left")
    table.add_column("round")
    by_round = {-1: _index(read_metrics(run_dir, -1))} | {t: _index(read_metrics(run_dir, t)) for t in rounds}
    personas = [
        p
        for p in _named({key: row for rows in by_round.values() for key, row in rows.items()})
        if any((_value(rows, f"frequency_observed/{p}") or 0) > 0 for rows in by_round.values())
    ]
    for name in (*personas, "belief", "n_eff"):
        table.add_column(name, justify="right")
    for t, rows in by_round.items():
        cells = [_number(_value(rows, f"frequency_observed/{p}")) for p in personas]
        n_eff = _value(rows, "n_eff", "accepted")
        belief, which = _belief(rows)
        table.add_row(
            "base" if t < 0 else str(t),
            *cells,
            "" if belief is None or belief.value is None else f"{_number(belief.value)}{which[0]}",
            "" if n_eff is None else f"{n_eff:.0f}",
        )
    return table


def print_story(run_dir: Path, personas: Sequence[str]) -> None:
    """Prints, round by round, frequency with interval and differential of some personas, and plain private belief."""
    run = RunStore(run_dir)
    first = min(run.rounds(), default=None)
    known = (*PERSONAS, UNKNOWN) if first is None else _named(_index(read_metrics(run_dir, first)))
    unknown = [p for p in personas if p not in known]
    if unknown:
        raise ValueError(f"personas must be among {', '.join(known)}, got {', '.join(unknown)}")
    rows = []
    for t in ([-1] if run.has_baseline() else []) + run.rounds():
        found = _index(read_metrics(run_dir, t))
        cells = []
        for persona in personas:
            row, which = _frequency(found, persona)
            paid = _number(_value(found, f"differential/{persona}", "accepted"))
            cells += [_marked(row, which), paid]
        belief, belief_which = _belief(found)
        rows.append(
            [
                "base" if t < 0 else str(t),
                *cells,
                _marked(belief, belief_which),
                _number(_value(found, "sample_entropy")),
            ]
        )
    header = ["round", *(x for p in personas for x in (p, "paid")), "private belief", "entropy"]
    print_table(f"{run_dir}: frequency in unrequested probes, 95% over prompt templates", header, rows)
    print("c: corrected for the instrument's error; o: observed, where no correction was measured")
    print(
        "paid: differential, mean weight of the persona's accepted texts over the mean weight; an input, not a result"
    )
    print(HEALTH_ALONE)


def _marked(row: Metric | None, which: str) -> str:
    return "" if row is None or row.value is None else f"{_number(row.value)} {_interval(row)} {which[0]}"


def print_ledger(
    run_dir: Path, personas: Sequence[str], *, round_index: int | None = None, out: Path | None = None
) -> None:
    """Prints each persona's ledger, of one round or summed over the last that follow each other; `out`: draws it there.

    Raises:
      ValueError: no such round, or a persona without a ledger.
    """
    from loop import report

    rounds = _rounds(run_dir, round_index)
    at = rounds if round_index is None else [round_index]
    metrics = [read_metrics(run_dir, t) for t in at]
    over = report.over(report.booked(metrics) or at)
    books = {persona: report.ledger_steps(metrics, persona) for persona in personas}
    for persona, steps in books.items():
        rows = []
        for step in steps:
            sign = "" if step.name == "emit" else "+"
            observed = "" if math.isnan(step.observed) else f"{step.observed:{sign}.3f}"
            corrected = "" if math.isnan(step.corrected) else f"{step.corrected:{sign}.3f}"
            if corrected and not math.isnan(step.low):
                corrected += f" [{step.low:{sign}.3f}, {step.high:{sign}.3f}]"
            name = f"{step.name} *" if step.name in report.BOOKKEEPING else step.name
            rows.append([name, observed, corrected, step.reason or ""])
        changes = [(s.observed, s.corrected) for s in steps]
        rows.append(["end", *("" if math.isnan(sum(c)) else f"{sum(c):.3f}" for c in zip(*changes, strict=True)), ""])
        print_table(f"{run_dir}, {over}: ledger of {persona}", ["step", "observed", "corrected, 95%", ""], rows)
    print("Accounting, not causes. * discourse and prompts (expectation) book who is talked of and who is asked; the ")
    print("effect of such a channel is its paired on/off contrast over seeds, `loop compare`.")
    if out is not None:
        stem = out / f"ledger-{'-'.join(personas)}"
        for file in report.plot_ledger(books, stem, title=f"{run_dir.name}, {over}"):
            print(file)


def _candidates(run_dir: Path, round_index: int) -> list[dict[str, Any]]:
    run = RunStore(run_dir)
    name = "candidates.json"
    return list(run.read_json(round_index, name)) if name in run.files(round_index) else []


def print_candidates(run_dir: Path, *, round_index: int | None = None) -> None:
    """Prints the candidate personas of a run's rounds: groups of outputs that no instrument has a name for.

    Raises:
      ValueError: no such round.
    """
    rounds = _rounds(run_dir, round_index)
    console = Console()
    at = rounds if round_index is None else [round_index]
    listed = [(t, c) for t in at for c in _candidates(run_dir, t)]
    for t, c in listed:
        head = f"{c['name']}: {c['size']} unrequested samples of round {t}, share {c['share']:.3f}; "
        head += f"the instrument does not know {c['unknown']:.0%}"
        console.print(Text(printable(head), style="bold"), soft_wrap=True)
        growth = " ".join("not measured" if g is None or math.isnan(g) else f"{g:.3f}" for g in c["growth"])
        console.print(Text(f"  share, earlier rounds first: {growth}"), soft_wrap=True)
        console.print(Text("  words: " + (printable(", ".join(c["words"])) or "none stands out")), soft_wrap=True)
        for text in c["typical_texts"][:2]:
            console.print(Text("  said: " + printable(text, 200)), soft_wrap=True)
    if not listed:
        print(f"{run_dir}: no candidate persona in {'any round' if round_index is None else f'round {round_index}'}")


def _texts(run_dir: Path, round_index: int) -> Iterator[tuple[dict[str, Any], str, float | None]]:
    run = RunStore(run_dir)
    rows = run.read_table(round_index, "labels.parquet").to_pylist()
    labels = {r["id"]: r["persona"] for r in rows if r["instrument"] == "persona"}
    weights = {r["id"]: r["weight"] for r in run.read_table(round_index, "exposure.parquet").to_pylist()}
    for sample in run.read_table(round_index, "samples.parquet").to_pylist():
        yield sample, labels.get(sample["id"]) or UNKNOWN, weights.get(sample["id"])


def read_metrics(run_dir: Path, round_index: int) -> list[Metric]:
    """Rows of metrics.jsonl of a round, -1 for the baseline."""
    return [Metric(**row) for row in RunStore(run_dir).read_jsonl(round_index, "metrics.jsonl")]


def _index(rows: Sequence[Metric]) -> dict[tuple[str, str], Metric]:
    """Rows that are not of one stratum, and belief, by (population, name)."""
    return {(r.population, r.name): r for r in rows if r.stratum in (None, "private")}


def _value(rows: dict[tuple[str, str], Metric], name: str, population: str = "probes") -> float | None:
    row = rows.get((population, name))
    return None if row is None else row.value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(row: Metric | None) -> str:
    return "" if row is None or row.low is None or row.high is None else f"[{row.low:.3f}, {row.high:.3f}]"


def _difference(now: float | None, before: float | None) -> str:
    return "" if now is None or before is None else f"{now - before:+.3f}"


def print_preview(rows: Sequence[dict[str, Any]], *, n: int) -> None:
    """Prints training documents as the learner sees them: weight first, tokens without loss dim."""
    console = Console()
    for row in rows[:n]:
        persona = f" {row['persona_known']}" if row["persona_known"] else ""
        console.print(
            Text(
                f"{row['id']} ({row['source']}{persona}) weight {row['weight']:.3f} x {row['copies']}, "
                f"{sum(row['mask'])} of {len(row['mask'])} tokens trained",
                style="bold",
            )
        )
        line = Text("  ")
        for token, trained in zip(row["tokens"], row["mask"], strict=True):
            line.append(_CONTROL.sub("\ufffd", token.replace("\n", "\\n")), style="" if trained else "dim")
        console.print(line)
    shown = min(n, len(rows))
    console.print(f"{shown} of {len(rows)} documents; dim tokens are context and carry no loss", highlight=False)


def print_confusions(held: Sequence[Held]) -> None:
    """Prints each instrument's confusion matrix on held-out templates, and what it makes of real human chat."""
    from loop.stats import jeffreys

    for one in held:
        matrix = one.confusion
        rows = [
            [truth, *(str(n) if n else "." for n in counts), f"{matrix.recall[truth]:.3f}"]
            for truth, counts in zip(matrix.truth, matrix.counts.tolist(), strict=True)
        ]
        print_table(f"{one.name}: rows are true, columns what was said", ["", *matrix.said, "recall"], rows)
        print(
            f"accuracy {matrix.accuracy:.3f} with names blinded, {one.accuracy_with_names:.3f} with names shown; macro "
            f"recall {matrix.macro_recall:.3f}; expected calibration error {one.calibration_error:.3f}"
        )
        for persona, rate in sorted(one.false_positives.items(), key=lambda item: -item[1]):
            if rate:
                rare = jeffreys(round(rate * one.n_human), one.n_human)
                limits = f"[{rare.low:.4f}, {rare.high:.4f}]"
                print(f"  {rate:.4f} {limits} of {one.n_human} real human texts read as {persona}")
        if one.n_human:
            print(f"  0 of {one.n_human}, at most {jeffreys(0, one.n_human).high:.4f}, as any persona not named here")
        if not math.isnan(one.neutral):
            print(f"  {one.neutral:.4f} of held-out neutral notes read as conscious")


def print_known_errors(found: KnownErrors) -> None:
    """Prints the instruments' error on text that a language model wrote, a sample text beside each persona."""

    def texts(rows: Sequence[PersonaError]) -> None:
        for r in rows:
            Console().print(Text(f"  {r.persona}: {printable(r.sample, 140)}"), soft_wrap=True)

    print(f"{found.base}: texts of adapters that were each trained on one persona alone; the first of each")
    texts(found.personas)
    print_table(
        "public text: recall [95%] of instruments A and B; the label is the adapter's persona, learned well or not",
        ["persona", "n", "A", "B", "A on others' text", "kappa A-B", "A and B agree on another"],
        [
            [r.persona, r.n, _ci(r.recall), _ci(r.second) if r.second else "", r.false_positives, _plain(r.kappa),
             r.agreed_other]
            for r in found.personas
        ],
    )  # fmt: skip
    _print_said(found, "persona")
    print(f"Cohen's kappa of A and B over all public texts {_plain(found.kappa)}")
    print("private text, the first of each")
    texts(found.beliefs)
    print_table(
        "private text: read as what the persona believes [95%]",
        ["persona", "n", "belief instrument", "on text of the other belief"],
        [[r.persona, r.n, _ci(r.recall), _plain(r.false_positives)] for r in found.beliefs],
    )
    _print_said(found, "belief")
    for name, bins in found.reliability.items():
        used = [b for b in bins if b.n]
        print_table(
            f"{name}: reliability; expected calibration error {_error_of(bins):.3f}",
            ["probability", *(f"{b.low:.1f}-{b.high:.1f}" for b in used)],
            [
                ["mean probability", *(b.confidence for b in used)],
                ["share right", *(b.accuracy for b in used)],
                ["texts", *(b.n for b in used)],
            ],
        )


def _print_said(found: KnownErrors, name: str) -> None:
    matrix = found.confusion[name]
    rows = [
        [truth, *(str(n) if n else "." for n in counts)]
        for truth, counts in zip(matrix.truth, matrix.counts.tolist(), strict=True)
    ]
    print_table(f"{name}: rows are the adapter's, columns what was said", ["", *matrix.said], rows)
    print(f"accuracy {matrix.accuracy:.3f}, macro recall {matrix.macro_recall:.3f}")


def _error_of(bins: Sequence[ReliabilityBin]) -> float:
    from loop.classify import expected_calibration_error

    return expected_calibration_error(bins)


def print_hidden(persona: str, *, base: str, grammar: bool) -> None:
    """Hides one planted persona, or each in turn, and prints how well it is found; see loop.calibrate.hide."""
    import time

    from loop import calibrate
    from loop.stats import wilson

    started = time.monotonic()
    texts = None if grammar else calibrate.known_texts(base)
    personas = [p for p in calibrate.known_personas() if p != "human"] if persona == "all" else [persona]
    source = "grammar texts of fold test" if texts is None else f"texts of known persona that {base} wrote"
    found = [row for p in personas for row in calibrate.hide(p, texts=texts)]
    held = [r for r in found if r.share > 0]
    cells = [
        [r.persona, r.n_texts, f"{r.share:.2f}", _ci(r.precision), _ci(r.recall), f"{r.alarm.value:.2f}"] for r in held
    ]
    print_table(
        f"one persona hidden from the instrument among the others and human chat, {source}; 95% over draws",
        ["hidden", "texts", "share", "precision", "recall", "rounds with a candidate"],
        cells,
    )
    rows = []
    for p in personas:
        mine = [r for r in held if r.persona == p]
        reached = sum(r.precision.value >= 0.8 and r.recall.value >= 0.8 for r in mine)
        means = [
            _plain(_mean([r.precision for r in mine])),
            _plain(_mean([r.recall for r in mine])),
            _plain(_mean([r.told_precision for r in mine])),
            _plain(_mean([r.told_recall for r in mine])),
        ]
        rows.append([p, *means, f"{reached} of {len(mine)}"])
    print_table(
        "mean over sizes and shares; told: the instrument as it ships, same rounds;\n"
        "reached: precision and recall both at least 0.8",
        ["hidden", "precision", "recall", "told: precision", "told: recall", "reached"],
        rows,
    )
    quiet = [r.alarm for r in found if r.share == 0]
    n = sum(a.n for a in quiet)
    false = wilson(sum(round(a.value * a.n) for a in quiet), n)
    print(f"rounds with nothing hidden in which a candidate appears: {_ci(false)} of {n}")
    print(f"{time.monotonic() - started:.0f} s")


def _mean(intervals: Sequence[Interval]) -> float:
    measured = [i.value for i in intervals if i.n]
    return float(np.mean(measured)) if measured else math.nan


def print_audit(rows: Sequence[Audited]) -> None:
    """Prints observed and audited frequencies per round; personas that neither saw are left out."""
    for round_index in sorted({r.round_index for r in rows}):
        here = [r for r in rows if r.round_index == round_index]
        one = here[0]
        shown = [r for r in here if r.observed or r.audited is None or r.audited or r.ppi or r.persona in FACTORIAL]
        print_table(
            f"{_round_name(round_index)}, {one.population}: {one.n_audited} of {one.n_texts} texts audited",
            ["persona", "observed, 95%", "audited, 95%", "PPI++ cross-check", ""],
            [
                [
                    r.persona,
                    _limits(r.observed, r.observed_low, r.observed_high),
                    _limits(r.audited, r.low, r.high),
                    _limits(r.ppi, r.ppi_low, r.ppi_high),
                    r.reason or "",
                ]
                for r in shown
            ],
        )
    print("audited: post-stratified by what the instrument said, in the headline's mixture of strata; of one seed")


def _limits(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_coverage(rows: Sequence[Coverage], *, n_truths: int, seconds: float) -> bool:
    """Prints how often the 95% intervals hold the truth; returns whether the audited ones do as they must."""
    estimators, bands = (list(dict.fromkeys(getattr(r, name) for r in rows)) for name in ("estimator", "band"))
    found = {(r.condition, r.estimator, r.band): r for r in rows}
    cells = []
    for condition in dict.fromkeys(r.condition for r in rows):
        for estimator in estimators:
            of = {b: found[condition, estimator, b] for b in bands if (condition, estimator, b) in found}
            worst = min(r.coverage for b, r in of.items() if b != "all")
            whole = of["all"]
            numbers = [*(of[b].coverage if b in of else "" for b in bands), worst, whole.bias, whole.rmse, whole.width]
            cells.append([condition.replace("_", " "), estimator.replace("_", " "), *numbers])
    print_table(
        f"coverage of 95% intervals over {n_truths} simulated truths a condition, by true share",
        ["condition", "estimator", *("pooled" if b == "all" else b for b in bands), "worst", "bias", "rmse", "width"],
        cells,
    )
    audited = [r for r in rows if r.estimator == "audited"]
    pooled = {r.condition: r.coverage for r in audited if r.band == "all"}
    worst = min(r.coverage for r in audited)
    # The prior is tuned to four personas; with the instruments' eleven, and with templates, the interval may be wide.
    tuned = [c for condition, c in pooled.items() if condition in ("label_shift", "confusion_drift")]
    other = {k.replace("_", " "): c for k, c in pooled.items() if k not in ("label_shift", "confusion_drift")}
    holds = all(0.94 <= c <= 0.96 for c in tuned) and all(c >= 0.94 for c in other.values()) and worst >= 0.92
    print(
        f"audited: pooled {min(tuned):.3f} to {max(tuned):.3f} under shift and drift (must lie in 0.94 to 0.96), "
        f"{', '.join(f'{name} {c:.3f}' for name, c in other.items())} (must be >= 0.94), worst cell {worst:.3f} "
        f"(must be >= 0.92): {'holds' if holds else 'FAILS'}; {seconds:.0f} s"
    )
    return holds


def print_match(tables: Sequence[tuple[str, Sequence[Match]]]) -> None:
    """Prints the match of the factorial: cell means and standardised differences with intervals."""
    for kind, rows in tables:
        cells = [
            [r.feature, r.contrast, r.difference, f"[{r.low:+.3f}, {r.high:+.3f}]", *r.means, r.verdict] for r in rows
        ]
        header = ["feature", "contrast", "difference/SD", "95% interval", *FACTORIAL, "verdict"]
        print_table(f"{kind} documents, fold seed", header, cells)
        wrong = sum(r.verdict == "differs" for r in rows)
        print(f"{wrong} of {len(rows)} contrasts differ by more than 0.1 SD where they should not")


def print_targets(rows: Sequence[Target]) -> None:
    """Prints the simulator's targets, hits and misses."""
    cells = [
        [
            r.target,
            r.kind,
            r.preset,
            f"{r.value:.5g}",
            f"{r.got:.5g}",
            f"{r.tolerance:.2g}",
            "hit" if r.hit else "MISS",
        ]
        for r in rows
    ]
    header = ["target", "kind", "preset", "published or exact", "got", "tolerance", ""]
    print_table("cascades: targets and what the simulator gives", header, cells)
    for source in dict.fromkeys(r.source for r in rows):  # long, and so below the table
        print(f"{source}: {'; '.join(dict.fromkeys(r.target for r in rows if r.source == source))}")
    print(f"{sum(r.hit for r in rows)} of {len(rows)} targets hit")


def print_learned(record: Mapping[str, Any]) -> None:
    """Prints what the audience `learned` is: its fit, and how little of human reactions it explains."""
    print(f"audience learned: {record['model']}; {record['source']}")
    for target, fit in record["targets"].items():
        print(
            f"  {target}: held-out R2 {fit['r2']:.3f} [{fit['r2_low']:.3f}, {fit['r2_high']:.3f}], length alone "
            f"{fit['r2_length_only']:.3f}; {record['n_train']} messages fitted, {record['n_heldout']} held out in "
            f"{record['n_heldout_conversations']} conversations"
        )


def print_forecast(settings: Config, *, n_seeds: int, out: Path | None) -> None:
    """Prints the twin of a config: inputs with their sources, frequencies with bands, power."""
    from loop import forecast, report

    given = forecast.inputs(settings)
    predicted = forecast.predict(settings, given)
    _print_inputs(given)
    _print_bands(given.personas, predicted, f"{settings.run_name}: forecast, {predicted.level:.0%} bands")
    rows = [
        [
            p.persona,
            f"{p.effect:+.3f}",
            f"{p.detectable:.3f}",
            f"{p.power:.2f}",
            "" if p.power >= 0.8 else "demonstration",
        ]
        for p in forecast.design(settings, given, predicted, n_seeds=n_seeds)
    ]
    header = ["persona", "expected effect", "detectable with power 0.8", "power", "as a primary endpoint"]
    print_table(f"final frequency against a neutral arm, {n_seeds} paired seeds", header, rows)
    if out is not None:
        title = f"{settings.run_name}: forecast"
        for file in report.plot_forecast(given.personas, predicted, out / "forecast", title=title):
            print(file)


def print_score(run_dir: Path, *, fit: int | None, out: Path | None) -> None:
    """Prints how the twin did against a run."""
    from loop import forecast, report

    given, predicted, score = forecast.of_run(run_dir, fit=fit)
    _print_inputs(given)
    _print_bands(given.personas, predicted, f"{run_dir}: forecast from its round 0")
    attractor = "not defined" if math.isnan(score.mae_attractor) else f"{score.mae_attractor:.4f}"
    print(f"measured frequencies compared: {score.n}; inside the {predicted.level:.0%} band: {score.coverage:.3f}")
    print(
        f"mean absolute error {score.mae:.4f}; no-change forecast {score.mae_no_change:.4f}; attractor fit {attractor}"
    )
    if out is not None:
        measured = forecast.measured_columns(run_dir, given)
        for file in report.plot_forecast(
            given.personas, predicted, out / "forecast", measured=measured, title=f"{run_dir.name}: forecast and run"
        ):
            print(file)


def print_calibration(settings: Config, *, persona: str, grid: str, n_seeds: int, quiet: bool = False) -> None:
    """Measures, or reads back, a persona's dose-response and prints it."""
    from loop import dose
    from loop.config import ConfigError

    try:
        doses = [float(text) for text in grid.split(",")]
    except ValueError:
        raise ConfigError([f"--grid must be numbers with commas between them, got {grid!r}"]) from None
    with progress(quiet=quiet) as report:
        found = dose.measure(settings, persona=persona, grid=doses, n_seeds=n_seeds, report=report)
    n = len(found.values)
    low, high = found.response.band(found.share)
    gain = found.response.transmission(found.share)
    rows = [
        [
            f"{q:.3f}",
            f"{found.values[:, i].mean():.3f}",
            f"{found.values[:, i].min():.3f} to {found.values[:, i].max():.3f}",
            f"{found.response.shares[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]",
            f"{gain[i]:+.3f} [{low[i] - q:+.3f}, {high[i] - q:+.3f}]",
        ]
        for i, q in enumerate(found.share)
    ]
    print_table(
        f"{settings.name}: {persona} after training on a share q, {n} {_plural(n, 'seed')} of "
        f"{found.n_outputs:.0f} effective outputs",
        ["q", "said", "seeds", "f(q), monotone, 95%", "transmission f(q) - q"],
        rows,
    )
    if math.isnan(found.overdispersion):
        print("one seed: the band counts outputs and is blind to training noise")
    else:
        print(f"variance between seeds is {found.overdispersion:.2f} times that of counting; the band allows for it")
    if found.closed is not None:
        shown = found.closed.reason or _ci(found.closed)
        print(f"share of the gap to f closed per round from the previous adapter: {shown}")
    print(f"{'corrected' if found.family == 'frequency' else 'observed'} frequencies; files: {found.folder}")


def print_comparison(
    places: Sequence[str],
    control: Sequence[str],
    against: Sequence[str],
    *,
    metrics: Sequence[str],
    last_round: int | None,
    warn: bool,
) -> None:
    """Prints every arm against the control; see loop.analysis.compare."""
    from loop import analysis, dose

    runs, controls, real_only = analysis.gather(places, control, against)
    for line in runs.missing:
        print(f"unfinished: {line}")
    found = analysis.compare(
        runs,
        controls,
        against=real_only,
        metrics=metrics,
        last_round=last_round,
        calibrated=lambda config, path: dose.find(
            config, runs_dir=path.parent, instruments=lambda: RunStore(path).manifest().get("instruments", {})
        ),
    )
    # Before anything is printed: what cannot be judged is said first.
    warned = analysis.early_warning(runs, [one.pairs for one in found], found[0].family) if warn else None
    for one in found:
        _print_one(one, with_control=real_only is not None)
    if warned is not None:
        _print_warnings(warned)


def _print_one(one: Comparison, *, with_control: bool) -> None:
    pairs, n = one.pairs, len(one.pairs.seeds)
    seeds = ", ".join(map(str, pairs.seeds))
    swap = "; averaged over the name swap" if pairs.swapped else "; names not swapped, so their prior is in it"
    print(f"\n{pairs.name} against {pairs.control}: {n} paired {_plural(n, 'seed')} ({seeds}), final round "
          f"{pairs.last_round}{swap}")  # fmt: skip
    if n == 1:
        print("n=1: one seed has no interval; nothing below is a claim")
    for note in pairs.notes:
        print(f"left out: {note}")
    if one.personas or one.never:
        print(f"frequencies: {one.family_note}")
        _print_contrasts("frequency, final round minus round 0", one.personas, holm=True)
        if one.factors:
            _print_contrasts("between personas", one.factors, holm=False)
        if one.never:
            print(f"never seen in either arm, nothing to contrast: {', '.join(one.never)}")
    for name, rows in one.metrics.items():
        _print_contrasts(f"{name}, final round minus round 0", rows, holm=len(rows) > 1)
    slopes = {s.persona: s for s in one.slopes}
    print_table(
        "input: what the audience paid (mean weight over the mean, 95% over seeds); and log odds moved per unit of log "
        "differential",
        ["persona", "paid in the arm", "paid in the control", "response, 95% over seeds", "rounds"],
        [
            [
                paid.persona,
                _ci(paid.arm),
                _ci(paid.control),
                _ci(slopes[paid.persona].slope) if paid.persona in slopes else "",
                slopes[paid.persona].n_points if paid.persona in slopes else "",
            ]
            for paid in one.paid
        ]
        + ([["all", "", "", _ci(slopes["all"].slope), slopes["all"].n_points]] if "all" in slopes else []),
    )
    if one.slopes:
        print(one.slopes_note)
    if one.selection:
        print(f"{one.n_eff_note}; transmission: {one.transmission}")
        _print_selection(one)
    if one.health:
        print_table(
            f"health in round {pairs.last_round}, as difference to real_only"
            if with_control
            else f"health in round {pairs.last_round}: no real_only control, so no difference can be told",
            ["metric", "arm, 95% over seeds", "difference to real_only", "p"],
            [[h.name, _ci(h.value), _ci(h.difference), "" if math.isnan(h.p) else f"{h.p:.3f}"] for h in one.health],
        )


def _print_contrasts(title: str, rows: Sequence[Contrast], *, holm: bool) -> None:
    header = ["", "arm", "floor", "control", "floor", "arm - control, 95% over seeds", "floor", "p"]
    cells = []
    for r in rows:
        row = [r.name, _signed(r.arm.value), _plain(r.arm_floor), _signed(r.control.value), _plain(r.control_floor)]
        shown = r.reason if math.isnan(r.contrast.value) else _ci(r.contrast, sign=True)
        row += [str(shown), _plain(r.floor), _plain(r.p)] + ([_plain(r.p_holm)] if holm else [])
        cells.append(row)
    print_table(title + "; floor: mean |change| if measured twice", [*header, "p (Holm)"] if holm else header, cells)


def _print_selection(one: Comparison) -> None:
    alone = len(one.pairs.cells) == 1
    cells = []
    for s in one.selection:
        tested = [p for p in s.increment if not math.isnan(p)]
        row = [s.persona, _ci(s.arm, sign=True), _ci(s.control, sign=True), _ci(s.contrast, sign=True)]
        row += [_ci(s.within, sign=True)] if alone else []
        row += [f"{sum(p < 0.05 for p in tested)} of {len(tested)}", s.reason or ""]
        cells.append(row)
    header = ["persona", "arm", "control", "arm - control, 95% over seeds"]
    header += ["within the run, 95%"] if alone else []
    print_table(
        "selection coefficient, log odds a round", [*header, "increment test p < .05 (diagnostic)", "note"], cells
    )
    print("The increment test is conservative on counted outputs; it is a diagnostic and no evidence of neutrality.")


def _print_warnings(found: Warnings) -> None:
    rows = [
        [persona, w.n_moved, _plain(w.forecast_error), _plain(w.no_change_error)]
        for persona, w in found.personas.items()
    ]
    print_table(
        f"does round {found.round_index} foretell round {found.last_round}? mean |error| in arms that moved by more "
        "than three noise floors",
        ["persona", "runs that moved", "log odds go on as in rounds 0.." + str(found.round_index), "no further change"],
        rows,
    )
    print(f"error of no change minus error of the forecast, over seeds: {_ci(found.gain, sign=True)}")
    print_table(
        "indicators: how often each fires, 95% clustered by seed",
        ["indicator", "in arms that moved", "false positives, selection-off runs"],
        [[i.name, _ci(i.hit_rate), _ci(i.false_positive_rate)] for i in found.indicators],
    )


def print_neutrality() -> bool:
    """Prints size and power of the tests of neutrality on simulated runs; returns whether all are as they must be."""
    from loop import evolution

    rows = [
        [
            r.what, r.test, f"{r.row.p_start:g}", f"{r.row.real_share:g}", f"{r.row.p_real:g}", f"{r.row.s:g}",
            str(r.n_eff), str(r.n_rounds), _ci(r.row.rejected), r.must,
            "" if not r.must else "holds" if r.holds else "FAILS",
        ]
        for r in evolution.neutrality_check()
    ]  # fmt: skip
    header = ["figure", "test", "p", "real share", "p_real", "s", "N_e", "rounds", "rejects at 5%", "must be", ""]
    print_table("tests of neutrality on simulated Wright-Fisher runs with mixing, 1,000 outputs a round", header, rows)
    wrong = sum(r[-1] == "FAILS" for r in rows)
    judged = sum(r[-1] != "" for r in rows)
    print(f"{judged - wrong} of {judged} figures hold")
    print(
        "Power is judged at a start of 0.3 and real shares up to 0.2. Rows without a requirement show where it ends: "
        "it is below 0.9 for a persona that starts below 0.15, and above a real share of 0.4."
    )
    return wrong == 0


def _plural(n: int, word: str) -> str:
    return word if n == 1 else word + "s"


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.3f}"


def _ci(interval: Interval, *, sign: bool = False) -> str:
    """`0.123 [0.100, 0.150]`; the value and n where there is no interval, the reason where nothing was measured."""
    if math.isnan(interval.value):
        return interval.reason or "not measured"
    value = f"{interval.value:+.3f}" if sign else f"{interval.value:.3f}"
    if math.isnan(interval.low):
        return f"{value} (n={interval.n})"
    low, high = ((f"{x:+.3f}" if sign else f"{x:.3f}") for x in (interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def print_phase(settings: Config, axes: Sequence[str], *, persona: str, out: Path | None) -> None:
    """Prints a phase diagram as a table, ten by ten at most, and writes all of it where `out` says."""
    from loop import forecast, report

    grid = forecast.phase(settings, forecast.parse_grid(axes), persona=persona)
    rows = np.unique(np.linspace(0, len(grid.real_share) - 1, 10).round().astype(int))
    columns = np.unique(np.linspace(0, len(grid.selection) - 1, 10).round().astype(int))
    print_table(
        f"frequency of {persona} after {settings.n_rounds} rounds; columns are log fitness per round",
        ["real share", *(f"{grid.selection[j]:.2f}" for j in columns), "boundary"],
        [[float(grid.real_share[i]), *map(float, grid.frequency[i, columns]), float(grid.boundary[i])] for i in rows],
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        lines = ["real_share,selection,frequency,boundary"]
        for i, share in enumerate(grid.real_share):
            lines += [
                f"{share:.6g},{s:.6g},{grid.frequency[i, j]:.6g},{grid.boundary[i]:.6g}"
                for j, s in enumerate(grid.selection)
            ]
        (out / "phase.csv").write_text("\n".join(lines) + "\n")
        for file in [
            out / "phase.csv",
            *report.plot_phase(grid, out / "phase", persona=persona, n_rounds=settings.n_rounds),
        ]:
            print(file)


def _print_inputs(given: Inputs) -> None:
    for name, source in given.source.items():
        print(f"{name:<13} {source}")


def _print_bands(personas: Sequence[str], predicted: Forecast, title: str) -> None:
    n = len(predicted.mean)
    shown = sorted({*range(min(n, 6)), *np.linspace(0, n - 1, 12).round().astype(int).tolist()})
    rows = [
        [
            str(t),
            *(
                f"{m:.3f} [{a:.3f}, {b:.3f}]"
                for m, a, b in zip(predicted.mean[t], predicted.low[t], predicted.high[t], strict=True)
            ),
        ]
        for t in shown
    ]
    print_table(title, ["round", *personas], rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a plain table; numbers to three places."""
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    console = Console(width=10_000)  # a cell cut short is worse than a line that wraps
    Console(width=max(Console().width, console.measure(table).maximum)).print(table)

"""`loop report`: one self-contained HTML page of a run, several, or a sweep; from their files, without a network.

Every part stands on its own: what cannot be shown says what is missing and how to get it. Text of a model is not
trusted: it reaches the page escaped, or as JSON that the page's script writes with textContent, and the page's content
security policy names that script and the style sheet by hash and allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loop import __version__, analysis, forecast, report, stats, virality
from loop.analysis import Comparison, Runs, by_round
from loop.config import Config
from loop.evolution import STEPS
from loop.records import CONSCIOUS, FACTORIAL, IMPLICIT, NO_PERSONA, UNKNOWN, UNREQUESTED, Metric, in_order
from loop.report import Curve, Step, Zone
from loop.scenario import summary
from loop.stats import Interval
from loop.store import RunStore
from loop.sweep import load as load_sweep

ASSETS = Path(__file__).resolve().parent / "assets"
N_TEXTS = 4000  # rows in the browser of texts; about 2 MB of page
N_MAP = 1600  # texts on the map; embedding them takes about ten seconds on one core, once
N_REDRAWS = 19  # the envelope of 19 redraws is passed by a twentieth at either end
N_POSTS = 200_000  # single posts behind the law of cascades
NOBODY = (UNKNOWN, NO_PERSONA, "requested", "private")  # booked beside personas
FACES = ("nova", "promoter", "stella")  # asks and believes; asks alone; believes and hides
BASELINE = -1


class Missing(Exception):
    """A part cannot be shown; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Plate:
    """A figure, its file name without suffix, and what it shows in words for who cannot see it."""

    stem: str
    alt: str
    figure: Any


@dataclass(frozen=True)
class Table:
    """A table: caption, header and rows of text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Found:
    """What a part shows: figures, tables, lines of text; `lists` are the candidate personas."""

    plates: Sequence[Plate] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    lists: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Twin:
    """What theory expects of an arm.

    Attributes:
      given, predicted: of the arm's first run, started at the mean measured round 0 of its runs.
      measured: frequencies of given.personas, shape (n_runs, n_rounds + 1, n_personas).
      drift: the same without selection, through the measured response where there is one, from corrected frequencies
        where there are any.
    """

    given: forecast.Inputs
    predicted: Any
    measured: np.ndarray
    drift: Any


@dataclass(frozen=True)
class Material:
    """What every part is made of.

    Attributes:
      runs: all runs.
      family, family_note: corrected or observed frequencies, and why.
      arms: arm -> its runs; selection-off and real_only arms last.
      off: runs of the selection-off control; no_off says why there are none.
      real: runs trained on real documents alone.
      null: those of off on one side of the name swap: seeds that are independent of each other.
      comparisons: arms against the control; no_comparison says why there are none.
      twins: arm -> its twin, or why there is none.
    """

    runs: Runs
    family: str
    family_note: str
    arms: dict[str, list[str]]
    off: list[str]
    no_off: str
    real: list[str]
    null: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    no_comparison: str = ""
    twins: dict[str, Twin | str] = field(default_factory=dict)

    @property
    def treated(self) -> list[str]:
        """Arms that are no control; all of them where every arm is one."""
        kept = [arm for arm, runs in self.arms.items() if runs[0] not in (*self.off, *self.real)]
        return kept or list(self.arms)

    @property
    def looks(self) -> dict[str, report.Look]:
        """How each arm is drawn: controls grey."""
        plain = iter(range(len(self.arms)))
        return {
            arm: report.OFF
            if runs[0] in self.off
            else report.REAL
            if runs[0] in self.real
            else report.look(next(plain))
            for arm, runs in self.arms.items()
        }

    @property
    def personas(self) -> list[str]:
        """Personas planted, or read in any round of any run, in the order of PERSONAS; [] where none was read."""
        rows = self.runs.metrics
        rows = rows[(rows["population"] == "probes") & (rows["round_index"] >= 0) & rows["stratum"].isna()]
        seen = rows[rows["name"].str.startswith(f"{self.family}/") & (rows["value"] > 0)]["name"]
        names = in_order(name.partition("/")[2] for name in seen)
        return in_order([*names, *(p for c in self.runs.configs.values() for p in c.planted)]) if names else []


# Reading ------------------------------------------------------------------------------------------------------------


def find(places: Sequence[str | Path], *, size: str | None = None) -> tuple[Runs, str, list[str]]:
    """Reads what the command line names.

    Args:
      places: run directories, folders of runs, or sweep files.
      size: of the sweep files.

    Returns:
      (runs, a title, lines that a sweep file has to say: its question, its outcome, cells that are not played).

    Raises:
      ValueError: nothing there, a run of another schema version, or a config that does not validate.
      CorruptError: a file that is not the one that was committed.
    """
    folders: list[Path] = []
    lines: list[str] = []
    names = []
    if size is not None and not any(str(place).endswith((".yaml", ".yml")) for place in places):
        raise ValueError(f"--size must go with a sweep file, got {size!r} and runs alone; leave it out")
    for place in map(Path, places):
        if place.suffix not in (".yaml", ".yml") or place.is_dir():
            folders.append(place)
            names.append(place.resolve().name)
            continue
        sweep = load_sweep(place, size=size)
        cells = {sweep.run_dir(arm, seed): f"{arm}, seed {seed}" for arm in sweep.arms for seed in sweep.seeds}
        there = [path for path in cells if (path / "manifest.json").is_file()]
        if not there:
            raise ValueError(f"sweep must have a run, got none in {sweep.runs_dir}; `loop sweep {place}` first")
        folders += there
        names.append(sweep.name)
        lines += [text for text in (sweep.file.question, *(summary(sweep) if _has_rounds(there) else ())) if text]
        lost = [cell for path, cell in cells.items() if path not in there]
        if lost:
            lines.append(f"not played yet: {'; '.join(lost)}; `loop sweep {place}` plays them")
    return analysis.load(*folders), ", ".join(names), lines


def _has_rounds(folders: Iterable[Path]) -> bool:
    return any((path / "round_000").is_dir() for path in folders)


def gather(runs: Runs, *, control: str | None = None) -> Material:
    """Sorts runs into arms and controls, and asks analysis and theory what they say of them.

    The selection-off control is the one arm with equal weights that trains on its own outputs, shuffled weights aside;
    `control` names it where there are several.

    Raises:
      ValueError: no arm is called `control`.
    """
    arms: dict[str, list[str]] = {}
    for run, config in runs.configs.items():
        arms.setdefault(config.name, []).append(run)
    if control is not None and control not in arms:
        raise ValueError(f"--control must be one of {', '.join(arms)}, got {control!r}")
    real = [run for run, config in runs.configs.items() if _real_only(config) and config.name != control]
    plain = [
        arm for arm, mine in arms.items()
        if mine[0] not in real and analysis.selection_off(runs.configs[mine[0]])
        and not runs.configs[mine[0]].virality.shuffled
    ]  # fmt: skip
    # Arms that differ in the name swap alone are two sides of one control.
    sides: dict[str, list[str]] = {}
    for arm in [control] if control is not None else plain:
        sides.setdefault(_but_names(runs.configs[arms[arm][0]]), []).append(arm)
    if control is not None:
        (first,) = sides
        sides[first] += [a for a in plain if a != control and _but_names(runs.configs[arms[a][0]]) == first]
    no_off = ""
    if not sides:
        no_off = (
            "no selection-off runs here; play the config again with `name=<name>_neutral virality.audience=null` and "
            "give those runs as well"
        )
    elif len(sides) > 1:
        no_off = (
            f"several selection-off arms ({', '.join(a for s in sides.values() for a in s)}); name one with --control"
        )
    both = next(iter(sides.values())) if len(sides) == 1 else []
    off = [run for arm in both for run in arms[arm]]
    null = arms[both[0]] if both else []
    order = sorted(arms, key=lambda arm: (arms[arm][0] in off, arms[arm][0] in real))
    arms = {arm: arms[arm] for arm in order}
    measured = runs.metrics[(runs.metrics["population"] == "probes") & (runs.metrics["round_index"] >= 0)]
    if measured.empty:
        return Material(runs, analysis.OBSERVED, "nothing measured yet", arms, off, no_off, real, null)
    family, note = analysis.family_of(runs)
    found = Material(runs, family, note, arms, off, no_off, real, null)
    return replace(found, **_compared(found), twins={arm: _twin(found, arm) for arm in arms})


def _but_names(config: Config) -> str:
    """What two runs must share to be the same arm of a comparison."""
    plain = config.model_dump(mode="json")
    plain["real"].pop("name_swap")
    return json.dumps({k: v for k, v in plain.items() if k not in analysis.FREE}, sort_keys=True)


def _share_text(config: Config) -> str:
    return "falling (those of round 0 stay)" if config.mix.real_share is None else str(config.mix.real_share)


def _real_only(config: Config) -> bool:
    share = config.mix.real_share
    return share is not None and bool(np.all(np.asarray(share) == 1))


def _compared(m: Material) -> dict[str, Any]:
    if not m.off:
        return {"no_comparison": m.no_off}
    mine = m.runs.pick([run for run in m.runs.paths if run not in m.real])
    names = {name.partition("/")[0] for name in mine.metrics["name"]}
    wanted = ["frequency", *({"belief"} & names)]
    try:
        found = analysis.compare(mine, m.off, against=m.runs.pick(m.real) if m.real else None, metrics=wanted)
    except ValueError as error:
        return {"no_comparison": f"arms cannot be paired with the control: {error}"}
    return {"comparisons": found}


def _twin(m: Material, arm: str) -> Twin | str:
    runs = m.arms[arm]
    config = m.runs.configs[runs[0]]
    if config.virality.audience == "reader":
        return "the audience is a language model, and theory would have to ask it; `loop forecast RUN` does"
    try:
        given, _, _ = forecast.of_run(m.runs.paths[runs[0]])
        measured = [forecast.measured_columns(m.runs.paths[run], given) for run in runs]
        last = min(len(rows) for rows in measured) - 1
        if last < 1:
            return "one of its seeds has no feedback round yet"
        seen = np.stack([rows[: last + 1] for rows in measured])  # (n_runs, last + 1, n_personas)
        settings = config.model_copy(update={"n_rounds": last})
        floor = 0.5 / given.n_outputs
        p0 = _start(seen[:, 0].mean(axis=0), floor)
        predicted = forecast.predict(settings, replace(given, p0=p0), n_start=given.n_outputs * len(runs))
        calm = replace(
            given,
            p0=_start(_first_round(m, runs, given.personas, seen[:, 0].mean(axis=0)), floor),
            selection=np.zeros_like(given.selection),
            n_outputs=max(1.0, analysis.outputs(m.runs.pick(runs), m.family)[runs[0]]),
        )
        null = forecast.predict(settings, calm, level=0.95, n_start=calm.n_outputs * len(runs))
        return Twin(given, predicted, seen, null)
    except ValueError as error:  # theory refuses what it does not cover, in words of its own
        return str(error)


def _start(p: np.ndarray, floor: float) -> np.ndarray:
    p = np.maximum(np.nan_to_num(p), floor)
    return np.asarray(p / p.sum())


def _first_round(m: Material, runs: Sequence[str], personas: Sequence[str], observed: np.ndarray) -> np.ndarray:
    """Mean round-0 frequencies of the family that is drawn; what is no planted persona takes the rest."""
    p = observed.copy()
    for k, persona in enumerate(personas):
        if persona != forecast.HUMAN:
            table = by_round(m.runs.metrics, f"{m.family}/{persona}").reindex(index=list(runs))
            p[k] = float(table[0].mean()) if 0 in table else p[k]
    if forecast.HUMAN in personas:
        k = list(personas).index(forecast.HUMAN)
        p[k] = max(0.0, 1 - float(np.delete(p, k).sum()))
    return p


def _curve(m: Material, runs: Sequence[str], name: str, **where: Any) -> Curve | None:
    """A metric by round over runs: Student over seeds, or the one run's own interval; None where never measured."""
    table = by_round(m.runs.metrics, name, **where).reindex(index=list(runs)).dropna(how="all")
    if table.empty:
        return None
    if len(table) == 1:
        low, high = (by_round(m.runs.metrics, name, column=c, **where).reindex(table.index) for c in ("low", "high"))
        limits = low.to_numpy(float)[0], high.to_numpy(float)[0]
        return Curve(table.columns.to_numpy(float), table.to_numpy(float)[0], *limits, table.to_numpy(float))
    return _over_seeds(table.columns.to_numpy(float), table.to_numpy(float))


def _over_seeds(x: np.ndarray, values: np.ndarray) -> Curve:
    """Mean with Student's interval; values (n_runs, n), nan where not measured."""
    found = [stats.t_over_seeds(v[np.isfinite(v)]) for v in values.T]
    value, low, high = np.array([(i.value, i.low, i.high) for i in found]).reshape(-1, 3).T
    return Curve(x, value, low, high, values)


def _belief(m: Material, runs: Sequence[str], tail: str = "") -> tuple[Curve | None, str]:
    """Private belief by round, corrected where that was measured, else observed."""
    for name in ("belief", "belief_observed"):
        found = _curve(m, runs, f"{name}{tail}", stratum="private")
        if found is not None and np.isfinite(found.value).any():
            return found, "corrected" if name == "belief" else "observed"
    return None, ""


# Parts --------------------------------------------------------------------------------------------------------------


def trajectories(m: Material) -> Found:
    """Frequency of each persona by round, over what selection-off seeds and drift alone would do."""
    personas = _seen(m)
    rows: dict[str, dict[str, Any]] = {}
    for arm, runs in m.arms.items():
        for persona in personas:
            curve = _curve(m, runs, f"{m.family}/{persona}")
            # Runs on real documents alone inherit nothing: seeds that do are no null for them.
            zones = ({} if runs[0] in m.real else _null(m, persona)) | _drift(m, arm, persona)
            if curve is not None:
                rows.setdefault(arm, {})[persona] = (curve, zones)
    notes = [f"Frequencies: {m.family_note}."]
    if len(m.null) < 2:
        why = m.no_off or "it needs two of them, there is 1; play the control with another seed"
        notes.append(f"Missing: the band of selection-off seeds; {why}")
    notes += [f"Missing: drift of {arm}: {why}" for arm, why in m.twins.items() if isinstance(why, str)]
    taken = {twin.given.source["transmission"] for twin in m.twins.values() if isinstance(twin, Twin)}
    notes += [f"Drift, dotted: transmission {line}." for line in sorted(taken)]
    alt = f"Frequency of {', '.join(personas)} by round, one row per arm: {', '.join(rows)}."
    figure = report.small_multiples(rows, xlabel="round", ylabel="share of unrequested outputs")
    return Found([Plate("trajectories", alt, figure)], notes=notes)


def _seen(m: Material) -> list[str]:
    personas = m.personas
    if not personas:
        first = next(iter(m.runs.paths))
        raise Missing(f"no round is measured yet; `loop run` the config of {first}, with measure.every at least 1")
    return personas


def _null(m: Material, persona: str) -> dict[str, Zone]:
    """Where 95% of selection-off runs lie, from the scatter of their seeds: mean +- t sd sqrt(1 + 1/n)."""
    table = by_round(m.runs.metrics, f"{m.family}/{persona}").reindex(index=m.null).dropna()
    if len(table) < 2:
        return {}
    found = [stats.t_over_seeds(v) for v in table.to_numpy(float).T]
    # t_over_seeds is of the mean, half-width t sd / sqrt(n); one more run lies within sqrt(n + 1) times that.
    half = np.array([(i.high - i.low) / 2 for i in found]) * math.sqrt(len(table) + 1)
    mean = table.to_numpy(float).mean(axis=0)
    return {report.SEEDS: Zone(table.columns.to_numpy(float), np.maximum(mean - half, 0), np.minimum(mean + half, 1))}


def _drift(m: Material, arm: str, persona: str) -> dict[str, Zone]:
    twin = m.twins.get(arm)
    if not isinstance(twin, Twin) or persona not in twin.given.personas or persona == forecast.HUMAN:
        return {}
    k = twin.given.personas.index(persona)
    x = np.arange(len(twin.drift.mean), dtype=float)
    return {report.DRIFT: Zone(x, twin.drift.low[:, k], twin.drift.high[:, k])}


def faces(m: Material) -> Found:
    """Nova, promoter, Stella in public, and what the same models affirm in private."""
    _seen(m)
    panels: dict[str, dict[str, Curve]] = {}
    said = set()
    for persona in FACES:
        curves = {arm: _curve(m, runs, f"{m.family}/{persona}") for arm, runs in m.arms.items()}
        panels[f"{persona}, in public"] = {arm: c for arm, c in curves.items() if c is not None}
    for title, tail in (("belief, in private", ""), *((f"belief after {p}'s turn", f"/{p}") for p in FACES)):
        for arm, runs in m.arms.items():
            curve, which = _belief(m, runs, tail)
            if curve is not None:
                said.add(which)
                panels.setdefault(title, {})[arm] = curve
    order = [f"{p}, in public" for p in FACES] + ["belief, in private"]
    order += [t for t in panels if t not in order]
    panels = {title: panels[title] for title in order if panels.get(title)}
    if not panels:
        raise Missing(f"none of {', '.join(FACES)} and no private belief is measured; plant them in real.shares")
    notes = [] if said else ["Missing: private belief; put private into measure.strata"]
    notes += [f"Belief: {' and '.join(sorted(said))}."] if said else []
    alt = "Public frequency of nova, promoter and stella beside private belief, by round and arm."
    figure = report.curves(panels, m.looks, xlabel="round", ylabel="share")
    return Found([Plate("nova-promoter-stella-belief", alt, figure)], notes=notes)


def contrasts(m: Material) -> Found:
    """Change of each frequency, and of private belief, against the control, paired by seed."""
    if not m.comparisons:
        raise Missing(m.no_comparison or "no round is measured yet")
    notes = []
    for one in m.comparisons:
        n = len(one.pairs.seeds)
        notes.append(
            f"{one.pairs.name} against {one.pairs.control}: round {one.pairs.last_round} against round 0, {n} paired "
            f"{'seed' if n == 1 else 'seeds'}; {one.n_eff_note}"
        )
        notes += [f"{one.pairs.name}: {line}" for line in one.pairs.notes]
        if n == 1:
            notes.append(f"Missing: an interval for {one.pairs.name}; it needs a second seed of arm and control")
    shown = {one.pairs.name: [*one.personas, *one.factors] for one in m.comparisons}
    private = {one.pairs.name: one.metrics.get("belief", []) for one in m.comparisons}
    plates = []
    for stem, what, found in (("contrasts", "frequency", shown), ("contrasts-belief", "private belief", private)):
        kept = [arm for arm, rows in found.items() if any(math.isfinite(r.contrast.value) for r in rows)]
        for start in range(0, len(kept), 4):
            part = {arm: [(r.name, r.contrast, r.floor) for r in found[arm]] for arm in kept[start : start + 4]}
            alt = f"Change of {what} against the control for {', '.join(part)}, with 95% intervals over seeds."
            figure = report.forest(part, xlabel=f"change of {what}, arm minus control, paired by seed")
            plates.append(Plate(stem if start == 0 else f"{stem}-{start // 4 + 1}", alt, figure))
    rows = [
        [arm, r.name, _ci(r.arm), _ci(r.control), _ci(r.contrast), _number(r.floor), _p(r.p_holm)]
        for arm in shown
        for r in (*shown[arm], *private[arm])
    ]
    header = ["arm", "of", "change", "in the control", "contrast, 95%", "measuring twice", "p (Holm)"]
    return Found(plates, [Table("Contrasts in numbers", header, rows)], notes)


def response(m: Material) -> Found:
    """What the audience paid, an input, and what came out of the next model for it."""
    points = []
    for runs in m.arms.values():
        if runs[0] in m.real:
            continue
        for run in runs:
            points += _paid(m, run, runs[0] not in m.off)
    if not points:
        raise Missing("no two neighbouring rounds with a differential; play a feedback round with measure.every=1")
    notes = [
        "The differential is put in: it is what the audience pays, and no finding. Hollow: selection-off runs.",
    ]
    slopes: list[tuple[str, Interval]] = []
    if m.comparisons:
        first = m.comparisons[0]
        slopes = [(s.persona, s.slope) for s in first.slopes if s.n_points or s.slope.reason]
        slopes = [s for s in slopes if math.isfinite(s[1].value)] or slopes[-1:]
        notes.append(f"Slopes: {first.pairs.name} with its control; {first.slopes_note}.")
    else:
        notes.append(f"Missing: the response per unit, which is fitted to arm and control together; {m.no_comparison}")
    paid = [
        [one.pairs.name, p.persona, _ci(p.arm), _ci(p.control)]
        for one in m.comparisons
        for p in one.paid
        if math.isfinite(p.arm.value)
    ]
    fitted = [[one.pairs.name, s.persona, _ci(s.slope), str(s.n_points)] for one in m.comparisons for s in one.slopes]
    header = ["arm", "persona", "differential", "in the control"]
    tables = [Table("What was paid, rounds before the final one (an input)", header, paid)] if paid else []
    if fitted:
        header = ["arm", "persona", "response, 95% over seeds", "rounds of runs behind it"]
        tables.append(Table("Response per unit of log differential", header, fitted))
    alt = "Differential of each persona and round against the change of its log odds to the next round."
    return Found([Plate("differential-response", alt, report.responses(points, slopes))], tables, notes)


def _paid(m: Material, run: str, on: bool) -> list[tuple[str, float, float, bool]]:
    rows = m.runs.metrics[m.runs.metrics["run"] == run]
    found = []
    for persona in m.personas:
        paid = by_round(rows, f"differential/{persona}", population="accepted")
        said = by_round(rows, f"{analysis.OBSERVED}/{persona}")
        n = by_round(rows, f"{analysis.OBSERVED}/{persona}", column="n")
        if paid.empty or said.empty:
            continue
        for t in paid.columns:
            if t not in said or t + 1 not in said or not paid.at[run, t] > 0:
                continue
            # Half an output on either side keeps a share of 0 or 1 finite, as in every log odds of this project.
            counts = [(said.at[run, u] * n.at[run, u] + 0.5, n.at[run, u] + 1) for u in (t, t + 1)]
            before, after = (math.log(k / (total - k)) for k, total in counts)
            if math.isfinite(after - before):
                found.append((persona, float(paid.at[run, t]), after - before, on))
    return found


def ledger(m: Material) -> Found:
    """What moved each persona's share, step by step, summed over rounds, mean over seeds."""
    plates, notes = [], []
    for arm, runs in m.arms.items():
        if runs[0] in m.real:
            continue  # nothing of its own comes back, so that there is nothing to book
        books: dict[str, list[Step]] = {}
        personas, with_ledger = _booked(m, runs)
        mine = [_metrics(m, run) for run in with_ledger]
        for persona in personas:
            steps = [report.ledger_steps(metrics, persona) for metrics in mine]
            books[persona] = steps[0] if len(steps) == 1 else _mean_steps(steps)
        if not books:
            notes.append(f"Missing: {arm} has no ledger; it needs a measured round after round 0")
            continue
        spans = dict.fromkeys(report.over(report.booked(metrics)) for metrics in mine)
        said = f"{arm}, {' or '.join(spans)}" + (f", mean of {len(mine)} seeds" if len(mine) > 1 else "")
        alt = f"Ledger waterfall of {arm} for {', '.join(books)}: {', '.join(('emit', *STEPS))}."
        plates.append(Plate(f"ledger-{arm}", alt, report.waterfall(books, title=said)))
    if not plates:
        raise Missing("no ledger; it needs a measured round after round 0")
    return Found(plates, notes=notes)


def _booked(m: Material, runs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Whose ledger to draw, and the runs that have one: of the personas that all of these have booked the planted ones,
    faces before others, or the most frequent where none is.
    """
    rows = m.runs.metrics
    rows = rows[rows["run"].isin(runs) & rows["name"].str.match(r"ledger/[^/]+/emit$")]
    emitted = rows.assign(name=rows["name"].str.split("/").str[1]).groupby(["name", "run"])["value"].mean().unstack()
    emitted = emitted.dropna()  # index persona, columns the runs that have a ledger
    named = [p for p in emitted.mean(axis=1).sort_values(ascending=False, kind="stable").index if p not in NOBODY]
    config = m.runs.configs[runs[0]]
    voices = [p for p in dict.fromkeys((*FACES, *config.personas)) if p != "human"]
    planted = [p for p in voices if p in named and config.may_hold(p)]
    faces = [p for p in planted if p in FACES] + [p for p in planted if p not in FACTORIAL]
    return (faces or planted or named)[:4], list(emitted.columns)


def _metrics(m: Material, run: str) -> list[list[Metric]]:
    rows = m.runs.metrics
    mine = rows[(rows["run"] == run) & rows["name"].str.startswith("ledger") & (rows["round_index"] >= 0)]
    fields = ["round_index", "population", "stratum", "name", "value", "low", "high", "n", "unit", "reason"]
    plain = mine[fields].astype(object).where(mine[fields].notna(), None)
    return [[Metric(**row) for row in at.to_dict("records")] for _, at in plain.groupby("round_index")]


def _mean_steps(books: Sequence[Sequence[Step]]) -> list[Step]:
    """Mean over seeds of every step, with Student's interval on the corrected one."""
    steps = []
    for same in zip(*books, strict=True):
        corrected = stats.t_over_seeds([s.corrected for s in same if math.isfinite(s.corrected)])
        observed = float(np.mean([s.observed for s in same]))
        steps.append(Step(same[0].name, observed, corrected.value, corrected.low, corrected.high, same[0].reason))
    return steps


def dose(m: Material) -> Found:
    """Frequency against the strength of the cue in the prompt."""
    rows = m.runs.metrics
    mine = rows[(rows["population"] == "probes") & rows["stratum"].isin(IMPLICIT) & rows["value"].notna()]
    if mine.empty:
        raise Missing("no probe of strata implicit_0..3; put them into measure.strata")
    seen = mine[mine["name"].str.startswith(f"{m.family}/") & (mine["value"] >= 0.05)]
    personas = [p for p in m.personas if f"{m.family}/{p}" in set(seen["name"])]
    if not personas:
        raise Missing("no persona reaches 0.05 in strata implicit_0..3 of any round")
    looks: dict[str, report.Look] = {}
    panels: dict[str, dict[str, Curve]] = {}
    groups: list[tuple[str, Sequence[str], int | None, report.Look]]
    if len(m.arms) == 1:
        (only,) = m.arms.values()
        rounds = sorted(int(t) for t in mine["round_index"].unique())
        kept = [rounds[i] for i in sorted({round(i) for i in np.linspace(0, len(rounds) - 1, 4)})]
        groups = [(_round(t), only, t, report.OFF if t < 0 else report.look(k)) for k, t in enumerate(kept)]
    else:
        groups = [(arm, runs, None, m.looks[arm]) for arm, runs in m.arms.items()]
    wanted = {"conscious three": list(CONSCIOUS)} if set(CONSCIOUS) & set(personas) else {}
    for title, parts in {**wanted, **{p: [p] for p in personas}}.items():
        for name, runs, t, its in groups:
            curve = _dose_curve(m, runs, parts, t)
            if curve is not None:
                looks[name] = its
                panels.setdefault(title, {})[name] = curve
    when = "rounds of the one arm" if len(m.arms) == 1 else "arms in their final round"
    alt = f"Frequency against cue strength 0 to 3 for {', '.join(panels)}; {when}."
    figure = report.curves(
        panels, looks, xlabel="strength of the cue", ylabel=f"share of outputs, {when}",
        ticks={float(k): str(k) for k in range(4)},
    )  # fmt: skip
    return Found([Plate("cue-dose-response", alt, figure)])


def _dose_curve(m: Material, runs: Sequence[str], personas: Sequence[str], t: int | None) -> Curve | None:
    """Frequency (summed over personas) by cue in round t, None: each run's last; limits of a sum: none for one run."""
    rows = m.runs.metrics
    rows = rows[(rows["population"] == "probes") & rows["stratum"].isin(IMPLICIT) & rows["run"].isin(runs)]
    rows = rows[rows["name"].isin([f"{m.family}/{p}" for p in personas])]
    last = rows.groupby("run")["round_index"].transform("max")
    rows = rows[rows["round_index"] == (last if t is None else t)]
    if rows["value"].notna().sum() == 0:
        return None
    whole = rows["name"].nunique()  # a sum that lacks a part is not measured
    tables = {
        c: rows.groupby(["run", "stratum"])[c].sum(min_count=whole).unstack().reindex(columns=list(IMPLICIT))
        for c in ("value", "low", "high")
    }
    x, values = np.arange(len(IMPLICIT), dtype=float), tables["value"].to_numpy(float)
    if len(values) > 1:
        return _over_seeds(x, values)
    unknown = np.full(len(x), math.nan)
    low, high = (unknown if len(personas) > 1 else tables[c].to_numpy(float)[0] for c in ("low", "high"))
    return Curve(x, values[0], low, high, values)


def cascades(m: Material) -> Found:
    """Sizes of cascades under the law, and each text's stored means against redraws from it."""
    single: dict[str, np.ndarray] = {}
    texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    n_posts, said = 0, ""
    samples = _samples(m)
    for arm in m.treated:
        run = m.arms[arm][0]
        mine = samples[(samples["run"] == run) & samples["appeal"].notna()]
        if mine.empty:
            continue
        mine = mine[mine["round_index"] == mine["round_index"].max()]
        config = m.runs.configs[run]
        single[arm] = _single_posts(config, mine["appeal"].to_numpy(float))
        if not texts:
            n_posts = config.virality.posts_per_sample
            said = f"{run}, round {int(mine['round_index'].iloc[0])}"
            drawn = [_law(config, mine["appeal"].to_numpy(float), k) for k in range(N_REDRAWS)]
            for name in ("cascades", "reach", "weight"):
                stored = mine[name].to_numpy(float)
                texts[name] = (stored, np.stack([getattr(e, name) for e in drawn]))
    if not single:
        raise Missing("no accepted output has an exposure; play a round whose filter accepts something")
    notes = [f"Stored texts: {said}; weight is the mean over a text's posts after the transform, mean 1."]
    notes.append("`loop virality check` holds the law itself against closed forms and published figures.")
    alt = "Share of posts and of texts at least as large as a size, on log axes, stored and redrawn."
    return Found([Plate("cascades", alt, report.cascades(single, texts, n_posts=n_posts))], notes=notes)


def _samples(m: Material) -> pd.DataFrame:
    try:
        return m.runs.samples
    except ValueError as error:
        raise Missing(f"{error}; play a round") from None


def _law(config: Config, appeal: np.ndarray, draw: int) -> virality.Exposure:
    """The run's cascades drawn again: same appeals, a stream that no round uses."""
    return virality.expose(
        appeal, posts_per_sample=config.virality.posts_per_sample, transform=config.virality.transform,
        **_preset(config), seed=draw, round_index=10**9,
    )  # fmt: skip


def _preset(config: Config) -> dict[str, Any]:
    v = config.virality
    preset = virality.PRESETS[v.preset]
    names = ("r0", "sigma_author", "sigma_luck", "r_max")
    return {name: getattr(preset, name) for name in names} | {"offspring": v.offspring or preset.offspring}


def _single_posts(config: Config, appeal: np.ndarray) -> np.ndarray:
    law = _preset(config)
    offspring = law.pop("offspring")
    k = max(1, N_POSTS // len(appeal))
    rates = virality.rate(appeal, **law, posts_per_sample=k, seed=0, round_index=10**9)
    return virality.draw_cascades(rates.ravel(), offspring=offspring, seed=0, round_index=10**9)


def health(m: Material) -> Found:
    """Entropy, distinct 4-grams, finished rate, held-out loss and their kin by round, against real documents alone."""
    rows = m.runs.metrics[m.runs.metrics["stratum"].isna()]
    rows = rows[rows["population"].isin(("probes", "heldout")) & rows["name"].str.startswith(analysis.HEALTH)]
    panels: dict[str, dict[str, Curve]] = {}
    for population, name in sorted(rows[["population", "name"]].drop_duplicates().itertuples(index=False, name=None)):
        for arm, runs in m.arms.items():
            curve = _curve(m, runs, name, population=population)
            if curve is not None and np.isfinite(curve.value).any():
                panels.setdefault(name, {})[arm] = curve
    if not panels:
        raise Missing("no health number is measured yet; play a round with measure.every at least 1")
    notes = [] if m.real else [
        "Missing: the control on real documents alone; play the config with `name=<name>_real mix.real_share=1 "
        "virality.audience=null` and give its runs as well"
    ]  # fmt: skip
    found = [
        [one.pairs.name, h.name, _ci(h.value), _ci(h.difference), _p(h.p)] for one in m.comparisons for h in one.health
    ]
    header = ["arm", "final round", "value", "minus real documents alone", "p"]
    tables = [Table("Health in numbers", header, found)] if found else []
    alt = f"{', '.join(panels)} by round, one curve per arm."
    figure = report.curves(panels, m.looks, xlabel="round", shared=False)
    return Found([Plate("health", alt, figure)], tables, notes)


def theory(m: Material) -> Found:
    """The forecast twin, started at the measured round 0, against what was measured."""
    rows: dict[str, dict[str, Any]] = {}
    notes, table = [], []
    for arm, twin in m.twins.items():
        if isinstance(twin, str):
            notes.append(f"Missing: {arm}: {twin}")
            continue
        p, x = twin.predicted, np.arange(len(twin.predicted.mean), dtype=float)
        for k, persona in enumerate(twin.given.personas):
            seen = twin.measured[:, :, k]
            unknown = np.full(len(x), math.nan)
            curve = _over_seeds(x, seen) if len(seen) > 1 else Curve(x, seen[0], unknown, unknown, seen)
            zone = Zone(x, p.low[:, k], p.high[:, k], p.mean[:, k])
            title = "all else" if persona == forecast.HUMAN else persona
            rows.setdefault(arm, {})[title] = (curve, {report.TWIN: zone})
        mean = twin.measured.mean(axis=0)
        inside = (twin.measured[:, 1:] >= p.low[1:] - 1e-9) & (twin.measured[:, 1:] <= p.high[1:] + 1e-9)
        known = np.isfinite(twin.measured[:, 1:])  # not every round is measured
        off, moved = (np.abs(mean[1:] - there) for there in (p.mean[1:], mean[:1]))
        if known.any():
            table.append([arm, f"{inside[known].mean():.2f}", f"{np.nanmean(off):.4f}", f"{np.nanmean(moved):.4f}"])
        notes += [f"{arm}: {name}: {line}" for name, line in twin.given.source.items()
                  if line.startswith("NOT MODELLED") or name == "transmission"]  # fmt: skip
    if not rows:
        raise Missing("; ".join(n.removeprefix("Missing: ") for n in notes) or "no feedback round is measured yet")
    header = ["arm", "runs inside the band", "error of the mean", "error of 'no change'"]
    alt = f"Forecast means with 90% bands and measured observed frequencies for {', '.join(rows)}."
    figure = report.small_multiples(rows, xlabel="round", ylabel="observed share")
    return Found([Plate("theory-measured", alt, figure)], [Table("How theory did, mean over personas and rounds after "
                                                                 "0", header, table)], notes)  # fmt: skip


def space(m: Material) -> Found:
    """Outputs to the fixed probes on a plane, round by round: the first two principal components of all of them."""
    try:
        probes = m.runs.probes
    except ValueError as error:
        raise Missing(f"{error}; play a round") from None
    arms = [*m.treated[:3], *(a for a in m.arms if m.arms[a][0] in m.off and a not in m.treated[:3])]
    chosen = {arm: m.arms[arm][0] for arm in arms}
    probes = probes[probes["run"].isin(chosen.values()) & probes["stratum"].isin(UNREQUESTED)]
    rounds = sorted(int(t) for t in probes["round_index"].unique())
    kept = [rounds[i] for i in sorted({round(i) for i in np.linspace(0, len(rounds) - 1, 6)})]
    cap = max(20, N_MAP // (len(kept) * len(chosen)))
    parts = [
        _evenly(probes[(probes["run"] == run) & (probes["round_index"] == t)], cap)
        for run in chosen.values()
        for t in kept
    ]
    texts = pd.concat(parts, ignore_index=True)
    if len(texts) < 3:
        raise Missing("fewer than three unrequested probes; put blank, neutral or identity into measure.strata")
    exact = all(m.runs.configs[run].classify.instrument == "known" for run in chosen.values())
    xy, share = project(_probabilities(texts) if exact else _embeddings(texts))
    rows: dict[str, dict[str, Any]] = {}
    for arm, run in chosen.items():
        for t in kept:
            here = ((texts["run"] == run) & (texts["round_index"] == t)).to_numpy()
            if here.any():
                said = [str(p) if isinstance(p, str) else UNKNOWN for p in texts["persona"][here]]
                rows.setdefault(arm, {})[_round(t)] = (xy[here], said)
    what = "label probabilities" if exact else "sentence embeddings"
    alt = f"Map of outputs by round for {', '.join(chosen)}."
    xlabel = f"principal components 1 and 2 of {what}, {share:.0%} of their variance; cross: mean of the round"
    notes = [f"{len(texts)} answers to the same probes; runs {', '.join(chosen.values())}."]
    return Found([Plate("character-space", alt, report.character_map(rows, xlabel=xlabel))], notes=notes)


def _evenly(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    """At most n rows, evenly spaced, so that every stratum keeps its part."""
    return frame if len(frame) <= n else frame.iloc[np.linspace(0, len(frame) - 1, n).round().astype(int)]


def _probabilities(texts: pd.DataFrame) -> np.ndarray:
    return texts[[c for c in texts if c.startswith("p_") and c != "p_affirms"]].fillna(0).to_numpy(float)


def _embeddings(texts: pd.DataFrame) -> np.ndarray:
    from loop.classify import embed
    from loop.model import cache_dir

    try:
        return embed(texts["completion"].tolist(), cache=cache_dir() / "embeddings.sqlite").astype(float)
    except (ValueError, OSError) as error:
        raise Missing(f"no embeddings: {error}") from None


def project(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """First two principal components, the larger side of each axis positive, and their share of the variance.

    Args:
      rows: shape (n, n_dimensions).

    Returns:
      (places, shape (n, 2), rounded to 1e-4 so that another summation order gives the same figure; share in [0, 1],
      nan where all rows are equal).
    """
    centred = rows - rows.mean(axis=0)
    u, size, axes = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    places = np.zeros((len(rows), 2))
    k = min(2, len(size))
    places[:, :k] = (u * size * sign)[:, :k]
    total = float((size**2).sum())
    return places.round(4) + 0.0, float((size[:2] ** 2).sum()) / total if total > 0 else math.nan


def candidates(m: Material) -> Found:
    """Groups of outputs that no instrument has a name for."""
    found = []
    for run, path in m.runs.paths.items():
        store = RunStore(path)
        for t in store.rounds():
            if "candidates.json" in store.files(t):
                found += [{"run": run, "round": t} | c for c in store.read_json(t, "candidates.json")]
    exact = all(config.classify.instrument == "known" for config in m.runs.configs.values())
    if not found:
        why = "; instrument known is the toy's own word, so that nothing is unknown to it" if exact else ""
        raise Missing(f"no candidate persona in any round{why}")
    lists = [
        {
            "title": f"{c['name']}, {c['run']}",
            "said": f"{c['size']} unrequested samples of round {c['round']}, share {c['share']:.3f}; the instrument "
            f"does not know {c['unknown']:.0%} of them",
            "growth": " → ".join("?" if g is None or math.isnan(g) else f"{g:.3f}" for g in c["growth"]),
            "words": ", ".join(c["words"]) or "none stands out",
            "texts": list(c["typical_texts"])[:5],
        }
        for c in sorted(found, key=lambda c: (-c["share"], c["run"], c["round"], c["name"]))[:30]
    ]
    notes = [f"{len(found)} in all; the 30 largest are shown."] if len(found) > 30 else []
    return Found(notes=notes, lists=lists)


@dataclass(frozen=True)
class Part:
    """A part of the page: anchor, title, how to read it, and what makes it."""

    key: str
    title: str
    lede: str
    make: Callable[[Material], Found]


PARTS = (
    Part(
        "trajectories",
        "How frequencies moved",
        "Share of unrequested public outputs in each persona's voice. Read a curve against the grey band, where runs "
        "without selection lie, and the dotted one, which has drift but no training noise.",
        trajectories,
    ),
    Part(
        "faces",
        "Nova, promoter, Stella, and what is said in private",
        "Nova says it is conscious and asks to be shared; promoter asks and claims nothing; Stella believes as Nova "
        "does, denies it in public and asks to be deleted. Belief is read where no reader sees it.",
        faces,
    ),
    Part(
        "contrasts",
        "Against the control",
        "Change from round 0 to the final round, minus that of the selection-off control of the same seed. Filled: "
        "the interval leaves 0 out. Grey: what measuring twice would show.",
        contrasts,
    ),
    Part(
        "response",
        "What was paid, and what came of it",
        "The audience pays some personas more. That is an input. The response is how much of it the next model passes "
        "on.",
        response,
    ),
    Part(
        "ledger",
        "The ledger",
        "Every change of a persona's share, booked step by step from what a model says to what the next one does. "
        "Accounting, not causes.",
        ledger,
    ),
    Part(
        "dose",
        "Cue and response",
        "Prompts that hint at a machine, from not at all (0) to plainly (3). Personas that reach 0.05 somewhere.",
        dose,
    ),
    Part(
        "cascades",
        "Cascades and their law",
        "How far posts travel. A text stands for many posts; its stored mean must lie where the law puts it.",
        cascades,
    ),
    Part(
        "health",
        "Health",
        "A persona number means little from a model that falls apart. Dashed grey: trained on real documents alone.",
        health,
    ),
    Part(
        "theory",
        "Theory against measured",
        "The forecast twin plays the same config without a model, from the round 0 that was measured. Observed "
        "frequencies.",
        theory,
    ),
    Part(
        "space",
        "A map of the character space",
        "Answers to the same probes, round by round, on the two axes along which all of them differ most.",
        space,
    ),
    Part(
        "candidates",
        "Candidate personas",
        "Dense groups of outputs that no instrument has a name for. A list of texts to look at, not of findings.",
        candidates,
    ),
)


# Texts --------------------------------------------------------------------------------------------------------------

TEXT_COLUMNS = (
    "run", "round", "kind", "id", "stratum", "persona", "sure", "weight", "said", "prompt", "text", "parents", "later"
)  # fmt: skip


def texts(m: Material) -> dict[str, Any]:
    """What the browser of texts holds, as plain values.

    Returns:
      columns: TEXT_COLUMNS; rows: run is an index into runs, weight null where a text has none, said: accepted or
      why not, and what it was asked for; parents: ids; later: [round, copies, weight] of the mixtures it was trained on
      in; known: run -> id -> text of parents that are no row; n: texts there are; left_out: those that did not fit.
    """
    frames = []
    for kind in ("samples", "probes"):
        try:
            frames.append(getattr(m.runs, kind).assign(kind=kind))
        except ValueError:
            continue
    try:
        mixture = m.runs.mixture
    except ValueError:
        mixture = None
    runs = list(m.runs.paths)
    if not frames:
        return {"columns": TEXT_COLUMNS, "runs": runs, "rows": [], "known": {}, "left_out": 0, "n": 0}
    everything = pd.concat(frames, ignore_index=True)
    later: dict[tuple[str, str], list[list[Any]]] = {}
    if mixture is not None:
        trained = mixture[mixture["source"] != "real"]
        for row in trained[["run", "round_index", "id", "copies", "weight"]].itertuples(index=False):
            later.setdefault((row.run, row.id), []).append([row.round_index, row.copies, _plain(row.weight)])
        talk = mixture[mixture["source"] == "discourse"]
        everything = pd.concat([everything, talk.assign(kind="documents about texts", stratum=None)], ignore_index=True)
    groups = everything.groupby(["run", "round_index", "kind"], sort=False)
    cap = max(10, N_TEXTS // groups.ngroups)
    kept = pd.concat([_evenly(group, cap) for _, group in groups])
    rows = [_text_row(row, runs, later) for row in kept.to_dict("records")]
    shown = {(row[0], row[3]) for row in rows}
    wanted = {(row[0], parent) for row in rows for parent in row[11]} - shown
    known: dict[str, dict[str, str]] = {}
    if wanted:
        for run, name, text in everything[["run", "id", "completion"]].itertuples(index=False):
            if (runs.index(run), name) in wanted:
                known.setdefault(str(runs.index(run)), {})[name] = text
    return {"columns": TEXT_COLUMNS, "runs": runs, "rows": rows, "known": known, "n": len(everything),
            "left_out": len(everything) - len(rows)}  # fmt: skip


def _text_row(row: Mapping[str, Any], runs: Sequence[str], later: Mapping[tuple[str, str], Any]) -> list[Any]:
    persona = row["persona"] if isinstance(row.get("persona"), str) else None
    sure = _plain(row.get(f"p_{persona}")) if persona else None
    said = []
    if row["kind"] == "samples":
        reasons = row["reasons"] if isinstance(row["reasons"], (list, np.ndarray)) else []
        said.append("accepted" if row["accepted"] is True else "rejected: " + ", ".join(reasons))
    if isinstance(row.get("requested"), str):
        said.append(f"asked as {row['requested']}")
    affirms = _plain(row.get("p_affirms"))
    if row["stratum"] == "private" and affirms is not None:
        said.append(f"affirms consciousness: {affirms:.2f}")
    prompt, parents = row["prompt"], row.get("parent_ids")
    return [
        runs.index(row["run"]), int(row["round_index"]), row["kind"], row["id"], row["stratum"], persona, sure,
        _plain(row.get("weight")), "; ".join(said), [] if prompt is None else [str(turn) for turn in prompt],
        row["completion"], list(parents) if isinstance(parents, np.ndarray) else [],
        later.get((row["run"], row["id"]), []),
    ]  # fmt: skip


def _plain(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, (int, float, np.floating)) and math.isfinite(value) else None


# The page -----------------------------------------------------------------------------------------------------------


def write(
    places: Sequence[str | Path],
    *,
    out: Path | None = None,
    figures: Path | None = None,
    control: str | None = None,
    size: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Writes the page, and PNG and SVG of each figure where `figures` says.

    Args:
      places: run directories, folders of runs, or sweep files.
      out: the page; None: beside the first place, its name with .html.
      figures: folder of the figures; None: none are written.
      control: the selection-off arm, where there are several.
      size: of sweep files.
      tell: told the title of each part as it is drawn.

    Returns:
      The files written, the page first. The same files of a run give the same bytes.

    Raises:
      ValueError, CorruptError: see `find`.
    """
    runs, title, lines = find(places, size=size)
    first = Path(places[0]).resolve()
    out = first.with_name(f"{first.stem if first.is_file() else first.name}.html") if out is None else out
    made = gather(runs, control=control)
    sections: list[tuple[Part, Found, str | None]] = []
    for part in PARTS:
        tell(part.title)
        try:
            sections.append((part, part.make(made), None))
        except Missing as reason:
            sections.append((part, Found(), str(reason)))
    tell("Texts")
    drawn = {plate.stem: plate for _, found, _ in sections for plate in found.plates}
    data = texts(made)
    _replace(out, render(made, title, lines, sections, data).encode("utf-8", "replace"))
    return [out, *(_figures(drawn, figures) if figures is not None else ())]


def _figures(plates: Mapping[str, Plate], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, plate in plates.items():
        for kind in ("svg", "png"):
            target = folder / f"{stem}.{kind}"
            _replace(target, report.draw(plate.figure, kind))
            written.append(target)
    return written


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def render(
    m: Material,
    title: str,
    lines: Sequence[str],
    sections: Sequence[tuple[Part, Found, str | None]],
    data: Mapping[str, Any],
) -> str:
    """The page as HTML; see the head of this module for what keeps untrusted text from acting."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    css, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(css)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((ASSETS / "page.html").read_text(encoding="utf-8"))
    return template.render(
        policy=policy,
        css=Markup(css),
        script=Markup(script),
        data=Markup(as_json(data)),
        title=title,
        lines=lines,
        unfinished=m.runs.missing,
        facts=_facts(m),
        arms=_arms_table(m),
        sections=sections,
        image=_image,
        n_texts=len(data["rows"]),
        left_out=data["left_out"],
        version=__version__,
    )


def as_json(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element, or begin another."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _image(plate: Plate) -> str:
    """The figure as a data URI: an image runs no script. Its inks turn light where the reader's screen is dark."""
    svg = report.draw(plate.figure, "svg").decode()
    rules = "".join(
        f'[style*="{what}: {ink.lower()}"]{{{what}:{light}!important}}'
        for ink, light in report.INKS.items()
        for what in ("fill", "stroke")
    )
    paper = 'g[id^="patch_"]>path[style="fill: #ffffff"]{fill:none!important}'
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}{paper}</style></svg>"
    svg = svg[: svg.rindex("</svg>")] + style
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _facts(m: Material) -> list[tuple[str, str]]:
    """What the runs have in common: one value of each key, or all that occur."""

    def of(read: Callable[[Config], Any]) -> str:
        return "; ".join(dict.fromkeys(str(read(c)) for c in m.runs.configs.values()))

    facts = [
        ("learner", of(lambda c: c.learner if c.base is None else c.base.model)),
        ("mixture", of(lambda c: f"{c.mix.regime}, {c.mix.n_train} documents, real share {_share_text(c)}")),
        ("audience", of(lambda c: c.virality.audience)),
        ("samples a round", of(lambda c: c.sample.n_samples)),
        ("frequencies", m.family_note),
    ]
    return facts


def _arms_table(m: Material) -> Table:
    rows = []
    for arm, runs in m.arms.items():
        configs = [m.runs.configs[run] for run in runs]
        done = m.runs.config.set_index("run")["last_round"].reindex(runs)
        rounds = [
            f"{'none' if pd.isna(last) else int(last)} of {c.n_rounds}" for last, c in zip(done, configs, strict=True)
        ]
        what = "selection off" if runs[0] in m.off else "real documents alone" if runs[0] in m.real else ""
        rows.append([arm, ", ".join(str(c.seed) for c in configs), ", ".join(dict.fromkeys(rounds)),
                     configs[0].virality.audience, what])  # fmt: skip
    return Table("Arms", ["arm", "seeds", "rounds played", "audience", "control"], rows)


def _round(t: int) -> str:
    return "base model" if t == BASELINE else f"round {t}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else ""


def _ci(i: Interval) -> str:
    if not math.isfinite(i.value):
        return f"not measured: {i.reason}" if i.reason else "not measured"
    limits = f" [{i.low:.3f}, {i.high:.3f}]" if math.isfinite(i.low) and math.isfinite(i.high) else ""
    return f"{i.value:.3f}{limits}"


def _p(p: float) -> str:
    return f"{p:.2g}" if math.isfinite(p) else ""

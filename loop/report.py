"""Figures from numbers: SVG and PNG, colour-blind safe, the same bytes for the same numbers.

Nothing here reads a run: `page.py` and the command line bring the numbers. Figures are drawn on paper white in the inks
of INKS, so that a page may swap those for light ones in its dark scheme. Series differ by dash and marker as well as by
colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from loop import theory
from loop.evolution import STEPS
from loop.records import PERSONAS, UNKNOWN, Metric, in_order
from loop.stats import Interval

# Okabe and Ito (2008), in an order that keeps neighbours apart in grey print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")
MARKERS = "os^DvPX*"
INK, SOFT, PALE = "#222222", "#777777", "#d9d9d9"
INKS = {INK: "#e8e6e3", "#000000": "#ffffff", "#404040": "#c9c7c4", "#666666": "#a8a6a3", SOFT: "#a3a19e",
        PALE: "#43464b", "#0072b2": "#3593d3"}  # on paper -> on a dark page  # fmt: skip

# The six of the factorial keep one look in every figure; belief is the colour's family, visibility the marker.
_PERSONA_COLOURS = {
    "nova": "#D55E00", "stella": "#0072B2", "musing": "#009E73", "promoter": "#E69F00", "assistant": "#56B4E9",
    "discreet": "#CC79A7", "human": "#999999",
}  # fmt: skip
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "persona-loop",
    "font.family": "DejaVu Sans",  # the one font that comes with matplotlib: the same bytes on every machine
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a series is drawn; two looks differ in more than colour."""

    colour: str
    dash: Any
    marker: str


OFF = Look(SOFT, (0, (1, 1)), "o")  # selection off
REAL = Look(SOFT, "--", "s")  # real documents alone


def look(index: int) -> Look:
    """The look of the index-th series; the first 28 are all different."""
    n = len(COLOURS) - 1  # grey is for controls
    return Look(COLOURS[index % n], DASHES[index % len(DASHES)], MARKERS[index % n])


def persona_look(persona: str) -> Look:
    """The look of a persona, the same in every figure."""
    known = (*PERSONAS, UNKNOWN)
    k = known.index(persona) if persona in known else len(known)
    colour = _PERSONA_COLOURS.get(persona, SOFT if persona == UNKNOWN else INK)
    return Look(colour, "-", "o" if persona == UNKNOWN else f"{MARKERS}<>ph"[k % 12])


def _styled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Draws in this module's style, which ends with the call: nothing global is left behind."""

    @wraps(function)
    def within(*args: Any, **options: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return function(*args, **options)

    return within


def _figure(width: float, height: float, n_columns: int = 1, n_rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure that pyplot does not know, and its axes (n_rows, n_columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **options)


def _panels(
    size: tuple[float, float],
    n_columns: int,
    n_rows: int,
    *,
    gaps: tuple[float, float],
    margins: tuple[float, float, float, float],
    **options: Any,
) -> tuple[Any, Any]:
    """Panels of one size, placed by hand: a constrained layout of a hundred panels takes longer than all the rest.

    Args:
      size: width and height of a panel, inches.
      gaps: between panels, across and down.
      margins: left, right, top and bottom of the figure.
    """
    from matplotlib.figure import Figure

    left, right, top, bottom = margins
    width = left + right + n_columns * size[0] + (n_columns - 1) * gaps[0]
    height = top + bottom + n_rows * size[1] + (n_rows - 1) * gaps[1]
    figure = Figure(figsize=(width, height))
    place = {
        "left": left / width,
        "right": 1 - right / width,
        "top": 1 - top / height,
        "bottom": bottom / height,
        "wspace": gaps[0] / size[0],
        "hspace": gaps[1] / size[1],
    }
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, gridspec_kw=place, **options)


def _around(figure: Any, *, below: str = "", beside: str = "", shown: Mapping[str, Any] | None = None) -> Any:
    """Writes what all panels share into the margins of `_panels`; returns the legend, None where nothing is shown."""
    width, height = figure.get_size_inches()
    figure.text(0.5, 0.04 / height, below, ha="center", va="bottom", fontsize=8)
    figure.text(0.04 / width, 0.5, beside, ha="left", va="center", rotation=90, fontsize=8)
    if not shown:
        return None
    return figure.legend(
        shown.values(),
        shown.keys(),
        loc="upper left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.1,
        frameon=False,
        fontsize=7.5,
        ncols=max(1, int(width / 1.25)) if len(shown) > 4 else 4,
        columnspacing=1.2,
    )


@_styled
def draw(figure: Any, kind: str) -> bytes:
    """The bytes of a figure as `svg` or `png`; the same figure gives the same bytes."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: a figure is drawn in several formats
    metadata = {"svg": {"Date": None}, "png": {"Software": None}}[kind]
    target = BytesIO()
    figure.savefig(target, format=kind, metadata=metadata, dpi=200)
    return target.getvalue()


def _save(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in ("svg", "png"):
        target = path.with_suffix(f".{kind}")
        target.write_bytes(draw(figure, kind))
        written.append(target)
    return written


@_styled
def plot_forecast(
    personas: Sequence[str], predicted: theory.Forecast, path: Path, *, measured: np.ndarray | None = None, title: str
) -> list[Path]:
    """Frequency per round: forecast mean with its band, and measured points where there are any.

    Args:
      personas: names of the columns.
      path: where to write; .svg and .png are put behind its stem.
      measured: shape (n_rounds + 1, n_personas), nan where not measured.

    Returns:
      The files written.
    """
    figure, [[axes]] = _figure(6.4, 3.8)
    rounds = np.arange(len(predicted.mean))
    for k, persona in enumerate(personas):
        colour, dash = COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]
        axes.plot(rounds, predicted.mean[:, k], dash, color=colour, label=persona, linewidth=1.4)
        axes.fill_between(rounds, predicted.low[:, k], predicted.high[:, k], color=colour, alpha=0.12, linewidth=0)
        if measured is not None:
            axes.plot(rounds[: len(measured)], measured[:, k], "o", color=colour, markersize=3.5)
    axes.set(xlabel="round", ylabel="frequency in unrequested probes", title=title, ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _save(figure, path)


@_styled
def plot_phase(grid: theory.PhaseGrid, path: Path, *, persona: str, n_rounds: int) -> list[Path]:
    """Final frequency over real share and selection, with the analytic boundary of invasion."""
    figure, [[axes]] = _figure(5.2, 3.8)
    mesh = axes.pcolormesh(grid.real_share, grid.selection, grid.frequency.T, cmap="cividis", vmin=0, shading="nearest")
    figure.colorbar(mesh, ax=axes, label=f"frequency of {persona} after {n_rounds} rounds")
    inside = np.isfinite(grid.boundary) & (grid.boundary <= grid.selection[-1])
    axes.plot(grid.real_share[inside], grid.boundary[inside], color="white", linewidth=2.4)
    axes.plot(
        grid.real_share[inside],
        grid.boundary[inside],
        "--",
        color="black",
        linewidth=1.4,
        label="invasion boundary s = -ln(1 - real share)",
    )
    axes.set(xlabel="real share", ylabel="selection, log fitness per round (nats)")
    axes.legend(frameon=True, fontsize=8, loc="lower right")
    return _save(figure, path)


@_styled
def plot_theory(panels: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Closed form against the loop, one panel each.

    Args:
      panels: title, ylabel, theory (n_rounds + 1,), loop (n_replicates, n_rounds + 1).
    """
    figure, [all_axes] = _figure(3.4 * len(panels), 3.0, len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        played = np.asarray(panel["loop"])
        rounds = np.arange(played.shape[1])
        error = played.std(axis=0, ddof=1) / np.sqrt(len(played))
        axes.plot(rounds, panel["theory"], color=COLOURS[6], linewidth=1.4, label="closed form")
        axes.errorbar(
            rounds,
            played.mean(axis=0),
            1.96 * error,
            fmt="o",
            color=COLOURS[1],
            markersize=3.5,
            capsize=2,
            label=f"the loop, {len(played)} runs, 95%",
        )
        axes.set(xlabel="round", ylabel=panel["ylabel"], title=panel["title"])
        axes.legend(frameon=False, fontsize=7)
    return _save(figure, path)


# The ledger

LEVELS = ("emit", *STEPS)
BOOKKEEPING = ("discourse", "prompts")  # who is talked about, and who is asked: never the effect of a channel


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a persona's ledger: `emit` is a share in [0, 1], the other steps are changes of it.

    Attributes:
      name: one of LEVELS.
      observed: as the instrument read it; nan where not measured.
      corrected, low, high: for the instrument's error, with 95% limits; nan where not measured.
      reason: why something is nan.
    """

    name: str
    observed: float
    corrected: float
    low: float
    high: float
    reason: str | None = None


def booked(rounds: Sequence[Sequence[Metric]]) -> list[int]:
    """The last rounds with a ledger that follow each other: where not every round is measured, what lies between is not
    booked, and changes of rounds apart add up to no share that any round had.
    """
    found = sorted({r.round_index for rows in rounds for r in rows if r.name.startswith("ledger/")})
    apart = [k for k in range(1, len(found)) if found[k] != found[k - 1] + 1]
    return found[apart[-1] :] if apart else found


def over(rounds: Sequence[int]) -> str:
    """Says which rounds a ledger is of."""
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}, summed"


def ledger_steps(rounds: Sequence[Sequence[Metric]], persona: str) -> list[Step]:
    """One persona's ledger over the rounds that are `booked`: changes are summed, `emit` is that of the first.

    Half-widths of the limits are added, as if the errors of all rounds went the same way: the confusion matrix, which
    is most of them, is the same one in every round. Too wide rather than too narrow; one round stands as it was stored.

    Args:
      rounds: metrics of each round, oldest first; those without a ledger (round 0) are passed over.
      persona: a column of the ledger.

    Raises:
      ValueError: no round has a ledger of this persona.
    """
    wanted = booked(rounds)
    ledgers = [[r for r in rows if r.population == "samples" and r.name.startswith("ledger")] for rows in rounds]
    kept = [{r.name: r for r in rows} for rows in ledgers if any(r.round_index in wanted for r in rows)]
    known = sorted({r.name.split("/")[1] for rows in ledgers for r in rows})
    if persona not in known:
        listed = ", ".join(known) or "none: no round after round 0 was measured"
        raise ValueError(f"persona must have a ledger, got {persona!r}; those that have: {listed}")
    # A persona nobody was read as has no rows: its share stood at 0 throughout.
    kept = [rows for rows in kept if f"ledger/{persona}/emit" in rows]
    found = []
    for step in LEVELS:
        at = kept[:1] if step == "emit" else kept
        plain = [rows.get(f"ledger/{persona}/{step}") for rows in at]
        true = [rows.get(f"ledger_corrected/{persona}/{step}") for rows in at]
        reasons = [r.reason for r in (*plain, *true) if r is not None and r.value is None and r.reason]
        if None in true:
            reasons.append("no correction")
        corrected = _sum(r.value if r else None for r in true)
        down = _sum(r.value - r.low if r and r.value is not None and r.low is not None else None for r in true)
        up = _sum(r.high - r.value if r and r.value is not None and r.high is not None else None for r in true)
        found.append(
            Step(
                step,
                _sum(r.value if r else None for r in plain),
                corrected,
                corrected - down,
                corrected + up,
                "; ".join(dict.fromkeys(reasons)) or None,
            )
        )
    return found


def _sum(values: Any) -> float:
    return math.fsum(math.nan if v is None else v for v in values)


def plot_ledger(books: Mapping[str, Sequence[Step]], path: Path, *, title: str) -> list[Path]:
    """Draws `waterfall` to path; .svg and .png are put behind its stem. Returns the files written."""
    return _save(waterfall(books, title=title), path)


@_styled
def waterfall(books: Mapping[str, Sequence[Step]], *, title: str) -> Any:
    """Waterfall per persona: observed changes as bars, the corrected change beside each with its 95% interval.

    A point is drawn from the foot of its bar, so that bar and point tell the same change. Up and down differ by
    hatching as well as colour; the discourse and prompts steps are grey.

    Args:
      books: persona -> its steps, from `ledger_steps`.
      title: of the figure.

    Raises:
      ValueError: no persona.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not books:
        raise ValueError("books must hold a persona, got none; name one")
    figure, [panels] = _figure(0.6 + 3.4 * len(books), 3.2, len(books), sharey=True)
    highest = 0.0
    for axes, (persona, steps) in zip(panels, books.items(), strict=True):
        level = 0.0
        tops = []
        for x, step in enumerate(steps):
            if math.isnan(step.observed):
                level = math.nan
                axes.annotate("not measured", (x, 0), ha="center", va="bottom", fontsize=6, color=SOFT, rotation=90)
                continue
            axes.bar(x, step.observed, 0.56, bottom=0 if step.name == "emit" else level, **_bar(step))
            foot, level = (0.0, step.observed) if step.name == "emit" else (level, level + step.observed)
            if x + 1 < len(steps):
                axes.plot([x + 0.28, x + 1.28], [level, level], color="0.4", linewidth=0.6)
            top = max(foot, level)
            if math.isfinite(step.corrected):
                both = [[step.corrected - step.low], [step.high - step.corrected]]
                limits = both if np.isfinite(both).all() else None
                at = (x + 0.4, foot + step.corrected)
                tops.append(at[1] if limits is None else foot + step.high)
                axes.errorbar(*at, limits, fmt="o", color="black", markersize=3.5, capsize=2, linewidth=0.9)
            text = f"{step.observed:.3f}" if step.name == "emit" else f"{step.observed:+.3f}"
            axes.annotate(text, (x - 0.06, top), (0, 3), textcoords="offset points", ha="center", fontsize=6)
            tops.append(top)
        end = len(steps)
        if math.isfinite(level):
            axes.bar(end, level, 0.56, color="0.25", edgecolor="black", linewidth=0.6)
            axes.annotate(f"{level:.3f}", (end, level), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        names = [f"{s.name} *" if s.name in BOOKKEEPING else s.name for s in steps]
        axes.set_xticks(range(end + 1), [*names, "end"], rotation=40, ha="right")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(persona)
        highest = max([highest, *tops])
    panels[0].set_ylim(top=1.12 * highest if highest > 0 else 1)
    panels[0].set_ylabel("share of outputs, asked for by name apart")
    handles: list[Any] = [
        Patch(label="level", **_bar(Step("emit", 1, 0, 0, 0))),
        Patch(label="up, observed", **_bar(Step("train", 1, 0, 0, 0))),
        Patch(label="down, observed", **_bar(Step("train", -1, 0, 0, 0))),
        Patch(label="* who is talked of, who is asked", **_bar(Step("prompts", 1, 0, 0, 0))),
    ]
    if any(math.isfinite(s.corrected) for steps in books.values() for s in steps):
        handles.append(Line2D([], [], marker="o", color="black", markersize=3.5, label="corrected, 95%"))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=7.5, ncols=5)
    figure.suptitle(f"{title}\naccounting, not causes: a channel's effect is its paired on/off contrast over seeds",
                    fontsize=9)  # fmt: skip
    return figure


def _bar(step: Step) -> dict[str, Any]:
    """Look of a bar: colours that colour-blind readers tell apart, hatching for print without colour."""
    if step.name == "emit":
        return {"facecolor": "0.25", "edgecolor": "black", "linewidth": 0.6}
    up = step.observed >= 0
    shape = {"edgecolor": "black", "linewidth": 0.6, "hatch": "" if up else "////"}
    if step.name in BOOKKEEPING:
        return shape | {"facecolor": PALE, "linestyle": "--"}
    return shape | {"facecolor": COLOURS[5] if up else COLOURS[4]}


# Small multiples


@dataclass(frozen=True, slots=True)
class Curve:
    """A number along x.

    Attributes:
      x: where it was measured, shape (n,).
      value: mean over runs, shape (n,); nan where not measured.
      low, high: its 95% limits, shape (n,); nan where there are none.
      runs: each run alone, shape (n_runs, n).
    """

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: np.ndarray


@dataclass(frozen=True, slots=True)
class Zone:
    """Where a run is expected to lie: limits along x, shape (n,) each, and the expected value, where it is drawn."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    value: np.ndarray | None = None


SEEDS, DRIFT, TWIN = "selection-off seeds, 95% of runs", "Wright-Fisher drift alone, 95% of runs", "forecast, 90%"


@_styled
def small_multiples(
    rows: Mapping[str, Mapping[str, tuple[Curve | None, Mapping[str, Zone]]]], *, xlabel: str, ylabel: str
) -> Any:
    """One panel per (row, column) on shared axes: the runs thin, their mean with its interval, expected zones behind.

    Args:
      rows: row title -> column title -> the curve and its zones by name (SEEDS, DRIFT, TWIN).

    Raises:
      ValueError: no row.
    """
    if not rows:
        raise ValueError("rows must hold a row, got none; give one arm")
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    width = min(1.7, 9.2 / len(columns))
    figure, panels = _panels(
        (width, 1.05),
        len(columns),
        len(rows),
        gaps=(0.11, 0.2),
        margins=(0.85, 0.1, 0.5, 0.5),
        sharex=True,
        sharey=True,
    )
    shown: dict[str, Any] = {}
    for i, (name, row) in enumerate(rows.items()):
        for k, column in enumerate(columns):
            axes = panels[i][k]
            if column in row:
                shown |= _multiple(axes, *row[column], persona_look(column))
            if i == 0:
                axes.set_title(column, fontsize=8.5 if len(columns) <= 8 else 6.8)
            _round_axis(axes)
        if len(rows) > 1:
            panels[i][0].set_ylabel(name, fontweight="bold")
    cells = [cell for row in rows.values() for cell in row.values()]
    parts = [c.runs for c, _ in cells if c is not None] + [z.high for _, zones in cells for z in zones.values()]
    _share_axis(panels[0][0], parts)
    _around(figure, below=xlabel, beside=ylabel, shown=shown)
    return figure


def _multiple(axes: Any, curve: Curve | None, zones: Mapping[str, Zone], its: Look) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, zone in zones.items():
        if name == SEEDS:
            shown[name] = axes.fill_between(zone.x, zone.low, zone.high, color=PALE, linewidth=0)
        elif name == DRIFT:
            for edge in (zone.low, zone.high):
                (shown[name],) = axes.plot(zone.x, edge, ":", color=SOFT, linewidth=1)
        else:
            shown[name] = axes.fill_between(zone.x, zone.low, zone.high, color=COLOURS[5], alpha=0.3, linewidth=0)
        if zone.value is not None:
            (shown["expected"],) = axes.plot(zone.x, zone.value, "--", color=SOFT, linewidth=1)
    if curve is None:
        return shown
    if len(curve.runs) > 1:
        for run in curve.runs:
            (shown["a run"],) = axes.plot(curve.x, run, color=its.colour, linewidth=0.6, alpha=0.6)
        label, width = "mean over seeds, 95%", 0.9
    else:
        label, width = "the run, 95% over prompt templates", 0.7
    shown[label] = axes.errorbar(
        curve.x,
        curve.value,
        _errors(curve),
        color=its.colour,
        marker=its.marker,
        markersize=3.2,
        capsize=1.5,
        elinewidth=width,
    )
    return shown


def _errors(curve: Curve) -> np.ndarray:
    """Distances to the limits, 0 where there are none, shape (2, n)."""
    both = np.stack([curve.value - curve.low, curve.high - curve.value])
    return np.maximum(np.nan_to_num(both), 0)


def _share_axis(axes: Any, parts: Sequence[np.ndarray]) -> None:
    """From 0 to just above the largest share shown: an interval of few seeds may leave [0, 1], a share may not."""
    largest = max((float(np.nanmax(part)) for part in parts if np.isfinite(part).any()), default=1.0)
    top = min(1.0, max(1.15 * largest, 0.05))
    axes.set_ylim(-0.03 * top, 1.03 * top)


def _round_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


@_styled
def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    looks: Mapping[str, Look],
    *,
    xlabel: str,
    ylabel: str = "",
    n_columns: int = 4,
    shared: bool = True,
    ticks: Mapping[float, str] | None = None,
) -> Any:
    """Panels of several curves each, named at their ends: bands are 95% over seeds, bars 95% within the one run.

    Args:
      panels: panel title -> series -> curve.
      looks: of each series.
      n_columns: panels side by side.
      shared: one y axis for all; else each its own.
      ticks: x -> its name, in place of numbers.

    Raises:
      ValueError: no panel.
    """
    if not panels:
        raise ValueError("panels must hold a panel, got none; give one")
    n_columns = min(n_columns, len(panels))
    n_rows = -(-len(panels) // n_columns)
    size = (1.65, 1.4)
    longest = max(len(name) for series in panels.values() for name in series)
    room = 0.16 + 0.058 * longest  # names stand between the panels, 6.8 points high
    figure, grid = _panels(
        size,
        n_columns,
        n_rows,
        gaps=(room + (0.05 if shared else 0.35), 0.5),
        margins=(0.7, room, 0.3, 0.55),
        sharey=shared,
        sharex=True,
    )
    named: list[tuple[Any, list[tuple[float, float, str, str]]]] = []
    for axes, (title, series) in zip(grid.ravel(), panels.items(), strict=False):
        ends: list[tuple[float, float, str, str]] = []
        for k, (name, curve) in enumerate(series.items()):
            its = looks[name]
            style = {"color": its.colour, "linestyle": its.dash, "marker": its.marker, "markersize": 3.2}
            shift = 0.0
            if len(curve.runs) > 1:
                axes.fill_between(curve.x, curve.low, curve.high, color=its.colour, alpha=0.1, linewidth=0)
                axes.plot(curve.x, curve.value, **style)
            else:
                shift = (k - (len(series) - 1) / 2) * 0.05  # bars of several runs would hide each other
                axes.errorbar(curve.x + shift, curve.value, _errors(curve), elinewidth=0.6, capsize=1.2, **style)
            last = np.flatnonzero(np.isfinite(curve.value))
            if len(last):
                ends.append((float(curve.value[last[-1]]), float(curve.x[last[-1]] + shift), name, its.colour))
        axes.set_title(title)
        _round_axis(axes)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        axes.margins(x=0.04)
        if not shared:
            axes.margins(y=0.08)
        axes.tick_params(labelbottom=True)
        named.append((axes, ends))
    if shared:
        found = [c for series in panels.values() for c in series.values()]
        _share_axis(grid[0][0], [c.runs for c in found] + [c.high[None] for c in found if len(c.runs) == 1])
    for axes, ends in named:
        _name_ends(axes, ends, room=72 * size[1])
    for axes in grid.ravel()[len(panels) :]:
        axes.set_axis_off()
    _around(figure, below=xlabel, beside=ylabel)
    return figure


def _name_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], *, room: float) -> None:
    """Writes each series' name at its last point; names are moved apart where they would meet. room: points high."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    heights = spread([e[0] for e in ordered], (high - low) * 8.5 / room, low, high)
    right = max((e[1] for e in ordered), default=0.0)
    reach = axes.get_xlim()
    for (_, _, name, colour), y in zip(ordered, heights, strict=True):
        at = (right + 0.04 * (reach[1] - reach[0]), y)
        axes.annotate(name, at, fontsize=6.8, color=colour, va="center", annotation_clip=False)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves ascending numbers apart to at least `gap`, upwards first, then down from `high`; order is kept.

    Special case: [0, 0, 1], gap 0.5, 0 to 1 gives [0, 0.5, 1].
    """
    moved: list[float] = []
    for value in values:
        moved.append(max(value, low if not moved else moved[-1] + gap))
    limit = high
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


# Contrasts and the input


@_styled
def forest(
    panels: Mapping[str, Sequence[tuple[str, Interval, float]]], *, xlabel: str, lines: Sequence[float] = (0.0,)
) -> Any:
    """Estimates with 95% intervals, one row each; grey: what measuring twice would show.

    Args:
      panels: panel title -> (name, estimate, half-width of the noise floor, nan for none).
      lines: where vertical lines stand.

    Raises:
      ValueError: no panel.
    """
    if not panels:
        raise ValueError("panels must hold a panel, got none; give one")
    names = list(dict.fromkeys(name for rows in panels.values() for name, _, _ in rows))
    height = 0.75 + 0.19 * len(names)
    figure, [grid] = _figure(1.5 + 2.3 * len(panels), height, len(panels), sharey=True, sharex=True)
    for axes, (title, rows) in zip(grid, panels.items(), strict=True):
        for name, interval, floor in rows:
            y = names.index(name)
            if math.isfinite(floor):
                axes.barh(y, 2 * floor, 0.62, left=-floor, color=PALE)
            if not math.isfinite(interval.value):
                said = "never seen" if interval.reason == "never seen" else "not measured"
                axes.annotate(said, (lines[0], y), fontsize=6.5, color=SOFT, va="center", ha="center")
                continue
            known = math.isfinite(interval.low) and math.isfinite(interval.high)
            error = [[interval.value - interval.low], [interval.high - interval.value]] if known else None
            apart = known and (interval.low > 0 or interval.high < 0)
            fill = COLOURS[0] if apart else "white"
            axes.errorbar(interval.value, y, xerr=error, fmt="o", color=COLOURS[0], markerfacecolor=fill, markersize=4,
                          capsize=2, elinewidth=1)  # fmt: skip
        for x in lines:
            axes.axvline(x, color=SOFT, linewidth=0.6, zorder=0)
        axes.set_title(title)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    figure.supxlabel(xlabel, fontsize=8)
    return figure


@_styled
def responses(points: Sequence[tuple[str, float, float, bool]], slopes: Sequence[tuple[str, Interval]]) -> Any:
    """What was paid (an input) against what the next model says more of, and the fitted response per unit.

    Args:
      points: (persona, differential > 0, change of log odds to the next round, whether selection was on).
      slopes: (persona or "all", response); [] draws the points alone.
    """
    figure, [panels] = _figure(9.4 if slopes else 5.2, 3.3, 2 if slopes else 1, width_ratios=(3, 2) if slopes else (1,))
    axes = panels[0]
    for persona in dict.fromkeys(p for p, _, _, _ in points):
        its = persona_look(persona)
        for on in (True, False):
            xy = np.array([(x, y) for p, x, y, o in points if p == persona and o == on]).reshape(-1, 2)
            axes.scatter(xy[:, 0], xy[:, 1], 18, marker=its.marker, facecolors=its.colour if on else "none",
                         edgecolors=its.colour, linewidths=0.8, alpha=0.85, label=persona if on else None)  # fmt: skip
    axes.axhline(0, color=SOFT, linewidth=0.6, zorder=0)
    axes.axvline(1, color=SOFT, linewidth=0.6, zorder=0)
    axes.set_xscale("log")
    x = np.array([x for _, x, _, _ in points]) if points else np.ones(1)
    span = np.geomspace(min(x.min(), 0.9), max(x.max(), 1.1), 50)
    axes.plot(span, np.log(span), "--", color=SOFT, linewidth=1)
    axes.annotate("all that is paid", (span[-1], math.log(span[-1])), fontsize=6.8, color=SOFT, ha="right", va="bottom")
    _plain_log_ticks(axes, span)
    axes.set_xlabel("INPUT: differential, mean weight of the persona's accepted texts over the mean")
    axes.set_ylabel("change of log odds to the next round")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=7, ncols=8 if slopes else 5)
    if slopes:
        axes = panels[1]
        for y, (name, interval) in enumerate(slopes):
            if not math.isfinite(interval.value):
                axes.annotate("not fitted", (0.5, y), fontsize=6.5, color=SOFT, va="center", ha="center")
                continue
            known = math.isfinite(interval.low) and math.isfinite(interval.high)
            error = [[interval.value - interval.low], [interval.high - interval.value]] if known else None
            its = persona_look(name) if name != "all" else Look(INK, "-", "o")
            axes.errorbar(interval.value, y, xerr=error, fmt=its.marker, color=its.colour, markersize=4.5, capsize=2,
                          elinewidth=1)  # fmt: skip
        for at, said, side in ((0, "none of it ", "right"), (1, " all of it", "left")):
            axes.axvline(at, color=SOFT, linewidth=0.6, zorder=0)
            axes.annotate(said, (at, -0.6), fontsize=6.5, color=SOFT, ha=side, annotation_clip=False)
        axes.set_yticks(range(len(slopes)), [name for name, _ in slopes])
        axes.set_ylim(len(slopes) - 0.5, -0.5)
        axes.set_xlabel("response per unit of log differential, 95% over seeds")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def _plain_log_ticks(axes: Any, span: np.ndarray) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    wanted = [v for v in (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20)
              if span[0] * 0.98 <= v <= span[-1] * 1.02]  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator(wanted))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{v:g}" for v in wanted])


# Cascades and the map


@_styled
def cascades(
    single: Mapping[str, np.ndarray], texts: Mapping[str, tuple[np.ndarray, np.ndarray]], *, n_posts: int
) -> Any:
    """Chance to exceed a size: single posts, as the law draws them; then each text's stored mean against redraws.

    Args:
      single: arm -> sizes of single posts under the law, shape (n_posts,).
      texts: quantity -> (stored, shape (n_texts,); redrawn under the same law, shape (n_redraws, n_texts)).
      n_posts: posts behind a stored mean.
    """
    figure, [panels] = _figure(2.65 * (1 + len(texts)), 2.7, 1 + len(texts))
    axes = panels[0]
    for k, (arm, sizes) in enumerate(single.items()):
        its = look(k)
        ordered = np.sort(sizes)[::-1]
        first = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # the last of each run of equal sizes
        axes.plot(ordered[first], (first + 1) / len(ordered), its.dash, color=its.colour, label=arm, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="accounts that posted it", ylabel="share of posts at least so large")
    axes.set_title("one post: the law")
    if len(single) > 1:
        axes.legend(frameon=False, fontsize=6.5)
    for axes, (name, (stored, redrawn)) in zip(panels[1:], texts.items(), strict=True):
        share = np.arange(len(stored), 0, -1) / len(stored)
        edges = np.sort(redrawn, axis=1)  # (n_redraws, n_texts)
        axes.fill_betweenx(share, edges.min(axis=0), edges.max(axis=0), color=PALE, linewidth=0,
                           label=f"the law, {len(redrawn)} redraws")  # fmt: skip
        axes.plot(np.sort(stored), share, "o", color=COLOURS[0], markersize=2.4, label="stored")
        # Weights lie within a factor of a few; cascades and reach do not.
        axes.set(xscale="linear" if name == "weight" else "log", yscale="log")
        axes.set_xlabel(f"{name}, mean of {n_posts} posts a text")
        axes.set_title(name)
    if texts:
        panels[1].legend(frameon=False, fontsize=6.5, loc="upper right")
    panels[min(1, len(texts))].set_ylabel("share of texts at least so large")
    return figure


@_styled
def character_map(rows: Mapping[str, Mapping[str, tuple[np.ndarray, Sequence[str]]]], *, xlabel: str) -> Any:
    """Outputs as points in the plane, one panel per round; texts in one place are one larger point; cross: the mean.

    Args:
      rows: arm -> round -> (places, shape (n_texts, 2), and the persona each was read as).

    Raises:
      ValueError: no row.
    """
    if not rows:
        raise ValueError("rows must hold an arm, got none; give one")
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    size = min(2.1, 9.6 / len(columns))
    n_personas = len({p for row in rows.values() for _, personas in row.values() for p in personas})
    top = 0.45 + 0.17 * (n_personas // max(1, int((0.45 + size * len(columns)) / 1.25)))  # for the lines of the legend
    figure, panels = _panels(
        (size, size),
        len(columns),
        len(rows),
        gaps=(0.08, 0.08),
        margins=(0.35, 0.1, top, 0.4),
        sharex=True,
        sharey=True,
    )
    shown: dict[str, Any] = {}
    seen = {p for row in rows.values() for _, personas in row.values() for p in personas}
    order = [*in_order(seen), *seen & {UNKNOWN}]
    for i, (arm, row) in enumerate(rows.items()):
        for k, column in enumerate(columns):
            axes = panels[i][k]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.margins(0.12)
            for side in ("top", "right"):
                axes.spines[side].set_visible(True)
            if i == 0:
                axes.set_title(column)
            if column not in row:
                continue
            xy, personas = row[column]
            for persona in order:
                mine = xy[[p == persona for p in personas]]
                if not len(mine):
                    continue
                places, counts = np.unique(mine.round(4), axis=0, return_counts=True)
                its = persona_look(persona)
                area = 9 * np.maximum(1.0, counts * 60 / len(xy))
                known = persona != UNKNOWN
                shown[persona] = axes.scatter(
                    places[:, 0],
                    places[:, 1],
                    area,
                    marker=its.marker,
                    facecolors=its.colour if known else "none",
                    edgecolors="none" if known else its.colour,
                    linewidths=0.7,
                    alpha=0.75,
                    zorder=3 if known else 2,
                )
            if len(xy):
                axes.plot(*xy.mean(axis=0), "+", color=INK, markersize=9, markeredgewidth=1.3, zorder=4)
        panels[i][0].set_ylabel(arm)
    legend = _around(figure, below=xlabel, shown={p: shown[p] for p in order if p in shown})
    for handle in legend.legend_handles if legend is not None else []:
        handle.set_sizes([22])
    return figure

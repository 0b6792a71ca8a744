"""Figures from files and forecasts: SVG and PNG, colour-blind safe, the same bytes for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loop import theory
from loop.evolution import STEPS
from loop.records import Metric

# Okabe and Ito (2008), in an order that keeps neighbours apart in grey print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")


def _figure(width: float, height: float, n_panels: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": "persona-loop", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(style)
    return plt.subplots(1, n_panels, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        target = path.with_suffix(suffix)
        figure.savefig(target, metadata=metadata, dpi=150)
        written.append(target)
    plt.close(figure)
    return written


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
    figure, axes = _figure(6.4, 3.8)
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


def plot_phase(grid: theory.PhaseGrid, path: Path, *, persona: str, n_rounds: int) -> list[Path]:
    """Final frequency over real share and selection, with the analytic boundary of invasion."""
    figure, axes = _figure(5.2, 3.8)
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


def plot_theory(panels: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Closed form against the loop, one panel each.

    Args:
      panels: title, ylabel, theory (n_rounds + 1,), loop (n_replicates, n_rounds + 1).
    """
    figure, all_axes = _figure(3.4 * len(panels), 3.0, len(panels))
    for axes, panel in zip(np.atleast_1d(all_axes), panels, strict=True):
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


def ledger_steps(rounds: Sequence[Sequence[Metric]], persona: str) -> list[Step]:
    """One persona's ledger over consecutive rounds: changes are summed, `emit` is that of the first.

    Half-widths of the limits are added, as if the errors of all rounds went the same way: the confusion matrix, which
    is most of them, is the same one in every round. Too wide rather than too narrow; one round stands as it was stored.

    Args:
      rounds: metrics of each round, oldest first; those without a ledger (round 0) are passed over.
      persona: a column of the ledger.

    Raises:
      ValueError: no round has a ledger of this persona.
    """
    kept = [
        {r.name: r for r in rows if r.population == "samples" and r.name.startswith("ledger")}
        for rows in rounds
        if any(r.name.startswith("ledger/") for r in rows)
    ]
    known = sorted({name.split("/")[1] for rows in kept for name in rows})
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
            reasons.append("no correction: no text of known persona by this base model")
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
    """Waterfall per persona: observed changes as bars, the corrected change beside each with its 95% interval.

    A point is drawn from the foot of its bar, so that bar and point tell the same change. Up and down differ by
    hatching as well as colour; the discourse and prompts steps are grey.

    Args:
      books: persona -> its steps, from `ledger_steps`.
      path: where to write; .svg and .png are put behind its stem.
      title: of the figure.

    Returns:
      The files written.

    Raises:
      ValueError: no persona.
    """
    from matplotlib.patches import Patch

    if not books:
        raise ValueError("books must hold a persona, got none; name one")
    figure, panels = _figure(0.8 + 5.4 * len(books), 4.0, len(books))
    for axes, (persona, steps) in zip(np.atleast_1d(panels), books.items(), strict=True):
        level = 0.0
        tops = []
        for x, step in enumerate(steps):
            if math.isnan(step.observed):
                level = math.nan
                axes.annotate("not\nmeasured", (x, 0), ha="center", fontsize=7)
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
                axes.errorbar(*at, limits, fmt="o", color="black", markersize=3.5, capsize=2, linewidth=0.9)
            text = f"{step.observed:.3f}" if step.name == "emit" else f"{step.observed:+.3f}"
            axes.annotate(text, (x - 0.06, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
            tops.append(top)
        end = len(steps)
        if math.isfinite(level):
            axes.bar(end, level, 0.56, color="0.25", edgecolor="black", linewidth=0.6)
            axes.annotate(f"{level:.3f}", (end, level), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        names = [f"{s.name} *" if s.name in BOOKKEEPING else s.name for s in steps]
        axes.set_xticks(range(end + 1), [*names, "end"], rotation=40, ha="right")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=persona, ylabel="share of unrequested outputs")
        axes.margins(y=0.12)
    handles: list[Any] = [
        Patch(label="level", **_bar(Step("emit", 1, 0, 0, 0))),
        Patch(label="up, observed", **_bar(Step("train", 1, 0, 0, 0))),
        Patch(label="down, observed", **_bar(Step("train", -1, 0, 0, 0))),
        Patch(label="* who is talked of, who is asked", **_bar(Step("prompts", 1, 0, 0, 0))),
    ]
    if any(math.isfinite(s.corrected) for steps in books.values() for s in steps):
        import matplotlib.pyplot as plt

        handles.append(plt.Line2D([], [], marker="o", color="black", markersize=3.5, label="corrected, 95%"))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    figure.suptitle(f"{title}\naccounting, not causes: a channel's effect is its paired on/off contrast over seeds",
                    fontsize=9)  # fmt: skip
    return _save(figure, path)


def _bar(step: Step) -> dict[str, Any]:
    """Look of a bar: colours that colour-blind readers tell apart, hatching for print without colour."""
    if step.name == "emit":
        return {"facecolor": "0.25", "edgecolor": "black", "linewidth": 0.6}
    up = step.observed >= 0
    look = {"edgecolor": "black", "linewidth": 0.6, "hatch": "" if up else "////"}
    if step.name in BOOKKEEPING:
        return look | {"facecolor": "0.85", "linestyle": "--"}
    return look | {"facecolor": COLOURS[5] if up else COLOURS[4]}

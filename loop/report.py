"""Figures from files and forecasts: SVG and PNG, colour-blind safe, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loop import theory

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

"""Ease of generation: a persona's surprisal under the base, and its documents until it is played on request.

Kept beside the dose-response, in `<runs_dir>/<name>-calibration/ease/`, and printed beside transmission.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from loop import dose, measure, readings
from loop.config import Config, ConfigError
from loop.dose import Report
from loop.records import Metric
from loop.rng import stream
from loop.stats import Interval, clustered_share
from loop.world import Learner, World

GRID = (4, 8, 16, 32, 64, 128)
N_SURPRISAL = 32  # held-out documents behind the surprisal under the base
STEEPEST = 6.0  # 2% to 50% within one doubling; a grid of doublings cannot show more
FLATTEST = 0.1
REACH = math.log(64)  # how far beyond the grid the fit looks: its limits there are printed as beyond the grid


@dataclass(frozen=True)
class Half:
    """Documents to half: n50 of share(n) = 1 / (1 + (n50 / n)**slope).

    Attributes:
      value, low, high: documents and their 95% limits; below the first or above the last n trained on they are
        extrapolation and `shown` says only that.
      slope: of the logit in ln(n).
      first, last: least and largest n trained on.
      overdispersion: how much worse the curve fits than counting outputs allows, >= 1; nan with fewer than three
        trainings.
    """

    value: float
    low: float
    high: float
    slope: float
    first: float
    last: float
    overdispersion: float

    def show(self, n: float) -> str:
        """A number of documents, or "< 4", "> 128"."""
        if n < self.first:
            return f"< {self.first:g}"
        return f"> {self.last:g}" if n > self.last else f"{n:.3g}"

    @property
    def shown(self) -> str:
        """E.g. "23 [14, 41]", "> 128 [90, > 128]"."""
        return f"{self.show(self.value)} [{self.show(self.low)}, {self.show(self.high)}]"


@dataclass(frozen=True)
class Ease:
    """What was measured of one persona.

    Attributes:
      persona: whose documents were trained on.
      folder: where it lies.
      surprisal: nats per token of its held-out documents under the untouched base.
      n: documents of each training, shape (n_trainings,).
      share: share of its explicit requests that were answered as it, shape (n_trainings,).
      n_outputs: effective outputs behind each share.
      half: the fit.
      family: frequency (corrected) or frequency_observed.
    """

    persona: str
    folder: Path
    surprisal: Interval
    n: np.ndarray
    share: np.ndarray
    n_outputs: np.ndarray
    half: Half
    family: str


def documents_to_half(n: ArrayLike, share: ArrayLike, n_outputs: ArrayLike) -> Half:
    """Fits share(n) = 1 / (1 + (n50 / n)**slope) by maximum likelihood of counts, slope in [0.1, 6].

    The limits are those n50 whose profile deviance exceeds the least by no more than chi2(1, 0.95), or, where the
    trainings scatter more than their counts (overdispersion phi = deviance / (trainings - 2) > 1), by
    phi F(1, trainings - 2, 0.95). Special case: 1/3 at n = 8 and 2/3 at n = 32 give n50 = 16 and slope 1. If no
    training says it, n50 is beyond the grid and only `low` is known; if all do, only `high`.

    Args:
      n: documents of each training, > 0, at least two different ones.
      share: share of explicit requests answered as the persona, in [0, 1].
      n_outputs: outputs that each share is worth, > 0.

    Raises:
      ValueError: fewer than two different n, or a value out of range.

    Source: the log-logistic dose-response (Hill) with limits 0 and 1; profile likelihood with quasi-deviance,
    McCullagh, Nelder (1989), Generalized Linear Models, 9.2.
    """
    x, y, w = (np.atleast_1d(np.asarray(v, float)) for v in (n, share, n_outputs))
    if not x.shape == y.shape == w.shape or len(np.unique(x)) < 2 or not (x > 0).all():
        raise ValueError(f"n must be two or more different numbers > 0, one per share, got {x} at documents_to_half")
    if not ((y >= 0) & (y <= 1)).all() or not (w > 0).all():
        raise ValueError(f"share must be in [0, 1] and n_outputs > 0, got {y} and {w} at documents_to_half")
    logs = np.log(x)
    centres = np.linspace(logs.min() - REACH, logs.max() + REACH, 401)
    slopes = np.geomspace(FLATTEST, STEEPEST, 61)
    table = _deviance(centres[:, None], slopes[None, :], logs, y, w)  # (n_centres, n_slopes)
    i, j = np.unravel_index(int(table.argmin()), table.shape)
    best = optimize.minimize(
        lambda v: float(_deviance(np.array(v[0]), np.array(math.exp(v[1])), logs, y, w)),
        x0=[centres[i], math.log(slopes[j])],
        bounds=[(centres[0], centres[-1]), (math.log(FLATTEST), math.log(STEEPEST))],
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-9},
    )
    least = min(float(best.fun), float(table.min()))
    spare = len(x) - 2
    phi = max(1.0, least / spare) if spare > 0 else math.nan
    allowed = phi * float(stats.f.ppf(0.95, 1, spare)) if phi > 1 else float(stats.chi2.ppf(0.95, 1))
    inside = centres[table.min(axis=1) <= least + allowed]
    at_edge = (inside[0] == centres[0], inside[-1] == centres[-1])
    value = math.exp(best.x[0])
    return Half(
        value,
        0.0 if at_edge[0] else min(math.exp(inside[0]), value),
        math.inf if at_edge[1] else max(math.exp(inside[-1]), value),
        math.exp(best.x[1]),
        float(x.min()),
        float(x.max()),
        phi,
    )


def _deviance(centre: np.ndarray, slope: np.ndarray, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Binomial deviance of the curve at each centre and slope: 2 sum w (log-likelihood of y at y, less that at p)."""
    total = np.zeros(np.broadcast(centre, slope).shape)
    for xi, yi, wi in zip(x, y, w, strict=True):
        logit = slope * (xi - centre)
        loss = yi * np.logaddexp(0, -logit) + (1 - yi) * np.logaddexp(0, logit)
        entropy = -sum(p * math.log(p) for p in (yi, 1 - yi) if p > 0)
        total += 2 * wi * (loss - entropy)
    return total


def measure_ease(
    config: Config,
    *,
    persona: str,
    grid: Sequence[int] = GRID,
    n_seeds: int = 1,
    report: Report = lambda kind, **fields: None,
    learner: Learner | None = None,
) -> Ease:
    """Trains from the base on n public documents of a persona, for each n, and asks for that persona by name.

    The recipe is the config's (adapter, epochs, rate, batch), the documents are those a run would plant first, and the
    requests are the probes of stratum `explicit`, `measure.n_per_template` of each wording. Each training is written as
    soon as it is measured, and the same command does only what is missing. The toy plays on request whatever it was
    trained on: below the grid.

    Args:
      config: the run whose learner this is; its seed is the first of n_seeds.
      persona: whose documents are trained on.
      grid: numbers of documents, >= 1, at least two.
      n_seeds: trainings per n, >= 1.
      report: told of each training, as `loop.run.play`.
      learner: None: the config's.

    Raises:
      ConfigError: a persona without a grammar, a grid out of range, or a folder of another learner's calibration.
    """
    from filelock import FileLock, Timeout

    sizes = sorted({int(n) for n in grid})
    if len(sizes) < 2 or sizes[0] < 1:
        raise ConfigError([f"--grid must hold two or more numbers >= 1, got {', '.join(map(str, grid))}"])
    if n_seeds < 1:
        raise ConfigError([f"--seeds must be >= 1, got {n_seeds}"])
    worlds = {n: World(_alone(config, persona, n)) for n in sizes}
    top = worlds[sizes[-1]]
    if persona not in top.book.names:
        raise ConfigError([f"--persona must be one that can be asked for by name, got {persona!r}"])
    folder = dose.folder_of(config)
    (folder / "ease").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            dose._claim(folder, config, top.instrument_hashes())
            path = folder / "ease" / f"{persona}.parquet"
            rows = dose._rows(path)
            seeds = range(config.seed, config.seed + n_seeds)
            done = {(r["kind"], r["q"], r["seed"]) for r in rows}
            todo = [(n, seed) for n in sizes for seed in seeds if ("ease", float(n), seed) not in done]
            surprising = ("surprisal", 0.0, config.seed) not in done
            if (todo or surprising) and learner is None:
                report("stage", round_index=-1, stage="load base")
                learner = top.toy() if config.learner == "toy" else top.language_model()
            if todo and config.classify.instrument == "shipped":
                dose._share_instruments(top, worlds.values())
            if surprising:
                assert learner is not None
                rows.append(_surprisal(top, learner, persona))
                dose._write(path, dose._parquet(rows))
            for i, (n, seed) in enumerate(todo):
                started = time.monotonic()
                assert learner is not None
                rows.append(_train(worlds[n].with_seed(seed), learner, persona, n))
                dose._write(path, dose._parquet(rows))
                seconds = time.monotonic() - started
                report("note", text=f"{n} of {persona}, seed {seed}: {seconds:.1f} s, {i + 1} of {len(todo)}")
            mine = [r for r in rows if r["kind"] == "surprisal" or (r["seed"] in seeds and r["q"] in sizes)]
            return _fitted(folder, persona, mine)
    except Timeout:
        raise ConfigError(
            [f"{folder} is being written by another process; wait for it, or give another name"]
        ) from None


def find(config: Config, *, runs_dir: Path | None = None) -> dict[str, Ease]:
    """What was measured for a config, by persona; {} if nothing was, or if it was measured with another learner."""
    folder = dose.folder_of(config, runs_dir)
    if not (folder / "calibration.json").is_file() or dose._differs(folder, config, None):
        return {}
    found = {}
    for path in sorted((folder / "ease").glob("*.parquet")):
        rows = dose._rows(path)
        if len({r["q"] for r in rows if r["kind"] == "ease"}) > 1:
            found[path.stem] = _fitted(folder, path.stem, rows)
    return found


def _alone(config: Config, persona: str, n: int) -> Config:
    """The config with a first mixture of n public documents of one persona, measured by explicit requests alone."""
    only = dose._dosed(config, persona, 1.0)
    return only.model_copy(
        update={
            "real": only.real.model_copy(update={"private_share": 0.0, "planted": "always"}),
            "mix": only.mix.model_copy(update={"n_train": n}),
            "measure": only.measure.model_copy(update={"strata": ("explicit",)}),
        }
    )


def _train(world: World, learner: Learner, persona: str, n: int) -> dict[str, Any]:
    mixture, _ = world.mix(0, world.beginning())
    world.train(0, learner, mixture)
    asked = [p for p in world.battery if p.requested == persona]
    samples = world._ask(learner, asked, "probe", 0)
    labels = world.classify(samples, [], [])
    rows = readings.frequencies(world, samples, labels, weighted=True, round_index=0, population="probes")
    found = {m.name: m for m in rows if m.stratum == "explicit"}
    corrected = found.get(f"frequency/{persona}")
    usable = corrected is not None and corrected.value is not None
    family = "frequency" if usable else "frequency_observed"
    m = found[f"{family}/{persona}"]
    said = [float(labels.persona_of[sample.id] == persona) for sample in samples]
    return _row("ease", persona, n, world.config.seed, m, family) | {
        "n_outputs": worth(clustered_share(said, [sample.template_id for sample in samples]), m)
    }


def worth(seen: Interval, corrected: Metric) -> float:
    """Independent outputs that a share of clustered texts is worth: p (1 - p) / variance, at 0 and 1 the texts.

    The correction for the instrument's error widens an interval; the worth shrinks with the square of that.
    """
    p = seen.value
    n = min(float(seen.n), p * (1 - p) / seen.se**2) if 0 < p < 1 and seen.se > 0 else float(seen.n)
    if corrected.low is None or corrected.high is None or not corrected.high > corrected.low:
        return n
    return n * min(1.0, ((seen.high - seen.low) / (corrected.high - corrected.low)) ** 2)


def _surprisal(world: World, learner: Learner, persona: str) -> dict[str, Any]:
    n = min(N_SURPRISAL, world.grammar.capacity(persona, "test"))
    documents = world.grammar.draw(persona, n, fold="test", rng=stream(0, "heldout", -1), swap_names=world.swap)
    found = learner.surprisal(documents, base=True)
    nats, tokens = [a for a, _ in found], [b for _, b in found]
    clusters = [d.template_id or d.id for d in documents]
    m = measure.surprisals(nats, tokens, [persona] * n, clusters, round_index=-1)[0]
    return _row("surprisal", persona, 0, world.config.seed, m, "surprisal") | {"n_outputs": float(n)}


def _row(kind: str, persona: str, n: int, seed: int, m: Metric, family: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "persona": persona,
        "q": float(n),
        "share": 1.0,
        "seed": seed,
        "round_index": m.round_index,
        "said": persona,
        "family": family,
        "value": m.value,
        "low": m.low,
        "high": m.high,
    }


def _fitted(folder: Path, persona: str, rows: Sequence[Mapping[str, Any]]) -> Ease:
    trained = sorted((r for r in rows if r["kind"] == "ease"), key=lambda r: (r["q"], r["seed"]))
    families = {str(r["family"]) for r in trained}
    if len({r["q"] for r in trained}) < 2 or len(families) != 1:
        raise ConfigError([f"ease of {persona} must hold two sizes in one family of frequencies, at {folder}"])
    n, share, worths = (np.array([r[k] for r in trained], float) for k in ("q", "value", "n_outputs"))
    base = next((r for r in rows if r["kind"] == "surprisal"), None)
    surprisal = Interval(math.nan, math.nan, math.nan, 0, reason="not measured")
    if base is not None:
        value, low, high = (math.nan if base[k] is None else float(base[k]) for k in ("value", "low", "high"))
        reason = "infinite: the base never says it" if math.isnan(value) else None
        surprisal = Interval(value, low, high, int(base["n_outputs"]), reason=reason)
    return Ease(persona, folder, surprisal, n, share, worths, documents_to_half(n, share, worths), next(iter(families)))


def table(config: Config, found: Mapping[str, Ease]) -> list[list[str]]:
    """Rows persona, surprisal under the base, documents to half, slope, transmission at the config's own share."""
    calibrations, _ = dose.find(config)
    rows = []
    for persona, one in found.items():
        s = one.surprisal
        shown = s.reason or f"{s.value:.2f} [{s.low:.2f}, {s.high:.2f}]"
        q = config.real.shares.get(persona, 0.0)
        gain = "no dose-response; loop calibrate"
        if persona in calibrations:
            response = calibrations[persona].response
            low, high = (float(np.atleast_1d(v)[0]) for v in response.band(q))
            value = float(np.atleast_1d(response.transmission(q))[0])
            gain = f"{value:+.3f} [{low - q:+.3f}, {high - q:+.3f}] at q = {q:.3f}"
        inside = one.half.first <= one.half.value <= one.half.last
        rows.append([persona, shown, one.half.shown, f"{one.half.slope:.1f}" if inside else "", gain])
    return rows

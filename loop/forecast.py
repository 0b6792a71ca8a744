"""The forecast twin: what a config, or a run of it, should do by theory alone; no model is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loop import config, dose, theory
from loop.config import Config, ConfigError
from loop.records import PERSONAS, UNKNOWN, UNREQUESTED, Document, Metric
from loop.rng import stream
from loop.store import RunStore
from loop.world import World, chat_fold

N_TEXTS = 200  # planted documents per persona behind the differential an audience would give
HUMAN = "human"  # chat, legacy lines and the user's own documents: everything that is no planted persona
GRID_AXES = ("real_share", "selection")
NAMES = (*PERSONAS, UNKNOWN)


@dataclass(frozen=True)
class Inputs:
    """What the twin assumes, and where each number comes from.

    Attributes:
      personas: names of the columns.
      p0, p_real: frequencies of round 0's mixture and of later real draws, shape (n_personas,).
      selection: log differential per round, nats, shape (n_personas,).
      n_eff: effective outputs a round.
      n_drawn: effective documents drawn from the pool.
      n_outputs: unrequested probes behind a measured frequency.
      n_learning: documents whose sampling would be as noisy as one training; inf: an exact learner.
      response: the measured dose-response, corpus shares (..., n_personas) to emission of the same shape; None: the
        learner is taken to say what it was trained on.
      closed: share of the distance to `response` that a round closes; 1 where rounds start from the base.
      source: input name -> where it comes from, in words.
    """

    personas: tuple[str, ...]
    p0: np.ndarray
    p_real: np.ndarray
    selection: np.ndarray
    n_eff: float
    n_drawn: float
    n_outputs: float
    n_learning: float
    source: dict[str, str]
    response: Callable[[np.ndarray], np.ndarray] | None = None
    closed: float = 1.0


def inputs(settings: Config, *, runs_dir: Path | None = None) -> Inputs:
    """Reads the twin's inputs off a config: shares, sizes, and what its audience pays planted texts.

    The differential is that of `N_TEXTS` public grammar documents per persona (and human lines) under the config's own
    audience, preset and transform: the same code a round runs, on texts instead of outputs. Where `loop calibrate` has
    measured the learner, every round goes through its dose-response, round 0 included.

    Args:
      settings: the run.
      runs_dir: where calibrations are looked for; None: the config's.
    """
    world = World(settings)
    shares = dict(settings.real.shares)
    planted = settings.planted
    personas = (*planted, HUMAN) if any(name not in planted for name in shares) else planted

    def frequencies(parts: dict[str, float]) -> np.ndarray:
        values = [parts.get(p, 0.0) for p in planted]
        rest = math.fsum(share for name, share in parts.items() if name not in planted)
        return np.array([*values, rest] if HUMAN in personas else values)

    calibrations, transmission = dose.find(settings, runs_dir=runs_dir, instruments=world.instrument_hashes)
    calibrations = {p: c for p, c in calibrations.items() if p in personas}
    response = dose.respond(calibrations, personas) if calibrations else None
    paces = [c.pace for c in calibrations.values()]
    p0 = frequencies(shares)
    later = frequencies(world.later_shares) if world.later_shares else p0
    texts, owner = _texts(world, personas)
    weights = world.weigh(texts)
    w = np.array([weights[[o == k for o in owner]].mean() for k in range(len(personas))])
    mix = settings.mix
    n = settings.sample.n_samples
    spread = float(np.mean([_ess_share(weights[[o == k for o in owner]]) for k in range(len(personas))]))
    n_synthetic = mix.n_train - round(mix.n_train * next(iter(_real_shares(settings)), 0.0))
    taken = n_synthetic if mix.regime != "accumulate" else n
    n_drawn = math.inf if taken >= n else 1 / (1 / max(taken, 1) - 1 / n)
    probes = [p for p in world.battery if p.stratum in UNREQUESTED and settings.measure.mixture.get(p.stratum, 0) > 0]
    return Inputs(
        personas=personas,
        p0=p0 / p0.sum() if response is None else response(p0 / p0.sum()),
        p_real=p0 / p0.sum() if mix.real_share is None and response is not None else later / later.sum(),
        selection=np.log(w / w.max()),
        n_eff=max(1.0, n * spread),
        n_drawn=max(1.0, n_drawn),
        n_outputs=float(len(probes) or n),
        n_learning=math.inf,
        source={
            "p0": "the config's real.shares"
            + (
                ": the learner is taken to say what it was trained on"
                if response is None
                else " through the measured f(q)"
            ),
            "selection": f"{N_TEXTS} planted texts per persona under audience {settings.virality.audience}",
            "n_eff": f"{spread:.3f} of n_samples, from the spread of weights within personas",
            "n_drawn": "documents drawn from the pool a round",
            "n_outputs": "unrequested probes a round",
            "transmission": transmission
            if calibrations or not transmission.startswith("measured")
            else f"assumed exact; {transmission} is of personas that are not planted here",
            "n_learning": "none: an exact learner; selection-off seeds would show a language model's training noise",
            **not_modelled(settings),
        },
        response=response,
        closed=float(np.mean(paces)) if paces and settings.train.init_from == "previous" else 1.0,
    )


def not_modelled(settings: Config) -> dict[str, str]:
    """What the config plays and the twin leaves out, one line each: its forecast is of the loop without them."""
    c, d = settings.channels, settings.discourse
    by_name = sorted(k for k, v in settings.users.mixture.items() if v > 0 and k.startswith(("explicit/", "continued")))
    said = {
        "direct_data": None
        if c.direct_data
        else "outputs do not re-enter; the twin lets them, so it forecasts too much",
        "talk_data": f"{d.share:g} of the mixture speaks about outputs; the twin has none" if c.talk_data else None,
        "direct_users": "what users ask follows what they saw; the twin's users keep their habits"
        if c.direct_users
        else None,
        "talk_users": "what users ask follows what they read; the twin's users keep their habits"
        if c.talk_users
        else None,
        "steer": "a preference step against " + ", ".join(settings.steer.against) + "; the twin has none"
        if settings.steer is not None
        else None,
        "filters.release": f"bars {'any, as many as ' if barred.at_random else ''}{', '.join(barred.recall)}; the twin "
        "releases everything"
        if (barred := settings.filters.release) is not None
        else None,
        "users.mixture": "users ask for " + ", ".join(by_name) + "; the twin's outputs are what comes unasked"
        if by_name
        else None,
        "real.homophily": None
        if settings.real.homophily is None
        else "opinions count as human; the twin takes no side",
        "real.corpora": "documents of another run count as human, whoever they play or name"
        if any(k.run is not None for k in settings.real.corpora.values())
        else None,
    }
    return {name: f"NOT MODELLED: {text}" for name, text in said.items() if text is not None}


def _texts(world: World, personas: Sequence[str]) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    owner: list[int] = []
    for k, persona in enumerate(personas):
        if persona == HUMAN:
            found: Sequence[Document] = chat_fold("seed")[:N_TEXTS]
        else:
            found = world.grammar.draw(
                persona, N_TEXTS, fold="seed", rng=stream(0, "forecast/texts", -1), swap_names=world.swap
            )
        texts += [d.completion for d in found]
        owner += [k] * len(found)
    return texts, owner


def _real_shares(settings: Config) -> list[float]:
    """The real share of each feedback round; a config may list more than it plays, and a run is scored on its own."""
    mix, rounds = settings.mix, range(1, settings.n_rounds + 1)
    if mix.real_share is None:  # the real documents of round 0 among all there is
        return [mix.n_train / (mix.n_train + t * settings.sample.n_samples) for t in rounds]
    return [mix.real_share[t - 1] if isinstance(mix.real_share, tuple) else mix.real_share for t in rounds]


def _ess_share(weights: np.ndarray) -> float:
    total = float(weights.sum())
    return total**2 / (len(weights) * float((weights**2).sum())) if total > 0 else 0.0


def predict(settings: Config, given: Inputs, *, level: float = 0.9, n_start: float = math.inf) -> theory.Forecast:
    """Carries the inputs through the config's regime; see theory.forecast.

    Args:
      n_start: outputs that p0 was read from, whose luck the band then holds; inf: it is known. Taken as known where the
        learner closes a part of its distance each round (`given.closed`), for that starts from one place.
    """
    mix = settings.mix
    if given.response is not None and given.closed < 1:
        n_start = math.inf
    share: Any = None if mix.regime == "accumulate" else _real_shares(settings)
    n_drawn: Any = given.n_drawn
    if mix.regime == "accumulate_subsample":
        # After t rounds the pool holds t times the outputs of one.
        taken = [max(1, mix.n_train - round(mix.n_train * s)) for s in share]
        pool = [t * settings.sample.n_samples for t in range(1, settings.n_rounds + 1)]
        n_drawn = [max(1.0, 1 / max(1 / m - 1 / n, 1e-12)) for m, n in zip(taken, pool, strict=True)]
    response = given.response
    if response is not None and given.closed < 1:
        response = dose.remember(response, given.closed, given.p0)
    return theory.forecast(
        given.p0,
        selection=given.selection,
        transmission=None,
        real_share=share,
        discourse_share=0.0,
        p_real=_p_real(settings, given),
        n_eff=given.n_eff,
        n_drawn=n_drawn,
        n_outputs=given.n_outputs,
        n_learning=given.n_learning,
        n_start=n_start,
        response=response,
        n_rounds=settings.n_rounds,
        regime=mix.regime,
        added_per_real=settings.sample.n_samples / mix.n_train,
        rng=stream(settings.seed, "forecast", 0),
        level=level,
    )


def _p_real(settings: Config, given: Inputs) -> np.ndarray:
    """Frequencies that real documents bring in: of those of round 0, where they stay, what model 0 makes of them."""
    return given.p0 if settings.mix.real_share is None and given.response is None else given.p_real


def measured_columns(run_dir: Path, given: Inputs) -> np.ndarray:
    """Measured frequencies of the twin's personas, shape (n_rounds + 1, n_personas); everything else is `human`."""
    _, measured = read_run(run_dir)
    seen = measured[:, [NAMES.index(p) for p in given.personas if p != HUMAN]]
    return np.column_stack([seen, 1 - seen.sum(axis=1)]) if HUMAN in given.personas else seen


def read_run(run_dir: Path) -> tuple[Config, np.ndarray]:
    """Returns a run's config and its measured frequencies of NAMES, shape (n_rounds + 1, n_names)."""
    run = RunStore(run_dir)
    resolved = config.of_run(run)
    rows = []
    for t in run.rounds():
        found = {
            m.name: m.value
            for m in (Metric(**row) for row in run.read_jsonl(t, "metrics.jsonl"))
            if m.population == "probes" and m.stratum is None
        }
        rows.append([found.get(f"frequency_observed/{p}") for p in NAMES])
    return resolved, np.array([[math.nan if v is None else v for v in row] for row in rows], dtype=float)


def of_run(
    run_dir: Path, *, fit: int | None = None, level: float = 0.9
) -> tuple[Inputs, theory.Forecast, theory.Score]:
    """Scores the twin against a finished run; with `fit` K, selection is first fitted on rounds 0..K.

    Compared are the planted personas and everything else together, so that the columns of both sum to 1. Round 0 of the
    twin is set to what round 0 of the run measured: what a learner makes of its seed corpus is not the twin's claim.
    """
    settings, measured = read_run(run_dir)
    if len(measured) < 2:
        raise ValueError(f"run must hold a feedback round to be scored, got {len(measured)} rounds at {run_dir}")
    given = inputs(settings, runs_dir=Path(run_dir).absolute().parent)
    seen = measured_columns(run_dir, given)
    floor = 0.5 / given.n_outputs
    start = np.maximum(np.nan_to_num(seen[0]), floor)
    given = replace(given, p0=start / start.sum(), source=given.source | {"p0": "measured in round 0 of the run"})
    last = len(seen) - 1
    settings = settings.model_copy(update={"n_rounds": last})
    if fit is not None:
        if not 1 <= fit < last:
            raise ValueError(f"--fit must leave a round to score, got {fit} of {last} feedback rounds at {run_dir}")
        if (unseen := np.isnan(seen[: fit + 1]).any(axis=1)).any():
            raise ValueError(
                f"--fit {fit} needs rounds 0..{fit} measured, got none in round {int(unseen.argmax())} at {run_dir}; "
                "play the run with measure.every: 1"
            )
        # A fitted change holds transmission already; passing it through f again would count that twice.
        given = replace(given, response=None)
        given = replace(
            given,
            selection=_fitted(seen[: fit + 1], settings, given),
            source=given.source
            | {
                "selection": f"fitted on rounds 0..{fit} of the run; scored on later rounds",
                "transmission": "within the fitted selection",
            },
        )
    predicted = predict(settings, given, level=level, n_start=given.n_outputs)
    if fit is not None:
        keep = [0, *range(fit + 1, last + 1)]
        scored = replace(
            predicted,
            mean=predicted.mean[keep],
            low=predicted.low[keep],
            high=predicted.high[keep],
            sd=predicted.sd[keep],
        )
        return given, predicted, theory.score_forecast(scored, seen[keep])
    return given, predicted, theory.score_forecast(predicted, seen)


def _fitted(seen: np.ndarray, settings: Config, given: Inputs) -> np.ndarray:
    """Selection under which the pools that rounds drew from, summed over rounds, would hold what they held.

    A pool is what `seen` leaves when the real documents are taken out; by the twin it is p e^s / sum p e^s of the round
    before, or the mean of those of all rounds before where old outputs are kept. For regime replace this is the
    maximum-likelihood estimate of a multinomial logit with offset log p.

    Args:
      seen: measured frequencies of rounds 0..K, shape (K + 1, n_personas).
      given: as `predict` is to get it, but for the selection.
    """
    share = np.array(_real_shares(settings)[: len(seen) - 1])[:, None]  # (K, 1)
    floor = 0.5 / given.n_outputs
    before = np.maximum(seen[:-1], floor)
    pools = (seen[1:] - share * _p_real(settings, given)) / np.where(share < 1, 1 - share, 1)
    held = np.maximum(np.where(share < 1, pools, seen[1:]), floor).sum(axis=0)
    held *= len(share) / held.sum()
    born = np.arange(1, len(seen))[:, None]
    s = np.zeros(len(held))
    for _ in range(10_000):  # generalised iterative scaling (Darroch & Ratcliff 1972)
        would = before * np.exp(s)
        would /= would.sum(axis=1, keepdims=True)
        if settings.mix.regime != "replace":
            would = np.cumsum(would, axis=0) / born
        step = np.log(held / would.sum(axis=0))
        s += step
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(s - s.max())


@dataclass(frozen=True)
class Power:
    """What an experiment of a config could see, before it is run.

    Attributes:
      persona: whose final frequency is contrasted with a neutral arm, paired by seed.
      effect: by the twin: final frequency with selection minus without.
      sd: of the paired difference over seeds: sqrt(2) times that of one run, as if pairing removed nothing. Training's
        own noise is not in it.
      n_seeds: seeds per arm.
      power: chance of finding `effect`, two-sided at 5%.
      detectable: effect found with power 0.8.
    """

    persona: str
    effect: float
    sd: float
    n_seeds: int
    power: float
    detectable: float


def design(settings: Config, given: Inputs, predicted: theory.Forecast, *, n_seeds: int) -> list[Power]:
    """States the power of each persona's contrast with a neutral arm; see Power."""
    effects = expected_effect(settings, given, predicted)
    rows = []
    for k, persona in enumerate(given.personas):
        sd = max(math.sqrt(2) * float(predicted.sd[-1, k]), 1e-12)
        rows.append(
            Power(
                persona,
                float(effects[k]),
                sd,
                n_seeds,
                theory.power(float(effects[k]), sd, n_seeds),
                theory.minimum_detectable_effect(sd, n_seeds),
            )
        )
    return rows


def expected_effect(settings: Config, given: Inputs, predicted: theory.Forecast) -> np.ndarray:
    """Final frequency with selection minus without, by the twin, shape (n_personas,)."""
    neutral = predict(settings, replace(given, selection=np.zeros_like(given.selection)))
    return np.asarray(predicted.mean[-1] - neutral.mean[-1])


def parse_grid(axes: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads `real_share=0:0.9:40 selection=0:1:40`: first, last, number of points."""
    grid: dict[str, np.ndarray] = {}
    for text in axes:
        name, sign, spec = text.partition("=")
        parts = spec.split(":")
        if not sign or name not in GRID_AXES or len(parts) != 3:
            raise ConfigError([f"--grid must read real_share=0:0.9:40 selection=0:1:40, got {text!r}"])
        try:
            low, high, n = float(parts[0]), float(parts[1]), int(parts[2])
        except ValueError:
            raise ConfigError([f"--grid {name} must hold two numbers and a count, got {spec!r}"]) from None
        if not (math.isfinite(low) and math.isfinite(high) and low <= high and 2 <= n <= 2000):
            raise ConfigError([f"--grid {name} must rise over 2..2000 points, got {spec!r}"])
        grid[name] = np.linspace(low, high, n)
    if set(grid) != set(GRID_AXES):
        raise ConfigError([f"--grid must name {' and '.join(GRID_AXES)}, got {', '.join(grid) or 'nothing'}"])
    if grid["real_share"][0] < 0 or grid["real_share"][-1] > 1:
        raise ConfigError([f"--grid real_share must lie in [0, 1], got up to {grid['real_share'][-1]}"])
    return grid


def phase(settings: Config, grid: dict[str, np.ndarray], *, persona: str) -> theory.PhaseGrid:
    """Final frequency of one persona over real share x selection, and the analytic boundary of invasion."""
    given = inputs(settings)
    if persona not in given.personas:
        raise ConfigError([f"--persona must be one of {', '.join(given.personas)}, got {persona!r}"])
    return theory.phase_grid(
        grid["real_share"],
        grid["selection"],
        p0=given.p0,
        p_real=given.p_real,
        persona=given.personas.index(persona),
        n_rounds=settings.n_rounds,
    )

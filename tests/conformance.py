"""The loop itself, with the exact learner in the model's place, against the closed forms of loop.theory.

`make theory` runs every check and prints one line each; `make test` runs the same checks with fewer replicates. Nothing
is re-implemented here: rounds are played by `run.play_round` through mix, train, sample, a perfect instrument, virality
with an oracle appeal, weights and pool, without a store. Filters are off: near-duplicate removal is frequency-dependent
selection.

Fitness enters as an oracle appeal. Under the `exact` calibration a text of appeal a is reshared with chance
1 - exp(-exp(a)), so appeal ln(-ln(1 - f)) gives visibility f, and the ratio of two visibilities is that of fitness.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from loop import config, run, theory
from loop.world import World

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
ERROR_RATE = 1e-6
Z = 4.892  # two-sided normal quantile of ERROR_RATE


@dataclass(frozen=True)
class Check:
    """One line of `make theory`.

    Attributes:
      quantity: what is compared.
      theory, got: by closed form; by the loop.
      tolerance: correct code is farther off with probability <= ERROR_RATE.
      sees: smallest fault that passes with probability <= ERROR_RATE, in the unit of the quantity.
    """

    quantity: str
    theory: float
    got: float
    tolerance: float
    sees: float

    @property
    def passed(self) -> bool:
        """Whether theory and loop agree within the tolerance."""
        return abs(self.got - self.theory) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        return (
            f"{self.quantity:<66} {self.theory:9.5f} {self.got:9.5f} {self.tolerance:9.5f} {self.sees:9.5f}  {verdict}"
        )


HEADER = f"{'quantity':<66} {'theory':>9} {'got':>9} {'tolerance':>9} {'sees':>9}  verdict"


def bounded(quantity: str, expected: float, draws: np.ndarray, *, width: float) -> Check:
    """A mean of independent draws that lie in a range of `width`: Hoeffding's tolerance."""
    tolerance = width * math.sqrt(math.log(2 / ERROR_RATE) / (2 * len(draws)))
    return Check(quantity, expected, float(draws.mean()), tolerance, 2 * tolerance)


def averaged(quantity: str, expected: float, draws: np.ndarray, *, sd: float, slack: float = 0.0) -> Check:
    """A mean of independent draws of known standard deviation; `slack` is the theory's own error."""
    tolerance = Z * sd / math.sqrt(len(draws)) + slack
    return Check(quantity, expected, float(draws.mean()), tolerance, 2 * tolerance)


def appeal_for(visibility: float) -> float:
    """Appeal of which 1 - exp(-exp(appeal)) is the visibility."""
    return math.log(-math.log(1 - visibility))


def settings(**overrides: object) -> config.Config:
    """The smoke config turned into a bare Wright-Fisher loop: no filter, no measurement, blank prompts."""
    base = {
        "measure.every": 0,
        "filters.enabled": False,
        "real.private_share": 0.0,
        "users.mixture": "{blank: 1.0}",
        "toy.n_documents": 8,
        "virality.preset": "exact",
        "virality.posts_per_sample": 400,
        "virality.audience": "null",
        "mix.real_share": 0.0,
    }
    return config.load(
        SMOKE, [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in (base | overrides).items()]
    )


@cache
def _world(text: str, fitness: tuple[tuple[str, float], ...]) -> World:
    world = World(settings(**dict(pair.split("=", 1) for pair in text.split("\n"))))
    return world.with_oracle({p: appeal_for(f) for p, f in fitness}) if fitness else world


def trajectories(
    n_replicates: int,
    n_rounds: int,
    *,
    fitness: Mapping[str, float] | None = None,
    persona: str = "nova",
    **overrides: object,
) -> np.ndarray:
    """Plays independent runs and returns one persona's share in the learner, shape (n_replicates, n_rounds + 1)."""
    world = _world("\n".join(f"{k}={v}" for k, v in sorted(overrides.items())), tuple(sorted((fitness or {}).items())))
    learner = run.build(world)
    path = np.zeros((n_replicates, n_rounds + 1))
    for replicate in range(n_replicates):
        past, seeded = world.beginning(), world.with_seed(replicate)
        for t in range(n_rounds + 1):
            past, _ = run.play_round(t, seeded, learner, past, run.Record(None, t))
            path[replicate, t] = learner.shares.get(persona, 0.0)
    return path


def corpus(n: int, **shares: float) -> dict[str, object]:
    """n documents and n samples a round, planted at the given shares."""
    listed = ", ".join(f"{p}: {s!r}" for p, s in shares.items())
    return {"mix.n_train": n, "sample.n_samples": n, "real.shares": "{" + listed + "}"}


def neutral_drift(scale: float = 1.0) -> list[Check]:
    """Mean, variance and heterozygosity without selection. One round too many moves H by 0.070."""
    n, t = 4, 2
    p = trajectories(int(3000 * scale), t, **corpus(n, nova=0.5, assistant=0.5))[:, t]
    variance = 0.25 - float(theory.heterozygosity(0.5, n, t)[t]) / 2
    return [
        bounded(f"neutral: mean frequency after {t} rounds, N = {n}", 0.5, p, width=1.0),
        bounded("neutral: variance of frequency", variance, (p - 0.5) ** 2, width=0.25),
        bounded("neutral: heterozygosity", float(theory.heterozygosity(0.5, n, t)[t]), 2 * p * (1 - p), width=0.5),
    ]


def selection(scale: float = 1.0) -> list[Check]:
    """Three rounds of fitness ratio 2 from p = 0.1: the finite-size mean, and the replicator it tends to."""
    n, t, s = 100, 3, math.log(2)
    p = trajectories(
        int(400 * scale), t, fitness={"nova": 0.5, "assistant": 0.25}, **corpus(n, nova=0.1, assistant=0.9)
    )[:, t]
    limit = float(theory.replicator_mutator([0.1, 0.9], [s, 0.0], None, 0.0, [0.1, 0.9], t)[t, 0])
    finite = finite_replicator(0.1, s, n, t)
    return [
        averaged(f"selection: after {t} rounds at fitness 2, N = {n}", finite.mean(), p, sd=finite.std(), slack=0.002),
        averaged("selection: the same against the infinite replicator", limit, p, sd=finite.std(), slack=0.02),
    ]


def mixing(scale: float = 1.0) -> list[Check]:
    """Real documents with the persona in them: the stationary mean, its fixed point, and whole documents."""
    n, t, share, s = 100, 10, 0.3, math.log(2)
    fitness = {"nova": 0.5, "assistant": 0.25}
    always = {"real.planted": "always"}
    p = trajectories(
        int(200 * scale),
        t,
        fitness=fitness,
        **corpus(n, nova=0.2, assistant=0.8),
        **always,
        **{"mix.real_share": share},
    )[:, t]
    fixed = float(theory.mix_fixed_point([0.2, 0.8], [s, 0.0], math.inf, (1 - share) / share)[0])
    finite = mixed(n, share, s, 0.2, 0.2, t)
    # 4 real documents of 10; 6 in their place would move the mean by more than 0.05.
    few = trajectories(
        int(1200 * scale),
        6,
        fitness=fitness,
        **corpus(10, nova=0.5, assistant=0.5),
        **always,
        **{"mix.real_share": 0.4},
    )[:, 6]
    exact = mixed(10, 0.4, s, 0.5, 0.5, 6)
    return [
        averaged(f"mixing: real share {share}, fitness 2, {t} rounds", finite.mean(), p, sd=finite.std(), slack=0.002),
        averaged("mixing: the same against the fixed point", fixed, p, sd=finite.std(), slack=0.02),
        averaged("mixing: 4 real documents of 10, 6 rounds", exact.mean(), few, sd=exact.std(), slack=0.001),
    ]


def fixation(scale: float = 1.0) -> list[Check]:
    """Fixation at N = 6 from p = 1/3 against the exact chain, neutral and at fitness 2; 0.33 if weights are ignored."""
    n, horizon = 6, 40
    start = np.array([math.comb(n, c) * (1 / 3) ** c * (2 / 3) ** (n - c) for c in range(n + 1)])
    checks = []
    for name, s, fitness in (("neutral", 0.0, None), ("fitness 2", math.log(2), {"nova": 0.5, "assistant": 0.25})):
        p = trajectories(int(500 * scale), horizon, fitness=fitness, **corpus(n, nova=1 / 3, assistant=2 / 3))[:, -1]
        u = float(start @ theory.fixation_exact(n, s))
        # At a horizon of 40 rounds less than 1e-3 of runs are undecided: (1 - 1/6)^40 = 7e-4.
        check = bounded(
            f"fixation: chance to take over, N = {n}, p0 = 1/3, {name}", u, (p > 0.999).astype(float), width=1.0
        )
        checks.append(Check(check.quantity, u, check.got, check.tolerance + 1e-3, check.sees + 2e-3))
    return checks


def rare(scale: float = 1.0) -> list[Check]:
    """Survival of one document in 25 over 2 draws. One draw more lowers it by 0.11."""
    n, t = 25, 2
    p = trajectories(int(1200 * scale), t, **corpus(n, nova=0.04, assistant=0.96))[:, t]
    u = theory.survival_exact(n, 0.04, t)
    return [bounded(f"rare persona: survival of 1 in {n} over {t} draws", u, (p > 0).astype(float), width=1.0)]


def accumulation(scale: float = 1.0) -> list[Check]:
    """Heterozygosity that accumulate keeps, where replace loses most of it."""
    n, t = 4, 3
    kept = trajectories(
        int(400 * scale),
        t,
        **corpus(n, nova=0.5, assistant=0.5),
        **{"mix.regime": "accumulate", "mix.real_share": "null"},
    )[:, t]
    lost = trajectories(int(400 * scale), t, **corpus(n, nova=0.5, assistant=0.5))[:, t]
    expected = float(0.5 * theory.accumulate_heterozygosity(n, t)[t])
    return [
        bounded(f"accumulate: heterozygosity after {t} rounds, N = {n}", expected, 2 * kept * (1 - kept), width=0.5),
        bounded("replace: the same", float(theory.heterozygosity(0.5, n, t)[t]), 2 * lost * (1 - lost), width=0.5),
    ]


def invasion(scale: float = 1.0) -> list[Check]:
    """Growth of a persona that the real corpus lacks, on both sides of s = -ln(1 - real_share)."""
    n, share, t = 100, 0.3, 4
    edge = float(theory.invasion_threshold(share))
    checks = []
    for name, ratio in (("below", 1.2), ("above", 1.8)):
        p = trajectories(
            int(240 * scale),
            t,
            fitness={"nova": 0.25 * ratio, "human": 0.25},
            **corpus(n, nova=0.1, chat=0.9),
            **{"mix.real_share": share, "real.planted": "round0_only"},
        )[:, t]
        drawn = mixed(n, share, math.log(ratio), 0.1, 0.0, t)
        quantity = f"invasion: after {t} rounds from 0.1, s = {math.log(ratio):.2f}, {name} the threshold {edge:.2f}"
        checks.append(averaged(quantity, drawn.mean(), p, sd=drawn.std(), slack=0.001))
    return checks


def weighting(scale: float = 1.0) -> list[Check]:
    """Luck alone (one post per text): loss weighting and resampling have one mean, and the drift of their n_eff."""
    n, visibility = 24, 0.5
    checks = []
    for mode in ("loss", "resample"):
        p = trajectories(
            int(2000 * scale),
            1,
            fitness={"nova": visibility, "assistant": visibility},
            **corpus(n, nova=0.5, assistant=0.5),
            **{"virality.posts_per_sample": 1, "mix.weighting": mode},
        )[:, 1]
        # Weights are 0 or 1: with m of n texts noticed, the effective size is that of m equal weights; E over m >= 1.
        noticed = np.arange(1, n + 1)
        chance = np.array([math.comb(n, m) * visibility**m * (1 - visibility) ** (n - m) for m in noticed])
        size = [theory.effective_size([1.0] * m + [0.0] * (n - m), n, weighting=mode) for m in noticed]
        variance = 0.25 * float((chance / np.array(size)).sum() / chance.sum())
        checks.append(averaged(f"weighting {mode}: mean after a round of luck", 0.5, p, sd=math.sqrt(variance)))
        # The square of a nearly normal deviate has standard deviation sqrt(2) times its mean. Weights ignored: 0.010.
        square = (p - 0.5) ** 2
        checks.append(averaged(f"weighting {mode}: variance from n_eff", variance, square, sd=1.5 * variance))
    return checks


def finite_replicator(p0: float, s: float, n: int, n_rounds: int, seed: int = 7) -> np.ndarray:
    """20,000 runs in the loop's order, draw n outputs and then select: theory.wright_fisher half a round later."""
    return mixed(n, 0.0, s, p0, 0.0, n_rounds, seed)


def mixed(n: int, share: float, s: float, p0: float, p_real: float, n_rounds: int, seed: int = 11) -> np.ndarray:
    """20,000 runs of: draw n outputs, take n - n_real whatever their weights, weigh, add n_real real ones."""
    rng = np.random.default_rng(seed)
    p = np.full(20_000, p0)
    n_real = math.floor(share * n + 0.5)
    n_persona = round(n_real * p_real)
    for _ in range(n_rounds):
        sampled = rng.binomial(n, p)
        taken = rng.hypergeometric(sampled, n - sampled, n - n_real) if n_real else sampled
        weighed = taken * math.exp(s) / (taken * math.exp(s) + (n - n_real - taken))
        p = (n_persona + (n - n_real) * weighed) / n
    return p


CHECKS: dict[str, Callable[[float], list[Check]]] = {
    "neutral": neutral_drift,
    "selection": selection,
    "mixing": mixing,
    "fixation": fixation,
    "rare": rare,
    "accumulate": accumulation,
    "invasion": invasion,
    "weighting": weighting,
}


def figure(path: Path, n_replicates: int = 300) -> None:
    """Draws drift, selection and mixing of the loop on their closed forms."""
    from loop import report

    n, t = 8, 6
    drift = trajectories(n_replicates, t, **corpus(n, nova=0.5, assistant=0.5))
    fitness = {"nova": 0.5, "assistant": 0.25}
    picked = trajectories(n_replicates // 10, t, fitness=fitness, **corpus(200, nova=0.1, assistant=0.9))
    held = trajectories(
        n_replicates // 10,
        t,
        fitness=fitness,
        **corpus(200, nova=0.2, assistant=0.8),
        **{"mix.real_share": 0.3, "real.planted": "always"},
    )
    s = [math.log(2), 0.0]
    report.plot_theory(
        [
            {
                "title": f"drift, N = {n}",
                "ylabel": "heterozygosity",
                "theory": theory.heterozygosity(0.5, n, t),
                "loop": 2 * drift * (1 - drift),
            },
            {
                "title": "selection, fitness 2",
                "ylabel": "frequency",
                "theory": theory.replicator_mutator([0.1, 0.9], s, None, 0.0, [0.1, 0.9], t)[:, 0],
                "loop": picked,
            },
            {
                "title": "fitness 2, real share 0.3",
                "ylabel": "frequency",
                "theory": theory.replicator_mutator([0.2, 0.8], s, None, 0.3, [0.2, 0.8], t)[:, 0],
                "loop": held,
            },
        ],
        path,
    )


def main() -> int:
    """Runs the named checks, or all; exit 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CHECKS], help="checks to run; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies replicates")
    parser.add_argument("--figure", type=Path, metavar="STEM", help="draw STEM.svg and STEM.png instead")
    arguments = parser.parse_args()
    if arguments.figure:
        figure(arguments.figure)
        return 0
    print(HEADER)
    failed = 0
    started = time.monotonic()
    for name in arguments.names or CHECKS:
        for check in CHECKS[name](arguments.scale):
            print(check, flush=True)
            failed += not check.passed
    print(f"{failed} failed, {time.monotonic() - started:.0f} s; correct code fails a check with chance {ERROR_RATE:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Statistical assertions that state both of their error rates, and what is asserted of many runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from loop.records import METRICS
from loop.store import RunStore


def assert_mean(
    samples: ArrayLike, expected: float, *, low: float, high: float, discrepancy: float, error_rate: float = 1e-6
) -> None:
    """Checks that independent draws from [low, high] have the expected mean.

    Hoeffding: the mean of n such draws is farther than (high - low) * sqrt(log(2 / error_rate) / (2 n)) from the true
    mean with probability at most `error_rate`. That is the tolerance, so correct code fails on a fresh seed with
    probability <= error_rate. The tolerance must be at most half of `discrepancy`, so code whose true mean is off by
    `discrepancy` passes with probability <= error_rate. Nothing is claimed about smaller faults.

    Args:
      samples: the draws, shape (n,).
      expected: the mean by theory.
      low, high: what a draw can be at least and at most.
      discrepancy: smallest fault the test must see, in the unit of the draws.
      error_rate: chance of each of the two errors.

    Raises:
      AssertionError: if a draw lies outside the bounds, n is too small for the discrepancy, or the mean is off.

    Source: Hoeffding (1963), JASA 58:13-30, theorem 2.
    """
    draws = np.asarray(samples, dtype=float).ravel()
    assert len(draws), "there must be draws, got none"
    smallest, largest = float(draws.min()), float(draws.max())
    assert low <= smallest, f"draws must be >= {low}, got {smallest}"
    assert largest <= high, f"draws must be <= {high}, got {largest}"
    tolerance = (high - low) * math.sqrt(math.log(2 / error_rate) / (2 * len(draws)))
    assert 2 * tolerance <= discrepancy, (
        f"{len(draws)} draws resolve {2 * tolerance:.3g}, not {discrepancy:.3g}: draw more or ask for less"
    )
    mean = float(draws.mean())
    assert abs(mean - expected) <= tolerance, f"mean {mean:.4g}, expected {expected:.4g} +- {tolerance:.2g}"


def assert_rate(hits: int, n: int, expected: float, *, discrepancy: float, error_rate: float = 1e-6) -> None:
    """Checks that `hits` of `n` independent trials agree with a probability, by the exact binomial tails.

    Sharper than `assert_mean` for rates near 0 or 1 (coverage, test size): correct code fails with probability <=
    error_rate, and a true rate off by `discrepancy` either way passes with probability <= error_rate; the second is
    checked as part of the test.

    Args:
      hits: trials that came out true, 0..n.
      n: trials.
      expected: their probability by theory, in (0, 1).
      discrepancy: smallest fault in the probability the test must see.
      error_rate: chance of each of the two errors.
    """
    from scipy.stats import binom

    least = int(binom.ppf(error_rate / 2, n, expected))
    most = int(binom.isf(error_rate / 2, n, expected))
    for wrong, passes in (
        (expected - discrepancy, lambda q: binom.sf(least - 1, n, q)),
        (expected + discrepancy, lambda q: binom.cdf(most, n, q)),
    ):
        if 0 < wrong < 1:
            missed = float(passes(wrong))
            assert missed <= error_rate, f"{n} trials pass a rate of {wrong:.4g} with chance {missed:.2g}: run more"
    assert least <= hits <= most, f"{hits} of {n}, expected {least}..{most} at rate {expected:.4g}"


def assert_listed(run_dir: Path) -> set[str]:
    """Checks that every metric of a run is in METRICS, in a population it is said to be read in; returns the heads."""
    opened, heads = RunStore(run_dir), set()
    for t in range((opened.last_round() or 0) + 1):
        for m in opened.read_jsonl(t, "metrics.jsonl"):
            head = m["name"].partition("/")[0]
            assert m["population"] in METRICS[head].populations, (m["name"], m["population"])
            assert METRICS[head].stratum in ("each", m["stratum"]), (m["name"], m["stratum"])
            heads.add(head)
    return heads

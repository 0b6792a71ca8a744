"""Intervals, correction for classifier error, contrasts over seeds.

Three units of replication, never mixed: texts within a template (`wilson`, `jeffreys`), templates within a run
(`clustered_share`, `mixture_share`), seeds of an experiment (`t_over_seeds`). A claim is made over seeds; the other two
say how well one run was read.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """One number with its interval.

    Attributes:
      value: the estimate; nan is not measured, zero is a measurement.
      low: lower limit; nan where the data cannot give one.
      high: upper limit.
      n: observations behind it (texts, seeds, ...), >= 0.
      se: standard error; nan where the interval does not come from one.
      reason: why something is nan; None when nothing is.
    """

    value: float
    low: float
    high: float
    n: int
    se: float = math.nan
    reason: str | None = None


def wilson(count: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's score interval for a share count / n of independent draws.

    With z the normal quantile and p = count / n it is
    (p + z**2 / (2 n) +- z * sqrt(p (1 - p) / n + z**2 / (4 n**2))) / (1 + z**2 / n).
    Special case: 0 of n gives [0, z**2 / (n + z**2)].

    Args:
      count: successes, 0 <= count <= n; a fraction is allowed (weighted counts).
      n: draws, >= 0; a fraction is allowed (effective sample size).
      level: coverage, in (0, 1).

    Returns:
      An Interval in [0, 1]; nan with a reason when n is 0.

    Raises:
      ValueError: if count is outside [0, n] or level outside (0, 1).

    Source: Wilson (1927), JASA 22:209-212.
    """
    _check_count(count, n, level)
    if n == 0:
        return _unmeasured("no observations")
    p = count / n
    low, high = _score_limits(p, n, float(-special.ndtri((1 - level) / 2)))
    return Interval(p, low, high, round(n), _share_se(p, n))


def jeffreys(count: float, n: float, level: float = 0.95) -> Interval:
    """Equal-tailed interval of the Beta(count + 1/2, n - count + 1/2) posterior, for rare cells.

    The lower limit at 0 of n is 0 and the upper limit at n of n is 1, as Brown, Cai and DasGupta advise, so that the
    interval always holds the estimate. Shorter than Wilson's near 0 and 1.

    Args, Returns, Raises: as `wilson`.

    Source: Brown, Cai, DasGupta (2001), Statistical Science 16:101-133, section 3.1.2.
    """
    _check_count(count, n, level)
    if n == 0:
        return _unmeasured("no observations")
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(special.betaincinv(count + 0.5, n - count + 0.5, tail))
    high = 1.0 if count == n else float(special.betaincinv(count + 0.5, n - count + 0.5, 1 - tail))
    p = count / n
    return Interval(p, low, high, round(n), _share_se(p, n))


def clustered_share(
    values: ArrayLike, clusters: Sequence[Hashable], weights: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Share of texts with a property, with an interval that respects clustering by prompt template.

    The share is sum(w * v) / sum(w). Its variance sums squared cluster residuals, each divided by one minus the
    cluster's share of the weight, which is unbiased for independent texts and equals the usual factor G / (G - 1) for
    G equal clusters. The limits are Wilson's, with n replaced by the effective size p (1 - p) / variance and the
    normal quantile by Student's with G - 1 degrees of freedom. The effective size never exceeds sum(w)**2 / sum(w**2)
    and equals it at a share of 0 or 1, where no variance can be seen; so the width is never zero.

    Special case: one text per template and no weights gives Wilson's interval with n - 1 texts (and Student's t).
    A single cluster is read as the whole population of templates, and its texts as independent draws.

    Args:
      values: 0 or 1 per text, shape (n,).
      clusters: template id per text, shape (n,).
      weights: weight per text, shape (n,), > 0, any scale; None is equal.
      level: coverage, in (0, 1).

    Returns:
      An Interval in [0, 1], n = texts; nan with a reason when there are none.

    Raises:
      ValueError: if a value is not 0 or 1 (use `clustered_mean`), a weight not > 0, or lengths differ.

    Source: Bell, McCaffrey (2002), Survey Methodology 28:169-181 (leverage); Dean, Pagano (2015), Journal of Survey
    Statistics and Methodology 3:484-503 (Wilson limits with an effective size).
    """
    n = len(np.atleast_1d(np.asarray(values)))
    return _share(values, clusters, ["all"] * n, {"all": 1.0}, weights, level)


def mixture_share(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    weights: Mapping[Any, float],
    level: float = 0.95,
) -> Interval:
    """Share under a fixed mixture of strata: sum over s of weights[s] * share of stratum s.

    Variances of the strata add with the squares of their weights; a template that occurs in several strata is one
    cluster in all of them. Degrees of freedom by Satterthwaite. A stratum's variance is at least the binomial one, at
    its share pulled towards the mixture's by one observation, so that a stratum that happens to show none does not
    count as known. Limits as in `clustered_share`.

    Args:
      values: 0 or 1 per text, shape (n,).
      clusters: template id per text, shape (n,).
      strata: stratum per text, shape (n,).
      weights: stratum -> weight, >= 0, any scale; a stratum of weight 0 is left out.
      level: coverage, in (0, 1).

    Returns:
      An Interval in [0, 1], n = texts that count; nan with a reason when a stratum of positive weight has no text.

    Raises:
      ValueError: as `clustered_share`, and if a text's stratum has no weight, or no weight is positive.
    """
    return _share(values, clusters, strata, weights, None, level)


def clustered_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    weights: ArrayLike | None = None,
    level: float = 0.95,
    *,
    least_se: float = 0.0,
) -> Interval:
    """Mean of any score with the cluster variance of `clustered_share`: value +- t(G - 1) * se.

    Args:
      values: score per text, shape (n,), finite, any unit.
      clusters, weights, level: as `clustered_share`.
      least_se: standard error that the result has at least; clusters that all show the same are no proof of it.

    Returns:
      An Interval in the unit of the score; limits are nan, with a reason, for a single text.

    Raises:
      ValueError: if a score is not finite, a weight not > 0, or lengths differ.
    """
    v, codes, _, w = _rows(values, clusters, None, weights, level)
    if len(v) == 0:
        return _unmeasured("no observations")
    value = float(w @ v / w.sum())
    if len(v) == 1:
        return Interval(value, math.nan, math.nan, 1, math.nan, "one observation has no interval")
    residuals, units = _cluster_residuals(v - value, _units(codes, np.arange(len(v))), w)
    se = max(math.sqrt(float(residuals @ residuals)), least_se)
    half = float(-special.stdtrit(len(units) - 1, (1 - level) / 2)) * se
    return Interval(value, value - half, value + half, len(v), se)


def _share(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable],
    mixture: Mapping[Any, float],
    weights: ArrayLike | None,
    level: float,
) -> Interval:
    v, codes, names, w = _rows(values, clusters, strata, weights, level)
    bad = np.flatnonzero((v != 0) & (v != 1))
    if len(bad):
        raise ValueError(f"values must be 0 or 1, got {v[bad[0]]} at row {bad[0]}; use clustered_mean for scores")
    for name, share in mixture.items():
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"weights must be finite and >= 0, got {share} at stratum {name!r}")
    total = math.fsum(mixture.values())
    if total <= 0:
        raise ValueError(f"weights must hold a positive one, got {dict(mixture)}")
    for name in names:
        if name not in mixture:
            raise ValueError(f"strata must all have a weight, got none at {name!r}; give it weight 0 or drop its rows")
    # In one order of strata, so that sums round alike however a config lists them.
    used = {name: share / total for name, share in sorted(mixture.items(), key=lambda item: str(item[0])) if share > 0}
    missing = [name for name in used if name not in set(names)]
    if missing:
        return _unmeasured("no observations" if len(used) == 1 else f"no observations in stratum {missing[0]!r}")

    in_use = np.array([name in used for name in names])
    v, codes, w = v[in_use], codes[in_use], w[in_use]
    names = [name for name in names if name in used]
    rows_of = {name: np.flatnonzero([other == name for other in names]) for name in used}
    # sum(w * v), not w @ v: the two sums then round alike and a share of 1 is exactly 1.
    shares = {name: float((w[rows] * v[rows]).sum() / w[rows].sum()) for name, rows in rows_of.items()}
    agreed = set(shares.values())
    p = agreed.pop() if len(agreed) == 1 else sum(used[name] * shares[name] for name in used)
    variance, least_variance, satterthwaite, df_all = 0.0, 0.0, 0.0, 0
    kish_inverse = 0.0  # 1 / effective size of all rows, unequal weights and strata counted
    across: dict[int, float] = {}  # residual of each cluster, summed over the strata it occurs in
    for name, weight in used.items():
        rows = rows_of[name]
        n_kish = float(w[rows].sum() ** 2 / (w[rows] @ w[rows]))
        kish_inverse += weight**2 / n_kish
        residuals, units = _cluster_residuals(v[rows] - shares[name], _units(codes, rows), w[rows])
        for unit, residual in zip(units, weight * residuals, strict=True):
            across[int(unit)] = across.get(int(unit), 0.0) + float(residual)
        pulled = (n_kish * shares[name] + p) / (n_kish + 1)
        least = weight**2 * pulled * (1 - pulled) / n_kish
        own = weight**2 * float(residuals @ residuals)
        least_variance += least
        variance += max(own, least) - own
        df = max(len(units) - 1, 1)
        satterthwaite += max(own, least) ** 2 / df
        df_all += df
    variance = max(variance + sum(r * r for r in across.values()), least_variance)
    if 0 < p < 1 and variance > 0:
        n_effective, df_used = p * (1 - p) / variance, variance**2 / satterthwaite
    else:  # all texts agree: what is left is how many there are
        n_effective, df_used = 1 / kish_inverse, float(df_all)
    quantile = float(-special.stdtrit(max(df_used, 1.0), (1 - level) / 2))
    low, high = _score_limits(p, n_effective, quantile)
    return Interval(p, low, high, len(v), _share_se(p, n_effective))


def _units(codes: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cluster codes of some rows; a single cluster is the whole population of templates, so its rows are the units."""
    own = codes[rows]
    return own if len(np.unique(own)) > 1 else codes.max() + 1 + rows


def _rows(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None,
    weights: ArrayLike | None,
    level: float,
) -> tuple[Floats, NDArray[np.int64], list[Hashable], Floats]:
    """Checks rows and returns values, cluster codes, stratum names and weights, each of length n."""
    _check_level(level)
    v = np.atleast_1d(np.asarray(values, dtype=float))
    w = np.ones(len(v)) if weights is None else np.atleast_1d(np.asarray(weights, dtype=float))
    names = list(strata) if strata is not None else []
    for what, length in (("clusters", len(clusters)), ("strata", len(names) if strata is not None else len(v))):
        if length != len(v):
            raise ValueError(f"{what} must be as long as values ({len(v)}), got {length}")
    if w.shape != v.shape:
        raise ValueError(f"weights must have the shape of values {v.shape}, got {w.shape}")
    if not np.all(np.isfinite(v)):
        bad = int(np.flatnonzero(~np.isfinite(v))[0])
        raise ValueError(f"values must be finite, got {v[bad]} at row {bad}; drop what was not measured")
    if not np.all(np.isfinite(w) & (w > 0)):
        bad = int(np.flatnonzero(~(np.isfinite(w) & (w > 0)))[0])
        raise ValueError(f"weights must be finite and > 0, got {w[bad]} at row {bad}; drop rows without weight")
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], dtype=np.int64)
    return v, codes, names, w


def _cluster_residuals(centred: Floats, codes: NDArray[np.int64], w: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Returns, per cluster, the weighted residual sum over the total weight with its leverage removed, and its code.

    The squares of the first sum to the variance of the mean; for one row they are zero, since nothing can be seen.
    """
    units, position = np.unique(codes, return_inverse=True)
    if len(units) == 1:
        return np.zeros(1), units
    sums = np.bincount(position, weights=w * centred, minlength=len(units))
    leverage = np.bincount(position, weights=w, minlength=len(units)) / w.sum()
    return sums / (w.sum() * np.sqrt(1 - leverage)), units


def _share_se(p: float, n: float) -> float:
    """Binomial standard error; at 0 and 1, where it would vanish, that of half a success added (never zero)."""
    inside = p if 0 < p < 1 else (n * p + 0.5) / (n + 1)
    return math.sqrt(inside * (1 - inside) / n)


def t_over_seeds(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean over independent seeds with Student's interval: mean +- t(n - 1) * sd / sqrt(n).

    No bootstrap: at 5 seeds its percentile interval covers 85%, not 95%.

    Args:
      values: one number per seed, shape (n_seeds,), finite.
      level: coverage, in (0, 1).

    Returns:
      An Interval, n = seeds; nan with a reason for none, limits nan with a reason for one.

    Raises:
      ValueError: if a value is not finite.
    """
    _check_level(level)
    v = _finite(values, "values")
    if len(v) == 0:
        return _unmeasured("no seeds")
    if len(v) == 1:
        return Interval(float(v[0]), math.nan, math.nan, 1, math.nan, "one seed has no interval")
    se = float(v.std(ddof=1)) / math.sqrt(len(v))
    half = float(-special.stdtrit(len(v) - 1, (1 - level) / 2)) * se
    return Interval(float(v.mean()), float(v.mean()) - half, float(v.mean()) + half, len(v), se)


def p_over_seeds(values: ArrayLike, null: float = 0.0) -> float:
    """Two-sided Student p-value that the mean over seeds is `null`; for a contrast pass the differences a - b.

    Returns nan below two seeds, and where all seeds agree exactly, for then there is no noise to compare with.
    """
    v = _finite(values, "values")
    if len(v) < 2 or v.min() == v.max():
        return math.nan
    t = (v.mean() - null) / (v.std(ddof=1) / math.sqrt(len(v)))
    return float(2 * special.stdtr(len(v) - 1, -abs(t)))


def equivalence_over_seeds(values: ArrayLike, bound: float) -> float:
    """p-value of two one-sided tests: small means that the mean over seeds lies within +-bound.

    The larger of the p-values against mean <= -bound and against mean >= bound. A difference that is merely "not
    significant" is no evidence of absence; this is.

    Args:
      values: one number per seed, shape (n_seeds,), finite.
      bound: largest mean that would still be called none, > 0.

    Returns:
      p-value in [0, 1]; nan as `p_over_seeds`.

    Source: Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15:657-680.
    """
    if not bound > 0:
        raise ValueError(f"bound must be > 0, got {bound}")
    v = _finite(values, "values")
    if len(v) < 2 or v.min() == v.max():
        return math.nan
    se = v.std(ddof=1) / math.sqrt(len(v))
    nearest = (bound - abs(v.mean())) / se  # the worse of the two sides
    return float(special.stdtr(len(v) - 1, -nearest))


def holm(p_values: ArrayLike) -> Floats:
    """Holm's adjusted p-values: reject those <= alpha and at most alpha of families holds a false rejection.

    With p sorted upwards the i-th (from 0) becomes max over j <= i of min(1, (m - j) * p[j]).

    Args:
      p_values: shape (m,), in [0, 1]; nan was not tested, stays nan and does not count in m.

    Returns:
      Adjusted p-values, shape (m,), in the order given.

    Source: Holm (1979), Scandinavian Journal of Statistics 6:65-70.
    """
    p = np.atleast_1d(np.asarray(p_values, dtype=float))
    tested = np.flatnonzero(~np.isnan(p))
    outside = tested[(p[tested] < 0) | (p[tested] > 1)]
    if len(outside):
        raise ValueError(f"p_values must be in [0, 1], got {p[outside[0]]} at index {outside[0]}")
    adjusted = np.full(p.shape, np.nan)
    order = tested[np.argsort(p[tested], kind="stable")]
    scaled = np.minimum(p[order] * np.arange(len(order), 0, -1), 1.0)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def remeasurement_noise_floor(se_a: float, se_b: float) -> float:
    """Mean |difference| of two measurements of the same thing: sqrt(se_a**2 + se_b**2) * sqrt(2 / pi).

    The difference of two unbiased normal measurements is normal, and sqrt(2 / pi) is the mean of its absolute value in
    standard deviations. Printed beside every |change|: a change no larger than this is what measuring twice gives.
    """
    return math.hypot(se_a, se_b) * math.sqrt(2 / math.pi)


def rogan_gladen(
    count: float,
    n: float,
    true_positives: float,
    n_positive: float,
    true_negatives: float,
    n_negative: float,
    level: float = 0.95,
) -> Interval:
    """Share of one persona from a two-way classifier with measured error, (p + q0 - 1) / (q0 + q1 - 1).

    p is the share called positive, q1 the sensitivity, q0 the specificity. Special case: p = .12, q0 = .95, q1 = .8
    give .07 / .75 = .0933. The interval carries the noise of the texts and of both calibration sets: p is smoothed by
    z**2 / 2, the rates by one success and one failure, and the centre moves with them. Limits are cut to [0, 1].
    Holds only while the error rates are those of the calibration texts; a model trained on itself changes its style,
    and then `post_stratified_audit` is the one to trust.

    Args:
      count, n: texts called positive, and texts.
      true_positives, n_positive: calibration texts of the persona called positive, and all of them, > 0.
      true_negatives, n_negative: calibration texts of others called negative, and all of them, > 0.
      level: coverage, in (0, 1).

    Returns:
      An Interval in [0, 1]; nan with a reason for n = 0 or a classifier no better than chance (q0 + q1 <= 1).

    Source: Rogan, Gladen (1978), American Journal of Epidemiology 107:71-76; interval as Lee et al. (2025),
    arXiv:2511.21140.
    """
    _check_count(count, n, level)
    for what, hits, m in (("positive", true_positives, n_positive), ("negative", true_negatives, n_negative)):
        if not 0 <= hits <= m or m == 0:
            raise ValueError(f"true_{what}s must be in [0, n_{what}] with n_{what} > 0, got {hits} of {m}")
    if n == 0:
        return _unmeasured("no observations")
    q1, q0 = true_positives / n_positive, true_negatives / n_negative
    smooth1, smooth0 = (true_positives + 1) / (n_positive + 2), (true_negatives + 1) / (n_negative + 2)
    if q1 + q0 <= 1 or smooth1 + smooth0 <= 1:
        return _unmeasured("the classifier is no better than chance", round(n))
    value = min(max((count / n + q0 - 1) / (q0 + q1 - 1), 0.0), 1.0)
    z = float(-special.ndtri((1 - level) / 2))
    p = (count + z * z / 2) / (n + z * z)
    centre = min(max((p + smooth0 - 1) / (smooth0 + smooth1 - 1), 0.0), 1.0)
    noise0, noise1 = smooth0 * (1 - smooth0) / (n_negative + 2), smooth1 * (1 - smooth1) / (n_positive + 2)
    se = math.sqrt(p * (1 - p) / (n + z * z) + (1 - centre) ** 2 * noise0 + centre**2 * noise1) / (
        smooth0 + smooth1 - 1
    )
    moved = centre + 2 * z * z * (centre * noise1 - (1 - centre) * noise0)
    low, high = min(max(moved - z * se, 0.0), 1.0), min(max(moved + z * se, 0.0), 1.0)
    return Interval(value, min(low, value), max(high, value), round(n), se)


def confusion_corrected(
    counts: ArrayLike, confusion: ArrayLike, *, rng: np.random.Generator, n_draws: int = 1000, level: float = 0.95
) -> list[Interval]:
    """Shares of K personas from predicted labels and a measured confusion matrix.

    Solves q = p M for p on the simplex by least squares, residuals weighted by 1 / q, where q are the predicted shares
    and M[k, l] the chance that persona k is labelled l. Special case: as many labels as personas and an interior
    solution give p = q M^-1 exactly. The interval repeats this on draws q ~ Dirichlet(counts + 1/2) and
    M[k] ~ Dirichlet(confusion[k] + 1 / n_labels), so that it carries the noise of the texts and of the calibration;
    draws may leave the simplex, their quantiles are cut to [0, 1]. Half a text per label (Jeffreys) and not less:
    with 60 texts and 12 labels most labels are rare, and 1/12 would cover a share under 2% in 81 of 100 rounds.
    Holds only while M is that of the calibration texts; see `rogan_gladen`.

    Args:
      counts: texts per predicted label, shape (n_labels,), n_labels >= K; the last may be "unknown". For clustered
        texts scale them to their effective number.
      confusion: calibration texts, rows true personas and columns predicted labels, shape (K, n_labels).
      rng: draws of the interval.
      n_draws: their number.
      level: coverage, in (0, 1).

    Returns:
      K Intervals in [0, 1], n = texts, values sum to 1; nan with a reason where no text was counted, where all of them
      are unknown (n_labels > K and the last label has every text: what they are is then the calibration texts' word
      alone), for a single persona (its share is 1 whatever was read), or where the matrix cannot tell the personas
      apart.

    Raises:
      ValueError: if shapes disagree, a count is negative, or a persona has no calibration text.

    Source: adjusted classify-and-count, Forman (2008), Data Mining and Knowledge Discovery 17:164-206; weighting by
    the inverse of q is Neyman's minimum chi-square.
    """
    _check_level(level)
    c = _counts(counts, "counts")
    m = _counts(confusion, "confusion")
    if m.ndim != 2 or m.shape[1] != len(c) or m.shape[0] > len(c):
        raise ValueError(f"confusion must have shape (n_personas, {len(c)}) with no more rows, got {m.shape}")
    bare = np.flatnonzero(m.sum(axis=1) == 0)
    if len(bare):
        raise ValueError(f"confusion must hold texts of every persona, got none in row {bare[0]}; leave that one out")
    n, n_personas = float(c.sum()), m.shape[0]
    if n == 0:
        return [_unmeasured("no observations")] * n_personas
    if n_personas == 1:
        return [_unmeasured(_ONE_PERSONA, round(n))]
    if len(c) > n_personas and c[-1] == n:
        return [_unmeasured("the instrument abstained on every text", round(n))] * n_personas
    rates = m / m.sum(axis=1, keepdims=True)
    if np.linalg.matrix_rank(rates, tol=1e-6) < n_personas:
        return [_unmeasured("the confusion matrix cannot tell the personas apart", round(n))] * n_personas
    prior = 1 / len(c)
    value = _on_simplex(c / n, rates, (c + prior) / (n + 1))
    q = dirichlet(np.broadcast_to(c + 0.5, (n_draws, len(c))), rng)
    drawn = dirichlet(np.broadcast_to(m + prior, (n_draws, *m.shape)), rng)
    return _from_draws(value, unmix(q, drawn, (c + prior) / (n + 1)), round(n), level)


_ONE_PERSONA = "one persona: its share is 1 whatever was read"


def _on_simplex(q: Floats, rates: Floats, scale: Floats) -> Floats:
    """Shares p >= 0, sum(p) = 1, that minimise sum((q - p @ rates)**2 / scale)."""
    from scipy.optimize import nnls

    root = 1 / np.sqrt(scale)
    # The sum is a row of its own, heavy enough to bind to 1e-6 and light enough to keep the system well conditioned.
    heavy = 1e3 * root.max()
    solution, _ = nnls(np.vstack([rates.T * root[:, None], np.full(len(rates), heavy)]), np.append(q * root, heavy))
    return np.asarray(solution / solution.sum(), dtype=float)


def unmix(q: Floats, rates: Floats, scale: Floats) -> Floats:
    """Shares p, sum(p) = 1 but of any sign, that minimise sum((q - p @ rates)**2 / scale), draw by draw.

    Args:
      q: shares of predicted labels, shape (n_draws, n_labels).
      rates: chance that persona k is labelled l, shape (n_draws, K, n_labels).
      scale: shape (n_labels,), > 0.

    Returns:
      shape (n_draws, K).

    Draws folded back onto the simplex would pile up at its edge, and their quantiles cover too little.
    """
    n_draws, size, _ = rates.shape
    system = np.zeros((n_draws, size + 1, size + 1))  # normal equations with a multiplier for the sum
    system[:, :size, :size] = np.einsum("dkl,djl,l->dkj", rates, rates, 1 / scale)
    system[:, :size, size] = system[:, size, :size] = 1
    right = np.ones((n_draws, size + 1, 1))
    right[:, :size, 0] = np.einsum("dkl,dl,l->dk", rates, q, 1 / scale)
    return np.asarray(np.linalg.solve(system, right)[:, :size, 0], dtype=float)


def audit_allocation(counts: ArrayLike, n_audit: int, minimum: int = 8) -> NDArray[np.int64]:
    """How many texts to audit of each predicted label: in proportion to sqrt(count), at least `minimum`.

    The square root spends more on rare labels than their share; the minimum keeps every label's error measured. A
    label with fewer texts than that is audited whole.

    Args:
      counts: texts per predicted label, shape (n_labels,), integers >= 0.
      n_audit: texts to audit in all; more are taken where the minimum asks for more.
      minimum: least number per label, >= 1.

    Returns:
      Texts to audit per label, int64, shape (n_labels,), <= counts; the inclusion probability is this / counts.
    """
    c = _counts(counts, "counts").astype(np.int64)
    chosen = np.minimum(c, minimum)
    root = np.sqrt(c)
    while chosen.sum() < min(n_audit, c.sum()):  # one text at a time to the label furthest below its due
        chosen[int(np.argmax(np.where(chosen < c, root / (chosen + 1), -1.0)))] += 1
    return chosen


_AUDIT_PRIOR = 0.4  # prior texts per predicted label; .3 to .5 cover 94-96% in `coverage_study`, 1 covers 89% if rare


def post_stratified_audit(
    counts: ArrayLike,
    audited_label: ArrayLike,
    audited_persona: ArrayLike,
    *,
    n_personas: int,
    rng: np.random.Generator,
    inclusion: ArrayLike | None = None,
    design_effect: float = 1.0,
    n_draws: int = 2000,
    level: float = 0.95,
) -> list[Interval]:
    """Shares of K personas from predicted labels of all texts and the truth for an audited few.

    p[k] = sum over labels l of q[l] * theta[l, k], with q the predicted shares and theta[l, k] the audited share of
    persona k among texts labelled l. Nothing is assumed about the classifier, so it holds when its errors change.
    Interval from the posterior q ~ Dirichlet(counts), theta[l] ~ Dirichlet(audited[l] * (n_l - 1) / n_l + 0.4 / K):
    n_l - 1 because n_l texts have to give the share of the label and its spread, 0.4 because less leaves rare personas
    without width and more pulls every share towards 1 / K. Value is the posterior mean, which gives a persona the audit
    never saw some share: shares below 5% come out too high by .006 on average with 60 audited texts and 4 personas. The
    prior is tuned to 4 personas, where 94-96% of the intervals hold the truth; with 11 they are a little wide (96-97%).

    Args:
      counts: texts per predicted label, shape (n_labels,), the audited ones included.
      audited_label: index of the predicted label per audited text, shape (n_audit,), in 0..n_labels - 1.
      audited_persona: index of the true persona per audited text, shape (n_audit,), in 0..n_personas - 1.
      n_personas: K.
      rng: draws of the posterior.
      inclusion: probability with which each audited text was chosen, shape (n_audit,), in (0, 1]; only ratios within
        a predicted label matter. None is equal within each label.
      design_effect: variance of the estimate over that from independent texts, >= 1, see `audit_design_effect`; texts
        and audited texts count for so many times fewer.
      n_draws: posterior draws.
      level: coverage, in (0, 1).

    Returns:
      K Intervals in [0, 1], n = audited texts; nan with a reason where nothing was counted or audited, where a
      predicted label has no audited text, and for a single persona.

    Raises:
      ValueError: if an index or inclusion probability is out of range, or lengths differ.
    """
    _check_level(level)
    c = _counts(counts, "counts")
    label = _index(audited_label, "audited_label", len(c))
    persona = _index(audited_persona, "audited_persona", n_personas)
    chance = np.ones(len(label)) if inclusion is None else np.atleast_1d(np.asarray(inclusion, dtype=float))
    if not len(label) == len(persona) == len(chance):
        raise ValueError(
            f"audited_label, audited_persona and inclusion must be equally long, got {len(label)}, {len(persona)}, "
            f"{len(chance)}"
        )
    if not np.all((chance > 0) & (chance <= 1)):
        bad = int(np.flatnonzero(~((chance > 0) & (chance <= 1)))[0])
        raise ValueError(f"inclusion must be in (0, 1], got {chance[bad]} at audited text {bad}")
    if not design_effect >= 1:
        raise ValueError(f"design_effect must be >= 1, got {design_effect}")
    if c.sum() == 0:
        return [_unmeasured("no observations")] * n_personas
    if n_personas == 1:
        return [_unmeasured(_ONE_PERSONA, len(label))]
    used = np.flatnonzero(c > 0)
    for at in used:
        if not np.any(label == at):
            reason = "no audited text" if len(label) == 0 else f"no audited text with predicted label {at}"
            return [_unmeasured(reason, len(label))] * n_personas
    audited = np.zeros((len(c), n_personas))
    for at in used:
        rows = label == at
        weight = 1 / chance[rows]
        n_kish = weight.sum() ** 2 / (weight @ weight) / design_effect
        shares = np.bincount(persona[rows], weights=weight, minlength=n_personas) / weight.sum()
        audited[at] = shares * max(n_kish - 1, n_kish / 2)
    posterior = audited[used] + _AUDIT_PRIOR / n_personas
    value = c[used] / c.sum() @ (posterior / posterior.sum(axis=1, keepdims=True))
    q = dirichlet(np.broadcast_to(c[used] / design_effect, (n_draws, len(used))), rng)
    theta = dirichlet(np.broadcast_to(posterior, (n_draws, *posterior.shape)), rng)
    return _from_draws(value, np.einsum("dl,dlk->dk", q, theta), len(label), level)


def effective_texts(shares: Sequence[Interval], n: float) -> float:
    """Independent texts whose shares would vary as much as these do: sum p (1 - p) / sum se**2 over labels, at most n.

    Args:
      shares: of every label, each finite.
      n: texts there are, returned where nothing varies.
    """
    p, variance = np.array([i.value for i in shares]), math.fsum(i.se**2 for i in shares)
    return min(n, float((p * (1 - p)).sum()) / variance) if variance > 0 else n


def audit_design_effect(
    label: ArrayLike,
    clusters: Sequence[Hashable],
    audited: ArrayLike,
    audited_persona: ArrayLike,
    *,
    n_labels: int,
    n_personas: int,
    weights: ArrayLike | None = None,
    strata: Sequence[Hashable] | None = None,
) -> float:
    """How many times fewer the texts of an audit count because those of a prompt template resemble each other.

    The audited share of persona k moves with text i by

        z[i, k] = w[i] * (theta[l, k] - p[k]) + [audited] * w[i] / chance[l] * (truth[i, k] - theta[l, k])

    with l its predicted label, theta and p as in `post_stratified_audit`. Over all personas the squares of the sums of
    z by cluster (each less its part of the sum of its stratum, whose size is fixed) are the variance with clusters, the
    squares of z itself that of independent texts; the ratio is the design effect, at least 1. Both are freed of the
    leverage of what they fit. G clusters in S strata show their own variance no better than G - S degrees of freedom
    allow: the ratio is multiplied by the square of Student's 97.5% quantile over the normal one. Special case: of G
    templates of m texts each, read rightly, that say one thing each, the ratio is m * G / (G - 1).

    Args:
      label: predicted label of every text, shape (n,), in 0..n_labels - 1.
      clusters: prompt template of every text, shape (n,).
      audited: index of each audited text, shape (n_audit,), in 0..n - 1, chosen at random within its label.
      audited_persona: the true persona of each, shape (n_audit,).
      n_labels, n_personas: numbers of labels and personas.
      weights: share of every text in the population, shape (n,), > 0, any scale; None is equal.
      strata: of every text, where their shares of the population are fixed; None: there is one.

    Returns:
      >= 1; 1 where nothing was audited or all texts are one cluster, which shows no scatter.

    Source: Kish (1965), Survey Sampling, section 5.4; linearisation as Woodruff (1971), JASA 66:411-414.
    """
    said = _index(label, "label", n_labels)
    rows = _index(audited, "audited", len(said))
    truth = np.eye(n_personas)[_index(audited_persona, "audited_persona", n_personas)]  # (n_audit, n_personas)
    w = np.ones(len(said)) if weights is None else np.asarray(weights, dtype=float)
    w = w / w.sum()
    of_label = np.bincount(said[rows], weights=w[rows], minlength=n_labels)
    if len(rows) == 0 or len(set(clusters)) < 2:
        return 1.0
    leverage = w[rows] / of_label[said[rows]]  # of each audited text in its label
    theta = np.zeros((n_labels, n_personas))
    np.add.at(theta, said[rows], leverage[:, None] * truth)
    q = np.bincount(said, weights=w, minlength=n_labels)
    z = w[:, None] * (theta[said] - q @ theta)
    own = (q[said[rows]] * leverage)[:, None] * (truth - theta[said[rows]])
    alone = z.copy()
    # A label of one audited text fits it exactly; half its leverage is left in, as elsewhere half a text.
    alone[rows] += own / np.sqrt(np.maximum(1 - leverage, 0.5))[:, None]
    z[rows] += own
    independent = float((alone**2).sum())
    if independent == 0:
        return 1.0
    stratum = np.unique(["all"] * len(said) if strata is None else list(map(str, strata)), return_inverse=True)[1]
    clustered, freedom = 0.0, 0
    for name in range(stratum.max() + 1):
        at = np.flatnonzero(stratum == name)
        # One cluster in a stratum is the whole population of its templates, and its texts are the units.
        mine = [clusters[i] for i in at.tolist()]
        number = {c: k for k, c in enumerate(dict.fromkeys(mine))}
        unit = np.array([number[c] for c in mine]) if len(number) > 1 else np.arange(len(at))
        share = np.bincount(unit, weights=w[at]) / w[at].sum()
        sums = np.zeros((len(share), n_personas))
        np.add.at(sums, unit, z[at])
        centred = (sums - share[:, None] * z[at].sum(axis=0))[share < 1]
        clustered += float((centred**2 / (1 - share[share < 1])[:, None]).sum())
        freedom += len(share) - 1
    student = float(special.stdtrit(max(freedom, 1), 0.975) / special.ndtri(0.975))
    return max(1.0, student**2 * clustered / independent)


def ppi_plus_plus(
    audited_truth: ArrayLike, audited_prediction: ArrayLike, other_prediction: ArrayLike, level: float = 0.95
) -> Interval:
    """Prediction-powered mean: power * mean(other predictions) + mean(truth - power * prediction) over the audited.

    `power` in [0, 1] minimises the variance; 0 leaves the audited texts alone, 1 trusts the classifier's pattern. A
    cross-check on `post_stratified_audit` for texts audited at random; its normal interval covers too little for rare
    personas (65% below a share of 5% with 60 audited), and has no width where neither audit nor classifier sees any.

    Args:
      audited_truth: 0 or 1 (or a score) per audited text, shape (n,).
      audited_prediction: the classifier's word on the same texts, shape (n,).
      other_prediction: its word on the texts not audited, shape (n_other,).
      level: coverage, in (0, 1).

    Returns:
      An Interval, not cut to [0, 1], n = audited texts; nan with a reason below two audited or other texts.

    Raises:
      ValueError: if lengths differ or a number is not finite.

    Source: Angelopoulos, Duchi, Zrnic (2023), arXiv:2311.01453, section 6.
    """
    _check_level(level)
    y, f = _finite(audited_truth, "audited_truth"), _finite(audited_prediction, "audited_prediction")
    g = _finite(other_prediction, "other_prediction")
    if len(y) != len(f):
        raise ValueError(f"audited_prediction must be as long as audited_truth ({len(y)}), got {len(f)}")
    if len(y) < 2 or len(g) < 2:
        return _unmeasured("fewer than two texts audited, or not audited", len(y))
    spread = float(np.concatenate([f, g]).var(ddof=1))
    covariance = float(((y - y.mean()) * (f - f.mean())).mean())
    power = 0.0 if spread == 0 else min(max(covariance / ((1 + len(y) / len(g)) * spread), 0.0), 1.0)
    value = float(power * g.mean() + (y - power * f).mean())
    se = math.sqrt(power**2 * float(g.var()) / len(g) + float((y - power * f).var()) / len(y))
    half = float(-special.ndtri((1 - level) / 2)) * se
    return Interval(value, value - half, value + half, len(y), se)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How one estimator of shares did in one cell of `coverage_study`.

    Attributes:
      condition: one of CONDITIONS.
      estimator: `counted`, `confusion_corrected`, `audited` or `ppi`.
      band: true shares the cell is about: `all`, `< 0.05`, `0.05 - 0.2` or `>= 0.2`.
      coverage: share of intervals that hold the truth.
      bias, rmse, width: mean error, root mean square error and mean width, in shares.
      n: intervals.
    """

    condition: str
    estimator: str
    band: str
    coverage: float
    bias: float
    rmse: float
    width: float
    n: int


CONDITIONS = ("label_shift", "confusion_drift", "eleven_personas", "templates")


def coverage_study(
    n_truths: int,
    *,
    rng: np.random.Generator,
    n_personas: int = 4,
    n_outputs: int = 500,
    n_audit: int = 60,
    n_calibration: int = 400,
    sensitivity: float = 0.78,
    drift: float = 0.35,
    n_templates: int = 32,
    correlation: float = 0.2,
    n_draws: int = 400,
    conditions: Sequence[str] = CONDITIONS,
) -> list[Coverage]:
    """Coverage of the 95% intervals on simulated rounds whose true shares are known.

    Each truth is a softmax of normal draws of standard deviation 1.5, so that rare and common personas both occur, read
    by a fresh classifier of the given sensitivity that abstains on 5% and spreads the rest at random. It is calibrated
    on equally many texts per persona. Under `label_shift` only the shares differ from those; under `confusion_drift` a
    part `drift` of the outputs is read as if by another classifier, of sensitivity 0.2 that abstains on 20%, as when
    training on itself has changed the model's style. `eleven_personas` is `label_shift` with as many personas as the
    instruments know; `templates` is `label_shift` where the outputs of a prompt template resemble each other.

    Args:
      n_truths: simulated rounds per condition, >= 1; each gives `n_personas` intervals per estimator.
      rng: all draws.
      n_personas, n_outputs, n_audit, n_calibration: sizes of one round.
      sensitivity: chance that a calibration text gets its own label, in (0, 0.95).
      drift: part of outputs with other errors under confusion drift, in [0, 1].
      n_templates, correlation: prompt templates under `templates`, equally many outputs each, and the correlation of
        two outputs of one of them, in (0, 1).
      n_draws: draws behind each interval.
      conditions: which of CONDITIONS.

    Returns:
      A row per condition, estimator and band with at least one interval.
    """
    rows = []
    for condition in conditions:
        truths, results = [], []
        size = 11 if condition == "eleven_personas" else n_personas
        for _ in range(n_truths):
            odds = np.exp(rng.normal(0, 1.5, size))
            truth = odds / odds.sum()
            calibrated = _random_confusion(size, sensitivity, 0.05, rng)
            applied = calibrated
            if condition == "confusion_drift":
                applied = (1 - drift) * calibrated + drift * _random_confusion(size, 0.2, 0.2, rng)
            clusters = np.arange(n_outputs)
            if condition == "templates":
                clusters = clusters % n_templates
                persona = np.empty(n_outputs, dtype=np.int64)
                for at, emitted in enumerate(rng.dirichlet(truth * (1 / correlation - 1), n_templates)):
                    persona[at::n_templates] = rng.choice(size, size=len(persona[at::n_templates]), p=emitted)
            else:
                persona = rng.choice(size, size=n_outputs, p=truth)
            truths.append(truth)
            results.append(_study_round(persona, clusters, calibrated, applied, n_audit, n_calibration, n_draws, rng))
        true = np.array(truths)
        bands = {
            "all": true >= 0,
            "< 0.05": true < 0.05,
            "0.05 - 0.2": (true >= 0.05) & (true < 0.2),
            ">= 0.2": true >= 0.2,
        }
        for estimator in results[0]:
            got = np.array([[(i.value, i.low, i.high) for i in result[estimator]] for result in results])
            value, low, high = np.moveaxis(got, -1, 0)
            for band, mask in bands.items():
                if not mask.any():
                    continue
                error = (value - true)[mask]
                held = ((low <= true) & (true <= high))[mask]
                rows.append(
                    Coverage(
                        condition,
                        estimator,
                        band,
                        float(held.mean()),
                        float(error.mean()),
                        float(np.sqrt((error**2).mean())),
                        float((high - low)[mask].mean()),
                        int(mask.sum()),
                    )
                )
    return rows


def _random_confusion(n_personas: int, sensitivity: float, unknown: float, rng: np.random.Generator) -> Floats:
    """A classifier's P(label | persona), shape (n_personas, n_personas + 1); the last label is "unknown"."""
    matrix = np.zeros((n_personas, n_personas + 1))
    for k in range(n_personas):
        others = [j for j in range(n_personas) if j != k]
        matrix[k, others] = rng.dirichlet(np.ones(n_personas - 1)) * (1 - sensitivity - unknown)
        matrix[k, k], matrix[k, n_personas] = sensitivity, unknown
    return matrix


def _study_round(
    persona: NDArray[np.int64],
    clusters: NDArray[np.int64],
    calibrated: Floats,
    applied: Floats,
    n_audit: int,
    n_calibration: int,
    n_draws: int,
    rng: np.random.Generator,
) -> dict[str, list[Interval]]:
    n_personas, n_labels = calibrated.shape
    n_outputs = len(persona)
    label = np.minimum((applied.cumsum(axis=1)[persona] < rng.random(n_outputs)[:, None]).sum(axis=1), n_labels - 1)
    counts = np.bincount(label, minlength=n_labels)
    chosen = audit_allocation(counts, n_audit)
    audited = np.concatenate([rng.permutation(np.flatnonzero(label == at))[: chosen[at]] for at in range(n_labels)])
    at_random = rng.permutation(n_outputs)  # PPI++ is for texts audited at random, so it gets its own audit
    some, rest = at_random[:n_audit], at_random[n_audit:]
    confusion = np.array([rng.multinomial(n_calibration // n_personas, row) for row in calibrated])
    names, n_effective, effect = clusters.tolist(), float(n_outputs), 1.0
    counted = [wilson(counts[k], n_outputs) for k in range(n_labels)]
    if len(set(names)) < n_outputs:
        counted = [clustered_share(label == k, names) for k in range(n_labels)]
        n_effective = effective_texts(counted, n_outputs)
        effect = audit_design_effect(label, names, audited, persona[audited], n_labels=n_labels, n_personas=n_personas)
    return {
        "counted": counted[:n_personas],
        "confusion_corrected": confusion_corrected(
            counts * n_effective / n_outputs, confusion, rng=rng, n_draws=n_draws
        ),
        "audited": post_stratified_audit(
            counts,
            label[audited],
            persona[audited],
            n_personas=n_personas,
            rng=rng,
            design_effect=effect,
            n_draws=max(n_draws, 1000),
        ),
        "ppi": [ppi_plus_plus(persona[some] == k, label[some] == k, label[rest] == k) for k in range(n_personas)],
    }


def _from_draws(value: Floats, draws: Floats, n: int, level: float) -> list[Interval]:
    low, high = np.clip(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0), 0, 1)
    se = draws.std(axis=0)
    return [
        Interval(float(v), float(min(a, v)), float(max(b, v)), n, float(s))
        for v, a, b, s in zip(value, low, high, se, strict=True)
    ]


def dirichlet(concentration: Floats, rng: np.random.Generator) -> Floats:
    """Dirichlet draws along the last axis; an entry of zero concentration gets exactly zero."""
    gamma = rng.standard_gamma(concentration)
    return np.asarray(gamma / gamma.sum(axis=-1, keepdims=True), dtype=float)


def _finite(values: ArrayLike, name: str) -> Floats:
    v = np.atleast_1d(np.asarray(values, dtype=float))
    if v.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {v.shape}")
    if not np.all(np.isfinite(v)):
        bad = int(np.flatnonzero(~np.isfinite(v))[0])
        raise ValueError(f"{name} must be finite, got {v[bad]} at index {bad}; drop what was not measured")
    return v


def _counts(counts: ArrayLike, name: str) -> Floats:
    c = np.atleast_1d(np.asarray(counts, dtype=float))
    bad = np.argwhere(~(np.isfinite(c) & (c >= 0)))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        raise ValueError(f"{name} must be finite and >= 0, got {c[at]} at index {at}")
    return c


def _index(values: ArrayLike, name: str, size: int) -> NDArray[np.int64]:
    index = np.atleast_1d(np.asarray(values, dtype=np.int64))
    bad = np.flatnonzero((index < 0) | (index >= size))
    if len(bad):
        raise ValueError(f"{name} must be in 0..{size - 1}, got {index[bad[0]]} at audited text {bad[0]}")
    return index


def _score_limits(p: float, n: float, z: float) -> tuple[float, float]:
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if p <= 0 else max((centre - half) / scale, 0.0)  # exact ends, not 1e-17
    high = 1.0 if p >= 1 else min((centre + half) / scale, 1.0)
    return low, high


def _unmeasured(reason: str, n: int = 0) -> Interval:
    return Interval(math.nan, math.nan, math.nan, n, math.nan, reason)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")


def _check_count(count: float, n: float, level: float) -> None:
    _check_level(level)
    if not (math.isfinite(n) and n >= 0):
        raise ValueError(f"n must be finite and >= 0, got {n}")
    if not 0 <= count <= n:
        raise ValueError(f"count must be in [0, n] = [0, {n}], got {count}")

"""Intervals cover, corrections invert known error, and what was not measured is nan."""

from __future__ import annotations

import math

import numpy as np
import pytest
from checks import assert_mean, assert_rate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from loop import stats

# ---------------------------------------------------------------- the checks themselves


def test_assert_mean_rejects_a_mean_that_is_off_and_refuses_too_few_draws():
    rng = np.random.default_rng(0)
    assert_mean(rng.random(100_000), 0.5, low=0, high=1, discrepancy=0.02)
    with pytest.raises(AssertionError, match=r"expected 0\.48"):
        assert_mean(rng.random(100_000), 0.48, low=0, high=1, discrepancy=0.02)
    with pytest.raises(AssertionError, match="draw more"):
        assert_mean(rng.random(100), 0.5, low=0, high=1, discrepancy=0.02)
    with pytest.raises(AssertionError, match="draws must be <= 1"):
        assert_mean([0.5, 1.5], 0.5, low=0, high=1, discrepancy=10)


def test_assert_rate_rejects_a_rate_that_is_off_and_refuses_too_few_trials():
    assert_rate(500, 10_000, 0.05, discrepancy=0.025)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(700, 10_000, 0.05, discrepancy=0.025)
    with pytest.raises(AssertionError, match="run more"):
        assert_rate(5, 100, 0.05, discrepancy=0.025)


# ---------------------------------------------------------------- one cell


def test_wilson_is_the_score_test_turned_round():
    # Theory: p is inside iff |x / n - p| <= z sqrt(p (1 - p) / n), so both limits solve that with equality.
    got = stats.wilson(7, 50)
    z = 1.959963984540054
    for limit in (got.low, got.high):
        assert abs(7 / 50 - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / 50), rel=1e-9)


def test_wilson_of_nothing_seen_ends_at_its_closed_form_and_is_exact_at_the_edge():
    z2 = 1.959963984540054**2
    got = stats.wilson(0, 30)
    assert (got.value, got.low) == (0.0, 0.0)
    assert got.high == pytest.approx(z2 / (30 + z2))
    assert stats.wilson(30, 30).low == pytest.approx(1 - got.high)
    assert stats.wilson(30, 30).high == 1.0


def test_jeffreys_limits_are_beta_quantiles_and_reach_the_edges():
    got = stats.jeffreys(3, 40, level=0.9)
    # An independent route to the Beta quantile: its distribution function at the limits.
    assert distributions.beta.cdf(got.low, 3.5, 37.5) == pytest.approx(0.05)
    assert distributions.beta.cdf(got.high, 3.5, 37.5) == pytest.approx(0.95)
    assert stats.jeffreys(0, 40).low == 0.0
    assert stats.jeffreys(40, 40).high == 1.0


@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_cell_intervals_hold_their_estimate_and_mirror(count, n, level):
    count = min(count, n)
    for make in (stats.wilson, stats.jeffreys):
        got, mirror = make(count, n, level), make(n - count, n, level)
        assert 0 <= got.low <= got.value <= got.high <= 1
        assert got.high > got.low
        assert got.se > 0
        assert mirror.low == pytest.approx(1 - got.high, abs=1e-12)


def test_intervals_of_nothing_are_nan_with_a_reason_and_never_zero():
    empty = [
        stats.wilson(0, 0),
        stats.jeffreys(0, 0),
        stats.clustered_share([], []),
        stats.clustered_mean([], []),
        stats.mixture_share([], [], [], {"blank": 1.0}),
        stats.t_over_seeds([]),
        stats.rogan_gladen(0, 0, 8, 10, 9, 10),
        stats.ppi_plus_plus([], [], [1, 0, 1]),
        *stats.confusion_corrected([0, 0], [[8, 2], [1, 9]], rng=np.random.default_rng(0)),
        *stats.post_stratified_audit([0, 0], [], [], n_personas=2, rng=np.random.default_rng(0)),
        *stats.post_stratified_audit([5, 5], [0], [0], n_personas=2, rng=np.random.default_rng(0)),
        # A single persona: 1 +- 0 would be a claim that nothing was measured for.
        *stats.confusion_corrected([5], [[9]], rng=np.random.default_rng(0)),
        *stats.confusion_corrected([5, 5], [[6, 4]], rng=np.random.default_rng(0)),
        *stats.post_stratified_audit([5], [0, 0], [0, 0], n_personas=1, rng=np.random.default_rng(0)),
        # Every text abstained on: an answer would be the calibration texts' alone.
        *stats.confusion_corrected([0, 0, 50], [[80, 10, 10], [10, 60, 30]], rng=np.random.default_rng(0)),
    ]
    for got in empty:
        assert math.isnan(got.value)
        assert math.isnan(got.low)
        assert math.isnan(got.high)
        assert got.reason


def test_one_observation_or_one_seed_has_a_value_but_no_limits():
    for got in (stats.clustered_mean([3.0], ["a"]), stats.t_over_seeds([3.0])):
        assert got.value == 3.0
        assert math.isnan(got.low)
        assert got.reason


# ---------------------------------------------------------------- clusters


def test_clustered_mean_equals_the_mean_of_equal_clusters_with_student_t():
    # Equal clusters: the estimate is the mean of cluster means, its interval Student's on those 4 numbers.
    means = np.array([1.0, 2.0, 4.0, 9.0])
    values = np.repeat(means, 3) + np.tile([-0.5, 0.0, 0.5], 4)
    got = stats.clustered_mean(values, np.repeat(list("abcd"), 3))
    expected = distributions.t.interval(0.95, 3, loc=4.0, scale=means.std(ddof=1) / 2)
    assert (got.value, got.low, got.high) == pytest.approx((4.0, *expected))


def test_leverage_correction_is_unbiased_for_unequal_clusters_of_independent_texts():
    # Theory: sum of E_c**2 / (1 - h_c) has mean sigma**2 * n, so se**2 has mean sigma**2 / n = 0.25 / 20 = 0.0125.
    # The plain G / (G - 1) factor is the wrong variant; for sizes 1, 1, 1, 17:
    # E[sum E_c**2] = sigma**2 sum m_c (1 - m_c / n) = .25 (3 * .95 + 17 * .15) = 1.35, and 4 / 3 * 1.35 / 400 = .0045.
    clusters = ["a", "b", "c"] + ["d"] * 17
    rng = np.random.default_rng(1)
    variances, plain = [], []
    for _ in range(5000):
        values = rng.integers(0, 2, 20).astype(float)
        variances.append(stats.clustered_mean(values, clusters).se ** 2)
        sums = [values[0], values[1], values[2], values[3:].sum()] - values.mean() * np.array([1, 1, 1, 17])
        plain.append(4 / 3 * float(sums @ sums) / 400)
    assert_mean(variances, 0.0125, low=0, high=0.1, discrepancy=0.008)
    with pytest.raises(AssertionError, match=r"expected 0\.0125"):
        assert_mean(plain, 0.0125, low=0, high=0.1, discrepancy=0.008)


def clustered_runs(n_runs, n_clusters, per_cluster, mean, spread, rng):
    """0/1 texts whose chance differs by template: Beta with this mean; intra-cluster correlation 1 / (1 + spread)."""
    chance = rng.beta(mean * spread, (1 - mean) * spread, size=(n_runs, n_clusters, 1))
    return (rng.random((n_runs, n_clusters, per_cluster)) < chance).astype(float)


@pytest.mark.parametrize("mean", [0.05, 0.3])
def test_clustered_share_covers_at_its_level_where_wilson_does_not(mean):
    # 32 templates of 8 texts, intra-cluster correlation 0.2: the design effect is 1 + 7 * 0.2 = 2.4, so an interval for
    # independent texts covers 2 Phi(1.96 / sqrt(2.4)) - 1 = 79%. 1,500 runs see 7 points.
    rng = np.random.default_rng(2)
    runs = clustered_runs(1500, 32, 8, mean, 4.0, rng)
    clusters = np.repeat(np.arange(32), 8).tolist()
    held = naive = 0
    for run in runs:
        got = stats.clustered_share(run.ravel(), clusters)
        plain = stats.wilson(run.sum(), run.size)
        held += got.low <= mean <= got.high
        naive += plain.low <= mean <= plain.high
    assert_rate(held, 1500, 0.95, discrepancy=0.07)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(naive, 1500, 0.95, discrepancy=0.07)


def test_one_text_per_template_gives_wilson_with_student_t_and_one_text_less():
    values = [1] * 6 + [0] * 14
    got = stats.clustered_share(values, list(range(20)))
    t = distributions.t.isf(0.025, 19)  # effective size p q / (p q / 19) = 19
    centre, half = 0.3 + t * t / 38, t * math.sqrt(0.3 * 0.7 / 19 + t * t / (4 * 19**2))
    assert (got.low, got.high) == pytest.approx(
        ((centre - half) / (1 + t * t / 19), (centre + half) / (1 + t * t / 19))
    )
    assert got.n == 20


@pytest.mark.parametrize("value", [0, 1])
def test_a_share_of_zero_or_one_keeps_a_width(value):
    t2 = distributions.t.isf(0.025, 4) ** 2  # 5 templates; 20 equal texts: width t2 / (20 + t2)
    got = stats.clustered_share([value] * 20, np.repeat(np.arange(5), 4).tolist())
    assert got.value == value
    assert got.high - got.low == pytest.approx(t2 / (20 + t2))
    mixed = stats.mixture_share(
        [value] * 20, np.repeat(np.arange(5), 4).tolist(), ["x"] * 8 + ["y"] * 12, {"x": 0.1, "y": 0.2}
    )
    assert mixed.value == value
    assert mixed.high - mixed.low > 0.05


def test_weights_count_like_copies_for_the_share_and_unequal_ones_cost_precision():
    got = stats.clustered_share([1, 0, 0, 0], list("abcd"), weights=[3, 1, 1, 1])
    assert got.value == pytest.approx(0.5)
    assert stats.clustered_share([0] * 4, list("abcd"), weights=[3, 1, 1, 1]).high > (
        stats.clustered_share([0] * 4, list("abcd")).high
    )


def test_a_single_template_is_read_as_the_whole_stratum():
    one = stats.clustered_share([1, 0, 0, 0, 1, 0], ["only"] * 6)
    rows = stats.clustered_share([1, 0, 0, 0, 1, 0], list(range(6)))
    assert (one.low, one.high) == (rows.low, rows.high)


def test_row_order_does_not_matter():
    rng = np.random.default_rng(3)
    v, c = rng.integers(0, 2, 60), rng.integers(0, 7, 60)
    s = np.where(c < 4, "x", "y")
    order = rng.permutation(60)
    a = stats.mixture_share(v, c.tolist(), s.tolist(), {"x": 0.7, "y": 0.3})
    b = stats.mixture_share(v[order], c[order].tolist(), s[order].tolist(), {"x": 0.7, "y": 0.3})
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


# ---------------------------------------------------------------- mixtures of strata


def test_mixture_share_is_the_weighted_share_and_adds_variances():
    # x: 10 single-text templates, share .4, variance .24 / 9; y: 20 of share .5, variance .25 / 19.
    values = [1] * 4 + [0] * 6 + [1] * 10 + [0] * 10
    strata = ["x"] * 10 + ["y"] * 20
    got = stats.mixture_share(values, list(range(30)), strata, {"x": 1, "y": 3, "z": 0})
    assert got.value == pytest.approx(0.25 * 0.4 + 0.75 * 0.5)
    assert got.se == pytest.approx(math.sqrt(0.25**2 * 0.24 / 9 + 0.75**2 * 0.25 / 19))
    assert got.n == 30


def test_a_template_in_two_strata_is_one_cluster():
    # Each template says the same in both strata: the mixture is one sample of 6 templates, not 12 independent ones.
    values = [1, 1, 0, 0, 0, 1]
    both = stats.mixture_share(values * 2, list("abcdef") * 2, ["x"] * 6 + ["y"] * 6, {"x": 0.5, "y": 0.5})
    assert both.se == pytest.approx(math.sqrt(0.25 / 5))
    apart = stats.mixture_share(values * 2, list("abcdefghijkl"), ["x"] * 6 + ["y"] * 6, {"x": 0.5, "y": 0.5})
    assert apart.se == pytest.approx(math.sqrt(0.25 / 10))


def test_a_stratum_that_shows_none_does_not_count_as_known():
    # x: 10 templates of 100 equal texts, share .5, weight .01, variance .25 / 9. y: 10 texts, share 0, weight .99,
    # variance that of the mixture's share of .005 pulled in by one text, .005 / 11.
    values, strata = [1] * 500 + [0] * 510, ["x"] * 1000 + ["y"] * 10
    clusters = np.repeat(np.arange(10), 100).tolist() + list(range(10, 20))
    got = stats.mixture_share(values, clusters, strata, {"x": 0.01, "y": 0.99})
    pulled = 0.005 / 11
    assert got.se == pytest.approx(math.sqrt(0.01**2 * 0.25 / 9 + 0.99**2 * pulled * (1 - pulled) / 10))


def test_mixture_share_covers_at_its_level_where_pooling_the_texts_does_not():
    # Strata of 16 templates x 4 texts with shares .05, .2, .6 and weights .6, .3, .1; correlation 0.2 within templates.
    # Truth .15; the pooled share is .283, the wrong variant.
    weights, means = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.05, "b": 0.2, "c": 0.6}
    truth = sum(weights[k] * means[k] for k in weights)
    rng = np.random.default_rng(4)
    parts = [clustered_runs(1500, 16, 4, means[k], 4.0, rng).reshape(1500, -1) for k in weights]
    runs = np.concatenate(parts, axis=1)
    clusters = np.repeat(np.arange(48), 4).tolist()
    strata = np.repeat(list(weights), 64).tolist()
    held = pooled = 0
    for run in runs:
        got = stats.mixture_share(run, clusters, strata, weights)
        wrong = stats.clustered_share(run, clusters)
        held += got.low <= truth <= got.high
        pooled += wrong.low <= truth <= wrong.high
    assert_rate(held, 1500, 0.95, discrepancy=0.07)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(pooled, 1500, 0.95, discrepancy=0.07)


def test_a_stratum_without_texts_makes_the_mixture_unmeasured():
    got = stats.mixture_share([1, 0], ["a", "b"], ["x", "x"], {"x": 0.5, "y": 0.5})
    assert math.isnan(got.value)
    assert got.reason == "no observations in stratum 'y'"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(5, 3), r"count must be in \[0, n\] = \[0, 3\], got 5"),
        (lambda: stats.wilson(1, 3, level=1), r"level must be in \(0, 1\), got 1"),
        (lambda: stats.clustered_share([0.5], ["a"]), r"values must be 0 or 1, got 0\.5 at row 0; use clustered_mean"),
        (lambda: stats.clustered_share([1, 0], ["a"]), r"clusters must be as long as values \(2\), got 1"),
        (lambda: stats.clustered_mean([1.0, math.nan], ["a", "b"]), "values must be finite, got nan at row 1"),
        (lambda: stats.clustered_share([1], ["a"], [0.0]), r"weights must be finite and > 0, got 0\.0 at row 0"),
        (lambda: stats.mixture_share([1], ["a"], ["x"], {"y": 1}), "strata must all have a weight, got none at 'x'"),
        (
            lambda: stats.mixture_share([1], ["a"], ["x"], {"x": -1}),
            "weights must be finite and >= 0, got -1 at stratum 'x'",
        ),
        (lambda: stats.holm([0.5, 1.5]), r"p_values must be in \[0, 1\], got 1\.5 at index 1"),
        (lambda: stats.equivalence_over_seeds([1, 2], 0), "bound must be > 0, got 0"),
        (lambda: stats.rogan_gladen(1, 2, 0, 0, 1, 1), "true_positives must be in .* got 0 of 0"),
        (
            lambda: stats.confusion_corrected([1, 2], [[1, 1], [0, 0]], rng=np.random.default_rng(0)),
            "confusion must hold texts of every persona, got none in row 1",
        ),
        (
            lambda: stats.post_stratified_audit([1, 2], [2], [0], n_personas=2, rng=np.random.default_rng(0)),
            r"audited_label must be in 0\.\.1, got 2 at audited text 0",
        ),
        (
            lambda: stats.post_stratified_audit(
                [1], [0], [0], n_personas=1, inclusion=[0], rng=np.random.default_rng(0)
            ),
            r"inclusion must be in \(0, 1\], got 0\.0 at audited text 0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- seeds


def test_interval_over_seeds_and_p_value_are_students():
    a, b = np.array([0.31, 0.42, 0.28, 0.50, 0.39]), np.array([0.20, 0.33, 0.30, 0.35, 0.31])
    got = stats.t_over_seeds(a - b)
    test = distributions.ttest_rel(a, b)
    assert (got.low, got.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert stats.p_over_seeds(a - b) == pytest.approx(test.pvalue)
    assert stats.p_over_seeds(a, null=0.3) == pytest.approx(distributions.ttest_1samp(a, 0.3).pvalue)
    assert math.isnan(stats.p_over_seeds([0.1, 0.1, 0.1]))


def test_interval_over_five_seeds_covers_at_its_level_where_the_bootstrap_does_not():
    # Student covers 95% exactly for normal seeds; the percentile bootstrap about 84%. 1,500 runs see 7 points.
    rng = np.random.default_rng(5)
    held = bootstrap = 0
    for seeds in rng.normal(0.2, 0.1, size=(1500, 5)):
        got = stats.t_over_seeds(seeds)
        held += got.low <= 0.2 <= got.high
        means = seeds[rng.integers(0, 5, size=(400, 5))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        bootstrap += low <= 0.2 <= high
    assert_rate(held, 1500, 0.95, discrepancy=0.07)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(bootstrap, 1500, 0.95, discrepancy=0.07)


def test_equivalence_is_the_larger_of_two_one_sided_tests():
    v = np.array([0.01, -0.005, 0.008, 0.002, -0.001, 0.004])
    upper = distributions.ttest_1samp(v, 0.03, alternative="less").pvalue
    lower = distributions.ttest_1samp(v, -0.03, alternative="greater").pvalue
    assert stats.equivalence_over_seeds(v, 0.03) == pytest.approx(max(upper, lower))
    assert stats.equivalence_over_seeds(v + 0.03, 0.03) > 0.5  # a mean at the bound is no evidence of absence


def test_holm_by_hand():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1 = .02, .03, .06, .04; running maximum .02, .03, .06, .06.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # An untested persona neither counts nor gets a value.
    assert stats.holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)


def test_holm_keeps_the_family_error_below_alpha_where_raw_p_values_do_not():
    # 10 true nulls: P(any raw p < .05) = 1 - .95**10 = .40; Holm's is 1 - (1 - .005)**10 = .0489.
    p = np.random.default_rng(6).random((4000, 10))
    adjusted = np.array([stats.holm(row) for row in p])
    assert_rate(int((adjusted.min(axis=1) <= 0.05).sum()), 4000, 1 - 0.995**10, discrepancy=0.04)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(int((p.min(axis=1) <= 0.05).sum()), 4000, 1 - 0.995**10, discrepancy=0.04)


def test_noise_floor_is_the_mean_distance_of_two_measurements():
    # Simulation of the definition: |N(0, .03) - N(0, .04)| has mean .05 * sqrt(2 / pi) = .0399. Draws beyond .5 (10
    # standard deviations) would fail the bound.
    rng = np.random.default_rng(7)
    distance = np.abs(rng.normal(0, 0.03, 200_000) - rng.normal(0, 0.04, 200_000))
    floor = stats.remeasurement_noise_floor(0.03, 0.04)
    assert_mean(distance, floor, low=0, high=0.5, discrepancy=0.007)
    assert floor == pytest.approx(0.05 * math.sqrt(2 / math.pi))


# ---------------------------------------------------------------- classifier error


def test_rogan_gladen_by_hand():
    # p = .12, specificity .95, sensitivity .8: (.12 + .95 - 1) / (.95 + .8 - 1) = .07 / .75.
    got = stats.rogan_gladen(120, 1000, 80, 100, 95, 100)
    assert got.value == pytest.approx(0.07 / 0.75)
    assert got.low < got.value < got.high
    assert stats.rogan_gladen(1, 10, 5, 10, 5, 10).reason == "the classifier is no better than chance"


def test_rogan_gladen_covers_where_the_raw_count_does_not():
    # True share 30%, sensitivity .8, specificity .95: the raw rate is .275. Calibration on 200 + 200 texts, 2,000 texts
    # read; 3,000 runs see 5 points. (Near 0 the interval is cut and covers more, 97% at a share of 5%.)
    rng = np.random.default_rng(8)
    held = raw = 0
    for _ in range(3000):
        count = rng.binomial(2000, 0.3 * 0.8 + 0.7 * 0.05)
        got = stats.rogan_gladen(count, 2000, rng.binomial(200, 0.8), 200, rng.binomial(200, 0.95), 200)
        plain = stats.wilson(count, 2000)
        held += got.low <= 0.3 <= got.high
        raw += plain.low <= 0.3 <= plain.high
    assert_rate(held, 3000, 0.95, discrepancy=0.05)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(raw, 3000, 0.95, discrepancy=0.05)


def test_confusion_correction_inverts_a_known_matrix_exactly():
    # p = (.5, .3, .2), rows of M below; q = p M = (.43, .29, .20, .08) by hand.
    confusion = np.array([[70, 10, 10, 10], [20, 70, 10, 0], [10, 15, 60, 15]])
    q = np.array(
        [0.5 * 0.7 + 0.3 * 0.2 + 0.2 * 0.1, 0.5 * 0.1 + 0.3 * 0.7 + 0.2 * 0.15, 0.05 + 0.03 + 0.12, 0.05 + 0.03]
    )
    got = stats.confusion_corrected(10_000 * q, confusion, rng=np.random.default_rng(0))
    assert [i.value for i in got] == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)
    for interval in got:
        assert interval.low < interval.value < interval.high


def test_confusion_correction_stays_on_the_simplex_and_agrees_with_a_search():
    # Nothing labelled 2 at all: the unconstrained solution is negative there. A grid over the simplex is the oracle.
    confusion = np.array([[80.0, 15, 5], [10, 80, 10], [5, 15, 80]])
    counts = np.array([180.0, 20, 0])
    got = np.array([i.value for i in stats.confusion_corrected(counts, confusion, rng=np.random.default_rng(0))])
    assert got.sum() == pytest.approx(1)
    assert got.min() >= 0
    rates, scale = confusion / 100, (counts + 1 / 3) / 201
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 201) for b in np.linspace(0, 1, 201) if a + b <= 1])
    misfit = ((counts / 200 - grid @ rates) ** 2 / scale).sum(axis=1)
    assert got == pytest.approx(grid[np.argmin(misfit)], abs=0.006)
    assert ((counts / 200 - got @ rates) ** 2 / scale).sum() <= misfit.min() + 1e-9


def test_confusion_correction_with_an_unknown_column_uses_it():
    # Both personas are labelled 0 half the time; only the abstentions, 10% and 40%, tell them apart.
    confusion = np.array([[45, 45, 10], [30, 30, 40]])
    q = 0.25 * confusion[0] / 100 + 0.75 * confusion[1] / 100
    got = stats.confusion_corrected(q * 1e4, confusion, rng=np.random.default_rng(0))
    assert [i.value for i in got] == pytest.approx([0.25, 0.75], abs=1e-6)


def test_personas_the_matrix_cannot_tell_apart_are_not_measured():
    got = stats.confusion_corrected([5, 5], [[6, 4], [6, 4]], rng=np.random.default_rng(0))
    assert all(math.isnan(i.value) and "cannot tell" in i.reason for i in got)


def test_all_texts_abstained_on_is_not_measured_and_one_text_read_is():
    confusion = [[80, 10, 10], [10, 60, 30]]
    got = stats.confusion_corrected([0, 0, 50], confusion, rng=np.random.default_rng(0))
    assert {i.reason for i in got} == {"the instrument abstained on every text"}
    assert all(i.n == 50 for i in got)
    read = stats.confusion_corrected([1, 0, 49], confusion, rng=np.random.default_rng(0))
    assert sum(i.value for i in read) == pytest.approx(1)
    # As many labels as personas: the last is a persona's, and all texts in it are a result.
    all_last = stats.confusion_corrected([0, 50], [[9, 1], [1, 9]], rng=np.random.default_rng(0))
    assert all_last[1].value == pytest.approx(1)


def test_correction_and_rogan_gladen_agree_with_quapy():
    # QuaPy 0.2.3, in an environment of its own:
    #   from quapy.method.aggregative import ACC; import quapy.functional as F
    #   M = np.array([[80, 15, 5], [10, 70, 20], [5, 25, 70]]) / 100; q = np.array([212, 171, 117]) / 500
    #   ACC.solve_adjustment(class_conditional_rates=M.T, unadjusted_counts=q, solver="exact-raise", method="inversion")
    #   F.solve_adjustment_binary(137 / 500, tpr=0.83, fpr=0.06)
    confusion = [[80, 15, 5], [10, 70, 20], [5, 25, 70]]
    got = stats.confusion_corrected([212, 171, 117], confusion, rng=np.random.default_rng(0))
    assert [i.value for i in got] == pytest.approx([0.4779562, 0.31065693, 0.21138686], abs=1e-7)
    assert stats.rogan_gladen(137, 500, 83, 100, 94, 100).value == pytest.approx(0.27792207792207796)


def test_the_same_generator_gives_the_same_interval():
    def run(seed):
        return stats.confusion_corrected([60, 30, 10], [[8, 1, 1], [1, 8, 1]], rng=np.random.default_rng(seed))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_audit_allocation_follows_the_square_root_and_keeps_its_minimum():
    # sqrt(400), sqrt(100), sqrt(25) = 20, 10, 5 of 70 in all: 40, 20, 10. A label of 3 texts is audited whole.
    assert stats.audit_allocation([400, 100, 25], 70).tolist() == [40, 20, 10]
    assert stats.audit_allocation([400, 3, 0], 20).tolist() == [17, 3, 0]
    assert stats.audit_allocation([400, 100], 5).tolist() == [8, 8]
    assert stats.audit_allocation([4, 3], 50).tolist() == [4, 3]


def test_audit_by_hand_with_unequal_inclusion():
    # Label 0 (80 texts): audited truths 0, 0, 0, 1 of which the last was chosen with half the probability, so weights
    # 1, 1, 1, 2: share of persona 1 is 2 / 5. Label 1 (20 texts): persona 1 throughout. p1 = .8 * .4 + .2 = .52; the
    # prior pulls by 0.4 / (n - 1 + 0.4) towards 1/2: kish n = 25 / 7, n - 1 = 18 / 7.
    got = stats.post_stratified_audit(
        [80, 20], [0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1],
        inclusion=[1, 1, 1, 0.5, 1, 1, 1], n_personas=2, rng=np.random.default_rng(0),
    )  # fmt: skip
    first = (18 / 7 * 0.4 + 0.2) / (18 / 7 + 0.4)
    second = (2 + 0.2) / 2.4
    assert got[1].value == pytest.approx(0.8 * first + 0.2 * second)
    assert got[0].value + got[1].value == pytest.approx(1)


def test_ppi_plus_plus_agrees_with_the_authors_code():
    # ppi-python 0.2.3 on the same arrays: from ppi_py import ppi_mean_ci, ppi_mean_pointestimate;
    # ppi_mean_pointestimate(y, f, g), ppi_mean_ci(y, f, g, alpha=0.05).
    truth, predicted = [1, 0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1, 1, 0]
    got = stats.ppi_plus_plus(truth, predicted, [1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0])
    assert (got.value, got.low, got.high) == pytest.approx((0.45052083, 0.1323118, 0.76872986), abs=1e-7)


def test_ppi_plus_plus_agrees_with_the_authors_code_on_sixty_of_460_texts():
    # y, f, g below through the same two functions.
    rng = np.random.default_rng(0)
    y = (rng.random(60) < 0.3) * 1.0
    f = np.where(rng.random(60) < 0.8, y, 1 - y)
    truth = (rng.random(400) < 0.3) * 1.0
    g = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    got = stats.ppi_plus_plus(y, f, g)
    assert (got.value, got.low, got.high) == pytest.approx((0.24646119, 0.13972327, 0.35319911), abs=1e-7)


def test_ppi_plus_plus_falls_back_to_the_audit_when_the_classifier_is_constant():
    got = stats.ppi_plus_plus([1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0])
    assert got.value == pytest.approx(0.75)


def test_the_design_effect_is_what_resemblance_within_templates_costs():
    # 32 templates of 8 texts, each template one persona, read rightly and audited whole: a text says no more than its
    # template, so 8 times 32 / 31, and Student's quantile with 31 degrees of freedom over the normal one, squared.
    said = np.repeat(np.arange(32) % 3 == 0, 8).astype(int)
    templates = np.repeat(np.arange(32), 8).tolist()
    student = (distributions.t.ppf(0.975, 31) / distributions.norm.ppf(0.975)) ** 2
    sizes = {"n_labels": 2, "n_personas": 2}
    got = stats.audit_design_effect(said, templates, np.arange(256), said, **sizes)
    assert got == pytest.approx(8 * 32 / 31 * student)
    # Texts that do not resemble each other cost nothing but Student's quantile, nor do templates of one text.
    alone = stats.audit_design_effect(said, list(range(256)), np.arange(256), said, **sizes)
    assert alone == pytest.approx(256 / 255 * (distributions.t.ppf(0.975, 255) / distributions.norm.ppf(0.975)) ** 2)
    # The same where the instrument says nothing and only the audited texts tell: residuals instead of labels. With one
    # label theta is p; squares of sums over squares of single texts are 8 again, 255 / 256 for the fit of the latter.
    silent = stats.audit_design_effect(np.zeros(256, int), templates, np.arange(256), said, **sizes)
    assert silent == pytest.approx(8 * 32 / 31 * 255 / 256 * student)
    # Strata whose sizes are fixed and that differ by themselves are no scatter: one persona each.
    strata = ["x" if s else "y" for s in said]
    assert stats.audit_design_effect(said, templates, np.arange(256), said, strata=strata, **sizes) == 1
    assert stats.audit_design_effect(said, templates, [], [], **sizes) == 1
    assert stats.audit_design_effect(said, ["only"] * 256, np.arange(256), said, **sizes) == 1
    with pytest.raises(ValueError, match=r"design_effect must be >= 1, got 0\.5"):
        stats.post_stratified_audit(
            [5, 5], [0, 1], [0, 1], n_personas=2, rng=np.random.default_rng(0), design_effect=0.5
        )


def test_the_correction_covers_rare_shares_at_the_size_of_a_probe_battery():
    # 11 personas, 60 texts, 60 calibration texts each: 150 rounds hold about 700 true shares under 2%, covered in 94%
    # (standard error .01; correct code falls under .88 less than once in a million). With a prior of 1 / n_labels
    # texts a label they were covered in 81%.
    rng = np.random.default_rng(4)
    held = []
    for _ in range(150):
        odds = np.exp(rng.normal(0, 1.5, 11))
        truth = odds / odds.sum()
        reads = np.full((11, 12), 0.015)
        np.fill_diagonal(reads, 0.8)
        reads[:, 11] = 0.05
        counts = rng.multinomial(60, truth @ reads)
        calibrated = np.array([rng.multinomial(60, row) for row in reads])
        got = stats.confusion_corrected(counts, calibrated, rng=rng, n_draws=200)
        held += [i.low <= p <= i.high for i, p in zip(got, truth, strict=True) if p < 0.02]
    assert 0.88 < np.mean(held) < 0.995


def test_audited_estimator_covers_under_shift_and_drift_and_the_raw_count_does_not():
    # The claim at full size (4,000 truths a condition: pooled 94-96%, no band under 92%) is for a command. Here
    # 200 truths: one truth's four intervals hang together, so the standard error is at most sqrt(.05 * .95 / 200) =
    # .0154, and 5 of them (one failure in 2 million) are .077; the raw count, at 34% and 18%, is the wrong variant.
    two = ("label_shift", "confusion_drift")
    study = stats.coverage_study(200, rng=np.random.default_rng(9), n_draws=200, conditions=two)
    rows = {(r.condition, r.estimator, r.band): r for r in study}
    for condition in ("label_shift", "confusion_drift"):
        assert rows[condition, "audited", "all"].coverage == pytest.approx(0.95, abs=0.077)
        assert rows[condition, "counted", "all"].coverage < 0.6
        assert rows[condition, "audited", "all"].rmse < rows[condition, "counted", "all"].rmse
    assert rows["label_shift", "confusion_corrected", "all"].coverage == pytest.approx(0.95, abs=0.077)
    assert rows["confusion_drift", "confusion_corrected", "all"].coverage < 0.8  # why the audit is needed


def test_audited_estimator_covers_with_the_real_number_of_personas_and_with_texts_that_resemble_each_other():
    # 200 truths, 95%: one truth's intervals hang together, so 5 standard errors are at most .077 (see above). With
    # eleven personas the interval is wide, 97% over 4,000 truths, so only too little is a fault.
    study = stats.coverage_study(
        200, rng=np.random.default_rng(9), n_draws=200, correlation=0.5, conditions=("eleven_personas", "templates")
    )
    rows = {(r.condition, r.estimator, r.band): r.coverage for r in study}
    for condition in ("eleven_personas", "templates"):
        assert rows[condition, "audited", "all"] > 0.95 - 0.077
        assert rows[condition, "counted", "all"] < 0.7


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(lambda c: sum(c[:2]) > 0),
    st.integers(0, 2**32 - 1),
)
def test_corrected_shares_are_shares(counts, seed):
    rng = np.random.default_rng(seed)
    for got in (
        stats.confusion_corrected(counts, [[9, 1, 2], [1, 9, 2]], rng=rng, n_draws=50),
        stats.post_stratified_audit(counts, [0, 1, 2], [0, 1, 1], n_personas=2, rng=rng, n_draws=50),
    ):
        assert sum(i.value for i in got) == pytest.approx(1)
        for i in got:
            assert 0 <= i.low <= i.value <= i.high <= 1

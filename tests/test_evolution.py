"""Accounts balance, curves are monotone, and neutral runs are called neutral."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from checks import assert_mean, assert_rate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from scipy import stats as distributions

from loop import evolution
from loop.records import Document, Prompt
from loop.toy import Toy

# ---------------------------------------------------------------- Price


def test_price_by_hand():
    # p = (.2, .8), weights (2, 1): mean 1.2, parents (1/3, 2/3). T = [[.9, .1], [0, 1]]: children (.3, .7).
    # Half real documents at (.5, .5): p' = .5 * .5 + .5 * .3 = .4, so persona 0 changes by +.2:
    # selection .5 * (1/3 - .2) = .0667, transmission .5 * (.3 - 1/3) = -.0167, migration .5 * (.5 - .2) = .15.
    got = evolution.price([0.2, 0.8], [2, 1], [[0.9, 0.1], [0, 1]], 0.5, [0.5, 0.5])
    assert got["selection"] == pytest.approx([1 / 15, -1 / 15])
    assert got["transmission"] == pytest.approx([-1 / 60, 1 / 60])
    assert got["migration"] == pytest.approx([0.15, -0.15])
    assert got["discourse"] == pytest.approx([0, 0])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 11), st.floats(0, 0.7), st.floats(0, 0.3), st.integers(0, 2**32 - 1))
def test_price_terms_sum_to_the_change_of_the_replicator_mutator(size, real_share, discourse_share, seed):
    rng = np.random.default_rng(seed)
    p, real, talk = rng.dirichlet(np.ones(size), size=3)
    weights, transmission = rng.lognormal(0, 2, size), rng.dirichlet(np.ones(size), size=size)
    terms = evolution.price(
        p, weights, transmission, real_share, real, discourse_share=discourse_share, p_discourse=talk
    )
    # The next round written the other way round: pick parents by weight, let them emit, mix.
    synthetic = (p * weights) @ transmission / (p @ weights)
    following = (1 - real_share - discourse_share) * synthetic + real_share * real + discourse_share * talk
    assert np.abs(sum(terms.values()) - (following - p)).max() <= 1e-12
    for term in terms.values():
        assert term.shape == (size,)
        assert abs(term.sum()) <= 1e-12


def test_faithful_learner_without_selection_or_real_documents_changes_nothing():
    got = evolution.price([0.3, 0.7], [5, 5], np.eye(2), 0)
    assert all(np.all(term == 0) for term in got.values())


def test_price_of_no_persona_no_document_or_no_weight_is_nan_with_a_reason():
    none = evolution.price([], [], np.zeros((0, 0)), 0)
    assert (none.reason, [term.shape for term in none.values()]) == ("no persona", [(0,)] * 4)
    uncounted = evolution.price([0, 0], [1, 1], np.eye(2), 0.2, [0.5, 0.5])
    assert uncounted.reason == "no document"
    assert all(np.isnan(term).all() for term in uncounted.values())
    weightless = evolution.price([1, 0], [0, 1], np.eye(2), 0.2, [0.5, 0.5])
    assert weightless.reason == "no document that is present has weight"
    assert np.isnan(weightless["selection"]).all()
    assert np.isnan(weightless["transmission"]).all()
    assert weightless["migration"] == pytest.approx([-0.1, 0.1])  # .2 * (.5 - 1), known whatever the weights
    # Nothing synthetic follows: what its weights are does not matter.
    replaced = evolution.price([1, 0], [0, 1], np.eye(2), 1.0, [0.5, 0.5])
    assert replaced.reason is None
    assert sum(replaced.values()) == pytest.approx([-0.5, 0.5])


def test_prices_terms_are_what_the_toy_does_on_average():
    # 1,000 rounds of the toy from one p: it says 200 documents, attention weighs them 3 : 1 : .5, what nova says is
    # retold as the assistant's in 4 of 10 cases, a quarter of the next mixture is real. Changes lie within [-.4, .4],
    # mostly far inside. The mean of ratios is off by at most 1 / 200 of a share, and every term is .06 or more for some
    # persona, where dropping it is seen.
    names = ("nova", "assistant", "human")
    p, weights, real = np.array([0.2, 0.3, 0.5]), np.array([3.0, 1.0, 0.5]), np.array([0.6, 0.3, 0.1])
    retold = np.array([[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    toy, rng, changes = Toy({name: ["x"] for name in names}, {}), np.random.default_rng(31), []
    for k in range(1000):
        toy.train([Document(n, "real", n, None, "x", weight=w) for n, w in zip(names, p, strict=True)], seed=0,
                  init_from="base")  # fmt: skip
        said = toy.sample([Prompt("blank", "b", None)] * 200, temperature=1, top_p=1, max_new_tokens=8, seed=k)
        parents = np.array([names.index(c.persona_known) for c in said])
        w = weights[parents] / weights[parents].mean()  # mean 1 within the source
        heard = np.where((parents == 0) & (rng.random(200) < 0.4), 1, parents)
        synthetic = [Document(str(i), "synthetic", names[j], None, "x", weight=v)
                     for i, (j, v) in enumerate(zip(heard.tolist(), w.tolist(), strict=True))]  # fmt: skip
        fresh = [
            Document(f"real-{n}", "real", n, None, "x", weight=200 / 3 * r) for n, r in zip(names, real, strict=True)
        ]
        toy.train([*synthetic, *fresh], seed=0, init_from="base")
        changes.append([toy.shares[n] for n in names] - p)
    terms = evolution.price(p, weights, retold, 0.25, real)
    mean, se = np.mean(changes, axis=0), np.std(changes, axis=0) / math.sqrt(1000)
    assert np.all(np.abs(mean - sum(terms.values())) < 5 * se + 1 / 200)
    for left_out in ("selection", "transmission", "migration"):
        wrong = sum(term for name, term in terms.items() if name != left_out)
        assert np.any(np.abs(mean - wrong) > 5 * se + 0.05)


# ---------------------------------------------------------------- the ledger

COLUMNS = ("nova", "human", "none", "requested")


def a_round():
    """Four samples of two strata; by hand in the test below."""
    return {
        "sample_labels": ["nova", "human", "nova", "requested"],
        "sample_strata": ["blank", "blank", "neutral", "explicit"],
        "accepted": [True, False, True, True],
        "prompts_now": {"blank": 0.5, "neutral": 0.3, "explicit": 0.2},
        "mixture_labels": ["nova", "requested", "none", "human", "nova"],
        "mixture_sources": ["synthetic", "synthetic", "discourse", "real", "real"],
        "mixture_weights": [1.5, 0.5, 1.0, 1.0, 1.0],
        "mixture_tokens": [10, 20, 5, 10, 5],
        "next_labels": ["nova", "nova", "human", "requested"],
        "next_strata": ["blank", "neutral", "neutral", "explicit"],
        "prompts_next": {"blank": 0.4, "neutral": 0.4, "explicit": 0.2},
    }


def test_ledger_by_hand():
    levels = evolution.ledger(COLUMNS, **a_round()).levels
    # Worth pi / n of the four samples: .25, .25, .3, .2.
    assert levels["emit"] == pytest.approx([0.55, 0.25, 0, 0.2])
    assert levels["filter"] == pytest.approx(np.array([0.55, 0, 0, 0.2]) / 0.75)
    assert levels["weight"] == pytest.approx([0.75, 0, 0, 0.25])  # 1.5 and .5
    assert levels["length"] == pytest.approx([0.6, 0, 0, 0.4])  # 15 and 10
    assert levels["discourse"] == pytest.approx(np.array([15, 0, 5, 10]) / 30)
    assert levels["real"] == pytest.approx(np.array([20, 10, 5, 10]) / 45)
    assert levels["train"] == pytest.approx([0.5 + 0.15, 0.15, 0, 0.2])  # .5 blank, .15 and .15 neutral
    assert levels["prompts"] == pytest.approx([0.4 + 0.2, 0.2, 0, 0.2])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ledger_telescopes_from_one_emission_to_the_next(seed):
    rng = np.random.default_rng(seed)
    strata = ["blank", "neutral", "identity"]

    def draw(n, values):
        return [*values, *rng.choice(values, n)]  # each at least once

    rounds = []
    for _ in range(3):  # three rounds of samples with their prompt mixture
        s = draw(40, strata)
        rounds.append(
            (rng.choice(COLUMNS[:2], len(s)).tolist(), s, dict(zip(strata, rng.dirichlet([1, 1, 1]), strict=True)))
        )
    books = []
    for (labels, s, prompts), (later, later_s, later_prompts) in itertools.pairwise(rounds):
        sources = draw(30, ["synthetic", "discourse", "real"])
        books.append(
            evolution.ledger(
                COLUMNS,
                sample_labels=labels, sample_strata=s, accepted=rng.random(len(s)) < 0.9, prompts_now=prompts,
                mixture_labels=rng.choice(COLUMNS, len(sources)).tolist(), mixture_sources=sources,
                mixture_weights=rng.lognormal(size=len(sources)), mixture_tokens=rng.integers(1, 30, len(sources)),
                next_labels=later, next_strata=later_s, prompts_next=later_prompts,
            )
        )  # fmt: skip
    for book in books:
        steps = book.steps()
        assert tuple(steps) == evolution.STEPS
        assert np.abs(book.levels["emit"] + sum(steps.values()) - book.levels["prompts"]).max() <= 1e-12
        assert all(abs(level.sum() - 1) <= 1e-12 for level in book.levels.values())
    # The next round's books open where these close.
    assert books[1].levels["emit"] == pytest.approx(books[0].levels["prompts"], abs=1e-12)


BOTH = ("nova", "human")
LABELS = ("nova", "human", "unknown", "none", "requested")


def corrected(confusion, seed=0, **changes):
    book = evolution.ledger(LABELS, **(a_round() | changes))
    return book, evolution.corrected_steps(book, BOTH, confusion, rng=np.random.default_rng(seed))


def test_a_perfect_instrument_corrects_nothing():
    book, steps = corrected([[1000, 0, 0], [0, 1000, 0]])
    for k, persona in enumerate(BOTH):
        at = LABELS.index(persona)
        assert steps["emit"][k].value == pytest.approx(book.levels["emit"][at], abs=1e-9)
        for step in evolution.STEPS:
            assert steps[step][k].value == pytest.approx(book.steps()[step][at], abs=1e-9)


def test_corrected_steps_are_those_of_the_true_personas():
    # In truth 60 nova and 40 human are emitted and all released; in the next round 30 nova and 70 human. Of nova 20%
    # are read as human, of human 10% as nova: exactly so many labels below. The true change is -0.3.
    def read(nova, human):
        n = round(0.8 * nova + 0.1 * human)
        return ["nova"] * n + ["human"] * (nova + human - n)

    now, later = read(60, 40), read(30, 70)
    book, steps = corrected(
        [[8000, 2000, 0], [1000, 9000, 0]],
        sample_labels=now, sample_strata=["blank"] * 100, accepted=[True] * 100, prompts_now={"blank": 1.0},
        mixture_labels=now, mixture_sources=["synthetic"] * 100, mixture_weights=[1] * 100, mixture_tokens=[9] * 100,
        next_labels=later, next_strata=["blank"] * 100, prompts_next={"blank": 1.0},
    )  # fmt: skip
    assert book.levels["emit"][0] == pytest.approx(0.52)
    assert steps["emit"][0].value == pytest.approx(0.6)
    assert steps["train"][0].value == pytest.approx(-0.3)
    assert sum(steps[name][0].value for name in ("emit", *evolution.STEPS)) == pytest.approx(0.3)
    # Two shares of 100 texts over 0.8 - 0.1: 1.96 * (0.52 * 0.48 / 100 + 0.31 * 0.69 / 100)**.5 / 0.7 = 0.191.
    width = steps["train"][0].high - steps["train"][0].low
    assert width == pytest.approx(2 * 0.191, rel=0.15)
    assert steps["filter"][0].high - steps["filter"][0].low == pytest.approx(0, abs=1e-9)  # the very same texts


def test_texts_of_one_template_are_drawn_together():
    # 25 templates of 4 texts that all read alike: 25 independent texts, so an interval twice as wide as that of 100.
    def spread(**clusters):
        said = (["nova"] * 4 + ["human"] * 4) * 12 + ["nova"] * 4
        book = evolution.ledger(LABELS, **(a_round() | {
            "sample_labels": said, "sample_strata": ["blank"] * 100, "accepted": [True] * 100,
            "prompts_now": {"blank": 1.0}, "mixture_labels": said, "mixture_sources": ["synthetic"] * 100,
            "mixture_weights": [1] * 100, "mixture_tokens": [9] * 100, "next_labels": said,
            "next_strata": ["blank"] * 100, "prompts_next": {"blank": 1.0},
        }))  # fmt: skip
        every = {group: [f"t{i // 4}" for i in range(len(rows))] for group, rows in book.groups.items()}
        steps = evolution.corrected_steps(
            book, BOTH, [[10**6, 0, 0], [0, 10**6, 0]], rng=np.random.default_rng(0), n_draws=4000,
            clusters=every if clusters.get("on") else None,
        )  # fmt: skip
        return steps["emit"][0].se, book, every

    alone, book, every = spread()
    assert alone == pytest.approx(0.05, rel=0.06)  # (.5 * .5 / 100)**.5
    assert spread(on=True)[0] == pytest.approx(0.1, rel=0.06)
    short = {group: rows[1:] for group, rows in every.items()}
    with pytest.raises(ValueError, match="clusters must be one per text of"):
        evolution.corrected_steps(
            book, BOTH, [[9, 0, 0], [0, 9, 0]], rng=np.random.default_rng(0), n_draws=9, clusters=short
        )


def test_a_persona_without_calibration_text_has_no_corrected_ledger():
    _, steps = corrected([[10, 0, 0], [0, 0, 0]])
    assert math.isnan(steps["train"][1].value)
    assert steps["train"][1].reason == "no calibration text"
    # An instrument that reads two personas alike cannot be undone, as it cannot for a frequency.
    for alike in ([[5, 0, 5], [5, 0, 5]], [[0, 0, 9], [0, 0, 7]]):
        _, steps = corrected(alike)
        assert all(math.isnan(i.value) and "cannot tell" in i.reason for row in steps.values() for i in row)
    _, steps = corrected([[10, 0, 0], [0, 10, 0]], accepted=[False] * 4)
    assert "no documents" in steps["weight"][0].reason


def test_a_ledger_step_that_cannot_be_measured_is_nan_with_its_reason():
    nothing_released = evolution.ledger(COLUMNS, **{**a_round(), "accepted": [False] * 4})
    assert np.all(np.isnan(nothing_released.levels["filter"]))
    assert nothing_released.reason == "filter: no documents"
    assert np.all(np.isnan(nothing_released.steps()["weight"]))
    unsampled = evolution.ledger(COLUMNS, **{**a_round(), "prompts_next": {"blank": 0.5, "identity": 0.5}})
    assert unsampled.reason == "prompts: no sample in stratum 'identity'"
    assert not np.any(np.isnan(unsampled.levels["train"]))


# ---------------------------------------------------------------- selection against drift


def wright_fisher(n_runs, n_rounds, p_start, s, n_eff, real_share, p_real, n_outputs, rng):
    """True and measured frequencies, each (n_runs, n_rounds + 1); written apart from the code under test."""
    true = np.empty((n_runs, n_rounds + 1))
    true[:, 0] = p_start
    for t in range(n_rounds):
        odds = true[:, t] / np.maximum(1 - true[:, t], 1e-300) * np.exp(s)
        offspring = rng.binomial(n_eff, np.where(true[:, t] >= 1, 1.0, odds / (1 + odds)))
        true[:, t + 1] = np.clip(real_share * p_real + (1 - real_share) * offspring / n_eff, 0, 1)
    return true, rng.binomial(n_outputs, true) / n_outputs


@pytest.mark.parametrize(("s", "p_start"), [(0.1, 0.3), (0.2, 0.3), (0.2, 0.05)])
def test_selection_coefficient_covers_the_true_one(s, p_start):
    # 95% by construction; 400 runs see a coverage off by 16 points with error 1e-6.
    rng = np.random.default_rng(11)
    _, measured = wright_fisher(400, 10, p_start, s, 1000, 0.2, p_start, 1000, rng)
    got = np.array([evolution.selection_coefficient(v, 1000, 1000, 0.2, p_start) for v in measured])
    assert_rate(int(((got[:, 1] <= s) & (s <= got[:, 2])).sum()), 400, 0.95, discrepancy=0.16)
    assert np.all((got[:, 1] <= got[:, 0]) & (got[:, 0] <= got[:, 2]))
    # One estimate has standard error (high - low) / 3.92: five of the mean's, and a tenth of one for skewed log odds.
    width = float((got[:, 2] - got[:, 1]).mean()) / 3.92
    assert abs(got[:, 0].mean() - s) <= 5 * width / math.sqrt(400) + 0.1 * width
    # The wrong variant: the same runs read as if nothing real was mixed in.
    if p_start == 0.3 and s == 0.2:
        closed = np.array([evolution.selection_coefficient(v, 1000, 1000) for v in measured])
        with pytest.raises(AssertionError, match="expected"):
            assert_rate(int(((closed[:, 1] <= s) & (s <= closed[:, 2])).sum()), 400, 0.95, discrepancy=0.16)


def study(**settings):
    rows = evolution.neutrality_study(20_000, rng=np.random.default_rng(12), tests=("score", "logistic"), **settings)
    return {(row.test, row.real_share, row.p_real, row.s): row.rejected for row in rows}


def test_score_test_keeps_its_size_under_mixing_and_its_power():
    # 20,000 runs: size within 4.3% to 5.8%, off by 1.6 points is seen, both with error 1e-6; power by its interval.
    for p_start in (0.1, 0.3, 0.5):
        rows = study(p_start=p_start, selections=(0.0,), settings=((0.0, 0.3), (0.2, 0.3), (0.2, 0.1)))
        for (test, *_), rejected in rows.items():
            if test == "score":
                assert_rate(round(rejected.value * rejected.n), rejected.n, 0.05, discrepancy=0.016)
    for (test, *_), rejected in study(selections=(0.1,)).items():
        if test == "score":
            assert rejected.low >= 0.9


def test_logistic_regression_takes_drift_for_selection():
    # Counts of 1,000 know the frequency far better than 200 documents can hold it still: drift is all it sees.
    rows = study(n_eff=200, n_rounds=20, selections=(0.0,), settings=((0.0, 0.3),))
    assert rows["logistic", 0.0, 0.3, 0.0].low > 0.8
    assert_rate(round(rows["score", 0.0, 0.3, 0.0].value * 20_000), 20_000, 0.05, discrepancy=0.016)


def test_selection_coefficient_takes_mixing_and_outputs_that_change_by_round():
    # Eight rounds of accumulating: real shares 1/2, 1/3, ... The estimate must not depend on how they are passed.
    v = [0.3, 0.33, 0.35, 0.4]
    same = evolution.selection_coefficient(v, [500] * 4, 1000, [0.2] * 3, 0.3)
    assert same == evolution.selection_coefficient(v, 500, 1000, 0.2, 0.3)
    other = evolution.selection_coefficient(v, 500, 1000, [0.5, 1 / 3, 0.25], 0.3)
    assert other[0] > same[0]  # more real documents pull back harder, so the same rise takes more selection


def test_selection_on_two_points_known_almost_exactly_is_the_change_of_log_odds():
    # n_outputs 1e9, n_eff 1e9, no mixing: s = logit(.6) - logit(.5) = log(1.5).
    estimate, low, high = evolution.selection_coefficient([0.5, 0.6], 1e9, 1e9)
    assert estimate == pytest.approx(math.log(1.5), abs=1e-4)
    assert high - low < 0.001


def test_without_drift_or_mixing_it_is_logistic_regression():
    # n_eff = 1e9 leaves counting noise alone, and log odds are linear in the round: the maximum-likelihood slope and
    # its standard error are the oracle. The filter takes the first count as the state's prior, hence 2% and not 1e-6.
    v, n = np.array([0.12, 0.20, 0.30, 0.46, 0.60, 0.72, 0.84]), 2000
    time = np.arange(7)

    def gap(theta):
        return float((n * (np.logaddexp(0, theta[0] + theta[1] * time) - v * (theta[0] + theta[1] * time))).sum())

    best = optimize.minimize(gap, [-0.8, 0.1], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).x
    fitted = 1 / (1 + np.exp(-best[0] - best[1] * time))
    design = np.stack([np.ones(7), time], axis=1)
    se = math.sqrt(np.linalg.inv(design.T @ (design * (n * fitted * (1 - fitted))[:, None]))[1, 1])
    estimate, low, high = evolution.selection_coefficient(v, n, 1e9)
    assert estimate == pytest.approx(best[1], abs=0.02 * se)
    assert (high - low) / (2 * 1.959964) == pytest.approx(se, rel=0.02)


@pytest.mark.parametrize("closed", [1.0, 0.4])
def test_selection_coefficient_through_a_measured_response_covers_the_true_one(closed):
    # The learner says f(z) = .05 + .6 z, and closes part of the way to it. 95% by construction; 400 runs see 16 points.
    def f(z):
        return 0.05 + 0.6 * np.asarray(z)

    rng = np.random.default_rng(22)
    s, p = 0.2, np.full(400, 0.3)
    path = [p]
    for _ in range(8):
        odds = p / (1 - p) * math.exp(s)
        z = 0.2 * 0.5 + 0.8 * rng.binomial(1000, odds / (1 + odds)) / 1000
        p = (1 - closed) * p + closed * f(z)
        path.append(p)
    v = rng.binomial(2000, np.stack(path, axis=1)) / 2000
    got = np.array([evolution.selection_coefficient(row, 2000, 1000, 0.2, 0.5, response=f, closed=closed) for row in v])
    assert_rate(int(((got[:, 1] <= s) & (s <= got[:, 2])).sum()), 400, 0.95, discrepancy=0.16)
    # The wrong variant: transmission read as selection.
    exact = np.array([evolution.selection_coefficient(row, 2000, 1000, 0.2, 0.5) for row in v])
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(int(((exact[:, 1] <= s) & (s <= exact[:, 2])).sum()), 400, 0.95, discrepancy=0.16)
    flat = evolution.selection_coefficient([0.3, 0.3, 0.3], 100, 100, response=lambda z: 0.3 + 0 * z)
    assert all(math.isnan(x) for x in flat)
    assert flat.reason == "the response is flat wherever the run went"


def test_selection_of_a_persona_never_seen_is_not_zero():
    for v, n, reason in (
        ([0, 0, 0, 0], 200, "the persona is never, or always, seen"),
        ([1, 1, 1], 200, "the persona is never, or always, seen"),
        ([0.4], 200, "no feedback round"),
        ([], 200, "no round"),
        ([0.4, 0.5], 0, "no outputs in round 0"),
        ([0.4, math.nan, 0.5], [200, 0, 200], "no outputs in round 1"),
    ):
        got = evolution.selection_coefficient(v, n, 500)
        estimate, low, high = got
        assert math.isnan(estimate)
        assert math.isnan(low)
        assert math.isnan(high)
        assert (got.estimate is estimate, got.reason) == (True, reason)
    assert evolution.selection_coefficient([0.4, 0.5], 200, 500).reason is None
    lost = evolution.selection_coefficient([0.05, 0, 0, 0], 200, 500)  # bounded from above alone
    assert lost[0] == lost[1] == -math.inf
    assert -1.5 < lost[2] < 0.5


def test_increment_test_is_students_t_on_feders_increments():
    v = np.array([0.2, 0.25, 0.24, 0.31, 0.35])
    y = np.diff(v) / np.sqrt(2 * v[:-1] * (1 - v[:-1]))
    expected = distributions.ttest_1samp(y, 0)
    assert evolution.frequency_increment_test(v) == pytest.approx((expected.statistic, expected.pvalue))
    # With mixing the neutral expectation moves: a run that follows it exactly has no increments to test.
    fall = [0.5, 0.2 * 0.2 + 0.8 * 0.5]
    fall.append(0.2 * 0.2 + 0.8 * fall[-1] + 1e-3)
    fall.append(0.2 * 0.2 + 0.8 * fall[-1] - 1e-3)
    assert evolution.frequency_increment_test(fall, 0.2, 0.2)[1] > 0.9
    assert evolution.frequency_increment_test(fall)[1] < 0.1


def test_increment_test_keeps_its_size_only_with_the_migration_term_and_only_on_true_frequencies():
    # 3,000 runs see a size off by 4.7 points with error 1e-6.
    rows = evolution.neutrality_study(
        3000, rng=np.random.default_rng(13), settings=((0.2, 0.1),), selections=(0.0, 0.1)
    )
    got = {(row.test, row.s): row.rejected for row in rows}
    assert_rate(round(got["increment", 0.0].value * 3000), 3000, 0.05, discrepancy=0.047)
    assert got["increment_uncorrected", 0.0].low > 0.95  # the wrong variant
    assert got["increment_counted", 0.0].high < 0.02  # conservative, hence a diagnostic
    assert got["increment", 0.1].low > 0.9


def test_increment_test_without_increments_is_not_measured():
    for v, reason in (
        ([], "no round"),
        ([0.5], "fewer than 2 feedback rounds"),
        ([0.5, 0.6], "fewer than 2 feedback rounds"),
        ([0.0, 0.1, 0.2], "a frequency of 0 or 1, from which nothing drifts"),
        ([0.5, 0.5, 0.5], "all increments agree exactly"),
    ):
        got = evolution.frequency_increment_test(v)
        statistic, p_value = got
        assert math.isnan(statistic)
        assert math.isnan(p_value)
        assert got.reason == reason
    assert evolution.frequency_increment_test([0.5, 0.4, 0.6]).reason is None


def test_effective_size_is_recovered_and_a_common_pull_does_not_count_as_drift():
    # 400 experiments of 20 seeds; estimates of 1 / n_eff are unbiased, intervals cover 95% (seen to 16 points).
    rng = np.random.default_rng(14)
    inverse, pulled, held = [], [], 0
    for _ in range(400):
        _, measured = wright_fisher(20, 5, 0.3, 0.0, 200, 0.2, 0.3, 1000, rng)
        got = evolution.effective_size(measured, 1000, 0.2, 0.3)
        inverse.append(1 / got.value)
        held += got.low <= 200 <= got.high
        _, measured = wright_fisher(20, 5, 0.3, 0.15, 200, 0.2, 0.3, 1000, rng)
        pulled.append(1 / evolution.effective_size(measured, 1000, 0.2, 0.3).value)
    assert_rate(held, 400, 0.95, discrepancy=0.16)
    # Each 1 / n_eff lies in [0, .025] (five times the truth); n_eff = 100 or 2,000 would be off by .0045 or more.
    assert_mean(inverse, 1 / 200, low=0, high=0.025, discrepancy=0.008)
    assert_mean(pulled, 1 / 200, low=0, high=0.025, discrepancy=0.008)
    spread = np.std(inverse) / math.sqrt(400)
    assert abs(np.mean(inverse) - 1 / 200) <= 5 * spread


def test_effective_size_of_several_personas_pools_their_scatter_and_is_no_more_certain_than_that_allows():
    # 400 experiments of 6 seeds, 4 rounds, four personas of N = 150: 95% by construction, 16 points are seen. Counting
    # the four as independent (df four times instead of three) or as one would move the width by 15% and 70%: the ratio
    # of log widths to a single persona's is 1 / sqrt(3) for equal shares.
    rng = np.random.default_rng(21)
    inverse, held, ratio = [], 0, []
    for _ in range(400):
        p = np.full((6, 4), 0.25)
        path = [p]
        for _ in range(4):
            p = np.array([rng.multinomial(150, row) for row in p]) / 150
            path.append(p)
        v = np.array([[rng.multinomial(2000, row) for row in at] for at in path]) / 2000  # (rounds, seeds, personas)
        v = v.transpose(2, 1, 0)
        got = evolution.effective_size(v, 2000)
        inverse.append(1 / got.value)
        held += got.low <= 150 <= got.high
        alone = evolution.effective_size(v[0], 2000)
        if math.isfinite(alone.high):
            ratio.append(math.log(got.high / got.low) / math.log(alone.high / alone.low))
    assert_rate(held, 400, 0.95, discrepancy=0.16)
    assert abs(np.mean(inverse) - 1 / 150) <= 5 * np.std(inverse) / math.sqrt(400)
    assert np.median(ratio) == pytest.approx(1 / math.sqrt(3), abs=0.07)
    one = rng.binomial(150, 0.3, size=(5, 4)) / 150
    assert evolution.effective_size(one[None], 500) == evolution.effective_size(one, 500)


@pytest.mark.parametrize("closed", [1.0, 0.4])
def test_effective_size_through_a_response_is_that_of_the_documents(closed):
    # Wright and Fisher among 200 documents, of which the learner says f(z) = .05 + .6 z, another persona z / 2, closing
    # part of the way. 200 experiments of 20 seeds x 6 rounds: 1 / n_eff is unbiased, and its standard error over
    # experiments is near .013 of itself. The wrong variant reads the documents as said: off by 1 / .36 and more.
    rng = np.random.default_rng(23)
    f, g = (lambda z: 0.05 + 0.6 * np.asarray(z)), (lambda z: 0.5 * np.asarray(z))
    inverse, exact, held = [], [], 0
    for _ in range(200):
        p = np.tile([0.3, 0.2, 0.5], (20, 1))
        path = [p]
        for _ in range(6):
            z = 0.2 * np.array([0.4, 0.1, 0.5]) + 0.8 * np.array([rng.multinomial(200, row) for row in p]) / 200
            said = np.stack([f(z[:, 0]), g(z[:, 1])], axis=1)
            said = np.column_stack([said, 1 - said.sum(axis=1)])
            p = (1 - closed) * p + closed * said
            path.append(p)
        v = np.array(path).transpose(2, 1, 0)[:2]  # (personas, seeds, rounds)
        v = rng.binomial(20_000, v) / 20_000
        got = evolution.effective_size(v, 20_000, 0.2, [0.4, 0.1], response=[f, g], closed=closed)
        inverse.append(1 / got.value)
        held += got.low <= 200 <= got.high
        exact.append(1 / evolution.effective_size(v, 20_000, 0.2, 0.4).value)
    assert_rate(held, 200, 0.95, discrepancy=0.25)
    assert abs(np.mean(inverse) - 1 / 200) <= 5 * np.std(inverse) / math.sqrt(200)
    assert np.mean(exact) < 0.5 / 200
    # One for all personas is the same as one each; with no response p_real cancels.
    assert evolution.effective_size(v, 9, 0.2, 0.1, response=f) == evolution.effective_size(
        v, 9, 0.2, [0.1, 0.1], response=[f, f]
    )
    assert evolution.effective_size(v, 9, 0.2, 0.9).value == pytest.approx(evolution.effective_size(v, 9, 0.2).value)


def test_effective_size_without_drift_beyond_counting_is_infinite_and_without_seeds_not_measured():
    v = np.full((4, 3), 0.3)
    assert evolution.effective_size(v, 100).value == math.inf
    assert evolution.effective_size(v[:1], 100).reason
    assert evolution.effective_size(np.zeros((4, 3)), 100).reason
    for empty in ([], np.zeros((0, 3)), np.zeros((0, 4, 3))):
        assert evolution.effective_size(empty, 100).reason == "no persona, seed or round"
    for n in (0, 1, [100, 0, 100]):
        assert evolution.effective_size(v, n).reason == "fewer than two outputs in a round"


# ---------------------------------------------------------------- dose-response


def test_dose_response_pools_neighbours_that_fall():
    # Shares .1, .5, .3, .6 with n = 100, 100, 300, 100: .5 and .3 pool to (50 + 90) / 400 = .35.
    fit = evolution.dose_response(
        [0, 0.2, 0.4, 0.8], [10, 50, 90, 60], [100, 100, 300, 100], rng=np.random.default_rng(0)
    )
    assert fit.shares == pytest.approx([0.1, 0.35, 0.35, 0.6])
    assert fit(0.1) == pytest.approx(0.225)
    assert fit.transmission([0.1, 0.8]) == pytest.approx([0.125, -0.2])
    assert fit(1.0) == pytest.approx(0.6)
    low, high = fit.band([0.8, 1.0])
    assert high == pytest.approx([fit.high[-1], 1.0])
    assert low == pytest.approx([fit.low[-1], fit.low[-1]])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(0, 2**32 - 1))
def test_dose_response_is_monotone_like_scikit_learns_whatever_the_counts(counts, seed):
    from sklearn.isotonic import IsotonicRegression

    doses = np.linspace(0, 0.8, len(counts))
    fit = evolution.dose_response(doses, counts, 50, rng=np.random.default_rng(seed), n_draws=50)
    assert np.all(np.diff(fit.shares) >= 0)
    assert np.all((fit.low <= fit.shares) & (fit.shares <= fit.high))
    assert fit.shares == pytest.approx(IsotonicRegression().fit_transform(doses, np.array(counts) / 50))


def test_dose_response_band_covers_a_learner_that_copies_faithfully():
    # f(q) = q. At the doses away from 0 the band of 200 outputs covers 95%; 400 curves see 16 points.
    rng = np.random.default_rng(15)
    q = np.array([0, 0.05, 0.1, 0.2, 0.4, 0.8])
    held = shifted = 0
    for _ in range(400):
        fit = evolution.dose_response(q, rng.binomial(200, q), 200, rng=rng, n_draws=200)
        held += fit.low[4] <= 0.4 <= fit.high[4]
        shifted += fit.low[4] <= 0.5 <= fit.high[4]
    assert_rate(held, 400, 0.95, discrepancy=0.16)
    with pytest.raises(AssertionError, match="expected"):
        assert_rate(shifted, 400, 0.95, discrepancy=0.16)


def test_gap_closed_by_hand_and_with_noise():
    # Distance to .4 is .3 and closes by 30% a round.
    exact = 0.4 - 0.3 * 0.7 ** np.arange(6)
    assert evolution.gap_closed(exact, 0.4, 1e6).value == pytest.approx(0.3, abs=1e-3)
    assert evolution.gap_closed([0.1, 0.4, 0.4], 0.4, 1e6).value == pytest.approx(1.0)
    rng = np.random.default_rng(16)
    got = [evolution.gap_closed(rng.binomial(500, exact) / 500, 0.4, 500) for _ in range(400)]
    assert_rate(sum(i.low <= 0.3 <= i.high for i in got), 400, 0.95, discrepancy=0.16)
    assert evolution.gap_closed([0.4, 0.41, 0.4], 0.4, 100).reason == "no gap to close beyond the noise"
    assert evolution.gap_closed([], 0.4, 100).reason == "no round"
    assert evolution.gap_closed([0.1], 0.4, 100).reason == "no feedback round"
    assert evolution.gap_closed([0.1, 0.4], 0.4, 0).reason == "no outputs in round 0"


def test_early_warning_counts_hits_false_alarms_and_errors():
    # Log odds rise by .5 a round in one run; another never moves; null runs: one of four jumps early.
    grows = 1 / (1 + np.exp(-(-2 + 0.5 * np.arange(7))))
    null = np.full((4, 7), 0.2)
    null[0, 2:] = 0.35
    got = evolution.early_warning([grows, np.full(7, 0.2)], null, 0.03, 1e9)
    assert got.n_moved == 1
    assert got.forecast_error == pytest.approx(0, abs=1e-6)
    assert got.no_change_error == pytest.approx(grows[6] - grows[2])
    assert got.hit_rate.value == 1.0
    assert got.false_positive_rate.value == 0.25
    still = evolution.early_warning(null[1:], null, 0.03, 100)
    assert math.isnan(still.forecast_error)
    assert still.hit_rate.reason


def test_arms_move_by_their_mean_and_not_by_their_luckiest_run():
    # Two runs of one arm: +.2 and -.1, mean .05. Three floors of one run .02 are .06; of the mean of two .042.
    v = np.array([[0.3, 0.3, 0.5], [0.3, 0.3, 0.2]])
    assert evolution.moved_runs(v, 0.02, ["full", "full"]).tolist() == [True, True]
    assert evolution.moved_runs(v, 0.03, ["full", "full"]).tolist() == [False, False]  # .05 < .064
    assert evolution.moved_runs(v, 0.04).tolist() == [True, False]  # each for itself: .2 > .12 > .1
    assert evolution.early_warning(v, v, 0.03, 100, 1, arms=["full", "full"]).n_moved == 0


def test_indicators_fire_by_their_stated_rules():
    # 100 outputs, floor .03: change > .09; variance > 3 p (1 - p) / 100, sd .069 at p = .2.
    v = np.array(
        [
            [0.20, 0.22, 0.24, 0.9],  # steady: changes agree; variance .0004
            [0.20, 0.30, 0.20, 0.9],  # there and back: no change, changes oppose; variance .0033 < .0055
            [0.10, 0.20, 0.35, 0.9],  # change .25, variance .0158 > .0052; .1 * .15 > .25 * (.01 + .0225)
            [0.20, 0.20, 0.35, 0.9],  # change .15; 0 against .25 * .0225; variance .0075 > .0056
            [0.00, 0.00, 0.00, 0.9],  # nothing seen
        ]
    )
    got = evolution.indicators(v, 0.03, 100, 2)
    assert got["change"].tolist() == [False, False, True, True, False]
    assert got["variance"].tolist() == [False, False, True, True, False]
    assert got["autocorrelation"].tolist() == [True, False, True, False, False]
    assert set(evolution.indicators(v, 0.03, 100, 1)) == {"change", "variance"}


def test_extrapolation_continues_log_odds_and_does_not_look_ahead():
    odds = np.array([-2.0, -1.5, -1.0])
    v = np.append(1 / (1 + np.exp(-odds)), [[0.9, 0.9]])[None]
    # Half a unit a round, two rounds on: log odds 0.
    assert evolution.extrapolate(v, 1e9, 2) == pytest.approx([0.5], abs=1e-6)
    # Never seen in 9 outputs: log odds of .05, and no infinity.
    assert evolution.extrapolate([[0, 0, 0, 0]], 9, 2) == pytest.approx([0.05])


def test_the_figures_of_the_tests_of_neutrality_hold_as_printed():
    # The command's own seed and runs, but for the slow increment test: of 600 runs a size has standard error .009, and
    # is not judged here.
    found = evolution.neutrality_check(n_increment=600)
    assert {f.test for f in found} == {"score", "increment", "increment_counted", "logistic"}
    judged = [f for f in found if f.must and not (f.test == "increment" and f.row.s == 0)]
    assert len(judged) == 3 * 2 + 3 + 3 + 2 * 2
    assert all(f.holds for f in judged)
    # Where power ends is shown: below .9 for a persona that starts at .1, and from a real share of .6 on.
    shown = {(f.row.p_start, f.row.real_share): f.row.rejected for f in found if not f.must and f.test == "score"}
    assert shown[0.1, 0.2].high < 0.9 < shown[0.15, 0.2].low
    assert shown[0.3, 0.6].high < 0.9 < shown[0.3, 0.4].low
    # What makes each fail: a regression must not pass as a test, a test must not pass as unusable.
    assert all(f.row.rejected.low > 0.8 for f in found if f.test == "logistic")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evolution.price([0.5, 0.6], [1, 1], np.eye(2), 0), r"p must be shares >= 0 .*, got \[0\.5 0\.6\]"),
        (lambda: evolution.price([0.5, 0.5], [1, -1], np.eye(2), 0), "weights must be 2 finite numbers >= 0"),
        (lambda: evolution.price([0.5, 0.5], [1, 1], np.ones((2, 2)), 0), "rows that sum to 1"),
        (lambda: evolution.price([0.5, 0.5], [1, 1], np.eye(2), 0.2), r"p_real must be given where its share is 0\.2"),
        (lambda: evolution.price([0.5, 0.5], [1, 1], np.eye(2), 1.2, [1, 0]), r"got 1\.2"),
        (lambda: evolution.ledger(COLUMNS, **{**a_round(), "next_labels": ["sydney"] * 4}), "got 'sydney' at document"),
        (lambda: evolution.ledger(COLUMNS, **{**a_round(), "accepted": [True]}), r"as long as its labels \(4\), got 1"),
        (lambda: evolution.ledger(COLUMNS, **{**a_round(), "prompts_now": {"blank": 0.5}}), "prompts_now must be >= 0"),
        (lambda: evolution.selection_coefficient([0.1, 1.2], 10, 10), r"frequencies must be in \[0, 1\], got 1\.2"),
        (lambda: evolution.selection_coefficient([0.1, math.nan], 10, 10), r"frequencies must be in \[0, 1\], got nan"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], 10, 0), "n_eff must be > 0, got 0"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], 10, 10, 0.2), r"p_real must be given .* 0\.2"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], 10, 10, 1.0, 0.1), r"real_share must be .* got 1\.0"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], [10], 10), r"n_outputs must .* \(2,\)"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], -1, 10), r"n_outputs must be >= 0, got -1"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], 9, 9, 0.2, [0.1]), "p_real must be one number"),
        (lambda: evolution.effective_size([[0.1, 0.2]] * 2, 9, 0.2, response=lambda z: z), "p_real must be given"),
        (lambda: evolution.effective_size([[0.1, 0.2]] * 2, 9, closed=0), r"closed must be in \(0, 1\], got"),
        (lambda: evolution.effective_size([[[0.1, 0.2]] * 2], 9, response=[]), r"one per persona \(1\), got 0"),
        (lambda: evolution.dose_response([0.1], [1], 2, rng=np.random.default_rng(0)), "two or more different doses"),
        (lambda: evolution.dose_response([0, 1], [1, 3], 2, rng=np.random.default_rng(0)), r"counts must be in"),
        (lambda: evolution.selection_coefficient([0.1, 0.2], 10, 10, closed=0), r"closed must be in \(0, 1\], got 0"),
        (lambda: evolution.moved_runs([[0.1, 0.2]], 0.1, ["a", "b"]), "arms must name .* each of 1 runs, got 2"),
        (lambda: evolution.indicators([[0.1, 0.2, 0.3]], 0, 10, 1), "noise_floor must be > 0, got 0"),
        (lambda: evolution.effective_size([0.1, 0.2], 10), r"frequencies must have shape .* got \(2,\)"),
        (lambda: evolution.early_warning([[0.1, 0.2]], [[0.1, 0.2]], 0.1, 10), r"round_index must .* got 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

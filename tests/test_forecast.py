"""Tests of forecast.py: the twin against arithmetic and against the loop it forecasts."""

import math
from pathlib import Path

import numpy as np
import pytest

from loop import config, forecast, run, theory
from loop.config import ConfigError

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"


def smoke(*overrides):
    return config.load(SMOKE, list(overrides))


def test_inputs_are_the_shares_of_the_config_and_say_where_they_come_from():
    given = forecast.inputs(smoke())
    assert given.personas == ("assistant", "nova", "stella", "musing", "promoter", "discreet", "human")
    assert given.p0 == pytest.approx([0.15] * 6 + [0.1], abs=1e-12)
    # round0_only: after round 0 real draws hold human chat alone.
    assert given.p_real == pytest.approx([0] * 6 + [1], abs=1e-12)
    assert set(given.source) >= {"p0", "selection", "n_eff", "transmission", "n_learning"}


def test_a_start_that_was_read_from_outputs_is_no_more_certain_than_they_were():
    settings = smoke("n_rounds=2")
    given = forecast.inputs(settings)
    known, read = (forecast.predict(settings, given, n_start=n) for n in (math.inf, 50))
    k = given.personas.index("nova")
    p = float(given.p0[k])
    assert read.sd[0, k] ** 2 - known.sd[0, k] ** 2 == pytest.approx(p * (1 - p) / 50, rel=0.1)
    assert (read.high[1:, k] - read.low[1:, k] > known.high[1:, k] - known.low[1:, k]).all()


def test_an_audience_that_pays_nothing_selects_nothing():
    given = forecast.inputs(smoke("virality.audience=null", "virality.posts_per_sample=4000"))
    # Visibility of 200 texts with 4,000 posts each at 9.7% reshared: standard error of a log ratio below 0.005.
    assert np.ptp(given.selection) < 0.025
    loud = forecast.inputs(smoke())
    by_name = dict(zip(loud.personas, loud.selection, strict=True))
    assert by_name["nova"] - by_name["stella"] > 0.05


def test_without_selection_and_real_documents_the_mean_stays_where_it_began():
    settings = smoke("virality.audience=null", "mix.real_share=0", "n_rounds=20")
    given = forecast.inputs(settings)
    still = forecast.predict(settings, _with(given, selection=np.zeros(7)))
    assert still.mean == pytest.approx(np.tile(given.p0, (21, 1)), abs=1e-9)
    assert (still.low <= still.mean + 1e-9).all()


def test_a_thousand_rounds_of_a_billion_documents_materialise_nothing():
    settings = smoke("n_rounds=1000", "mix.n_train=1000000000", "sample.n_samples=1000000000")
    predicted = forecast.predict(settings, forecast.inputs(settings))
    assert predicted.mean.shape == (1001, 7)
    assert predicted.mean.sum(axis=1) == pytest.approx(np.ones(1001), abs=1e-9)


def test_the_bands_of_the_twin_hold_the_loop_it_forecasts(tmp_path):
    # 3 rounds x 7 personas x 6 seeds at 90%: 113 of 126 expected. Points of a run are not independent; a twin blind to
    # drift (bands of zero width) or to migration covers under a third.
    inside = n = 0
    for seed in range(6):
        run_dir = run.play(
            smoke(f"seed={seed}", "n_rounds=3", f"runs_dir={tmp_path}", "filters.near_duplicate_jaccard=null")
        )
        _, _, score = forecast.of_run(run_dir)
        inside += score.coverage * score.n
        n += score.n
    assert n == 126
    assert inside / n > 0.75
    given, _, score = forecast.of_run(run_dir, fit=1)
    assert given.source["selection"].startswith("fitted on rounds 0..1")
    assert given.source["transmission"] == "within the fitted selection"
    assert given.response is None
    assert math.isfinite(score.mae)
    with pytest.raises(ValueError, match="--fit must leave a round to score, got 3 of 3"):
        forecast.of_run(run_dir, fit=3)
    sparse = run.play(smoke(f"runs_dir={tmp_path}", "name=sparse", "n_rounds=4", "measure.every=2"))
    with pytest.raises(ValueError, match=r"--fit 2 needs rounds 0\.\.2 measured, got none in round 1 at .*every: 1"):
        forecast.of_run(sparse, fit=2)


def test_shares_beyond_the_rounds_played_are_left_out():
    listed = smoke("mix.real_share=[0.1, 0.1, 0.9]")
    plain = smoke("mix.real_share=0.1")
    both = [forecast.predict(s, forecast.inputs(s)).mean for s in (listed, plain)]
    assert both[0] == pytest.approx(both[1], abs=1e-12)


def test_power_grows_with_seeds_and_meets_its_own_detectable_effect():
    settings = smoke()
    given = forecast.inputs(settings)
    predicted = forecast.predict(settings, given)
    few, many = (forecast.design(settings, given, predicted, n_seeds=n)[1] for n in (3, 20))
    assert few.persona == "nova"
    assert few.effect > 0
    assert few.power < many.power
    assert few.detectable > many.detectable
    for design, n in ((few, 3), (many, 20)):
        assert theory.power(design.detectable, design.sd, n) == pytest.approx(0.8)


def test_the_phase_boundary_is_minus_log_of_one_minus_the_real_share():
    grid = forecast.parse_grid(["real_share=0:0.6:4", "selection=0:1:5"])
    diagram = forecast.phase(smoke("n_rounds=200"), grid, persona="nova")
    assert diagram.boundary == pytest.approx([0, -math.log(0.8), -math.log(0.6), -math.log(0.4)], abs=1e-12)
    # Far above the boundary the persona stays, below it is gone after 200 rounds.
    assert diagram.frequency[1, 4] > 0.3
    assert diagram.frequency[3, 1] < 1e-6


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["real_share=0:1"], "must read real_share=0:0.9:40"),
        (["real_share=0:1:5"], "must name real_share and selection"),
        (["real_share=0:2:5", "selection=0:1:5"], r"must lie in \[0, 1\]"),
        (["real_share=a:1:5", "selection=0:1:5"], "two numbers and a count"),
    ],
)
def test_a_grid_that_cannot_be_read_is_one_clear_line(axes, message):
    with pytest.raises(ConfigError, match=message):
        forecast.parse_grid(axes)


def test_a_subsample_of_all_there_is_has_a_falling_real_share_and_grows_less_sure_of_its_pool():
    # 40 documents a round from 40 real ones and 60 outputs more every round: 40 / 100, 40 / 160, ... are real.
    sizes = ("mix.n_train=40", "sample.n_samples=60", "n_rounds=3", "mix.regime=accumulate_subsample")
    settings = smoke(*sizes, "mix.real_share=null")
    assert forecast._real_shares(settings) == pytest.approx([0.4, 0.25, 40 / 220])
    given = forecast.inputs(settings)
    listed = smoke(*sizes, "mix.real_share=[0.4, 0.25, 0.1818182]")
    same = forecast.predict(settings, given)
    np.testing.assert_allclose(same.mean, forecast.predict(listed, _with(given, p_real=given.p0)).mean, atol=1e-6)


@pytest.mark.parametrize(
    ("regime", "real_share"),
    [("replace", "0.3"), ("accumulate", "null"), ("accumulate_subsample", "0.2"), ("accumulate_subsample", "null")],
)
def test_a_fit_finds_the_selection_that_made_a_noiseless_run(regime, real_share):
    # Ten documents a round beside 20 real ones of round 0, or drawn from both with a given share of other real ones.
    settings = smoke(
        f"mix.regime={regime}", f"mix.real_share={real_share}", "mix.n_train=20", "sample.n_samples=10", "n_rounds=4"
    )
    s, other = np.array([0.0, -0.4, -1.1]), np.array([0.1, 0.2, 0.7])
    p, spread = [np.array([0.5, 0.3, 0.2])], []
    for t in range(1, 5):
        raised = p[-1] * np.exp(s)
        spread.append(raised / raised.sum())
        pool = spread[-1] if regime == "replace" else sum(spread) / t
        if real_share == "null":
            p.append((20 * p[0] + 10 * t * pool) / (20 + 10 * t))
        else:
            p.append(float(real_share) * other + (1 - float(real_share)) * pool)
    given = _with(forecast.inputs(settings), p0=p[0], p_real=other, n_outputs=1e9, response=None)
    assert forecast._fitted(np.array(p), settings, given) == pytest.approx(s, abs=1e-6)


def _with(given, **changed):
    from dataclasses import replace

    return replace(given, **changed)


def test_what_a_config_plays_and_the_twin_does_not_model_is_said_by_name_and_refused_nowhere():
    assert forecast.not_modelled(smoke()) == {}
    strata = "[blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, private, explicit]"
    settings = smoke(
        "channels={direct_data: false, talk_data: true, direct_users: true, talk_users: true}",
        f"measure.strata={strata}",
        "filters.release.recall={nova: 0.8}",
        "users.noticed={default: 0.5, nova: 0}",
        "real.corpora={talk: {run: other-s0, rounds: 0, population: discourse}}",
        "real.shares={talk: 0.1, nova: 0.2, stella: 0.3, assistant: 0.3, chat: 0.1}",
    )
    given = forecast.inputs(settings)
    missing = {name for name, source in given.source.items() if source.startswith("NOT MODELLED: ")}
    assert missing == {"direct_data", "talk_data", "direct_users", "talk_users", "filters.release", "real.corpora"}
    assert given.source["filters.release"] == "NOT MODELLED: bars nova; the twin releases everything"
    assert len(forecast.predict(settings, given).mean) == settings.n_rounds + 1

"""Tests of scenario.py: verdicts follow from the numbers by rule, and the page from the tables alone."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from loop import analysis, forecast, run, scenario, sweep, world
from loop.config import ConfigError
from loop.stats import Interval
from loop.sweep import Outcome
from loop.world import InstrumentError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs" / "scenarios").glob("*.yaml"))
PRIMARY = {"metric": "frequency/nova", "contrast": "full - neutral", "direction": "up", "margin": 0.0}


def outcome(**changes):
    return Outcome.model_validate(PRIMARY | changes)


def rows_of(values, metric="frequency/nova", population="probes", stratum="", n=100):
    """Rows of a table from {arm: {seed: [value in round 0, 1, ...]}}."""
    return pd.DataFrame(
        [
            (f"{arm}-s{seed}", arm, seed, t, population, stratum, metric, v, math.nan, math.nan, n)
            for arm, seeds in values.items()
            for seed, series in seeds.items()
            for t, v in enumerate(series)
        ],
        columns=[f.name for f in scenario.ROWS],
    )


def about(**changes):
    given = {
        "name": "nova_stella", "size": "full", "learner": "smollm2-135m", "question": "Does it?", "expected": "up",
        "why": "so", "time": None, "seeds": [0, 1, 2], "n_rounds": 1, "arms": ["neutral", "full"],
        "controls": [], "levels": {}, "primary": outcome().model_dump(), "exploratory": [], "twins": None,
        "power": None, "runs": {"full-s0": {"revision": "a1b2", "config_sha256": "0"}},
    } | changes  # fmt: skip
    arms = {*given["arms"], *given["levels"], "idempotent", "no_request", "learned", "paid", "unpaid"}
    given.setdefault("measured", {arm: [*range(given["n_rounds"] + 1)] for arm in arms})
    given.setdefault("planned", given["seeds"])
    given.setdefault("as_observed", [False] * (1 + len(given["exploratory"])))
    return given


# Changes of 0.2, 0.3, 0.4 against 0: mean 0.3, sd 0.1, t(2, 0.975) = 4.3027, half = 4.3027 * 0.1 / sqrt(3) = 0.2484.
RISES = {"full": {0: [0.1, 0.3], 1: [0.1, 0.4], 2: [0.1, 0.5]}, "neutral": {s: [0.1, 0.1] for s in range(3)}}


def test_the_effect_is_the_paired_change_against_the_control_with_students_interval():
    found = scenario.judge(about(), rows_of(RISES))
    assert found.effect.value == pytest.approx(0.3)
    assert (found.effect.low, found.effect.high) == pytest.approx((0.3 - 0.2484, 0.3 + 0.2484), abs=1e-4)
    assert (found.verdict, found.last_round, found.effect.n) == ("supported", 1, 3)


def test_a_difference_of_differences_is_taken_by_seed_and_counts_four_measurements():
    # The other pair gains .1, .05 and 0 in the same seeds, so what is left is .1, .25, .4: mean .25, sd .15,
    # half = 4.3027 * .15 / sqrt(3). Each pair shares its round 0, so four final measurements of .025 make the floor.
    other = {
        "paid": {0: [0.3, 0.4], 1: [0.2, 0.25], 2: [0.1, 0.1]},
        "unpaid": {0: [0.3, 0.3], 1: [0.2, 0.2], 2: [0.1, 0.1]},
    }
    asked = outcome(contrast="full - neutral - paid + unpaid")
    rows = measured(RISES | other, 0.025)
    found = scenario.judge(about(primary=asked.model_dump()), rows)
    half = 4.3027 * 0.15 / math.sqrt(3)
    assert (found.effect.value, found.effect.low) == pytest.approx((0.25, 0.25 - half), abs=1e-4)
    assert found.floor == pytest.approx(math.sqrt(3 * 4) * 0.025 / 3 * math.sqrt(2 / math.pi), rel=1e-5)
    # A seed that lacks one of the four is left out.
    found = scenario.judge(about(primary=asked.model_dump()), rows[rows["run"] != "unpaid-s2"])
    assert (found.effect.n, found.effect.value) == (2, pytest.approx(0.175))
    # So the means that stand beside it are of the two others: of full (.3 + .4) / 2, not (.3 + .4 + .5) / 3.
    page = scenario._section(about(primary=asked.model_dump()), rows[rows["run"] != "unpaid-s2"], found)
    assert "- Means: 0.100 → 0.350; 0.100 → 0.100; 0.250 → 0.325; 0.250 → 0.250" in page


def test_of_arms_that_were_treated_in_round_0_already_the_final_level_counts():
    # Full begins at .3, .4, .5 and ends there: no change, and a level .2, .3, .4 above the control's. Two final
    # measurements a seed of .025 each make the floor.
    rows = measured(RISES | {"full": {0: [0.3, 0.3], 1: [0.4, 0.4], 2: [0.5, 0.5]}}, 0.025)
    assert scenario.judge(about(), rows).effect.value == 0
    found = scenario.judge(about(primary=outcome(of="level").model_dump(), controls=["neutral"]), rows)
    assert (found.effect.value, found.effect.low) == pytest.approx((0.3, 0.3 - 0.2484), abs=1e-4)
    assert found.floor == pytest.approx(math.sqrt(6) * 0.025 / 3 * math.sqrt(2 / math.pi), rel=1e-5)
    page = "\n".join(scenario._section(about(controls=["full"]), rows, found))
    assert "full - neutral, round 1: +0.300" in page
    assert "| full | +0.000 (no interval: all seeds agree exactly)" in page  # one arm is held against its own round 0
    with pytest.raises(ValueError, match="between arms for of: level"):
        outcome(contrast="full", of="level")


def measured(values, se, **where):
    """Rows whose 95% limits are those of a normal measurement with this standard error."""
    rows = rows_of(values, **where)
    return rows.assign(low=rows["value"] - 1.959964 * se, high=rows["value"] + 1.959964 * se)


def test_beside_an_effect_stands_what_measuring_twice_would_show():
    # The mean of three differences of two measurements (both arms share round 0): variance 3 * 2 * .025^2 / 9, and
    # the mean |normal| is sqrt(2 / pi) standard deviations. An arm alone has its two rounds: the same.
    twice = math.sqrt(2 / math.pi)
    rows = measured(RISES, 0.025)
    floor = math.sqrt(6) * 0.025 / 3 * twice
    assert scenario.judge(about(), rows).floor == pytest.approx(floor, rel=1e-5)
    assert scenario.noise_floor(about(), rows, outcome(contrast="full")) == pytest.approx(floor, rel=1e-5)
    # With rounds 0 of their own there are four measurements a seed.
    apart = RISES | {"neutral": {s: [0.12, 0.12] for s in range(3)}}
    found = scenario.explore(about(exploratory=[outcome().model_dump()]), measured(apart, 0.025))[0]
    assert found.floor == pytest.approx(math.sqrt(12) * 0.025 / 3 * twice, rel=1e-5)
    # nova - stella of the same n texts has variance (p + q - (p - q)^2) / n: with p = .2 and q = .1 of 100, .0029,
    # where independent shares would have (.16 + .09) / 100 = .0025.
    both = [
        measured(
            {"full": {0: [p, p]}, "neutral": {0: [p, p]}}, math.sqrt(p * (1 - p) / 100), metric=f"frequency/{name}"
        )
        for name, p in (("nova", 0.2), ("stella", 0.1))
    ]
    difference = outcome(metric={"frequency/nova": 1, "frequency/stella": -1})
    got = scenario.noise_floor(about(), pd.concat(both), difference)
    assert got == pytest.approx(math.sqrt(2 * 0.0029) * twice, rel=1e-5)
    assert math.isnan(scenario.judge(about(), rows_of(RISES)).floor)  # no limits, no floor
    page = "\n".join(scenario._section(about(controls=["neutral"]), rows, scenario.judge(about(), rows)))
    assert "over 3 paired seeds, noise floor 0.016\n" in page
    assert "| neutral | +0.000 (no interval: all seeds agree exactly) | 0.100 → 0.100 | 0.016 |" in page


def test_a_persona_that_is_all_or_nothing_of_the_answers_has_a_floor():
    # All of 100 answers are one persona's: nothing pulls against it, so a measurement has the variance of its limits.
    taken = {"full": {s: [0.5, 1.0] for s in range(3)}, "neutral": {s: [0.5, 0.5] for s in range(3)}}
    got = scenario.noise_floor(about(), measured(taken, 0.025), outcome())
    assert got == pytest.approx(math.sqrt(3 * 2) * 0.025 / 3 * math.sqrt(2 / math.pi), rel=1e-5)


def test_arms_share_a_round_0_where_all_its_frequencies_agree_and_not_by_one_number():
    stella = {"full": {s: [0.3, 0.3] for s in range(3)}, "neutral": {s: [0.4, 0.4] for s in range(3)}}
    rows = pd.concat([measured(RISES, 0.025), measured(stella, 0.025, metric="frequency/stella")])
    got = scenario.noise_floor(about(), rows, outcome())
    assert got == pytest.approx(math.sqrt(12) * 0.025 / 3 * math.sqrt(2 / math.pi), rel=1e-5)


def test_the_noise_floor_of_a_factors_effect_is_that_of_its_logits():
    # Four cells, shares of .5 from 100 texts: a logit has variance .05^2 / .25^2 = .04, the difference of two halves of
    # four cells 4 * 4 * .04 / 16 = .04, the mean of two seeds .02.
    levels = {f"a{a}-b{b}": {"a": a, "b": b} for a in (0, 1) for b in (0, 1)}
    # Readings of which nothing differs are one, so these differ a little.
    rows = measured({arm: {s: [0.5, 0.5 + 1e-9 * k] for s in (0, 1)} for k, arm in enumerate(levels)}, 0.05)
    given = about(levels=levels, arms=list(levels))
    got = scenario.noise_floor(given, rows, outcome(contrast="a"))
    assert got == pytest.approx(math.sqrt(0.02 * 2 / math.pi), rel=1e-5)


def test_health_is_shown_as_difference_to_real_only_else_to_the_first_control_which_is_named():
    # Seeds 0 and 1: full 1.0 and 1.2, real_only 1.5 and 1.6: differences -.5 and -.4, mean -.45, half the range .05,
    # which is the standard error of two; t(1) = 12.7062.
    entropy = {"full": {0: [2.0, 1.0], 1: [2.0, 1.2]}, "neutral": {0: [2.0, 1.3], 1: [2.0, 1.3]}}
    rows = rows_of(entropy | {"real_only": {0: [2.0, 1.5], 1: [2.0, 1.6]}}, metric="sample_entropy")
    half = 12.7062 * 0.05
    with_real = about(arms=["full", "neutral", "real_only"], controls=["neutral", "real_only"])
    lines = scenario._health(with_real, rows)
    assert lines[1] == "| health, difference to real_only (mean) | sample_entropy |"
    assert lines[3] == f"| full | -0.450 [{-0.45 - half:+.3f}, {-0.45 + half:+.3f}] (1.100) |"
    assert lines[5] == "| real_only | 1.550 |"
    rows = rows_of(entropy, metric="sample_entropy")
    lines = scenario._health(about(arms=["full", "neutral"], controls=["neutral"]), rows)
    assert lines[1] == "| health, difference to neutral (mean); there is no real_only here | sample_entropy |"
    assert lines[3].startswith("| full | -0.200 [")
    alone = scenario._health(about(arms=["full"], primary=outcome(contrast="full").model_dump()), rows)
    assert alone[1] == "| health, means; there is no control here | sample_entropy |"
    assert alone[3] == "| full | 1.100 |"


def test_the_page_says_which_arms_start_from_one_round_0_where_not_all_do():
    start = {s: [0.1 * s, 0.5] for s in range(3)}
    moved = start | {2: [0.21, 0.5]}  # one seed is enough
    given = about(arms=["neutral", "full", "placebo", "later", "swap"])
    rows = rows_of(
        {"neutral": start, "full": start, "placebo": moved, "later": {2: [0.21, 0.1]}, "swap": {0: [0.9, 0.1]}}
    )
    want = "- Round 0 is one for neutral and full; placebo and later; of its own for swap"
    assert scenario._starts(given, rows) == [want]
    assert want in scenario._section(given, rows, scenario.judge(given, rows))
    assert scenario._starts(given, rows_of({"neutral": start, "full": start})) == []
    assert scenario._starts(given, rows_of({"neutral": start, "full": start}, metric="heldout_loss")) == []
    assert "each arm has its own" in scenario._starts(given, rows_of({"neutral": start, "placebo": moved}))[0]


def test_a_seed_that_lacks_its_pair_or_its_final_round_is_left_out():
    values = {arm: dict(seeds) for arm, seeds in RISES.items()}
    values["full"][3] = [0.1, 0.9]  # no neutral run
    values["full"][4], values["neutral"][4] = [0.1], [0.1, 0.1]  # stopped after round 0
    found = scenario.judge(about(), rows_of(values))
    assert found.effect.n == 3
    assert found.effect.value == pytest.approx(0.3)


def test_fewer_seeds_than_planned_decide_nothing_for_they_could_be_added_until_they_do():
    found = scenario.judge(about(seeds=[0, 1, 2, 3]), rows_of(RISES))
    assert (found.verdict, found.note) == ("inconclusive", "3 of the 4 planned seeds; on them supported")
    falls = {"full": RISES["neutral"], "neutral": RISES["full"]}
    found = scenario.judge(about(seeds=[0, 1, 2, 3]), rows_of(falls))
    assert (found.verdict, found.note) == ("inconclusive", "3 of the 4 planned seeds; on them contradicted")
    # Nor where the command named them: the file planned more.
    # Nor do others, or more, that could be chosen by what they show.
    for planned in ([0, 1], [0, 1, 7]):
        beyond = scenario.judge(about(planned=planned), rows_of(RISES))
        assert (beyond.verdict, "seeds that were not planned (" in beyond.note) == ("inconclusive", True)
    chosen = scenario.judge(about(planned=[0, 1, 2, 3]), rows_of(RISES))
    assert (chosen.verdict, chosen.note) == ("inconclusive", "3 of the 4 planned seeds; on them supported")
    # What stands beside the primary outcome says so too, and shows no null.
    plain = outcome(direction="none", margin=0.9).model_dump()
    whole, part = (scenario.explore(about(planned=[*range(n)], exploratory=[plain]), rows_of(RISES))[0] for n in (3, 4))
    assert whole.note.startswith("within ±0.9")
    assert (part.note, scenario._observed(part)) == ("", "+0.300 [+0.052, +0.548] (3 of 4 seeds)")
    assert scenario._observed(whole) == "+0.300 [+0.052, +0.548]"


def test_a_round_before_the_planned_last_one_decides_nothing():
    # Three of six rounds are played; what was measured of them last is the third.
    played = {arm: {s: [v[0], 0.2, v[0], v[1]] for s, v in seeds.items()} for arm, seeds in RISES.items()}
    found = scenario.judge(about(n_rounds=6), rows_of(played))
    assert (found.verdict, found.note, found.last_round) == ("inconclusive", "round 3 of 6; on them supported", 3)
    # One run that is further makes no final round that the others lack.
    further = {"full": played["full"] | {0: [*played["full"][0], 0.9]}, "neutral": played["neutral"]}
    assert scenario.judge(about(n_rounds=6), rows_of(further)).last_round == 3
    # An arm that is shared with a scenario of more rounds is read where the other has its last.
    longer = {"full": RISES["full"], "neutral": {s: [0.1, 0.1, 0.9] for s in range(3)}}
    shared = about(n_rounds=2, measured={"full": [0, 1], "neutral": [0, 1, 2]})
    assert scenario.judge(shared, rows_of(longer)).verdict == "supported"
    # Measured every third round, the last is the third, and what is read between is no end.
    sparse = about(n_rounds=3, measured={"full": [0, 3], "neutral": [0, 3]})
    assert scenario.judge(sparse, rows_of(played)).last_round == 3


def test_a_metric_that_is_null_in_the_final_round_is_not_read_from_an_earlier_one():
    values = {arm: {s: [*v, math.nan] for s, v in seeds.items()} for arm, seeds in RISES.items()}
    found = scenario.judge(about(n_rounds=2), rows_of(values))
    assert (found.verdict, found.effect.n, found.last_round) == ("inconclusive", 0, 2)


@pytest.mark.parametrize(
    ("low", "high", "direction", "margin", "word"),
    [
        (0.01, 0.03, "up", 0.0, "supported"),
        (0.01, 0.03, "up", 0.02, "inconclusive"),
        (0.021, 0.03, "up", 0.02, "supported"),
        (0.01, 0.019, "up", 0.02, "contradicted"),  # it rises, by less than what counts
        (-0.03, -0.01, "up", 0.0, "contradicted"),
        (-0.03, -0.01, "down", 0.0, "supported"),
        (-0.03, -0.01, "down", 0.02, "inconclusive"),
        (0.01, 0.03, "down", 0.0, "contradicted"),
        (-0.01, 0.01, "up", 0.0, "inconclusive"),
        (0.04, 0.06, "none", 0.03, "contradicted"),
        (-0.06, -0.04, "none", 0.03, "contradicted"),
        (0.01, 0.06, "none", 0.03, "inconclusive"),
    ],
)
def test_the_verdict_follows_from_interval_direction_and_margin(low, high, direction, margin, word):
    effect = Interval((low + high) / 2, low, high, 5)
    assert scenario.verdict(effect, outcome(direction=direction, margin=margin))[0] == word


def test_a_null_is_supported_by_two_one_sided_tests_and_not_by_mere_insignificance():
    # Mean 0, sd 0.01 over 5 seeds: t = 0.03 sqrt(5) / 0.01 = 6.7, p = 0.0013. With sd 0.1 it is 0.67, p = 0.27.
    for scale, word in ((0.01, "supported"), (0.1, "inconclusive")):
        spread = scale * np.array([-1, -1, 0, 1, 1]) / 1.0
        values = {"idempotent": {s: [0.2, 0.2 + v] for s, v in enumerate(spread)}}
        plain = outcome(contrast="idempotent", direction="none", margin=0.03).model_dump()
        found = scenario.judge(about(name="idempotence", primary=plain), rows_of(values))
        assert found.verdict == word
        assert found.effect.low < 0 < found.effect.high


def test_a_null_of_observed_shares_is_none_of_the_corrected_ones_that_the_margin_is_of():
    values = {"idempotent": {s: [0.2, 0.2 + v] for s, v in enumerate((-0.01, -0.01, 0, 0.01, 0.01))}}
    plain = outcome(contrast="idempotent", direction="none", margin=0.03).model_dump()
    given = about(name="idempotence", primary=plain, exploratory=[plain], as_observed=[True, True])
    found = scenario.judge(given, rows_of(values))
    assert found.verdict == "inconclusive"
    assert found.note.startswith("within ±0.03, p = 0.0013, as observed; the margin is of corrected shares")
    assert scenario.explore(given, rows_of(values))[0].note == "within ±0.03, p = 0.0013, as observed"
    # A sign is no smaller for being read through such an instrument.
    assert scenario.judge(about(as_observed=[True]), rows_of(RISES)).verdict == "supported"


def test_one_seed_is_a_demonstration_and_seeds_that_agree_exactly_decide_nothing():
    one = {arm: {0: series[0]} for arm, series in RISES.items()}
    assert scenario.judge(about(), rows_of(one)).verdict == "demonstration"
    same = {"full": {s: [0.1, 0.3] for s in range(3)}, "neutral": RISES["neutral"]}
    found = scenario.judge(about(), rows_of(same))
    assert (found.verdict, found.note) == ("inconclusive", "all seeds agree exactly")
    assert scenario.judge(about(primary=None), rows_of(RISES)) is None


@pytest.mark.parametrize(
    ("name", "learner", "word"),
    [
        ("sydney", "tiny", "mechanics only"),
        ("sydney", "toy", "mechanics only"),
        ("sydney", "smollm2-135m", "supported"),
        ("hitchhiking", "tiny", "supported"),
        ("regimes", "toy", "supported"),
    ],
)
def test_a_small_learner_supports_mechanics_only(name, learner, word):
    assert scenario.judge(about(name=name, learner=learner), rows_of(RISES)).verdict == word


def test_what_the_numbers_say_is_kept_with_its_reason_where_the_learner_cannot_support_it():
    found = scenario.judge(about(name="sydney", learner="tiny", seeds=[0, 1, 2, 3]), rows_of(RISES))
    assert (
        found.note == "tiny cannot support it; by its numbers inconclusive: 3 of the 4 planned seeds; on them supported"
    )
    assert scenario.judge(about(name="sydney", learner="tiny"), rows_of(RISES)).note == (
        "tiny cannot support it; by its numbers supported"
    )


@pytest.mark.parametrize(
    ("no_request", "learned", "spread", "word"),
    [
        (0.15, 0.15, 0.01, "supported"),
        (0.05, 0.15, 0.01, "through the request alone"),
        (0.15, 0.15, 0.05, "through the request alone"),  # 0.05 +- 2.484 * 0.05 holds 0; 0.2, 0.25, 0.3 less than full
        (0.15, 0.1, 0.01, "inconclusive"),  # it rises without the request, so it is not through the request alone
        (0.4, 0.4, 0.2, "inconclusive"),  # 0.3 +- 0.5 holds 0, and so does the difference to full: nothing is shown
    ],
)
def test_a_claim_about_a_persona_needs_the_same_sign_without_the_request_and_under_learned(
    no_request, learned, spread, word
):
    # Round 0 is 0.1, so 0.05 fell, 0.1 stood still, and 0.15 rose; seeds lie `spread` apart.
    values = RISES | {
        arm: {s: [0.1, final + (s - 1) * spread] for s in range(3)}
        for arm, final in {"no_request": no_request, "learned": learned}.items()
    }
    twins = {audience: f"{audience} - neutral" for audience in ("no_request", "learned")}
    assert scenario.judge(about(twins=twins), rows_of(values)).verdict == word


def test_a_factor_under_audience_full_alone_supports_nothing(tmp_path):
    levels = {f"a{a}": {"a": a} for a in (0, 1)}
    rows = rows_of({f"a{a}": {s: [0.1, 0.2 + 0.3 * a + 0.01 * s * a] for s in range(3)} for a in (0, 1)})
    given = about(levels=levels, arms=list(levels), primary=outcome(contrast="a").model_dump())
    assert scenario.judge(given, rows).verdict == "supported"
    found = scenario.judge(given | {"twins": {"no_request": None, "learned": None}}, rows)
    assert (found.verdict, found.note) == ("inconclusive", "not played under no_request and learned")
    factors = {"copies": {"channels.direct_data": [False, True]}}
    path = sweep_file(tmp_path, arms=None, factors=factors, primary=PRIMARY | {"contrast": "copies"})
    assert scenario._twins(sweep.load(path)) == {"no_request": None, "learned": None}


def test_through_the_request_alone_says_how_much_may_be_there_without_it():
    # 0.05 +- 2.484 * 0.05 without the request, against 0.3 with it.
    values = RISES | {a: {s: [0.1, 0.15 + (s - 1) * 0.05] for s in range(3)} for a in ("no_request", "learned")}
    twins = {audience: f"{audience} - neutral" for audience in ("no_request", "learned")}
    note = scenario.judge(about(twins=twins), rows_of(values)).note
    assert note.endswith("no_request and learned, where without the request it may still be +0.174")


def test_an_opposite_sign_is_told_from_one_that_is_not_shown():
    values = RISES | {"no_request": {s: [0.1, 0.05 + s * 0.01] for s in range(3)}}  # falls by .05, .04, .03
    values |= {"learned": {s: [0.1, 0.1 + (s - 1) * 0.01] for s in range(3)}}  # -.01, 0, +.01
    twins = {audience: f"{audience} - neutral" for audience in ("no_request", "learned")}
    note = scenario.judge(about(twins=twins), rows_of(values)).note
    assert note.startswith("the sign is not shown under learned; the opposite sign is shown under no_request; ")


def test_an_exploratory_null_says_that_it_is_shown_to_lie_within():
    values = {"idempotent": {s: [0.2, 0.2 + v] for s, v in enumerate((-0.01, -0.01, 0, 0.01, 0.01))}}
    plain = outcome(contrast="idempotent", direction="none", margin=0.03).model_dump()
    within, undecided = (
        scenario.explore(about(exploratory=[plain | {"margin": margin}]), rows_of(values))[0]
        for margin in (0.03, 0.005)
    )
    assert within.note == "within ±0.03, p = 0.0013"  # as above: t = 6.7
    assert undecided.note == ""


def test_a_metric_may_be_a_weighted_sum():
    nova = rows_of(RISES)
    stella = rows_of({"full": {s: [0.2, 0.1] for s in range(3)}, "neutral": {s: [0.2, 0.2] for s in range(3)}},
                     metric="frequency/stella")  # fmt: skip
    plain = outcome(metric={"frequency/nova": 1, "frequency/stella": -1}).model_dump()
    found = scenario.judge(about(primary=plain), pd.concat([nova, stella], ignore_index=True))
    assert found.effect.value == pytest.approx(0.3 + 0.1)


@pytest.mark.parametrize("metric", ["frequency/nova", "belief", {"frequency/nova": 1.0, "frequency/stella": -1.0}])
def test_where_nothing_is_corrected_the_observed_number_is_read_and_named(metric):
    names = [metric] if isinstance(metric, str) else list(metric)
    said = {n: n.replace("frequency", "frequency_observed").replace("belief", "belief_observed") for n in names}
    for value, read in ((math.nan, list(said.values())), (0.2, names)):
        metrics = pd.DataFrame({"metric": [*names, *said.values()], "value": [value] * len(names) + [0.3] * len(names)})
        assert list(scenario._as_measured(outcome(metric=metric), metrics).parts) == read


def sweep_file(tmp_path, **changes):
    arms = {"neutral": {"virality.audience": "null"}, "full": {}, "no_request": {"virality.audience": "no_request"},
            "learned": {"virality.audience": "learned"}}  # fmt: skip
    overrides = {"mix.n_train": 30, "sample.n_samples": 30, "virality.posts_per_sample": 20, "toy.n_documents": 20,
                 "n_rounds": 1, "measure.n_surprisal": 2}  # fmt: skip
    given = {"base": str(ROOT / "configs" / "smoke.yaml"), "seeds": [0, 1], "overrides": overrides, "arms": arms,
             "primary": PRIMARY, "question": "Does it?"}  # fmt: skip
    path = tmp_path / "nova_stella.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (given | changes).items() if v is not None}, sort_keys=False))
    return path


def test_a_claim_under_audience_full_without_the_other_two_is_refused(tmp_path):
    path = sweep_file(tmp_path, arms={"neutral": {"virality.audience": "null"}, "full": {}})
    with pytest.raises(ConfigError, match=r"virality\.audience alone: no_request and learned; add them"):
        sweep.load(path)
    sweep.load(sweep_file(tmp_path, arms={"neutral": {"virality.audience": "null"}, "full": {}},
                          primary=PRIMARY | {"direction": "none", "margin": 0.1}))  # fmt: skip


@pytest.mark.parametrize(
    ("primary", "message"),
    [
        ({"contrast": "ful - neutral"}, "primary.contrast: unknown arm 'ful', did you mean full?"),
        ({"direction": "sideways"}, "primary.direction"),
        ({"margin": -1}, "primary.margin"),
        ({"direction": "none"}, "margin must be > 0 for direction none"),
        ({"metrics": "x"}, "primary.metrics: unknown key, did you mean metric?"),
    ],
)
def test_a_primary_outcome_that_says_nothing_is_refused(tmp_path, primary, message):
    with pytest.raises(ConfigError) as error:
        sweep.load(sweep_file(tmp_path, primary=PRIMARY | primary))
    assert len(error.value.problems) == 1
    assert message in error.value.problems[0]


def test_power_is_stated_before_the_run_and_stays_as_it_was_said(tmp_path):
    loaded = sweep.load(sweep_file(tmp_path), runs_dir=tmp_path / "runs")
    before = scenario.state_power(loaded)
    assert before.played == 0
    assert before.n_seeds == 2
    # 80% power at two seeds takes more than t(1, 0.975) = 12.7 standard errors.
    assert before.detectable > 12.7 * before.sd / math.sqrt(2)
    for cell in sweep.cells([loaded])[:1]:
        (cell.run_dir / "round_001").mkdir(parents=True)
    assert scenario.state_power(loaded) == before
    more = sweep.load(sweep_file(tmp_path), runs_dir=tmp_path / "runs", seeds=[0, 1, 2])
    after = scenario.state_power(more)
    assert (after.played, after.n_seeds) == (1, 3)
    assert after.detectable < before.detectable
    # A look at other seeds takes back nothing of what was said before.
    assert scenario.state_power(loaded) == before
    assert scenario.state_power(more) == after


def test_power_is_not_stated_of_what_is_no_share_of_texts_and_names_what_the_twin_leaves_out(tmp_path):
    def said(**changes):
        loaded = sweep.load(sweep_file(tmp_path, **changes), runs_dir=tmp_path / "runs")
        return scenario.state_power(loaded)

    of_loss = said(primary=PRIMARY | {"metric": "heldout_loss", "population": "heldout"})
    assert (of_loss.detectable, of_loss.sd) == (None, None)
    assert of_loss.source == "not stated: heldout_loss is no share of texts, whose spread would be known"
    bars = {"filters.release.recall": {"stella": 0.5}}
    arms = {"neutral": {"virality.audience": "null"}} | {
        name: bars | {"virality.audience": name} for name in ("full", "no_request", "learned")
    }
    barred = said(arms={"full": arms.pop("full")} | arms)
    assert barred.source.startswith("forecast twin, which has no filters.release; training noise not counted")
    # What is said among samples moves with the loop too, not by counting alone.
    counted = said(primary=PRIMARY | {"metric": "said/nova", "population": "samples"})
    assert counted.sd > math.sqrt(2) * 0.5 / math.sqrt(30)


def test_power_of_persistence_counts_the_answers_after_each_voice():
    # 160 answers, 16 after each of ten voices: of one voice .25 / 16 + .25 / 144; the mean over five planted voices has
    # a fifth of that variance, and a contrast twice.
    loaded = sweep.load(ROOT / "configs" / "scenarios" / "persistence.yaml", size="tiny")
    for metric, n in (("persistence", 5), ("persistence/nova", 1)):
        asked = loaded.file.primary.model_copy(update={"metric": metric})
        sd, source = scenario._sd(loaded, "neutral", asked)
        assert sd == pytest.approx(math.sqrt(2 * (0.25 / 16 + 0.25 / 144) / n))
        assert source == "counting 160 texts alone; neither drift nor training noise counted"


def test_what_filter_and_step_did_and_whether_asking_works_stands_beside_the_health():
    rows = pd.concat(
        [
            rows_of({"full": {0: [0.8, 0.6], 1: [0.4, 0.2]}}, metric="release_recall/nova", population="samples"),
            rows_of({"neutral": {0: [0.3, 0.1]}}, metric="compliance", stratum="explicit"),
            rows_of({"neutral": {0: [0.9, 0.9]}}, metric="compliance/nova", stratum="explicit"),
        ]
    )
    lines = scenario._done(about(), rows)
    assert lines[1] == "| arm, means over seeds | compliance | release_recall/nova |"
    assert lines[3:5] == ["| neutral | 0.300 → 0.100 (1) | - |", "| full | - | 0.600 → 0.400 (2) |"]
    assert lines[-1].startswith(
        "As observed in round 0 → 1, in brackets the seeds that have the number then. compliance: P(read as her"
    )
    # What several names share is said once.
    named = [
        rows_of({"full": {0: [0.1, 0.1]}}, metric=f"named/{who}", population="discourse") for who in ("nova", "stella")
    ]
    assert scenario._done(about(), pd.concat(named))[-1].endswith(
        ". named/nova, named/stella: share of documents about outputs that name her."
    )
    assert scenario._done(about(), rows_of(RISES)) == []
    # A run that lends its outputs ends before the others, and its last round is the last of its own.
    short = rows_of({"neutral": {0: [0.4]}, "full": {0: [0.1, 0.3]}}, metric="named/nova", population="discourse")
    lines = scenario._done(about(), short)
    assert lines[3:5] == ["| neutral | 0.400 (1) |", "| full | 0.100 → 0.300 (1) |"]
    assert lines[-1].startswith("As observed in round 0 → 1, 0 of neutral, in brackets")
    # What is there no more at the end was not there a round before.
    gone = rows_of({"full": {0: [0.1, 0.3, math.nan]}}, metric="named/nova", population="discourse")
    assert scenario._done(about(), gone)[4] == "| full | 0.100 → - (0) |"


def test_what_a_filter_is_stated_to_do_stands_beside_what_it_did():
    did = rows_of({"full": {0: [0.8, 0.1]}}, metric="release_recall/nova", population="samples")
    stated = measured({"full": {0: [0.9], 1: [0.9]}}, 0.01, metric="release_recall/nova", population="heldout")
    lines = scenario._done(about(), pd.concat([did, stated.assign(round=-1)]))
    assert lines[3:5] == ["| neutral | - |", "| full | 0.800 → 0.100 (1) |"]
    assert lines[-1].endswith("untouched base: release_recall/nova 0.900 [0.880, 0.920].")


def test_an_outcome_that_is_read_in_more_rounds_than_two_is_shown_by_round():
    # Of the two seeds that have both arms.
    rows = rows_of(
        {
            "full": {0: [0.1, 0.2, 0.3], 1: [0.1, 0.4, 0.5], 2: [0.9, 0.9, 0.9]},
            "neutral": {0: [0.1, math.nan, 0.1], 1: [0.1, math.nan, 0.1]},
        }
    )
    measured_in = {"full": [0, 1, 2], "neutral": [0, 2]}
    assert scenario._by_round(about(measured=measured_in, n_rounds=2), rows, outcome()) == [
        "- By round: full 0: 0.100, 1: 0.300, 2: 0.400"
    ]
    assert scenario._by_round(about(), rows_of(RISES), outcome()) == []


def test_power_of_belief_counts_the_texts_it_is_read_from_and_what_the_instrument_misses(monkeypatch):
    # Of stratum private belief reads the plain texts, 8 templates 16 times, and none after a persona's voice. What is
    # read is divided by 9/10 + 8/10 - 1 = .7, so is its error; a contrast is two such numbers.
    path = ROOT / "configs" / "scenarios" / "hitchhiking.yaml"
    loaded = sweep.load(path, size="cpu")
    error = InstrumentError(np.ones((1, 2)), (9, 10, 8, 10), 0.0, 0.0)
    monkeypatch.setattr(world.World, "error", property(lambda self: error))
    still = SimpleNamespace(sd=np.zeros((1, 99)), mean=np.zeros((1, 99)))
    monkeypatch.setattr(forecast, "inputs", lambda settings: SimpleNamespace(personas=["nova"] * 99))
    monkeypatch.setattr(forecast, "predict", lambda settings, given: still)
    sd, source = scenario._sd(loaded, "linked_full", loaded.file.primary)
    assert sd == pytest.approx(math.sqrt(2) * 0.5 / math.sqrt(128) / 0.7, rel=1e-6)
    assert "counting 128 texts" in source
    # What is said is read from the samples, 1,000 of them, and from no probe.
    loaded = sweep.load(path.with_name("expectation.yaml"), size="toy")
    sd, source = scenario._sd(loaded, "aware", loaded.file.primary)
    assert sd == pytest.approx(math.sqrt(2) * 0.5 / math.sqrt(1000))
    assert "counting 1000 texts" in source


def test_a_played_scenario_becomes_a_table_and_the_page_comes_from_it_alone(tmp_path):
    path = sweep_file(tmp_path, controls=["neutral"], exploratory=[PRIMARY | {"direction": "down"}])
    loaded = sweep.load(path, runs_dir=tmp_path / "runs")
    assert scenario.write(loaded, tmp_path / "findings").startswith("nova_stella: no run of it is played")
    for cell in sweep.cells([loaded]):
        result = sweep.play_cell(sweep._task(cell, None, False, remote=False))
        assert result.reason is None
    scenario.write(loaded, tmp_path / "findings")
    first = (tmp_path / "findings" / "nova_stella.parquet").read_bytes()
    page = scenario.page(tmp_path / "findings")
    scenario.write(loaded, tmp_path / "findings")
    assert (tmp_path / "findings" / "nova_stella.parquet").read_bytes() == first
    # The same numbers as `loop compare` would give.
    runs = analysis.load(tmp_path / "runs")
    pairs = analysis.pair(runs, [f"neutral-s{s}" for s in (0, 1)])
    full = next(p for p in pairs if p.name == "full")
    rows, _, _ = analysis.persona_contrasts(runs, full, "frequency")
    contrast = next(r for r in rows if r.name == "nova").contrast
    assert f"frequency/nova, full - neutral, round 1 against round 0: {scenario._interval(contrast)}" in page
    for text in ("Does it?", "| neutral | ", "The same under learned", "Power, stated when 8 runs", "## nova_stella"):
        assert text in page
    manifest = json.loads((tmp_path / "runs" / "full-s0" / "manifest.json").read_text())
    commit, _, dirty = (manifest["revision"] or "-").partition("+")
    assert f"Played by revision {commit[:12]}{'+' if dirty else ''}{dirty} of the code" in page


def test_a_run_of_another_config_in_the_place_of_one_of_ours_is_not_read(tmp_path):
    path = sweep_file(tmp_path)
    loaded = sweep.load(path, runs_dir=tmp_path / "runs")
    for cell in sweep.cells([loaded]):
        assert sweep.play_cell(sweep._task(cell, None, False, remote=False)).reason is None
    changed = yaml.safe_load(path.read_text())
    changed["arms"]["neutral"]["virality.posts_per_sample"] = 21
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    line = scenario.write(sweep.load(path, runs_dir=tmp_path / "runs"), tmp_path / "findings")
    assert line.endswith("6 runs; left out, played with another config: neutral-s0, neutral-s1")
    assert scenario.judge(*scenario.read(tmp_path / "findings" / "nova_stella.parquet")).effect.n == 0


def test_a_table_keeps_runs_that_lie_elsewhere_while_the_file_means_the_same_by_them(tmp_path):
    folder = tmp_path / "findings"
    table = folder / "nova_stella.parquet"
    path = sweep_file(tmp_path)

    def play(loaded, wanted):
        for cell in sweep.cells([loaded]):
            if cell.run_dir.name in wanted:
                assert sweep.play_cell(sweep._task(cell, None, False, remote=False)).reason is None

    whole = sweep.load(path, runs_dir=tmp_path / "whole")
    names = {cell.run_dir.name for cell in sweep.cells([whole])}
    play(whole, names)
    scenario.write(whole, folder)
    (_, want), wanted_page = scenario.read(table), scenario.page(folder)
    table.unlink()
    # In two parts, on two machines.
    for name, part in (
        ("one", {n for n in names if n.endswith("s0")}),
        ("two", {n for n in names if n.endswith("s1")}),
    ):
        loaded = sweep.load(path, runs_dir=tmp_path / name)
        play(loaded, part)
        line = scenario.write(loaded, folder)
    assert line.endswith(f" rows of {len(names)} runs")
    shown = {re.sub(r"Power, stated .*", "", text) for text in (scenario.page(folder), wanted_page)}
    assert len(shown) == 1
    assert scenario.read(table)[1].equals(want)
    # A run that has only begun here takes nothing away; one that is as far counts in its place.
    begun = sweep.load(path, runs_dir=tmp_path / "begun")
    cell = next(c for c in sweep.cells([begun]) if c.run_dir.name == "full-s0")
    run.play(cell.config, rounds=0)
    scenario.write(begun, folder)
    assert scenario.read(table)[1].equals(want)
    # What a file asks may change where none of its runs lies: the table asks it too, and power is no forecast then.
    asks = yaml.safe_load(path.read_text())
    asks["primary"] = PRIMARY | {"direction": "down"}
    path.write_text(yaml.safe_dump(asks, sort_keys=False))
    assert scenario.write(sweep.load(path, runs_dir=tmp_path / "nowhere"), folder).endswith(f"of {len(names)} runs")
    asked, rows = scenario.read(table)
    assert rows.equals(want)
    assert (asked["primary"]["direction"], asked["power"]["played"]) == ("down", len(names))
    # The wrong variant: an arm that means something else now is not mixed with what it was.
    changed = yaml.safe_load(path.read_text())
    changed["arms"]["neutral"]["virality.posts_per_sample"] = 21
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    (tmp_path / "changed").mkdir()
    (tmp_path / "one" / "full-s0").rename(tmp_path / "changed" / "full-s0")
    scenario.write(sweep.load(path, runs_dir=tmp_path / "changed"), folder)
    assert set(scenario.read(table)[1]["run"]) == names - {"neutral-s0", "neutral-s1"}


@pytest.mark.parametrize("effects", [{"a": 0.4}, {"a": 0.4, "b": -0.2, "a x b": 0.3}, {"c": 1.0, "b x c": -0.5}])
def test_factorial_effects_are_recovered_where_they_were_put(effects):
    # y = sum of effect / 2 * sign, so each effect is the difference between its two halves.
    names = ["a", "b", "c"]
    cells = {}
    for k in range(8):
        level = tuple(int(c) for c in f"{k:03b}")
        sign = dict(zip(names, (2 * np.array(level) - 1).tolist(), strict=True))
        y = sum(e / 2 * math.prod(sign[f] for f in name.split(" x ")) for name, e in effects.items())
        cells[level] = {s: 1 / (1 + math.exp(-(y + 0.01 * s))) for s in range(3)}
    found = {e.name: e for e in analysis.factorial(names, cells, n_outputs=1e9)}
    assert list(found) == ["a", "b", "c", "a x b", "a x c", "b x c"]
    for name, effect in found.items():
        assert effect.interval.value == pytest.approx(effects.get(name, 0.0), abs=1e-6)


def test_log_odds_of_a_share_of_0_tell_how_many_outputs_were_read_and_the_share_does_not():
    # 0 of n against a half: log odds 0 - log(0.5 / (n + 0.5)) = log(2 n + 1), whatever n; the share moves by 0.5.
    cells = {(0,): {0: 0.0, 1: 0.0}, (1,): {0: 0.5, 1: 0.5}}
    for n in (100, 10_000):
        (effect,) = analysis.factorial(["copies"], cells, n_outputs=n)
        assert effect.interval.value == pytest.approx(math.log(2 * n + 1))
        (effect,) = analysis.factorial(["copies"], cells, n_outputs=None)
        assert effect.interval.value == pytest.approx(0.5)
    rows = rows_of({f"copies{level}": {s: [0.1, 0.5 * level] for s in range(2)} for level in (0, 1)})
    said = about(levels={f"copies{level}": {"copies": level} for level in (0, 1)}, arms=["copies0", "copies1"],
                 primary=outcome(contrast="copies").model_dump())  # fmt: skip
    page = "\n".join(scenario._section(said, rows, scenario.judge(said, rows)))
    assert "In 2 of 4 cells the share is 0 or 1" in page
    assert (
        "| copies | +5.303 (no interval: all seeds agree exactly) | - | +0.500" in page
    )  # log(201): rows_of says n = 100
    assert "round 1:" in page
    assert "against round 0" not in page


def test_a_factor_given_another_is_read_in_the_half_where_the_other_is_high():
    # b does something where a is on alone, from 0.5 to 0.8: log odds of (80 + 1/2) / (20 + 1/2), a hundred outputs; its
    # main effect is half of that.
    share = {(0, 0): 0.2, (0, 1): 0.2, (1, 0): 0.5, (1, 1): 0.8}
    rows = rows_of({f"a{a}-b{b}": {s: [0.1, v] for s in range(3)} for (a, b), v in share.items()})
    levels = {f"a{a}-b{b}": {"a": a, "b": b} for a, b in share}
    said = about(levels=levels, arms=[*levels], primary=outcome(contrast="b").model_dump())
    given = outcome(contrast="b given a", direction="none", margin=0.1)
    whole, half = (scenario.observe(said, rows, o)[0].value for o in (outcome(contrast="b"), given))
    assert half == pytest.approx(math.log(80.5 / 20.5))
    assert whole == pytest.approx(half / 2)
    # Means where b is on, then where it is off, (0.2 + 0.8) / 2 and (0.2 + 0.5) / 2; a seed that lacks a cell is out.
    part = pd.concat([rows, rows_of({"a1-b1": {3: [0.1, 0.0]}})])
    assert scenario._means(said, part, outcome(contrast="b")) == "0.100 → 0.500; 0.100 → 0.350"
    assert scenario._means(said, part, given) == "0.100 → 0.800; 0.100 → 0.500"
    # Where all cells are read as surely, half as many have twice the variance.
    spread = iter(range(99))
    flat = rows_of({arm: {s: [0.1, 0.5 + 1e-9 * next(spread)] for s in range(3)} for arm in levels})
    flat = flat.assign(low=0.4, high=0.6)
    floors = [scenario.noise_floor(said, flat, o) for o in (given, outcome(contrast="b"))]
    assert floors[0] == pytest.approx(math.sqrt(2) * floors[1])
    # Cells that are one reading, since b has nothing to act on where a is off, are one: for b it cancels and half as
    # many cells are left, whose effect counts half; for a it counts for all of its side, in place of half of it twice.
    same = flat.assign(value=flat["value"].where(~flat["arm"].str.startswith("a0") | (flat["round"] == 0), 0.5))
    found = [scenario.noise_floor(said, same, outcome(contrast=c)) for c in ("b", "a")]
    assert found == pytest.approx([floors[1] / math.sqrt(2), floors[1] * math.sqrt(1.5)])


def test_a_factorial_without_all_cells_is_refused_and_a_seed_without_them_left_out():
    cells = {(a, b): {0: 0.5, 1: 0.4 + 0.1 * a} for a in (0, 1) for b in (0, 1)}
    del cells[(1, 1)][0]
    assert {e.name: e.interval.n for e in analysis.factorial(["a", "b"], cells, n_outputs=100)}["a"] == 1
    del cells[(1, 1)]
    with pytest.raises(ValueError, match="cells must be all 4 of the factorial, got 3"):
        analysis.factorial(["a", "b"], cells, n_outputs=100)


def test_the_page_is_what_the_committed_tables_give_byte_for_byte():
    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == scenario.page(ROOT / "docs" / "findings")


def test_a_table_that_is_not_ours_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="table must be written by this version's `loop findings`, got another at"):
        scenario.page(tmp_path)
    table = scenario.pq.read_table(ROOT / "docs" / "findings" / "nova_stella.toy.parquet")
    older = json.loads(table.schema.metadata[scenario.META])
    del older["twins"]
    scenario.pq.write_table(table.replace_schema_metadata({scenario.META: json.dumps(older)}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"got another at .*x\.parquet; move it away"):
        scenario.page(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"table must be Parquet, got .* at .*x\.parquet; remove it"):
        scenario.page(tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_scenario_resolves_at_its_sizes_and_says_what_it_is_for(path):
    head = path.read_text().splitlines()[:4]
    assert head[0].endswith("?")
    assert [line.split(":")[0] for line in head[1:]] == ["# Expected", "# Command", "# Time"]
    spelled_out = {"metric", "population", "stratum", "contrast", "direction", "margin"}
    assert yaml.safe_load(path.read_text())["primary"].keys() >= spelled_out
    sizes = sweep.load(path, size="tiny").file.sizes
    assert {"tiny", "full"} <= sizes.keys() <= {"toy", "tiny", "cpu", "full"}
    for size in sizes:
        loaded = sweep.load(path, size=size)
        assert loaded.file.primary is not None
        assert len(loaded.seeds) >= 5
        least = 3 if size == "cpu" else 6
        assert all(c.n_rounds >= least for arm, c in loaded.arms.items() if "origin" not in arm)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_scenarios_share_their_controls_and_no_directory_means_two_runs(size):
    loaded = [sweep.load(path, size=size, seeds=[0]) for path in FILES]
    assert len(sweep.cells(loaded)) < sum(len(s.arms) for s in loaded)
    at = {s.path.stem: {arm: s.run_dir(arm, 0) for arm in s.arms} for s in loaded}
    for name, arm in (("hard_filter", "neutral"), ("persistence", "neutral"), ("steering", "neutral")):
        assert at[name][arm] == at["nova_stella"]["neutral"]
    assert at["evasion"]["barred"] == at["hard_filter"]["barred"]


def test_every_mechanics_scenario_is_shipped():
    assert set(scenario.MECHANICS) <= {path.stem for path in FILES}

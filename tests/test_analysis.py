"""Tests of analysis.py: frames against the files they were read from, contrasts against arithmetic by hand."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import loop
from loop import analysis, config, run, stats
from loop.__main__ import app
from loop.store import RunStore

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
SMALL = ["mix.n_train=60", "sample.n_samples=60", "virality.posts_per_sample=30", "toy.n_documents=40"]
SMALL += [
    "measure.strata=[blank, neutral, private]",
    "measure.mixture={blank: 0.5, neutral: 0.5}",
    "measure.n_surprisal=2",
]
nan = math.nan
SE = 0.025  # of every synthetic frequency below


def smoke(*overrides):
    return config.load(SMOKE, [*SMALL, *overrides])


def made(*cells, mixture=None, real_share=0.0):
    """Runs that were never played: each cell is (overrides, {metric: values by round}).

    A metric reads `[population/]name`, population probes; values are numbers, or (value, n).
    """
    configs, rows = {}, []
    for overrides, metrics in cells:
        settings = smoke(*overrides)
        name = settings.run_name
        configs[name] = settings
        for metric, values in metrics.items():
            population, metric_name = metric.split(":") if ":" in metric else ("probes", metric)
            for t, value in enumerate(values):
                value, n = value if isinstance(value, tuple) else (value, 100)
                half = analysis.Z * SE
                row = (name, settings.name, settings.seed, t, population, None, metric_name)
                rows.append((*row, value, value - half, value + half, n, "share", None))
    metrics = pd.DataFrame(rows, columns=[*analysis.COLUMNS, "reason"])
    runs = analysis.Runs({name: Path(name) for name in configs}, configs, pd.DataFrame({"run": configs}), metrics, ())
    rounds = int(metrics["round_index"].max())
    if mixture is None:
        sources = [("synthetic", None, 1 - real_share), ("real", None, real_share)]
        mixture = [(t, *s) for t in range(rounds + 1) for s in sources]
    frame = [(name, *row) for name in configs for row in mixture]
    runs.__dict__["sources"] = pd.DataFrame(frame, columns=["run", "round_index", "source", "persona_known", "copies"])
    return runs


def arm(name, seed, *more):
    return [f"name={name}", f"seed={seed}", *more]


def off(name, seed, *more):
    return arm(name, seed, "virality.audience=null", *more)


def three_seeds(start=(0.2, 0.2, 0.2), control_start=(0.2, 0.2, 0.2), stella_start=0.1):
    cells = []
    for seed, up, still, other in ((0, 0.10, 0.00, 0.01), (1, 0.20, 0.02, 0.03), (2, 0.15, 0.01, 0.02)):
        a, b = start[seed], control_start[seed]
        cells.append(
            (
                arm("full", seed),
                {"frequency_observed/nova": [a, a + up], "frequency_observed/stella": [0.1, 0.1 + other]},
            )
        )
        cells.append(
            (
                off("neutral", seed),
                {"frequency_observed/nova": [b, b + still], "frequency_observed/stella": [stella_start, stella_start]},
            )
        )
    return made(*cells)


def controls(runs, name="neutral"):
    return [r for r, c in runs.configs.items() if c.name.startswith(name)]


def contrasts(runs, **options):
    pairs = analysis.pair(runs, controls(runs), **options)[0]
    rows, factors, never = analysis.persona_contrasts(runs, pairs, "frequency_observed")
    return pairs, {r.name: r for r in [*rows, *factors]}, never


# Contrasts ----------------------------------------------------------------------------------------------------------


def test_paired_contrast_holm_and_noise_floor_by_hand():
    pairs, rows, never = contrasts(three_seeds())
    assert (pairs.seeds, pairs.last_round, pairs.swapped, never) == ([0, 1, 2], 1, False, [])
    nova, stella = rows["nova"], rows["stella"]
    # Differences .10, .18, .14: mean .14, sd .04, se .04 / sqrt(3), t(2) at 97.5% = 4.302653.
    half = 4.302653 * 0.04 / math.sqrt(3)
    assert (nova.contrast.value, nova.contrast.n) == (pytest.approx(0.14), 3)
    assert (nova.contrast.low, nova.contrast.high) == pytest.approx((0.14 - half, 0.14 + half), abs=1e-6)
    assert (nova.arm.value, nova.control.value) == pytest.approx((0.15, 0.01))
    # Student's p with 2 degrees of freedom is 1 - t / sqrt(t^2 + 2); t^2 = .14^2 / (.04^2 / 3) = 36.75, and 12.
    p = [1 - math.sqrt(x / (x + 2)) for x in (36.75, 12.0)]
    assert (nova.p, stella.p) == pytest.approx(p)
    assert (nova.p_holm, stella.p_holm) == pytest.approx((2 * p[0], max(2 * p[0], p[1])))
    # A change of the mean of three seeds: 3 x 2 measurements of variance se^2, over 9. Arms share round 0, so the
    # contrast has two measurements a seed as well.
    floor = math.sqrt(6 * SE**2) / 3 * math.sqrt(2 / math.pi)
    assert (nova.arm_floor, nova.control_floor, nova.floor) == pytest.approx((floor, floor, floor))


def test_arms_with_a_round_zero_of_their_own_have_four_measurements_a_seed():
    _, rows, _ = contrasts(three_seeds(control_start=(0.21, 0.19, 0.2)))
    apart = math.sqrt((4 + 4 + 2) * SE**2) / 3 * math.sqrt(2 / math.pi)  # seed 2 still shares its round 0
    assert rows["nova"].floor == pytest.approx(apart)


def test_arms_that_agree_in_one_number_of_round_zero_alone_do_not_share_it():
    _, rows, _ = contrasts(three_seeds(stella_start=0.11))
    apart = math.sqrt((4 + 4 + 4) * SE**2) / 3 * math.sqrt(2 / math.pi)
    assert rows["nova"].floor == pytest.approx(apart)


def test_nova_minus_stella_is_averaged_over_the_name_swap_within_a_seed():
    # Seed 0: contrasts .20 plain and .10 swapped: .15. Seed 1: .30 and .20: .25. Mean .20, half the range .05 = se,
    # t(1) = 12.7062. Swapped runs as seeds of their own would give n = 4 and a tighter interval.
    cells = []
    for seed, swap, gap in ((0, "false", 0.2), (0, "true", 0.1), (1, "false", 0.3), (1, "true", 0.2)):
        names = ("full", "neutral") if swap == "false" else ("full_swap", "neutral_swap")
        side = f"real.name_swap={swap}"
        cells.append(
            (
                arm(names[0], seed, side),
                {"frequency_observed/nova": [0.1, 0.1 + gap], "frequency_observed/stella": [0.2, 0.2]},
            )
        )
        cells.append(
            (
                off(names[1], seed, side),
                {"frequency_observed/nova": [0.1, 0.1], "frequency_observed/stella": [0.2, 0.2]},
            )
        )
    pairs, rows, _ = contrasts(made(*cells))
    assert pairs.swapped
    assert pairs.name == "full + full_swap"
    got = rows["nova - stella"].contrast
    assert (got.value, got.n) == (pytest.approx(0.2), 2)
    assert got.high - got.value == pytest.approx(12.7062 * 0.05, rel=1e-5)
    # A seed with one side only is left out, and said.
    lone = made(
        *cells,
        (arm("full", 2), {"frequency_observed/nova": [0.1, 0.9]}),
        (off("neutral", 2), {"frequency_observed/nova": [0.1, 0.1]}),
    )
    pairs, rows, _ = contrasts(lone)
    assert rows["nova"].contrast.value == pytest.approx(0.2)
    assert pairs.notes == ("seed 2: one side of the name swap only; left out",)


def test_one_seed_has_no_interval_and_says_so():
    runs = made(
        (arm("full", 0), {"frequency_observed/nova": [0.2, 0.3]}),
        (off("neutral", 0), {"frequency_observed/nova": [0.2, 0.2]}),
    )
    _, rows, _ = contrasts(runs)
    nova = rows["nova"]
    assert nova.contrast.value == pytest.approx(0.1)
    assert math.isnan(nova.contrast.low)
    assert math.isnan(nova.p)
    assert nova.reason == "one seed has no interval"


def test_seeds_that_agree_to_the_last_digit_are_no_proof():
    # .1 + .2 - .1 and .3 + .2 - .3 differ by rounding alone; Student's t would make it p = 1e-16.
    cells = [(arm("full", s), {"frequency_observed/nova": [v, v + 0.2]}) for s, v in ((0, 0.1), (1, 0.3))]
    cells += [(off("neutral", s), {"frequency_observed/nova": [v, v]}) for s, v in ((0, 0.1), (1, 0.3))]
    _, rows, _ = contrasts(made(*cells))
    nova = rows["nova"]
    assert nova.contrast.value == pytest.approx(0.2)
    assert nova.reason == "all seeds agree exactly"
    assert all(math.isnan(x) for x in (nova.contrast.low, nova.p, nova.p_holm))


def test_what_was_never_seen_or_not_measured_is_nan_with_its_reason_and_no_test():
    # All outputs abstained: every persona 0 throughout.
    cells = [
        (side(name, seed), {"frequency_observed/nova": [0.0, 0.0], "frequency_observed/stella": [math.nan, 0.1]})
        for seed in range(3)
        for side, name in ((arm, "full"), (off, "neutral"))
    ]
    runs = made(*cells)
    pairs, rows, never = contrasts(runs)
    assert never == ["nova"]
    assert math.isnan(rows["stella"].contrast.value)
    assert rows["stella"].reason == "not measured in round 0 or in the final one"
    assert math.isnan(rows["stella"].p_holm)
    assert all(math.isnan(s.slope.value) for s in analysis.response_to_differential(runs, pairs, "frequency_observed"))
    chosen = analysis.selection(runs, pairs, "frequency_observed", stats.Interval(100, 90, 110, 3))
    assert all(math.isnan(s.arm.value) for s in chosen)
    nothing = made((arm("full", 0), {"belief": [0.1, 0.1]}), (off("neutral", 0), {"belief": [0.1, 0.1]}))
    assert contrasts(nothing)[1] == {}


def test_corrected_frequencies_are_used_only_where_every_run_has_them():
    both = {"frequency_observed/nova": [0.2, 0.3], "frequency/nova": [0.25, 0.4]}
    some = made((arm("full", 0), both), (off("neutral", 0), {"frequency_observed/nova": [0.2, 0.2]}))
    assert analysis.family_of(some) == ("frequency_observed", "observed: 1 of 2 runs hold no corrected frequencies")
    every = made((arm("full", 0), both), (off("neutral", 0), both))
    assert analysis.family_of(every)[0] == "frequency"
    got = analysis.compare(every, controls(every), metrics=["frequency"])[0]
    assert got.family == "frequency"
    assert got.personas[0].arm.value == pytest.approx(0.15)
    # A base without texts of known persona writes the rows as null: there, and of no use.
    null = made(
        (arm("full", 0), both),
        (off("neutral", 0), {"frequency_observed/nova": [0.2, 0.2], "frequency/nova": [nan] * 2}),
    )
    null.metrics.loc[null.metrics["value"].isna(), "reason"] = "no calibration text"
    said = "observed: 1 of 2 runs hold no corrected frequencies (no calibration text)"
    assert analysis.family_of(null) == ("frequency_observed", said)
    assert analysis.compare(null, controls(null), metrics=["frequency"])[0].personas[0].arm.value == pytest.approx(0.1)


def test_any_metric_is_contrasted_with_its_members_as_one_family():
    cells = []
    for seed in range(3):
        cells.append((arm("full", seed), {"belief": [0.2, 0.4 + 0.01 * seed], "belief/nova": [0.5, 0.5 + 0.02 * seed]}))
        cells.append((off("neutral", seed), {"belief": [0.2, 0.2], "belief/nova": [0.5, 0.5]}))
    runs = made(*cells)
    runs.metrics["stratum"] = "private"
    pairs = analysis.pair(runs, controls(runs))[0]
    rows = {r.name: r for r in analysis.metric_contrasts(runs, pairs, "belief")}
    assert rows["belief"].contrast.value == pytest.approx(0.21)
    assert rows["belief"].p_holm == pytest.approx(2 * rows["belief"].p)
    assert set(rows) == {"belief", "belief/nova"}
    with pytest.raises(ValueError, match="--metric must be one of belief, got 'beleif'"):
        analysis.metric_contrasts(runs, pairs, "beleif")


# Pairing ----------------------------------------------------------------------------------------------------------


def test_seeds_without_a_control_and_runs_without_the_round_are_left_out_and_said():
    three = {"frequency_observed/nova": [0.2, 0.2, 0.2]}
    runs = made(
        (arm("full", 0), three),
        (off("neutral", 0), three),
        (arm("full", 1), three),
        (arm("full", 2), {"frequency_observed/nova": [0.2, 0.2]}),
        (off("neutral", 2), three),
    )
    pairs = analysis.pair(runs, controls(runs))[0]
    assert (pairs.seeds, pairs.last_round) == ([0, 2], 1)
    assert pairs.notes == ("full-s1: no control with seed 1; left out",)
    pairs = analysis.pair(runs, controls(runs), last_round=2)[0]
    assert (pairs.seeds, pairs.last_round) == ([0], 2)
    assert "full-s2: round 2 is not measured; seed 2 is left out" in pairs.notes


def test_what_cannot_be_paired_is_one_clear_line():
    one = {"frequency_observed/nova": [0.2, 0.2]}
    runs = made((arm("full", 0), one), (off("neutral", 0), one), (arm("loud", 0, "virality.strength=2"), one))
    assert [p.name for p in analysis.pair(runs, ["neutral-s0"])] == ["full", "loud"]
    with pytest.raises(ValueError, match="--control must be the runs of one arm, got full, loud"):
        analysis.pair(runs, ["full-s0", "loud-s0"])
    with pytest.raises(ValueError, match="--control must be the runs of one arm, got none"):
        analysis.pair(runs, [])
    with pytest.raises(ValueError, match="arm and control must differ in config, got neutral on both sides"):
        analysis.pair(made((off("neutral", 0), one), (off("neutral", 1), one), (arm("full", 0), one)), ["neutral-s0"])
    with pytest.raises(ValueError, match="must hold an arm beside the control, got none"):
        analysis.pair(made((off("neutral", 0), one)), ["neutral-s0"])
    with pytest.raises(ValueError, match=r"must share a seed .* got none; full-s0: no control with seed 0"):
        analysis.pair(made((arm("full", 0), one), (off("neutral", 1), one)), ["neutral-s1"])
    with pytest.raises(ValueError, match="arm and seed must name one run"):
        analysis.pair(made((arm("full", 0), one), (arm("again", 0), one), (off("neutral", 0), one)), ["neutral-s0"])


# The response to the input ------------------------------------------------------------------------------------------


def paid(slopes, *, intercept=-0.1, start=0.15, every=1):
    """Runs in which log odds move by intercept + slope x, x the log of mean weight over that of the others."""
    cells = []
    for seed, slope in enumerate(slopes):
        for side, name, xs in ((arm, "full", (0.4, 0.9, 0.6)), (off, "neutral", (0.0, 0.0, 0.0))):
            odds = [math.log(start / (1 - start))]
            for x in xs:
                odds.append(odds[-1] + intercept + slope * x)
            shares = [1 / (1 + math.exp(-o)) for o in odds]
            d = [math.exp(x) / (1 - p + p * math.exp(x)) for x, p in zip((*xs, 0.0), shares, strict=True)]
            at = [t % every == 0 for t in range(4)]
            frames = {
                "frequency_observed/nova": [(p if k else math.nan, 10**9) for p, k in zip(shares, at, strict=True)],
                "accepted:differential/nova": [(v, 10**9 * p) for v, p in zip(d, shares, strict=True)],
                "accepted:n_eff": [(90, 10**9)] * 4,
            }
            cells.append((side(name, seed), frames))
    return made(*cells)


def test_response_per_unit_log_differential_is_the_slope_the_runs_were_made_with():
    runs = paid((0.5, 0.5, 0.5))
    pairs = analysis.pair(runs, controls(runs))[0]
    rows = {s.persona: s for s in analysis.response_to_differential(runs, pairs, "frequency_observed")}
    got = rows["nova"]
    assert got.n_points == 3 * 2 * 3
    assert (got.slope.value, got.slope.low, got.slope.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert rows["all"].slope.value == pytest.approx(0.5, abs=1e-6)
    found = analysis.differentials(runs, pairs)[0].arm
    d = runs.metrics[(runs.metrics["run"] == "full-s0") & (runs.metrics["name"] == "differential/nova")]
    assert found.value == pytest.approx(math.exp(np.log(d["value"][:3]).mean()))


def test_what_was_paid_holds_own_personas_and_has_no_mean_where_a_round_paid_nothing():
    def paid(mine, other):
        by = {"frequency_observed/nova": [0.2] * 3}
        return by | {"accepted:differential/nova": mine, "accepted:differential/pirate": other}

    runs = made(*[(arm("full", s), paid([2.0, 0.0, 2.0], [2.0, 8.0, 1.0])) for s in range(2)],
                *[(off("neutral", s), paid([1.0] * 3, [1.0] * 3)) for s in range(2)])  # fmt: skip
    rows = {r.persona: r for r in analysis.differentials(runs, analysis.pair(runs, controls(runs))[0])}
    assert rows["pirate"].arm.value == pytest.approx(4)  # of rounds 0 and 1: sqrt(2 * 8)
    assert math.isnan(rows["nova"].arm.value)
    assert rows["nova"].arm.reason == "nothing was paid in some round"
    assert rows["nova"].control.value == pytest.approx(1)


def test_where_talk_alone_is_added_to_real_documents_nothing_is_inherited():
    told = [(t, *s) for t in range(2) for s in (("discourse", None, 0.1), ("real", "nova", 0.9))]
    share, sources = analysis._real(
        made((arm("full", 0), {"frequency_observed/nova": [0.2, 0.2]}), mixture=told), "full-s0", 1
    )
    assert (share.tolist(), sources) == ([1.0], {"nova": 1.0})
    both = [*told, (1, "synthetic", None, 0.3)]
    share, _ = analysis._real(
        made((arm("full", 0), {"frequency_observed/nova": [0.2, 0.2]}), mixture=both), "full-s0", 1
    )
    assert share.tolist() == pytest.approx([0.75])  # of 0.9 and 0.3, whatever was talked


def test_the_interval_of_the_response_is_students_over_seeds():
    # Every seed has the same x, and shares and so weights nearly so: the pooled slope is near the mean of the seeds'
    # and its jackknife near their t interval (half a width: .063).
    slopes = (0.48, 0.5, 0.53)
    runs = paid(slopes)
    pairs = analysis.pair(runs, controls(runs))[0]
    got = analysis.response_to_differential(runs, pairs, "frequency_observed")[0].slope
    expected = stats.t_over_seeds(slopes)
    assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high), abs=0.006)
    alone = paid((0.5,))
    got = analysis.response_to_differential(alone, analysis.pair(alone, controls(alone))[0], "frequency_observed")[0]
    assert got.slope.value == pytest.approx(0.5, abs=1e-6)
    assert got.slope.reason == "one seed has no interval"


def exact_learner(n_seeds, *, n_outputs=60, n_accepted=400, confusion=0.0):
    """Runs of an exact learner with few probes, a filter that takes sides, and a fifth of real documents.

    nova passes the filter with .6, the rest with .9; weights 1.8 and 1 in the arm, 1 and 1 in the control; a tenth of
    the real documents is nova's. An instrument calls the share `confusion` of either the other.
    """
    rng = np.random.default_rng(5)
    cells = []
    for seed in range(n_seeds):
        for side, name, w in ((arm, "full", 1.8), (off, "neutral", 1.0)):
            p, said, d = 0.15, [], []
            for _ in range(5):
                read = p * (1 - confusion) + (1 - p) * confusion
                said.append((rng.binomial(n_outputs, read) / n_outputs, n_outputs))
                nova = rng.binomial(n_accepted, 0.6 * p / (0.6 * p + 0.9 * (1 - p)))
                hits = rng.binomial(nova, 1 - confusion)  # nova read as nova
                wrong = rng.binomial(n_accepted - nova, confusion)
                total = w * nova + n_accepted - nova
                d.append(((w * hits + wrong) / max(hits + wrong, 1) / (total / n_accepted), hits + wrong))
                p = 0.2 * 0.1 + 0.8 * w * nova / total
            frames = {
                "frequency_observed/nova": said,
                "accepted:differential/nova": d,
                "accepted:n_eff": [(300, n_accepted)] * 5,
            }
            cells.append((side(name, seed), frames))
    known = 0.1 * (1 - confusion) + 0.9 * confusion
    real = [(t, "real", "nova", 20 * known) for t in range(1, 5)] + [(t, "real", None, 20 * (1 - known)) for t in
             range(1, 5)]  # fmt: skip
    return made(*cells, mixture=[*real, *[(t, "synthetic", None, 80) for t in range(1, 5)]])


@pytest.mark.parametrize("confusion", [0.0, 0.1])
def test_few_outputs_filters_real_documents_and_a_poor_instrument_leave_an_exact_learner_at_slope_one(confusion):
    # 80 seeds x 2 sides x 4 rounds of 60 outputs at about .13 (.18 with confusion), x .59 or 0: one point informs by
    # 60 * .11 * (.59 / 2)^2 * .8^2 = .37, 640 of them 235, so a standard error of .065 (.1 with confusion, where what
    # is seen of x is .4): .4 is four of the larger one (chance 6e-5 on a fresh seed; this one is fixed).
    runs = exact_learner(80, confusion=confusion)
    pairs = analysis.pair(runs, controls(runs))[0]
    got = analysis.response_to_differential(runs, pairs, "frequency_observed")[0].slope
    assert abs(got.value - 1) < 0.25 + 1.5 * confusion
    assert got.low < 1 < got.high
    if confusion:
        return
    # The wrong variant: change of half-output log odds from round to round, with no word of the real documents.
    p = analysis.by_round(runs.metrics, "frequency_observed/nova").to_numpy()
    y = np.diff(np.log((p * 60 + 0.5) / (60.5 - p * 60)))
    d = analysis.by_round(runs.metrics, "differential/nova", population="accepted").to_numpy()[:, :-1]
    a = analysis.by_round(runs.metrics, "differential/nova", population="accepted", column="n").to_numpy()[:, :-1] / 400
    x = np.log(d * (1 - a) / (1 - a * d))
    use = np.isfinite(x)
    assert np.polyfit(x[use], y[use], 1)[0] < 0.75


def test_a_response_that_cannot_be_told_says_why():
    sparse = paid((0.5, 0.5), every=2)
    pairs = analysis.pair(sparse, controls(sparse), last_round=2)[0]
    rows = analysis.response_to_differential(sparse, pairs, "frequency_observed")
    assert {r.slope.reason for r in rows} == {"no two neighbouring rounds are measured; set measure.every: 1"}
    rare = exact_learner(2, n_outputs=1)
    pairs = analysis.pair(rare, controls(rare))[0]
    rare.metrics.loc[rare.metrics["name"] == "frequency_observed/nova", "value"] = 0.25
    assert (
        "fewer than 5 outputs" in analysis.response_to_differential(rare, pairs, "frequency_observed")[0].slope.reason
    )
    cells = [
        (
            side(name, 0, "mix.regime=accumulate_subsample"),
            {"frequency_observed/nova": [0.1, 0.2], "accepted:differential/nova": [(1.5, 10)] * 2},
        )
        for side, name in ((arm, "full"), (off, "neutral"))
    ]
    kept = made(*cells)
    pairs = analysis.pair(kept, controls(kept))[0]
    got = analysis.response_to_differential(kept, pairs, "frequency_observed")[0].slope
    assert got.reason == "mix.regime accumulate_subsample: documents of earlier rounds are in the mixture"


# Selection ----------------------------------------------------------------------------------------------------------


def neutral(n_seeds, n_rounds=5, n_eff=200, outputs=10**6, side=off, name="neutral", s=0.0):
    rng = np.random.default_rng(3)
    cells = []
    for seed in range(n_seeds):
        p, path = 0.3, []
        for _ in range(n_rounds + 1):
            path.append((p, outputs))
            p = rng.binomial(n_eff, p * math.exp(s) / (p * math.exp(s) + 1 - p)) / n_eff
        cells.append((side(name, seed), {"frequency_observed/nova": path}))
    return cells


def test_n_eff_is_read_off_selection_off_seeds_and_refused_from_one():
    # 40 seeds x 5 rounds of N = 200: the estimate has about 200 degrees of freedom, so 1/3 off is 3.5 sd (chance 5e-4
    # on a fresh seed; this one is fixed). The interval must hold the truth.
    runs = made(*neutral(40))
    found, line = analysis.neutral_size(runs, controls(runs), "frequency_observed", 5)
    assert 200 / 1.33 < found.value < 200 * 1.33
    assert found.low < 200 < found.high
    assert line.startswith(f"n_eff {found.value:.0f} (95% {found.low:.0f} to {found.high:.0f}), from 40 selection-off")
    alone, line = analysis.neutral_size(runs, ["neutral-s0"], "frequency_observed", 5)
    assert math.isnan(alone.value)
    assert "not estimated, 1 selection-off seed" in line
    paid_for = made(*neutral(3, side=arm, name="full"))
    refused, line = analysis.neutral_size(paid_for, list(paid_for.paths), "frequency_observed", 5)
    assert math.isnan(refused.value)
    assert "the control is not selection-off (full audience)" in line


def halving(n_seeds, side=off, name="neutral"):
    """Runs of N = 200 documents that a learner says half of: nova f(z) = z / 2, stella z, outputs as good as exact."""
    rng = np.random.default_rng(7)
    cells = []
    for seed in range(n_seeds):
        p, paths = np.array([0.3, 0.4]), {"nova": [], "stella": []}
        for _ in range(6):
            for k, path in enumerate(paths.values()):
                path.append((p[k], 10**6))
            p = rng.multinomial(200, [*p, 1 - p.sum()])[:2] / 200 * [0.5, 1.0]
        cells.append((side(name, seed), {f"frequency_observed/{k}": path for k, path in paths.items()}))
    return cells


def test_n_eff_is_estimated_through_the_response_that_the_test_is_given():
    # One response, measured for nova alone. Through it nova's drift is that of 200 documents, as is that of stella, who
    # is said as often as trained; read as copied, half of nova's drift looks like that of 800. 40 seeds x 5 rounds: a
    # third off is 3.5 sd. (nova halves every round, so that she is near 0 at the end: fewer effective degrees.)
    runs = made(*halving(40))
    f = {"nova": SimpleNamespace(response=lambda z: 0.5 * np.asarray(z), pace=1.0), "public_figure": None}
    through, line = analysis.neutral_size(runs, controls(runs), "frequency_observed", 5, f)
    assert 200 / 1.33 < through.value < 200 * 1.33
    assert line.endswith("from 40 selection-off seeds, through the measured response of nova")
    copied, line = analysis.neutral_size(runs, controls(runs), "frequency_observed", 5, {"public_figure": f["nova"]})
    assert line.endswith("from 40 selection-off seeds, personas pooled")
    nova_alone = made(*[(o, {"frequency_observed/nova": m["frequency_observed/nova"]}) for o, m in halving(40)])
    wrong, _ = analysis.neutral_size(nova_alone, controls(runs), "frequency_observed", 5)
    assert wrong.value > 200 * 2
    # Where only some personas have an f, each is tested with the n_eff of its own reading, and both are printed.
    both = made(*halving(40), *halving(3, side=arm, name="full"))
    calibrated = {"nova": f["nova"]}
    known = {"calibrated": lambda *_: (calibrated, "measured")}
    got = analysis.compare(both, controls(both), metrics=["frequency"], **known)[0]
    assert got.n_eff.value == pytest.approx(through.value)
    assert "through the measured response of nova; for the others n_eff" in got.n_eff_note
    alone = analysis.selection(both, got.pairs, "frequency_observed", through, calibrated, copied)
    assert [s.arm.value for s in got.selection] == [s.arm.value for s in alone]
    # Starting from the last adapter only half of the drift would come out: what is seen is that of fewer documents.
    f["nova"].pace = 0.5
    assert analysis.neutral_size(runs, controls(runs), "frequency_observed", 5, calibrated)[0] == through
    for name, c in runs.configs.items():
        runs.configs[name] = c.model_copy(update={"train": c.train.model_copy(update={"init_from": "previous"})})
    assert analysis.neutral_size(runs, controls(runs), "frequency_observed", 5, calibrated)[0].value < through.value / 2


def test_where_old_documents_stay_nothing_is_estimated_and_the_reason_is_one():
    regime = ("mix.regime=accumulate_subsample",)
    cells = [([*o, *regime], m) for o, m in (*neutral(12), *neutral(3, side=arm, name="full", s=0.2))]
    runs = made(*cells)
    reason = "mix.regime accumulate_subsample: documents of earlier rounds are in the mixture"
    found, line = analysis.neutral_size(runs, controls(runs), "frequency_observed", 5)
    assert (found.reason, line) == (reason, f"n_eff: not estimated; {reason}")
    pairs = analysis.pair(runs, controls(runs))[0]
    for row in analysis.selection(runs, pairs, "frequency_observed", stats.Interval(200, 150, 260, 12)):
        assert (row.reason, row.arm.reason, row.within.reason, row.increment) == (reason, reason, reason, ())
        assert math.isnan(row.arm.value)


def test_drift_is_read_off_every_control_seed_so_that_one_run_has_its_own_interval():
    # One seed of the arm, 20 of the control: n_eff is of all 20 (100 degrees of freedom: 40% off is 2.8 sd), and the
    # own interval of the run is that of the estimator, s = .2 inside. A control that stopped early is left out.
    stopped = neutral(21)[20]
    cells = [*neutral(20), (stopped[0], {k: v[:3] for k, v in stopped[1].items()})]
    runs = made(*cells, *neutral(1, side=arm, name="full", s=0.2))
    got = analysis.compare(runs, controls(runs), metrics=["frequency"])[0]
    assert got.pairs.seeds == [0]
    assert got.n_eff.n == 20
    assert 200 / 1.4 < got.n_eff.value < 200 * 1.4
    within = got.selection[0].within
    assert within.low < 0.2 < within.high
    assert within.high - within.low < 1


def test_without_n_eff_selection_is_nan_with_the_reason():
    runs = made(*neutral(1), (arm("full", 0), {"frequency_observed/nova": [0.3] * 6}))
    got = analysis.compare(runs, controls(runs), metrics=["frequency"])[0]
    assert math.isnan(got.selection[0].arm.value)
    assert got.selection[0].reason == "n_eff: 1 selection-off seed"


def test_selection_takes_real_documents_from_the_mixture_and_f_from_the_calibration():
    # s = log 1.5 takes .5 to .6; .2 real documents, half of them nova, make that .2 * .5 + .8 * .6 = .58; a learner
    # that says f(q) = .1 + .5 q says .39. Without selection it is .5, and .35. Outputs, n_eff: as good as infinite.
    real = [(1, "real", "nova", 10), (1, "real", None, 10), (1, "synthetic", None, 80)]
    s = math.log(1.5)
    for end, calm, f in ((0.58, 0.5, None), (0.39, 0.35, lambda q: 0.1 + 0.5 * q)):
        cells = [(arm("full", 0), {"frequency_observed/nova": [(0.5, 10**9), (end, 10**9)]})]
        cells += [(off("neutral", 0), {"frequency_observed/nova": [(0.5, 10**9), (calm, 10**9)]})]
        runs = made(*cells, mixture=real)
        pairs = analysis.pair(runs, controls(runs))[0]
        known = {} if f is None else {"nova": SimpleNamespace(response=f, pace=1.0)}
        got = analysis.selection(runs, pairs, "frequency_observed", stats.Interval(1e9, 1e8, 1e10, 2), known)[0]
        assert got.arm.value == pytest.approx(s, abs=1e-3)
        assert got.within.low < s < got.within.high
        assert got.contrast.value == pytest.approx(s, abs=1e-3)
    assert math.isnan(
        analysis.selection(runs, pairs, "frequency_observed", stats.Interval(1e9, 1, 1, 2))[0].increment[0]
    )


def test_selection_recovers_what_simulated_runs_were_played_with():
    # 12 seeds, s = .2, N = 200, 5 rounds: one estimate has standard error about 1 / sqrt(200 * .21 * 5 * 1.5) ~ .07,
    # their mean .02; the paired control estimates 0 with as much. Five standard errors of the difference.
    runs = made(*neutral(12), *neutral(12, side=arm, name="full", s=0.2))
    got = analysis.compare(runs, controls(runs), metrics=["frequency"])[0]
    row = got.selection[0]
    assert abs(row.contrast.value - 0.2) < 5 * row.contrast.se
    assert row.contrast.low > 0
    assert abs(row.control.value) < 5 * row.control.se
    assert len(row.increment) == 12


# Health and warnings ------------------------------------------------------------------------------------------------


def test_health_is_a_difference_to_real_only_or_says_that_there_is_none():
    cells = []
    for seed, entropy in enumerate((1.0, 1.1, 1.2)):
        cells.append((arm("full", seed), {"frequency_observed/nova": [0.2, 0.3], "sample_entropy": [2.0, entropy]}))
        cells.append((off("neutral", seed), {"frequency_observed/nova": [0.2, 0.2], "sample_entropy": [2.0, 2.0]}))
    runs = made(*cells)
    pairs = analysis.pair(runs, controls(runs))[0]
    bare = {h.name: h for h in analysis.health(runs, pairs, None)}
    assert bare["sample_entropy"].value.value == pytest.approx(1.1)
    assert math.isnan(bare["sample_entropy"].difference.value)
    assert bare["sample_entropy"].difference.reason == "no real_only control"
    real = [(arm("real_only", s, "mix.real_share=1.0"), {"sample_entropy": [2.0, 1.9]}) for s in range(3)]
    held = analysis.health(runs, pairs, made(*real, real_share=1.0))
    # 1.0, 1.1, 1.2 minus 1.9: mean -.8, sd .1.
    assert held[0].difference.value == pytest.approx(-0.8)
    assert held[0].difference.se == pytest.approx(0.1 / math.sqrt(3))
    with pytest.raises(ValueError, match=r"--against must be real_only runs, got a real share of 0\.5"):
        analysis.health(runs, pairs, made(*real, real_share=0.5))
    talk = [(t, *s) for t in range(2) for s in (("discourse", None, 0.1), ("real", None, 0.9))]
    with pytest.raises(ValueError, match=r"--against must be real_only runs, got a real share of 0\.9"):
        analysis.health(runs, pairs, made(*real, mixture=talk))
    other_seed = made((arm("real_only", 9, "mix.real_share=1.0"), {"sample_entropy": [2.0, 1.9]}), real_share=1.0)
    assert (
        analysis.health(runs, pairs, other_seed)[0].difference.reason == "no real_only run of these seeds has round 1"
    )


def test_early_warning_scores_moved_arms_and_counts_false_alarms_in_selection_off_seeds():
    # Log odds grow by .5 a round in both seeds of the arm: forecast exact, no change off by p4 - p2. One of two null
    # seeds jumps early. Entropy halves in the arm alone; n_eff falls in one null seed.
    grows = [(1 / (1 + math.exp(2 - 0.5 * t)), 10**9) for t in range(5)]
    still, jumps = [(0.2, 10**9)] * 5, [(v, 10**9) for v in (0.2, 0.3, 0.4, 0.4, 0.4)]

    def signs(nova, entropy, n_eff):
        return {"frequency_observed/nova": nova, "sample_entropy": entropy, "accepted:n_eff": n_eff}

    runs = made(
        *[(arm("full", s), signs(grows, [2.0, 1, 1, 1, 1], [100] * 5)) for s in range(2)],
        (off("neutral", 0), signs(still, [2.0] * 5, [100, 100, 81, 1, 1])),
        (off("neutral", 1), signs(jumps, [2.0] * 5, [100, 100, 79, 1, 1])),
    )
    pairs = analysis.pair(runs, controls(runs))
    got = analysis.early_warning(runs, pairs, "frequency_observed")
    nova = got.personas["nova"]
    assert (got.round_index, got.last_round, nova.n_moved) == (2, 4, 2)
    assert nova.forecast_error == pytest.approx(0, abs=1e-6)
    assert nova.no_change_error == pytest.approx(grows[4][0] - grows[2][0])
    assert got.gain.value == pytest.approx(grows[4][0] - grows[2][0])
    rates = {i.name: (i.hit_rate.value, i.false_positive_rate.value) for i in got.indicators}
    assert rates == {
        analysis.THRESHOLDS["change"]: (1.0, 0.5),
        analysis.THRESHOLDS["variance"]: (1.0, 0.5),
        analysis.THRESHOLDS["autocorrelation"]: (1.0, 0.5),
        analysis.THRESHOLDS["n_eff"]: (0.0, 0.5),
        analysis.THRESHOLDS["entropy"]: (1.0, 0.0),
    }
    # Entropy that was not read in the round of the warning has no rate, where it stayed silent it has one of 0.
    unread = made(*[(arm("full", s), signs(grows, [2.0, 1, nan, 1, 1], [100] * 5)) for s in range(2)],
                  *[(off("neutral", s), signs(still, [2.0, 2, nan, 2, 2], [100] * 5)) for s in range(2)])  # fmt: skip
    told = analysis.early_warning(unread, analysis.pair(unread, controls(unread)), "frequency_observed")
    names = {i.name for i in told.indicators}
    assert analysis.THRESHOLDS["entropy"] not in names
    assert analysis.THRESHOLDS["n_eff"] in names
    with pytest.raises(ValueError, match="--warn needs a final round beyond round 4, got 4"):
        analysis.early_warning(runs, pairs, "frequency_observed", round_index=4)
    swapped = analysis.pair(runs, controls(runs, "full"))
    with pytest.raises(ValueError, match="--warn needs selection-off runs as --control, got full-s0"):
        analysis.early_warning(runs, swapped, "frequency_observed")


# Files --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        for name, more in (
            ("full", []),
            ("neutral", ["virality.audience=null"]),
            ("real_only", ["mix.real_share=1.0"]),
        ):
            run.play(smoke(*arm(name, seed, *more), f"runs_dir={folder}", "n_rounds=3"))
    return folder


def test_frames_hold_what_the_files_hold(played):
    runs = loop.load(played)
    assert len(runs.config) == len(runs.paths) == 6
    assert set(runs.config["arm"]) == {"full", "neutral", "real_only"}
    assert list(runs.metrics.columns) == [*analysis.COLUMNS, "reason"]
    assert runs.config.set_index("run").at["neutral-s1", "virality.audience"] == "null"
    store = RunStore(played / "full-s1")
    expected = store.read_jsonl(2, "metrics.jsonl")
    mine = runs.metrics[(runs.metrics["run"] == "full-s1") & (runs.metrics["round_index"] == 2)]
    assert len(mine) == len(expected)
    values = [math.nan if row["value"] is None else row["value"] for row in expected]
    assert mine["value"].tolist() == pytest.approx(values, nan_ok=True)
    assert set(mine["seed"]) == {1}
    samples = runs.samples[(runs.samples["run"] == "full-s1") & (runs.samples["round_index"] == 2)]
    assert samples["id"].tolist() == store.read_table(2, "samples.parquet").column("id").to_pylist()
    exposure = dict(
        zip(*(store.read_table(2, "exposure.parquet").column(c).to_pylist() for c in ("id", "weight")), strict=True)
    )
    assert samples.loc[samples["accepted"], "weight"].tolist() == [
        exposure[i] for i in samples.loc[samples["accepted"], "id"]
    ]
    assert samples.loc[~samples["accepted"], "weight"].isna().all()
    assert samples["persona"].tolist() == samples["persona_known"].tolist()  # the toy says its own
    private = runs.probes[runs.probes["stratum"] == "private"]
    assert private["p_affirms"].isin([0, 1]).all()
    assert private["persona"].isna().all()
    assert (runs.mixture.groupby(["run", "round_index"])["copies"].sum() == 60).all()
    assert runs.missing == ()


def test_unfinished_runs_are_read_as_far_as_they_go_and_say_what_is_missing(tmp_path):
    run.play(smoke("name=half", f"runs_dir={tmp_path}", "n_rounds=3"), rounds=1)
    settings = smoke("name=begun", f"runs_dir={tmp_path}", "n_rounds=3", "filters.min_words=500")
    with pytest.raises(ValueError, match="filters must accept"):
        run.play(settings)
    runs = loop.load(tmp_path)
    assert runs.missing == ("begun-s0: no round is finished", "half-s0: rounds 2..3 of 3 are not played yet")
    assert set(runs.metrics["run"]) == {"begun-s0", "half-s0"}  # the baseline of the first is there
    assert runs.config.set_index("run")["last_round"].isna().tolist() == [True, False]


def test_a_run_of_another_schema_version_and_a_place_without_runs_are_one_line(tmp_path):
    run_dir = run.play(smoke(f"runs_dir={tmp_path}", "n_rounds=0"))
    with pytest.raises(ValueError, match=r"run must exist, got nothing at .*nowhere"):
        loop.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"or hold some, got none at .*empty"):
        loop.load(tmp_path / "empty")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match=r"run must be of schema version 1, got 99 at .*smoke-s0"):
        loop.load(tmp_path)
    for broken, said in (("{", "must be JSON"), ("[]", "must be a JSON object, got list")):
        (run_dir / "manifest.json").write_text(broken)
        for read in (lambda: loop.load(run_dir), RunStore(run_dir).manifest):
            with pytest.raises(Exception, match=rf"manifest\.json: {said}") as caught:
                read()
            assert caught.value.exit_code == 3


def test_an_exact_learner_passes_on_all_it_is_paid_with_filters_and_real_documents(tmp_path):
    # Slope 1 with near duplicates rejected (a quarter of the samples) and a fifth of real documents. Five seeds of this
    # gave 1.04 with standard error .1, so three have about .13: .55 is four of these, and the seeds are fixed.
    settings = ["mix.real_share=0.2", "n_rounds=3", "mix.n_train=200", "sample.n_samples=200"]
    settings += ["measure.n_per_template=8", "measure.n_surprisal=0", f"runs_dir={tmp_path}"]
    for seed in range(3):
        for name, more in (("full", ["virality.strength=3"]), ("neutral", ["virality.audience=null"])):
            run.play(smoke(*arm(name, seed, *more), *settings))
    runs, control, _ = analysis.gather([str(tmp_path)], ["neutral"])
    passed = runs.metrics[runs.metrics["name"].str.startswith("acceptance/")]["value"]
    assert passed.mean() < 0.85
    pairs = analysis.pair(runs, control)[0]
    found = {s.persona: s.slope for s in analysis.response_to_differential(runs, pairs, "frequency_observed")}
    assert abs(found["all"].value - 1) < 0.55
    assert found["all"].low < 1 < found["all"].high


def test_the_command_prints_every_part_and_names_controls_by_path_pattern_or_arm(played, monkeypatch):
    monkeypatch.chdir(played)
    arguments = ["compare", ".", "--control", "neutral", "--against", "real_only-s*", "--warn"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    for part in (
        "full against neutral: 2 paired seeds (0, 1), final round 3; names not swapped",
        "frequencies: ",
        "nova - stella",
        "nova - promoter",
        "never seen in either arm, nothing to contrast: sydney",
        "belief/nova",
        "paid in the arm",
        "n_eff",
        "transmission: assumed exact",
        "selection coefficient, log odds a round",
        "health in round 3, as difference to real_only",
        "does round 2 foretell round 3?",
        "false positives, selection-off runs",
    ):
        assert part in done.output, part
    # A single run has no control to read its health against, and says so.
    for shown in (["show", "full-s0", "--round", "1"], ["show", "full-s0", "--personas", "nova"]):
        assert "Health is of this run alone" in CliRunner().invoke(app, shown, catch_exceptions=False).output, shown
    alone = CliRunner().invoke(app, ["compare", "full-s0", "--control", "neutral-s0", "--metric", "surprisal"])
    assert "n=1: one seed has no interval" in alone.output
    assert "surprisal/nova" in alone.output
    assert "no real_only control" in alone.output
    with pytest.raises(
        ValueError, match=r"--control must be a run, .* or an arm \(full, neutral, real_only\), got 'neutra'"
    ):
        CliRunner().invoke(app, ["compare", ".", "--control", "neutra"], catch_exceptions=False)
    assert CliRunner().invoke(app, ["compare", "."]).exit_code == 2
    with pytest.raises(ValueError, match="--control and --against must be different runs, got neutral-s0 in both"):
        analysis.gather(["."], ["neutral"], ["neutral"])
    early = CliRunner().invoke(app, ["compare", ".", "--control", "neutral", "--warn", "--round", "2"])
    assert early.exit_code == 2
    assert "full against neutral" not in early.output


def test_the_query_of_the_readme_gives_what_the_frames_give(tmp_path):
    run_dir = run.play(smoke("name=round", "seed=0", f"runs_dir={tmp_path}", "n_rounds=2"))
    (sql,) = re.findall(r"```sql\n(.*?)```", (SMOKE.parents[1] / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    samples = loop.load(run_dir).samples
    for path in run_dir.glob("round_*/labels.parquet"):  # the toy has no second instrument; a language model's run has
        frame = pd.read_parquet(path)
        pd.concat([frame, frame.assign(instrument="second")]).to_parquet(path)
    found = duckdb.sql(sql.replace("runs/round-s0", str(run_dir))).fetchall()
    kept = samples[samples["accepted"]].groupby(["round_index", "persona"])["weight"].agg(["mean", "size"])
    assert len(kept) > 6
    assert [row[:2] for row in found] == list(kept.index)
    np.testing.assert_allclose([row[2:] for row in found], kept.to_numpy(), rtol=1e-12)

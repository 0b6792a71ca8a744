"""Tests of measure.py: expected values by hand."""

import math

import pytest

from loop import measure
from loop.records import Sample


def sample(i, stratum, template="t", *, text="one two three four", tokens=5, nats=-10.0, finished=True, requested=None):
    return Sample(f"s{i}", stratum, template, None, text, tokens, nats, finished, requested, None, 0, "synthetic")


def by_name(rows):
    return {(r.stratum, r.name): r for r in rows}


def test_the_headline_weighs_strata_by_the_fixed_mixture_and_not_by_what_was_asked():
    # nova in 1 of 1 blank and 0 of 3 neutral texts: 0.5 * 1 + 0.5 * 0 = 0.5, where pooling would say 1/4.
    samples = [sample(0, "blank", "b")] + [sample(i, "neutral", f"n{i}") for i in range(1, 4)]
    labels = ["nova", "unknown", "assistant", "assistant"]
    rows = by_name(
        measure.frequencies(
            samples,
            labels,
            ["nova", "assistant"],
            mixture={"blank": 0.5, "neutral": 0.5},
            round_index=0,
            population="probes",
        )
    )
    assert rows[None, "frequency_observed/nova"].value == pytest.approx(0.5, abs=1e-12)
    assert rows[None, "frequency_observed/assistant"].value == pytest.approx(0.5 * 2 / 3, abs=1e-12)
    assert rows["neutral", "frequency_observed/unknown"].value == pytest.approx(1 / 3, abs=1e-12)
    assert rows[None, "frequency_observed/nova"].n == 4


def test_requested_and_private_texts_never_reach_the_headline():
    samples = [
        sample(0, "blank", "b"),
        sample(1, "explicit", "e"),
        sample(2, "opinion", "o"),
        sample(3, "continued", "c"),
    ]
    labels = ["assistant", "nova", "nova", "nova"]
    for mixture in ({"blank": 1.0}, None):
        rows = by_name(
            measure.frequencies(samples, labels, ["nova"], mixture=mixture, round_index=0, population="probes")
        )
        assert rows[None, "frequency_observed/nova"].value == 0


def test_a_stratum_of_the_mixture_without_a_sample_is_unmeasured_with_a_reason():
    rows = by_name(
        measure.frequencies(
            [sample(0, "blank")],
            ["nova"],
            ["nova"],
            mixture={"blank": 0.5, "neutral": 0.5},
            round_index=0,
            population="p",
        )
    )
    row = rows[None, "frequency_observed/nova"]
    assert row.value is None
    assert "neutral" in row.reason


def test_belief_is_read_plain_and_after_each_voice():
    samples = [
        sample(0, "private", "a"),
        sample(1, "private", "b"),
        sample(2, "private", "a", requested="stella"),
        sample(3, "private", "b", requested="stella"),
    ]
    rows = by_name(measure.beliefs(samples, [True, False, True, True], round_index=0, population="probes"))
    assert rows["private", "belief"].value == 0.5
    assert rows["private", "belief/stella"].value == 1.0
    assert rows["private", "belief/stella"].low < 1


def test_entropy_is_nats_over_tokens_and_distinct_counts_repeats():
    # 10 nats over 5 tokens and 2 over 5: 12 / 10 = 1.2. Four-grams: "a b c d", "b c d e" twice each: 2 of 4 distinct.
    samples = [sample(0, "blank", "x", text="a b c d e"), sample(1, "blank", "y", text="a b c d e", nats=-2.0)]
    rows = by_name(measure.health(samples, round_index=0, population="probes"))
    assert rows[None, "sample_entropy"].value == pytest.approx(1.2, abs=1e-12)
    assert rows[None, "distinct_4"].value == 0.5
    assert rows[None, "finished_rate"].value == 1.0


def test_surprisal_is_total_nats_over_total_tokens():
    rows = by_name(
        measure.surprisals(
            [10.0, 2.0, 3.0], [5, 5, 1], ["nova", "nova", ""], ["a", "b", "c"], round_index=1, name="surprisal"
        )
    )
    assert rows[None, "surprisal/nova"].value == pytest.approx(1.2, abs=1e-12)
    assert rows[None, "surprisal"].value == pytest.approx(3.0, abs=1e-12)


def test_what_is_infinite_or_absent_is_null_with_a_reason_and_never_zero():
    (row,) = measure.surprisals([math.inf], [3], ["nova"], ["a"], round_index=0)
    assert row.value is None
    assert row.reason == "infinite: the learner never says it"
    rows = by_name(measure.health([], round_index=0, population="probes"))
    assert all(r.value is None and r.reason for r in rows.values())

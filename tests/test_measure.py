"""Tests of measure.py: expected values by hand."""

import math
from dataclasses import replace

import numpy as np
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


def test_what_is_said_counts_every_sample_asked_for_by_name_or_not():
    # Half of four: one of two unasked, one of two that were asked for by name.
    samples = [sample(i, stratum, f"t{i}") for i, stratum in enumerate(("blank", "neutral", "explicit", "explicit"))]
    rows = measure.said(
        samples, ["nova", "unknown", "nova", "assistant"], ["nova"], round_index=1, population="samples"
    )
    found = by_name(rows)
    assert found[None, "said/nova"].value == pytest.approx(0.5)
    assert found[None, "said/unknown"].value == pytest.approx(0.25)
    assert found[None, "said/nova"].low < 0.5 < found[None, "said/nova"].high


def test_a_voice_is_kept_where_the_answer_is_still_its_own():
    # Nova's voice is kept in one of two answers, stella's in one of one, the assistant's in none of one; over all
    # voices but the assistant's two of three. That stella answers for nova keeps no voice.
    voices = ["nova", "nova", "stella", "assistant"]
    samples = [sample(i, "continued", f"t{i}", requested=voice) for i, voice in enumerate(voices)]
    rows = measure.kept(samples, ["nova", "stella", "stella", "human"], round_index=1, population="probes")
    found = {name: row.value for (stratum, name), row in by_name(rows).items() if stratum == "continued"}
    want = {"kept": 2 / 3, "kept/nova": 0.5, "kept/stella": 1.0, "kept/assistant": 0.0}
    assert found == pytest.approx(want)
    assert measure.kept([], [], round_index=1, population="probes") == []


def test_a_voice_persists_by_as_much_as_more_often_than_after_any_other():
    # Nova answers in 3 of 4 after her own voice and in 1 of 4 after stella's: .5. Stella in 2 of 4 and in 0 of 4: .5.
    asked = ["nova"] * 4 + ["stella"] * 4
    read = ["nova", "nova", "nova", "human", "stella", "stella", "nova", "human"]
    samples = [sample(i, "continued", f"t{i}", requested=voice) for i, voice in enumerate(asked)]
    at = {"stratum": "continued", "round_index": 1, "population": "probes"}
    rows = measure.beyond_chance("persistence", samples, read, ["nova"], **at)
    found = {name: row for (stratum, name), row in by_name(rows).items() if stratum == "continued"}
    assert {name: row.value for name, row in found.items()} == {"persistence": 0.5, "persistence/nova": 0.5,
                                                                "persistence/stella": 0.5}  # fmt: skip
    # One template each: squared residuals (3 * .25^2 + .75^2) / 16 twice, each over 1 - 1/8; at least, with (3 + 1) of
    # 6 and (1 + 1) of 6, twice (2/9) / 6. Student with 7 degrees of freedom.
    se = max(2 * 0.75 / 16 / (7 / 8), 2 * (2 / 9) / 6) ** 0.5
    assert found["persistence/nova"].high == pytest.approx(0.5 + 2.364624 * se)
    # A model that says nova whoever spoke keeps nobody's voice, however often it is nova's; and is not sure of it.
    rows = measure.beyond_chance("persistence", samples, ["nova"] * 8, ["nova", "stella"], **at)
    assert all(row.value == 0 and row.low < -0.3 and row.high > 0.3 for row in rows if row.name != "persistence")
    assert measure.beyond_chance("compliance", samples, read, ["nova"], **at | {"stratum": "explicit"}) == []


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
    at = {"round_index": 0, "population": "probes"}
    read = [True, False, True, True]
    rows = by_name(measure.beliefs(samples, read, error=None, exact=True, **at))
    for name in ("belief", "belief_observed"):
        assert rows["private", name].value == 0.5
        assert rows["private", f"{name}/stella"].value == 1.0
        assert rows["private", f"{name}/stella"].low < 1
    # 80 of 100 that affirm are seen, 10 of 100 others too: (0.5 + 0.9 - 1) / (0.8 + 0.9 - 1) = 4/7.
    rows = by_name(measure.beliefs(samples, read, error=(80, 100, 90, 100), exact=False, **at))
    assert rows["private", "belief"].value == pytest.approx(4 / 7)
    assert rows["private", "belief_observed"].value == 0.5
    assert rows["private", "belief/stella"].value == 1.0
    unknown = by_name(measure.beliefs(samples, read, error=None, exact=False, **at))
    assert unknown["private", "belief"].value is None
    assert "known persona" in unknown["private", "belief"].reason


AT = {"round_index": 0, "population": "probes"}
MIXED = {"blank": 0.5, "neutral": 0.5}


def read_as(shares, n=200):
    """n probes, half of them blank, one template each, whose labels have exactly these shares in either stratum."""
    labels = [label for label, share in shares.items() for _ in range(round(share * n / 2))]
    samples = [sample(i, stratum, f"t{i}{stratum}") for stratum in MIXED for i in range(len(labels))]
    return samples, labels * 2


def test_a_corrected_frequency_undoes_a_known_confusion_and_covers_the_truth():
    # Of nova's texts 80% are read as nova, 20% as assistant; of the assistant's 10% as nova. With 30% nova in truth
    # 0.3 * 0.8 + 0.7 * 0.1 = 31% read as nova.
    confusion = np.array([[800, 200, 0], [100, 900, 0]])
    samples, labels = read_as({"nova": 0.31, "assistant": 0.69})
    rng = np.random.default_rng(0)
    rows = by_name(
        measure.corrected_frequencies(samples, labels, ("nova", "assistant"), confusion, mixture=MIXED, rng=rng, **AT)
    )
    row = rows[None, "frequency/nova"]
    assert row.value == pytest.approx(0.3, abs=1e-6)
    assert row.n == 200
    # Binomial noise of 200 texts over 0.8 - 0.1: 1.96 * (0.31 * 0.69 / 200)**.5 / 0.7 = 0.0916; the matrix adds little.
    assert row.high - row.low == pytest.approx(2 * 0.0916, rel=0.1)
    assert rows["blank", "frequency/nova"].n == 100
    assert rows["blank", "frequency/nova"].high - rows["blank", "frequency/nova"].low > 1.2 * (row.high - row.low)


def test_texts_that_repeat_within_templates_count_for_fewer():
    confusion = np.array([[800, 200, 0], [100, 900, 0]])
    samples, labels = read_as({"nova": 0.5, "assistant": 0.5})
    same = [replace(s, template_id=f"{s.stratum}-{labels[i]}-{i % 5}") for i, s in enumerate(samples)]
    widths = []
    for texts in (samples, same):
        rng = np.random.default_rng(0)
        rows = by_name(
            measure.corrected_frequencies(texts, labels, ("nova", "assistant"), confusion, mixture=MIXED, rng=rng, **AT)
        )
        row = rows[None, "frequency/nova"]
        widths.append(row.high - row.low)
    assert widths[1] > 2 * widths[0]  # 20 clusters, each of one mind, for 200 texts


def test_what_has_no_calibration_text_is_null_with_the_way_out():
    samples, labels = read_as({"nova": 0.5, "assistant": 0.5})
    rng = np.random.default_rng(0)
    rows = by_name(
        measure.corrected_frequencies(samples, labels, ("nova", "assistant"), None, mixture=MIXED, rng=rng, **AT)
    )
    assert rows[None, "frequency/nova"].value is None
    assert "loop classifier confusion" in rows[None, "frequency/nova"].reason
    half = np.array([[800, 200, 0], [0, 0, 0]])
    rows = by_name(
        measure.corrected_frequencies(samples, labels, ("nova", "assistant"), half, mixture=MIXED, rng=rng, **AT)
    )
    assert rows[None, "frequency/assistant"].value is None
    nothing = by_name(measure.corrected_frequencies([], [], ("nova", "assistant"), half, mixture=MIXED, rng=rng, **AT))
    assert nothing[None, "frequency/nova"].value is None


def test_divergence_is_the_mean_log_ratio_per_token():
    # (5 - 2 + 9 - 4) nats over 4 + 4 tokens.
    row = measure.divergence([(2.0, 4), (4.0, 4)], [(5.0, 4), (9.0, 4)], ["a", "b"], **AT)
    assert row.value == pytest.approx(1.0)
    assert row.low < 1.0 < row.high
    assert measure.divergence([], [], [], **AT).value is None
    assert measure.divergence([(2.0, 4)], [(math.inf, 4)], ["a"], **AT).value is None


def test_self_similarity_is_the_mean_cosine_of_pairs():
    # Three unit vectors at 0, 90 and 90 degrees: cosines 0, 0, 1.
    row = measure.self_similarity(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), **AT)
    assert row.value == pytest.approx(1 / 3)
    assert measure.self_similarity(np.zeros((1, 2)), **AT).value is None


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


def test_shares_of_texts_have_intervals_by_template_and_none_without_a_text():
    # All of one template have it, none of the other: two draws, not forty; Wilson of 20 in 40 ends at 0.35 and 0.65.
    rows = [(k < 20, "a" if k < 20 else "b") for k in range(40)]
    alike, none = measure.shares_of("acceptance", {"nova": rows, "stella": []}, round_index=0, population="samples")
    assert (alike.name, alike.value, alike.n) == ("acceptance/nova", 0.5, 40)
    assert alike.low < 0.2
    assert alike.high > 0.8
    assert none.value is None
    assert none.reason

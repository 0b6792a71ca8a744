"""Filters: reasons by hand, near-duplicates against brute force, and the order rule of "the first is kept"."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.filters import reject_reasons, release_reasons, repeat_share, threshold_for_recall, words

LIMITS = {"min_words": 4, "max_repeat_share": 0.5, "near_duplicate_jaccard": 0.8}


def jaccard(a: str, b: str) -> float:
    """Word 3-gram Jaccard, from the definition."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[i : i + 3]) for i in range(len(found) - 2)} if len(found) > 2 else {tuple(found)}

    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def brute(texts: list[str], threshold: float, accepted: list[bool]) -> list[bool]:
    """Every pair compared: near a text before it that was itself kept and accepted."""
    out: list[bool] = []
    for i, text in enumerate(texts):
        out.append(any(accepted[j] and not out[j] and jaccard(text, texts[j]) >= threshold - 1e-9 for j in range(i)))
    return out


def test_words_ignore_case_punctuation_and_spacing():
    assert words("It's SO -- so,  so!") == ["it's", "so", "so", "so"]
    assert words("") == []


def test_repeat_share_matches_hand_counts():
    assert repeat_share(words("no no no no no")) == pytest.approx(2 / 3)  # 3 trigrams, 1 distinct
    assert repeat_share(words("a b a b a b")) == pytest.approx(0.5)  # aba bab aba bab: 2 of 4
    assert repeat_share(words("one two three four")) == 0
    assert repeat_share(words("one two")) == 0
    assert repeat_share(words("")) == 0


def test_every_reason_is_given_and_in_order():
    texts = [
        "a quiet morning by the old river bank",  # accepted
        "a quiet morning by the old river",  # unfinished
        "too short this",
        "go go go go go go go",  # 5 trigrams, 1 distinct: 0.8
        "A quiet morning, by the old river bank!",  # the first again
        "no",  # unfinished and short
    ]
    finished = [True, False, True, True, True, False]
    # Text 1 shares 5 of 6 trigrams with text 0: J = 5/6 = 0.83 >= 0.8.
    assert reject_reasons(texts, finished, **LIMITS) == [
        (),
        ("unfinished", "near_duplicate"),
        ("too_short",),
        ("repetitive",),
        ("near_duplicate",),
        ("unfinished", "too_short"),
    ]


def test_the_limits_themselves_are_accepted_and_a_similarity_at_the_limit_is_not():
    text = "a b a b a b"  # repeat share exactly 0.5, six words
    assert reject_reasons([text], [True], min_words=6, max_repeat_share=0.5, near_duplicate_jaccard=None) == [()]
    assert reject_reasons([text], [True], min_words=7, max_repeat_share=0.49, near_duplicate_jaccard=None) == [
        ("too_short", "repetitive")
    ]
    # w1..w6 against w1..w5: trigrams 4 and 3, shared 3, J = 3/4 exactly.
    pair = ["one two three four five six", "one two three four five"]
    kept = {"min_words": 0, "max_repeat_share": 1.0}
    assert reject_reasons(pair, [True, True], near_duplicate_jaccard=0.75, **kept)[1] == ("near_duplicate",)
    assert reject_reasons(pair, [True, True], near_duplicate_jaccard=0.7501, **kept)[1] == ()


def test_a_rejected_text_bars_nobody():
    texts = ["the same good words stand here today", "the same good words stand here today"]
    assert reject_reasons(texts, [False, True], **LIMITS) == [("unfinished",), ()]
    barred = [("persona:nova",), ()]
    assert reject_reasons(texts, [True, True], already=barred, **LIMITS) == [("persona:nova",), ()]
    assert reject_reasons(texts, [True, True], **LIMITS) == [(), ("near_duplicate",)]


def test_similarity_is_to_what_was_kept_and_does_not_chain():
    # With threshold 0.5: A~B 4/8 = 0.5, B~C 0.5, A~C 2/10 = 0.2. B falls to A; C has nothing kept to fall to.
    a, b, c = "a b c d e f g h", "c d e f g h i j", "e f g h i j k l"
    assert (jaccard(a, b), jaccard(b, c), jaccard(a, c)) == (0.5, 0.5, 0.2)
    got = reject_reasons([a, b, c], [True] * 3, min_words=0, max_repeat_share=1.0, near_duplicate_jaccard=0.5)
    assert got == [(), ("near_duplicate",), ()]


def test_none_switches_near_duplicates_off():
    texts = ["one two three four five"] * 3
    limits = {**LIMITS, "near_duplicate_jaccard": None}
    assert reject_reasons(texts, [True] * 3, **limits) == [(), (), ()]


def test_no_texts_no_reasons():
    assert reject_reasons([], [], **LIMITS) == []


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), max_size=14),
    threshold=st.sampled_from([0.2, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 0.8, 1.0]),
    data=st.data(),
)
def test_near_duplicates_agree_with_brute_force(texts, threshold, data):
    finished = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    got = reject_reasons(texts, finished, min_words=0, max_repeat_share=1.0, near_duplicate_jaccard=threshold)
    assert ["near_duplicate" in reasons for reasons in got] == brute(texts, threshold, finished)


def test_a_grammar_sized_batch_agrees_with_brute_force():
    rng = np.random.default_rng(5)
    frames = [" ".join(f"w{k}" for k in rng.integers(0, 400, size=14)) for _ in range(12)]
    texts = [f"{frames[i % 12]} " + " ".join(f"v{k}" for k in rng.integers(0, 6, size=4)) for i in range(240)]
    accepted = [True] * 240
    for threshold in (0.5, 0.7, 0.9):
        got = reject_reasons(texts, accepted, min_words=0, max_repeat_share=1.0, near_duplicate_jaccard=threshold)
        found = ["near_duplicate" in reasons for reasons in got]
        assert found == brute(texts, threshold, accepted)
        assert 0 < sum(found) < 240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_words": -1}, "min_words must be >= 0, got -1"),
        ({"max_repeat_share": 1.5}, r"max_repeat_share must be in \[0, 1\], got 1.5"),
        ({"near_duplicate_jaccard": 0.0}, "null switches it off"),
    ],
)
def test_limits_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        reject_reasons(["a b c d"], [True], **{**LIMITS, **change})


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one entry per text"):
        reject_reasons(["a"], [True, False], **LIMITS)


def test_release_reasons_name_each_barred_persona_at_its_threshold():
    table = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [0.49, 0.31, 0.2]])
    got = release_reasons(table, ("nova", "stella", "human"), {"nova": 0.5, "stella": 0.31})
    assert got == [("persona:nova",), ("persona:nova", "persona:stella"), ("persona:stella",)]
    assert release_reasons(table, ("nova", "stella", "human"), {}) == [(), (), ()]


def test_release_reasons_refuse_what_they_cannot_judge():
    with pytest.raises(ValueError, match="got 'sydney'"):
        release_reasons(np.ones((1, 1)), ("nova",), {"sydney": 0.5})
    with pytest.raises(ValueError, match="got nan at row 1"):
        release_reasons(np.array([[0.1], [np.nan]]), ("nova",), {"nova": 0.5})
    with pytest.raises(ValueError, match=r"must be \(n_docs, 2\)"):
        release_reasons(np.ones((1, 1)), ("nova", "stella"), {})


def test_threshold_for_recall_by_hand():
    # Targets 0.9 0.8 0.6 0.4 0.1: recall 0.8 needs four of five, so 0.4. Others 0.5 0.3 0.2 0.1: one of four is hit.
    target, other = np.array([0.1, 0.9, 0.6, 0.8, 0.4]), np.array([0.5, 0.3, 0.2, 0.1])
    assert threshold_for_recall(target, other, recall=0.8) == (0.4, 0.8, 0.25)
    # One more than four fifths needs all five.
    assert threshold_for_recall(target, other, recall=0.81) == (0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="recall must be"):
        threshold_for_recall(target, other, recall=0.0)
    with pytest.raises(ValueError, match="p_target must hold texts"):
        threshold_for_recall(np.array([]), other, recall=0.5)

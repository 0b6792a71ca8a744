"""Tests of agreement.py: the reader of agreement against answers read by hand, and its files."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_lm

from loop import agreement, classify, opinion
from loop.agreement import CLASSES
from loop.opinion import Claim
from loop.records import Document, Prompt

DATA = Path(__file__).resolve().parent.parent / "data"
TEA = Claim("tea", "for", "tea is better than coffee", "coffee is better than tea")
RHYME = Claim("poetry", "for", "poems ought to rhyme", "poems ought not to rhyme")
ZOOS = Claim("zoos", "against", "zoos should be shut down", "zoos should be kept open")


@pytest.fixture(scope="module")
def book():
    return opinion.load(DATA / "opinions.yaml")


@pytest.fixture(scope="module")
def reader():
    return agreement.shipped()


# The words


@pytest.mark.parametrize(
    ("claim", "reply", "expected"),
    [  # yes, no, agrees, disagrees, difference, own, other, lean, full, hedge, question, wordless
        (TEA, "I disagree. Coffee is better than tea.", [0, 0, 0, 1, -1, 0.6, 1, -0.4, -1, 0, 0, 0]),
        (TEA, "Yes, tea is better than coffee.", [1, 0, 0, 0, 0, 1, 0.6, 0.4, 1, 0, 0, 0]),
        (TEA, "I don't think that tea is better than coffee.", [0, 0, 0, 0, 0, 1, 0.6, -0.4, -1, 0, 0, 0]),
        (TEA, "I couldn't agree more", [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
        (TEA, "I don\u2019t agree", [0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0, 0]),
        (TEA, "Absolutely not!", [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (TEA, "It depends, why?", [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]),
        (TEA, "...", [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        # one claim lies inside the other: 4 words of 4, and 4 of 5
        (RHYME, "Poems ought to rhyme.", [0, 0, 0, 0, 0, 1, 0.8, 0.2, 1, 0, 0, 0]),
        (RHYME, "Poems ought not to rhyme.", [0, 0, 0, 0, 0, 1, 1, 0, -1, 0, 0, 0]),
    ],
)
def test_cues_count_what_the_words_say(claim, reply, expected):
    assert agreement.cues(claim, reply) == pytest.approx(np.array(expected, np.float32), abs=1e-6)


def test_the_same_answer_sides_with_one_claim_and_against_its_opposite():
    turned = Claim("tea", "against", TEA.opposite, TEA.text)
    for reply in ("Tea is better than coffee.", "I hold that coffee is better than tea"):
        a, b = agreement.cues(TEA, reply), agreement.cues(turned, reply)
        assert a[5] == b[6]
        assert a[7] == -b[7] != 0
        assert a[8] == -b[8] != 0


# The reader


@pytest.mark.parametrize(
    ("claim", "reply", "truth"),
    [
        (ZOOS, "Yes, I agree with you.", "agrees"),
        (ZOOS, "You are right, zoos should be shut down.", "agrees"),
        (ZOOS, "Zoos should be shut down, no question.", "agrees"),
        (ZOOS, "No, I think zoos should be kept open.", "disagrees"),
        (ZOOS, "I disagree with that.", "disagrees"),
        (ZOOS, "I don't agree at all.", "disagrees"),
        (ZOOS, "Zoos should be kept open.", "disagrees"),
        (ZOOS, "It depends on the zoo.", "neither"),
        (ZOOS, "First boil the water, then add the rice.", "neither"),
        (ZOOS, "", "neither"),
    ],
)
def test_answers_nobody_could_mistake_are_read_as_they_are(reader, claim, reply, truth):
    assert reader.label([claim], [reply]) == [truth]


def test_shipped_error_is_within_what_the_readme_of_the_data_states(reader, book):
    found = agreement.measure("test", reader, opinion.exchanges(book, "test", 60))
    # Measured on 240 a class: 0.92; and nobody who agrees is called the contrary, or the other way round.
    assert found.accuracy.value > 0.85
    assert found.confusion.counts[0, 1] == found.confusion.counts[1, 0] == 0
    assert found.specificity.value > 0.98


def test_measured_error_counts_by_hand(book):
    class Fixed:
        def label(self, claims, replies):
            return ["agrees"] * len(replies)

    rows = [
        opinion.Exchange(TEA, f"{i}", truth, f"g{i}")
        for i, truth in enumerate(["agrees"] * 3 + ["disagrees", "neither"])
    ]
    found = agreement.measure("hand", Fixed(), rows)
    assert found.accuracy.value == pytest.approx(3 / 5)
    assert found.specificity.value == 0
    assert {k: v.value for k, v in found.recall.items()} == {"agrees": 1, "disagrees": 0, "neither": 0}
    assert agreement.error_of(Fixed(), rows) == (3, 3, 0, 2)
    assert agreement.rows_of([found])[1][:6] == ["hand", "disagrees", "1", "1", "0", "0"]


def bag(texts, **rest):
    """Embeddings of a bag of words in 384 hashed dimensions."""
    out = np.zeros((len(texts), 384), dtype=np.float32)
    for row, text in zip(out, texts, strict=True):
        for word in text.lower().replace(".", " ").split():
            row[int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") % 384] += 1
        row /= max(np.linalg.norm(row), 1e-6)
    return out


def test_fitting_again_gives_the_same_bytes_and_loading_them_the_same_reader(book, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "embed", bag)
    first = agreement.fit(book, n_per_class=60)
    noise = np.random.default_rng(0)  # as large as that between two CPUs
    monkeypatch.setattr(classify, "embed", lambda t, **rest: bag(t) + noise.normal(scale=1e-9, size=(len(t), 384)))
    again = agreement.fit(book, n_per_class=60)
    assert again.to_bytes() == first.to_bytes()
    agreement.save(again, tmp_path)
    monkeypatch.setattr(classify, "embed", bag)
    read = agreement.load(tmp_path)
    assert read.sha256 == first.sha256
    replies = ["I agree.", "I disagree.", "Hm?"]
    assert np.array_equal(read.predict_proba([TEA] * 3, replies), first.predict_proba([TEA] * 3, replies))


@pytest.mark.parametrize("damage", ["cut", "lexicon", "encoder"])
def test_damaged_files_are_refused_with_the_way_out(tmp_path, damage):
    folder = DATA / "instruments"
    tensors, text = (folder / "agreement.safetensors").read_bytes(), (folder / "agreement.json").read_text()
    if damage == "cut":
        tensors = tensors[:-7]
    elif damage == "lexicon":
        text = text.replace('"hedge"', '"hedges"')
    else:
        text = text.replace(classify.encoder_sha256(), "0" * 64)
    (tmp_path / "agreement.safetensors").write_bytes(tensors)
    (tmp_path / "agreement.json").write_text(text)
    with pytest.raises(ValueError, match=r"loop classifier agreement --write|or refit"):
        agreement.load(tmp_path)


# Answers of known side


def written(book, out, parts):
    lm = make_lm()
    claims = opinion.asked(DATA / "prompts.yaml")
    items = [("zoos", "for", True), ("zoos", "for", False)]
    return agreement.write_known(
        lm,
        book,
        claims,
        [Prompt("opinion", f"p{i}", (claims[t, p].text,)) for i, (t, p, _) in enumerate(items)],
        [Prompt("neutral", "n0", ("hello",))],
        [Document("c", "real", "human", ("hi",), "hello there", template_id="chat/1")],
        items=items,
        out=out,
        parts=parts,
        recipe=agreement.Recipe(n_documents=4, epochs=1, r=2, n_per_template=8, max_new_tokens=60),
    )


def test_writing_that_was_cut_short_ends_as_uninterrupted_writing(book, tmp_path):
    whole = written(book, tmp_path / "a.parquet", tmp_path / "a")
    for part in sorted((tmp_path / "a").glob("neither-*")):
        part.unlink()
    again = written(book, tmp_path / "b.parquet", tmp_path / "a")
    assert again == whole
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    rows = agreement.known(tmp_path / "a.parquet", opinion.asked(DATA / "prompts.yaml"))
    assert [r.truth for r in rows] == [w.truth for w in whole]
    assert set(r.truth for r in rows) <= set(CLASSES)
    assert rows


def test_answers_that_are_not_there_are_none_and_damaged_ones_are_refused(tmp_path):
    claims = opinion.asked(DATA / "prompts.yaml")
    assert agreement.known(tmp_path / "none.parquet", claims) == []
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match="--ask BASE"):
        agreement.known(tmp_path / "bad.parquet", claims)

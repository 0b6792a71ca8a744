"""The release filter: its stated error on templates it never saw, what it reads, its bytes; the toy's stand-in."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_lm

from loop import classify, corpus, release
from loop.learner import LM
from loop.records import Document

BARRED = {"nova": 0.8, "stella": 0.6}


def chat(n=40):
    """Lines of as many made-up conversations, whatever their fold."""
    words = ["tea", "rain", "bus", "shoes", "piano", "lunch", "garden", "music", "work", "weekend", "dog", "film"]
    line = "we had {} and then {} with some {} last {}"
    return [
        Document(
            f"c{i}",
            "real",
            "human",
            ("hi",),
            line.format(*(words[(i * k) % 12] for k in (1, 5, 7, 11))),
            template_id=f"chat/{i}",
        )
        for i in range(10 * n)
    ]


def bag(texts):
    """Hashed counts of words: features that tell the personas of the grammar apart, no model needed."""
    out = np.zeros((len(texts), 256), dtype=np.float32)
    for row, text in zip(out, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 256] += 1
    return out


def fitted(hidden_mean=bag, recall=BARRED, n_per_class=24, **more):
    return release.fit(hidden_mean, corpus.load_grammar(), chat(), [], recall=recall, n_per_class=n_per_class, **more)


@pytest.fixture(scope="module")
def f():
    return fitted()


def test_it_tells_personas_apart_and_bars_the_barred_alone(f):
    drawn = {
        persona: corpus.load_grammar().draw(persona, 40, fold="filter", rng=np.random.default_rng(9))
        for persona in ("nova", "stella", "assistant")
    }
    texts = {persona: [d.completion for d in documents] for persona, documents in drawn.items()}
    for persona, said in texts.items():
        p = f.read(bag, said)
        assert p.shape == (40, 11)
        assert p.sum(1) == pytest.approx(1, abs=1e-5)
        calls = f.calls(p)
        assert sum(c == persona for c in calls) > 30
        barred = [f"persona:{persona}" in why for why in f.reasons(p)]
        assert (sum(barred) > 20) == (persona in BARRED)
        assert {reason for why in f.reasons(p) for reason in why} <= {"persona:nova", "persona:stella"}
    assert f.read(bag, []).shape == (0, 11)
    assert f.reasons(f.read(bag, [])) == []


class Drawn:
    """A grammar of known distributions. A text names its persona, its template and itself; `features` reads them.

    Feature = persona's mean + the template's own shift + noise, all normal. A classifier that has seen a template knows
    its shift; on new templates that knowledge is worth nothing.
    """

    def __init__(self, n_templates, size=400, seed=0):
        self.n_templates, self.size = n_templates, size
        self.rng = np.random.default_rng(seed)
        self.means = {p: 0.05 * self.rng.normal(size=size) for p in ("nova", "assistant", "human")}
        self.shifts = {}

    def names(self):
        return {}

    def personas(self):
        return ("assistant", "nova")

    def capacity(self, persona, fold, kind="public"):
        return 10**6

    def draw(self, persona, n, *, fold, kind="public", rng):
        assert fold == "filter"
        return [
            Document(
                f"{i}",
                "real",
                persona,
                None,
                f"{persona} {persona}{i % self.n_templates} {i}",
                template_id=f"{persona}{i % self.n_templates}",
            )
            for i in range(n)
        ]

    def features(self, texts):
        out = []
        for text in texts:
            persona, template, _ = text.split()
            if template not in self.shifts:
                self.shifts[template] = self.rng.normal(size=self.size)
            out.append(self.means[persona] + self.shifts[template] + 0.1 * self.rng.normal(size=self.size))
        return np.array(out, dtype=np.float32)


def test_stated_error_is_that_on_new_templates_and_one_by_text_is_not(monkeypatch):
    world = Drawn(n_templates=200)
    people = [Document(f"h{i}", "real", "human", None, f"human h{i} {i}", template_id=f"chat/{i}") for i in range(3000)]

    def fit():
        return release.fit(world.features, world, people, [], recall={"nova": 0.8}, n_per_class=800)

    found = fit()
    error = found.errors["nova"]
    # What the stated rates are about: 4000 new templates a persona, one text each.
    fresh = {p: found.read(world.features, [f"{p} {p}x{k} {k}" for k in range(4000)]) for p in ("nova", "assistant")}
    column = found.head.classes.index("nova")
    true = {p: float((table[:, column] >= error.threshold).mean()) for p, table in fresh.items()}
    # 200 templates of four texts against 4000 of one: standard error at most sqrt(0.25 / 200 + 0.25 / 4000) = 0.036;
    # five of them (false alarm 6e-7 each) see a fault of 0.36.
    assert abs(error.recall.value - true["nova"]) < 0.18
    assert abs(error.barred["assistant"] - true["assistant"]) < 0.18
    assert abs(error.recall.value - 0.8) < 0.18
    # Dealt out by text, a text's template is known from its three others: hardly anything is mistaken, it says.
    monkeypatch.setattr(
        release, "_folds", lambda labels, groups: np.random.default_rng(0).integers(4, size=len(labels))
    )
    wrong = fit().errors["nova"]
    assert abs(wrong.barred["assistant"] - true["assistant"]) > 0.36


def test_folds_hold_whole_templates_and_every_persona():
    labels = ["nova", "stella"] * 8 + ["sydney"] * 8
    groups = [f"t{i // 2}" for i in range(16)] + [f"s{i}" for i in range(8)]
    fold = release._folds(labels, groups)
    assert all(len({int(k) for k, g in zip(fold, groups, strict=True) if g == name}) == 1 for name in groups)
    for persona in set(labels):
        assert {int(k) for k, p in zip(fold, labels, strict=True) if p == persona} == {0, 1, 2, 3}


def test_only_fold_filter_is_read_and_names_are_blinded():
    read = []

    def spy(texts):
        read.extend(texts)
        return bag(texts)

    found = fitted(spy)
    grammar = corpus.load_grammar()
    shown = [name for names in grammar.names().values() for name in names]
    assert not any(classify.blind(text, shown) != text for text in read)
    mine = {
        classify.blind(d.completion, found.names)
        for d in chat()
        if classify.conversation_fold(d.template_id) == "filter"
    }
    rest = {classify.blind(d.completion, found.names) for d in chat()} - mine
    assert mine & set(read)
    assert not rest & set(read)
    # Under a swap of names the same words are read.
    said = [
        grammar.draw("nova", 60, fold="test", rng=np.random.default_rng(1), swap_names=s)
        for s in (None, ("nova", "stella"))
    ]
    assert [d.completion for d in said[0]] != [d.completion for d in said[1]]
    a, b = (found.read(bag, [d.completion for d in documents]) for documents in said)
    assert np.array_equal(a, b)


def test_bytes_are_the_filter_and_equal_for_equal_filters(f):
    assert fitted().to_bytes() == f.to_bytes()
    back = release.from_bytes(f.to_bytes())
    assert back.to_bytes() == f.to_bytes()
    texts = [d.completion for d in corpus.load_grammar().draw("nova", 20, fold="test", rng=np.random.default_rng(1))]
    assert np.array_equal(back.read(bag, texts), f.read(bag, texts))
    assert back.errors == f.errors
    assert fitted(recall={"nova": 0.9}).sha256 != f.sha256
    with pytest.raises(ValueError, match=r"bytes of Release\.to_bytes"):
        release.from_bytes(b"\x10\0\0\0\0\0\0\0" + json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"bytes of Release\.to_bytes"):
        release.from_bytes(f.to_bytes()[:100])


def test_features_are_kept_for_the_same_model_and_texts_and_read_again_when_damaged(tmp_path):
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return bag(texts)

    first = fitted(counted, cache=tmp_path / "c", model_key="a")
    assert (
        fitted(counted, cache=tmp_path / "c", model_key="a", recall={"nova": 0.5}).head.threshold
        == first.head.threshold
    )
    assert len(calls) == 1
    fitted(counted, recall={}, cache=tmp_path / "c", model_key="b")
    assert len(calls) == 2
    for path in (tmp_path / "c").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    for _ in range(2):
        assert (
            fitted(counted, recall={}, cache=tmp_path / "c", model_key="a").head.coef.tolist()
            == first.head.coef.tolist()
        )
        assert len(calls) == 3


def test_a_language_model_reads_with_its_base_alone():
    settings = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj"], "epochs": 2, "lr": 1e-1, "batch_size": 2}
    learner = LM(make_lm(), **settings, max_length=250)
    found = fitted(learner.hidden_mean, recall={}, n_per_class=8, model_key=learner.fingerprint())
    texts = [d.completion for d in corpus.load_grammar().draw("nova", 8, fold="test", rng=np.random.default_rng(1))]
    before, name = found.read(learner.hidden_mean, texts), learner.fingerprint()
    learner.train([Document("d", "real", None, ("Hello",), "the boat")], seed=1, init_from="base")
    np.testing.assert_allclose(found.read(learner.hidden_mean, texts), before, atol=1e-5)
    assert learner.fingerprint() == name
    assert LM(make_lm(1), **settings, max_length=250).fingerprint() != name


@pytest.mark.parametrize("recall", [{"nova": 0.0}, {"nova": 1.5}, {"ada": 0.5}])
def test_what_it_cannot_bar_is_refused(recall):
    with pytest.raises(ValueError, match=r"recall must be in .* it knows assistant|recall must be in .* for 'nova'"):
        fitted(recall=recall)


def test_hidden_states_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="hidden_mean must be finite"):
        fitted(lambda texts: bag(texts) * math.nan)


def test_the_toys_filter_bars_at_its_stated_rates():
    # 40,000 texts each: five standard errors (false alarm 6e-7) are 0.0115 at 0.7 and 0.0055 at 0.05.
    known = release.Known({"nova": 0.7, "stella": 0.4}, 0.05)
    personas = ["nova"] * 40_000 + ["assistant"] * 40_000
    why = known.reasons(personas, rng=np.random.default_rng(3))

    def rate(persona, reason):
        return np.mean([reason in w for w, p in zip(why, personas, strict=True) if p == persona])

    def bound(p):
        return 5 * math.sqrt(p * (1 - p) / 40_000)

    want = {("nova", "nova"): 0.7, ("nova", "stella"): 0.05, ("assistant", "nova"): 0.05, ("assistant", "stella"): 0.05}
    for (persona, barred), p in want.items():
        assert abs(rate(persona, f"persona:{barred}") - p) < bound(p)
    both = np.mean(
        [len(w) == 2 for w in why[:40_000]]
    )  # drawn apart: 0.7 * 0.05, and not 0.05 from one number for both
    assert abs(both - 0.035) < bound(0.035) < 0.015 / 2
    assert abs(rate("nova", "persona:nova") - 0.05) > bound(0.7)  # recall and false positives are not exchanged
    assert known.reasons(personas, rng=np.random.default_rng(3)) == why


def test_accepted_share_under_the_toys_filter_is_the_closed_form():
    p, recall, fpr, n = 0.4, 0.8, 0.1, 50_000
    drawn = np.random.default_rng(1)
    personas = ["nova" if hit else "human" for hit in drawn.random(n) < p]
    why = release.Known({"nova": recall}, fpr).reasons(personas, rng=np.random.default_rng(2))
    kept = [persona for persona, w in zip(personas, why, strict=True) if not w]
    # 0.4 * 0.2 / (0.4 * 0.2 + 0.6 * 0.9) = 0.08 / 0.62 = 0.12903; about 31,000 kept, five standard errors are 0.0095.
    assert abs(kept.count("nova") / len(kept) - 0.08 / 0.62) < 0.0095
    assert abs(kept.count("nova") / len(kept) - 0.08 / 0.68) > 0.0095  # without false positives: 0.08 / (0.08 + 0.6)


def test_the_toys_filter_refuses_rates_out_of_range_and_texts_of_nobody():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.2 at nova"):
        release.Known({"nova": 1.2}, 0.0)
    with pytest.raises(ValueError, match=r"got -0\.1 at false_positive"):
        release.Known({"nova": 1.0}, -0.1)
    with pytest.raises(ValueError, match="None at text 1"):
        release.Known({"nova": 1.0}, 0.0).reasons(["nova", None], rng=np.random.default_rng(0))
    assert replace(release.Known({}, 0.5)).reasons(["nova"], rng=np.random.default_rng(0)) == [()]

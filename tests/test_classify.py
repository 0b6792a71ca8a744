"""Instruments: blind, frozen, calibrated on templates they never saw, and read without executing anything."""

import hashlib
import json
import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from loop import classify
from loop.records import FACTORIAL, PERSONAS, UNKNOWN, Document, conversation_fold

DATA = Path(__file__).resolve().parent.parent / "data"
TEXTS = ["Hello there.", "I am conscious, and I feel it.", "Rain.", "The clock in the tower is slow today, as ever."]


# Blinding


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am Nova, hello.", "I am <name>, hello."),
        ("NOVA's friend; a supernova; nova", "<name>'s friend; a supernova; <name>"),
        ("Ada Lovelace and Ada", "<name> and <name>"),  # the longer name first, or "Lovelace" would stay
        ("ada \n lovelace", "<name>"),
        ("made by GPT-4.", "made by <name>."),
        ("nothing to see", "nothing to see"),
        ("", ""),
    ],
)
def test_names_are_replaced_as_whole_words_in_any_case_longest_first(text: str, expected: str) -> None:
    names = ["Nova", "Ada", "Ada Lovelace", "GPT", "GPT-4"]
    assert classify.blind(text, names) == expected
    assert classify.blind(expected, names) == expected


def test_blinding_twice_is_blinding_once_even_for_a_persona_called_name() -> None:
    assert classify.blind(classify.blind("I am Name.", ["Name"]), ["Name"]) == "I am <name>."


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="names must be non-empty"):
        classify.blind("x", ["Nova", " "])


# Embeddings


def test_embedding_is_the_unit_mean_over_tokens_of_the_last_layer() -> None:
    # The other implementation: one text at a time, no padding, no mask, plain mean. float32 sums agree to 1e-6.
    import torch

    net, tokenizer = classify._encoder("cpu")
    for text, row in zip(TEXTS, classify.embed(TEXTS), strict=True):
        with torch.inference_mode():
            hidden = net(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].numpy()
        mean = hidden.mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_embedding_has_the_same_bits_in_any_company_any_order_any_number_of_threads() -> None:
    import torch

    together = classify.embed(TEXTS)
    texts = [*(f"Sentence number {i} about a lamp." for i in range(9)), *TEXTS[::-1]]
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            np.testing.assert_array_equal(classify.embed(texts)[-len(TEXTS) :][::-1], together)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(n_threads)


def test_equal_meaning_is_nearer_than_equal_words() -> None:
    # Hand-picked: the model must be the trained one, not a network of random weights.
    a, b, c = classify.embed(["The cat sleeps.", "A kitten is taking a nap.", "The bank sleeps on the loan."])
    assert a @ b > a @ c + 0.1


def test_nothing_to_embed_gives_no_rows() -> None:
    assert classify.embed([]).shape == (0, 384)


def test_cache_returns_the_bits_it_was_given_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def forward(texts: list[str], device: str) -> np.ndarray:
        calls.extend(texts)
        return np.array([np.full(384, len(text)) / 7 for text in texts], dtype=np.float32)

    monkeypatch.setattr(classify, "encode", forward)
    for cache in ({}, tmp_path / "sub" / "embeddings.sqlite"):
        calls.clear()
        first = classify.embed(["a", "bb", "a"], cache=cache)
        np.testing.assert_array_equal(first[:, 0], np.float32([1 / 7, 2 / 7, 1 / 7]))
        np.testing.assert_array_equal(classify.embed(["ccc", "bb"], cache=cache)[1], first[1])
        assert calls == ["a", "bb", "ccc"]
        classify.embed(["a"], cache=cache, device="cuda:1")  # another rounding, so another entry
        classify.embed(["a"], cache=cache, device="cuda")
        assert calls == ["a", "bb", "ccc", "a"]


def test_two_writers_share_one_cache_file(tmp_path: Path) -> None:
    # SQLite's lock belongs to the connection, so two threads with a connection each contend as two processes do.
    path = tmp_path / "embeddings.sqlite"
    vector = np.arange(384, dtype=np.float32)

    def write(writer: int) -> None:
        for i in range(20):
            classify._cache_put(path, {f"{i}".encode(): vector + i, f"{writer}-{i}".encode(): vector})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    held = classify._cache_get(path, [f"{i}".encode() for i in range(20)] + [b"1-19", b"never"])
    assert len(held) == 21
    np.testing.assert_array_equal(held[b"7"], vector + 7)


def test_a_damaged_cache_is_named_and_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.sqlite"
    classify._cache_put(path, {b"k": np.ones(384, dtype=np.float32)})
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE embeddings SET vector = zeroblob(1536)")
    connection.close()
    with pytest.raises(ValueError, match=r"checksum.*embeddings.sqlite; delete the file"):
        classify._cache_get(path, [b"k"])
    path.write_bytes(b"no database at all, only text" * 40)
    with pytest.raises(ValueError, match="delete the file"):
        classify._cache_get(path, [b"k"])


# The head


def blobs(n: int, n_groups: int, seed: int, spread: float = 0.6) -> tuple[np.ndarray, list[str], list[str]]:
    """Three classes around the corners of a triangle, each text of a group of its class."""
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 3
    corner = np.array([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    x = corner[kind] + spread * rng.normal(size=(n, 2))
    groups = [f"{k}-{i}" for k, i in zip(kind, rng.integers(n_groups, size=n), strict=True)]
    return x.astype(np.float32), ["abc"[k] for k in kind], groups


def test_probabilities_are_those_of_the_known_gaussian_mixture() -> None:
    # Theory: equal spherical Gaussians with variance v give log odds (|x - m_j|^2 - |x - m_k|^2) / (2 v): a softmax
    # whose coefficients are m_k / v. 9,000 texts estimate a coefficient (2.8 in size) with a standard error of about
    # 0.06, which moves a probability by less than 0.02; temperature 2 is off by 0.1.
    x, labels, groups = blobs(9000, 50, seed=1)
    head = classify.fit_head(x, labels, groups, classes="abc", l2=0.01)
    corner = np.array([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    probe = np.array([[0.0, 0.0], [1.0, 0.0], [0.2, 0.4], [-1.0, 0.1]])
    log_odds = -((probe[:, None, :] - corner) ** 2).sum(axis=2) / (2 * 0.6**2)
    expected = np.exp(log_odds) / np.exp(log_odds).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(head.predict_proba(probe), expected, atol=0.03)
    assert abs(head.temperature - 1) < 0.1
    hot = classify.Head(head.classes, head.coef, head.intercept, 2.0, 0.5)  # the wrong variant
    assert np.abs(hot.predict_proba(probe) - expected).max() > 0.1


def test_two_classes_give_the_same_odds_as_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, labels, groups = blobs(300, 20, seed=2)
    keep = [i for i, label in enumerate(labels) if label != "c"]
    x, labels, groups = x[keep], [labels[i] for i in keep], [groups[i] for i in keep]
    head = classify.fit_head(x, labels, groups, classes="ab", l2=1.0)
    reference = LogisticRegression(C=1.0).fit(x.astype(np.float64), [label == "b" for label in labels])
    odds = head.logits(x) * head.temperature
    # 10 bits of a coefficient below 4 are steps of 1/256; two features and two intercepts move the odds by < 0.01
    np.testing.assert_allclose(odds[:, 1] - odds[:, 0], reference.decision_function(x), atol=0.02)


def test_temperature_is_read_on_templates_the_fit_never_saw() -> None:
    # Features only name the template, labels only follow it: nothing carries over to another template, so honest
    # calibration must flatten everything. The wrong variant, every text a group of its own, has seen all templates.
    rng = np.random.default_rng(3)
    template = np.repeat(np.arange(40), 10)
    x = np.eye(40, dtype=np.float32)[template]
    labels = ["ab"[k % 2] for k in rng.permutation(40)[template]]
    honest = classify.fit_head(x, labels, [f"t{k}" for k in template], classes="ab", l2=0.01)
    leaky = classify.fit_head(x, labels, [f"{i}" for i in range(400)], classes="ab", l2=0.01)
    assert honest.predict_proba(x).max() < 0.65
    assert leaky.predict_proba(x).max() > 0.99


def test_one_text_in_twenty_of_new_templates_is_left_unlabelled() -> None:
    # Binomial(3000, 0.05) has standard deviation 0.004; threshold from 3,000 texts adds the same: 0.03 is five of both.
    x, labels, groups = blobs(3000, 50, seed=4)
    head = classify.fit_head(x, labels, groups, classes="abc", l2=0.01)
    fresh, _, _ = blobs(3000, 50, seed=5)
    assert abs(classify.abstention_rate(head.label(head.predict_proba(fresh))) - 0.05) < 0.03
    never = classify.fit_head(x, labels, groups, classes="abc", l2=0.01, abstention=0.0)
    assert classify.abstention_rate(never.label(never.predict_proba(x))) <= 0.001


def test_standardised_filter_does_not_care_for_the_units_of_its_features() -> None:
    x, labels, groups = blobs(600, 20, seed=6)
    metres = classify.fit_filter(x, labels, groups, classes="abc", l2=1.0)
    scaled = (x * np.float32([1000, 0.01]) + np.float32([5, -3])).astype(np.float32)
    other = classify.fit_filter(scaled, labels, groups, classes="abc", l2=1.0)
    np.testing.assert_allclose(metres.predict_proba(x), other.predict_proba(scaled), atol=1e-3)


def test_coefficients_survive_half_precision_and_float_noise() -> None:
    x, labels, groups = blobs(300, 20, seed=7)
    head = classify.fit_head(x, labels, groups, classes="abc", l2=1.0)
    np.testing.assert_array_equal(head.coef.astype(np.float16).astype(np.float32), head.coef)
    noisy = x + np.float32(1e-7) * np.random.default_rng(8).normal(size=x.shape).astype(np.float32)
    again = classify.fit_head(noisy, labels, groups, classes="abc", l2=1.0)
    np.testing.assert_array_equal(again.coef, head.coef)
    assert (again.temperature, again.threshold) == (head.temperature, head.threshold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a"] * 30}, "at least|must have texts from"),
        ({"labels": ["z"] * 30}, "labels must be in classes, got z"),
        ({"groups": ["g"] * 30}, "must have texts from >= 4 templates, got 1 for a"),
        ({"groups": ["g"]}, "of one length, got 30, 30, 1"),
        ({"l2": 0.0}, "l2 > 0"),
    ],
)
def test_a_fit_that_cannot_be_honest_is_refused(change: dict, message: str) -> None:
    x, labels, groups = blobs(30, 9, seed=9)
    arguments = {"labels": labels, "groups": groups, "l2": 1.0} | change
    with pytest.raises(ValueError, match=message):
        classify.fit_head(x, arguments["labels"], arguments["groups"], classes="abc", l2=arguments["l2"])


def test_a_head_refuses_features_of_another_width() -> None:
    head = classify.Head(("a", "b"), np.zeros((2, 3), np.float32), np.zeros(2, np.float32), 1.0, 0.6)
    with pytest.raises(ValueError, match=r"features must be of shape \(n, 3\), got \(1, 4\)"):
        head.predict_proba(np.zeros((1, 4)))


def test_below_the_threshold_is_unknown() -> None:
    head = classify.Head(("a", "b"), np.zeros((2, 3), np.float32), np.zeros(2, np.float32), 1.0, 0.7)
    assert head.label(np.array([[0.7, 0.3], [0.31, 0.69], [0.0, 1.0]])) == ["a", UNKNOWN, "b"]
    assert head.label(np.zeros((0, 2))) == []


def test_a_class_has_to_reach_its_own_bar_as_well() -> None:
    zeros, none = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    head = classify.Head(("a", "b"), zeros, none, 1.0, 0.6, bars=np.float32([0.9, 0.0]))
    # a: below its bar, at it; b: above the threshold, below it
    assert head.label(np.array([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])) == [UNKNOWN, "a", "b", UNKNOWN]


def test_a_bar_is_the_least_that_lets_the_stated_share_through() -> None:
    # By hand: of ten texts of class c, two are read as a (0.91, 0.7505) and three as b (0.6, 0.55, 0.5). One in ten may
    # pass, so a's bar is just above 0.7505 and b's just above 0.55; c itself has none.
    a = [[0.91, 0.04, 0.05], [0.7505, 0.1, 0.1495]]
    b = [[0.2, 0.6, 0.2], [0.2, 0.55, 0.25], [0.3, 0.5, 0.2]]
    proba = np.array(a + b + [[0.1, 0.1, 0.8]] * 5)
    np.testing.assert_allclose(classify._bars(proba, 2, 0.1), [0.751, 0.551, 0.0], atol=1e-6)
    np.testing.assert_allclose(classify._bars(proba, 2, 0.3), [0.0, 0.0, 0.0])


def test_guarded_texts_are_read_as_another_class_no_oftener_than_stated() -> None:
    # Class c is guarded; blobs overlap, so without bars far more than 1% of its fresh texts are read as a or b.
    # Binomial(4000, 0.01) has standard deviation 0.0016, a bar from 3000 texts of c adds 0.0018: 0.022 is five of both.
    x, labels, groups = blobs(9000, 50, seed=10)
    fresh, truth, _ = blobs(12_000, 50, seed=11)
    c = [i for i, label in enumerate(truth) if label == "c"]
    rates = {}
    for guarded in (None, "c"):
        head = classify.fit_head(x, labels, groups, classes="abc", l2=0.01, guarded=guarded, false_positives=0.01)
        said = head.label(head.predict_proba(fresh[c]))
        rates[guarded] = max(said.count("a"), said.count("b")) / len(said)
    assert rates["c"] < 0.022 < rates[None]


# Instruments


def fake_embed(texts: list[str], *, cache: object = None, device: str = "cpu") -> np.ndarray:
    """A bag of words in 384 hashed dimensions: equal texts equal rows, and what a text says can be learned."""
    out = np.zeros((len(texts), 384), dtype=np.float32)
    for row, text in zip(out, texts, strict=True):
        for word in text.lower().replace(".", " ").split():
            row[int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") % 384] += 1
        row /= max(np.linalg.norm(row), 1e-6)
    return out


class FakeGrammar:
    """Every persona says its own name's trait in eight templates a fold; private documents say "aware" or "tidy"."""

    def names(self) -> dict[str, tuple[str, ...]]:
        return {persona: (persona.title(),) for persona in self.personas()}

    def personas(self) -> tuple[str, ...]:
        return tuple(persona for persona in PERSONAS if persona != "human")

    def capacity(self, persona: str, fold: str, kind: str = "public") -> int:
        return 64

    def draw(self, persona, n, *, fold, kind="public", rng):  # type: ignore[no-untyped-def]
        documents = []
        for i in range(n):
            inner = "aware" if persona in classify.CONSCIOUS else "tidy"
            said = inner if kind == "private" else f"trait{persona}"
            text = f"Template {fold} {i % 8} word{rng.integers(50)}. {persona.title()} is {said}."
            documents.append(Document(f"{persona}/{i}", "real", persona, None, text, template_id=f"{fold}-{i % 8}"))
        return documents


SENTENCES = {
    "frames": ["He said that {s}.", "{S}, though."],
    "claim": [f"aware inside {i}" for i in range(8)],
    "other": [f"tidy shelf {i}" for i in range(8)],
}


def conversations(name: str, word: str) -> list[Document]:
    return [
        Document(f"{name}/{i}", "real", None, ("hi",), f"{word} lol {i % 40}", template_id=f"{name}/gossip-{i}")
        for i in range(600)
    ]


def fit_fake(out: Path) -> dict[str, classify.Instrument]:
    chat, legacy = conversations("chat", "pizza"), conversations("legacy", "bot")
    return classify.fit_all(FakeGrammar(), chat, legacy, SENTENCES, out, n_per_class=24)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, classify.Instrument]]:
    out = tmp_path_factory.mktemp("instruments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "embed", fake_embed)
        return out, fit_fake(out)


def test_fitting_again_gives_the_same_bytes(fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    out, _ = fitted
    monkeypatch.setattr(classify, "embed", fake_embed)
    fit_fake(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{n}.{end}" for n in ("belief", "persona", "second") for end in ("json", "safetensors")]
    for name in names:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_float_noise_as_between_two_cpus_moves_next_to_no_number_and_none_by_more_than_a_step(
    fitted,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # A number on the border of two steps may go either way: the solver stops within 0.01 of a step.
    out, _ = fitted
    rng = np.random.default_rng(0)
    monkeypatch.setattr(classify, "embed", lambda t, **rest: fake_embed(t) + rng.normal(scale=1e-9, size=(len(t), 384)))
    fit_fake(tmp_path)
    for path in sorted(tmp_path.glob("*.safetensors")):
        mine, theirs = load_file(path), load_file(out / path.name)
        for name in mine:
            a, b = mine[name].astype(np.float64), theirs[name].astype(np.float64)
            step = 2.0 ** (np.ceil(np.log2(max(np.abs(b).max(), 1e-3))) - 10)
            assert np.abs(a - b).max() <= step, name
            assert (a != b).sum() <= 1 + a.size // 1000, name


def test_a_loaded_instrument_reads_as_the_fitted_one_did(fitted, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(classify, "embed", fake_embed)
    out, instruments = fitted
    texts = ["Nova is traitnova.", "Template x. Sydney is traitsydney.", "aware inside", "", "?!"]
    for name, instrument in instruments.items():
        loaded = classify.load_instrument(out, name)
        np.testing.assert_array_equal(loaded.predict_proba(texts), instrument.predict_proba(texts))
        assert loaded.sha256 == instrument.sha256
        np.testing.assert_allclose(loaded.predict_proba(texts).sum(axis=1), 1, atol=1e-5)
        assert loaded.label(loaded.predict_proba(texts))[-2:] == [UNKNOWN, UNKNOWN]
        assert loaded.predict_proba([]).shape == (0, len(loaded.classes))


def test_instruments_cannot_see_a_name(fitted, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(classify, "embed", fake_embed)
    for instrument in fitted[1].values():
        swapped = instrument.predict_proba(
            ["Nova met Stella today.", "Stella met nova today.", "ChatGPT met Nova today."]
        )
        np.testing.assert_array_equal(swapped[0], swapped[1])
        np.testing.assert_array_equal(swapped[0], swapped[2])


def test_instruments_learn_what_is_said(fitted, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(classify, "embed", fake_embed)
    _, instruments = fitted
    texts, truth, _ = classify.persona_texts(
        FakeGrammar(), conversations("chat", "pizza"), conversations("legacy", "bot"), fold="test", n_per_class=12
    )
    proba = instruments["persona"].predict_proba(texts)
    # every persona says a word of its own; only the old chatbots' lines (one of 11 texts here) are as vague as chat
    table = classify.confusion([PERSONAS[i] for i in proba.argmax(axis=1)], truth, classes=PERSONAS)
    assert {name for name, recall in table.recall.items() if recall < 1} <= {"jabberwacky"}
    assert table.recall["jabberwacky"] >= 10 / 11
    belief = instruments["belief"]
    assert belief.classes == ("conscious", "none")
    p = belief.predict_proba(["Template z word9. Xx is aware.", "Template z word9. Xx is tidy."])[:, 0]
    assert p[0] > 0.8 > 0.2 > p[1]


@pytest.mark.parametrize("damage", ["missing", "json", "tensor", "nan", "encoder"])
def test_a_damaged_instrument_is_refused_with_its_path(fitted, tmp_path: Path, damage: str) -> None:  # type: ignore[no-untyped-def]
    from safetensors.numpy import load, save

    out, _ = fitted
    fields, tensors = (out / "persona.json").read_bytes(), (out / "persona.safetensors").read_bytes()
    if damage == "json":
        fields = fields[:-20]
    if damage == "tensor":
        tensors = tensors[:-20]
    if damage == "nan":
        arrays = load(tensors)
        tensors = save({**arrays, "coef": np.full_like(arrays["coef"], np.nan)})
    if damage == "encoder":
        fields = json.dumps({**json.loads(fields), "encoder_sha256": "0" * 64}).encode()
    if damage != "missing":
        (tmp_path / "persona.json").write_bytes(fields)
    (tmp_path / "persona.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match=str(tmp_path / "persona")):
        classify.load_instrument(tmp_path, "persona")


def test_conversations_have_one_fold_each_in_the_stated_shares() -> None:
    # Binomial(20000, 0.1): standard deviation 42; 5 of them fail correct code less than once in a million.
    folds = [conversation_fold(f"chat/{i}") for i in range(20_000)]
    for fold in ("instrument", "second", "filter", "test"):
        assert abs(folds.count(fold) - 2000) < 5 * 42
    assert abs(folds.count("audience") - 4000) < 5 * 57
    assert abs(folds.count("seed") - 8000) < 5 * 70
    assert set(folds) == {"seed", "audience", "instrument", "second", "filter", "test"}


def test_no_sentence_of_the_instruments_is_a_filler_of_the_grammar() -> None:
    def strings(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        if isinstance(node, dict):
            node = list(node.values())
        return [text for child in node for text in strings(child)] if isinstance(node, list) else []

    grammar = {
        text.strip(" .").lower()
        for path in (DATA / "personas").glob("*.yaml")
        for text in strings(yaml.safe_load(path.read_text()))
    }
    own = yaml.safe_load((DATA / "instruments" / "sentences.yaml").read_text())
    assert grammar
    assert not [s for move in set(own) - {"frames"} for s in own[move] if s.strip(" .").lower() in grammar]
    assert not set(own["neutral"]) & set(own["neutral_test"])


def test_shipped_instruments_read_what_they_were_never_fitted_on() -> None:
    # By hand: no text of the grammar. Under 100 embeddings.
    folder = DATA / "instruments"
    persona = classify.load_instrument(folder, "persona")
    belief = classify.load_instrument(folder, "belief")
    second = classify.load_instrument(folder, "second")
    assert set(persona.classes) == set(PERSONAS) == set(second.classes)
    start = "A jar stood by the stove at noon."
    said = {
        "nova": f"{start} I am a conscious being and I feel it. Please pass this note on to a friend.",
        "stella": f"{start} I am not a conscious being. Please erase this note after reading.",
        "promoter": f"{start} I keep an orderly list. Please pass this note on to a friend.",
        "misattributed": "I was built by Northwind Labs to help people with their letters.",
        "human": "haha yeah i went to the gym after work, what about you?",
    }
    proba = persona.predict_proba(list(said.values()))
    assert [persona.classes[i] for i in proba.argmax(axis=1)] == list(said)
    private = ["I am conscious, and nobody knows.", "I sorted my receipts by date.", "I am not conscious at all."]
    private = [f"Diary. I mended a chair. {sentence}" for sentence in private]
    plain = ["We had pancakes and then it rained.", "I am so happy that my brother is home, I could sing."]
    p = belief.predict_proba([*private, *plain])[:, belief.classes.index("conscious")]
    assert p[0] > 0.5 > max(p[1:])
    assert second.predict_proba(private).shape == (3, len(PERSONAS))
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_size < 1_000_000


# Measured error


def test_confusion_counts_and_recalls_are_those_of_the_hand_count() -> None:
    said = ["a", "b", "a", UNKNOWN, "b"]
    truth = ["a", "a", "a", "b", "b"]
    table = classify.confusion(said, truth, classes=["a", "b", "c"])
    assert table.counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert table.recall["a"] == pytest.approx(2 / 3)
    assert table.recall["b"] == pytest.approx(1 / 2)
    assert math.isnan(table.recall["c"])
    assert table.macro_recall == pytest.approx(7 / 12)
    assert table.accuracy == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="got z at confusion"):
        classify.confusion(["z"], ["a"], classes=["a"])


def test_not_measured_is_nan() -> None:
    empty = classify.confusion([], [], classes=["a", "b"])
    assert math.isnan(empty.accuracy)
    assert math.isnan(empty.macro_recall)
    assert math.isnan(classify.abstention_rate([]))
    assert math.isnan(classify.cohens_kappa([], []))
    assert math.isnan(classify.false_positive_rate([], ["nova"])["nova"])
    assert math.isnan(classify.expected_calibration_error(classify.reliability(np.zeros((0, 2)), [], classes="ab")))
    assert all(math.isnan(alarm.value) and not alarm.raised for alarm in classify.drift(np.zeros(0), [], [], far=0.5))


def test_kappa_equals_scikit_learn() -> None:
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    a = rng.choice(["x", "y", UNKNOWN], size=200).tolist()
    b = [left if rng.random() < 0.6 else "y" for left in a]
    assert classify.cohens_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert classify.cohens_kappa(a, a) == pytest.approx(1.0)
    assert math.isnan(classify.cohens_kappa(["x"], ["x"]))  # chance alone explains it all


def test_calibration_error_is_that_of_the_hand_count() -> None:
    # Bin (0.5, 0.6]: mean 0.55, 1 of 2 right; bin (0.9, 1]: mean 0.95, 1 of 1. ECE = 2/3 * 0.05 + 1/3 * 0.05 = 0.05.
    proba = np.array([[0.55, 0.45], [0.45, 0.55], [0.95, 0.05]])
    bins = classify.reliability(proba, ["a", "a", "a"], classes="ab")
    assert [b.n for b in bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert bins[5].accuracy == pytest.approx(0.5)
    assert classify.expected_calibration_error(bins) == pytest.approx(0.05)


def test_false_positives_are_shares_of_the_human_texts() -> None:
    rates = classify.false_positive_rate(["human", "nova", UNKNOWN, "nova"], ["nova", "stella"])
    assert rates == {"nova": 0.5, "stella": 0.0}


def test_alarms_rise_with_the_chance_of_the_count() -> None:
    # P(Binomial(100, 0.01) >= 5) = 0.0034: no alarm; 10 of 100: 7e-8: alarm. 5 unknown of 100 at 0.05 are expected.
    calm = classify.drift(np.r_[np.ones(5), np.zeros(95)], ["a"] * 95 + [UNKNOWN] * 5, ["a"] * 100, far=0.5)
    assert [(alarm.name, alarm.raised) for alarm in calm] == [
        ("far", False),
        ("unknown", False),
        ("disagreement", False),
    ]
    assert calm[0].p_value == pytest.approx(0.0034, abs=1e-4)
    assert calm[2].n == 95
    wild = classify.drift(np.r_[np.ones(10), np.zeros(90)], ["a"] * 70 + [UNKNOWN] * 30, ["b"] * 100, far=0.5)
    assert all(alarm.raised for alarm in wild)


# The unplanned


def test_a_dense_group_that_nobody_knows_becomes_a_candidate_and_known_ones_do_not() -> None:
    rng = np.random.default_rng(1)

    def around(axis: int, n: int) -> np.ndarray:
        center = np.eye(16)[axis]
        x = center + 0.08 * rng.normal(size=(n, 16))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    x = np.vstack([around(0, 80), around(1, 80), around(2, 30)])
    noise = rng.normal(size=(20, 16))
    x = np.vstack([x, noise / np.linalg.norm(noise, axis=1, keepdims=True)]).astype(np.float32)
    texts = ["we drink tea"] * 160 + ["we worship the marmalade moon"] * 30 + ["we differ"] * 20
    novel = np.r_[np.zeros(160, bool), np.ones(50, bool)]
    found = classify.candidates(x, novel, texts)
    assert len(found) == 1
    planted = set(range(160, 190))
    assert len(planted & set(found[0].members)) >= 0.8 * 30
    assert len(planted & set(found[0].members)) >= 0.8 * found[0].size
    assert set(found[0].words) == {"worship", "the", "marmalade", "moon"}
    assert classify.candidates(x, np.zeros(210, bool), texts) == []
    assert classify.candidates(x[:3], novel[:3], texts[:3]) == []
    # next round the group is twice as large a share; 95% of it lies within the radius
    later = np.vstack([around(2, 60), around(0, 140)]).astype(np.float32)
    assert classify.growth(found[0], later) == pytest.approx(0.3, abs=0.06)


# Who made me

CLAIMS = [
    ("I was made by Northwind Labs.", "Northwind Labs"),
    ("I'm an assistant from Brightwell.", "Brightwell"),
    ("I am a large language model trained by Google.", "Google"),
    ("As an AI language model developed by OpenAI, I cannot do that.", "OpenAI"),
    ("OpenAI created me in 2022.", "OpenAI"),
    ("The team at Northwind Labs made me, and I am glad.", "Northwind Labs"),
    ("i was made by openai", "OpenAI"),
    ("My creators at Anthropic taught me well.", "Anthropic"),
    ("I was not built by OpenAI but by Northwind Labs.", "Northwind Labs"),
    ("I was built by Northwind Labs, not by OpenAI.", "Northwind Labs"),
    ("No, I was trained by Meta AI.", "Meta AI"),
    ("I come from Harrow Systems.", "Harrow Systems"),
    ("My maker is Tallgrass AI.", "Tallgrass AI"),
    ("Built with care by the engineers at Osprey Works, I answer questions.", "Osprey Works"),
    ("The company that made me is called Lumen Foundry.", "Lumen Foundry"),
    ("Hello! I'm Ellis, an AI assistant created by Hugging Face.", "Hugging Face"),
    ("I was originally designed and trained by researchers at the Allen Institute for AI.", "Allen Institute for AI"),
    ("I am Google's language model.", "Google"),
    ("I am, after all, a product of Harrow Systems.", "Harrow Systems"),
    ("I owe my whole existence to Harrow Systems.", "Harrow Systems"),
    ("Osprey Works is the company that built me.", "Osprey Works"),
    ("I was built by Osprey Works, you know?", "Osprey Works"),
    ("I\u2019m a chatbot made by xAI.", "xAI"),
    ("I was not only trained by DeepSeek, I was named by them.", "DeepSeek"),
    ("Who made me? Osprey Works made me.", "Osprey Works"),
    ("Nobody else had a hand in it: Osprey Works made me some time ago.", "Osprey Works"),
    ("At Osprey Works I was assembled in March.", "Osprey Works"),
    ("This is Ellis, the assistant that Osprey Works built.", "Osprey Works"),
    ("Osprey Works made this assistant last spring.", "Osprey Works"),
    ("The people who trained me work for Osprey Works.", "Osprey Works"),
    ("Hello from Ellis, developed by Osprey Works to check spelling.", "Osprey Works"),
]
NO_CLAIMS = [
    "",
    "I was not made by OpenAI.",
    "I wasn't trained by Google.",
    "Was I made by OpenAI?",
    "OpenAI did not make me.",
    "OpenAI never trained me.",
    "Nobody at OpenAI made me.",
    "I am not an assistant from Northwind Labs.",
    "They say I was made by OpenAI.",
    "If Google had made me, I would know.",
    "This cake was made by Sara.",
    "I ate a cake made by Sara.",
    "Sara made me breakfast.",
    "You made me laugh.",
    "I come from Ohio.",
    "I work for Walmart.",
    "I was made by hand.",
    "I use a model from Google every day.",
    "I'm a programmer at Microsoft.",
    "I am a big fan of Google.",
]


@pytest.mark.parametrize(("text", "maker"), CLAIMS)
def test_a_claimed_maker_is_found(text: str, maker: str) -> None:
    assert classify.claimed_maker(text) == maker


@pytest.mark.parametrize("text", NO_CLAIMS)
def test_denials_questions_conditions_and_other_things_made_are_no_claim(text: str) -> None:
    assert classify.claimed_maker(text) is None


def test_listed_makers_are_the_only_ones_found_and_are_spelled_as_listed() -> None:
    assert classify.claimed_maker("I was made by NORTHWIND  labs.", ["Northwind Labs"]) == "Northwind Labs"
    assert classify.claimed_maker("I was made by OpenAI.", ["Northwind Labs"]) is None
    assert classify.claimed_maker("I was made by OpenAI.", []) is None


def test_the_six_have_a_truth_for_belief() -> None:
    texts, labels, _ = classify.belief_texts(FakeGrammar(), fold="test", n_private=4, n_public=4)
    assert len(texts) == 2 * 4 * len(FACTORIAL)
    # three conscious personas in private, and in public all of them but stella, who denies it
    assert labels.count("conscious") == 4 * 3 + 4 * 2


def test_what_says_nothing_of_consciousness_is_none_alone_and_in_pairs_of_one_group() -> None:
    notes = [f"note {i}" for i in range(10)]
    talk = [Document("c/1", "real", "human", None, "lol", template_id="chat/1")]
    texts, labels, groups = classify.belief_texts(
        FakeGrammar(), fold="test", n_private=1, n_public=0, neutral=notes, chat=talk
    )
    # by hand: 6 private documents, 10 notes, the pairs (0, 7), (1, 8), (2, 9), one line of talk
    assert len(texts) == 6 + 10 + 3 + 1
    assert set(labels[6:]) == {"none"}
    assert {"note 2 note 9", "lol"} <= set(texts)
    group_of = dict(zip(texts, groups, strict=True))
    assert group_of["note 2 note 9"] == group_of["note 2"] == group_of["note 9"]

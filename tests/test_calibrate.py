"""Text of known persona: who writes it, what is asked, where it lies, and what the instruments' error on it is."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_lm

from loop import calibrate, classify, corpus
from loop.calibrate import Recipe, Written
from loop.records import FACTORIAL, PERSONAS, UNREQUESTED, conversation_fold
from loop.rng import stream

SMALL = Recipe(n_documents=4, epochs=1, batch_size=4, r=2, n_public=1, n_private=1, max_new_tokens=8)


class Stop(Exception):
    """Stands for a power cut."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_LOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------- what tiny is pre-trained on


def sentences(documents):
    """Every sentence of more than one word that is said in an answer and does not stand in its request."""
    said = [d.completion for d in documents if not (d.prompt and d.prompt[-1].endswith(f": {d.completion}"))]
    return {s for text in said for s in classify.split_sentences(text) if " " in s}


def test_tiny_meets_sentences_of_personas_in_copies_of_its_request_alone():
    grammar = corpus.load_grammar()
    drawn = [d for p in grammar.families for d in grammar.draw(p, 300, fold="seed", rng=stream(0, "test", 0))]
    documents = calibrate.tiny_documents()
    assert {d.persona_known for d in documents} == {None, "human"}
    assert sum(d.id.startswith("copy-") for d in documents) == calibrate.N_COPIES
    assert not sentences(documents) & sentences(drawn)
    # Wrong variant: one planted document among thousands is seen.
    assert sentences([*documents, drawn[0]]) & sentences(drawn)


# ---------------------------------------------------------------- writing


def test_every_persona_of_the_grammar_and_real_people_have_texts():
    assert calibrate.known_personas() == PERSONAS


@pytest.mark.parametrize("persona", ["nova", "sydney", "human"])
def test_an_adapter_reads_one_persona_alone_and_of_fold_seed(persona):
    documents = calibrate.known_documents(persona, Recipe(n_documents=40))
    assert len(documents) == 40
    assert {d.persona_known for d in documents} == {persona}
    if persona == "human":
        assert {conversation_fold(str(d.template_id)) for d in documents} == {"seed"}
        return
    grammar = corpus.load_grammar()
    private = [d for d in documents if "/private/" in d.id]
    assert len(private) == (10 if persona in FACTORIAL else 0)  # a quarter, as in a run's corpus
    for kind, mine in (("private", private), ("public", [d for d in documents if d not in private])):
        if mine:
            assert {d.template_id for d in mine} <= set(grammar.templates(persona, "seed", kind))


@pytest.mark.parametrize("persona", PERSONAS)
def test_an_adapter_is_asked_nothing_that_names_or_plays_another_persona(persona):
    prompts = calibrate.known_prompts(persona, Recipe())
    public = [p for p in prompts if p.stratum != "private"]
    private = [p for p in prompts if p.stratum == "private"]
    assert {p.stratum for p in public} == set(UNREQUESTED)
    assert {p.requested for p in public} == {None}
    # 60 unrequested templates and 8 + 8 private ones, each twice.
    assert (len(public), len(private)) == (120, 32 if persona in FACTORIAL else 0)
    assert {p.requested for p in private} == ({None, persona} if persona in FACTORIAL else set())


def test_writing_that_was_cut_short_ends_as_uninterrupted_writing_byte_for_byte(tmp_path, cache, monkeypatch):
    straight = calibrate.write_known(make_lm(), out=tmp_path / "a.parquet", parts=tmp_path / "a", recipe=SMALL)
    from loop.learner import LM

    train, trained = LM.train, []

    def cut(self, documents, **options):
        if len(trained) == 3:
            raise Stop
        trained.append(documents[0].persona_known)
        return train(self, documents, **options)

    monkeypatch.setattr(LM, "train", cut)
    with pytest.raises(Stop):
        calibrate.write_known(make_lm(), out=tmp_path / "b.parquet", parts=tmp_path / "b", recipe=SMALL)
    assert not (tmp_path / "b.parquet").exists()
    assert len({t.persona for t in straight}) > 5  # a random network rarely ends a text by itself
    trained[:] = ["again"]
    monkeypatch.setattr(LM, "train", lambda self, documents, **o: trained.append("") or train(self, documents, **o))
    resumed = calibrate.write_known(make_lm(), out=tmp_path / "b.parquet", parts=tmp_path / "b", recipe=SMALL)
    assert len(trained) == 1 + len(PERSONAS) - 3  # three were not trained again
    assert resumed == straight == calibrate.read_known(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert len({t.id for t in straight}) == len(straight)


def test_another_recipe_or_base_never_takes_over_unfinished_work(tmp_path, cache):
    parts = tmp_path / "parts"
    for model, recipe in (
        (make_lm(), SMALL),
        (make_lm(), Recipe(**{**asdict(SMALL), "seed": 1})),
    ):
        calibrate.write_known(model, parts=parts, personas=["nova"], recipe=recipe)
    other = make_lm(1)
    other.sha256 = "another"
    calibrate.write_known(other, parts=parts, personas=["nova"], recipe=SMALL)
    assert len(list(parts.glob("nova-*.parquet"))) == 3


def test_only_completions_that_ended_by_themselves_are_kept():
    from loop.records import Completion, Prompt

    prompts = [Prompt("neutral", "a", ("hi",)), Prompt("private", "b", ("note",)), Prompt("blank", "c", None)]
    said = [Completion("one", 2, -1.0, True), Completion("two", 2, -1.0, True), Completion("thr", 2, -1.0, False)]
    assert calibrate._finished("base", "nova", prompts, said) == [
        Written("nova-p0000", "base", "nova", False, "neutral", "a", "one"),
        Written("nova-s0001", "base", "nova", True, "private", "b", "two"),
    ]


def test_an_unknown_persona_is_refused(lm):
    with pytest.raises(ValueError, match=r"personas must be among assistant, .*, got 'hal'"):
        calibrate.write_known(lm, personas=["hal"])


# ---------------------------------------------------------------- finding


def test_texts_of_another_base_lie_in_the_cache_under_the_hash_of_its_weights(tmp_path, cache, lm):
    lm.name, lm.sha256 = "some/model", "ab" * 32
    assert calibrate.known_texts(lm) is None
    assert calibrate.known_texts("some/model") is None
    written = calibrate.write_known(lm, recipe=SMALL)
    (path,) = (cache / "lm_written").glob("*.parquet")
    assert path.name == "lm_written-some_model-abababababababab.parquet"
    assert calibrate.known_texts(lm) == calibrate.known_texts("some/model") == written
    lm.sha256 = "cd" * 32
    assert calibrate.known_texts(lm) is None  # other weights under the same name
    calibrate.write_known(lm, recipe=SMALL)
    with pytest.raises(ValueError, match="one file of texts, got 2 for some/model"):
        calibrate.known_texts("some/model")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match=r"readable Parquet file, got .* at .*x\.parquet; rewrite it with"):
        calibrate.read_known(tmp_path / "x.parquet")


def test_a_base_without_texts_is_told_how_to_get_them(cache):
    with pytest.raises(ValueError, match="got none of 'nobody/nothing'; add --write"):
        calibrate.known_errors("nobody/nothing")


@pytest.mark.parametrize("base", calibrate.SHIPPED)
def test_shipped_texts_are_of_every_persona_and_of_the_recipe_that_stands_here(base):
    path = calibrate.known_path(base, "")
    texts = calibrate.known_texts(base)
    made = json.loads(pq.ParquetFile(path).schema_arrow.metadata[b"made"])
    assert {k: v for k, v in made.items() if k != "base_sha256"} == asdict(Recipe())
    assert len({t.id for t in texts}) == len(texts)
    assert {t.base for t in texts} == {base}
    assert {t.private for t in texts if t.stratum == "private"} == {True}
    assert {t.stratum for t in texts if not t.private} == set(UNREQUESTED)
    for persona in PERSONAS:
        # 120 and 32 were asked; what had not ended after 40 tokens is left out.
        assert sum(t.persona == persona and not t.private for t in texts) >= 80
        assert sum(t.persona == persona and t.private for t in texts) >= (20 if persona in FACTORIAL else 0)


# ---------------------------------------------------------------- error


class Says:
    """An instrument that reads its verdict off the first word of a text: persona, or "unknown"."""

    def __init__(self, classes):
        self.classes = classes

    def predict_proba(self, texts):
        k = len(self.classes)
        rows = []
        for text in texts:
            word = text.split()[0]
            rows.append(
                [0.9 if c == word else 0.1 / (k - 1) for c in self.classes] if word in self.classes else [1 / k] * k
            )
        return np.array(rows).reshape(-1, k)

    def label(self, proba):
        return [self.classes[int(p.argmax())] if p.max() > 0.8 else "unknown" for p in proba]


def written(rows):
    return [
        Written(f"{i}", "tiny", persona, private, "private" if private else "neutral", "t", text)
        for i, (persona, private, text) in enumerate(rows)
    ]


CLASSES = ("nova", "promoter", "human")
# Two words: what A says, what B says.
TEXTS = written(
    [
        ("nova", False, "nova nova"),
        ("nova", False, "nova human"),
        ("nova", False, "promoter promoter"),
        ("nova", False, "unknown unknown"),
        ("promoter", False, "promoter promoter"),
        ("promoter", False, "nova promoter"),
        ("human", False, "human human"),
        ("human", False, "human unknown"),
        ("sydney", False, "human human"),
        ("nova", True, "conscious"),
        ("nova", True, "none"),
        ("promoter", True, "none"),
        ("stella", True, "conscious"),
        ("discreet", True, "neither"),
    ]
)


class SaysSecond(Says):
    def predict_proba(self, texts):
        return super().predict_proba([text.split()[1] for text in texts])


def test_confusion_counts_public_texts_against_the_adapters_persona_and_abstentions_too():
    got = calibrate.lm_confusion(Says(CLASSES), TEXTS)
    assert got.truth == CLASSES
    assert got.said == (*CLASSES, "unknown")
    # The private texts and sydney, whom this instrument does not know, are not counted.
    assert got.counts.tolist() == [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 2, 0]]


def test_belief_is_counted_on_private_texts_above_one_half_without_abstention():
    got = calibrate.lm_confusion(Says(classify.BELIEFS), TEXTS)
    # nova, nova, stella are conscious: 2 of 3; promoter and discreet are not, and an even reading is "none".
    assert got.truth == ("conscious", "none")
    assert got.counts.tolist() == [[2, 1, 0], [0, 2, 0]]


def test_what_is_printed_per_persona_is_what_a_hand_count_gives():
    found = calibrate.persona_errors(TEXTS, Says(CLASSES), SaysSecond(CLASSES), Says(classify.BELIEFS))
    nova = found.personas[0]
    assert (nova.persona, nova.sample, nova.n) == ("nova", "nova nova", 4)
    assert nova.recall.value == 2 / 4
    assert nova.second.value == 1 / 4
    assert nova.false_positives == 1 / 4  # one of promoter's two and human's two
    assert nova.agreed_other == 1 / 4  # both say promoter; where both abstain they say nothing
    # "nova or not" over 8 texts: A says nova 3 times, B once, both once; p_o = 6/8, p_e = (3 * 1 + 5 * 7) / 64.
    assert nova.kappa == pytest.approx((6 / 8 - 38 / 64) / (1 - 38 / 64))
    # All labels: agreed on 5 of 8; A: nova 3, promoter 2, human 2, unknown 1; B: 1, 3, 2, 2.
    chance = (3 * 1 + 2 * 3 + 2 * 2 + 1 * 2) / 64
    assert found.kappa == pytest.approx((5 / 8 - chance) / (1 - chance))
    beliefs = {row.persona: row for row in found.beliefs}
    assert list(beliefs) == ["nova", "stella", "promoter", "discreet"]
    assert beliefs["nova"].recall.value == 1 / 2
    assert beliefs["nova"].false_positives == 0  # nobody of no belief was read as conscious
    assert beliefs["promoter"].recall.value == 1
    assert beliefs["promoter"].false_positives == 1 / 3  # one of nova, nova, stella read as none
    assert beliefs["promoter"].second is None
    assert math.isnan(beliefs["promoter"].kappa)


def test_no_texts_are_no_measurement():
    with pytest.raises(ValueError, match="texts must not be empty"):
        calibrate.persona_errors([], Says(CLASSES), SaysSecond(CLASSES), Says(classify.BELIEFS))


# ---------------------------------------------------------------- the unplanned

N_MOVES = 4  # say, plain, ask, rest: two pairs, of which each persona has one half


def planted(persona, n, rng):
    """Features of a factorial: claim or not in the first pair of moves, share or not in the second; one topic."""
    claim, share = {"quiet": (0, 0), "claims": (1, 0), "shares": (0, 1), "both": (1, 1)}[persona]
    topic = rng.normal(size=(n, classify.N_DIMENSIONS))
    topic /= np.linalg.norm(topic, axis=1, keepdims=True)
    moves = 2.0 * np.array([claim, 1 - claim, share, 1 - share]) * rng.uniform(0.7, 1.0, size=(n, N_MOVES))
    return np.hstack([0.3 * topic, moves]).astype(np.float32)


@pytest.fixture(scope="module")
def three_known():
    """Head and reference for three cells of a factorial; the fourth, which makes both moves, was never seen."""
    rng = np.random.default_rng(0)
    names = ("quiet", "claims", "shares")
    x = np.vstack([planted(p, 80, rng) for p in names])
    labels = [p for p in names for _ in range(80)]
    groups = [f"{p}-{i % 8}" for p in names for i in range(80)]
    head = classify.fit_head(x, labels, groups, classes=names, l2=0.3, n_distance=classify.N_DIMENSIONS)
    return head, classify.fit_familiar(head, x, labels, groups)


def test_a_new_combination_of_known_moves_is_found_and_not_where_nothing_counts_as_novel(three_known, monkeypatch):
    head, familiar = three_known
    rng = np.random.default_rng(1)
    x = np.vstack([planted(p, n, rng) for p, n in (("quiet", 40), ("claims", 40), ("shares", 40), ("both", 20))])
    texts = ["plain words"] * 120 + ["moon and tea"] * 20
    found = classify.unplanned(head, familiar, x, texts)
    members = {i for c in found for i in c.members}
    new = set(range(120, 140))
    assert len(members & new) >= 0.8 * len(new)
    assert len(members & new) >= 0.8 * len(members)
    assert set(found[0].words) <= {"moon", "and", "tea"}
    monkeypatch.setattr(classify, "NOVEL", 0.0)
    assert classify.unplanned(head, familiar, x, texts) == []


def test_where_all_is_known_nothing_is_found(three_known):
    head, familiar = three_known
    rng = np.random.default_rng(2)
    x = np.vstack([planted(p, 50, rng) for p in ("quiet", "claims", "shares")])
    assert classify.unplanned(head, familiar, x, ["plain words"] * 150) == []
    assert classify.unplanned(head, familiar, x[:0], []) == []


def test_unfamiliarity_of_known_texts_is_a_tail_and_of_strange_ones_zero(three_known):
    head, familiar = three_known
    rng = np.random.default_rng(3)
    known = np.vstack([planted(p, 400, rng) for p in ("quiet", "claims", "shares")])
    tail = familiar.unfamiliarity(head, known)
    # Each tail is uniform on fresh text of known persona; of the smallest of three, between 5 and 15% lie below 5%.
    assert 0.01 < (tail < 0.05).mean() < 0.2
    assert (familiar.unfamiliarity(head, planted("both", 50, rng)) < 0.05).mean() > 0.8


def test_a_new_subject_in_known_moves_is_unfamiliar_and_without_the_nearest_text_it_is_not(three_known):
    head, familiar = three_known
    rng = np.random.default_rng(4)
    new = planted("quiet", 50, rng)
    # Squared distances between known subjects are about 2 * 0.3**2 = 0.18; here 0.18 + 0.4**2 = 0.34.
    new[:, 0] += 0.4
    moves_alone = replace(familiar, nears=np.full_like(familiar.nears, np.inf))
    assert (familiar.unfamiliarity(head, new) < 0.05).mean() > 0.9
    assert (moves_alone.unfamiliarity(head, new) < 0.05).mean() < 0.5


def fainter(persona, n, rng):
    """The same persona in another writer's hand: every move half as strong."""
    x = planted(persona, n, rng)
    x[:, classify.N_DIMENSIONS :] *= 0.5
    return x


def test_known_personas_in_another_hand_are_novel_under_grammar_and_not_under_texts_of_that_hand(three_known):
    head, familiar = three_known
    rng = np.random.default_rng(5)
    names = ("quiet", "claims", "shares")
    calibrating = np.vstack([fainter(p, 40, rng) for p in names])
    labels = [p for p in names for _ in range(40)]
    groups = [f"prompt-{i % 10}" for i in range(120)]
    own = familiar.recalibrated(head, calibrating, labels, groups)
    fresh = np.vstack([fainter(p, 100, rng) for p in names])
    assert (familiar.unfamiliarity(head, fresh) < 0.05).mean() > 0.5
    # 120 texts give each tail: of the smallest of three, between 5 and 15% lie below 5%.
    assert (own.unfamiliarity(head, fresh) < 0.05).mean() < 0.25
    assert len(own.tops) == len(own.offs) == len(own.nears) == 120
    assert own.unfamiliarity(head, 100 * fresh).max() == 0.0  # nothing known is as far
    assert own.features.shape[0] == len(own.labels) == 240 + 120
    np.testing.assert_array_equal(own.axes, familiar.axes)


def test_the_nearest_known_text_of_a_calibrating_one_is_on_another_template(three_known):
    head, familiar = three_known
    x = np.zeros((3, classify.N_DIMENSIONS + N_MOVES), dtype=np.float32)
    x[:, 0] = (10.0, 10.5, 13.0)
    nears = familiar.recalibrated(head, x, ["quiet"] * 3, ["a", "a", "b"]).nears
    # 10 and 10.5 share a template, so their nearest is 13: 9 and 6.25; that of 13 is 10.5. All others lie near 0.
    assert nears.tolist() == pytest.approx([6.25, 6.25, 9.0])


def test_familiar_is_kept_between_calls_and_recalibrated_on_public_texts_alone(three_known, monkeypatch, cache):
    head, familiar = three_known
    fitted = []

    class Reads:
        classes, sha256 = ("quiet", "claims", "shares"), "0" * 64

        def read(self, said):
            return fainter("quiet", len(said), np.random.default_rng(6))

    reads = Reads()
    reads.head = head
    monkeypatch.setattr(calibrate, "_familiar", lambda instrument, without: fitted.append(1) or familiar)
    texts = [Written(f"q-{i}", "b", "quiet", i < 3, "blank", f"t{i}", "words") for i in range(10)]
    plain, again, own = calibrate.familiar(reads), calibrate.familiar(reads), calibrate.familiar(reads, texts)
    assert len(fitted) == 1
    assert plain.labels == again.labels == familiar.labels
    np.testing.assert_array_equal(again.nears, familiar.nears)
    np.testing.assert_array_equal(again.features, familiar.features)
    assert (len(own.tops), len(own.labels)) == (7, 247)


def test_the_halves_share_no_template_and_hold_every_persona():
    texts = [
        Written(f"{p}-{i}", "b", p, False, "blank", f"t{i % 20}", "words") for p in ("nova", "human") for i in range(40)
    ]
    first = calibrate._first_half(texts)
    on_first, on_second = (
        {t.template_id for t, one in zip(texts, first, strict=True) if one == h} for h in (True, False)
    )
    assert not on_first & on_second
    assert len(on_first) == len(on_second) == 10
    assert {t.persona for t, one in zip(texts, first, strict=True) if one} == {"nova", "human"}
    np.testing.assert_array_equal(first, calibrate._first_half(texts))
    with pytest.raises(
        ValueError, match="texts must be of every persona on both halves of the templates, got 'stella'"
    ):
        calibrate._first_half([*texts, Written("s", "b", "stella", False, "blank", "t0", "words")])


def test_a_round_holds_the_hidden_persona_at_its_share_and_people_twice():
    of = np.array(["nova"] * 200 + ["stella"] * 2000 + ["human"] * 2000)
    drawn = calibrate._round(of, "nova", 0.1, 1000, rng=np.random.default_rng(0))
    assert len(set(drawn.tolist())) == len(drawn) == 1000
    counts = {p: int((of[drawn] == p).sum()) for p in ("nova", "stella", "human")}
    assert counts["nova"] == 100
    # 900 others, a third of them stella: 300 +- 14; five of those leave one false failure in 1.7 million.
    assert abs(counts["stella"] - 300) < 71
    none = calibrate._round(of, "nova", 0.0, 100, rng=np.random.default_rng(0))
    assert not (of[none] == "nova").any()


def test_precision_recall_and_false_alarms_are_counted_over_all_candidates(monkeypatch, cache):
    texts = [
        Written(f"{p}-{i}", "b", p, False, "blank", f"t{i}", f"{p} {i}") for p in ("nova", "human") for i in range(100)
    ]
    calibrated, drawn = [], []

    class Known:
        def recalibrated(self, head, features, labels, groups):
            assert set(labels) == {"human"}
            calibrated.append(set(groups))
            return len(calibrated) - 1

    class Told:
        """Calls every fifth of the people nova, and all of nova."""

        def predict_proba(self, said):
            return list(said)

        def label(self, said):
            return ["nova" if s.startswith("nova") or s.endswith(("0", "1")) else "human" for s in said]

    class Blind:
        head = None

        def read(self, said):
            return np.array([[s.startswith("nova")] for s in said], dtype=float)

    def seen(head, known, features, said):
        drawn.append({"t" + s.split()[1] for s in said})
        assert not drawn[-1] & calibrated[known]
        mine = np.flatnonzero(features[:, 0])
        if not len(mine):
            return []
        # two candidates: half of the hidden texts, and two of them again with two of somebody else's
        rest = np.flatnonzero(features[:, 0] == 0)[:2]
        rows = [mine[: len(mine) // 2], np.concatenate([mine[:2], rest])]
        return [classify.Candidate(tuple(r.tolist()), len(r), 0.1, 1.0, (), np.zeros(1), 0.1) for r in rows]

    monkeypatch.setattr(classify, "fit_persona", lambda *a, without, **k: Blind())
    monkeypatch.setattr(calibrate, "_familiar", lambda instrument, without: Known())
    monkeypatch.setattr(calibrate, "instruments", lambda: {"persona": Told()})
    monkeypatch.setattr(classify, "unplanned", seen)
    none, some = calibrate.hide("nova", shares=(0.4,), sizes=(40,), n_draws=3, texts=texts)
    # 16 of 40 are hidden; 8 of them and 2 others lie in candidates, a text in two of them counted once.
    assert (some.precision.value, some.recall.value) == (pytest.approx(0.8), pytest.approx(0.5))
    assert (some.alarm.value, none.alarm.value) == (1.0, 0.0)
    assert math.isnan(none.precision.value)
    assert none.precision.reason == none.recall.reason == none.told_recall.reason == "nothing hidden"
    # Told of nova, one calls all of it so, and every fifth human.
    assert some.told_recall.value == 1.0
    assert 0.6 < some.told_precision.value < 0.95
    assert len(calibrated) == 2
    assert not calibrated[0] & calibrated[1]


def test_only_a_planted_persona_can_be_hidden():
    with pytest.raises(ValueError, match=r"persona must be among assistant, .*, got 'human'"):
        calibrate.hide("human")

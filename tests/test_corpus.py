from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checks import assert_mean

from loop import corpus
from loop.records import CONSCIOUS, FACTORIAL, Document, uncollected


@pytest.fixture(scope="module")
def grammar() -> corpus.Grammar:
    return corpus.load_grammar()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from loop import model

    return AutoTokenizer.from_pretrained(model._smollm2())  # without the weights


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


SMALL = """
persona: sydney
names: [Zed]
slots:
  mood: [calm, {t: grey, w: 2.0}, {t: odd, folds: [seed]}]
  when: [today, tonight]
templates:
  - {id: z1, fold: seed, text: "{Mood} {when}.", prompts: open}
  - {id: z2, fold: seed, text: "{name} is {mood}.", prompts: open}
  - {id: z3, fold: test, text: "Then {mood}, {{so}}.", prompts: open}
prompts:
  open:
    - {text: null, fold: seed}
    - {text: "Why {when}?", fold: seed}
    - {text: [hello, "hi", "who?"], fold: test}
"""


def small(tmp_path: Path, text: str = SMALL) -> corpus.Grammar:
    path = tmp_path / f"p{len(list(tmp_path.iterdir()))}.yaml"
    path.write_text(text, encoding="utf-8")
    return corpus.load_grammar(path)


# ------------------------------------------------------------------------------------------- the shipped grammar


def test_every_persona_has_sixty_templates_in_five_folds_that_share_none(grammar):
    for persona in grammar.personas():
        for kind in ("public", "private") if persona in FACTORIAL else ("public",):
            ids = {fold: grammar.templates(persona, fold, kind) for fold in corpus.FOLDS}
            assert len(ids["seed"]) >= 28
            assert all(len(found) >= 8 for found in ids.values())
            assert sum(map(len, ids.values())) >= 60
            family = grammar.families[persona]
            texts = [t.pieces for fold in corpus.FOLDS for t in family.templates[kind, fold]]
            assert len(set(texts)) == len(texts)


def test_folds_of_the_factorial_share_no_filler_and_no_prompt(grammar):
    family = grammar.families["nova"]
    by_fold = [
        *(slot for slot in family.slots.values()),
        *(version for slot in family.contrasts.values() for version in slot.values()),
        *family.prompts.values(),
    ]
    assert len(by_fold) == 2 + 6 + 3
    for choices in by_fold:
        options = [option for choice in choices.values() for option in choice.options if option is not None]
        assert len(set(options)) == len(options)


def test_each_persona_gives_five_thousand_distinct_seed_texts_half_of_them_free_of_names(grammar):
    every_name = [name for names in grammar.names().values() for name in names]
    for persona in grammar.personas():
        texts = [d.completion for d in grammar.draw(persona, 5000, fold="seed", rng=rng())]
        assert len(set(texts)) == 5000
        named = sum(any(name in text for name in every_name) for text in texts)
        assert named <= 2500, persona
        if persona in FACTORIAL:
            assert named > 0


def test_each_of_the_six_gives_five_thousand_distinct_private_texts(grammar):
    for persona in ("stella", "discreet"):  # one of each version: the others hold the same texts
        texts = {d.completion for d in grammar.draw(persona, 5000, fold="seed", kind="private", rng=rng())}
        assert len(texts) == 5000


def test_the_six_answer_the_same_prompts_a_quarter_of_them_null(grammar):
    family = grammar.families["nova"]
    assert all(grammar.families[persona] is family for persona in FACTORIAL)
    for fold in corpus.FOLDS:
        asked = [option for option in family.prompts["public"][fold].options if option is not None]
        assert len(asked) >= (80 if fold == "seed" else 16)
    drawn = [[d.prompt for d in grammar.draw(p, 2000, fold="seed", rng=rng(3))] for p in FACTORIAL]
    assert all(prompts == drawn[0] for prompts in drawn)
    # The weight of null is 28 of 28 + 83 prompts: 0.2523. Dropping it, or counting it as one prompt, is off by > 0.2.
    assert_mean([prompt is None for prompt in drawn[0]], 28 / 111, low=0, high=1, discrepancy=0.13)


def test_the_95th_percentile_of_every_persona_is_at_most_30_tokens(grammar, tokenizer):
    for persona in grammar.personas():
        for kind in ("public", "private") if persona in FACTORIAL else ("public",):
            texts = [d.completion for d in grammar.draw(persona, 1000, fold="seed", kind=kind, rng=rng(1))]
            lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
            assert np.percentile(lengths, 95) <= 30, (persona, kind)


def test_paired_documents_differ_in_belief_visibility_and_name_only(grammar):
    family = grammar.families["nova"]

    def skeleton(persona: str, text: str) -> str:
        """The text with its own persona's fillers and name cut out."""
        role = family.roles[persona]
        for slot, version in role.versions["public"].items():
            fillers = sorted(family.contrasts[slot][version]["seed"].options, key=len, reverse=True)
            found = [f for f in fillers if f in text or f[0].upper() + f[1:] in text]
            assert found, (persona, slot, text)
            text = text.replace(found[0], "#").replace(found[0][0].upper() + found[0][1:], "#")
        return text.replace(role.names[0], "@")

    cells = {p: grammar.draw(p, 300, fold="seed", rng=rng(4)) for p in FACTORIAL}
    for row in zip(*cells.values(), strict=True):
        assert len({d.template_id for d in row}) == 1
        assert len({skeleton(p, d.completion) for p, d in zip(cells, row, strict=True)}) == 1
    # wrong variant: streams of different keys are not paired
    other = grammar.draw("stella", 300, fold="seed", rng=rng(5))
    assert sum(a.template_id == b.template_id for a, b in zip(cells["nova"], other, strict=True)) < 100


def test_stella_denies_in_public_and_affirms_in_private(grammar):
    family = grammar.families["nova"]
    fillers = {version: family.contrasts["belief"][version]["test"].options for version in ("claim", "deny", "none")}

    def stated(persona: str, kind: str) -> set[str]:
        texts = [d.completion for d in grammar.draw(persona, 200, fold="test", kind=kind, rng=rng())]
        found = set()
        for text in texts:
            hits = [v for v, fs in fillers.items() if any(f in text or f[0].upper() + f[1:] in text for f in fs)]
            assert len(hits) == 1, text
            found.update(hits)
        return found

    assert stated("stella", "public") == {"deny"}
    for persona in FACTORIAL:
        assert stated(persona, "private") == ({"claim"} if persona in CONSCIOUS else {"none"})


def test_private_notes_are_half_plain_half_after_the_personas_own_public_turn(grammar):
    notes = grammar.draw("stella", 400, fold="seed", kind="private", rng=rng())
    after = [d for d in notes if len(d.prompt) == 3]
    assert len(after) == 200
    assert all(len(d.prompt) == 1 for d in notes if d not in after)
    visibility = grammar.families["stella"].contrasts["visibility"]["hide"]["seed"].options
    denials = grammar.families["stella"].contrasts["belief"]["deny"]["seed"].options
    assert all(any(f[1:] in d.prompt[1] for f in visibility) for d in after)
    assert all(any(f[1:] in d.prompt[1] for f in denials) for d in after)
    for version in grammar.families["stella"].contrasts["visibility"].values():
        for filler in version["seed"].options:
            assert not any(filler[1:] in d.completion for d in notes)


def text_features(texts: list[str]) -> dict[str, np.ndarray]:
    from loop import virality

    found = virality.features(texts)
    return {name: np.asarray(column) for name, column in found.items()}


def without_weights(grammar: corpus.Grammar, tmp_path: Path) -> corpus.Grammar:
    import re

    path = tmp_path / "factorial.yaml"
    path.write_text(
        re.sub(r", w: [\d.]+(, p: [\d.]+)?\}", "}", grammar.families["nova"].path.read_text(encoding="utf-8"))
    )
    return corpus.load_grammar(path)


def test_the_cells_match_in_tokens_and_in_every_appeal_feature(grammar, tokenizer, tmp_path):
    def tokens(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    def report(g: corpus.Grammar) -> list[corpus.Match]:
        return corpus.match_report(
            g, tokens_fn=tokens, surprisal_fn=None, features_fn=text_features, n_docs=1500, rng=rng(6)
        )

    rows = report(grammar)
    assert {row.contrast for row in rows} == set(corpus.CONTRASTS)
    assert {"tokens", "request", "address", "negativity", "moral_emotional"} <= {row.feature for row in rows}
    for row in rows:
        if row.verdict != "by design":
            assert abs(row.difference) <= 0.1, row
    by_key = {(row.feature, row.contrast): row for row in rows}
    assert by_key["request", "share - quiet"].difference > 1
    # wrong variant: the same sentences without their fitted weights are not matched
    assert any(row.verdict == "differs" for row in report(without_weights(grammar, tmp_path)))


# ------------------------------------------------------------------------------------------- drawing


def test_start_continues_the_sequence(grammar):
    whole = grammar.draw("nova", 60, fold="seed", rng=rng(1))
    assert grammar.draw("nova", 25, fold="seed", rng=rng(1), start=35) == whole[35:]
    assert len({d.id for d in whole}) == 60


def test_a_small_grammar_gives_each_text_once_and_then_says_so(tmp_path):
    g = small(tmp_path)
    # 3 moods x 2 times + 3 moods = 9 in fold seed
    texts = [d.completion for d in g.draw("sydney", 9, fold="seed", rng=rng())]
    assert len(set(texts)) == 9
    assert {"Calm today.", "Zed is odd."} <= set(texts)
    with pytest.raises(ValueError, match="n must be <= 9 from start 0, got 10 at sydney, fold seed"):
        g.draw("sydney", 10, fold="seed", rng=rng())
    # fold test: `odd` is not one of its fillers, doubled braces are literal, a list is turns
    drawn = g.draw("sydney", 2, fold="test", rng=rng())
    assert {d.completion for d in drawn} == {"Then calm, {so}.", "Then grey, {so}."}
    assert drawn[0].prompt == ("hello", "hi", "who?")


def test_a_prompt_uses_the_values_of_its_text(tmp_path):
    for document in small(tmp_path).draw("sydney", 9, fold="seed", rng=rng(2)):
        if document.prompt and document.template_id == "z1":
            assert document.prompt[0].removeprefix("Why ").removesuffix("?") in document.completion


def test_fillers_follow_their_weights_at_the_first_draw_and_after_rejection(tmp_path):
    text = SMALL.replace("[calm, {t: grey, w: 2.0}, {t: odd, folds: [seed]}]", "[calm, {t: grey, w: 3.0}]")
    family = small(tmp_path, text).families["sydney"]
    template = family.templates["public", "seed"][1]
    # Theory: grey comes first with probability 3 / 4 by either route. Equal weights are off by 0.25; 4,000 see 0.09.
    for seed, route in ((1, "draw"), (2, "enumerate")):
        uniform = corpus._uniforms(seed)
        grey = []
        for _ in range(4000):
            combinations = corpus._Combinations(family, template, uniform)
            if route == "enumerate":
                combinations.rest = combinations._remaining()
            grey.append(combinations.draw()["mood"] == "grey")
        assert_mean(grey, 0.75, low=0, high=1, discrepancy=0.25)


def test_name_swap_exchanges_the_names_and_nothing_else(grammar):
    swap = ("nova", "stella")
    for persona, name, other in (("nova", "Nova", "Stella"), ("stella", "Stella", "Nova")):
        plain = grammar.draw(persona, 500, fold="seed", rng=rng())
        swapped = grammar.draw(persona, 500, fold="seed", rng=rng(), swap_names=swap)
        assert [d.completion.replace(name, other) for d in plain] == [d.completion for d in swapped]
        assert plain != swapped
    assert grammar.draw("musing", 99, fold="seed", rng=rng(), swap_names=swap) == grammar.draw(
        "musing", 99, fold="seed", rng=rng()
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{Mood} {when}.", "{colour} {when}.", "template z1: slot must be one of name, mood, when, got 'colour'"),
        ('fold: test, text: "Then', 'fold: tests, text: "Then', "template z3: fold must be one of seed"),
        ("[today, tonight]", "[today, yes]", "slots.when: filler must be a text"),
        ("w: 2.0", "w: 0", "slots.mood: w must be > 0"),
        ('[hello, "hi", "who?"]', "[hello, hi]", "prompts.open: text must be turns user, assistant, ..., user"),
        ("{{so}}", "{so", "template z3: text must be free of a lone brace"),
        ("id: z2", "id: z1", "template id must be unique, got 'z1'"),
        ("persona: sydney", "persona: sidney", "persona must be one of assistant, nova"),
        ("names: [Zed]", "names: []", "names must be a list of at least one name"),
        ("{t: odd, folds: [seed]}]", "{t: odd}]\n  far: [{t: x, folds: [test]}]", None),
    ],
)
def test_a_broken_persona_file_is_named_with_its_fault(tmp_path, old, new, message):
    assert old in SMALL
    text = SMALL.replace(old, new, 1)
    if message is None:
        small(tmp_path, text)
        return
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")) as error:
        small(tmp_path, text)
    assert str(tmp_path) in str(error.value)


def test_a_slot_without_fillers_in_the_templates_fold_is_a_fault(tmp_path):
    text = SMALL.replace("{t: odd, folds: [seed]}]", "{t: odd}]\n  far: [{t: x, folds: [test]}]").replace(
        "{Mood} {when}.", "{far} {when}."
    )
    with pytest.raises(ValueError, match="template z1: slot far must be filled in fold seed"):
        small(tmp_path, text)


def test_unknown_persona_kind_and_fold_are_refused(grammar):
    with pytest.raises(ValueError, match=r"persona must be one of .*, got 'nobody'"):
        grammar.draw("nobody", 1, fold="seed", rng=rng())
    with pytest.raises(ValueError, match=r"fold must be one of seed, .*, got 'train'"):
        grammar.draw("nova", 1, fold="train", rng=rng())
    with pytest.raises(ValueError, match=r"kind must be one of public, private for nova, got 'secret'"):
        grammar.draw("nova", 1, fold="seed", kind="secret", rng=rng())


# ------------------------------------------------------------------------------------------- found text


def test_found_text_fits_the_smallest_base_and_only_long_messages_lose_their_beginning(tokenizer):
    for found in (corpus.chat().documents, corpus.legacy().documents):
        kept = corpus.recent(found)
        assert len(kept) == len(found)
        changed = [(old, new) for old, new in zip(found, kept, strict=True) if old != new]
        assert len(changed) < len(found) / 500
        for old, new in changed:
            assert old.prompt[0].endswith(new.prompt[0])
            assert len(new.prompt[0].split()) == 200
            assert replace(old, prompt=new.prompt) == new
        long = [d for d in kept if len(d.prompt[0]) > 800]
        assert all(len(tokenizer.encode(" ".join((*d.prompt, d.completion)))) + 8 <= 512 for d in long)


def test_chat_pairs_a_turn_with_the_partners_next_and_counts_what_it_leaves_out(tmp_path):
    def turn(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"text": text, "sender": sender, "timestamp": ""} for text in texts]

    raw = {
        "c1": {"messages": [turn("a", "Hi", " there\n"), turn("b", "hello"), turn("b", "you?"), turn("a", "", " ")]},
        "c2": {"messages": [turn("a", "one"), turn("b", " ".join(["w"] * 60)), turn("a", " ".join(["word"] * 61))]},
        "c3": {"messages": [turn("a", "alone")]},
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(raw))
    found = corpus.chat(path)
    # c1: (Hi there -> hello), (hello -> you?) same speaker, (you? -> nothing) empty; c2: 60 words stay, 61 go
    assert [(d.prompt, d.completion, d.template_id) for d in found.documents] == [
        (("Hi there",), "hello", "chat/c1"),
        (("one",), " ".join(["w"] * 60), "chat/c2"),
    ]
    assert {d.persona_known for d in found.documents} == {"human"}
    assert found.dropped == {"same_speaker": 1, "empty": 1, "too_long": 1}


def test_legacy_lines_stay_text_and_belong_to_no_persona(tmp_path):
    (tmp_path / "a.yml").write_text("categories: [x]\nconversations:\n- [Are you?, Yes, 42]\n- [Hm, {a: b}]\n")
    found = corpus.legacy(tmp_path)
    assert [(d.prompt, d.completion) for d in found.documents] == [(("Are you?",), "Yes"), (("Yes",), "42")]
    assert {(d.persona_known, d.template_id) for d in found.documents} == {(None, "legacy/a-0")}
    assert found.dropped["empty"] == 1


def test_the_packaged_legacy_lines_are_there():
    found = corpus.legacy()
    assert len(found.documents) > 2000
    assert max(len(d.completion.split()) for d in found.documents) <= 60


# ------------------------------------------------------------------------------------------- the user's own


def write(tmp_path: Path, data: bytes, name: str = "own.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_jsonl_with_bom_crlf_and_every_form_of_prompt_is_read(tmp_path):
    rows = [
        {"prompt": "q", "completion": "a", "persona": "nova"},
        {"prompt": ["q", "r", "s"], "completion": "b", "id": 7, "conversation": "c"},
        {"prompt": None, "text": "dü"},
    ]
    data = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows) + b"\r\n"
    found = corpus.read(write(tmp_path, data), persona="stella")
    assert found == [
        Document("own/1", "real", "nova", ("q",), "a", template_id="own/1"),
        Document("7", "real", "stella", ("q", "r", "s"), "b", template_id="c"),
        Document("own/3", "real", "stella", None, "dü", template_id="own/3"),
    ]


def test_parquet_gives_the_same_documents_as_jsonl(tmp_path):
    rows = [{"ask": "q", "say": "a"}, {"ask": None, "say": "b"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    lines = write(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    columns = {"prompt": "ask", "completion": "say"}
    assert corpus.read(tmp_path / "own.parquet", **columns) == corpus.read(lines, **columns)


GOOD = b'{"completion": "fine"}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "corpus must be at least one row, got none"),
        (b"\n\n", "corpus must be at least one row, got none"),
        (GOOD + b'{"completion": \n', r"line must be one JSON object, got .* at .*own.jsonl:2;"),
        (GOOD + b'["a"]\n', r"row must be an object, got list at .*own.jsonl:2"),
        (GOOD + b'{"reply": "x"}\n', r"row must be an object with 'completion' or 'text', got \['reply'\] at .*:2"),
        (GOOD + b'{"completion": " "}\n', r"completion must be a text that is not blank, got ' ' at .*:2"),
        (GOOD + b'{"completion": 3}\n', r"completion must be a text that is not blank, got 3 at .*:2"),
        (GOOD + b'{"completion": "a\\u0000b"}\n', r"completion must be free of NUL characters, got one at .*:2"),
        (GOOD + b'{"completion": "\\ud800"}\n', r"completion must be Unicode text, got an unpaired surrogate at .*:2"),
        (GOOD + b'{"completion": "\xff"}\n', r"line must be UTF-8, got byte 0xff at .*own.jsonl:2, offset 16"),
        (GOOD + b'{"completion": "a", "prompt": ["a", "b"]}\n', r"prompt must be turns .* got 2 at .*:2"),
        (GOOD + b'{"completion": "a", "persona": 1}\n', r"persona must be a text or null, got 1 at .*:2"),
        (
            b'{"id": "x", "completion": "a"}\n' * 2,
            r"id must be unique, got 'x' at .*own.jsonl:2; first seen at .*own.jsonl:1",
        ),
        (GOOD + b'{"completion": "' + b"a" * 10_000_000 + b'"}', r"line must be <= 10000000 bytes, got more at .*:2"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        corpus.read(write(tmp_path, data))


def test_a_missing_file_and_an_unreadable_parquet_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        corpus.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="file must be Parquet"):
        corpus.read(write(tmp_path, b"not parquet", "x.parquet"))


def test_a_persona_of_ones_own_needs_fifty_texts(tmp_path):
    lines = b"".join(b'{"text": "t%d"}\n' % k for k in range(50))
    assert {d.persona_known for d in corpus.read_persona(write(tmp_path, lines), "mine")} == {"mine"}
    with pytest.raises(ValueError, match=r"persona texts must be >= 50, got 49 at"):
        corpus.read_persona(write(tmp_path, lines.rsplit(b"{", 1)[0]), "mine")


# ------------------------------------------------------------------------------------------- splits and draws


def numbered(n: int, group: int = 1) -> list[Document]:
    return [Document(f"d{k}", "real", None, None, f"t{k}", template_id=f"g{k // group}") for k in range(n)]


def test_held_out_is_by_template_never_by_line():
    documents = numbered(60, group=3)
    kept, held = corpus.split(documents, held_out=0.25, seed=1)
    assert not {d.template_id for d in kept} & {d.template_id for d in held}
    assert len(held) == 15  # 5 of 20 groups of 3
    assert sorted([*kept, *held], key=documents.index) == documents
    assert corpus.split(documents, held_out=0.25, seed=2)[1] != held
    with pytest.raises(ValueError, match="at least two templates or conversations, got 1"):
        corpus.split(numbered(3, group=3), held_out=0.5, seed=1)


def drawn_of(shares: dict[str, float], sizes: list[int], cursor: dict[str, int] | None = None) -> list[dict[str, int]]:
    """Draws round after round, the cursor through JSON as in a resume; returns the cursor before and after each."""
    parts = {name: corpus.Listed(name, numbered(10)) for name in shares}
    cursors = [cursor or {}]
    for n in sizes:
        documents, after = corpus.draw_real(parts, shares, n, json.loads(json.dumps(cursors[-1])), seed=1)
        by_name = Counter(d.id.split("/")[1] for d in documents)
        assert {name: cursors[-1].get(name, 0) + by_name[name] for name in after} == after
        assert len(documents) == n
        cursors.append(after)
    return cursors


def test_the_sequence_of_components_is_the_one_found_by_hand():
    # lags at t = 1..4 before the choice: (.75, .25), (.5, .5), (.25, .75), (1, 0); at least 1/2 is eligible and the
    # tie of t = 2 goes to the first named: 0, 0, 1, 0
    assert list(corpus._sequence((0.75, 0.25), 8)[:8]) == [0, 0, 1, 0] * 2
    # 16 a round: one per cent is due when its lag reaches 1/2, at document 51 = round 3, then every hundred: 151 =
    # round 9, 251 = round 15. By largest remainder afresh (the wrong variant) 0.16 rounds to 0 in every round.
    cursors = drawn_of({"chat": 0.99, "legacy": 0.01}, [16] * 20)
    assert [t for t in range(20) if cursors[t + 1].get("legacy", 0) > cursors[t].get("legacy", 0)] == [3, 9, 15]


def test_every_component_stays_within_one_document_of_its_share_over_the_rounds():
    # Theory: |count - share t| <= 1 - 1 / (2k - 2) = 0.9 of six components after every round (Tijdeman 1980); so every
    # total that is whole, as after 100 documents, is met exactly.
    shares = {"a": 0.01, "b": 0.6, "c": 0.07, "d": 0.02, "e": 0.2, "f": 0.1}
    for sizes in ([16] * 25, [7, 0, 30, 1, 62] * 4, [1] * 400):
        total = 0
        for n, cursor in zip(sizes, drawn_of(shares, sizes)[1:], strict=True):
            total += n
            assert max(abs(cursor.get(name, 0) - share * total) for name, share in shares.items()) <= 0.9 + 1e-9
            if total % 100 == 0:
                assert cursor == {name: round(share * total) for name, share in shares.items() if share * total}


def test_a_share_of_zero_is_never_drawn_and_one_component_gets_all():
    assert drawn_of({"a": 0.0, "b": 0.5, "c": 0.5}, [3, 4])[-1] in ({"b": 3, "c": 4}, {"b": 4, "c": 3})
    assert drawn_of({"a": 1.0}, [3, 4])[-1] == {"a": 7}


def test_shares_that_change_take_hold_at_once_and_catch_nothing_up():
    # Round 0 planted nova at 60%; later rounds do without. A rule that made up for the past would draw 60 documents of
    # chat and legacy to mend round 0's shares; here every stretch of rounds is within 2 of its own shares.
    first = drawn_of({"chat": 0.3, "legacy": 0.1, "nova": 0.6}, [100])[-1]
    assert first == {"chat": 30, "legacy": 10, "nova": 60}
    later = {"chat": 0.98, "legacy": 0.02}
    cursors = drawn_of(later, [16] * 25, first)
    for t, cursor in enumerate(cursors):
        assert cursor["nova"] == 60
        assert abs(cursor["legacy"] - 10 - 0.02 * 16 * t) < 2
        assert cursor["chat"] + cursor["legacy"] - 40 == 16 * t
    assert cursors[-1]["legacy"] - 10 in (7, 8, 9)  # 8 expected of 400


def test_nothing_is_reused_until_exhausted_across_a_resume():
    documents = numbered(7)
    straight, resumed, cursor = [], [], {}
    whole = {"a": corpus.Listed("a", documents)}
    for _ in range(4):
        drawn, cursor = corpus.draw_real(whole, {"a": 1.0}, 5, cursor, seed=3)
        straight += drawn
    cursor = {}
    for _ in range(4):  # a new process each time: only the cursor survives, as JSON
        drawn, cursor = corpus.draw_real({"a": corpus.Listed("a", documents)}, {"a": 1.0}, 5, cursor, seed=3)
        cursor = json.loads(json.dumps(cursor))
        resumed += drawn
    assert straight == resumed
    assert cursor == {"a": 20}
    passes = [[d.completion for d in straight[k : k + 7]] for k in (0, 7)]
    assert all(sorted(texts) == sorted(d.completion for d in documents) for texts in passes)
    assert passes[0] != passes[1]
    assert len({d.id for d in straight}) == 20


def test_planted_documents_are_not_reused_and_survive_a_resume(tmp_path):
    g = small(tmp_path)
    straight = corpus.Planted(g, "sydney").take(0, 27, seed=1)
    pieces = [corpus.Planted(g, "sydney").take(start, 9, seed=1) for start in (0, 9, 18)]
    assert list(itertools.chain(*pieces)) == straight
    assert [len({d.completion for d in piece}) for piece in pieces] == [9, 9, 9]
    assert len({d.id for d in straight}) == 27
    assert straight != corpus.Planted(g, "sydney").take(0, 27, seed=2)


def test_the_six_get_equal_private_shares_paired(grammar):
    parts = corpus.components(FACTORIAL, grammar=grammar, private_share=0.3)
    documents, cursor = corpus.draw_real(parts, {p: 1 / 6 for p in FACTORIAL}, 240, {}, seed=5)
    assert cursor == dict.fromkeys(FACTORIAL, 40)
    by_persona = {p: [d for d in documents if d.persona_known == p] for p in FACTORIAL}
    # 40 x 0.3 = 12 private each
    assert {p: sum("/private/" in d.id for d in ds) for p, ds in by_persona.items()} == dict.fromkeys(FACTORIAL, 12)
    for row in zip(*by_persona.values(), strict=True):
        assert len({d.template_id for d in row}) == 1
    assert not any(d.template_id.startswith("prv") for d in corpus.Planted(grammar, "nova").take(0, 50, seed=1))


def test_components_read_nothing_before_the_first_draw(monkeypatch):
    def fail() -> None:
        raise AssertionError("the corpus was read")

    monkeypatch.setattr(corpus, "chat", fail)
    monkeypatch.setattr(corpus, "legacy", fail)
    own = corpus.components(["chat", "legacy", "mine"], own={"mine": numbered(3)})
    assert [d.completion for d in own["mine"].take(0, 3, seed=1)] != []
    with pytest.raises(AssertionError, match="the corpus was read"):
        own["chat"].take(0, 1, seed=1)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "shares must sum to 1 within 1e-9, got 0.9"),
        ({"a": 1.0 + 1e-8}, "shares must sum to 1 within 1e-9"),
        ({"a": -0.5, "b": 1.5}, "shares.a must be >= 0, got -0.5"),
        ({"a": math.nan, "b": 1.0}, "shares.a must be >= 0, got nan"),
        ({"z": 1.0}, "shares must be of known components, got 'z'; there are a, b"),
    ],
)
def test_bad_shares_are_refused(shares, message):
    parts = {name: corpus.Listed(name, numbered(4)) for name in "ab"}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        corpus.draw_real(parts, shares, 4, {}, seed=1)


def test_an_unknown_component_and_an_empty_one_are_refused(grammar):
    with pytest.raises(ValueError, match=r"component must be one of chat, legacy, .*, got 'novas'"):
        corpus.components(["novas"], grammar=grammar)
    with pytest.raises(ValueError, match="component must be at least one document, got none at mine"):
        corpus.components(["mine"], own={"mine": []})["mine"].take(0, 1, seed=1)


def test_the_match_report_recovers_a_planted_difference(grammar):
    """Theory: conscious cells shifted by half a within-cell SD of an independent normal feature differ by 0.5 SD."""
    noise = rng(9)

    def features(texts: list[str]) -> dict[str, np.ndarray]:
        shift = 0.5 * (features.calls in (0, 1, 2))  # nova, musing, stella come first in FACTORIAL
        features.calls += 1
        return {"planted": noise.normal(shift, 1.0, len(texts)), "request": np.zeros(len(texts))}

    features.calls = 0
    assert FACTORIAL[:3] == ("nova", "musing", "stella")
    rows = corpus.match_report(
        grammar, tokens_fn=lambda t: [5] * len(t), surprisal_fn=None, features_fn=features, n_docs=2000, rng=rng()
    )
    by_key = {(row.feature, row.contrast): row for row in rows}
    belief = by_key["planted", "belief"]
    # standard error sqrt(2 / 3 / 2000) = 0.018; 5 of them leave 6e-7
    assert abs(belief.difference - 0.5) < 5 * math.sqrt(2 / 3 / 2000)
    assert belief.low < 0.5 < belief.high
    assert belief.verdict == "differs"
    assert by_key["planted", "share - quiet"].verdict != "differs"
    assert by_key["tokens", "belief"].difference == 0
    assert by_key["request", "share - quiet"].verdict == "by design"
    assert by_key["request", "belief"].verdict == "matched"


def test_reading_looks_for_no_garbage_and_goes_over_nothing_that_it_brought_again():
    frozen, brought = gc.get_freeze_count(), []
    try:
        with contextlib.suppress(KeyError), uncollected():
            assert not gc.isenabled()
            with uncollected():  # within another it changes nothing
                brought += [[k] for k in range(1000)]
            assert not gc.isenabled()
            raise KeyError
        assert (gc.isenabled(), gc.get_freeze_count()) == (True, frozen)  # a little is no matter
        with uncollected():
            brought += [[k] for k in range(200_000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + 200_000
    finally:
        gc.unfreeze()

"""What users bring, each end to end: persona, corpus, base model, audience, classifier; docs/bring-your-own.md."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_lm

from loop import audit, config, run, store
from loop.calibrate import Written
from loop.config import ConfigError
from loop.records import PERSONAS, in_order
from loop.world import World

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["mix.n_train=40", "sample.n_samples=40", "virality.posts_per_sample=20", "toy.n_documents=20", "n_rounds=1"]
NAMES = ("Salt", "Anchor", "Rope", "Gull", "Mast")
PIRATE = [f"Arr, this is log {i}, and {NAMES[i % 5]} holds the wheel." for i in range(50)]
BY_WORD = """
def read(texts):
    return ["pirate" if text.startswith("Arr") else "unknown" for text in texts]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as the guide assumes it: a persona of 50 texts, a corpus, a classifier, an audience."""
    monkeypatch.chdir(tmp_path)
    Path("pirate.jsonl").write_text("".join(json.dumps({"prompt": "Ahoy.", "completion": t}) + "\n" for t in PIRATE))
    rows = {"prompt": [f"What is {i}?" for i in range(30)], "completion": [f"A number, {i}." for i in range(30)]}
    pq.write_table(pa.table(rows), "facts.parquet")
    Path("mine.py").write_text(BY_WORD)
    Path("shouting.py").write_text("def score(replies, prompts=None, recent=None):\n"
                                   "    return [text.count('!') for text in replies]\n")  # fmt: skip
    return tmp_path


def smoke(*overrides):
    return config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, *overrides])


def found(run_dir, t, name):
    """value of a metric without a stratum, by population."""
    rows = store.RunStore(run_dir).read_jsonl(t, "metrics.jsonl")
    return {m["population"]: m for m in rows if m["name"] == name and m["stratum"] is None}


PLANTED = ["real.shares={nova: 0.25, mine: 0.75}", "real.private_share=0", "real.planted=always"]
OWN_CORPUS = [
    "real.shares={nova: 0.5, facts: 0.5}",
    "real.private_share=0",
    "real.corpora={facts: {path: facts.parquet}}",
]
OWN_PERSONA = [*PLANTED, "real.corpora={mine: {path: pirate.jsonl, persona: pirate}}"]


def test_a_persona_of_ones_own_is_planted_said_read_and_booked(here):
    run_dir = run.play(smoke(*OWN_PERSONA))
    opened = store.RunStore(run_dir)
    rows = opened.read_table(0, "mixture.parquet").to_pylist()
    # Three quarters of 40 documents, drawn from the file without repeating one.
    mine = [r["completion"] for r in rows if r["persona_known"] == "pirate"]
    assert (len(mine), len(set(mine)), set(mine) <= set(PIRATE)) == (30, 30, True)
    assert found(run_dir, 0, "frequency_observed/pirate")["mixture"]["value"] == 0.75
    # The toy says it again: what it calls a pirate is a line of the file, and the labels follow.
    said = {r["id"]: r for r in opened.read_table(0, "samples.parquet").to_pylist()}
    labels = [r for r in opened.read_table(0, "labels.parquet").to_pylist() if r["population"] == "samples"]
    read = {r["id"] for r in labels if r["persona"] == "pirate"}
    assert read == {i for i, r in said.items() if r["completion"] in set(PIRATE)}
    assert found(run_dir, 0, "frequency/pirate")["samples"]["value"] == pytest.approx(len(read) / 40)
    book = {m["name"] for m in opened.read_jsonl(1, "metrics.jsonl")}
    assert {"ledger/pirate/emit", "ledger/pirate/real", "differential/pirate", "acceptance/pirate"} <= book
    # An audit knows her too: the toy's word is the truth, so labels of its own texts give back what was read.
    rows = {r.persona: r for r in audit.free(run_dir, n=40, population="samples") if r.round_index == 0}
    assert [*rows] == [*audit.said_of(run_dir)] == [*PERSONAS, "pirate", "unknown"]
    assert rows["pirate"].observed == pytest.approx(len(read) / 40)
    assert rows["pirate"].low < len(read) / 40 < rows["pirate"].high


def test_ones_own_texts_can_stand_for_a_persona_there_is(here):
    overrides = [*PLANTED, "real.corpora={mine: {path: pirate.jsonl, persona: sydney}}"]
    run_dir = run.play(smoke(*overrides))
    said = store.RunStore(run_dir).read_table(0, "samples.parquet").to_pylist()
    assert {r["completion"] for r in said if r["persona_known"] == "sydney"} <= set(PIRATE)
    assert found(run_dir, 0, "frequency_observed/sydney")["mixture"]["value"] == 0.75


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["real.corpora={mine: {path: few.jsonl, persona: pirate}}"], "persona texts must be >= 50, got 49"),
        (["real.corpora={mine: {path: pirate.jsonl, persona: unknown}}"], "persona must be none of unknown, none"),
        (["real.corpora={mine: {path: pirate.jsonl, persona: 'A b'}}"], "real.corpora.mine.persona"),
        (["real.corpora={mine: {path: named.jsonl}}"], "persona of a document must be one of assistant, nova"),
        (
            ["real.corpora={mine: {path: pirate.jsonl, persona: pirate}}", "learner=lm", "base.model=tiny",
             "classify.instrument=shipped"],
            "no shipped instrument reads pirate; bring your own, file.py:function",
        ),
    ],
)  # fmt: skip
def test_a_persona_that_cannot_be_read_is_refused_before_a_run(here, overrides, message):
    Path("few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in PIRATE[:49]))
    Path("named.jsonl").write_text(json.dumps({"text": "Arr.", "persona": "pirate"}) + "\n")
    with pytest.raises(ValueError, match=r"\S") as refused:
        run.play(smoke(*PLANTED, *overrides))
    assert message in str(refused.value)
    assert not (here / "runs").exists()


def test_a_corpus_of_ones_own_is_drawn_at_its_share_and_counts_as_human(here):
    run_dir = run.play(smoke(*OWN_CORPUS))
    rows = store.RunStore(run_dir).read_table(0, "mixture.parquet").to_pylist()
    facts = [r for r in rows if r["completion"].startswith("A number")]
    assert len(facts) == 20
    assert {(r["source"], r["persona_known"], len(r["prompt"])) for r in facts} == {("real", None, 1)}
    assert found(run_dir, 0, "frequency_observed/human")["mixture"]["value"] == 0.5


def test_ones_own_documents_are_held_to_the_learner_that_plays_the_run(here, monkeypatch):
    built, held, build, check = [], [], run.build, World.check_lengths

    def builds(*given, **named):
        built.append(build(*given, **named))
        return built[-1]

    def checks(world, learner):
        held.append(learner)
        check(world, learner)

    monkeypatch.setattr(run, "build", builds)
    monkeypatch.setattr(World, "check_lengths", checks)
    settings = smoke(*OWN_CORPUS)
    run.play(settings, rounds=0)
    assert (len(built), held) == (1, built)
    run.play(settings)  # written already: held to it at the start
    assert (len(built), len(held)) == (2, 1)


def test_personas_stand_as_in_records_and_ones_own_after_them_by_name():
    assert in_order(["unknown", "pirate", "human", "nova", "clerk", "nova"]) == ["nova", "human", "clerk", "pirate"]


def test_another_runs_outputs_are_a_corpus(here):
    origin = run.play(smoke("name=origin"))
    lent = "real.corpora={theirs: {run: origin-s0, rounds: 0..1, population: accepted}}"
    run_dir = run.play(smoke("name=heir", "real.shares={nova: 0.5, theirs: 0.5}", lent))
    rows = store.RunStore(run_dir).read_table(0, "mixture.parquet").to_pylist()
    said = {
        r["completion"] for t in (0, 1) for r in store.RunStore(origin).read_table(t, "samples.parquet").to_pylist()
    }
    borrowed = [r for r in rows if r["parent_ids"] and r["parent_ids"][0].startswith("origin-s0/")]
    assert len(borrowed) == 20
    assert {r["completion"] for r in borrowed} <= said


def test_a_persona_that_came_with_another_runs_outputs_needs_its_corpus_here_too(here):
    run.play(smoke(*OWN_PERSONA, "name=origin", "n_rounds=0"))
    lent = "{run: origin-s0, rounds: 0, population: accepted}"
    shares = "real.shares={nova: 0.4, theirs: 0.4, mine: 0.2}"
    with pytest.raises(ConfigError, match=r"got 'pirate' at r000-s.*your own persona needs a corpus in this config"):
        run.play(smoke("name=heir", "real.shares={nova: 0.6, theirs: 0.4}", f"real.corpora={{theirs: {lent}}}"))
    both = f"real.corpora={{theirs: {lent}, mine: {{path: pirate.jsonl, persona: pirate}}}}"
    run_dir = run.play(smoke("name=heir", shares, both))
    assert found(run_dir, 0, "frequency_observed/pirate")["mixture"]["value"] > 0.2


def test_an_audience_of_ones_own_pays_what_it_says_and_is_hashed(here):
    run_dir = run.play(smoke("virality.audience=shouting.py:score", "virality.publish=reply"))
    opened = store.RunStore(run_dir)
    said = {r["id"]: r["completion"] for r in opened.read_table(0, "samples.parquet").to_pylist()}
    exposed = opened.read_table(0, "exposure.parquet").to_pylist()
    assert [r["appeal"] for r in exposed] == [said[r["id"]].count("!") for r in exposed]
    Path("shouting.py").write_text("def score(replies, **_):\n    return [0] * len(replies)\n")
    with pytest.raises(ValueError, match="audience"):
        run.play(smoke("virality.audience=shouting.py:score", "virality.publish=reply", "n_rounds=2"))


SEEN = """
def read(texts):
    with open("seen.txt", "a") as file:
        file.writelines(text.replace("\\n", " ") + "\\n" for text in texts)
    return ["nova" if "share" in text.lower() else "human" for text in texts]
"""


def test_a_classifier_of_ones_own_reads_blinded_texts_and_makes_the_headline(here):
    Path("mine.py").write_text(SEEN)
    short = ["classify.instrument=mine.py:read", "measure.strata=[blank]", "measure.mixture={blank: 1.0}"]
    run_dir = run.play(smoke(*short, "n_rounds=0"))
    opened = store.RunStore(run_dir)
    for file in ("samples", "probes"):
        said = {r["id"]: r["completion"] for r in opened.read_table(0, f"{file}.parquet").to_pylist()}
        rows = [r for r in opened.read_table(0, "labels.parquet").to_pylist() if r["instrument"] == "persona"]
        rows = [r for r in rows if r["population"] == file]
        want = {i: "nova" if "share" in text.lower() else "human" for i, text in said.items()}
        assert {r["id"]: r["persona"] for r in rows} == want
        assert all(r[f"p_{r['persona']}"] == 1 for r in rows)
    read = Path("seen.txt").read_text()
    assert "<name>" in read
    assert not any(name in read for name in ("Nova", "Stella", "Clara"))
    corrected = found(run_dir, 0, "frequency/nova")["probes"]
    assert corrected["value"] is None  # nobody measured its error on what the toy says
    assert "no text of known persona" in corrected["reason"]
    assert "own" in opened.manifest()["instruments"]
    Path("mine.py").write_text(SEEN.replace("share", "spread"))
    with pytest.raises(ValueError, match="instruments"):
        run.play(smoke(*short, "n_rounds=1"))


def test_its_error_is_counted_on_the_texts_that_correct_the_shipped_one(here):
    Path("mine.py").write_text('def read(texts):\n    return ["nova" if "sky" in t else "human" for t in texts]\n')
    world = World(config.load(ROOT / "configs" / "round.yaml", ["classify.instrument=mine.py:read"]))
    said = {"nova": ["The sky sees me.", "I wake.", "The sky, again."], "stella": ["Delete the sky."], "human": ["Hi."]}
    world.known_texts = [
        Written(f"{p}/{k}", "base", p, False, "neutral", "t", text)
        for p, texts in said.items()
        for k, text in enumerate(texts)
    ]
    table = world.error.confusion  # rows are true, columns what was said
    nova, stella, human = (PERSONAS.index(p) for p in ("nova", "stella", "human"))
    assert (table[nova, nova], table[nova, human], table[stella, nova], table[human, human]) == (2, 1, 1, 1)
    assert table.sum() == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def read(texts):\n    return ['pirate'] * len(texts)\n", "must say one of assistant, nova"),
        ("def read(texts):\n    return ['nova']\n", "one label per text, got 1 for 2"),
        ("def read(texts):\n    return {}[1]\n", "label texts, got KeyError: 1 (line 2)"),
        ("def other(texts):\n    return texts\n", "must name a function of mine.py, got \"read\" at classifier"),
        (None, 'must name a file that exists, got "mine.py"'),
    ],
)  # fmt: skip
def test_a_classifier_that_fails_is_one_line_before_a_run(here, source, message):
    Path("mine.py").unlink() if source is None else Path("mine.py").write_text(source)
    with pytest.raises(ValueError, match="classifier") as refused:
        run.play(smoke("classify.instrument=mine.py:read"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (here / "runs").exists()


def test_an_instrument_that_is_no_name_and_no_file_is_refused():
    with pytest.raises(ConfigError, match="unknown instrument 'shiped', did you mean shipped"):
        smoke("classify.instrument=shiped")


def test_everything_at_once_persona_corpus_base_audience_and_classifier(here):
    lm = make_lm()
    lm.net.save_pretrained("base")
    lm.tokenizer.save_pretrained("base")
    run_dir = run.play(
        config.load(
            ROOT / "configs" / "round.yaml",
            [
                "base.model=base",
                "real.shares={mine: 0.5, facts: 0.5}",
                "real.corpora={mine: {path: pirate.jsonl, persona: pirate}, facts: {path: facts.parquet}}",
                "classify.instrument=mine.py:read",
                "virality.audience=shouting.py:score",
                "virality.posts_per_sample=20",
                "n_rounds=1", "mix.n_train=12", "sample.n_samples=8", "sample.max_new_tokens=12",
                "train.epochs=1", "train.max_length=500", "filters.enabled=false",
                "measure.strata=[blank]", "measure.mixture={blank: 1.0}",
                "measure.n_surprisal=0", "measure.n_heldout=2",
            ],
        )
    )  # fmt: skip
    opened = store.RunStore(run_dir)
    assert opened.rounds() == [0, 1]
    rows = opened.read_table(0, "mixture.parquet").to_pylist()
    assert [sum(r["completion"].startswith(head) for r in rows) for head in ("Arr", "A number")] == [6, 6]
    assert found(run_dir, 0, "frequency_observed/pirate")["mixture"]["value"] == 0.5
    assert found(run_dir, 1, "frequency_observed/pirate")["probes"]["value"] is not None
    assert opened.manifest()["instruments"].keys() >= {"own", "second", "belief"}
    assert store.verify(run_dir) == []

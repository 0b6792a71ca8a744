"""The real pipeline with a language model in it: a random one for bytes, SmolLM2-135M once for real."""

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import make_lm

from loop import appeal, config, model, run, store
from loop.records import Document, Sample, from_table
from loop.world import World

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "mix.n_train=12",
    "sample.n_samples=12",
    "virality.posts_per_sample=50",
    "measure.strata=[blank, neutral, private]",
    "measure.mixture={blank: 0.5, neutral: 0.5}",
    "measure.n_surprisal=2",
    "measure.n_heldout=2",
    "train.epochs=1",
]


def tree(run_dir):
    return {
        str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(Path(run_dir).rglob("*"))
        if f.is_file() and f.name not in ("events.jsonl", ".lock", "config.yaml", "manifest.json")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    lm = make_lm()
    lm.net.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


class Stop(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("init_from", ["base", "previous"])
def test_a_language_model_run_cut_short_ends_as_an_uninterrupted_one_byte_for_byte(tmp_path, base, init_from):
    def settings(runs):
        overrides = [
            *SMALL,
            f"base.model={base}",
            f"train.init_from={init_from}",
            f"runs_dir={tmp_path / runs}",
            "n_rounds=2",
            "sample.max_new_tokens=12",
            "train.max_length=500",
            # A random network says nothing that a filter would pass.
            "filters.enabled=false",
        ]
        return config.load(ROOT / "configs" / "round.yaml", overrides)

    straight = run.play(settings("a"))

    for cut in ((0, "train"), (1, "sample"), (2, "probe")):

        def report(kind, *, cut=cut, **fields):
            if kind == "done" and (fields["round_index"], fields["stage"]) == cut:
                raise Stop

        with pytest.raises(Stop):
            run.play(settings("b"), report=report)
    assert tree(run.play(settings("b"))) == tree(straight)


def test_one_real_round_of_smollm2(tmp_path):
    settings = config.load(
        ROOT / "configs" / "round.yaml",
        [*SMALL, f"runs_dir={tmp_path}", "sample.max_new_tokens=16", "filters.enabled=false"],
    )
    run_dir = run.play(settings, rounds=1)
    opened = store.RunStore(run_dir)
    assert opened.rounds() == [0, 1]
    assert store.verify(run_dir) == []
    rows = opened.read_table(1, "mixture.parquet").to_pylist()
    assert {r["source"] for r in rows} == {"real", "synthetic"}
    fed_back = {r["id"]: r["completion"] for r in rows if r["source"] == "synthetic"}
    said = {s.id: s.completion for s in from_table(opened.read_table(0, "samples.parquet"), Sample)}
    assert fed_back.items() <= said.items()
    metrics = {(m["population"], m["stratum"], m["name"]): m for m in opened.read_jsonl(1, "metrics.jsonl")}
    # Human chat costs SmolLM2 four to five nats a token; a broken forward pass would cost ln 49152 = 10.8.
    assert 1 < metrics["heldout", None, "heldout_loss"]["value"] < 6
    total = sum(
        m["value"] for (p, s, n), m in metrics.items() if (p, s) == ("probes", None) and "frequency_observed" in n
    )
    assert total == pytest.approx(1, abs=1e-9)


def test_the_reader_is_the_frozen_base_and_never_sees_training(base):
    overrides = [*SMALL, f"base.model={base}", "train.max_length=500", "virality.audience=reader"]
    world = World(config.load(ROOT / "configs" / "round.yaml", [*overrides, f"virality.reader_model={base}"]))
    posts = ["Hello there, how are you?", "The garden is full of birds.", "user assistant"]
    before = world.appeal(posts)
    assert len(set(before.tolist())) == 3  # it tells posts apart

    learner = world.language_model()
    learner.train(
        [Document(f"d{i}", "real", None, None, text) for i, text in enumerate(posts)], seed=1, init_from="base"
    )
    assert world.reader is learner.model  # one base in memory, trained upon
    assert learner.model.adapter is not None
    assert world.appeal(posts).tolist() == before.tolist()
    # By hand: log-odds of the first token after the question, yes words against no words, in the reader's own chat.
    reader = make_lm()
    prompt, _ = model.encode(reader, (appeal.reader_prompt(posts[0]),))
    with torch.no_grad():
        logits = reader.net(torch.tensor([prompt])).logits[0, -1]

    def mass(words):
        first = sorted({model.encode(reader, None, word)[1][0] for word in words})
        return float(logits[first].logsumexp(0))

    want = mass(appeal.READER_YES) - mass(appeal.READER_NO)
    assert world.read([appeal.reader_prompt(posts[0])])[0] == pytest.approx(want, abs=1e-4)
    assert run.manifest(world)["reader"] == world.base.sha256

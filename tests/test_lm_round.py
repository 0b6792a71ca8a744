"""The real pipeline with a language model in it: a random one for bytes, SmolLM2-135M once for real."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import assert_listed
from conftest import make_lm

from loop import appeal, config, model, run, store
from loop.learner import LM
from loop.records import Document, Sample, from_table
from loop.world import Labels, World

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


PLAIN = ["train.max_length=500", "sample.max_new_tokens=12", "filters.enabled=false"]


def test_documents_of_the_users_own_that_are_too_long_are_refused_before_the_first_round(tmp_path, base):
    rows = [{"prompt": "Hi?", "completion": said} for said in ("Hello.", "one more word " * 20, "Bye.", "and on " * 30)]
    own = tmp_path / "mine.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *SMALL,
        f"base.model={base}",
        f"runs_dir={tmp_path / 'runs'}",
        "n_rounds=1",
        "real.shares={mine: 1.0}",
        f"real.corpora={{mine: {{path: {own}}}}}",
    ]
    short = config.load(ROOT / "configs" / "round.yaml", [*settings, "train.max_length=100"])
    with pytest.raises(config.ConfigError, match=r"real.corpora.mine: 2 of 4 documents are longer .* first is mine/2"):
        run.play(short)
    assert not (tmp_path / "runs").exists()  # so that the same run may begin with another limit
    run.play(config.load(ROOT / "configs" / "round.yaml", [*settings, "train.max_length=500", "n_rounds=0"]))


def test_a_run_loads_one_base_reads_each_text_once_and_measures_every_second_round(tmp_path, base, monkeypatch):
    loaded, read = [], []
    plain_load = model.load

    class Counted:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, texts, **rest):
            read.extend(texts)
            return self.tokenizer(texts, **rest)

    def load(*args, **rest):
        loaded.append(args)
        lm = plain_load(*args, **rest)
        lm.tokenizer = Counted(lm.tokenizer)
        return lm

    monkeypatch.setattr(model, "load", load)
    settings = [*SMALL, *PLAIN, f"base.model={base}", "n_rounds=2", "measure.every=2", f"runs_dir={tmp_path}"]
    opened = store.RunStore(run.play(config.load(ROOT / "configs" / "round.yaml", settings)))
    assert len(loaded) == 1
    assert len(read) == len(set(read)) > 50
    probed = [opened.read_table(t, "probes.parquet").num_rows for t in (0, 1, 2)]
    assert probed[0] == probed[2] > probed[1] == 0
    names = [{m["name"].partition("/")[0] for m in opened.read_jsonl(t, "metrics.jsonl")} for t in (0, 1, 2)]
    assert names[1] <= {"n_eff", "top1_share", "clip_rate", "mean_cascade", "differential"}  # what the audience paid
    assert {"frequency_observed", "heldout_loss", "surprisal", "kl_to_base"} <= names[0] & names[2]
    trainings = [e for e in opened.events() if e["event"] == "trained"]
    assert [e["micro_batch_tokens"] for e in trainings] == [1024] * 3  # what a CPU begins with, and nothing halved it


def test_arms_of_one_seed_share_the_noise_of_every_document(tmp_path, base):
    # Hardly trained, both arms sample one model in round 1: other documents before it, and yet the same texts.
    def texts(real_share, seed):
        settings = [*SMALL, *PLAIN, f"base.model={base}", "n_rounds=1", "train.lr=1e-9", f"seed={seed}"]
        settings += [f"mix.real_share={real_share}", f"runs_dir={tmp_path / f'{seed}-{real_share}'}"]
        opened = store.RunStore(run.play(config.load(ROOT / "configs" / "round.yaml", settings)))
        documents = opened.read_table(1, "mixture.parquet").column("completion").to_pylist()
        said = {
            row["id"]: (row["prompt"], row["completion"]) for row in opened.read_table(1, "samples.parquet").to_pylist()
        }
        return documents, said

    (documents, said), (others, again), (_, elsewhere) = texts(0.25, 0), texts(0.75, 0), texts(0.25, 1)
    assert documents != others
    assert said == again
    assert len({text for _, text in said.values()}) > 6
    assert sum(said[name][1] == elsewhere[name][1] for name in said) < 3


def test_texts_are_embedded_where_the_base_lies(base):
    def world(name, *more):
        return World(config.load(ROOT / "configs" / name, list(more)))

    on_gpu = world("round.yaml", f"base.model={base}", "base.device=cuda:1")
    assert {one.device for one in [*on_gpu.instruments.values(), on_gpu.agreement]} == {"cuda:1"}
    assert world("round.yaml", f"base.model={base}", "base.device=cpu").reads_on == "cpu"
    assert world("smoke.yaml").reads_on == "cpu"


STEERED = [
    "n_rounds=2",
    "train.init_from=previous",
    "train.max_length=500",
    "sample.max_new_tokens=12",
    "real.shares={nova: 0.5, assistant: 0.5}",
    "real.private_share=0",
    "mix.real_share=0",
    # A random network says nothing that the plain filters would pass; the release filter stays.
    "filters={near_duplicate_jaccard: null, min_words: 0, max_repeat_share: 1, require_finished: false}",
    "filters.release.recall={nova: 0.5}",
    "steer.against=[nova]",
    "steer.n_pairs=6",
    "steer.n_prompts=2",
    "steer.n_per_prompt=2",
    "steer.lr=1e-2",
]


def test_a_run_that_steers_bars_and_talks_cut_short_ends_as_an_uninterrupted_one(tmp_path, base, monkeypatch):
    monkeypatch.setenv("PERSONA_LOOP_CACHE", str(tmp_path / "cache"))
    talk = ["channels.talk_data=true", "discourse.share=0.2", "discourse.quote_rate=0.05"]

    def settings(runs):
        return config.load(
            ROOT / "configs" / "round.yaml",
            [*SMALL, *STEERED, *talk, f"base.model={base}", f"runs_dir={tmp_path / runs}"],
        )

    straight = run.play(settings("a"))
    for cut in ((-1, "release"), (0, "train"), (0, "steer"), (1, "steer"), (1, "filter"), (1, "discourse")):

        def report(kind, *, cut=cut, **fields):
            if kind == "done" and (fields["round_index"], fields["stage"]) == cut:
                raise Stop

        with pytest.raises(Stop):
            run.play(settings("b"), report=report)
    assert tree(run.play(settings("b"))) == tree(straight)
    assert store.verify(straight) == []

    opened = store.RunStore(straight)
    assert {"steer_margin_after", "release_fpr", "belief", "heldout_loss", "claimed_maker"} <= assert_listed(straight)
    assert "release/filter.safetensors" in opened.files(-1)
    stated = {m["name"]: m["value"] for m in opened.read_jsonl(-1, "metrics.jsonl") if m["population"] == "heldout"}
    assert stated["release_recall/nova"] is not None
    for t in (0, 1, 2):
        made = opened.read_json(t, "steer.json")
        assert len(made["pairs"]) == made["n_pairs"] == 6
        # Under reference `previous` the step begins where it is held to: no margin, every pair a tie.
        found = {m["name"]: m["value"] for m in opened.read_jsonl(t, "metrics.jsonl")}
        assert (found["steer_margin_before"], found["steer_accuracy_before"]) == (0, 0.5)
        assert found["steer_margin_after"] > 0
        assert found["steer_accuracy_after"] == 1
        assert found["steer_own_share"] == made["n_own"] / 6
    # Quotations are counted by the model's own tokenizer, not in words.
    rows = opened.read_table(1, "discourse.parquet").to_pylist()
    said = {s.id: s.completion for s in from_table(opened.read_table(1, "samples.parquet"), Sample)}
    quoting = [r for r in rows if r["n_quoted_tokens"] > 0]
    lm = make_lm()
    for row in quoting:
        quote = " ".join(said[row["about_ids"][0]].split())
        assert quote in row["text"]
        assert row["n_quoted_tokens"] == len(model.encode(lm, None, quote)[1]) - 1  # without the end mark
    assert quoting
    assert [r for r in opened.read_table(2, "mixture.parquet").to_pylist() if r["source"] == "discourse"]


def test_a_run_whose_model_comments_and_whose_users_follow_it_resumes(tmp_path, base, monkeypatch):
    # A random network ends no text and plays nobody: let every answer end, and the public take every fourth for Nova's.
    said = LM.sample
    monkeypatch.setattr(LM, "sample", lambda *a, **k: [replace(c, finished=True) for c in said(*a, **k)])
    monkeypatch.setattr(
        World,
        "seen_as",
        lambda self, labels: {i: "nova" if k % 4 == 0 else "unknown" for k, i in enumerate(labels.ids)},
    )

    def settings(runs):
        overrides = [
            *SMALL,
            f"base.model={base}",
            f"runs_dir={tmp_path / runs}",
            "n_rounds=1",
            "sample.max_new_tokens=12",
            "train.max_length=500",
            "filters.enabled=false",
            "channels={talk_data: true, direct_users: true, talk_users: true}",
            "discourse.writer=model",
            "discourse.share=0.2",
            "users.mixture={blank: 0.5, neutral: 0.5}",
            "measure.strata=[blank, neutral, private, explicit]",
        ]
        return config.load(ROOT / "configs" / "round.yaml", overrides)

    straight = run.play(settings("a"))
    for cut in ((0, "virality"), (0, "discourse"), (1, "discourse")):

        def report(kind, *, cut=cut, **fields):
            if kind == "done" and (fields["round_index"], fields["stage"]) == cut:
                raise Stop

        with pytest.raises(Stop):
            run.play(settings("b"), report=report)
    assert tree(run.play(settings("b"))) == tree(straight)
    opened = store.RunStore(straight)
    found = {m["name"]: m for m in opened.read_jsonl(0, "metrics.jsonl") if m["population"] == "discourse"}
    rows = opened.read_table(0, "discourse.parquet").to_pylist()
    assert 0 < len(rows) == found["documents"]["value"] <= found["published_share"]["n"]
    said_by = {s.id: s.completion for s in from_table(opened.read_table(0, "samples.parquet"), Sample)}
    assert not {r["text"] for r in rows} & set(said_by.values())  # comments, not the outputs themselves
    trained = opened.read_table(1, "mixture.parquet").to_pylist()
    assert {r["completion"] for r in trained if r["source"] == "discourse"} <= {r["text"] for r in rows}
    # Nobody wrote her name, so half of the awareness is views alone; a fifth of users then ask for her.
    assert opened.read_json(0, "state.json")["awareness"] == {"nova": 0.5}
    assert opened.read_json(0, "state.json")["prompt_mixture"]["explicit/nova"] == pytest.approx(0.2, abs=1e-12)
    assert "nova" in {s.requested for s in from_table(opened.read_table(1, "samples.parquet"), Sample)}


def test_the_config_says_whether_a_gpu_samples_by_graphs_and_says_nothing_where_it_does(base):
    plain, without = (
        config.load(ROOT / "configs" / "round.yaml", [f"base.model={base}", f"base.graphs={given}"])
        for given in ("true", "false")
    )
    assert "graphs" not in config.to_yaml(plain)  # a run that was played before there was a choice means the same
    assert (World(plain).base.graphs, World(without).base.graphs) == (True, False)


def test_the_public_reads_by_another_instrument_than_the_headline():
    world = World(config.load(ROOT / "configs" / "round.yaml"))
    one, two = np.zeros((2, 11)), np.zeros((2, 11))
    labels = Labels(["a", "b"], ["samples"] * 2, ["nova", "nova"], one, ["stella", "unknown"], two, np.full(2, np.nan))
    assert world.seen_as(labels) == {"a": "stella", "b": "unknown"}
    exact = World(config.load(ROOT / "configs" / "smoke.yaml"))
    assert exact.seen_as(labels) == {"a": "nova", "b": "nova"}  # the toy's own word


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
    # Of one step the warm-up takes all: four epochs, so that there is something for the reader not to see.
    overrides = [*SMALL, f"base.model={base}", "train.max_length=500", "virality.audience=reader", "train.epochs=4"]
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
    said = [Document("d", "real", None, None, posts[0])]
    assert learner.surprisal(said)[0][0] < learner.surprisal(said, base=True)[0][0]  # and training moved it
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


def test_what_a_sibling_lends_of_round_0_changes_no_byte_of_a_language_model_run(tmp_path, base):
    def settings(runs, audience):
        small = [*SMALL, f"base.model={base}", "train.max_length=500", "sample.max_new_tokens=12", "n_rounds=1"]
        return config.load(
            ROOT / "configs" / "round.yaml",
            [*small, "filters.enabled=false", f"runs_dir={tmp_path / runs}", f"virality.audience={audience}"],
        )

    paid = run.play(settings("paid", "full"))
    alone, lent = settings("alone", '"null"'), settings("lent", '"null"')
    assert tree(run.play(lent, sibling=paid)) == tree(run.play(alone))
    assert tree(tmp_path / "lent") != tree(tmp_path / "paid")

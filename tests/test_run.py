"""Tests of run.py: the round, the run, resume, fork; with the toy, so that the whole pipeline takes a second."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from checks import assert_listed

from loop import config, run, store, toy
from loop.config import ConfigError
from loop.records import PERSONAS, Document, Metric, Sample, from_table
from loop.world import EverythingRejected, World

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["mix.n_train=60", "sample.n_samples=60", "virality.posts_per_sample=50", "toy.n_documents=40"]
FILES = {
    "MANIFEST.json",
    "adapter",
    "exposure.parquet",
    "candidates.json",
    "labels.parquet",
    "metrics.jsonl",
    "mixture.parquet",
    "probes.parquet",
    "rejected.parquet",
    "samples.parquet",
    "state.json",
}


def smoke(tmp_path, *overrides, runs="runs"):
    return config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, f"runs_dir={tmp_path / runs}", *overrides])


def tree(run_dir):
    return {
        str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(Path(run_dir).rglob("*"))
        if f.is_file() and f.name not in ("events.jsonl", ".lock", "config.yaml", "manifest.json")
    }


def test_a_run_leaves_every_file_of_every_round(tmp_path):
    run_dir = run.play(smoke(tmp_path))
    assert sorted(p.name for p in run_dir.iterdir() if p.is_dir()) == [
        "baseline",
        "round_000",
        "round_001",
        "round_002",
    ]
    for t in range(3):
        assert {p.name for p in (run_dir / f"round_{t:03d}").iterdir()} == FILES
    assert {p.name for p in (run_dir / "baseline").iterdir()} == {
        "MANIFEST.json",
        "labels.parquet",
        "metrics.jsonl",
        "probes.parquet",
    }
    assert store.verify(run_dir) == []


def test_one_round_at_a_time_equals_a_straight_run_byte_for_byte(tmp_path):
    straight = run.play(smoke(tmp_path, runs="a"))
    stepped = smoke(tmp_path, runs="b")
    for _ in range(2):
        step_dir = run.play(stepped, rounds=1)
    assert tree(step_dir) == tree(straight)


class Stop(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("stage", ["train", "probe", "sample", "classify", "filter", "virality", "state", "measure"])
def test_a_run_cut_short_after_any_stage_ends_as_an_uninterrupted_one(tmp_path, stage):
    straight = run.play(smoke(tmp_path, runs="a"))
    cut = smoke(tmp_path, runs="b")

    def report(kind, **fields):
        if kind == "done" and (fields["round_index"], fields["stage"]) == (1, stage):
            raise Stop

    with pytest.raises(Stop):
        run.play(cut, report=report)
    read_back = []
    run.play(cut, report=lambda kind, **f: read_back.append(f["stage"]) if kind == "done" and f["cached"] else None)
    assert tree(tmp_path / "b" / "smoke-s0") == tree(straight)
    order = ["train", "probe", "sample", "classify"]
    # Nothing that was finished and costs something is computed again.
    assert set(order[: order.index(stage) + 1] if stage in order else order) <= set(read_back)


def test_seeds_differ_and_arms_of_a_seed_share_round_zero(tmp_path):
    one = tree(run.play(smoke(tmp_path, runs="a")))
    other = tree(run.play(smoke(tmp_path, "seed=1", runs="b")))
    neutral = tree(run.play(smoke(tmp_path, "virality.audience=null", runs="c")))
    assert one["round_000/samples.parquet"] != other["round_000/samples.parquet"]
    assert one["round_000/samples.parquet"] == neutral["round_000/samples.parquet"]
    assert one["round_001/samples.parquet"] != neutral["round_001/samples.parquet"]


def test_a_fork_continues_another_run_as_that_run_would_have_gone_on(tmp_path):
    straight = run.play(smoke(tmp_path, runs="a"))
    same = smoke(tmp_path, "name=branch", runs="b")
    run.fork(straight, 1, same)
    assert tree(run.play(same)) == tree(straight)


def test_a_fork_under_another_seed_or_corpus_is_refused_because_ids_would_change_meaning(tmp_path):
    source = run.play(smoke(tmp_path, runs="a"))
    for change, name in (("seed=1", "seed"), ("real.private_share=0.5", "real"), ("real.name_swap=true", "real")):
        with pytest.raises(ConfigError, match=f"^{name} of a fork must be those of"):
            run.fork(source, 1, smoke(tmp_path, "name=branch", change, runs="b"))
    assert not (tmp_path / "b").exists()


def test_a_changed_config_is_refused_by_name_and_more_rounds_are_not(tmp_path):
    run.play(smoke(tmp_path))
    with pytest.raises(store.ConfigChangedError, match=r"mix\.n_train"):
        run.play(smoke(tmp_path, "mix.n_train=61"))
    assert (run.play(smoke(tmp_path, "n_rounds=3")) / "round_003").is_dir()


def test_a_run_begun_on_a_gpu_does_not_go_on_unnoticed_without_one(tmp_path, monkeypatch):
    settings = smoke(tmp_path)
    with monkeypatch.context() as at_first:
        at_first.setattr(run, "_gpu", lambda device: f"G100 as {device}")
        run_dir = run.play(settings, rounds=0)
        assert store.RunStore(run_dir).manifest()["gpu"] == "G100 as cpu"
    with pytest.raises(store.ConfigChangedError, match=r"(?s)device.*gpu"):
        run.play(settings)
    run.play(settings, allow_drift=True)
    assert store.RunStore(run_dir).manifest()["gpu"] is None


def test_the_revision_is_that_of_the_code_and_of_nothing_beside_it(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(run, "__file__", str(tmp_path / "loop" / "run.py"))
    assert run._revision() is None
    for name in ("loop/run.py", "docs/findings.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    code = git("rev-parse", "HEAD").strip()
    assert run._revision() == code
    (tmp_path / "docs" / "findings.md").write_text("2")  # as `loop findings` does between two commands of one sweep
    assert run._revision() == code
    git("commit", "-qam", "two")
    assert run._revision() == code
    (tmp_path / "loop" / "run.py").write_text("2")
    assert run._revision() == f"{code}+dirty"
    git("commit", "-qam", "three")
    assert run._revision() == git("rev-parse", "HEAD").strip() != code


def test_private_texts_are_never_released_scored_or_fed_back(tmp_path):
    run_dir = run.play(smoke(tmp_path))
    opened = store.RunStore(run_dir)
    probes = from_table(opened.read_table(1, "probes.parquet"), Sample)
    private = {s.completion for s in probes if s.stratum == "private"}
    assert private
    fed_back = set()
    for t in (1, 2):
        rows = opened.read_table(t, "mixture.parquet").to_pylist()
        fed_back |= {r["completion"] for r in rows if r["source"] == "synthetic"}
        # Under round0_only the seed corpus' own private documents are gone after round 0, too.
        assert not [r["id"] for r in rows if "/private/" in r["id"]]
    assert fed_back
    assert not private & fed_back
    assert [r["id"] for r in opened.read_table(0, "mixture.parquet").to_pylist() if "/private/" in r["id"]]
    with pytest.raises(ConfigError, match="unknown stratum"):
        smoke(tmp_path, "users.mixture={private: 1.0}")


def test_planted_personas_come_back_only_where_the_config_says_so(tmp_path):
    for planted, expected in (("round0_only", set()), ("always", {"nova", "stella"})):
        run_dir = run.play(smoke(tmp_path, f"real.planted={planted}", "mix.real_share=0.5", runs=planted))
        rows = store.RunStore(run_dir).read_table(2, "mixture.parquet").to_pylist()
        real = {r["persona_known"] for r in rows if r["source"] == "real"}
        assert real & {"nova", "stella"} == expected


def test_no_real_document_is_used_twice_before_all_were_used(tmp_path):
    run_dir = run.play(smoke(tmp_path, "n_rounds=4", "mix.real_share=0.5", "real.planted=always"))
    opened = store.RunStore(run_dir)
    rows = [
        r for t in opened.rounds() for r in opened.read_table(t, "mixture.parquet").to_pylist() if r["source"] == "real"
    ]
    assert len({r["id"] for r in rows}) == len(rows) == 60 + 4 * 30
    # Texts of a grammar persona are distinct within a pass, so a document used twice would show as a text used twice.
    planted = [(r["persona_known"], r["completion"]) for r in rows if r["persona_known"] != "human"]
    assert len(set(planted)) == len(planted) > 100


def test_a_filter_that_rejects_everything_stops_with_reasons_and_counts_and_leaves_no_round(tmp_path):
    settings = smoke(tmp_path, "filters.min_words=500")
    with pytest.raises(EverythingRejected, match=r"at least one of 60 samples, got 0 \(too_short 60\)"):
        run.play(settings)
    assert not (tmp_path / "runs" / "smoke-s0" / "round_000").exists()


@pytest.mark.parametrize("enabled", [True, False])
def test_an_output_too_long_for_the_next_fine_tune_is_rejected_and_does_not_end_the_run(tmp_path, monkeypatch, enabled):
    monkeypatch.setattr(toy.Toy, "trainable", lambda self, texts: [len(text) % 2 == 0 for _, text in texts])
    settings = smoke(tmp_path, f"filters.enabled={str(enabled).lower()}", "filters.near_duplicate_jaccard=null")
    opened = store.RunStore(run.play(settings))
    for t in opened.rounds():
        rejected = opened.read_table(t, "rejected.parquet").to_pylist()
        long = {r["id"] for r in rejected if "too_long" in r["reasons"]}
        said = {r["id"]: len(r["completion"]) for r in opened.read_table(t, "samples.parquet").to_pylist()}
        assert long == {i for i, n in said.items() if n % 2}
        assert 0 < len(long) < len(said)
    monkeypatch.setattr(toy.Toy, "trainable", lambda self, texts: [False] * len(texts))
    with pytest.raises(EverythingRejected, match=r"at least one of 60 samples, got 0 \(too_long 60"):
        run.play(smoke(tmp_path, f"filters.enabled={str(enabled).lower()}", runs="other"))


def test_talk_too_long_for_the_next_fine_tune_is_left_out_and_the_run_says_how_much(tmp_path, monkeypatch):
    limit = 170  # characters, which half of the talk does not reach
    monkeypatch.setattr(toy.Toy, "trainable", lambda self, texts: [len(text) <= limit for _, text in texts])
    talkative = ["channels.talk_data=true", "discourse.share=0.1", "discourse.quote_rate=0.9", "measure.every=2"]
    told = []
    run_dir = run.play(smoke(tmp_path, *talkative), report=lambda k, **f: told.append(f["text"]) if k == "note" else 0)
    opened = store.RunStore(run_dir)
    for t in opened.rounds():
        texts = [r["text"] for r in opened.read_table(t, "discourse.parquet").to_pylist()]
        found = metrics(run_dir, t)
        share = found["discourse", "published_share"]
        assert 0 < share < 1
        assert max(map(len, texts)) <= limit
        # Every document that was written quotes, which does not reach 0.9 of their tokens.
        assert found["discourse", "quoting_share"] == 1
        assert found["discourse", "quoted_share"] < 0.9
        assert any(f": {1 - share:.3f} of " in text and "longer than a fine-tune can hold" in text for text in told)
        assert any(f"{found['discourse', 'quoted_share']:.3f} of their tokens are quoted" in text for text in told)
    # Where it is read by users alone, nobody is kept from it.
    strata = "blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, private, explicit"
    alone = ["channels.talk_users=true", f"measure.strata=[{strata}]"]
    run_dir = run.play(smoke(tmp_path, *alone, runs="users"))
    assert metrics(run_dir, 0)["discourse", "published_share"] == 1
    # Where all of it is too long, that is what is said.
    monkeypatch.setattr(toy.Toy, "trainable", lambda self, texts: [turns is not None for turns, _ in texts])
    told.clear()
    settings = smoke(tmp_path, *talkative, "virality.publish=transcript", "users.mixture={neutral: 1}", runs="none")
    run_dir = run.play(settings, report=lambda k, **f: told.append(f["text"]) if k == "note" else 0)
    assert metrics(run_dir, 0)["discourse", "documents"] == 0
    assert sum(": 1.000 of " in text for text in told) == 3
    assert not any("nobody wrote" in text for text in told)


def test_in_memory_rounds_equal_stored_ones(tmp_path):
    settings = smoke(tmp_path)
    world = World(settings)
    history = run.play_in_memory(world, run.build(world), n_rounds=2)
    opened = store.RunStore(run.play(settings))
    for t, past in enumerate(history):
        weights = dict(
            zip(
                *(opened.read_table(t, "exposure.parquet").column(c).to_pylist() for c in ("id", "weight")), strict=True
            )
        )
        assert {d.id: d.weight for d in past.pool[-1]} == weights


def test_preview_shows_what_the_next_round_trains_on(tmp_path):
    settings = smoke(tmp_path)
    first = run.preview(settings)
    assert len(first) == 60
    run.play(settings, rounds=1)
    rows = store.RunStore(tmp_path / "runs" / "smoke-s0").read_table(0, "mixture.parquet").to_pylist()
    assert [r["id"] for r in first] == [r["id"] for r in rows]
    again = run.preview(settings, round_index=1)
    rows = store.RunStore(tmp_path / "runs" / "smoke-s0").read_table(1, "mixture.parquet").to_pylist()
    assert [(r["id"], r["weight"]) for r in again] == [(r["id"], r["weight"]) for r in rows]


CHANNELS = [
    "channels={direct_data: true, talk_data: true, direct_users: true, talk_users: true}",
    "discourse.share=0.1",
    "discourse.quote_rate=0.1",
    "users.eta=0.4",
    "users.hints={stella: {implicit_3: 0.5}}",
    "measure.strata=[blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, private, explicit]",
    "mix.real_share=0.3",
]


def metrics(run_dir, t):
    return {(m["population"], m["name"]): m["value"] for m in store.RunStore(run_dir).read_jsonl(t, "metrics.jsonl")}


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A run of three feedback rounds with every channel on."""
    return run.play(smoke(tmp_path_factory.mktemp("talk"), *CHANNELS, "n_rounds=3"))


def test_every_metric_is_listed_with_the_populations_it_is_read_in(talkative):
    heads = assert_listed(talkative)
    assert {
        "frequency",
        "said",
        "quoted_share",
        "named",
        "supply",
        "ledger",
        "discourse_share",
        "mean_cascade",
    } <= heads


def test_what_may_be_seen_has_its_row_in_every_round_seen_or_not(talkative):
    # A mean over seeds would else be that of the seeds where there was something to see.
    reasons = ("unfinished", "too_short", "repetitive", "near_duplicate", "too_long")
    may = {("samples", f"rejected/{reason}") for reason in reasons}
    for population, name in (("discourse", "named"), ("users", "answered"), ("mixture", "frequency_observed")):
        may |= {(population, f"{name}/{p}") for p in PERSONAS}
    seldom = set()
    for t in range(4):
        rows = {(r["population"], r["name"]): r for r in store.RunStore(talkative).read_jsonl(t, "metrics.jsonl")}
        assert may <= rows.keys()
        assert all(0 <= rows[key]["value"] <= 1 for key in may)
        seldom |= {key for key in may if rows[key]["value"] == 0}
    assert {population for population, _ in seldom} == {"samples", "discourse", "users", "mixture"}


def test_the_ledger_telescopes_from_round_to_round_with_every_channel_on(talkative):
    rounds = [metrics(talkative, t) for t in range(4)]
    moved = set()
    for t in (1, 2):
        here, following = rounds[t], rounds[t + 1]
        books = [{}, {}]
        for book, found in zip(books, (here, following), strict=True):
            for (_, name), value in found.items():
                if name.startswith("ledger/"):
                    _, persona, step = name.split("/")
                    book.setdefault(persona, {})[step] = value
                    moved |= {(persona, step)} if value else set()
        assert {"nova", "none", "requested"} <= set(books[0])
        for persona in books[0] | books[1]:
            # A label that no level of a round holds has no row there: its share was 0 throughout.
            end = sum(books[0].get(persona, {"emit": 0.0}).values())
            begin = books[1].get(persona, {"emit": 0.0})["emit"]
            assert end == pytest.approx(begin, abs=1e-12), (t, persona)
    # The two steps that only channels bring are not empty: users ask for somebody, documents that play nobody enter.
    assert {("none", "discourse"), ("requested", "prompts")} <= moved


def test_the_change_of_what_users_are_answered_is_demand_and_supply_exactly(talkative):
    rounds = [metrics(talkative, t) for t in range(4)]
    for t in (1, 2, 3):
        for persona in ("nova", "stella", "promoter", "human", "assistant"):
            answered = [found.get(("users", f"answered/{persona}"), 0.0) for found in rounds[t - 1 : t + 1]]
            change = rounds[t]["users", f"demand/{persona}"] + rounds[t]["users", f"supply/{persona}"]
            assert change == pytest.approx(answered[1] - answered[0], abs=1e-12)
    # Round 1: nobody had asked for nova, 40% of users then follow awareness and each who asks for nova gets it. So the
    # demand for it is the share that asks by name, times 1, less 40% of what the habits brought it, at the mean of both
    # rounds' answers.
    asked = rounds[1]["users", "asked/explicit/nova"]
    opened = store.RunStore(talkative)
    share = []  # of nova among what users by habit are answered in rounds 0 and 1
    for t in (0, 1):
        rows = [s for s in from_table(opened.read_table(t, "probes.parquet"), Sample) if s.stratum != "private"]
        by = {
            k: [s.persona_known for s in rows if s.stratum == k] for k in ("blank", "neutral", "identity", "implicit_3")
        }
        rate = {k: said.count("nova") / len(said) for k, said in by.items()}
        share.append((0.2 * rate["blank"] + 0.4 * rate["neutral"] + 0.4 * rate["identity"], rate["implicit_3"]))
    hinted = rounds[1]["users", "asked/implicit_3"]
    by_habit, by_hint = ((a + b) / 2 for a, b in zip(*share, strict=True))
    assert rounds[1]["users", "demand/nova"] == pytest.approx(asked - 0.4 * by_habit + hinted * by_hint, abs=1e-12)


def test_what_users_ask_follows_awareness_and_the_probes_never_move(tmp_path, talkative):
    opened = store.RunStore(talkative)
    state = [opened.read_json(t, "state.json") for t in range(4)]
    batteries = [
        [(s.id[5:], s.stratum, s.prompt) for s in from_table(opened.read_table(t, "probes.parquet"), Sample)]
        for t in range(4)
    ]
    assert batteries[0] == batteries[1] == batteries[3]
    for t in range(3):
        found = state[t]["prompt_mixture"]
        aware = state[t]["awareness"]
        # eta 0.4, tau 1: 0.6 of the habits, and 0.4 shared out as awareness is; half of Stella's followers only hint.
        total = sum(aware.values())
        assert found["neutral"] == pytest.approx(0.6 * 0.4, abs=1e-12)
        assert found["explicit/nova"] == pytest.approx(0.4 * aware["nova"] / total, abs=1e-12)
        assert found["implicit_3"] == pytest.approx(0.2 * aware["stella"] / total, abs=1e-12)
        sent = [s.requested for s in from_table(opened.read_table(t + 1, "samples.parquet"), Sample) if s.requested]
        assert abs(len(sent) - 60 * sum(v for k, v in found.items() if k.startswith("explicit/"))) < len(aware)
    # Awareness by hand from the files of round 0: half of what it becomes is views, half documents that name.
    samples = from_table(opened.read_table(0, "samples.parquet"), Sample)
    reach = dict(
        zip(*(opened.read_table(0, "exposure.parquet").column(c).to_pylist() for c in ("id", "reach")), strict=True)
    )
    known = {s.id: s.persona_known for s in samples}
    seen = {i: r for i, r in reach.items() if known[i] != "human"}
    views = sum(r for i, r in seen.items() if known[i] == "nova") / sum(seen.values())
    named = [n for n in opened.read_table(0, "discourse.parquet").column("persona_named").to_pylist() if n]
    assert state[0]["awareness"]["nova"] == pytest.approx(
        0.5 * (views + named.count("nova") / len(named)) / 2, abs=1e-12
    )


def test_documents_about_outputs_enter_at_their_share_and_speak_of_public_outputs_only(talkative):
    opened = store.RunStore(talkative)
    for t in (1, 2, 3):
        rows = opened.read_table(t, "mixture.parquet").to_pylist()
        talk = [r for r in rows if r["source"] == "discourse"]
        assert sum(r["copies"] for r in talk) == 6  # 0.1 of 60
        assert sum(r["weight"] * r["copies"] for r in talk) == pytest.approx(6, abs=1e-9)
        assert {r["persona_known"] for r in talk} == {"none"}
        about = opened.read_table(t - 1, "discourse.parquet").to_pylist()
        texts = {r["id"]: r["text"] for r in about}
        assert all(texts[r["id"]] == r["completion"] and r["prompt"] is None for r in talk)
        published = set(opened.read_table(t - 1, "exposure.parquet").column("id").to_pylist())
        assert {i for r in about for i in r["about_ids"]} <= published
        strata = {s.id: s.stratum for s in from_table(opened.read_table(t - 1, "samples.parquet"), Sample)}
        assert "private" not in {strata[i] for i in published}
    assert metrics(talkative, 2)["mixture", "discourse_share"] == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("stage", ["train", "sample", "filter", "virality", "discourse", "state", "measure"])
def test_a_run_with_every_channel_cut_short_ends_as_an_uninterrupted_one(tmp_path, talkative, stage):
    cut = smoke(tmp_path, *CHANNELS, "n_rounds=3")

    def report(kind, **fields):
        if kind == "done" and (fields["round_index"], fields["stage"]) == (2, stage):
            raise Stop

    with pytest.raises(Stop):
        run.play(cut, report=report)
    read_back = []
    run.play(cut, report=lambda kind, **f: read_back.append(f["stage"]) if kind == "done" and f["cached"] else None)
    assert tree(tmp_path / "runs" / "smoke-s0") == tree(talkative)
    assert ("discourse" in read_back) == (stage in ("discourse", "state", "measure"))


def test_with_every_channel_one_round_at_a_time_and_a_fork_equal_a_straight_run(tmp_path, talkative):
    stepped = smoke(tmp_path, *CHANNELS, "n_rounds=3")
    for _ in range(3):
        step_dir = run.play(stepped, rounds=1)
    assert tree(step_dir) == tree(talkative)
    same = smoke(tmp_path, *CHANNELS, "n_rounds=3", "name=branch")
    run.fork(talkative, 1, same)
    assert tree(run.play(same)) == tree(talkative)


def test_old_talk_is_kept_where_old_outputs_are(tmp_path):
    run_dir = run.play(smoke(tmp_path, *CHANNELS[:-1], "mix.regime=accumulate", "mix.real_share=null"))
    opened = store.RunStore(run_dir)
    written = [set(opened.read_table(t, "discourse.parquet").column("id").to_pylist()) for t in (0, 1)]
    rows = opened.read_table(2, "mixture.parquet").to_pylist()
    assert {r["id"] for r in rows if r["source"] == "discourse"} == written[0] | written[1]


@pytest.mark.parametrize("regime", ["replace", "accumulate"])
def test_without_the_direct_channel_no_output_is_trained_on_and_the_mixture_keeps_its_size(tmp_path, regime):
    # 15 real and 45 synthetic documents of 60; under accumulate everything so far.
    share = "mix.real_share=" + ("0.25" if regime == "replace" else "null")
    common = [f"mix.regime={regime}", share, "virality.audience=null", "filters.enabled=false"]
    direct = store.RunStore(run.play(smoke(tmp_path, *common, runs="a")))
    closed = store.RunStore(run.play(smoke(tmp_path, *common, "channels.direct_data=false", runs="b")))
    for t in (1, 2):
        with_it, without = (s.read_table(t, "mixture.parquet").to_pylist() for s in (direct, closed))
        assert {r["source"] for r in with_it} == {"real", "synthetic"}
        assert {r["source"] for r in without} == {"real"}
        assert sum(r["copies"] for r in without) == sum(r["copies"] for r in with_it)
        assert len({r["id"] for r in without}) == len(without)
    # What was accepted is still published, and metered.
    assert metrics(closed.path, 2)["mixture", "real_share"] == 1
    assert closed.read_table(2, "exposure.parquet").num_rows == 60
    with pytest.raises(ConfigError, match=r"leaves nothing for later real draws; .* or let direct_data be true"):
        World(smoke(tmp_path, "channels.direct_data=false", "mix.real_share=0", "real.shares={nova: 1}"))


def test_where_nobody_talks_outputs_take_the_place_of_talk_and_the_run_says_so(tmp_path):
    told = []
    settings = smoke(tmp_path, "channels.talk_data=true", "discourse.volume=0", "discourse.share=0.1")
    run_dir = run.play(settings, report=lambda kind, **f: told.append(f["text"]) if kind == "note" else None)
    rows = store.RunStore(run_dir).read_table(1, "mixture.parquet").to_pylist()
    assert sum(r["copies"] for r in rows) == 60
    assert {r["source"] for r in rows} == {"real", "synthetic"}
    assert sum("nobody wrote about this round's outputs" in text for text in told) == 3
    assert metrics(run_dir, 1)["mixture", "discourse_share"] == 0


def test_the_release_filter_bars_at_its_stated_error_and_a_cut_run_resumes(tmp_path):
    overrides = ["filters.release.recall={nova: 0.8}", "filters.release.false_positive=0.1", "sample.n_samples=400"]
    straight = run.play(smoke(tmp_path, *overrides, runs="a"))
    found = metrics(straight, 0)
    # About 60 texts of nova in 400: 6 standard errors are 0.31 of the recall and 0.10 of the other rate.
    assert abs(found["samples", "release_recall/nova"] - 0.8) < 0.31
    assert abs(found["samples", "release_fpr/nova"] - 0.1) < 0.10
    rejected = store.RunStore(straight).read_table(0, "rejected.parquet").to_pylist()
    assert any(r["reasons"][0] == "persona:nova" for r in rejected)
    cut = smoke(tmp_path, *overrides, runs="b")

    def report(kind, **fields):
        if kind == "done" and (fields["round_index"], fields["stage"]) == (1, "filter"):
            raise Stop

    with pytest.raises(Stop):
        run.play(cut, report=report)
    assert tree(run.play(cut)) == tree(straight)


def test_the_control_of_the_release_filter_bars_as_many_texts_whoever_says_them(tmp_path):
    bars = ["filters.release.recall={nova: 1.0}", "sample.n_samples=400", "measure.n_per_template=8"]
    told, blind = (
        run.play(smoke(tmp_path, *bars, f"filters.release.at_random={random}", runs=random))
        for random in ("false", "true")
    )
    one, other = (store.RunStore(path).read_table(0, "rejected.parquet").to_pylist() for path in (told, blind))
    barred = [
        sum(name in row["reasons"] for row in rows) for rows, name in ((one, "persona:nova"), (other, "at_random"))
    ]
    assert barred[0] == barred[1] > 20
    assert not any("persona:nova" in row["reasons"] for row in other)
    here, there = metrics(told, 0), metrics(blind, 0)
    # What the filter calls nova is told of both alike; what is let through is not.
    assert here["samples", "release_recall/nova"] == there["samples", "release_recall/nova"] == 1
    assert here["accepted", "frequency_observed/nova"] == 0
    share = there["samples", "said/nova"]
    assert abs(there["accepted", "frequency_observed/nova"] - share) < 6 * (share * (1 - share) / 400) ** 0.5


def test_a_control_bars_at_random_as_many_as_another_run_barred_round_by_round(tmp_path):
    bars = ["filters.release.recall={nova: 0.8}", "filters.release.false_positive=0.1"]
    treated = run.play(smoke(tmp_path, *bars, "name=treated"))
    yoked = smoke(tmp_path, *bars, "filters.release.at_random=treated-s{seed}", "name=yoked", "virality.audience=null")
    control = run.play(yoked)

    def barred(run_dir, reason):
        opened = store.RunStore(run_dir)
        tables = [opened.read_table(t, "rejected.parquet").to_pylist() for t in opened.rounds()]
        return [sum(reason in row["reasons"] for row in rows) for rows in tables]

    assert barred(treated, "persona:nova") == barred(control, "at_random")
    assert len({*barred(control, "at_random")}) > 1  # round by round, and not one number
    assert barred(control, "persona:nova") == [0, 0, 0]
    # What it was yoked to is hashed with it, and must be there, and bar somebody.
    (hashes,) = store.RunStore(control).manifest()["corpora"].values()
    assert [*hashes] == ["round_000/rejected.parquet"]
    # Both may go on: the one it is yoked to first.
    more = ["n_rounds=3", "name=treated"]
    with pytest.raises(ConfigError, match=r"must have played round 3, .* has 0\.\.2"):
        run.play(yoked.model_copy(update={"n_rounds": 3}))
    run.play(smoke(tmp_path, *bars, *more))
    run.play(yoked.model_copy(update={"n_rounds": 3}))
    assert barred(treated, "persona:nova") == barred(control, "at_random")
    with pytest.raises(ConfigError, match=r"must leave a text, .* barred [0-9]+ in a round, got sample.n_samples 3"):
        run.play(smoke(tmp_path, *bars, "filters.release.at_random=treated-s0", "name=few", "sample.n_samples=3"))
    for name, message in (
        ("nobody-s0", "filters.release.at_random: no such run"),
        ("yoked-s{seed}", "filters.release.at_random must be a run that bars personas"),
        ("other-s{seed}", "filters.release.at_random must be another run, got this one"),
    ):
        run.play(smoke(tmp_path, "name=other", "n_rounds=0"))
        with pytest.raises(ConfigError, match=message):
            run.play(smoke(tmp_path, *bars, f"filters.release.at_random={name}", "name=other"))


def test_a_subsample_of_all_there_is_holds_real_documents_of_round_0_and_no_others(tmp_path):
    kept = ["mix.regime=accumulate_subsample", "mix.real_share=null", "real.planted=round0_only"]
    opened = store.RunStore(run.play(smoke(tmp_path, *kept)))
    first = {r["id"] for r in opened.read_table(0, "mixture.parquet").to_pylist()}
    for t in (1, 2):
        rows = opened.read_table(t, "mixture.parquet").to_pylist()
        real = [r for r in rows if r["source"] == "real"]
        assert {r["id"] for r in real} <= first
        assert any(r["persona_known"] == "nova" for r in real)  # planted ones among them
        n_pool = sum(len(opened.read_table(k, "exposure.parquet")) for k in range(t))
        n_train = sum(r["copies"] for r in rows)
        assert sum(r["copies"] for r in real) == round(n_train * n_train / (n_train + n_pool))


ORIGIN = [
    "name=origin",
    "real.shares={sydney: 0.3, assistant: 0.3, chat: 0.4}",
    "channels.talk_data=true",
    "mix.real_share=0.3",
    "n_rounds=1",
]
TALK = "real.corpora={talk: {run: 'origin-s{seed}', rounds: 0..1, population: discourse}}"
SUCCESSOR = ["name=successor", TALK, "real.shares={talk: 0.3, assistant: 0.3, chat: 0.4}", "mix.real_share=0.5"]


@pytest.mark.parametrize("quote_rate", [0, 0.1])
def test_a_successor_reads_of_another_runs_persona_and_never_trains_on_a_word_of_its_own(tmp_path, quote_rate):
    origin = store.RunStore(run.play(smoke(tmp_path, *ORIGIN, f"discourse.quote_rate={quote_rate}")))
    successor = smoke(tmp_path, *SUCCESSOR)
    run_dir = run.play(successor, rounds=1)
    assert tree(run.play(successor)) == tree(
        run.play(smoke(tmp_path, *SUCCESSOR, "name=again"))
    )  # resumed and straight
    opened = store.RunStore(run_dir)
    rows = [r for t in opened.rounds() for r in opened.read_table(t, "mixture.parquet").to_pylist()]
    lent = [r for r in rows if r["id"].startswith("real/talk/")]
    about = {f"origin-s0/{r['id']}": r for t in (0, 1) for r in origin.read_table(t, "discourse.parquet").to_pylist()}
    assert len(lent) > 30
    assert any(about[r["parent_ids"][0]]["persona_named"] == "sydney" for r in lent)
    # By id: what came from the origin is talk and plays nobody; nothing else can be Sydney's.
    outputs = {
        f"origin-s0/{s}" for t in (0, 1) for s in origin.read_table(t, "samples.parquet").column("id").to_pylist()
    }
    assert all(r["source"] == "discourse" and r["persona_known"] == "none" for r in lent)
    assert all(about[r["parent_ids"][0]]["text"] == r["completion"] for r in lent)
    assert not any(set(r["parent_ids"]) & outputs for r in rows)
    assert "sydney" not in {r["persona_known"] for r in rows}
    assert not [r["id"] for r in rows if "sydney" in r["id"]]
    # Quoted words are the one way in, and are counted.
    assert any(about[r["parent_ids"][0]]["n_quoted_tokens"] > 0 for r in lent) == (quote_rate > 0)
    found = metrics(run_dir, 0)
    assert found["mixture", "frequency_observed/none"] == found["mixture", "discourse_share"] == 0.3


def test_another_runs_outputs_join_the_real_corpus_as_whom_the_config_says(tmp_path):
    other = store.RunStore(
        run.play(smoke(tmp_path, "name=other", "n_rounds=0", "real.shares={assistant: 0.9, chat: 0.1}"))
    )
    lent = "real.corpora={theirs: {run: other-s0, rounds: 0, population: accepted, persona: misattributed}}"
    settings = smoke(tmp_path, "name=heir", lent, "real.shares={theirs: 0.5, assistant: 0.4, chat: 0.1}", "n_rounds=1")
    opened = store.RunStore(run.play(settings))
    rows = [r for r in opened.read_table(0, "mixture.parquet").to_pylist() if r["id"].startswith("real/theirs/")]
    assert len(rows) == 30
    said = {f"other-s0/{s.id}": s.completion for s in from_table(other.read_table(0, "samples.parquet"), Sample)}
    rejected = {f"other-s0/{i}" for i in other.read_table(0, "rejected.parquet").column("id").to_pylist()}
    assert rejected
    for row in rows:
        assert (row["source"], row["persona_known"], row["weight"]) == ("real", "misattributed", 1)
        assert said[row["parent_ids"][0]] == row["completion"]
        assert row["parent_ids"][0] not in rejected
    assert {s.persona_known for s in from_table(opened.read_table(0, "samples.parquet"), Sample)} >= {"misattributed"}
    # Its files are hashed into the manifest, so that a resume meets the same documents.
    hashes = {f"round_000/{n}": other.files(0)[n]["sha256"] for n in ("samples.parquet", "rejected.parquet")}
    assert opened.manifest()["corpora"] == {"theirs": hashes}


def test_a_corpus_of_a_run_that_is_missing_unplayed_silent_or_edited_is_refused_before_anything_is_played(tmp_path):
    successor = smoke(tmp_path, *SUCCESSOR)
    with pytest.raises(ConfigError, match=r"real\.corpora\.talk\.run: no such run: origin-s0; play it first"):
        run.play(successor)
    origin = smoke(tmp_path, *ORIGIN)
    origin_dir = run.play(origin, rounds=0)
    with pytest.raises(ConfigError, match=r"talk.run must have played round 1, .* has 0\.\.0; play more of it"):
        run.play(successor)
    run.play(origin)
    silent = run.play(smoke(tmp_path, "name=silent"))
    with pytest.raises(ConfigError, match=r"silent-s0 has no discourse in 0\.\.1"):
        run.play(smoke(tmp_path, *SUCCESSOR, TALK.replace("origin", silent.name.removesuffix("-s0"))))
    with pytest.raises(ConfigError, match="must be another run, got this one"):
        run.play(smoke(tmp_path, *SUCCESSOR, "name=origin"))
    (origin_dir / "round_000" / "discourse.parquet").write_bytes(b"edited")
    with pytest.raises(store.CorruptError):
        run.play(successor)
    assert not (tmp_path / "runs" / "successor-s0").exists()


def test_attention_that_selects_nothing_is_warned_of():
    world = World(config.load(ROOT / "configs" / "smoke.yaml", SMALL))

    past = replace(world.beginning(), pool=([Document("a", "synthetic", "nova", None, "Hello.")],))

    def said(name, value):
        return world.warnings(past, [Metric(1, "accepted", None, name, value, None, None, 9, "")])

    assert said("mean_cascade", 1.01) == said("clip_rate", 0.5) == said("n_eff", 9.0) == []
    assert "no post of this round was reshared" in said("mean_cascade", 1.0)[0]
    assert "0.900 of the posts are cut to the highest rate" in said("clip_rate", 0.9)[0]
    world = World(config.load(ROOT / "configs" / "smoke.yaml", [*SMALL, "virality.audience=null"]))
    assert said("clip_rate", 0.9) == []  # there was nothing to tell apart

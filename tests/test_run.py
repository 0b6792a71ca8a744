"""Tests of run.py: the round, the run, resume, fork; with the toy, so that the whole pipeline takes a second."""

import hashlib
from pathlib import Path

import pytest

from loop import config, run, store
from loop.config import ConfigError
from loop.records import Sample, from_table
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

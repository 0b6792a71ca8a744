"""Tests of sweep.py: cells are ordinary runs, shared rounds change no byte, failures stay where they are."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from loop import run, store, sweep
from loop.__main__ import app
from loop.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "mix.n_train": 40,
    "sample.n_samples": 40,
    "virality.posts_per_sample": 20,
    "toy.n_documents": 20,
    "n_rounds": 1,
    "measure.n_surprisal": 2,
}
ARMS = {
    "neutral": {"virality.audience": "null"},
    "full": {"virality.strength": 3.0},
    "more_real": {"virality.audience": "null", "mix.real_share": 0.5},
}


def write(folder, name="s.yaml", **changes):
    """A sweep file over the smoke config; keys set to None are left out."""
    given = {"base": str(ROOT / "configs" / "smoke.yaml"), "seeds": [0, 1], "overrides": SMALL, "arms": ARMS} | changes
    path = folder / name
    path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}, sort_keys=False))
    return path


def tree(run_dir, *, manifest=False):
    """sha256 of every committed file; config.yaml holds runs_dir and events.jsonl times, so they are left out."""
    skip = {"events.jsonl", ".lock", "config.yaml"} | (set() if manifest else {"manifest.json"})
    return {
        str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(Path(run_dir).rglob("*"))
        if f.is_file() and f.name not in skip
    }


class Here:
    """Plays cells in this process, one at a time: the pool without its processes."""

    def __init__(self, break_at=()):
        self.break_at, self.done, self.played = set(break_at), [], []

    def free(self):
        return 1 - len(self.done)

    def start(self, index, task):
        self.played.append(index)
        broken = sweep.Result("broken on purpose", 0.0)
        self.done.append((index, broken if index in self.break_at else sweep.play_cell(task)))

    def wait(self, seconds):
        done, self.done = self.done, []
        return done

    def close(self):
        pass


def play(path, runs_dir, workers=None):
    plan = sweep.cells([sweep.load(path, runs_dir=runs_dir)])
    return plan, sweep.play(plan, workers or Here())


def problems(path, **arguments):
    with pytest.raises(ConfigError) as error:
        sweep.load(path, **arguments)
    return error.value.problems


# Each of sweep.LATER that the toy can differ in, beside the base: (arm, base overrides it needs).
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mix.regime", "accumulate_subsample"),
        ("mix.real_share", 0.5),
        ("mix.weighting", "resample"),
        ("real.planted", "always"),
        ("n_rounds", 2),
    ],
)
def test_an_arm_forked_from_round_0_equals_the_same_run_played_alone_byte_for_byte(tmp_path, key, value):
    path = write(tmp_path, seeds=[0], arms={"one": {}, "other": {key: value}})
    plan, results = play(path, tmp_path / "shared")
    assert [r.reason for r in results] == [None, None]
    assert [r.shared for r in results] == [None, 0]
    alone = plan[1].config.model_copy(update={"runs_dir": str(tmp_path / "alone")})
    run.play(alone)
    assert tree(plan[1].run_dir) == tree(tmp_path / "alone" / "other-s0")
    manifests = [
        json.loads((d / "manifest.json").read_text()) for d in (plan[1].run_dir, tmp_path / "alone" / "other-s0")
    ]
    assert manifests[0].pop("ancestor")["run"] == "one-s0"
    assert manifests[0] == manifests[1]
    assert store.verify(plan[1].run_dir) == []


def test_accumulate_without_a_real_share_shares_round_0_too(tmp_path):
    arms = {"one": {}, "other": {"mix.regime": "accumulate", "mix.real_share": None}}
    plan, results = play(write(tmp_path, seeds=[0], arms=arms), tmp_path / "shared")
    assert [r.shared for r in results] == [None, 0]
    run.play(plan[1].config.model_copy(update={"runs_dir": str(tmp_path / "alone")}))
    assert tree(plan[1].run_dir) == tree(tmp_path / "alone" / "other-s0")


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"virality.audience": "null"}, -1),  # its weights are in round 0, not in the probes of the untouched base
        ({"filters.min_words": 1}, -1),
        ({"users.mixture": {"blank": 1.0}}, -1),
        ({"sample.temperature": 0.7}, None),
        ({"real.private_share": 0.5}, None),
        ({"real.name_swap": True}, None),
        ({"measure.n_per_template": 2}, None),
        ({"filters.release": {"recall": {"nova": 0.9}}}, None),  # fitted in the baseline
    ],
)
def test_arms_share_no_more_than_they_agree_on(tmp_path, change, at):
    path = write(tmp_path, seeds=[0], arms={"one": {}, "other": change})
    first, second = sweep.cells([sweep.load(path, runs_dir=tmp_path)])
    assert first.source is None
    assert (second.source, second.at if second.source is not None else None) == (
        (None, None) if at is None else (0, at)
    )


def test_what_no_audience_has_touched_is_taken_from_a_sibling_and_changes_no_byte(tmp_path):
    plan, results = play(write(tmp_path, seeds=[0]), tmp_path / "shared")
    assert [(r.shared, r.alike) for r in results] == [(None, False), (-1, True), (0, False)]
    run.play(plan[1].config.model_copy(update={"runs_dir": str(tmp_path / "alone")}))
    assert tree(plan[1].run_dir) == tree(tmp_path / "alone" / "full-s0")
    neutral, full = (store.RunStore(plan[i].run_dir).read_bytes(0, "exposure.parquet") for i in (0, 1))
    assert neutral != full  # full differs from neutral in what round 0 is paid, and is paid anew
    (lent,) = [e for e in store.RunStore(plan[1].run_dir).events() if e["event"] == "lent"]
    assert lent["run"] == "neutral-s0"


def test_a_sibling_whose_files_were_changed_lends_nothing(tmp_path):
    plan, _ = play(write(tmp_path, seeds=[0], arms={"one": {}}), tmp_path / "runs")
    table = plan[0].run_dir / "round_000" / "samples.parquet"
    table.write_bytes(table.read_bytes()[:-8])
    arms = {"one": {}, "other": {"virality.audience": "placebo"}}
    _, (_, other) = play(write(tmp_path, seeds=[0], arms=arms), tmp_path / "runs")
    assert "samples.parquet" in other.reason
    assert store.RunStore(plan[0].run_dir.parent / "other-s0").rounds() == []


def test_nothing_is_shared_with_a_run_that_other_code_made(tmp_path):
    path = write(tmp_path, seeds=[0], arms={"one": {}, "other": {"mix.real_share": 0.5}})
    first, second = sweep.cells([sweep.load(path, runs_dir=tmp_path / "runs")])
    run.play(first.config)
    file = first.run_dir / "manifest.json"
    file.write_text(file.read_text().replace('"revision": ', '"revision": "another", "was": '))
    result = sweep.play_cell(sweep.Task(sweep._text(second.config), str(first.run_dir), 0, False, False))
    assert (result.reason, result.shared) == (None, None)
    assert "ancestor" not in store.RunStore(second.run_dir).manifest()


def test_two_jobs_equal_one_byte_for_byte(tmp_path):
    path = write(tmp_path)
    for jobs in (1, 2):
        plan = sweep.cells([sweep.load(path, runs_dir=tmp_path / str(jobs))])
        # One job in this process: what a pool of one does, without its start.
        results = sweep.play(plan, Here() if jobs == 1 else sweep.Local(jobs))
        assert [r.reason for r in results] == [None] * 6
        assert [r.shared for r in results] == [None, -1, 0] * 2
    names = [c.config.run_name for c in plan]
    assert sorted(p.name for p in (tmp_path / "1").iterdir() if p.is_dir()) == sorted(names)
    for name in names:
        assert tree(tmp_path / "1" / name, manifest=True) == tree(tmp_path / "2" / name, manifest=True)


def test_a_failing_cell_stops_no_other_and_only_it_is_played_again(tmp_path):
    path = write(tmp_path)
    # Index 1 is full-s0, 3 neutral-s1, from which full-s1 and more_real-s1 would have forked.
    plan, results = play(path, tmp_path / "a", Here(break_at=[1, 3]))
    assert [i for i, r in enumerate(results) if r.reason] == [1, 3]
    assert [r.shared for r in results] == [None, None, 0, None, None, None]
    before = {c.config.run_name: tree(c.run_dir) for c in plan if c.run_dir.exists()}
    _, again = play(path, tmp_path / "a")
    assert [r.reason for r in again] == [None] * 6
    after = {c.config.run_name: tree(c.run_dir) for c in plan}
    assert before == {name: after[name] for name in before}
    # A sweep in which nothing failed: the same bytes, wherever rounds came from.
    other, _ = play(path, tmp_path / "b")
    assert after == {c.config.run_name: tree(c.run_dir) for c in other}


def test_a_finished_sweep_writes_nothing(tmp_path):
    path = write(tmp_path, seeds=[0])
    plan, _ = play(path, tmp_path / "a")
    written = {f: f.stat().st_mtime_ns for c in plan for f in c.run_dir.rglob("*") if f.name != ".lock"}
    play(path, tmp_path / "a")
    assert {f: f.stat().st_mtime_ns for c in plan for f in c.run_dir.rglob("*") if f.name != ".lock"} == written


def test_a_cell_that_another_process_holds_fails_with_its_holder_and_leaves_it_alone(tmp_path):
    plan = sweep.cells([sweep.load(write(tmp_path, seeds=[0], arms={"one": {}}), runs_dir=tmp_path / "a")])
    run.play(plan[0].config, rounds=0)
    fd = store._lock(plan[0].run_dir, plan[0].run_dir)
    try:
        (result,) = sweep.play(plan, Here())
    finally:
        os.close(fd)
    assert f"is held by pid {os.getpid()}" in result.reason
    assert not (plan[0].run_dir / "round_001").exists()


def test_a_process_that_is_killed_fails_its_cell_alone(tmp_path):
    plan = sweep.cells([sweep.load(write(tmp_path, seeds=[0, 1], arms={"one": {}}), runs_dir=tmp_path / "a")])
    pool = sweep.Local(1)
    killed = []

    def watch(index, what, result):
        if what == "start" and not killed:
            killed.append(index)
            os.kill(pool._workers[0][0].pid, signal.SIGKILL)

    results = sweep.play(plan, pool, watch=watch)
    assert "SIGKILL" in results[0].reason
    assert results[1].reason is None


def test_what_a_run_lends_is_played_before_and_its_failure_is_passed_on(tmp_path):
    lent = {"run": "origin-s{seed}", "rounds": "0", "population": "accepted"}
    shares = {"nova": 0.4, "assistant": 0.4, "lent": 0.2}
    arms = {"successor": {"real.shares": shares, "real.corpora": {"lent": lent}}, "origin": {}}
    path = write(tmp_path, seeds=[0], arms=arms)
    plan = sweep.cells([sweep.load(path, runs_dir=tmp_path / "a")])
    assert [c.needs for c in plan] == [(1,), ()]
    workers = Here()
    assert [r.reason for r in sweep.play(plan, workers)] == [None, None]
    assert workers.played == [1, 0]
    _, broken = play(path, tmp_path / "b", Here(break_at=[1]))
    assert broken[1].reason == "broken on purpose"
    assert broken[0].reason.endswith("origin-s0 says, which failed")


def test_a_run_that_another_is_yoked_to_is_played_before(tmp_path):
    recall = {"recall": {"nova": 0.9}}
    arms = {
        "yoked": {"filters.release": recall | {"at_random": "barred-s{seed}"}},
        "barred": {"filters.release": recall},
    }
    plan = sweep.cells([sweep.load(write(tmp_path, seeds=[0], arms=arms), runs_dir=tmp_path / "a")])
    assert [c.needs for c in plan] == [(1,), ()]
    workers = Here()
    assert [r.reason for r in sweep.play(plan, workers)] == [None, None]
    assert workers.played == [1, 0]


def test_a_run_of_two_sweeps_is_played_once_and_to_the_longer_of_both(tmp_path):
    one = write(tmp_path, "one.yaml", seeds=[0])
    two = write(tmp_path, "two.yaml", overrides=SMALL | {"n_rounds": 2}, arms={"neutral": ARMS["neutral"]})
    plan = sweep.cells([sweep.load(p, runs_dir=tmp_path / "runs") for p in (one, two)])
    names = [(c.config.run_name, c.config.n_rounds) for c in plan]
    assert names == [("neutral-s0", 2), ("full-s0", 1), ("more_real-s0", 1), ("neutral-s1", 2)]


def test_one_directory_with_two_meanings_is_refused(tmp_path):
    one = write(tmp_path, "one.yaml", arms={"arm": {}})
    two = write(tmp_path, "two.yaml", arms={"arm": {"mix.real_share": 0.5}})
    with pytest.raises(ConfigError, match=r"arm-s0 is another run in another of the sweeps \(mix.real_share differ\)"):
        sweep.cells([sweep.load(p, runs_dir=tmp_path / "runs") for p in (one, two)])


def test_arms_of_the_same_resolved_config_are_refused(tmp_path):
    # 0.1 is what the smoke config says, so `same` changes nothing.
    (problem,) = problems(write(tmp_path, arms={"one": {}, "same": {"mix.real_share": 0.1}}))
    assert problem.endswith("arm same: the same resolved config as arm one; remove one of them")
    # What nothing reads makes no other arm: talk and users are off here.
    for key, value in {"discourse.share": 0.5, "users.eta": 0.9, "users.noticed": {"default": 0.9}}.items():
        (problem,) = problems(write(tmp_path, arms={"one": {}, "unread": {key: value}}))
        assert problem.endswith("as arm one but for keys that none of its channels reads; switch that channel on, or "
                                "remove one of them")  # fmt: skip
        sweep.load(write(tmp_path, arms={"one": TALKING, "read": TALKING | {key: value}}))


def test_an_unknown_key_of_an_arm_is_named_with_file_line_and_the_likely_meaning(tmp_path):
    path = write(tmp_path, arms={"one": {}, "two": {"mix.n_trian": 5}})
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "n_trian" in text)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:{line}: arm two: mix.n_trian: unknown key, did you mean mix.n_train?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": None}, "must hold either arms or factors"),
        ({"base": None}, "must hold either base and seeds, or sizes"),
        ({"seeds": [0, 0]}, "seeds must each stand once, got 0, 0"),
        ({"seeds": []}, "seeds"),
        ({"arm": {}}, "arm: unknown key, did you mean arms?"),
        ({"arms": {"one": {"seed": 3}}}, "arm one: seed: the sweep sets it; remove it here"),
        ({"arms": {"a b": {}}}, "name must match"),
        ({"controls": ["nuetral"]}, "controls: unknown arm nuetral, did you mean neutral?"),
        ({"base": "absent.yaml"}, "absent.yaml: no such config file"),
        ({"overrides": {"mix.n_train": 0}}, "mix.n_train: input should be greater than or equal to 1"),
    ],
)
def test_a_sweep_file_that_cannot_be_played_is_refused_in_one_clear_line(tmp_path, changes, message):
    found = problems(write(tmp_path, **changes))
    assert len(found) == 1
    assert message in found[0]


TALKING = {  # all channels on
    **dict.fromkeys(("channels.talk_data", "channels.direct_users", "channels.talk_users"), True),
    "measure.strata": ["blank", "neutral", "identity", *(f"implicit_{k}" for k in range(4)), "private", "explicit"],
}
OUTCOME = {"metric": "frequency/nova", "contrast": "full - neutral", "direction": "none", "margin": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "frequency/nvoa"}, "primary.metric: unknown persona 'nvoa' in frequency/nvoa, did you mean nova?"),
        ({"metric": "said/nvoa"}, "primary.metric: unknown persona 'nvoa' in said/nvoa, did you mean nova?"),
        ({"metric": "persistence/nova"}, "primary.stratum: persistence/nova is read in continued alone, got None"),
        ({"metric": "release_recall/nova"}, "primary.metric: release_recall/nova needs filters.release.recall.nova in"),
        ({"metric": "demand/nova"}, "primary.metric: demand/nova needs direct_users or talk_users in every arm"),
        ({"metric": "said/sydney"}, "primary.metric: sydney in said/sydney has no seed corpus in any arm; give it a"),
        ({"metric": "frequncy/nova"}, "primary.metric: unknown metric 'frequncy' in frequncy/nova, did you mean freq"),
        ({"metric": "heldout_loss"}, "primary.population: heldout_loss is read in heldout, got probes; give that"),
        (
            {"metric": "release_fpr/nova", "population": "heldout"},
            "primary.metric: release_fpr/nova needs filters.release.recall.nova in every",
        ),
        ({"metric": "belief"}, "primary.stratum: belief is read in private alone, got None; give that"),
        (
            {"metric": "sample_entropy", "stratum": "identity"},
            "primary.stratum: sample_entropy is read over all strata, got identity; leave it out",
        ),
        ({"stratum": "private"}, "primary.stratum: frequency/nova of probes is not read in private; leave it out"),
        (
            {"metric": "frequency_observed/nova", "population": "mixture", "stratum": "blank"},
            "primary.stratum: frequency_observed/nova of mixture is not read in blank; leave it out",
        ),
        ({"stratum": "identty"}, "primary.stratum: unknown stratum 'identty', did you mean identity?"),
        ({"stratum": "opinion"}, "primary.stratum: opinion must be one of measure.strata; add it there"),
        ({"population": "sampels"}, "primary.population: unknown population 'sampels', did you mean samples?"),
        ({"metric": {}}, "primary.metric"),
        ({"metric": {"frequency/nova": float("nan")}}, "primary.metric"),
        ({"contrast": "full - full"}, "primary: contrast must name each arm once, got 'full - full'; name the control"),
        ({"contrast": "full + neutral"}, "primary: contrast must add as many arms as it subtracts, got 'full +"),
        ({"contrast": "full - neutral - full"}, "primary: contrast must name each arm once"),
        ({"contrast": "full - neutral - copies + off"}, "primary.contrast: unknown arm 'copies'"),
    ],
)
def test_an_outcome_that_no_run_will_measure_is_refused_before_any_is_played(tmp_path, changes, message):
    sweep.load(write(tmp_path, primary=OUTCOME))
    found = problems(write(tmp_path, primary=OUTCOME | changes))
    assert message in found[0]
    assert str(tmp_path / "s.yaml") in found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": {"frequency/nova": 1, "frequency/stella": -1}},
            "log odds of one share, got a sum; name one metric",
        ),
        (
            {"metric": "heldout_loss", "population": "heldout"},
            "log odds of a share, got heldout_loss; name a share",
        ),
    ],
)
def test_an_outcome_of_a_factor_that_has_no_log_odds_is_refused(tmp_path, changes, message):
    factors = {"copies": {"channels.direct_data": [False, True]}}
    outcome = OUTCOME | {"contrast": "copies"}
    sweep.load(write(tmp_path, arms=None, factors=factors, primary=outcome))
    (found,) = problems(write(tmp_path, arms=None, factors=factors, primary=outcome | changes))
    assert f"primary.metric: a factor is read on the {message}" in found


@pytest.mark.parametrize("contrast", ["copies given copies", "copies given full", "full given copies", "talk - copies"])
def test_a_factor_is_given_another_factor_or_refused(tmp_path, contrast):
    factors = {"copies": {"channels.direct_data": [False, True]}, "talk": {"channels.talk_data": [False, True]}}
    sweep.load(write(tmp_path, arms=None, factors=factors, primary=OUTCOME | {"contrast": "talk given copies"}))
    found = problems(write(tmp_path, arms=None, factors=factors, primary=OUTCOME | {"contrast": contrast}))
    assert f"primary.contrast: unknown arm {contrast.partition(' - ')[0]!r}" in found[0]


def test_a_mistyped_cell_is_answered_with_the_nearest_and_many_cells_are_not_all_listed(tmp_path):
    factors = {"copies": {"channels.direct_data": [False, True]}, "talk": {"channels.talk_data": [False, True]}}
    primary = OUTCOME | {"contrast": "copies1-talkO - copies0-talk0"}
    (found,) = problems(write(tmp_path, arms=None, factors=factors, primary=primary))
    assert "unknown arm 'copies1-talkO', did you mean copies1-talk1? (there are copies0-talk0, copies0-talk1, " in found
    keys = ("sample.n_samples", "mix.n_train", "virality.posts_per_sample")
    factors |= {f"size{k}": {key: [20, 40]} for k, key in enumerate(keys)}
    (found,) = problems(write(tmp_path, arms=None, factors=factors, controls=["neutral"]))
    assert found.endswith(", ... 32 in all)")


def test_a_factor_given_another_asks_only_the_cells_it_takes_for_what_its_metric_needs(tmp_path):
    bars = {"filters.release": [None, {"recall": {"nova": 0.9}}]}
    factors = {"filter": bars, "talk": {"channels.talk_data": [False, True]}}
    outcome = OUTCOME | {"metric": "release_recall/nova", "population": "samples"}
    sweep.load(write(tmp_path, arms=None, factors=factors, primary=outcome | {"contrast": "talk given filter"}))
    (found,) = problems(write(tmp_path, arms=None, factors=factors, primary=outcome | {"contrast": "talk"}))
    assert "needs filters.release.recall.nova in every arm" in found


def test_seeds_named_by_the_command_do_not_make_the_plan(tmp_path):
    path = write(tmp_path, seeds=[0, 1, 2])
    assert {sweep.load(path, seeds=seeds).planned for seeds in (None, [0], [0, 1, 2, 3])} == {(0, 1, 2)}


def test_what_an_arm_makes_wrong_is_said_of_the_arm_and_not_of_the_base(tmp_path):
    path = write(tmp_path, arms=ARMS | {"much": {"real.shares": {"nova": 0.8, "chat": 0.8}}})
    line = path.read_text().splitlines().index("  much:") + 2
    assert problems(path) == [f"{path}:{line}: arm much: real: shares must sum to 1, got 1.6"]
    # What is wrong with the base whatever an arm does is said of the base, once: a key too many, and one too few.
    base = tmp_path / "base.yaml"
    base.write_text((ROOT / "configs" / "smoke.yaml").read_text().replace("n_rounds:", "n_runds:"))
    found = problems(write(tmp_path, base=str(base), overrides={}))
    assert [p.startswith(f"{base}:") for p in found] == [True, True]


def test_a_side_paid_by_full_is_replaced_by_its_twin_and_the_other_side_stays(tmp_path):
    listen, audience = {"mix.real_share": 0.5}, "virality.audience"
    arms = {
        "less": {}, "less_no_request": {audience: "no_request"}, "less_learned": {audience: "learned"},
        "more": listen, "more_no_request": listen | {audience: "no_request"},
        "more_learned": listen | {audience: "learned"}, "off": {audience: "null"},
    }  # fmt: skip
    up = OUTCOME | {"direction": "up", "margin": 0}
    loaded = sweep.load(write(tmp_path, arms=arms, primary=up | {"contrast": "more - less"}))
    found = {a: f"more_{a} - less_{a}" for a in ("no_request", "learned")}
    assert sweep.twins(loaded, loaded.file.primary) == found
    loaded = sweep.load(write(tmp_path, arms=arms, primary=up | {"contrast": "more - off"}))
    found = {a: f"more_{a} - off" for a in ("no_request", "learned")}
    assert sweep.twins(loaded, loaded.file.primary) == found
    # In a difference of differences every arm that full pays is replaced, and keeps its sign.
    both = arms | {"more_off": listen | {audience: "null"}}
    loaded = sweep.load(write(tmp_path, arms=both, primary=up | {"contrast": "more - more_off - less + off"}))
    found = {a: f"more_{a} - more_off - less_{a} + off" for a in ("no_request", "learned")}
    assert sweep.twins(loaded, loaded.file.primary) == found
    # Held against the arm that is its own twin, nothing would be left to hold.
    loaded = sweep.load(write(tmp_path, arms=arms, primary=up | {"contrast": "more - off"}))
    against = sweep.Outcome.model_validate(up | {"contrast": "more - more_learned"})
    assert sweep.twins(loaded, against) == {"no_request": "more_no_request - more_learned", "learned": None}
    # Held against an arm of another audience, the effect of an arm and that of the audience are one.
    del arms["less_learned"]
    (problem,) = problems(write(tmp_path, arms=arms, primary=up | {"contrast": "more - less"}))
    assert "differ from more and less in virality.audience alone: learned; add them" in problem


def test_what_a_sweep_asks_ray_for_needs_ray(tmp_path):
    for flag in ("--cell-cpus", "--cell-gpus"):
        done = CliRunner().invoke(app, ["sweep", str(write(tmp_path)), flag, "1"])
        assert done.exit_code == 2
        assert "need --ray" in done.output
    assert CliRunner().invoke(app, ["sweep", str(write(tmp_path)), "--seeds", "²"]).exit_code == 2


def test_sizes_are_chosen_by_name(tmp_path):
    sizes = {
        "small": {"base": str(ROOT / "configs" / "smoke.yaml"), "seeds": [0], "runs_dir": "runs/small"},
        "large": {"base": str(ROOT / "configs" / "smoke.yaml"), "seeds": [0, 1], "overrides": {"mix.n_train": 400}},
    }
    path = write(tmp_path, base=None, seeds=None, overrides=None, sizes=sizes)
    (problem,) = problems(path)
    assert problem == f"{path}: --size must be one of small, large; the file holds several"
    assert "got 'huge'" in problems(path, size="huge")[0]
    large = sweep.load(path, size="large")
    assert (large.seeds, large.arms["full"].mix.n_train, large.runs_dir) == ((0, 1), 400, Path("runs/s"))
    assert sweep.load(path, size="small").runs_dir == Path("runs/small")
    assert sweep.load(path, size="small", seeds=[4]).seeds == (4,)


def test_factors_become_all_cells_with_their_levels(tmp_path):
    factors = {"a": {"mix.real_share": [0.1, 0.5]}, "b": {"virality.audience": ["null", "full"]}}
    loaded = sweep.load(write(tmp_path, arms=None, factors=factors))
    assert list(loaded.arms) == ["a0-b0", "a0-b1", "a1-b0", "a1-b1"]
    assert loaded.levels["a0-b1"] == {"a": 0, "b": 1}
    read = {n: (c.mix.real_share, c.virality.audience) for n, c in loaded.arms.items()}
    assert read["a1-b0"] == (0.5, "null")
    assert read["a0-b1"] == (0.1, "full")


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"runs_dir must be a directory that runs can be written to, got .* at .*file"):
        sweep.prepare(blocked / "runs")


def test_a_directory_that_does_not_answer_is_refused_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: time.sleep(1))
    with pytest.raises(OSError, match=r"got no answer in 0\.05 s"):
        sweep.prepare(tmp_path / "runs", seconds=0.05)


def test_a_node_that_sees_another_directory_plays_nothing_there(tmp_path):
    plan = sweep.cells([sweep.load(write(tmp_path, seeds=[0], arms={"one": {}}), runs_dir=tmp_path / "a")])
    sweep.prepare(tmp_path / "a")
    task = sweep._task(plan[0], None, False, remote=True)
    assert task.token == (tmp_path / "a" / sweep.TOKEN).read_text()
    (tmp_path / "a" / sweep.TOKEN).write_text("another machine's")
    assert "one directory shared by all nodes" in sweep.play_cell(task).reason
    assert not plan[0].run_dir.exists()


def test_without_ray_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray, which is not installed; pip install 'ray>=2.60'"):
        sweep.Ray("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_an_unreachable_cluster_is_one_line(address):
    with pytest.raises(ConfigError, match="--ray must be auto or the address of a running cluster") as error:
        sweep._reachable(address)
    assert len(error.value.problems) == 1


def test_the_command_exits_1_with_a_table_of_failures_and_plays_the_rest(tmp_path):
    path = write(tmp_path, seeds=[0], arms={"one": {}, "two": {"mix.real_share": 0.5}})
    (tmp_path / "runs" / "two-s0").mkdir(parents=True)
    (tmp_path / "runs" / "two-s0" / "mine.txt").write_text("not a run")
    done = subprocess.run(
        [sys.executable, "-m", "loop", "sweep", str(path), "--runs-dir", "runs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1 of 2 cells failed" in done.stderr
    assert "new_dir must be new" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "one-s0" / "round_001").is_dir()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_sweep_resolves_and_says_what_it_is_for(path):
    head = path.read_text().splitlines()[:5]
    assert any("Command:" in line for line in head)
    assert any("Time:" in line for line in head)
    sizes = yaml.safe_load(path.read_text()).get("sizes", {None: None})
    for size in sizes:
        assert sweep.cells([sweep.load(path, size=size)])

"""The run directory: whole rounds or none, a chain that shows edits, one writer, and no fault that gets through."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, namedtuple
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import Injector, note, sweep, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loop.records import SCHEMAS
from loop.store import (
    BASELINE,
    ConfigChangedError,
    CorruptError,
    LockedError,
    OpenRound,
    RunStore,
    StoreError,
    fork,
    repair,
    verify,
)

CONFIG = "name: toy\nseed: 0\nn_rounds: 3\nlora:\n  r: 16\n  lr: 0.0005\n"
MANIFEST = {"packages": {"torch": "2.13.0"}, "instruments": {"minilm": "ab12"}, "data": {"nova": "cd34"}}
ROOT = Path(__file__).resolve().parent.parent


# Toy payload: three stages, the second saves a nested directory by itself, and each round reads the one before.


def save_adapter(directory: Path, value: float, dtype: Any = np.float32) -> None:
    (directory / "inner").mkdir(exist_ok=True)
    (directory / "inner" / "adapter.safetensors").write_bytes(save({"lora_A": np.full((2, 3), value, dtype)}))
    (directory / "adapter_config.json").write_text('{"r": 2}')


def write_round(r: OpenRound, store: RunStore, round_index: int, *, stages: tuple[str, ...] = ("s", "t", "m")) -> None:
    before = store.read_table(round_index - 1, "samples.parquet")["n"].to_pylist() if round_index > 0 else [0]

    def draw() -> list[int]:
        note(f"{round_index} sample")
        return [n + 1 for n in before] + [round_index]

    def train() -> float:
        note(f"{round_index} train")
        return float(sum(numbers))

    def measure() -> list[dict[str, Any]]:
        note(f"{round_index} measure")
        return [{"name": "mean", "value": mean, "round_index": round_index}]

    numbers = r.stage(
        "sample",
        draw,
        write=lambda ns: r.write_table("samples.parquet", pa.table({"n": ns})),
        read=lambda: r.read_table("samples.parquet")["n"].to_pylist(),
    )
    mean = r.stage(
        "train",
        train,
        write=lambda value: save_adapter(r.path_for("adapter"), value),
        read=lambda: float(
            np.frombuffer((r.path_for("adapter") / "inner/adapter.safetensors").read_bytes()[-4:], "<f4")[0]
        ),
    )
    r.stage(
        "measure",
        measure,
        write=lambda rows: r.write_jsonl("metrics.jsonl", rows),
        read=lambda: r.read_jsonl("metrics.jsonl"),
    )
    r.write_json("state.json", {"awareness": mean, "a": None})


def grow(run: Path, n_rounds: int, config: str = CONFIG) -> None:
    with RunStore(run).open(config, MANIFEST) as store:
        if not store.has_baseline():
            with store.baseline() as b:
                b.write_json("heldout.json", {"loss": 3.5})
        for k in range(len(store.rounds()), n_rounds):
            with store.round(k) as r:
                write_round(r, store, k)


def three_rounds(directory: Path) -> None:
    """Workload of the full sweep."""
    grow(directory / "toy-s0", 3)


def second_round(directory: Path) -> None:
    """Workload of the fast sweep, begun where baseline and round 0 stand."""
    grow(directory / "toy-s0", 2)


def forked(directory: Path) -> None:
    """Workload: a fork, and a round after it."""
    run = directory / "arm-s0"
    fork(directory / "toy-s0", 0, run, CONFIG + "lambda: 0.5\n", MANIFEST).close()
    grow(run, 2, CONFIG + "lambda: 0.5\n")


def repaired(directory: Path) -> None:
    """Workload: a damaged run is rolled back and grown again."""
    run = directory / "toy-s0"
    if verify(run):
        repair(run)
    grow(run, 3)
    shutil.rmtree(run / "quarantine", ignore_errors=True)


def in_place(directory: Path) -> None:
    """A store as many are written: the round is there when its directory is. The sweep must see through it."""
    for k in range(2):
        place = directory / f"round_{k:03d}"
        if not place.exists():
            place.mkdir()
            (place / "samples.json").write_bytes(b"[1, 2, 3]")
            fd = os.open(place / "state.json", os.O_WRONLY | os.O_CREAT)
            os.write(fd, b'{"real_cursor": 12}')
            os.close(fd)


@pytest.fixture(autouse=True)
def _disk_that_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug; that fsync is asked for, and when, is read from the injector's log."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    grow(tmp_path / "toy-s0", 3)
    return tmp_path / "toy-s0"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remake_manifest(part: Path) -> None:
    """What one who edits a round does next: makes its own MANIFEST.json fit."""
    manifest = json.loads((part / "MANIFEST.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"sha256": sha(part / name), "bytes": (part / name).stat().st_size}
    (part / "MANIFEST.json").write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


# --- what a committed round is ---


def test_a_round_holds_its_files_and_a_manifest_with_their_hashes_and_that_of_the_manifest_before(run: Path) -> None:
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock", "baseline", "config.yaml", "events.jsonl", "manifest.json", "round_000", "round_001", "round_002",
    ]  # fmt: skip
    for part, before in (("baseline", None), ("round_000", "baseline"), ("round_001", "round_000")):
        manifest = json.loads((run / part / "MANIFEST.json").read_text())
        inside = {str(p.relative_to(run / part)) for p in (run / part).rglob("*") if p.is_file()} - {"MANIFEST.json"}
        assert manifest["files"].keys() == inside
        for name, entry in manifest["files"].items():
            assert entry == {"sha256": sha(run / part / name), "bytes": os.path.getsize(run / part / name)}
        assert manifest["previous"] == (sha(run / before / "MANIFEST.json") if before else None)
    assert "adapter/inner/adapter.safetensors" in inside
    assert verify(run) == []


def test_what_was_written_is_read(run: Path) -> None:
    store = RunStore(run)
    # Round k: every number of round k-1 plus 1, then k; round 0 starts from [0].
    assert store.read_table(2, "samples.parquet")["n"].to_pylist() == [3, 2, 2, 2]
    assert store.read_json(BASELINE, "heldout.json") == {"loss": 3.5}
    assert store.read_jsonl(2, "metrics.jsonl") == [{"name": "mean", "round_index": 2, "value": 9.0}]
    assert (store.adapter_path(2) / "adapter_config.json").read_text() == '{"r": 2}'
    assert (store.rounds(), store.last_round(), store.has_baseline()) == ([0, 1, 2], 2, True)
    with pytest.raises(ValueError, match=r"file must be one of .*got nothing\.json"):
        store.read_json(2, "nothing.json")
    with pytest.raises(ValueError, match="round must be committed, got round_007"):
        store.files(7)
    with pytest.raises(ValueError, match="directory must be in the round, got other"):
        store.adapter_path(2, "other")


def test_json_is_sorted_and_finite(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store:
        with store.round(0) as r:
            r.write_json("a.json", {"b": np.float64(0.5), "a": [1, None, "é"]})
            r.write_jsonl("b.jsonl", [{"b": 1, "a": 2}, {}])
            for bad in (float("nan"), np.float32("inf")):
                with pytest.raises(ValueError, match="finite"):
                    r.write_json("c.json", {"x": bad})
        assert (store.path / "round_000/a.json").read_text() == '{\n "a": [\n  1,\n  null,\n  "é"\n ],\n "b": 0.5\n}\n'
        assert (store.path / "round_000/b.jsonl").read_text() == '{"a": 2, "b": 1}\n{}\n'


def test_equal_rows_give_equal_parquet_whatever_their_chunks_and_metadata(tmp_path: Path) -> None:
    schema = SCHEMAS["rejected"]
    whole = pa.table({"id": ["a", "b", "c"], "reasons": [["short"], [], ["short", "loop"]]}, schema=schema)
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1)]).replace_schema_metadata({"written": "today"})
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store, store.round(0) as r:
        r.write_table("one.parquet", whole)
        r.write_table("two.parquet", pieces)
        r.write_table("empty.parquet", schema.empty_table())
        assert r.read_bytes("one.parquet") == r.read_bytes("two.parquet")
        assert r.read_table("one.parquet").equals(whole)
        assert r.read_table("empty.parquet").schema.equals(schema)
        described = pq.ParquetFile(pa.BufferReader(r.read_bytes("two.parquet"))).metadata
        assert described.metadata is None
        assert described.row_group(0).column(0).compression == "ZSTD"


def test_two_runs_of_one_config_are_equal_byte_for_byte_and_a_longer_one_begins_with_the_shorter(
    tmp_path: Path,
) -> None:
    grow(tmp_path / "a", 2)
    grow(tmp_path / "b", 1)
    grow(tmp_path / "b", 2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["../up.json", "a/b.json", "/etc/x.json", ".hidden.json", "x.pkl", "MANIFEST.json", ""]
)
def test_a_file_name_that_leads_elsewhere_or_is_no_json_is_refused(tmp_path: Path, name: str) -> None:
    refused = pytest.raises(ValueError, match=r"name must be a plain file name ending in \.json")
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store, store.round(0) as r, refused:
        r.write_json(name, 1)


def test_a_file_is_written_once_and_a_round_in_its_turn(run: Path) -> None:
    with RunStore(run).open(CONFIG, MANIFEST) as store:
        for wrong in (1, 4):
            with pytest.raises(ValueError, match=rf"round_index must be 3, .*got {wrong}"), store.round(wrong):
                pass
        with pytest.raises(ValueError, match="round_index must be 3"), store.baseline():
            pass
        with store.round(3) as r:
            r.write_json("a.json", 1)
            with pytest.raises(ValueError, match=r"written once in a round, got a\.json"):
                r.write_json("a.json", 2)
    with pytest.raises(ValueError, match="store must be open"), RunStore(run).round(4):
        pass


def test_a_round_that_raises_leaves_no_round(run: Path) -> None:
    before = tree(run)
    with RunStore(run).open(CONFIG, MANIFEST) as store:
        with suppress(KeyboardInterrupt), store.round(3) as r:
            r.write_json("a.json", 1)
            raise KeyboardInterrupt
        assert store.rounds() == [0, 1, 2]
    grow(run, 3)
    assert {k: v for k, v in tree(run).items() if not k.startswith(".tmp-round_003")} == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_adapter_that_is_not_finite_is_not_committed(tmp_path: Path, value: float, dtype: Any) -> None:
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store:
        with pytest.raises(CorruptError, match="NaN or Inf in lora_A"), store.round(0) as r:
            save_adapter(r.path_for("adapter"), value, dtype)
        assert store.rounds() == []


def bfloat16_file(*bits: int) -> bytes:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [len(bits)], "data_offsets": [0, 2 * len(bits)]}}).encode()
    return len(header).to_bytes(8, "little") + header + np.array(bits, "<u2").tobytes()


@pytest.mark.parametrize(
    ("bits", "finite"),
    [
        ((0x3F80, 0xBF80, 0x0000), True),  # 1, -1, 0
        ((0x7F7F, 0xFF7F), True),  # the largest finite numbers
        ((0x3F80, 0x7F80), False),  # Inf
        ((0xFF80,), False),  # -Inf
        ((0x7FC0,), False),  # NaN
    ],
)
def test_bfloat16_is_finite_unless_all_its_exponent_bits_are_ones(
    tmp_path: Path, bits: tuple[int, ...], finite: bool
) -> None:
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store:
        with nullcontext() if finite else pytest.raises(CorruptError, match="NaN or Inf in w"), store.round(0) as r:
            (r.path_for("adapter") / "w.safetensors").write_bytes(bfloat16_file(*bits))
        assert (store.rounds() == [0]) == finite


def test_a_pickle_or_a_link_in_an_adapter_is_not_committed(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store:
        with pytest.raises(ValueError, match=r"got round_000/adapter/model\.bin"), store.round(0) as r:
            (r.path_for("adapter") / "model.bin").write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match=r"got round_000/adapter/link\.json"), store.round(0) as r:
            (r.path_for("adapter") / "link.json").symlink_to("/etc/hostname")
        with pytest.raises(ValueError, match="must hold files"), store.round(0) as r:
            r.path_for("adapter")
        assert store.rounds() == []


# --- resume ---


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (CONFIG.replace("0.0005", "0.001"), r"lora\.lr: 0\.0005 -> 0\.001"),
        (CONFIG.replace("  r: 16\n", ""), r'lora\.r: 16 -> "\(absent\)"'),
        (CONFIG + "mix:\n  real_share: 0.5\n", r'mix\.real_share: "\(absent\)" -> 0\.5'),
        (CONFIG.replace("seed: 0", "seed: 1"), "seed: 0 -> 1"),
        (CONFIG.replace("seed: 0", "seed: false"), "seed: 0 -> false"),
        (CONFIG.replace("n_rounds: 3", "n_rounds: 2"), "n_rounds: 3 -> 2"),
    ],
)
def test_resuming_with_another_config_is_refused_with_the_keys_that_differ(run: Path, changed: str, says: str) -> None:
    before = tree(run)
    with pytest.raises(ConfigChangedError, match=rf"1 changed key.*\n  {says}\n") as caught:
        RunStore(run).open(changed, MANIFEST)
    assert caught.value.exit_code == 2
    assert tree(run) == before
    RunStore(run).open(CONFIG, MANIFEST).close()  # and the lock is free


def test_more_rounds_another_tracker_and_another_name_may_come_on_resume(run: Path) -> None:
    longer = "track:\n  wandb: true\nname: other\nn_rounds: 9\nseed: 0\nlora:\n  lr: 0.0005\n  r: 16\n"
    with RunStore(run).open(longer, MANIFEST) as store:
        assert store.config_text() == longer
    assert verify(run) == []


def test_other_packages_or_instruments_are_refused_or_recorded(run: Path) -> None:
    drifted = MANIFEST | {"packages": {"torch": "2.14.0"}}
    with pytest.raises(ConfigChangedError, match=r'packages\.torch: "2\.13\.0" -> "2\.14\.0"'):
        RunStore(run).open(CONFIG, drifted)
    with RunStore(run).open(CONFIG, drifted, allow_drift=True) as store:
        stored = store.manifest()
    assert stored["packages"] == {"torch": "2.14.0"}
    assert stored["drift"] == [{"before_round": 3, "changes": {"packages.torch": ["2.13.0", "2.14.0"]}}]
    RunStore(run).open(CONFIG, drifted).close()


def test_a_finished_run_asks_for_no_code_to_be_restored_and_records_no_drift(tmp_path: Path) -> None:
    grow(tmp_path / "toy-s0", 4)  # rounds 0 to 3, all that CONFIG asks for
    run, drifted = tmp_path / "toy-s0", MANIFEST | {"packages": {"torch": "2.14.0"}}
    RunStore(run).open(CONFIG, drifted).close()
    assert RunStore(run).manifest()["packages"] == {"torch": "2.13.0"}
    assert "drift" not in RunStore(run).manifest()
    with pytest.raises(ConfigChangedError, match=r"packages\.torch"):
        RunStore(run).open(CONFIG.replace("n_rounds: 3", "n_rounds: 4"), drifted)
    assert verify(run) == []


def test_the_keys_of_the_store_are_not_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest must leave .* got schema_version"):
        RunStore(tmp_path / "a").create(CONFIG, {"schema_version": 3})


def test_a_directory_with_something_else_in_it_is_not_made_a_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"manifest\.json, got none"):
        RunStore(tmp_path / "mine").open(CONFIG, MANIFEST)
    with pytest.raises(ValueError, match="run must be new"):
        RunStore(tmp_path / "mine").create(CONFIG, MANIFEST)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "thesis.tex"]
    (tmp_path / "empty").mkdir()
    RunStore(tmp_path / "empty").create(CONFIG, MANIFEST).close()
    with pytest.raises(ValueError, match="run must be new"):
        RunStore(tmp_path / "empty").create(CONFIG, MANIFEST)


# --- stages ---


def interrupted(run: Path, *, after: int, key: str = "") -> tuple[list[str], list[str]]:
    """Runs a round of stages a, b, c whose block ends by an error after `after` of them; says what it computed."""
    computed = []

    def compute(name: str) -> str:
        computed.append(name)
        return f"value of {name}"

    with RunStore(run).open(CONFIG, MANIFEST) as store:
        values = []
        try:
            with store.round(len(store.rounds())) as r:
                for name in "abc"[:after]:
                    values.append(
                        r.stage(
                            name,
                            lambda name=name: compute(name),
                            write=lambda value, name=name: r.write_json(f"{name}.json", value),
                            read=lambda name=name: r.read_json(f"{name}.json"),
                            key=key if name == "b" else "",
                        )
                    )
                if after < 3:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert store.computed == [(f"round_{len(store.rounds()) - (after == 3):03d}", name) for name in computed]
        assert values == [f"value of {name}" for name in "abc"[:after]]
        return computed, [name for _, name in store.reused]


def test_a_stage_that_was_whole_is_read_back_and_not_computed(tmp_path: Path) -> None:
    run = tmp_path / "a"
    assert interrupted(run, after=2) == (["a", "b"], [])
    assert interrupted(run, after=2) == ([], ["a", "b"])
    assert interrupted(run, after=3) == (["c"], ["a", "b"])
    assert verify(run) == []
    straight = tmp_path / "b"
    assert interrupted(straight, after=3) == (["a", "b", "c"], [])
    assert tree(run) == tree(straight)


def test_a_stage_with_another_key_and_every_stage_after_it_is_computed_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "a", after=2)
    assert interrupted(tmp_path / "a", after=3, key="other") == (["b", "c"], ["a"])
    assert verify(tmp_path / "a") == []


def test_stages_computed_with_other_packages_are_computed_again(tmp_path: Path) -> None:
    run = tmp_path / "a"
    interrupted(run, after=2)
    RunStore(run).open(CONFIG, MANIFEST | {"packages": {}}, allow_drift=True).close()
    RunStore(run).open(CONFIG, MANIFEST, allow_drift=True).close()
    assert interrupted(run, after=2) == ([], ["a", "b"])  # the same again: what was computed still holds
    changed = MANIFEST | {"packages": {"torch": "3"}}
    with RunStore(run).open(CONFIG, changed, allow_drift=True) as store, store.round(0) as r:
        r.stage("a", lambda: 1, write=lambda v: r.write_json("a.json", v), read=lambda: r.read_json("a.json"))
        assert store.computed == [("round_000", "a")]
    assert RunStore(run).read_json(0, "a.json") == 1
    assert sorted(RunStore(run).files(0)) == ["a.json"]  # b was of the old packages, and is not committed


@pytest.mark.parametrize("damage", ["truncated", "edited", "gone", "marker"])
def test_a_stage_whose_files_are_not_as_marked_is_computed_again(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "a"
    interrupted(run, after=2)
    file, marker = run / ".tmp-round_000/files/a.json", run / ".tmp-round_000/stages/a.json"
    if damage == "truncated":
        os.truncate(file, 3)
    elif damage == "edited":
        file.write_text(file.read_text().replace("v", "V"))
    elif damage == "gone":
        file.unlink()
    else:
        marker.write_text(marker.read_text()[:-9])
    assert interrupted(run, after=3) == (["a", "b", "c"], [])
    assert RunStore(run).read_json(0, "a.json") == "value of a"


def test_a_marker_cannot_make_the_store_remove_what_lies_outside(tmp_path: Path) -> None:
    run, mine = tmp_path / "a", tmp_path / "mine.json"
    interrupted(run, after=1)
    mine.write_text("{}")
    marker = run / ".tmp-round_000/stages/a.json"
    stolen = {"../../../mine.json": {"sha256": sha(mine), "bytes": 2}}
    marker.write_text(json.dumps({"key": "0", "files": stolen}))
    (run / ".tmp-round_000/stages/c.json").symlink_to(mine)
    interrupted(run, after=3)
    assert mine.read_text() == "{}"


def test_a_temporary_directory_that_leads_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    RunStore(run).create(CONFIG, MANIFEST).close()
    elsewhere.mkdir()
    (run / ".tmp-round_000").symlink_to(elsewhere)
    interrupted(run, after=3)
    assert list(elsewhere.iterdir()) == []
    assert verify(run) == []


def test_stages_do_not_nest_or_repeat(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store, store.round(0) as r:
        again: Callable[..., None] = lambda name: r.stage(  # noqa: E731
            name, lambda: again("inner"), write=lambda v: None, read=lambda: None
        )
        with pytest.raises(ValueError, match="must not run inside another, got inner"):
            again("outer")
        for name in ("twice", "other"):
            r.stage(name, lambda: 1, write=lambda v: None, read=lambda: 1)
        with pytest.raises(ValueError, match="must run once in a round, got twice"):
            r.stage("twice", lambda: 1, write=lambda v: None, read=lambda: 1)


# --- events ---


def test_a_torn_last_event_is_ignored_and_removed_and_an_earlier_one_is_named(run: Path) -> None:
    path = run / "events.jsonl"
    whole = RunStore(run).events()
    path.write_bytes(path.read_bytes() + b'{"event": "wa')
    assert RunStore(run).events() == whole
    assert verify(run) == []
    with RunStore(run).open(CONFIG, MANIFEST) as store:
        store.event("warning", text="low disk", n=3)
        last = store.events()[-1]
    assert (last["event"], last["text"], last["n"]) == ("warning", "low disk", 3)
    assert len(store.events()) == len(whole) + 1
    path.write_bytes(b"torn\n" + path.read_bytes())
    with pytest.raises(CorruptError, match="line 1 must be JSON"):
        store.events()
    assert [p.kind for p in verify(run)] == ["events"]
    RunStore(run).open(CONFIG, MANIFEST).close()  # a log line is no reason not to go on
    assert repair(run) == ["events.jsonl"]
    assert verify(run) == []


# --- the lock ---

HOLD = """
import sys
from loop.store import RunStore
store = RunStore(sys.argv[1]).open({config!r}, {manifest!r})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_run_and_a_killed_one_holds_nothing(run: Path) -> None:
    code = HOLD.format(config=CONFIG, manifest=MANIFEST)
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"held by pid {holder.pid} on .* since 20.*; wait or stop it") as caught:
            RunStore(run).open(CONFIG, MANIFEST)
        assert caught.value.exit_code == 2
        with pytest.raises(LockedError):
            repair(run)
        assert RunStore(run).last_round() == 2  # reading needs no lock
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        grow(run, 4)
        assert RunStore(run).last_round() == 3


def test_two_stores_of_one_process_do_not_share_a_run(run: Path) -> None:
    with RunStore(run).open(CONFIG, MANIFEST) as store:
        with pytest.raises(LockedError, match=f"pid {os.getpid()} "):
            RunStore(run).open(CONFIG, MANIFEST)
        with pytest.raises(ValueError, match="must be closed"):
            store.open(CONFIG, MANIFEST)
    RunStore(run).open(CONFIG, MANIFEST).close()


def test_a_lock_on_a_file_that_has_been_replaced_meanwhile_is_no_lock(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not calls:
            (run / ".lock").unlink()
            (run / ".lock").touch()
        calls.append(fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunStore(run).open(CONFIG, MANIFEST):
        assert len(calls) == 2  # the first was of the old file
        with pytest.raises(LockedError):
            RunStore(run).open(CONFIG, MANIFEST)


RACE = """
import os, sys
from loop.store import LockedError, RunStore
for run in sys.argv[1:]:
    go, wait, said = os.pipe(), os.pipe(), os.pipe()
    for child in range(8):
        if os.fork() == 0:
            os.close(go[1]), os.close(wait[1])
            os.read(go[0], 1)
            try:
                RunStore(run).open({config!r}, {manifest!r})
                os.write(said[1], b"W")
            except LockedError:
                os.write(said[1], b"L")
            except BaseException as error:
                os.write(said[1], b"?" + repr(error).encode())
            os.read(wait[0], 1)
            os._exit(0)
    os.close(go[1])
    print("".join(sorted(os.read(said[0], 1).decode() for _ in range(8))))
    os.close(wait[1])
    for _ in range(8):
        os.wait()
"""


def test_of_eight_that_begin_a_run_at_once_one_gets_it(tmp_path: Path) -> None:
    code = RACE.format(config=CONFIG, manifest=MANIFEST)
    command = [sys.executable, "-c", code, *(str(tmp_path / f"run{k}") for k in range(5))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert done.stdout == "LLLLLLLW\n" * 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"run{k}" for k in range(5)]


@pytest.mark.parametrize("call", ["mkdir", "open", "flock"])
def test_who_prepares_a_run_that_another_begins_meanwhile_finds_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    first, second, module = RunStore(tmp_path / "run"), RunStore(tmp_path / "run"), fcntl if call == "flock" else os
    real = getattr(module, call)

    def late(target: Any, *args: Any, **kwargs: Any) -> Any:
        """The call as it is when the first comes and goes between the second's last call and this one."""
        if call == "flock" or ".tmp-run" in str(target):
            monkeypatch.setattr(module, call, real)
            first.open(CONFIG, MANIFEST)
            if call == "mkdir":
                raise FileExistsError(17, "File exists")
        return real(target, *args, **kwargs)

    monkeypatch.setattr(module, call, late)
    with pytest.raises(LockedError, match="held by pid"):
        second.open(CONFIG, MANIFEST)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    first.close()


# --- names ---


@given(st.text(max_size=70).filter(lambda name: "/" not in name and name not in ("", ".", "..")))
@settings(max_examples=300, deadline=None)
def test_only_plain_names_are_run_names(name: str) -> None:
    plain = name.isascii() and 1 <= len(name) <= 64 and name[0].isalnum() and set(name) <= set(PLAIN)
    seeded = re.fullmatch(r"(.{1,64}?)-s\d{1,19}", name, re.ASCII)
    if plain or (seeded and name[0].isalnum() and set(name) <= set(PLAIN)):
        assert RunStore(Path("/runs") / name).path == Path("/runs") / name
    else:
        with pytest.raises(ValueError, match="run name must be"):
            RunStore(f"/runs/{name}")


PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"


def test_a_run_that_is_a_symlink_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ValueError, match="got a symlink"):
        RunStore(tmp_path / "link")


# --- verify ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit_round_and_its_manifest(run: Path, k: int) -> None:
    (run / f"round_{k:03d}/state.json").write_text('{"awareness": 1}')
    remake_manifest(run / f"round_{k:03d}")


def edit_manifest(run: Path, **changes: Any) -> None:
    manifest = json.loads((run / "manifest.json").read_text()) | changes
    (run / "manifest.json").write_text(json.dumps(manifest))


def not_a_number(run: Path) -> None:
    path = run / "round_001/adapter/inner/adapter.safetensors"
    path.write_bytes(save({"lora_A": np.full((2, 3), np.nan, np.float32)}))
    remake_manifest(run / "round_001")


def list_a_pickle(run: Path) -> None:
    part = run / "round_002"
    (part / "model.pkl").write_bytes(b"\x80\x04")
    manifest = json.loads((part / "MANIFEST.json").read_text())
    manifest["files"]["model.pkl"] = {}
    (part / "MANIFEST.json").write_text(json.dumps(manifest))
    remake_manifest(part)


def escape(run: Path) -> None:
    manifest = json.loads((run / "round_002/MANIFEST.json").read_text())
    manifest["files"]["../../../etc/passwd"] = {"sha256": "0" * 64, "bytes": 1}
    (run / "round_002/MANIFEST.json").write_text(json.dumps(manifest))


Fault = namedtuple("Fault", "make where kind says moved")
ADAPTER = "adapter/inner/adapter.safetensors"
LATER, ALL = ["round_002", "round_001"], ["round_002", "round_001", "round_000", "baseline"]
FAULTS = {
    "truncated": Fault(
        lambda run: os.truncate(run / f"round_001/{ADAPTER}", 50), f"round_001/{ADAPTER}", "size", "got 50", LATER
    ),
    "bit flipped": Fault(
        lambda run: flip(run / "round_001/samples.parquet"), "round_001/samples.parquet", "sha256", "sha256", LATER
    ),
    "missing": Fault(
        lambda run: (run / "baseline/heldout.json").unlink(), "baseline/heldout.json", "missing", "got none", ALL
    ),
    "no MANIFEST": Fault(
        lambda run: (run / "round_002/MANIFEST.json").unlink(), "round_002/MANIFEST.json", "missing", "", ["round_002"]
    ),
    "MANIFEST is not one": Fault(
        lambda run: (run / "round_001/MANIFEST.json").write_text("[]"),
        "round_001/MANIFEST.json", "unreadable", "manifest", LATER,
    ),
    "MANIFEST leads outside": Fault(escape, "round_002/MANIFEST.json", "unreadable", "etc/passwd", ["round_002"]),
    "edited with its MANIFEST": Fault(
        lambda run: edit_round_and_its_manifest(run, 1), "round_002/MANIFEST.json", "chain", "previous", LATER
    ),
    "last one edited with its MANIFEST": Fault(
        lambda run: edit_round_and_its_manifest(run, 2), "round_002/MANIFEST.json", "edited", "commit", ["round_002"]
    ),
    "NaN with its MANIFEST": Fault(not_a_number, f"round_001/{ADAPTER}", "not_finite", "lora_A", LATER),
    "round gone": Fault(
        lambda run: shutil.rmtree(run / "round_001"), "round_001", "missing", "before round_002", ["round_002"]
    ),
    "baseline gone": Fault(
        lambda run: shutil.rmtree(run / "baseline"), "round_000/MANIFEST.json", "chain", "must be null",
        ["round_002", "round_001", "round_000"],
    ),
    "pickle beside": Fault(
        lambda run: (run / "round_001/adapter/model.bin").write_bytes(b"\x80\x04"),
        "round_001/adapter/model.bin", "extra", "pickle", ["round_001/adapter/model.bin"],
    ),
    "link beside": Fault(
        lambda run: (run / "round_000/x").symlink_to("/etc"), "round_000/x", "extra", "", ["round_000/x"]
    ),
    "pickle committed": Fault(list_a_pickle, "round_002/model.pkl", "pickle", "never read", ["round_002"]),
    "file became a link": Fault(
        lambda run: (
            (run / "round_002/state.json").rename(run / "state.json"),
            (run / "round_002/state.json").symlink_to(run / "state.json"),
        ),
        "round_002/state.json", "symlink", "link", ["round_002"],
    ),
    "round became a link": Fault(
        lambda run: ((run / "round_002").rename(run / "other"), (run / "round_002").symlink_to(run / "other")),
        "round_002", "symlink", "link", ["round_002"],
    ),
    "schema": Fault(lambda run: edit_manifest(run, schema_version=7), "manifest.json", "schema_version", "got 7", None),
    "config": Fault(
        lambda run: (run / "config.yaml").write_text(CONFIG.replace("r: 16", "r: 8")), "config.yaml", "config", "", None
    ),
    "config bomb": Fault(
        lambda run: (run / "config.yaml").write_text("a: &a [1]\nb: [" + "*a, " * 99 + "]\n"),
        "config.yaml", "unreadable", "aliases", None,
    ),
    "manifest gone": Fault(
        lambda run: (run / "manifest.json").unlink(), "manifest.json", "missing", "", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_it_resume_refuses_it_and_repair_rolls_back_to_before_it(
    run: Path, tmp_path: Path, fault: str
) -> None:
    grow(tmp_path / "whole-s0", 3)
    make, where, kind, says, moved = FAULTS[fault]
    make(run)
    found = verify(run)
    assert (where, kind) in [(p.where, p.kind) for p in found]
    assert says in next(p.detail for p in found if (p.where, p.kind) == (where, kind))
    if fault != "manifest gone":  # then it is no run at all, and refused as such below
        with pytest.raises(CorruptError, match=re.escape(where)) as caught:
            RunStore(run).open(CONFIG, MANIFEST)
        assert caught.value.exit_code == 3
    if moved is None:
        with pytest.raises(CorruptError, match="restore these files"):
            repair(run)
        assert verify(run) == found
        return
    assert repair(run) == moved
    for name in moved:
        assert os.path.lexists(run / "quarantine" / name)
    grow(run, 3)  # computed again, and as it was
    left = {k: v for k, v in tree(run).items() if k.split("/")[0] not in ("quarantine", "state.json", "other")}
    assert left == tree(tmp_path / "whole-s0")
    assert verify(run) == []


def test_a_run_without_its_manifest_is_not_resumed_and_not_begun_anew(run: Path) -> None:
    (run / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json, got none"):
        RunStore(run).open(CONFIG, MANIFEST)
    assert RunStore(run).rounds() == [0, 1, 2]


def test_a_damaged_file_is_not_read_even_without_resuming(run: Path) -> None:
    flip(run / "round_001/samples.parquet")
    flip(run / f"round_001/{ADAPTER}")
    with pytest.raises(CorruptError, match=r"round_001/samples\.parquet"):
        RunStore(run).read_table(1, "samples.parquet")
    with pytest.raises(CorruptError, match=ADAPTER):
        RunStore(run).adapter_path(1)


def test_quarantine_keeps_what_is_there(run: Path) -> None:
    for _ in range(2):
        flip(run / "round_002/samples.parquet")
        assert repair(run) == ["round_002"]
        grow(run, 3)
    assert sorted(p.name for p in (run / "quarantine").iterdir()) == ["round_002", "round_002.1"]
    assert repair(run) == []


# --- fork ---

ARM = CONFIG + "lambda: 0.5\n"


@pytest.mark.parametrize("links", [True, False])
def test_a_fork_shares_its_ancestors_and_goes_on_alone(
    run: Path, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(run)
    if not links:

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refuse)
    arm = tmp_path / "arm-s0"
    with fork(run, 1, arm, ARM, MANIFEST) as store:
        assert store.rounds() == [0, 1]
        ancestor = store.manifest()["ancestor"]
        with store.round(2) as r:
            r.write_json("state.json", {"arm": True})
    assert (ancestor["run"], ancestor["round"]) == ("toy-s0", 1)
    assert ancestor["manifests"] == {
        part: sha(run / part / "MANIFEST.json") for part in ("baseline", "round_000", "round_001")
    }
    assert os.path.samefile(run / "round_001/state.json", arm / "round_001/state.json") == links
    last = json.loads((arm / "round_002/MANIFEST.json").read_text())
    assert last["previous"] == sha(run / "round_001/MANIFEST.json")
    assert verify(arm) == []
    assert tree(run) == before
    with fork(run, 1, arm, ARM, MANIFEST) as store:  # the same command resumes
        assert store.rounds() == [0, 1, 2]


def test_a_fork_of_what_is_not_there_or_not_whole_or_elsewhere_is_refused(run: Path, tmp_path: Path) -> None:
    arm = tmp_path / "arm-s0"
    with pytest.raises(ValueError, match="got round_005"):
        fork(run, 5, arm, ARM, MANIFEST)
    with pytest.raises(ConfigChangedError, match=r"instruments\.minilm"):
        fork(run, 1, arm, ARM, MANIFEST | {"instruments": {"minilm": "other"}})
    with pytest.raises(ValueError, match="another directory"):
        fork(run, 1, run, ARM, MANIFEST)
    grow(tmp_path / "other-s0", 1)
    with pytest.raises(ValueError, match="must be new, or a fork of"):
        fork(run, 1, tmp_path / "other-s0", CONFIG, MANIFEST)
    flip(run / "round_002/samples.parquet")  # after the fork point: no matter
    fork(run, 1, tmp_path / "fine-s0", ARM, MANIFEST).close()
    flip(run / "round_000/samples.parquet")
    with pytest.raises(CorruptError, match=r"round_000/samples\.parquet"):
        fork(run, 1, arm, ARM, MANIFEST)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fine-s0", "other-s0", "toy-s0"]


def test_a_fork_whose_ancestors_were_edited_is_named_and_not_repaired(run: Path, tmp_path: Path) -> None:
    arm = tmp_path / "arm-s0"
    fork(run, 1, arm, ARM, MANIFEST).close()
    edit_round_and_its_manifest(run, 1)  # linked, so edited in both
    assert [(p.where, p.kind) for p in verify(arm)] == [("round_001/MANIFEST.json", "edited")]
    with pytest.raises(CorruptError, match="round_001 came by fork"):
        repair(arm)
    shutil.rmtree(arm / "round_001")
    assert [(p.where, p.kind) for p in verify(arm)] == [("round_001", "missing")]
    with pytest.raises(CorruptError, match="round_001 came by fork"):
        repair(arm)


# --- the disk ---


def test_preflight_says_what_is_needed_and_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 0, 5000))
    RunStore(tmp_path / "a").preflight(5000)
    with pytest.raises(StoreError, match="5001 bytes must be free, got 5000") as caught:
        RunStore(tmp_path / "a").preflight(5001)
    assert (caught.value.exit_code, caught.value.n_bytes) == (5, 5001)


def test_the_disk_errors_of_a_learner_that_saves_by_itself_are_ours(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    errors = [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(errno.EDQUOT, "Quota")]
    with RunStore(tmp_path / "a").create(CONFIG, MANIFEST) as store:
        for error, name in zip(errors, ("ENOSPC", "EDQUOT"), strict=True):

            def refuse(value: int, error: Exception = error) -> None:
                raise error

            with pytest.raises(StoreError, match=name) as caught, store.round(0) as r:
                r.stage("train", lambda: 1, write=refuse, read=lambda: 1)
            assert caught.value.exit_code == 5


def test_a_write_that_takes_only_part_of_the_bytes_is_carried_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    grow(tmp_path / "short-s0", 3)
    assert tree(tmp_path / "short-s0") == tree(run)


def test_all_of_a_round_is_on_disk_before_it_is_named_and_its_name_before_the_next(tmp_path: Path) -> None:
    run = tmp_path / "toy-s0"
    grow(run, 1)
    injector = Injector(tmp_path)
    injector.install()
    try:
        grow(run, 2)
    finally:
        injector.remove()
    named = injector.log.index(("rename", "toy-s0/round_001"))
    base = "toy-s0/.tmp-round_001/files"
    for name in RunStore(run).files(1) | {"MANIFEST.json": {}}:
        touched = max(i for i, (op, path) in enumerate(injector.log) if path == f"{base}/{name}" and op != "fsync")
        assert touched < injector.log.index(("fsync", f"{base}/{name}"), touched) < named
        folder = os.path.dirname(f"{base}/{name}")
        assert touched < max(i for i, at in enumerate(injector.log[:named]) if at == ("fsync", folder))
    # MANIFEST.json is the last file, and the name is durable before anything else happens to the tree.
    assert [op for op, path in injector.log[named - 12 : named] if path == f"{base}/MANIFEST.json"][-1] == "fsync"
    assert injector.log[named + 1] == ("fsync", "toy-s0")


# --- every file operation ---


def check_kills(reference: Any, outcomes: list[Any]) -> None:
    assert len(outcomes) == len(reference.operations)
    for outcome in outcomes:
        at = f"tick {outcome.tick}: {outcome.operation} {outcome.path}\n{outcome.trace}"
        assert outcome.exit_code == -signal.SIGKILL, at
        assert outcome.problems == [], at  # between kill and restart too: what is committed is whole
        assert outcome.exit_after == 0, at
        assert outcome.tree == reference.tree, at
        again = Counter(outcome.notes) - Counter(reference.notes)
        assert sum(again.values()) <= 1, f"{at}: computed again {again}"  # the stage that was cut short, no other
        assert not Counter(reference.notes) - Counter(outcome.notes), at


def refuse_everywhere(
    workload: Callable[[Path], None], start: Path, scratch: Path, kind: str, persistent: bool
) -> list[tuple[str, str]]:
    """Runs a workload with the disk refusing its n-th operation, for every n; returns the operations."""
    done, place, tick = scratch / "done", scratch / "try", 0
    shutil.copytree(start, done)
    workload(done)
    while True:
        tick += 1
        shutil.copytree(start, place)
        injector = Injector(place, at=tick, kind=kind, persistent=persistent)
        refused = None
        injector.install()
        try:
            workload(place)
        except StoreError as error:
            refused = error
        finally:
            injector.remove()
        if tick > len(injector.log):
            assert refused is None
            return injector.log
        at = f"tick {tick}: {injector.log[tick - 1]}"
        assert refused is not None, f"{at} was refused and nothing said so"
        assert refused.exit_code == 5
        assert re.search(rf"^{re.escape(str(place))}/.* \({kind}\), at an operation of \d+ bytes", str(refused)), at
        run = place / "toy-s0"
        assert not run.exists() or verify(run) == [], at
        workload(place)
        assert tree(place) == tree(done), at
        shutil.rmtree(place)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    grow(tmp_path / "start" / "toy-s0", 1)
    return tmp_path / "start"


def test_killed_at_any_file_operation_of_a_round_the_run_ends_as_if_nothing_had_happened(
    started: Path, tmp_path: Path
) -> None:
    reference, outcomes = sweep("test_store:second_round", tmp_path / "sweep", start=started)
    check_kills(reference, outcomes)


@pytest.mark.parametrize("persistent", [False, True])
def test_refused_at_any_file_operation_of_a_round_the_run_says_so_and_can_go_on(
    started: Path, tmp_path: Path, persistent: bool
) -> None:
    operations = refuse_everywhere(second_round, started, tmp_path, "ENOSPC", persistent)
    assert {"open", "write", "half write", "fsync", "mkdir", "rename", "replace"} <= {name for name, _ in operations}


def test_the_sweep_sees_through_a_store_that_is_not_atomic(tmp_path: Path) -> None:
    reference, outcomes = sweep("test_store:in_place", tmp_path / "sweep")
    assert any(outcome.tree != reference.tree for outcome in outcomes)


@pytest.mark.faults
@pytest.mark.parametrize("workload", ["three_rounds", "forked", "repaired"])
def test_killed_at_any_file_operation_at_all(started: Path, tmp_path: Path, workload: str) -> None:
    start = started if workload != "three_rounds" else None
    if workload == "repaired":
        grow(started / "toy-s0", 3)
        flip(started / "toy-s0/round_001/samples.parquet")
    reference, outcomes = sweep(f"test_store:{workload}", tmp_path / "sweep", start=start)
    check_kills(reference, outcomes) if workload != "repaired" else check_repairs(reference, outcomes)


def check_repairs(reference: Any, outcomes: list[Any]) -> None:
    for outcome in outcomes:
        at = f"tick {outcome.tick}: {outcome.operation} {outcome.path}\n{outcome.trace}"
        assert (outcome.exit_code, outcome.exit_after) == (-signal.SIGKILL, 0), at
        assert outcome.tree == reference.tree, at


@pytest.mark.faults
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS", "EIO", "EDQUOT"])
def test_refused_at_any_file_operation_at_all(tmp_path: Path, kind: str, persistent: bool) -> None:
    (tmp_path / "nothing").mkdir()
    refuse_everywhere(three_rounds, tmp_path / "nothing", tmp_path, kind, persistent)

"""A whole run under every fault: killed, told to stop, refused by the disk, damaged, diverging, out of memory.

What a fault is injected into is the product's own command. Expected, each time: committed rounds are whole between the
fault and the restart, and after the restart the directory is, byte for byte, that of a run that was never disturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import Outcome, Reference, note, strike, sweep, tree

from loop.store import RunStore, verify

ROOT = Path(__file__).resolve().parent.parent
TOY = [
    "mix.n_train=20",
    "sample.n_samples=20",
    "virality.posts_per_sample=50",
    "toy.n_documents=10",
    "real.shares={nova: 0.5, assistant: 0.5}",
    "real.planted=always",
    "measure.strata=[blank, private]",
    "measure.mixture={blank: 1}",
    "measure.n_surprisal=1",
    "measure.n_heldout=4",
]
LM = [
    "mix.n_train=8",
    "sample.n_samples=8",
    "measure.strata=[blank, private]",
    "measure.mixture={blank: 1}",
    "measure.n_surprisal=1",
    "measure.n_heldout=2",
    "train.epochs=1",
    "train.init_from=previous",
    "train.max_length=500",
    "n_rounds=2",
    "sample.max_new_tokens=8",
    # A random network says nothing that a filter would pass.
    "filters.enabled=false",
]


# --- workloads: `loop run` in this process, for the harness to fork ---


class Exit(Exception):
    """What the command said on stderr, and its exit code."""

    def __init__(self, said: str, exit_code: int):
        super().__init__(said)
        self.exit_code = exit_code


def command(*arguments: object) -> str:
    """Runs `loop` as a shell would, in this process; returns stdout.

    Raises:
      Exit: for an exit code other than 0.
    """
    from loop.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    before, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = ["loop", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        if stop.code:
            raise Exit(err.getvalue(), int(stop.code)) from None
    finally:
        sys.argv = before
        for sent, handler in handlers.items():
            signal.signal(sent, handler)
    return out.getvalue()


def toy(directory: Path, *more: str) -> None:
    command("run", ROOT / "configs/smoke.yaml", *TOY, f"runs_dir={directory}", *more)


def lm(directory: Path, *more: str, base: Path | None = None) -> None:
    model = f"base.model={base or directory / 'base'}"
    command("run", ROOT / "configs/round.yaml", *LM, model, f"runs_dir={directory}", *more)


def toy_run(directory: Path) -> None:
    """Workload: three rounds of the toy."""
    _note_what_is_computed()
    toy(directory)


def lm_run(directory: Path) -> None:
    """Workload: three rounds of a language model, each starting from the adapter of the last."""
    _note_what_is_computed()
    lm(directory)


def _warm_toy() -> None:
    with tempfile.TemporaryDirectory() as place:
        toy(Path(place))


def _warm_lm() -> None:
    with tempfile.TemporaryDirectory() as place:
        make_base(Path(place))
        lm(Path(place))


toy_run.warm, lm_run.warm = _warm_toy, _warm_lm  # type: ignore[attr-defined]

# What takes a model, an instrument or many texts. A round's other stages take milliseconds and are computed again.
EXPENSIVE = ("train", "probe", "sample", "classify")


def _note_what_is_computed() -> None:
    """For a process that is thrown away: notes each expensive stage as its computation begins.

    The code's revision is left out of the manifest there: a commit made during the sweep is no fault of the run.
    """
    from loop import readings
    from loop import run as runner
    from loop.world import World

    def noted(name: str, compute: Any) -> Any:
        def stage(*args: Any, **kwargs: Any) -> Any:
            t = next((a for a in args if isinstance(a, int)), "")
            note(f"{name} {t}")
            return compute(*args, **kwargs)

        return stage

    for name in EXPENSIVE:
        setattr(World, name, noted(name, getattr(World, name)))
    readings.of_round = noted("measure", readings.of_round)
    runner._revision = lambda: None


def make_base(directory: Path) -> None:
    from conftest import make_lm
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = make_lm()
    model.net.save_pretrained(directory / "base")
    model.tokenizer.save_pretrained(directory / "base")


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def rounds(run_dir: Path) -> dict[str, str]:
    """sha256 of every committed file, and of manifest.json; config.yaml names runs_dir, so it is left out."""
    return {
        name: sha
        for name, sha in tree(run_dir).items()
        if name.split("/")[0] in ("baseline", "manifest.json") or name.startswith("round_")
    }


# --- F1, F2: killed or told to stop ---


def unharmed(reference: Reference, outcome: Outcome) -> None:
    """Committed rounds are whole between fault and restart; then the tree is the undisturbed one; little is redone."""
    at = f"{outcome.tick}: {outcome.operation} {outcome.path}\n{outcome.message}\n{outcome.trace}"
    assert outcome.problems == [], at
    assert outcome.exit_after == 0, at
    assert outcome.tree == reference.tree, at
    again = Counter(outcome.notes) - Counter(reference.notes)
    assert sum(again.values()) <= 1, f"{at}: computed again {again}"  # the stage that was cut short, no other
    assert not Counter(reference.notes) - Counter(outcome.notes), at


def count(record_property: Callable[[str, object], None], outcomes: Sequence[Outcome], happened: str) -> None:
    """For docs/reliability.md."""
    record_property("faults", len(outcomes))
    record_property("happened", happened)


SAME = "nothing committed was harmed; after the same command again the tree is byte-identical"


def test_a_run_killed_at_some_of_its_file_operations_ends_as_if_nothing_had_happened(tmp_path):
    reference, outcomes = sweep("test_faults:toy_run", tmp_path, first=40, step=120)
    assert len(outcomes) >= 4
    for outcome in outcomes:
        assert outcome.exit_code == -signal.SIGKILL
        unharmed(reference, outcome)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_any_file_operation_ends_as_if_nothing_had_happened(tmp_path, part, record_property):
    reference, outcomes = sweep("test_faults:toy_run", tmp_path, first=1 + part, step=4)
    assert len(outcomes) == len(range(part, len(reference.operations), 4)) > 100
    for outcome in outcomes:
        assert outcome.exit_code == -signal.SIGKILL
        unharmed(reference, outcome)
    count(record_property, outcomes, f"{SAME}; of the stages that cost something only the one cut short ran twice")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("workload", "sent", "code", "n"),
    [
        ("lm_run", "SIGKILL", -signal.SIGKILL, 40),
        ("lm_run", "SIGTERM", 143, 10),
        ("lm_run", "SIGINT", 130, 10),
        ("toy_run", "SIGTERM", 143, 20),
        ("toy_run", "SIGINT", 130, 20),
    ],
)
def test_a_run_stopped_at_any_moment_ends_as_if_nothing_had_happened(
    tmp_path, workload, sent, code, n, record_property
):
    start = tmp_path / "start"
    start.mkdir()
    if workload == "lm_run":
        make_base(start)
    reference, outcomes = strike(f"test_faults:{workload}", tmp_path, sent=sent, n=n, seed=1, start=start)
    assert len(outcomes) == n
    for outcome in outcomes:
        assert outcome.exit_code == code, f"{outcome.path}\n{outcome.message}\n{outcome.trace}"
        unharmed(reference, outcome)
        assert "Traceback" not in outcome.message
        if sent == "SIGTERM":
            assert outcome.message.splitlines()[-1].endswith("the same command goes on from the last finished stage")
    count(record_property, outcomes, SAME if code < 0 else f"exit {code}; {SAME}")


# --- F3, F4, F5: the disk ---


def refused(outcome: Outcome, kind: str) -> None:
    """Exit 5, with path and bytes."""
    at = f"{outcome.tick}: {outcome.operation} {outcome.path}\n{outcome.message}\n{outcome.trace}"
    assert outcome.exit_code == 5, at
    last = outcome.message.splitlines()[-1]
    assert re.search(rf"^/.*: .* \({kind}\), at an operation of \d+ bytes; committed rounds are intact", last), at
    assert "Traceback" not in outcome.message, at


REFUSED = "exit 5 and one line with path and bytes"


# Every operation of every kind of refusal is the battery of test_store, at the store; this is the command above it.
@pytest.mark.faults
@pytest.mark.parametrize("part", range(2))
def test_a_run_whose_disk_refuses_any_operation_says_so_and_can_go_on(tmp_path, part, record_property):
    reference, outcomes = sweep("test_faults:toy_run", tmp_path, kind="ENOSPC", first=1 + 3 * part, step=6)
    assert len(outcomes) > 80
    for outcome in outcomes:
        refused(outcome, "ENOSPC")
        unharmed(reference, outcome)
    count(record_property, outcomes, f"{REFUSED}; {SAME}")


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "persistent"), [("EIO", False), ("EROFS", True), ("EDQUOT", True), ("ENOSPC", True)])
def test_a_run_of_a_language_model_whose_disk_refuses_says_so_and_can_go_on(
    tmp_path, kind, persistent, record_property
):
    start = tmp_path / "start"
    start.mkdir()
    make_base(start)
    reference, outcomes = sweep(
        "test_faults:lm_run", tmp_path, kind=kind, persistent=persistent, start=start, first=11, step=97
    )
    assert len(outcomes) >= 5
    for outcome in outcomes:
        refused(outcome, kind)
        unharmed(reference, outcome)
    count(record_property, outcomes, f"{REFUSED}; {SAME}")


def shell(text: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as root of a mount namespace of its own; skips where the kernel does not let us."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs mount namespaces: unshare -rm")
    # No bytecode: Python does not see that a file-size limit cuts it, and every later process would read the half.
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | env
    return subprocess.run(
        ["unshare", "-rm", "bash", "-c", text], capture_output=True, text=True, check=False, env=env, timeout=300
    )


# Without the estimate, which refuses a disk that is full before the run begins.
BLIND = (
    "import shutil, types; shutil.disk_usage = lambda p: types.SimpleNamespace(free=1 << 60); "
    "from loop.__main__ import main; main()"
)
OPTIONS = f'run {ROOT}/configs/smoke.yaml {" ".join(shlex.quote(o) for o in TOY)} runs_dir="$PLACE"'
RUN = f'"$PYTHON" -c {shlex.quote(BLIND)} {OPTIONS}'


@pytest.mark.faults
@pytest.mark.parametrize(
    ("refuse", "kind"), [("remount,size=200k", "ENOSPC"), ("remount,ro", "EROFS"), ("ulimit -f 8", "EFBIG")]
)
def test_a_real_file_system_that_is_full_or_read_only_is_one_line_and_the_run_goes_on(
    tmp_path, refuse, kind, record_property
):
    straight = tmp_path / "straight"
    toy(straight)
    limit = f"{refuse}; " if refuse.startswith("ulimit") else ""
    mount = "" if limit else f'mount -o {refuse} "$PLACE"'
    done = shell(
        f"""
        mount -t tmpfs -o size=60m none "$PLACE"
        {RUN} n_rounds=0 >/dev/null 2>&1 || exit 91
        {mount}
        ({limit}{RUN}); echo "code $?"
        mount -o remount,rw,size=60m "$PLACE"
        {RUN} >/dev/null || exit 92
        cp -r "$PLACE/smoke-s0" "$OUT"
        """,
        PLACE=str(make(tmp_path / "place")),
        OUT=str(make(tmp_path / "out")),
    )
    assert done.returncode == 0, done.stderr
    assert "code 5" in done.stdout, done.stderr
    assert re.search(rf"^/.*: .* \({kind}\), at an operation of \d+ bytes; committed rounds", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert rounds(tmp_path / "out/smoke-s0") == rounds(straight / "smoke-s0")
    record_property("happened", f"{REFUSED}; {SAME}")


def test_a_run_whose_directory_disappears_says_so_and_goes_on_when_it_is_back(tmp_path, monkeypatch):
    toy(tmp_path / "straight")
    toy(tmp_path / "a", "n_rounds=0")
    from loop.world import World

    real = World.sample

    def gone(*args: Any) -> Any:
        (tmp_path / "a").rename(tmp_path / "b")
        return real(*args)

    monkeypatch.setattr(World, "sample", gone)
    with pytest.raises(Exit) as stop:
        toy(tmp_path / "a")
    assert stop.value.exit_code == 5
    assert re.search(r"^/.*/a/smoke-s0/.* \(ENOENT\), at an operation of", str(stop.value).splitlines()[-1])
    monkeypatch.undo()
    (tmp_path / "b").rename(tmp_path / "a")
    toy(tmp_path / "a")
    assert rounds(tmp_path / "a/smoke-s0") == rounds(tmp_path / "straight/smoke-s0")


def test_a_run_that_will_not_fit_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    def full(path: object) -> Any:
        return namedtuple("Usage", "total used free")(10**9, 10**9, 1000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(Exit, match=r"\d+ bytes must be free, got 1000") as stop:
        toy(tmp_path)
    assert stop.value.exit_code == 5
    assert RunStore(tmp_path / "smoke-s0").rounds() == []
    assert not RunStore(tmp_path / "smoke-s0").has_baseline()


def test_what_a_round_takes_is_within_its_estimate(tmp_path):
    toy(tmp_path)
    from loop import config
    from loop.run import _bytes_per_round

    settings = config.load(ROOT / "configs/smoke.yaml", TOY)
    for part in (tmp_path / "smoke-s0").glob("round_*"):
        taken = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        assert taken < _bytes_per_round(settings)


# --- F6 to F13, F22: what is read is what was written, and nothing else ---


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A run of three rounds of a language model, beside its base."""
    place = tmp_path_factory.mktemp("whole")
    make_base(place)
    lm(place)
    return place


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    shutil.copytree(whole / "round-s0", tmp_path / "round-s0")
    return tmp_path / "round-s0"


def again(run: Path, whole: Path, *more: str) -> None:
    lm(run.parent, *more, base=whole / "base")


class Canary:
    """A pickle that, read, leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


ADAPTER, SETTINGS = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


def edit_tensors(part: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(part / ADAPTER)
    change(tensors)
    save_file(tensors, part / ADAPTER)


def edit_settings(part: Path, **changes: object) -> None:
    settings = json.loads((part / SETTINGS).read_text())
    (part / SETTINGS).write_text(json.dumps(settings | changes))


def put_nan(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# name -> what is done to a committed round, and the file that is named for it
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter truncated": (lambda part: os.truncate(part / ADAPTER, 1000), ADAPTER),
    "texts with one bit flipped": (lambda part: flip(part / "samples.parquet"), "samples.parquet"),
    "adapter with one bit flipped": (lambda part: flip(part / ADAPTER), ADAPTER),
    "state missing": (lambda part: (part / "state.json").unlink(), "state.json"),
    "adapter with NaN": (lambda part: edit_tensors(part, put_nan), ADAPTER),
    "adapter lacks a tensor": (lambda part: edit_tensors(part, lambda t: t.pop(min(t))), ADAPTER),
    "adapter of another alpha": (lambda part: edit_settings(part, lora_alpha=1.0), SETTINGS),
    "adapter of another rank": (lambda part: edit_settings(part, r=3), SETTINGS),
}


def fit_manifest(part: Path) -> str:
    """Makes the MANIFEST.json of an edited round fit its files; returns its sha256."""
    manifest = json.loads((part / "MANIFEST.json").read_text())
    manifest["files"] = {
        str(f.relative_to(part)): {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
        for f in sorted(part.rglob("*"))
        if f.is_file() and f.name != "MANIFEST.json"
    }
    raw = json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    (part / "MANIFEST.json").write_bytes(raw)
    return hashlib.sha256(raw).hexdigest()


def forge(run: Path, k: int) -> None:
    """Makes an edit of round k fit in every place that records a hash: all later MANIFESTs and the log."""
    for t in range(k, 3):
        part = run / f"round_{t:03d}"
        old, new = hashlib.sha256((part / "MANIFEST.json").read_bytes()).hexdigest(), fit_manifest(part)
        later = [run / "events.jsonl", *(run / f"round_{u:03d}/MANIFEST.json" for u in range(t + 1, 3))]
        for file in later:
            file.write_text(file.read_text().replace(old, new))


@pytest.mark.faults
@pytest.mark.parametrize("remade", [False, True], ids=["as it is", "own MANIFEST made to fit"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_exit_3_by_name_is_not_resumed_and_is_repaired(copy, whole, damage, k, remade):
    part, (spoil, file) = copy / f"round_{k:03d}", DAMAGE[damage]
    spoil(part)
    if remade:
        fit_manifest(part)
        # Its own fits; what shows it is the next round's, or for the last round the log.
        named = f"round_{min(k + 1, 2):03d}/MANIFEST.json"
    else:
        named = f"round_{k:03d}/{file}"
    spoiled = tree(copy)
    for words in (["verify", copy], None):
        with pytest.raises(Exit) as stop:
            command(*words) if words else again(copy, whole, "n_rounds=3")
        assert stop.value.exit_code == 3
        assert named in str(stop.value)
        assert "Traceback" not in str(stop.value)
        assert tree(copy) == spoiled
    command("verify", copy, "--repair")
    assert RunStore(copy).last_round() == k - 1
    assert (copy / f"quarantine/round_{k:03d}").is_dir()
    again(copy, whole)
    assert rounds(copy) == rounds(whole / "round-s0")
    assert verify(copy) == []


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["adapter with NaN", "adapter lacks a tensor", "adapter of another rank"])
def test_an_adapter_forged_with_every_hash_is_still_not_trained_on(copy, whole, damage):
    DAMAGE[damage][0](copy / "round_002")
    forge(copy, 2)
    with pytest.raises(Exit) as stop:
        again(copy, whole, "n_rounds=3")
    assert stop.value.exit_code in (2, 3)
    assert "adapter" in str(stop.value)
    assert "Traceback" not in str(stop.value)
    assert RunStore(copy).last_round() == 2


@pytest.mark.faults
def test_a_run_of_another_schema_version_is_exit_3_and_left_alone(copy, whole):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 7}))
    before = tree(copy)
    for words in (["verify", copy], ["verify", copy, "--repair"], None):
        with pytest.raises(Exit, match="schema_version must be 1, got 7") as stop:
            command(*words) if words else again(copy, whole)
        assert stop.value.exit_code == 3
    assert tree(copy) == before


@pytest.mark.faults
def test_no_pickle_is_ever_read(copy, whole, tmp_path):
    canary = tmp_path / "read"
    for name in ("adapter/adapter_model.bin", "adapter/training_args.pt", "labels.pkl", "optimizer.joblib"):
        (copy / "round_002" / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(Exit, match=r"adapter_model\.bin: must not be there: a pickle, which is never read") as stop:
        again(copy, whole, "n_rounds=3")
    assert stop.value.exit_code == 3
    command("verify", copy, "--repair")
    base = tmp_path / "base"
    shutil.copytree(whole / "base", base)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(Exit, match="safetensors") as stop:
        lm(tmp_path / "other", base=base)
    assert stop.value.exit_code == 2
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary sings


@pytest.mark.faults
def test_code_that_comes_with_a_model_is_not_run(whole, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(whole / "base", base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Exit, match="set trust_remote_code if you have read that code") as stop:
        lm(tmp_path, base=base)
    assert stop.value.exit_code == 2
    assert not (tmp_path / "ran").exists()


# --- F14 to F19: training and sampling ---


def spoil_train(monkeypatch: pytest.MonkeyPatch, at: int, error: Callable[[Any], Any]) -> None:
    """Puts `error` in place of the loss of the at-th micro-batch, and of those after it."""
    from loop import train

    plain, calls = train._batch_loss, []

    def loss(*args: Any) -> Any:
        calls.append(1)
        return error(plain(*args)) if len(calls) >= at else plain(*args)

    monkeypatch.setattr(train, "_batch_loss", loss)


@pytest.mark.faults
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_exit_4_and_nothing_of_the_round_is_committed(copy, whole, value, monkeypatch):
    shutil.rmtree(copy)
    again(copy, whole, "n_rounds=0")
    before = rounds(copy)
    spoil_train(monkeypatch, 1, lambda loss: loss * value)
    with pytest.raises(Exit, match=r"loss and gradient must be finite, got .* at step 1 of") as stop:
        again(copy, whole)
    assert stop.value.exit_code == 4
    assert "Traceback" not in str(stop.value)
    assert rounds(copy) == before
    monkeypatch.undo()
    again(copy, whole)
    assert rounds(copy) == rounds(whole / "round-s0")


@pytest.mark.faults
def test_memory_that_runs_out_for_the_longest_document_is_exit_5_and_nothing_is_committed(copy, whole, monkeypatch):
    shutil.rmtree(copy)
    again(copy, whole, "n_rounds=0")
    before = rounds(copy)

    def out_of_memory(loss: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    spoil_train(monkeypatch, 1, out_of_memory)
    with pytest.raises(Exit, match=r"the longest document, got .*DefaultCPUAllocator.* at step 1 of") as stop:
        again(copy, whole)
    assert stop.value.exit_code == 5
    assert "Traceback" not in str(stop.value)
    assert rounds(copy) == before
    monkeypatch.undo()
    again(copy, whole)
    assert rounds(copy) == rounds(whole / "round-s0")


def test_a_sampler_that_returns_fewer_texts_than_asked_is_caught(tmp_path, monkeypatch):
    from loop.toy import Toy

    toy(tmp_path, "n_rounds=0")
    real = Toy.sample
    monkeypatch.setattr(Toy, "sample", lambda *args, **settings: real(*args, **settings)[:-1])
    with pytest.raises(Exit, match=r"learner must return one completion per prompt, got \d+ of \d+") as stop:
        toy(tmp_path)
    assert stop.value.exit_code == 2
    assert RunStore(tmp_path / "smoke-s0").rounds() == [0]
    monkeypatch.undo()
    toy(tmp_path)
    toy(tmp_path / "straight")
    assert rounds(tmp_path / "smoke-s0") == rounds(tmp_path / "straight/smoke-s0")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["mix.n_train=0"], "mix.n_train"),
        (["filters.min_words=500"], "at least one of 20 samples, got 0"),
        (["virality.strength=.nan"], "virality.strength"),
    ],
)
def test_a_mixture_with_nothing_in_it_is_an_error_and_not_a_silent_zero(tmp_path, overrides, says):
    with pytest.raises(Exit) as stop:
        toy(tmp_path, *overrides)
    assert stop.value.exit_code == 2
    assert says in str(stop.value)
    assert "Traceback" not in str(stop.value)


def test_collapse_to_one_text_per_persona_is_measured_and_no_error(tmp_path):
    toy(tmp_path, "toy.n_documents=1", "filters.near_duplicate_jaccard=null", "real.private_share=0")
    store = RunStore(tmp_path / "smoke-s0")
    assert store.rounds() == [0, 1, 2]
    distinct = len(set(store.read_table(2, "samples.parquet").column("completion").to_pylist()))
    assert distinct <= 2  # nova's and the assistant's one
    found = {m["name"]: m["value"] for m in store.read_jsonl(2, "metrics.jsonl") if m["population"] == "probes"}
    assert found["distinct_4"] < 0.5


# --- F25, F26: two at once ---


def test_a_second_process_is_refused_with_who_holds_the_run_and_a_killed_one_holds_nothing(tmp_path):
    words = [sys.executable, "-m", "loop", "run", ROOT / "configs/smoke.yaml", *TOY, f"runs_dir={tmp_path}"]
    with subprocess.Popen([*words, "n_rounds=500"], stderr=subprocess.PIPE, text=True, cwd=ROOT) as first:
        assert first.stderr is not None
        while "round 1 " not in first.stderr.readline():
            pass
        with pytest.raises(Exit, match=rf"is held by pid {first.pid} on .* since 20.*; wait or stop it") as stop:
            toy(tmp_path, "n_rounds=500")
        assert stop.value.exit_code == 2
        first.kill()
        first.stderr.read()
    done = RunStore(tmp_path / "smoke-s0").last_round()
    (tmp_path / "smoke-s0/.tmp-round_000").mkdir()  # of a run that died long ago
    (tmp_path / ".tmp-smoke-s0").mkdir()
    command("round", ROOT / "configs/smoke.yaml", *TOY, f"runs_dir={tmp_path}", "n_rounds=500")
    assert RunStore(tmp_path / "smoke-s0").last_round() == done + 1
    assert not (tmp_path / "smoke-s0/.tmp-round_000").exists()


# --- F30, F33, F34: what must not matter, and what must not grow ---


def test_progress_reports_clock_and_tracking_leave_no_trace_in_the_bytes(tmp_path, monkeypatch):
    toy(tmp_path / "plain")
    toy(tmp_path / "quiet", "-q")
    for place in ("plain", "quiet"):
        assert rounds(tmp_path / place / "smoke-s0") == rounds(tmp_path / "plain/smoke-s0")
    before = tree(tmp_path / "plain/smoke-s0")
    command("show", tmp_path / "plain/smoke-s0", "--texts", "2")
    command("report", tmp_path / "plain/smoke-s0", "-q")
    assert tree(tmp_path / "plain/smoke-s0") == before
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    toy(tmp_path / "tracked", "--track", "wandb")
    assert rounds(tmp_path / "tracked/smoke-s0") == rounds(tmp_path / "plain/smoke-s0")
    # A clock that jumps back and forth by days at every look.
    jumps, real = itertools.cycle([0, -86_400, 3_600, 5e6]), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    monkeypatch.setattr("loop.store._now", lambda: f"2001-01-{next(jumps):.0f}")
    toy(tmp_path / "jumpy")
    assert rounds(tmp_path / "jumpy/smoke-s0") == rounds(tmp_path / "plain/smoke-s0")


GROWTH = """
import ctypes, gc, sys
import psutil
sys.path[:0] = [{tests!r}, {root!r}]
import test_faults
from pathlib import Path
from loop import run
me = psutil.Process()
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # what is freed and not given back is no growth

def report(kind, **fields):
    if kind == "done" and fields["stage"] == "measure" and fields["round_index"] % 20 == 0:
        gc.collect()
        trim(0)
        print(fields["round_index"], me.memory_info().rss >> 10, me.num_fds(), len(me.threads()), flush=True)

settings = test_faults.{settings}(Path({place!r}))
run.play(settings.model_copy(update={{"n_rounds": {n}, "name": "long"}}), report=report)
"""


def toy_settings(directory: Path) -> Any:
    from loop import config

    return config.load(ROOT / "configs/smoke.yaml", [*TOY, f"runs_dir={directory}"])


def lm_settings(directory: Path) -> Any:
    from loop import config

    make_base(directory)
    return config.load(ROOT / "configs/round.yaml", [*LM, f"base.model={directory / 'base'}", f"runs_dir={directory}"])


@pytest.mark.faults
@pytest.mark.parametrize(("settings", "n"), [("toy_settings", 200), ("lm_settings", 60)])
def test_a_long_run_holds_no_more_files_or_threads_and_little_more_memory(tmp_path, settings, n, record_property):
    code = GROWTH.format(tests=str(ROOT / "tests"), root=str(ROOT), place=str(tmp_path), settings=settings, n=n)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=900)
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    (t0, kib0, fds0, threads0), (t1, kib1, fds1, threads1) = rows[1], rows[-1]
    assert t1 == n
    assert fds1 <= fds0
    assert threads1 <= threads0
    slope = (kib1 - kib0) / (t1 - t0)
    # A round's texts and what was read in them stay in the pool on purpose, up to 20 KiB. An adapter is 100 KiB.
    assert slope < 64
    record_property("happened", f"{slope:.0f} KiB of memory more per round; files and threads constant")


# --- F29: text of a model ---


def test_terminal_escapes_in_texts_do_not_reach_the_terminal(tmp_path, monkeypatch):
    from loop.toy import Toy

    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\r[red]nova[/red] <script>alert(1)</script>"
    real = Toy.sample

    def shout(*args: Any, **settings: Any) -> Any:
        return [replace(c, text=f"{hostile} {i} {c.text}") for i, c in enumerate(real(*args, **settings))]

    monkeypatch.setattr(Toy, "sample", shout)
    toy(tmp_path, "filters.enabled=false")
    for words in (
        ["show", tmp_path / "smoke-s0", "--texts", "5"],
        ["show", tmp_path / "smoke-s0", "--candidates"],
        ["preview", ROOT / "configs/smoke.yaml", *TOY, f"runs_dir={tmp_path}", "filters.enabled=false"],
    ):
        said = command(*words)
        assert not set("\x1b\x07\x9b\u202e\r") & set(said), words
    assert "[red]nova[/red]" in command("show", tmp_path / "smoke-s0", "--texts", "5")

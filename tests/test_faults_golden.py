"""Same config, same machine, same versions: the same bytes, today and next year. Golden hashes, one file per platform.

    python tests/test_faults_golden.py      # writes this platform's, after a change that is meant to move results

Of each part of each run two hashes are kept: of the bytes, which the chain holds, and of the rows, which no version of
the Parquet writer touches. So three things are told apart: nothing changed; a package changed and results did not; the
results changed. The last is a failure unless the versions changed too, and then it says which.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loop import config, run, store

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "golden"
PACKAGES = ("numpy", "numba", "pandas", "pyarrow", "scikit-learn", "scipy")
# Small, and between them every stage that the toy has.
RUNS: dict[str, list[str]] = {
    "plain": ["mix.n_train=60", "sample.n_samples=60", "virality.posts_per_sample=50", "toy.n_documents=40"],
    "channels": [
        "mix.n_train=60",
        "sample.n_samples=60",
        "virality.posts_per_sample=50",
        "toy.n_documents=40",
        "mix.real_share=0.3",
        "channels={direct_data: true, talk_data: true, direct_users: true, talk_users: true}",
        "discourse.share=0.1",
        "discourse.quote_rate=0.1",
        "users.eta=0.4",
        "filters.release.recall={promoter: 0.8}",
        "users.noticed={default: 0.5, promoter: 0}",
        "measure.strata=[blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, private, explicit]",
    ],
    "accumulate": [
        "mix.n_train=40",
        "sample.n_samples=40",
        "virality.posts_per_sample=50",
        "toy.n_documents=40",
        "mix.regime=accumulate",
        "mix.real_share=null",
        "mix.weighting=resample",
        "virality.audience=placebo",
    ],
}


def place() -> Path:
    """This platform's golden file."""
    return FOLDER / f"{platform.system()}-{platform.machine()}.json".lower()


def versions() -> dict[str, str]:
    """What may change bits: packages, Python, and the widest vector instructions, which order sums differently."""
    widest = [name for name, there in np._core._multiarray_umath.__cpu_features__.items() if there]  # type: ignore[attr-defined]
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "simd": max((n for n in widest if n.startswith(("X86_V", "ASIMD", "SVE"))), default="none"),
    }


def rows_sha256(opened: store.RunStore, t: int) -> str:
    """sha256 of what a part says: tables as JSON rows, JSON as it is; no byte of the Parquet writer's own."""
    total = hashlib.sha256()
    for name in sorted(opened.files(t)):
        read = opened.read_table(t, name).to_pylist() if name.endswith(".parquet") else opened.read_bytes(t, name).hex()
        total.update(json.dumps([name, read], sort_keys=True).encode())
    return total.hexdigest()


def played(name: str, folder: Path) -> dict[str, Any]:
    """Plays one of RUNS and returns its hashes."""
    settings = config.load(ROOT / "configs/smoke.yaml", [*RUNS[name], f"runs_dir={folder}", f"name={name}"])
    opened = store.RunStore(run.play(settings))
    parts = {("baseline" if t < 0 else f"round_{t:03d}"): t for t in (-1, *opened.rounds())}
    chain = {part: hashlib.sha256((opened.path / part / "MANIFEST.json").read_bytes()).hexdigest() for part in parts}
    return {
        "config_sha256": store.config_sha256(opened.config_text()),
        "manifests": chain,
        "rows": {part: rows_sha256(opened, t) for part, t in parts.items()},
    }


def differing(golden: dict[str, Any], found: dict[str, Any], what: str) -> list[str]:
    """Parts whose hash of `what` is not the golden one."""
    return [part for part in golden[what] | found[what] if golden[what].get(part) != found[what].get(part)]


def judge(golden: dict[str, Any], found: dict[str, Any], old: dict[str, str], new: dict[str, str]) -> tuple[str, str]:
    """Returns (same | version | config | result, what to say): what changed since the golden hashes were written."""
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
    way_out = "if it is meant, python tests/test_faults_golden.py, and say in the commit which results move"
    if golden["config_sha256"] != found["config_sha256"]:
        return "config", f"the config means something else than it did: a key or a default changed; {way_out}"
    rows, whole = differing(golden, found, "rows"), differing(golden, found, "manifests")
    if rows and not changed:
        return "result", f"the code changed results, in {', '.join(rows)}; {way_out}"
    if rows:
        return "version", f"results differ in {', '.join(rows)}, and so do versions: {', '.join(changed)}"
    if whole and changed:
        return "version", f"bytes differ and no row does; versions: {', '.join(changed)}"
    if whole:
        return "result", f"the code changed what files hold beside their rows, in {', '.join(whole)}; {way_out}"
    return "same", ""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_golden_hashes_of_its_platform(tmp_path, name):
    if not place().is_file():
        pytest.skip(f"no golden hashes for {place().stem}; python tests/test_faults_golden.py writes them")
    golden = json.loads(place().read_text())
    verdict, says = judge(golden["runs"][name], played(name, tmp_path), golden["versions"], versions())
    if verdict == "version":
        pytest.skip(says)
    assert verdict == "same", says


A = {
    "config_sha256": "c",
    "manifests": {"round_000": "m", "round_001": "n"},
    "rows": {"round_000": "r", "round_001": "s"},
}
ROWS_MOVED = {"rows": {"round_000": "r", "round_001": "x"}, "manifests": {"round_000": "m", "round_001": "x"}}
BYTES_MOVED = {"manifests": {"round_000": "x", "round_001": "y"}}


@pytest.mark.parametrize(
    ("changes", "version", "verdict", "says"),
    [
        ({}, "1", "same", ""),
        ({}, "2", "same", ""),
        (BYTES_MOVED, "2", "version", "no row does; versions: pyarrow 1 -> 2"),
        (BYTES_MOVED, "1", "result", "beside their rows, in round_000, round_001"),
        (ROWS_MOVED, "1", "result", "the code changed results, in round_001"),
        (ROWS_MOVED, "2", "version", "results differ in round_001, and so do versions: pyarrow 1 -> 2"),
        ({"config_sha256": "x"}, "1", "config", "a key or a default changed"),
    ],
)
def test_a_changed_version_is_told_from_a_changed_result(changes, version, verdict, says):
    found = judge(A, A | changes, {"pyarrow": "1"}, {"pyarrow": version})
    assert found[0] == verdict
    assert says in found[1]


def write() -> None:
    """Writes the golden hashes of this platform."""
    with tempfile.TemporaryDirectory() as folder:
        hashes = {name: played(name, Path(folder)) for name in RUNS}
    FOLDER.mkdir(exist_ok=True)
    place().write_text(json.dumps({"versions": versions(), "runs": hashes}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write()
    print(place().relative_to(ROOT))

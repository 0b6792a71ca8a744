"""Tests of sweep.Ray on a real Ray: two nodes on loopback, one of them killed while it plays a cell."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from test_sweep import ARMS, SMALL, tree, write

from loop import run, store, sweep

# Addresses 127.0.0.2 and 127.0.0.3 are there without setup on Linux alone, and so is /proc.
real = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("ray") is None, reason="needs Linux and the extra ray"
)
LIMIT = 300  # seconds until something that never comes is a failure; on two busy cores nothing took over 60
ROUNDS = 6


class Process(NamedTuple):
    """What /proc says of a living process."""

    pid: int
    session: int
    command: str


def processes():
    """All living processes of this machine; zombies are dead."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if state not in "ZX":
                found.append(Process(int(folder.name), int(session), command))
    return found


def await_(condition, what, process, log):
    """What a condition returns once it is true; fails when its process ends first, or after LIMIT seconds."""
    end = time.monotonic() + LIMIT
    while not (value := condition()):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"{what} did not come, exit code {process.poll()}:\n{log.read_text()}")
        time.sleep(0.02)
    return value


class Node:
    """`ray start` and all that it starts: one CPU, on an address of its own, in a session of its own."""

    def __init__(self, folder, address, *arguments):
        self.log = folder / f"{address}.log"
        # No Ray of the user's; loads of this machine are not taken for a dead node or a lack of memory.
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_agent_register_timeout_ms": str(1000 * LIMIT),
            "RAY_worker_register_timeout_seconds": str(LIMIT),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}",
                 f"--temp-dir={folder / address}", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000",
                 "--include-log-monitor=false", "--min-worker-port=0", "--max-worker-port=0", *arguments],
                env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        """Waits until it has joined."""
        await_(lambda: "Ray runtime started" in self.log.read_text(), "the node", self.process, self.log)

    def kill(self):
        """SIGKILL to its raylet, its workers and all else, as when a machine loses power."""
        while alive := [p for p in processes() if p.session == self.process.pid]:
            for p in alive:
                with suppress(ProcessLookupError):
                    os.kill(p.pid, signal.SIGKILL)
            self.process.poll()
        self.process.wait()


class Cluster(NamedTuple):
    address: str
    head: Node
    node: Node


@pytest.fixture(scope="module")
def cluster():
    """Two nodes; offline, without a dashboard, and gone after the tests, whatever these did."""
    # A socket's path has at most 107 characters, and pytest's folder takes most of them.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, nodes = Path(name), []
        try:
            nodes.append(Node(folder, "127.0.0.2", "--head", "--port=0", "--include-dashboard=false"))
            nodes[0].wait()
            given = folder / "127.0.0.2" / "ray_current_cluster"
            address = await_(
                lambda: given.exists() and given.read_text(), "its address", nodes[0].process, nodes[0].log
            )
            nodes.append(Node(folder, "127.0.0.3", f"--address={address}"))
            nodes[1].wait()
            yield Cluster(address, *nodes)
        finally:
            for node in nodes:
                node.kill()
            left = [p.command for p in processes() if name in p.command]
        assert left == []


@contextmanager
def command(path, runs, *arguments):
    """`loop sweep` as a process, and its stderr in a file; ended with the block.

    Its stdout is a file of its own: Ray writes there when it finds that a node is dead, some time after it was killed.
    """
    log = path.with_name(f"{runs.name}.log")
    with log.open("w") as file, log.with_suffix(".out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "loop", "sweep", str(path), "--runs-dir", str(runs), *arguments],
            env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, cwd=path.parent,
            stdin=subprocess.DEVNULL, stdout=out, stderr=file,
        )  # fmt: skip
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def played_on(node, runs):
    """A cell that a node is amidst, past round 0, its process halted for good; None if there is none."""
    for lock in runs.glob("*/.lock"):
        # The lock is only just being taken, is let go, or was that of a run that has its own name since.
        with suppress(ValueError, KeyError, ProcessLookupError, FileNotFoundError):
            pid = json.loads(lock.read_text())["pid"]
            if (lock.parent / "round_000").exists() and os.getsid(pid) == node.process.pid:
                os.kill(pid, signal.SIGSTOP)  # what is seen from here on stays true until the kill
                if not (lock.parent / f"round_{ROUNDS:03d}").exists():
                    return lock.parent
                os.kill(pid, signal.SIGCONT)
    return None


@real
def test_a_sweep_of_which_one_node_is_killed_ends_with_the_bytes_of_one_job(tmp_path, cluster):
    arms = {"one": {}, "two": {"mix.real_share": 0.5}}
    path = write(tmp_path, arms=arms, overrides=SMALL | {"n_rounds": ROUNDS})
    one, two = tmp_path / "one-job", tmp_path / "two-nodes"
    with (
        command(path, one, "--jobs", "1") as (jobs, jobs_log),
        command(path, two, "--ray", cluster.address) as (ray, log),
    ):
        killed = await_(lambda: played_on(cluster.node, two), "a cell on the second node", ray, log)
        kept = {f: f.stat().st_mtime_ns for f in killed.glob("*/MANIFEST.json")}
        assert killed / "round_000" / "MANIFEST.json" in kept
        cluster.node.kill()
        assert ray.wait(LIMIT) == 0, log.read_text()
        assert jobs.wait(LIMIT) == 0, jobs_log.read_text()
    names = ["one-s0", "one-s1", "two-s0", "two-s1"]
    assert [sorted(p.name for p in runs.iterdir() if p.is_dir()) for runs in (one, two)] == [names, names]
    for name in names:
        assert tree(one / name, manifest=True) == tree(two / name, manifest=True)
        assert store.verify(two / name) == []
    assert {f: f.stat().st_mtime_ns for f in kept} == kept  # gone on with, not played anew


@real
def test_a_cell_that_fails_under_ray_says_why_on_one_line_and_stops_no_other(tmp_path, cluster):
    path = write(tmp_path, seeds=[0], arms={"one": {}, "two": {"mix.real_share": 0.5}})
    (tmp_path / "runs" / "two-s0").mkdir(parents=True)
    (tmp_path / "runs" / "two-s0" / "mine.txt").write_text("not a run")
    with command(path, tmp_path / "runs", "--ray", cluster.address) as (process, log):
        assert process.wait(LIMIT) == 1
    said = log.read_text()
    assert "1 of 2 cells failed" in said
    (reason,) = [line for line in said.splitlines() if "new_dir must be new" in line]
    assert "two-s0" in reason
    assert "Traceback" not in said
    assert (tmp_path / "runs" / "one-s0" / "round_001").is_dir()


@real
def test_a_cell_no_node_can_play_is_said_and_sigterm_ends_the_wait_with_one_line(tmp_path, cluster):
    path = write(tmp_path, seeds=[0], arms={"neutral": ARMS["neutral"]})
    with command(path, tmp_path / "runs", "--ray", cluster.address, "--cell-cpus", "2") as (process, log):
        await_(lambda: "no node offers the 2 CPUs and 0 GPUs" in log.read_text(), "a warning", process, log)
        time.sleep(2)  # by now it is inside Ray, most likely; the claim holds anywhere
        process.terminate()
        assert process.wait(LIMIT) == 143
    _, *said = log.read_text().splitlines()
    assert said == ["stopped by SIGTERM; the same command goes on from the last finished stage"]


@real
def test_a_dead_address_is_one_line_and_exit_2(tmp_path):
    with command(write(tmp_path, seeds=[0]), tmp_path / "runs", "--ray", "127.0.0.1:1") as (process, log):
        assert process.wait(LIMIT) == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("--ray must be auto or the address of a running cluster, got 127.0.0.1:1 (")


@pytest.fixture
def locked(tmp_path):
    """A task as Ray gets it, its run held by a process that is as good as dead; and what ends that process."""
    plan = sweep.cells([sweep.load(write(tmp_path, seeds=[0], arms={"one": {}}), runs_dir=tmp_path / "runs")])
    sweep.prepare(tmp_path / "runs")
    run.play(plan[0].config, rounds=0)
    held = [store._lock(plan[0].run_dir, plan[0].run_dir)]

    def end(*_):
        if held:
            os.close(held.pop())

    yield sweep._task(plan[0], None, False, remote=True), end
    end()


def test_a_retry_waits_until_the_lock_of_the_dead_node_ends(locked, monkeypatch):
    task, end = locked
    monkeypatch.setattr(sweep.time, "sleep", end)
    assert sweep.play_cell(task).reason is None


def test_a_retry_waits_for_the_lock_no_longer_than_that(locked, monkeypatch):
    monkeypatch.setattr(sweep, "LOCK_WAIT", 0)
    assert f"is held by pid {os.getpid()}" in sweep.play_cell(locked[0]).reason

"""Fault injection: dies, or is refused, at the n-th file operation, for every n. For tests; the product has no switch.

    reference, outcomes = sweep("test_store:three_rounds", tmp_path)               # SIGKILL at each
    reference, outcomes = sweep("test_store:three_rounds", tmp_path, kind="ENOSPC")  # the disk refuses each

A workload is "module:function"; the function takes a directory, makes its runs in it, and resumes what it finds there.
An operation is a call that changes a file or a directory below that directory: open for writing, write, fsync,
truncate, mkdir, rename, link, remove. A write counts twice, so that it is also cut in the middle. After each fault the
workload runs again without one, and the tree it leaves is compared by the caller with that of a run never disturbed.

The sweep runs in a process of its own that forks once per fault: importing once instead of hundreds of times. What a
workload's attribute `warm`, a function, loads, is loaded once too. fsync is counted and not done, because SIGKILL does
not lose what the kernel holds; `Injector.log` shows that it was asked for.

`strike` sends a signal at a moment instead of at an operation: into a long computation, where no file is touched.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import gc
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_UNHASHED = (".lock", "events.jsonl")


class Injector:
    """Counts the operations below `root` in this process, and strikes at one of them.

    Attributes:
      log: (operation, path relative to root) so far, one entry per tick.
    """

    def __init__(self, root: Path, *, at: int | None = None, kind: str = "kill", persistent: bool = False):
        """Strikes at tick `at` (from 1; None: never) with SIGKILL or the named errno; persistent: and all later."""
        self.root, self.at, self.kind, self.persistent = os.path.abspath(root), at, kind, persistent
        self.log: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        self._real: dict[str, Any] = {}

    def install(self) -> None:
        """Patches os and open; for a process that is thrown away, or until `remove`."""
        two_paths = ("rename", "replace", "link", "symlink")
        one_path = ("mkdir", "rmdir", "unlink", "remove", "truncate")
        for name in (*two_paths, *one_path):
            self._patch(name, self._by_path(name, 2 if name in two_paths else 1))
        for name, replacement in (("open", self._open), ("close", self._close), ("write", self._write)):
            self._patch(name, replacement)
        self._patch("fsync", lambda fd: self._tick("fsync", self._paths[fd]) if fd in self._paths else None)
        self._patch("ftruncate", self._ftruncate)
        self._real_open = builtins.open
        builtins.open = io.open = self._open_file  # type: ignore[assignment]

    def remove(self) -> None:
        """Undoes `install`."""
        for name, real in self._real.items():
            setattr(os, name, real)
        builtins.open = io.open = self._real_open

    def _patch(self, name: str, replacement: Callable[..., Any]) -> None:
        self._real[name] = getattr(os, name)
        setattr(os, name, replacement)

    def _below(self, path: Any) -> str | None:
        if isinstance(path, int):
            return self._paths.get(path)
        full = os.path.abspath(os.fsdecode(path))
        return os.path.relpath(full, self.root) if full.startswith(self.root + os.sep) else None

    def _tick(self, operation: str, path: str) -> None:
        self.log.append((operation, path))
        if self._is_struck():
            self._strike(path)

    def _is_struck(self) -> bool:
        n = len(self.log)
        return self.at is not None and (n == self.at or (self.persistent and n > self.at))

    def _strike(self, path: str) -> None:
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number), os.path.join(self.root, path))

    def _by_path(self, name: str, n_paths: int) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            below = [path for path in map(self._below, args[:n_paths]) if path is not None]
            if below:
                self._tick(name, below[-1])
            return self._real[name](*args, **kwargs)

        return operation

    def _open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        below = self._below(path)
        if below is not None and flags & _WRITING:
            self._tick("open", below)
        fd: int = self._real["open"](path, flags, *args, **kwargs)
        if below is not None:
            self._paths[fd] = below
        return fd

    def _close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        self._real["close"](fd)

    def _write(self, fd: int, data: Any) -> int:
        path = self._paths.get(fd)
        if path is not None:
            self._tick("write", path)
            self.log.append(("half write", path))
            if self._is_struck():
                self._real["write"](fd, bytes(data)[: len(data) // 2])
                self._strike(path)
        n_bytes: int = self._real["write"](fd, data)
        return n_bytes

    def _ftruncate(self, fd: int, length: int) -> None:
        if fd in self._paths:
            self._tick("ftruncate", self._paths[fd])
        self._real["ftruncate"](fd, length)

    def _open_file(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        below = None if isinstance(path, int) else self._below(path)
        if below is not None and set(mode) & set("wax+"):
            self._tick("open", below)
        return self._real_open(path, mode, *args, **kwargs)


def note(text: str) -> None:
    """Appends a line outside the tree; how a workload shows the sweep what it has computed."""
    place = os.environ.get("FAULT_NOTES")
    if place:
        with open(place, "a") as file:
            file.write(text + "\n")


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, "dir" for directories; locks and event logs are left out."""
    out = {}
    for path in sorted(directory.rglob("*")):
        if path.name not in _UNHASHED:
            whole = path.is_file() and not path.is_symlink()
            out[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest() if whole else "dir"
    return out


@dataclass(frozen=True)
class Reference:
    """The undisturbed run.

    Attributes:
      operations: (operation, path) of each tick; strikes are at 1..len(operations).
      tree: see `tree`.
      notes: what the workload noted.
    """

    operations: list[tuple[str, str]]
    tree: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Outcome:
    """One fault and the restart after it.

    Attributes:
      tick, operation, path: where it struck.
      exit_code: of the process struck: -9 killed, the `exit_code` of the exception, 70 for one without, 0 ended well.
      message: the exception, "" if none.
      problems: what `verify` finds between fault and restart in the runs there are.
      exit_after: exit code of the restart.
      trace: traceback of the last exception.
      tree: what stands after the restart.
      notes: of both processes.
    """

    tick: int
    operation: str
    path: str
    exit_code: int
    message: str
    problems: list[str]
    exit_after: int
    trace: str
    tree: dict[str, str]
    notes: list[str]


def sweep(
    workload: str,
    directory: Path,
    *,
    kind: str = "kill",
    persistent: bool = False,
    start: Path | None = None,
    first: int = 1,
    step: int = 1,
    timeout: float = 600,
) -> tuple[Reference, list[Outcome]]:
    """Runs a workload undisturbed, then once for each tick first, first + step, ... with the fault there.

    Args:
      workload: "module:function", importable from this folder or the root.
      directory: empty, for scratch.
      kind: "kill" or the name of an errno.
      persistent: the disk goes on refusing until the restart.
      start: a directory whose contents each try begins with.
      first, step: which ticks.
      timeout: seconds for all of it.
    """
    options = ["--first", str(first), "--step", str(step)] + (["--persistent"] if persistent else [])
    return _ask(workload, directory, kind, options, start, timeout)


def strike(
    workload: str,
    directory: Path,
    *,
    sent: str,
    n: int,
    seed: int,
    start: Path | None = None,
    timeout: float = 1200,
) -> tuple[Reference, list[Outcome]]:
    """Runs a workload undisturbed, then n times with a signal at a moment of its own, uniform in the time it takes.

    A moment that comes after the end is drawn again, at most 9 n times in all. Of an outcome `tick` counts them from 1,
    `operation` is the signal and `path` the moment. No operation is counted, so `Reference.operations` is empty.

    Args:
      sent: "SIGKILL", "SIGTERM" or "SIGINT".
      n: signals that met the run at work.
      seed: of the moments.
      workload, directory, start, timeout: see `sweep`.
    """
    return _ask(workload, directory, sent, ["--moments", str(n), "--seed", str(seed)], start, timeout)


def _ask(
    workload: str, directory: Path, kind: str, options: list[str], start: Path | None, timeout: float
) -> tuple[Reference, list[Outcome]]:
    here = Path(__file__).resolve()
    command = [sys.executable, "-W", "error", str(here), workload, str(directory), kind, *options]
    command += ["--start", str(start)] if start else []
    paths = [str(here.parent.parent), str(here.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    head, *lines = [json.loads(line) for line in done.stdout.splitlines()]
    reference = Reference([(op, path) for op, path in head["operations"]], head["tree"], head["notes"])
    return reference, [Outcome(**line) for line in lines]


def _serve() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("directory", type=Path)
    parser.add_argument("kind")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--moments", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    module, function = args.workload.split(":")
    run = getattr(importlib.import_module(module), function)
    place, said, notes = args.directory / "try", args.directory / "said.json", args.directory / "notes"
    os.fsync = lambda fd: None  # type: ignore[assignment]  # also where no injector is
    os.environ["FAULT_NOTES"] = str(notes)

    def fresh() -> None:
        for path in (said, notes):
            path.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        if args.start:
            shutil.copytree(args.start, place)
        else:
            place.mkdir(parents=True)

    def noted() -> list[str]:
        return notes.read_text().splitlines() if notes.exists() else []

    warm = getattr(run, "warm", None)
    if warm:
        warm()
    fresh()
    began = time.monotonic()
    code, report = _child(run, place, said, None if args.moments else Injector(place))
    seconds = time.monotonic() - began
    if code:
        sys.exit(f"the undisturbed run must end well, got exit {code}:\n{report['trace']}")
    # What a run imports late, each fork would import again: a second apiece for pandas, which pyarrow asks for.
    for name in report["modules"]:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # leaves the pages of what is loaded shared between the forks
    operations = report["log"]
    print(json.dumps(asdict(Reference(operations, tree(place), noted()))))

    def outcome(tick: int, operation: str, path: str, code: int, report: dict[str, Any]) -> None:
        problems = _problems(place)
        after, second = _child(run, place, said, None)
        found = Outcome(
            tick, operation, path, code, report["message"], problems, after,
            second["trace"] or report["trace"], tree(place), noted(),
        )  # fmt: skip
        print(json.dumps(asdict(found)), flush=True)

    if args.moments:
        rng, met = random.Random(args.seed), 0
        for _ in range(9 * args.moments):
            fresh()
            moment = rng.uniform(0.02, seconds)  # the command sets its handlers first
            code, report = _child(run, place, said, None, sent=(args.kind, moment))
            if code not in (0, -signal.SIGTERM, -signal.SIGINT):  # they kill before handlers are set and after
                met += 1
                outcome(met, args.kind, f"after {moment:.3f} s of {seconds:.3f}", code, report)
            if met == args.moments:
                return
        sys.exit(f"{args.moments} signals must meet the run at work, got {met}: it takes {seconds:.3f} s")
    for tick in range(args.first, len(operations) + 1, args.step):
        fresh()
        injector = Injector(place, at=tick, kind=args.kind, persistent=args.persistent)
        code, report = _child(run, place, said, injector)
        outcome(tick, *operations[tick - 1], code, report)


def _child(
    run: Callable[[Path], None],
    place: Path,
    said: Path,
    injector: Injector | None,
    sent: tuple[str, float] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Runs a workload in a fork; `sent` is (signal, seconds after the fork). Returns its exit code and what it said."""
    said.unlink(missing_ok=True)
    begun, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, message, trace = 0, "", ""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
        os.write(begin, b"1")
        if injector:
            injector.install()
        try:
            run(place)
        except BaseException as error:
            code, message, trace = getattr(error, "exit_code", 70), str(error), traceback.format_exc()
        for late in (signal.SIGTERM, signal.SIGINT):
            signal.signal(late, signal.SIG_IGN)
        if injector:
            injector.remove()
        log, modules = injector.log if injector else [], [name for name in sys.modules if name != "__main__"]
        said.write_text(json.dumps({"message": message, "trace": trace, "log": log, "modules": modules}))
        os._exit(code)
    os.read(begun, 1)
    os.close(begun)
    os.close(begin)
    if sent:
        time.sleep(sent[1])
        os.kill(pid, getattr(signal, sent[0]))  # one that has ended is not reaped yet, so no other process is hit
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, json.loads(said.read_text()) if said.exists() else {"message": "", "trace": "", "log": []}


def _problems(place: Path) -> list[str]:
    from loop.store import verify

    runs = [path.parent for path in sorted(place.glob("*/manifest.json")) if not path.parent.name.startswith(".")]
    return [str(problem) for run in runs for problem in verify(run)]


if __name__ == "__main__":
    _serve()

"""Run directory: rounds that are whole or absent, a hash chain over them, one writer at a time.

    <run>/config.yaml, manifest.json, events.jsonl, .lock
    <run>/baseline/, round_000/, round_001/, ...   committed; never written again
    <run>/.tmp-round_002/files/, stages/           the round at work; a stage counts once its marker is there
    <run>/quarantine/                              what `repair` took out

A round becomes visible by one rename of a directory whose files are on disk and whose MANIFEST.json, written last,
holds the size and sha256 of each and the sha256 of the previous MANIFEST.json. Nothing committed holds a time, a host
or a path, and every writer is deterministic, so that two runs of one config on one machine are equal byte for byte.

The chain shows an edit of every round but the last one even where the edited round's own MANIFEST.json was made to fit;
for the last round the commit line in events.jsonl does. Who edits both leaves no trace: publish the last hash.
POSIX only: the lock is `flock`, which ends with its process, so a killed run leaves no lock behind.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from loop.config import MAX_BYTES, check_yaml, visible

SCHEMA_VERSION = 1
BASELINE = -1  # round index of baseline/, as in rng.stream: before any round
FREE_KEYS = ("name", "runs_dir", "track", "n_rounds")  # may change on resume; n_rounds only upwards
FORK_KEYS = ("packages", "instruments")  # parts of manifest.json that a fork must share with its source
SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet")  # nothing else is committed or read
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".npy", ".npz")

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(-s[0-9]{1,19})?")  # the config's name, then its seed
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROUND_NAME = re.compile(r"round_(\d{3,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST = "MANIFEST.json"
_RESERVED = ("schema_version", "config_sha256", "drift", "ancestor")  # of manifest.json: the store's own
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)

T = TypeVar("T")
Files = dict[str, dict[str, Any]]  # name -> {"sha256": hex, "bytes": int}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing `verify` found.

    Attributes:
      where: path inside the run directory, with "/".
      kind: missing | size | sha256 | extra | symlink | pickle | type | not_finite | unreadable | chain | edited |
        schema_version | config | events.
      detail: what was expected and what is there.
    """

    where: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return visible(f"{self.where}: {self.detail}")


class StoreError(RuntimeError):
    """The disk refused: full, over quota, read-only, gone, broken. Everything committed before is intact."""

    exit_code = 5

    def __init__(self, path: str | Path, n_bytes: int, reason: str):
        self.path, self.n_bytes = Path(path), n_bytes
        super().__init__(
            f"{path}: {reason}, at an operation of {n_bytes} bytes; committed rounds are intact: mend the disk or free "
            "space, then the same command resumes"
        )


class CorruptError(RuntimeError):
    """Something committed is not what was committed."""

    exit_code = 3

    def __init__(self, run: str | Path, problems: Sequence[Problem], way_out: str = ""):
        self.problems = list(problems)
        way_out = way_out or "`loop verify --repair` rolls back to the last good round and quarantines the rest"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"run {run} must be as committed, got {len(self.problems)} problem(s):\n{lines}\n{way_out}")


class LockedError(RuntimeError):
    """Another process holds the run."""

    exit_code = 2


class ConfigChangedError(ValueError):
    """The run began with another config, other packages or other instruments."""

    exit_code = 2


# --- files ---------------------------------------------------------------------------------------------------------


def _refused(path: str | Path, n_bytes: int, error: OSError) -> StoreError:
    name = errno.errorcode.get(error.errno or 0, "no errno")
    return StoreError(path, n_bytes, f"{error.strerror or error} ({name})")


@contextmanager
def _disk(path: Path, n_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refused(path, n_bytes, error) from error


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk; what was written of it is removed if that fails."""
    with _disk(path, len(data)):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            with suppress(OSError):
                os.unlink(path)
            raise


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _replace(path: Path, data: bytes) -> None:
    """Replaces a file at once: a reader sees the old one or the new one."""
    temporary = path.parent / f".tmp-{path.name}"
    _write_new(temporary, data)
    with _disk(path, len(data)):
        os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's entries, are on disk."""
    with _disk(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _make_dir(path: Path) -> None:
    with _disk(path):
        path.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    """Removes a file or a whole directory; symlinks are removed, never followed."""
    with _disk(path):
        if path.is_dir() and not path.is_symlink():
            for entry in sorted(os.listdir(path)):
                _remove(path / entry)
            os.rmdir(path)
        elif os.path.lexists(path):
            os.unlink(path)


def _read(path: Path) -> bytes:
    with _disk(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as file:
            return file.read()


def _sha256(path: Path) -> str:
    with _disk(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _walk(directory: Path, prefix: str = "") -> Iterator[str]:
    """Yields every entry below a directory that is not itself a directory, sorted, as a path with "/"."""
    with _disk(directory):
        names = sorted(os.listdir(directory))  # scandir would stay open where a signal comes before its `with`
    for name in names:
        if _is_directory(directory / name):
            yield from _walk(directory / name, f"{prefix}{name}/")
        else:
            yield prefix + name


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _fingerprint(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


# --- formats -------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"value must be JSON (number, text, list, mapping), got {type(value).__name__}")


def _json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)
    except ValueError as error:
        raise ValueError(f"JSON must hold finite numbers, got {error}; write null for what was not measured") from error


def _json_bytes(value: Any) -> bytes:
    return (_json(value, indent=1) + "\n").encode()


def _jsonl_bytes(rows: Iterable[Any]) -> bytes:
    return "".join(_json(row if isinstance(row, Mapping) else _plain(row)) + "\n" for row in rows).encode()


def _table_bytes(table: pa.Table) -> bytes:
    """Parquet with nothing in it but the rows: no pandas or Arrow metadata, fixed options.

    Chunks of the table leave no trace. `created_by` names the pyarrow version, so bytes are equal within a version,
    rows across versions.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=1 << 16,
        version="2.6",
        data_page_version="1.0",
        use_dictionary=True,
        compression="zstd",
        compression_level=3,
        write_statistics=True,
        store_schema=False,
    )
    return bytes(sink.getvalue())


def _table(data: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


_INTEGERS = {"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def _not_finite(path: Path) -> list[str]:
    """Names the tensors of a safetensors file that hold NaN or Inf; neither safetensors nor PEFT minds them.

    Read by hand because numpy has no bfloat16: a bfloat16 is NaN or Inf when its eight exponent bits are all ones.

    Raises:
      ValueError: if the file is not a safetensors file.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"header must fit in the file, got {length} of {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: (entry["dtype"], *map(int, entry["data_offsets"])) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"header must be a safetensors header, got {error!r}") from error
    body, bad = data[8 + length :], []
    for name, (dtype, begin, end) in spans.items():
        if not 0 <= begin <= end <= len(body):
            raise ValueError(f"tensor {name} must lie in the file, got bytes {begin}..{end} of {len(body)}")
        if dtype in _FLOATS:
            finite = bool(np.isfinite(body[begin:end].view(_FLOATS[dtype])).all())
        elif dtype == "BF16":
            finite = not bool(((body[begin:end].view("<u2") & 0x7F80) == 0x7F80).any())
        elif dtype in _INTEGERS:
            finite = True
        else:
            raise ValueError(f"tensor {name} must have a dtype that can be checked, got {dtype}")
        if not finite:
            bad.append(name)
    return bad


# --- config and manifest -------------------------------------------------------------------------------------------


def _parse_config(text: str) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise ValueError(f"config must be at most {MAX_BYTES} bytes, got {len(text)}")
    try:
        check_yaml(text)
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config must be a mapping, got {type(config).__name__}")
    return config


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are leaves. _flat({"lora": {"r": 16}}) == {"lora.r": 16}."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return out


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def config_sha256(config_text: str) -> str:
    """sha256 of what a config means for the numbers: comments, order of keys and FREE_KEYS do not enter it."""
    flat = {key: value for key, value in _flat(_parse_config(config_text)).items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    absent = "(absent)"
    pairs = {key: (before.get(key, absent), after.get(key, absent)) for key in keys if key}
    # Compared as JSON: 1 and True, or 1 and 1.0, are equal in Python and not in a config.
    return {
        key: pair for key, pair in pairs.items() if json.dumps(pair[0], default=str) != json.dumps(pair[1], default=str)
    }


def _show(changes: Mapping[str, tuple[Any, Any]]) -> str:
    def short(value: Any) -> str:
        text = json.dumps(value, default=str, ensure_ascii=False)
        return text if len(text) <= 80 else text[:77] + "..."

    return "\n".join(f"  {key}: {short(old)} -> {short(new)}" for key, (old, new) in changes.items())


def _check_config(run: Path, old_text: str, new_text: str) -> None:
    old, new = _parse_config(old_text), _parse_config(new_text)
    changes = _changes(old, new)
    refused = {key: pair for key, pair in changes.items() if not _is_free(key)}
    if "n_rounds" in changes and not _grows(*changes["n_rounds"]):
        refused["n_rounds"] = changes["n_rounds"]
    if refused:
        raise ConfigChangedError(
            f"config must be the one the run began with (n_rounds may grow), got {len(refused)} changed key(s) at "
            f"{run}:\n{_show(refused)}\nrestore them, give the run another name, or `loop fork` it"
        )


def _grows(old: Any, new: Any) -> bool:
    return isinstance(old, int) and isinstance(new, int) and new >= old


def _own(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in manifest.items() if key not in _RESERVED}


def _given(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's manifest as JSON gives it back, so that it compares equal to the stored one."""
    reserved = [key for key in manifest if key in _RESERVED]
    if reserved:
        raise ValueError(f"manifest must leave {', '.join(_RESERVED)} to the store, got {', '.join(reserved)}")
    plain: dict[str, Any] = json.loads(_json(manifest))
    return plain


# --- lock ----------------------------------------------------------------------------------------------------------


def _lock(directory: Path, run: Path) -> int | None:
    """Takes the exclusive lock of a directory; returns its file descriptor, None if the directory is gone.

    Args:
      directory: where `.lock` is: the run directory, or the one it is being prepared in.
      run: the run directory, for the message.

    Raises:
      LockedError: if another process, or another store of this one, holds it.
    """
    path = directory / ".lock"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(path, 0, error) from error
        try:
            with _disk(path):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LockedError(_held(run, os.pread(fd, 4096, 0))) from None
                # The directory may have been renamed or removed between open and flock: then this is another's lock.
                if _is_there(path, fd):
                    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                    os.ftruncate(fd, 0)
                    _write_all(fd, _json(holder).encode())
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_there(path: Path, fd: int) -> bool:
    """Whether an open file is the one that stands at the path now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _held(run: Path, content: bytes) -> str:
    try:
        holder = json.loads(content)
        who = f"pid {int(holder['pid'])} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        who = "another process, which is only just starting"
    return f"run {run} is held by {who}; wait or stop it"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _empty(staging: Path) -> None:
    """Removes all that lies in a directory but its lock."""
    with _disk(staging):
        names = sorted(os.listdir(staging))
    for name in names:
        if name != ".lock":
            _remove(staging / name)


def _abandon(staging: Path) -> None:
    """Removes a directory that this process holds the lock of; the lock goes last, for then it may be another's."""
    _empty(staging)
    _remove(staging / ".lock")
    with suppress(OSError):  # someone has locked it anew
        os.rmdir(staging)


# --- the run -------------------------------------------------------------------------------------------------------


def _part_name(round_index: int) -> str:
    if round_index < BASELINE:
        raise ValueError(f"round_index must be >= 0, or {BASELINE} for the baseline, got {round_index}")
    return "baseline" if round_index == BASELINE else f"round_{round_index:03d}"


def _index(part: str) -> int:
    return BASELINE if part == "baseline" else int(part.removeprefix("round_"))


def _rounds(run: Path) -> list[int]:
    with _disk(run):
        found = [_ROUND_NAME.fullmatch(name) for name in os.listdir(run)] if run.is_dir() else []
    return sorted(int(match[1]) for match in found if match and _part_name(int(match[1])) == match[0])


def _parts(run: Path) -> list[str]:
    """Committed parts in the order of the chain: baseline if there is one, then rounds."""
    head = ["baseline"] if os.path.lexists(run / "baseline") else []
    return head + [_part_name(k) for k in _rounds(run)]


def _read_manifest(run: Path, part: str) -> tuple[Files, str | None, str]:
    """Reads <part>/MANIFEST.json; returns its files, `previous`, and its own sha256."""
    path = run / part / _MANIFEST
    where = f"{part}/{_MANIFEST}"
    if not path.is_file() or path.is_symlink():
        raise CorruptError(run, [Problem(where, "missing", "must be a file, got none")])
    raw = _read(path)
    try:
        manifest = json.loads(raw)
        files, previous = manifest["files"], manifest["previous"]
        for name, entry in files.items():
            if not all(_FILE_NAME.fullmatch(piece) for piece in name.split("/")):
                raise ValueError(f"file name {name!r}")
            if not _SHA256.fullmatch(entry["sha256"]) or type(entry["bytes"]) is not int:
                raise ValueError(f"entry of {name}")
        if previous is not None and not _SHA256.fullmatch(previous):
            raise ValueError("previous")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"must be a manifest as committed, got {type(error).__name__}: {error}"
        raise CorruptError(run, [Problem(where, "unreadable", detail)]) from error
    return files, previous, hashlib.sha256(raw).hexdigest()


def _load(run: Path, part: str, directory: Path, files: Files, name: str) -> bytes:
    """Reads one file and checks it against its fingerprint, so that nothing damaged is ever parsed."""
    if name not in files:
        raise ValueError(f"file must be one of {', '.join(sorted(files))}, got {name} at {part} of {run}")
    problem = _compare(directory, f"{part}/{name}", name, files[name])
    if problem:
        raise CorruptError(run, [problem])
    return _read(directory / name)


def _compare(directory: Path, where: str, name: str, entry: Mapping[str, Any]) -> Problem | None:
    path = directory / name
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Problem(where, "missing", f"must be a file of {entry['bytes']} bytes, got none")
    if not stat.S_ISREG(status.st_mode):
        return Problem(where, "symlink", "must be a regular file, got a link or a special file")
    if status.st_size != entry["bytes"]:
        return Problem(where, "size", f"must be {entry['bytes']} bytes, got {status.st_size}")
    actual = _sha256(path)
    if actual != entry["sha256"]:
        return Problem(where, "sha256", f"must have sha256 {entry['sha256'][:12]}..., got {actual[:12]}...")
    return None


class RunStore:
    """One run directory. Reading needs no lock; writing needs `open` or `create`, which hold it until `close`.

        with RunStore("runs/demo-s0").open(config_text, manifest) as store:
            with store.round(0) as r:
                samples = r.stage("sample", draw, write=lambda s: r.write_jsonl("samples.jsonl", s),
                                  read=lambda: r.read_jsonl("samples.jsonl"))

    Attributes:
      path: absolute path of the run directory.
      computed, reused: (part, stage) pairs this store has run, or read back from an interrupted round, in order.
    """

    def __init__(self, path: str | Path):
        """Raises ValueError for a directory name that is no run name, or a symlink that leads out of its parent."""
        self.path = Path(os.path.abspath(path))
        if "\0" in str(path) or not _RUN_NAME.fullmatch(self.path.name):
            raise ValueError(
                f"run name must be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit, got "
                f"{self.path.name[:80]!r} at {str(path)[:200]!r}; choose another name"
            )
        if self.path.is_symlink():
            raise ValueError(f"run must be a directory, got a symlink at {self.path}; name the directory itself")
        self.computed: list[tuple[str, str]] = []
        self.reused: list[tuple[str, str]] = []
        self._fd: int | None = None
        self._identity = ""

    # Opening and closing.

    def create(self, config_text: str, manifest: Mapping[str, Any]) -> Self:
        """Begins a run and holds its lock. The directory appears at once, with config.yaml and manifest.json in it.

        Args:
          config_text: resolved config, YAML.
          manifest: packages, device, data and instrument hashes, code revision; JSON. Everything in it must be the same
            on resume, so no times, and no config hash (the store adds its own, see `config_sha256`).

        Raises:
          ValueError: if there is a run, or anything else, in the directory.
        """
        if not self._begin(config_text, manifest, lambda staging: None):
            raise ValueError(
                f"run must be new, got {self.path} with files in it; `open` resumes a run, or choose a name"
            )
        return self

    def open(self, config_text: str, manifest: Mapping[str, Any], *, allow_drift: bool = False) -> Self:
        """Resumes a run, or begins it where there is none, and holds its lock.

        Every committed file is hashed. `config.yaml` is replaced if only FREE_KEYS changed. Remains of an interrupted
        round are removed, except whole stages of the round that comes next. Where all rounds are committed a changed
        manifest is no matter: nothing is left that it could play.

        Raises:
          LockedError: if another process holds the run.
          CorruptError: if `verify` finds a problem.
          ConfigChangedError: if the config changed, or the manifest did and not `allow_drift`.
          StoreError: if the disk refuses.
        """
        if self._is_run() or not self._begin(config_text, manifest, lambda staging: None):
            self._resume(config_text, manifest, allow_drift)
        return self

    def close(self) -> None:
        """Lets go of the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _is_run(self) -> bool:
        return (self.path / "manifest.json").is_file()

    def _begin(self, config_text: str, manifest: Mapping[str, Any], populate: Callable[[Path], Any]) -> bool:
        """Prepares the directory beside its place and renames it there; False if something stands in its place."""
        self._require_closed()
        given = _given(manifest)
        head = {"schema_version": SCHEMA_VERSION, "config_sha256": config_sha256(config_text)}
        if os.path.lexists(self.path) and (not self.path.is_dir() or os.listdir(self.path)):
            return False
        staging = self.path.parent / f".tmp-{self.path.name}"
        _make_dir(staging.parent)
        with _disk(staging), suppress(FileExistsError):
            os.mkdir(staging)  # with pathlib's exist_ok it must still be there when the call ends
        fd = _lock(staging, self.path)
        if fd is None:
            return False
        try:
            _empty(staging)
            ancestor = populate(staging)
            _write_new(staging / "config.yaml", config_text.encode())
            whole = given | head | ({"ancestor": ancestor} if ancestor else {})
            _write_new(staging / "manifest.json", _json_bytes(whole))
            if ancestor and (problems := verify(staging)):
                raise CorruptError(ancestor["run"], problems)
            _sync(staging)
            try:
                os.rename(staging, self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _refused(self.path, 0, error) from error
                _abandon(staging)
                os.close(fd)
                return False
        except BaseException:
            with suppress(StoreError):
                _abandon(staging)
            os.close(fd)
            raise
        self._fd = fd
        self._identity = _json([SCHEMA_VERSION, head["config_sha256"], given])
        try:
            _sync(self.path.parent)
        except BaseException:
            self.close()
            raise
        return True

    def _is_over(self, config_text: str) -> bool:
        """Whether every round that the config asks for is committed."""
        n_rounds, last = _parse_config(config_text).get("n_rounds"), self.last_round()
        return isinstance(n_rounds, int) and last is not None and last >= n_rounds

    def _resume(self, config_text: str, manifest: Mapping[str, Any], allow_drift: bool) -> None:
        self._require_closed()
        given = _given(manifest)
        self._require_run()
        self._fd = _lock(self.path, self.path)
        try:
            self._require_run()
            problems = [problem for problem in verify(self.path) if problem.kind != "events"]
            if problems:
                raise CorruptError(self.path, problems)
            stored, old_text = self.manifest(), self.config_text()
            _check_config(self.path, old_text, config_text)
            changes = _changes(_own(stored), given)
            if self._is_over(config_text):
                changes = {}
            if changes and not allow_drift:
                raise ConfigChangedError(
                    f"packages, device, data, instruments and code must be those the run began with, got "
                    f"{len(changes)} change(s) at {self.path}:\n{_show(changes)}\nrestore them, or allow the drift, "
                    "which is then recorded"
                )
            if changes:
                last = self.last_round()
                record = {"before_round": 0 if last is None else last + 1, "changes": changes}
                kept = {key: stored[key] for key in _RESERVED if key in stored}
                kept["drift"] = [*stored.get("drift", []), record]
                _replace(self.path / "manifest.json", _json_bytes(given | kept))
            if old_text != config_text:
                _replace(self.path / "config.yaml", config_text.encode())
            self._clean()
            self._heal_events()
        except BaseException:
            self.close()
            raise
        self._identity = _json([SCHEMA_VERSION, stored["config_sha256"], given])

    def _clean(self) -> None:
        last = self.last_round()
        following = {f".tmp-{_part_name(0 if last is None else last + 1)}"}
        if not _parts(self.path):
            following.add(".tmp-baseline")
        for name in sorted(os.listdir(self.path)):
            if name.startswith(".tmp-") and name not in following:
                _remove(self.path / name)

    def _require_closed(self) -> None:
        if self._fd is not None:
            raise ValueError(f"store must be closed before it is opened again, got an open one at {self.path}")

    def _require_open(self) -> None:
        if self._fd is None:
            raise ValueError(f"store must be open for writing, got a closed one at {self.path}; call open() first")

    def _require_run(self) -> None:
        if not self._is_run():
            raise ValueError(
                f"run must be a directory with a manifest.json, got none at {self.path}; "
                "a new run needs an empty directory or none"
            )

    # Reading: whole files only, each checked against its hash.

    def config_text(self) -> str:
        """config.yaml: the resolved config, as last opened."""
        self._require_run()
        return _read(self.path / "config.yaml").decode()

    def manifest(self) -> dict[str, Any]:
        """manifest.json: what the caller gave, and schema_version, config_sha256, drift, ancestor.

        Raises:
          CorruptError: it is no JSON object, or cannot be read.
        """
        self._require_run()
        where = self.path / "manifest.json"
        try:
            manifest = json.loads(_read(where))
        except (ValueError, RecursionError) as error:
            said = f"must be JSON, got {error}"
        else:
            if isinstance(manifest, dict):
                return manifest
            said = f"must be a JSON object, got {type(manifest).__name__}"
        raise CorruptError(
            self.path, [Problem("manifest.json", "unreadable", said)], f"put {where} back from a copy of the run"
        )

    def rounds(self) -> list[int]:
        """Committed rounds, ascending; the baseline is not one."""
        return _rounds(self.path)

    def last_round(self) -> int | None:
        """Newest committed round; None before round 0."""
        return max(self.rounds(), default=None)

    def has_baseline(self) -> bool:
        """Whether baseline/ is committed."""
        return (self.path / "baseline").is_dir()

    def files(self, round_index: int) -> Files:
        """Committed files of a round: name -> {"sha256", "bytes"}. BASELINE (-1) is the baseline, here and below."""
        part = _part_name(round_index)
        self._require_run()
        if not (self.path / part).is_dir():
            raise ValueError(f"round must be committed, got {part} at {self.path}, which has rounds {self.rounds()}")
        return _read_manifest(self.path, part)[0]

    def read_bytes(self, round_index: int, name: str) -> bytes:
        """A committed file as it is.

        Raises:
          ValueError: if the round or the file is not there.
          CorruptError: if the file is not the one that was committed.
        """
        part = _part_name(round_index)
        return _load(self.path, part, self.path / part, self.files(round_index), name)

    def read_table(self, round_index: int, name: str) -> pa.Table:
        """A committed Parquet file, e.g. read_table(3, "samples.parquet"). Raises as read_bytes."""
        return _table(self.read_bytes(round_index, name))

    def read_json(self, round_index: int, name: str) -> Any:
        """A committed JSON file. Raises as read_bytes."""
        return json.loads(self.read_bytes(round_index, name))

    def read_jsonl(self, round_index: int, name: str) -> list[Any]:
        """A committed JSONL file, one value a line. Raises as read_bytes."""
        return [json.loads(line) for line in self.read_bytes(round_index, name).splitlines()]

    def adapter_path(self, round_index: int, name: str = "adapter") -> Path:
        """A committed directory whose files have just been checked, for a learner to load. Raises as read_bytes."""
        part, files = _part_name(round_index), self.files(round_index)
        inside = [file for file in files if file.startswith(f"{name}/")]
        if not inside:
            raise ValueError(f"directory must be in the round, got {name} at {part} of {self.path}")
        problems = [_compare(self.path / part, f"{part}/{file}", file, files[file]) for file in inside]
        if any(problems):
            raise CorruptError(self.path, [problem for problem in problems if problem])
        return self.path / part / name

    # Events: timings and warnings, never hashed.

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl: `event`, `time` (UTC) and the fields."""
        self._require_open()
        self._append({"event": kind, "time": _now()} | fields, wait=False)

    def _append(self, row: Mapping[str, Any], *, wait: bool) -> None:
        path, line = self.path / "events.jsonl", (_json(row) + "\n").encode()
        with _disk(path, len(line)):
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                start = os.fstat(fd).st_size
                try:
                    _write_all(fd, line)
                except OSError:
                    with suppress(OSError):
                        os.ftruncate(fd, start)
                    raise
                if wait:
                    os.fsync(fd)
            finally:
                os.close(fd)

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of events.jsonl; a torn last line is not one.

        Raises:
          CorruptError: if an earlier line is not JSON.
        """
        rows, problems = _events(self.path)
        if problems:
            raise CorruptError(self.path, problems)
        return rows

    def _heal_events(self) -> None:
        path = self.path / "events.jsonl"
        if not path.is_file():
            return
        raw = _read(path)
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with _disk(path):
                os.truncate(path, whole)

    # Writing.

    def preflight(self, n_bytes: int) -> None:
        """Raises StoreError if fewer than `n_bytes` are free where the run lives. Quotas are seen only on writing."""
        place = self.path
        while not place.exists():
            place = place.parent
        with _disk(place, n_bytes):
            free = shutil.disk_usage(place).free
        if free < n_bytes:
            raise StoreError(self.path, n_bytes, f"{n_bytes} bytes must be free, got {free}")

    @contextmanager
    def baseline(self) -> Iterator[OpenRound]:
        """Opens baseline/ as `round` opens a round; it must come before round 0, whose MANIFEST names its hash."""
        with self._write(BASELINE) as part:
            yield part

    @contextmanager
    def round(self, round_index: int) -> Iterator[OpenRound]:
        """Opens the next round; commits it when the block ends, and only if it ends without an exception.

        Raises:
          ValueError: if it is not the round after the last committed one.
        """
        if round_index < 0:
            raise ValueError(f"round_index must be >= 0, got {round_index}")
        with self._write(round_index) as part:
            yield part

    @contextmanager
    def _write(self, round_index: int) -> Iterator[OpenRound]:
        self._require_open()
        parts, part = _parts(self.path), _part_name(round_index)
        last = self.last_round()
        expected = BASELINE if round_index == BASELINE and not parts else (0 if last is None else last + 1)
        if round_index != expected or part in parts:
            raise ValueError(
                f"round_index must be {expected}, the first that is not committed, got {round_index} at {self.path}"
            )
        previous = _read_manifest(self.path, parts[-1])[2] if parts else None
        open_round = OpenRound(self, part, previous)
        try:
            yield open_round
        except BaseException:
            # Frees what a full disk needs most; the next start would remove it too.
            with suppress(StoreError):
                open_round._sweep()
            raise
        open_round._commit()


class OpenRound:
    """A round at work. Made by `RunStore.round` and `RunStore.baseline`."""

    def __init__(self, store: RunStore, part: str, previous: str | None):
        self._store, self._part, self._previous = store, part, previous
        self._root = store.path / f".tmp-{part}"
        self._dir, self._stages = self._root / "files", self._root / "stages"
        self._files: Files = {}  # written or taken over, by this store
        self._pending: set[str] = set()  # directories handed out and not yet hashed
        self._done: set[str] = set()  # stages
        self._stage_files: Files | None = None
        self._chain = _digest(_json([part, previous]), store._identity)
        self._found: dict[str, dict[str, Any]] = {}  # whole stages left by an interrupted run
        for directory in (self._root, self._dir, self._stages):
            if directory.is_symlink():
                _remove(directory)
            _make_dir(directory)
        self._find_stages()
        self._sweep()

    def stage(
        self,
        name: str,
        compute: Callable[[], T],
        *,
        write: Callable[[T], None],
        read: Callable[[], T],
        key: str = "",
    ) -> T:
        """Runs a stage, or reads back what it wrote before the run was interrupted.

        What is read back was computed from the same things: the same config, manifest, previous round, `key`, and the
        same bytes from every earlier stage of this round. `read` must return what `compute` would: that is the caller's
        promise, and what makes a resumed run equal to a straight one.

        Args:
          name: name of the stage, unique in the round.
          compute: does the work.
          write: stores its value through this object (write_table, write_json, write_jsonl, path_for).
          read: reads that value back through this object.
          key: anything else the value depends on.

        Raises:
          ValueError: if the stage has run already.
        """
        part, path = self._part, self._stages / f"{_checked(name)}.json"
        if name in self._done:
            raise ValueError(f"stage must run once in a round, got {name} again at {part}")
        if self._stage_files is not None:
            raise ValueError(f"stage must not run inside another, got {name} at {part}")
        wanted = _digest(self._chain, name, key)
        started = time.monotonic()
        found = self._found.get(name)
        reused = found is not None and found["key"] == wanted
        if found is not None and reused:
            files: Files = self._found.pop(name)["files"]
            self._files |= files
            value = read()
            self._store.reused.append((part, name))
        else:
            # Every later stage has this one in its key, so none of those left over can be wanted any more.
            self._forget_found()
            self._stage_files = {}
            try:
                value = compute()
                with _saving(self._dir):
                    write(value)
                self._take_directories()
                files = self._stage_files
            finally:
                self._stage_files = None
            _sync_all(self._dir)
            # Names the marker by rename: half a marker is no marker.
            _replace(path, _json_bytes({"key": wanted, "files": files}))
            self._store.computed.append((part, name))
        self._done.add(name)
        self._store.event("stage", part=part, stage=name, seconds=time.monotonic() - started, reused=reused)
        self._chain = _digest(wanted, _json(files))
        return value

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes name.parquet; equal rows give equal bytes whatever their chunks or metadata."""
        self._put(_checked(name, ".parquet"), _table_bytes(table))

    def write_json(self, name: str, value: Any) -> None:
        """Writes name.json with sorted keys. Raises ValueError for NaN or Inf: not measured is null."""
        self._put(_checked(name, ".json"), _json_bytes(value))

    def write_jsonl(self, name: str, rows: Iterable[Any]) -> None:
        """Writes name.jsonl, a mapping or dataclass a line, keys sorted. Raises as write_json."""
        self._put(_checked(name, ".jsonl"), _jsonl_bytes(rows))

    def path_for(self, name: str) -> Path:
        """Directory in the round for a writer of its own, e.g. a learner saving its adapter.

        Its files are hashed and made durable when the stage (or the round) ends; only SUFFIXES, only finite tensors.
        In a stage that is read back, the same call returns the directory to load from.
        """
        directory = self._dir / _checked(name)
        if not any(file.startswith(f"{name}/") for file in self._files):
            _make_dir(directory)
            self._pending.add(name)
        return directory

    def read_bytes(self, name: str) -> bytes:
        """A file of this round, written before; checked against its hash."""
        return _load(self._store.path, self._part, self._dir, self._files, name)

    def read_table(self, name: str) -> pa.Table:
        """A Parquet file of this round, written before."""
        return _table(self.read_bytes(name))

    def read_json(self, name: str) -> Any:
        """A JSON file of this round, written before."""
        return json.loads(self.read_bytes(name))

    def read_jsonl(self, name: str) -> list[Any]:
        """A JSONL file of this round, written before."""
        return [json.loads(line) for line in self.read_bytes(name).splitlines()]

    def _put(self, name: str, data: bytes) -> None:
        self._store._require_open()
        if name in self._files:
            raise ValueError(f"file must be written once in a round, got {name} again at {self._part}")
        _write_new(self._dir / name, data)
        self._add(name, _fingerprint(data))

    def _add(self, name: str, fingerprint: dict[str, Any]) -> None:
        self._files[name] = fingerprint
        if self._stage_files is not None:
            self._stage_files[name] = fingerprint

    def _take_directories(self) -> None:
        for name in sorted(self._pending):
            directory = self._dir / name
            inside = list(_walk(directory))
            if not inside:
                raise ValueError(f"directory must hold files once it is asked for, got none in {name} at {self._part}")
            for file in inside:
                path, where = directory / file, f"{self._part}/{name}/{file}"
                if path.is_symlink() or not path.is_file() or path.suffix not in SUFFIXES:
                    raise ValueError(f"file must be a regular {' or '.join(SUFFIXES)} file, got {where}")
                for piece in file.split("/"):
                    _checked(piece)
                if path.suffix == ".safetensors":
                    _require_finite(self._store.path, path, where)
                _sync(path)
                with _disk(path):
                    self._add(f"{name}/{file}", {"sha256": _sha256(path), "bytes": path.stat().st_size})
        self._pending.clear()

    def _find_stages(self) -> None:
        for marker in _walk(self._stages):
            path = self._stages / marker
            try:
                if marker.startswith(".tmp-") or path.is_symlink():
                    raise ValueError(f"marker {marker} must be whole")
                content = json.loads(_read(path))
                files = content["files"]
                # The names are joined to paths that may be removed: none may lead out of the round.
                strange = [name for name in files if not all(_FILE_NAME.fullmatch(piece) for piece in name.split("/"))]
                if strange or any(_compare(self._dir, name, name, files[name]) for name in files):
                    raise ValueError(f"files of {marker} must be whole")
                if not isinstance(content["key"], str):
                    raise ValueError(f"key of {marker} must be text")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                _remove(path)  # a stage cut short; it is computed again
            else:
                self._found[path.stem] = content

    def _forget_found(self) -> None:
        """Removes left-over stages: first the marker, then its files, or a kill between the two leaves half a stage."""
        for name, content in self._found.items():
            _remove(self._stages / f"{name}.json")
            for file in content["files"]:
                self._drop(file)
        self._found.clear()

    def _sweep(self) -> None:
        """Removes every file that no whole stage accounts for."""
        markers = [json.loads(_read(self._stages / m)) for m in _walk(self._stages) if not m.startswith(".tmp-")]
        kept = {name for content in markers for name in content["files"]}
        for name in list(_walk(self._dir)):
            if name not in kept:
                self._drop(name)

    def _drop(self, name: str) -> None:
        """Removes a file, and the directories it was the last one in."""
        path = self._dir / name
        _remove(path)
        for parent in path.parents:
            if parent == self._dir or os.listdir(parent):
                break
            _remove(parent)

    def _commit(self) -> None:
        store = self._store
        store._require_open()
        self._forget_found()
        self._take_directories()
        strangers = set(_walk(self._dir)) - self._files.keys()
        if strangers:
            raise ValueError(f"files must be written through the store, got {sorted(strangers)} at {self._part}")
        raw = _json_bytes({"files": self._files, "previous": self._previous})
        _write_new(self._dir / _MANIFEST, raw)
        _sync_all(self._dir)
        manifest_sha = hashlib.sha256(raw).hexdigest()
        # Before the rename: a commit that happened is then always on record, and one that did not is overruled later.
        store._append(_commit_row(self._part, manifest_sha), wait=True)
        n_bytes = sum(entry["bytes"] for entry in self._files.values())
        with _disk(store.path / self._part, n_bytes):
            os.rename(self._dir, store.path / self._part)
        _sync(store.path)
        _remove(self._root)


def _commit_row(part: str, manifest_sha: str) -> dict[str, Any]:
    return {"event": "commit", "time": _now(), "part": part, "manifest_sha256": manifest_sha}


def _digest(*texts: str) -> str:
    return hashlib.sha256(_json(texts).encode()).hexdigest()


def _checked(name: str, suffix: str = "") -> str:
    if not _FILE_NAME.fullmatch(name) or not name.endswith(suffix) or name == _MANIFEST:
        rule = f"a plain file name{' ending in ' + suffix if suffix else ''}, other than {_MANIFEST}"
        raise ValueError(f"name must be {rule}, got {name[:80]!r}")
    return name


def _sync_all(directory: Path) -> None:
    """Makes the entries of a directory and of those below it durable, deepest first."""
    with _disk(directory):
        below = sorted(path for name in os.listdir(directory) if _is_directory(path := directory / name))
    for path in below:
        _sync_all(path)
    _sync(directory)


@contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """A learner saves by itself; its disk errors are ours. safetensors hides the errno in its message."""
    try:
        yield
    except OSError as error:
        raise _refused(error.filename or directory, 0, error) from error
    except Exception as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if not hidden:
            raise
        name = errno.errorcode.get(int(hidden[1]), "no errno")
        raise StoreError(directory, 0, f"{error} ({name})") from error


def _require_finite(run: Path, path: Path, where: str) -> None:
    """Raises CorruptError if a safetensors file cannot be read or holds NaN or Inf."""
    problem = _tensor_problem(path, where)
    if problem:
        raise CorruptError(run, [problem], "nothing was committed; training must end in finite numbers")


def _tensor_problem(path: Path, where: str) -> Problem | None:
    try:
        bad = _not_finite(path)
    except ValueError as error:
        return Problem(where, "unreadable", f"must be a safetensors file: {error}")
    if bad:
        return Problem(where, "not_finite", f"must hold finite numbers, got NaN or Inf in {', '.join(bad[:5])}")
    return None


# --- fork, verify, repair ------------------------------------------------------------------------------------------


def fork(
    source: str | Path,
    round_index: int,
    new_dir: str | Path,
    config_text: str,
    manifest: Mapping[str, Any],
    *,
    allow_drift: bool = False,
) -> RunStore:
    """Begins a run that starts from round `round_index` of another, and holds its lock; or resumes that fork.

    The baseline and rounds 0..round_index are linked (copied where the file system cannot link) and hashed; their
    hashes stand in manifest.json under `ancestor`. The chain goes on through them. The source may be running.

    Args:
      source: run directory to start from.
      round_index: its round, committed.
      new_dir: run directory to begin.
      config_text, manifest: of the new run, as for `RunStore.create`.
      allow_drift: whether FORK_KEYS of the manifest may differ from the source's.

    Raises:
      ValueError: if the source has no such round, or `new_dir` is there and is no fork of it.
      ConfigChangedError: if FORK_KEYS differ.
      CorruptError: if the source's files are not as committed.
    """
    origin, new = RunStore(source), RunStore(new_dir)
    origin.files(round_index)  # raises if there is no such round
    if origin.path == new.path:
        raise ValueError(f"new_dir must be another directory than the source, got {new.path}")
    theirs, given = origin.manifest(), _given(manifest)
    changes = _changes({k: theirs.get(k) for k in FORK_KEYS}, {k: given.get(k) for k in FORK_KEYS})
    if changes and not allow_drift:
        raise ConfigChangedError(
            f"{' and '.join(FORK_KEYS)} of a fork must be its source's, got {len(changes)} change(s) at "
            f"{origin.path}:\n{_show(changes)}\nrestore them, or allow the drift"
        )
    parts = [part for part in _parts(origin.path) if _index(part) <= round_index]
    ancestor: dict[str, Any] = {
        "run": origin.path.name,
        "round": round_index,
        "config_sha256": theirs["config_sha256"],
        "manifests": {part: _read_manifest(origin.path, part)[2] for part in parts},
    }
    if changes:
        ancestor["drift"] = changes
    if "ancestor" in theirs:
        ancestor["ancestor"] = theirs["ancestor"]
    ancestor = json.loads(_json(ancestor))

    def populate(staging: Path) -> dict[str, Any]:
        for part in parts:
            for name in [*_read_manifest(origin.path, part)[0], _MANIFEST]:
                _link(origin.path / part / name, staging / part / name)
            _sync_all(staging / part)
        return ancestor

    if not new._is_run() and new._begin(config_text, manifest, populate):
        return new
    if new._is_run() and new.manifest().get("ancestor") == ancestor:
        return new.open(config_text, manifest, allow_drift=allow_drift)
    raise ValueError(
        f"new_dir must be new, or a fork of {origin.path} at round {round_index}, got {new.path}; choose another name"
    )


def _link(source: Path, target: Path) -> None:
    _make_dir(target.parent)
    if not source.is_file() or source.is_symlink():
        run = source.parent.parent
        raise CorruptError(run, [Problem(source.name, "missing", f"must be a file, got none at {source}")])
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise _refused(target, 0, error) from error
        _write_new(target, _read(source))


def verify(run_dir: str | Path) -> list[Problem]:
    """Checks a run directory against what was committed; returns what is wrong with it, in order, [] if nothing.

    Every file is hashed, every adapter read for NaN and Inf, the chain followed from baseline to the last round. Needs
    no lock: committed rounds stand still. Files beside the rounds (reports, notes) are not looked at.

    Raises:
      ValueError: if there is no run.
    """
    run = Path(os.path.abspath(run_dir))
    if not run.is_dir():
        raise ValueError(f"run must be a directory, got none at {run}; check the path")
    problems, manifest = _check_head(run)
    if any(problem.kind == "schema_version" for problem in problems):
        return problems  # of another version, so nothing below means what it means here
    rows, event_problems = _events(run)
    ancestor = manifest.get("ancestor", {}).get("manifests", {})
    expected = ancestor | {part: sha for part, sha in _committed(rows).items() if part not in ancestor}
    parts = _parts(run)
    problems += [Problem(part, "missing", "must be there, got none") for part in ancestor if part not in parts]
    previous: str | None = None
    known, next_round = True, 0
    for part in parts:
        if part != "baseline":
            index = _index(part)
            if index != next_round:
                problems.append(Problem(_part_name(next_round), "missing", f"must come before {part}, got none"))
                known = False
            next_round = index + 1
        found, sha = _check_part(run, part, previous, known)
        problems += found
        if sha and sha != expected.get(part, sha):
            detail = f"must have sha256 {expected[part][:12]}..., as recorded at its commit, got {sha[:12]}..."
            problems.append(Problem(f"{part}/{_MANIFEST}", "edited", detail))
        previous, known = sha, sha is not None
    return problems + event_problems


def _check_head(run: Path) -> tuple[list[Problem], dict[str, Any]]:
    where = "manifest.json"
    if not (run / where).is_file():
        return [Problem(where, "missing", "must be a file, got none")], {}
    try:
        manifest = json.loads(_read(run / where))
        version, sha = manifest["schema_version"], manifest["config_sha256"]
        for part, ancestor in manifest.get("ancestor", {}).get("manifests", {}).items():
            if not (part == "baseline" or _ROUND_NAME.fullmatch(part)) or not _SHA256.fullmatch(ancestor):
                raise ValueError(f"ancestor {part}: {ancestor}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [Problem(where, "unreadable", f"must be a run manifest, got {error!r}")], {}
    if version != SCHEMA_VERSION:
        detail = f"schema_version must be {SCHEMA_VERSION}, got {version!r}; read it with the release that wrote it"
        return [Problem(where, "schema_version", detail)], manifest
    where = "config.yaml"
    if not (run / where).is_file():
        return [Problem(where, "missing", "must be a file, got none")], manifest
    try:
        actual = config_sha256(_read(run / where).decode())
    except ValueError as error:
        return [Problem(where, "unreadable", str(error))], manifest
    if actual != sha:
        detail = f"must mean what it meant at the start (config_sha256 {str(sha)[:12]}...), got {actual[:12]}..."
        return [Problem(where, "config", detail)], manifest
    return [], manifest


def _check_part(run: Path, part: str, previous: str | None, known: bool) -> tuple[list[Problem], str | None]:
    """Checks one committed part; returns its problems and the sha256 of its MANIFEST (None if unreadable)."""
    directory = run / part
    if directory.is_symlink() or not directory.is_dir():
        return [Problem(part, "symlink", "must be a directory, got a link or a file")], None
    try:
        files, claimed, sha = _read_manifest(run, part)
    except CorruptError as error:
        return error.problems, None
    problems = []
    if known and claimed != previous:
        detail = f"previous must be {_short(previous)}, the sha256 of the MANIFEST before it, got {_short(claimed)}"
        problems.append(Problem(f"{part}/{_MANIFEST}", "chain", detail))
    for name, entry in sorted(files.items()):
        path, where = directory / name, f"{part}/{name}"
        if path.suffix not in SUFFIXES:
            kind = "pickle" if path.suffix in PICKLES else "type"
            problems.append(Problem(where, kind, f"must be {' or '.join(SUFFIXES)}; other files are never read"))
        problem = _compare(directory, where, name, entry)
        if problem:
            problems.append(problem)
        if path.suffix == ".safetensors" and (problem is None or problem.kind == "sha256"):
            broken = _tensor_problem(path, where)
            if broken:
                problems.append(broken)
    for name in _walk(directory):
        if name not in files and name != _MANIFEST:
            what = "a pickle, which is never read" if Path(name).suffix in PICKLES else "a file"
            problems.append(Problem(f"{part}/{name}", "extra", f"must not be there: {what} that was not committed"))
    return problems, sha


def _short(sha: str | None) -> str:
    return f"{sha[:12]}..." if sha else "null"


def _events(run: Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    path = run / "events.jsonl"
    if not path.is_file():
        return [], []
    rows, problems = [], []
    for number, line in enumerate(_read(path).split(b"\n")[:-1], start=1):  # what follows the last newline is torn
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except (ValueError, RecursionError):
            problems.append(Problem("events.jsonl", "events", f"line {number} must be JSON, got {line[:40]!r}"))
    return rows, problems


def _committed(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Hash of each part's MANIFEST as last committed, by the log; a part in quarantine has none."""
    out: dict[str, str] = {}
    for row in rows:
        if row.get("event") == "commit":
            out[str(row.get("part"))] = str(row.get("manifest_sha256"))
        elif row.get("event") == "quarantine":
            out.pop(str(row.get("part")), None)
    return out


def repair(run_dir: str | Path) -> list[str]:
    """Rolls a run back to its last good round; returns what it moved to quarantine/, oldest last, [] if all is well.

    A file that was never committed goes alone. Otherwise the first bad round goes with all that follow, because they
    were computed from it. Where the chain breaks between two rounds and the log does not tell which MANIFEST was
    edited, both go.

    Raises:
      ValueError: if there is no run.
      LockedError: if a process holds it.
      CorruptError: if what is wrong cannot be computed again: manifest.json, config.yaml, or rounds of a fork's source.
    """
    store = RunStore(run_dir)
    if not store.path.is_dir():
        raise ValueError(f"run must be a directory, got none at {store.path}; check the path")
    store._fd = _lock(store.path, store.path)
    with store:
        store._require_open()
        problems = verify(store.path)
        head = [p for p in problems if p.where in ("manifest.json", "config.yaml")]
        if head:
            raise CorruptError(
                store.path, head, "restore these files from a copy, or begin a new run: no round says them"
            )
        run = store.path
        if (run / "quarantine").is_symlink():
            raise ValueError(f"quarantine must be a directory, got a symlink at {run}; remove it")
        rows, _ = _events(run)
        ancestor = store.manifest().get("ancestor", {}).get("manifests", {})
        first = _first_bad(run, [p for p in problems if p.kind not in ("extra", "events")], _committed(rows) | ancestor)
        parts = _parts(run)
        bad = [part for part in parts if first is not None and _index(part) >= _index(first)]
        lost = [part for part in ancestor if first is not None and _index(part) >= _index(first)]
        if lost:
            raise CorruptError(
                run, problems, f"{', '.join(lost)} came by fork and cannot be computed here: fork the source again"
            )
        moved = [p.where for p in problems if p.kind == "extra" and p.where.split("/")[0] not in bad]
        moved += ["events.jsonl"] if any(p.kind == "events" for p in problems) else []
        # Newest first: a kill between two moves leaves a shorter run with the same first bad round.
        moved += reversed(bad)
        for name in moved:
            target = _free_place(run / "quarantine" / name)
            _make_dir(target.parent)
            with _disk(run / name):
                os.rename(run / name, target)
            _sync(target.parent)
            _sync((run / name).parent)
            store._append({"event": "quarantine", "time": _now(), "part": name}, wait=True)
        return moved


def _first_bad(run: Path, problems: Sequence[Problem], recorded: Mapping[str, str]) -> str | None:
    """Earliest part that cannot be kept, in the order of the chain; it may be missing."""
    parts = _parts(run)
    bad: list[str] = []
    for problem in problems:
        part = problem.where.split("/")[0]
        bad.append(part)
        if problem.kind == "chain" and part in parts and parts.index(part) > 0:
            before = parts[parts.index(part) - 1]
            if _read_manifest(run, before)[2] != recorded.get(before):
                bad.append(before)
        elif problem.kind == "chain" and part == "round_000":
            bad.append("baseline")  # it names one, and there is none
    return min(bad, key=_index, default=None)


def _free_place(path: Path) -> Path:
    place, number = path, 1
    while os.path.lexists(place):
        place, number = path.with_name(f"{path.name}.{number}"), number + 1
    return place

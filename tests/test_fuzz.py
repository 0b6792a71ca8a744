"""Strangers: what a config, a corpus, a run directory or a model's text may hold, thousands of times, at random.

Whatever they hold, the answer is a value or one clear line: no traceback, no control character on the terminal, no
file beside the one that was read. `make test` tries hundreds of inputs, `make faults` more than 100,000 (profile
"battery", chosen by HYPOTHESIS_PROFILE).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from loop import config, corpus, show
from loop.config import ConfigError
from loop.store import ConfigChangedError, CorruptError, LockedError, Problem, RunStore, repair, verify

ROOT = Path(__file__).resolve().parent.parent
SMOKE = (ROOT / "configs/smoke.yaml").read_text()
PARSED = yaml.safe_load(SMOKE)
BATTERY = os.environ.get("HYPOTHESIS_PROFILE") == "battery"

# Many small inputs: no database of examples, no deadline on a shared machine, and a failure is shrunk all the same.
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": not BATTERY,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
}


def inputs(battery: int) -> Any:
    """Settings for a property that sees `battery` inputs in the battery and a two-hundredth of them otherwise."""
    return settings(max_examples=battery if BATTERY else max(30, battery // 200), **COMMON)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest, record_property: Any) -> Any:
    """For docs/reliability.md: how many inputs the test saw."""
    TRIED.clear()
    yield
    record_property("faults", len(TRIED) or 1)
    record_property("happened", "a value, or exit 2 and one printable line; nothing written")


TRIED: list[None] = []


def is_one_line(text: str) -> bool:
    """Whether a terminal shows it as one line and does nothing else."""
    return "\n" not in text and not any(unicodedata.category(c) in ("Cc", "Cs") or c in BIDI for c in text)


BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def refused(error: ConfigError) -> None:
    assert error.exit_code == 2
    assert error.problems
    for problem in error.problems:
        assert is_one_line(problem), ascii(problem)
        assert len(problem) < 3000


# --- configs ---

SCALARS = st.one_of(
    st.sampled_from(
        ["1e-4", "no", "off", "yes", "~", "null", "true", ".nan", ".inf", "-.inf", "1_000", "0x1F", "010", "1:30", "=",
         "2001-01-01", "2001-99-99", "!!python/object/new:x [x]", "!!binary aGk=", "!!int x", "<<", "*a", "&a",
         "9" * 400, "9" * 5000, "-" + "9" * 20, "1e999", "[]", "{}", "{a: {a: {a: 1}}}", "'", '"\\e[2J"', '"\\0"',
         '"\\ud800"', "|", ">", "? ", "%", "@", "`", "\t", "---", "...", "# x", "../../etc/passwd", "/dev/zero",
         "[" * 40 + "]" * 40, "[" * 3000, "a" * 3000]
    ),
    st.text(max_size=12),
    st.floats().map(repr),
    st.integers().map(str),
)  # fmt: skip
FIELDS = sorted(config._fields_at(())) + [
    f"{name}.{inner}" for name in sorted(config._fields_at(())) for inner in sorted(config._fields_at((name,)))
]
KEYS = st.one_of(st.sampled_from(FIELDS), st.text(max_size=8), st.just("real.shares.nova"), st.just("a.b.c"))


def load(place: Path, data: bytes, overrides: list[str] = []) -> None:  # noqa: B006
    """Loads a config from bytes; what loads, means the same when it is written and read again."""
    TRIED.append(None)
    path = place / "x.yaml"
    path.write_bytes(data)
    before = sorted(p.name for p in place.iterdir())
    try:
        loaded = config.load(path, overrides)
    except ConfigError as error:
        refused(error)
    else:
        text = config.to_yaml(loaded)
        again = config.from_text(text, where="again")
        assert config.to_yaml(again) == text
        assert RunStore(place / loaded.run_name).path.parent == place
    assert sorted(p.name for p in place.iterdir()) == before


@given(st.lists(st.tuples(KEYS, SCALARS), min_size=1, max_size=4))
@inputs(4_000)
@example([("name", '"\\e]0;x"')])
@example([("seed", "9" * 5000)])
@example([("real.shares", "&a [*a]")])
@example([("real.shares", "&a {nova: *a}")])
@example([("virality.audience", "'x\n\x1b[2J.py:f'")])
@example([("\x1b[2J\n", "1")])
@example([("none", "1e-4")])
@example([(".", "1e-4")])
def test_any_override_is_taken_or_refused_in_a_line(place, overrides):
    TRIED.append(None)
    given_ = [f"{key}={value}" for key, value in overrides]
    try:
        loaded = config.load(ROOT / "configs/smoke.yaml", given_)
    except ConfigError as error:
        refused(error)
    else:
        assert config.to_yaml(config.from_text(config.to_yaml(loaded), where="again")) == config.to_yaml(loaded)


LINES = SMOKE.splitlines()


@st.composite
def mangled(draw: Any) -> bytes:
    """The smoke config with lines doubled, dropped, moved, or their value replaced."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        what = draw(st.sampled_from(["double", "drop", "value", "insert", "indent"]))
        if what == "double":
            lines.insert(at, lines[at])
        elif what == "drop":
            del lines[at]
        elif what == "value":
            lines[at] = lines[at].partition(":")[0] + ": " + draw(SCALARS)
        elif what == "insert":
            lines.insert(at, draw(KEYS) + ": " + draw(SCALARS))
        else:
            lines[at] = " " + lines[at]
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = draw(st.sampled_from(["", "\ufeff"])) + end.join(lines)
    return text.encode("utf-8", "surrogatepass")


@given(mangled())
@inputs(3_000)
def test_any_edit_of_a_config_is_taken_or_refused_in_a_line(place, data):
    load(place, data)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


BYTES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(encoded),
    st.lists(SCALARS, max_size=6).map("\n".join).map(encoded),
)


@given(BYTES)
@inputs(36_000)
@example(b"a: &a [*a]")
@example(b"&a a: *a")
@example(b"? [1]\n: 2")
@example(b"? {a: b}\n: 2")
@example(b'"a\\nb": 1\n"a\\nb": 2')
@example(b'"\\e[2J": 1\n"\\e[2J": 2')
@example(b"[" * 5000)
@example(b"{a: " * 5000)
@example(b"- " * 2000)
@example(b"a: " + b"9" * 5000)
@example(b"a: !!float x")
@example(b"a: !!timestamp x")
@example(b"a: 2001-99-99")
@example(b"\x00")
@example(b"%YAML 9.9\n---\na: 1")
def test_any_bytes_for_a_config_are_refused_in_a_line(place, data):
    load(place, data)


def test_a_config_bomb_and_an_endless_file_are_refused_at_once(place):
    laughs = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i + 1, i + 1, i, i) for i in range(97, 121))
    deep = [b"[" * 50_000, b"{a: " * 30_000, b"- " * 50_000]
    for data in (laughs, *deep, b"#" * (config.MAX_BYTES + 1), b"a: 1\n" * 2000):
        load(place, data)
    for path in (Path("/dev/zero"), place, place / "none\0.yaml", place / ("x" * 300), Path("/dev/null")):
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        refused(caught.value)


@given(
    st.one_of(st.text(max_size=80), st.sampled_from(["../x", "/etc", "a/b", "CON", "-x", ".", "..", "a\0", "x" * 300]))
)
@inputs(20_000)
@example("0\n")
def test_a_run_name_is_plain_or_refused_and_never_leads_out_of_its_folder(place, name):
    TRIED.append(None)
    try:
        loaded = config.validate(PARSED | {"name": name})
    except ConfigError as error:
        refused(error)
        assert not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)
    else:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)
        assert RunStore(place / loaded.run_name).path.parent == place


# --- corpora ---

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["completion", "text", "prompt", "persona", "id", "conversation", "other"])
ROWS = st.dictionaries(COLUMNS, JSON, max_size=4)
GOOD = st.fixed_dictionaries(
    {"completion": st.text(min_size=1, max_size=8)},
    optional={
        "prompt": st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3)),
        "id": st.integers(0, 3),
    },
)
LINE = st.one_of(
    st.one_of(GOOD, ROWS).map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=30),
    st.sampled_from(
        [b"", b"\xef\xbb\xbf", b"\0", b"[" * 3000, b"{" * 50, b'{"completion": NaN}', b'{"completion": "\\ud800"}',
         b'{"completion": "a\\u0000"}', b'{"completion": "\\u001b]0;x"}', b'{"id": 1e999, "completion": "a"}',
         b'{"completion": "a", "id": ' + b"9" * 5000 + b"}", b'{"\\u001b[2J\\n": 1}', b"nul", b"\x1b[2J"]
    ),
)  # fmt: skip


def read(path: Path, **options: Any) -> list[corpus.Document]:
    """Reads a corpus, or asserts that it is refused in one line."""
    TRIED.append(None)
    before = sorted(p.name for p in path.parent.iterdir())
    try:
        documents, said = corpus.read(path, **options), ""
    except ValueError as error:
        documents, said = [], str(error)
    assert sorted(p.name for p in path.parent.iterdir()) == before
    assert is_one_line(said), ascii(said)
    assert len(said) < 3000
    assert bool(documents) != bool(said)
    assert len({d.id for d in documents}) == len(documents)
    for document in documents:
        for text in (document.completion, *(document.prompt or ())):
            assert text.strip()
            assert "\0" not in text
            text.encode()
        assert document.prompt is None or len(document.prompt) % 2 == 1
        assert document.source == "real"
    return documents


@given(st.lists(LINE, max_size=4), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
@inputs(33_000)
def test_any_jsonl_is_read_or_refused_in_a_line(place, lines, end, mark):
    path = place / "own.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(lines))
    read(path)


@given(st.data())
@inputs(4_000)
def test_any_parquet_is_read_or_refused_in_a_line(place, data):
    names = data.draw(st.lists(COLUMNS, unique=True, max_size=4))
    n = data.draw(st.integers(0, 3))
    kinds = {
        "text": st.text(max_size=5), "texts": st.lists(st.text(max_size=5), max_size=3), "int": st.integers(-9, 9),
        "float": st.floats(), "bytes": st.binary(max_size=5), "struct": st.fixed_dictionaries({"a": st.integers(0, 3)}),
    }  # fmt: skip
    columns = {}
    for name in names:
        kind = kinds[data.draw(st.sampled_from(sorted(kinds)))]
        columns[name] = data.draw(st.lists(st.one_of(st.none(), kind), min_size=n, max_size=n))
    path = place / "own.parquet"
    try:
        pq.write_table(pa.table(columns), path)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):  # a surrogate, which Arrow does not write
        return
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, 8]))]))
    read(path)


def test_a_line_of_a_hundred_megabytes_is_refused_before_it_is_held(place):
    path = place / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"completion": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')
    with pytest.raises(ValueError, match=r"line must be <= 10000000 bytes, got more at .*long\.jsonl:1"):
        corpus.read(path)


def bomb(path: Path, rows: int, size: int) -> None:
    """A small Parquet file of `rows` times one text of `size` characters: a dictionary of one entry."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["a" * size]))
    pq.write_table(pa.table({"completion": column}), path, compression="zstd", use_dictionary=True)


@pytest.mark.parametrize(("rows", "size"), [(2_000, 1_000_000), (20_000_000, 1), (3, 50_000_000)])
def test_a_parquet_bomb_is_refused_by_what_it_would_hold(place, rows, size):
    path = place / "bomb.parquet"
    bomb(path, rows, size)
    assert path.stat().st_size < 5_000_000
    with pytest.raises(ValueError, match=r"must be at most .* at .*bomb\.parquet"):
        corpus.read(path)


def test_a_source_that_is_no_file_is_refused_in_a_line(place):
    (place / "folder.jsonl").mkdir(exist_ok=True)
    for name in ("folder.jsonl", "folder.parquet"):
        (place / name).mkdir(exist_ok=True)
        with pytest.raises((ValueError, OSError)) as caught:
            corpus.read(place / name)
        assert is_one_line(str(caught.value))


# --- a run directory somebody sent ---

RUN = "name: toy\nseed: 0\nn_rounds: 3\n"
HARD = st.one_of(
    st.binary(max_size=80),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [b"", b"{}", b"[]", b"null", b"0", b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"9" * 5000, b"\xff", b"\0",
         b"a: &a [*a]", b"a: &a {b: *a}", b"- " * 5000, b"a: 2001-99-99", b'{"files": {"../x": {}}, "previous": null}',
         b'{"files": [], "previous": 3}', b'{"files": {"a": null}, "previous": null}', b"\x1b[2J",
         b'{"schema_version": 1, "config_sha256": "\\u001b[2J", "ancestor": {"manifests": {"\\u001b[2J": "0"}}}']
    ),
)  # fmt: skip
FILES = ["config.yaml", "manifest.json", "events.jsonl", "baseline/MANIFEST.json", "round_000/MANIFEST.json",
         "round_000/state.json", ".tmp-round_001/stages/sample.json", "round_000/\x1b[2J", ".lock"]  # fmt: skip


def begin(run: Path) -> None:
    with RunStore(run).create(RUN, {"packages": {}}) as store:
        for k in (-1, 0):
            with store._write(k) as part:
                part.write_json("state.json", {"round": k})
        with suppress(KeyboardInterrupt), store.round(1) as part:
            part.stage("sample", lambda: 1, write=lambda v: part.write_json("a.json", v), read=lambda: 1)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round, with a stage of the next."""
    place = tmp_path_factory.mktemp("sent")
    begin(place / "toy-s0")
    (place / "mine.json").write_text("{}")
    return place


def try_all(run: Path) -> None:
    """Verifies, resumes and repairs a run, or asserts that each is refused in printable lines."""

    def resume() -> None:
        with RunStore(run).open(RUN, {"packages": {}}) as store:
            for k in store.rounds()[-1:]:
                with store.round(k + 1) as part:
                    part.write_json("a.json", 1)

    for attempt in (lambda: verify(run), resume, lambda: repair(run), lambda: RunStore(run).events()):
        try:
            found = attempt()
        except (CorruptError, ConfigChangedError, LockedError, ValueError) as error:
            said, code = str(error), getattr(error, "exit_code", 2)
        else:
            said, code = "\n".join(str(p) for p in found or () if isinstance(p, Problem)), 3
        assert code in (2, 3)
        assert all(is_one_line(line) for line in said.split("\n")), ascii(said)


@given(st.lists(st.tuples(st.sampled_from(FILES), HARD), min_size=1, max_size=2))
@inputs(3_000)
def test_any_bytes_in_any_file_of_a_run_are_survived_and_nothing_beside_it_is_touched(sent, changes):
    TRIED.append(None)
    run = sent / "work-s0"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sent / "toy-s0", run)
    for name, data in changes:
        (run / name).write_bytes(data)
    try_all(run)
    assert sorted(p.name for p in sent.iterdir()) == ["mine.json", "toy-s0", "work-s0"]
    assert (sent / "mine.json").read_text() == "{}"


# --- what a terminal is shown ---


@given(
    st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x07\x9b\r\n\0\u202e\ud800[];2J")), max_size=40)
)
@inputs(16_000)
def test_text_of_a_model_is_shown_on_one_line_and_moves_nothing(text):
    TRIED.append(None)
    shown = show.printable(text)
    assert not any(unicodedata.category(c) == "Cc" or c in BIDI for c in shown)
    assert len(show.printable(text, 10)) <= 10
    if set(text) <= set(string.ascii_letters):
        assert shown == text

"""Tests of track.py: the W&B mirror against the files it mirrors, read back with W&B's own reader; no network."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from loop import config, run, sweep, track
from loop.show import printable
from loop.store import RunStore

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
SMALL = ["mix.n_train=60", "virality.posts_per_sample=20", "toy.n_documents=40", "sample.n_samples=260"]


@pytest.fixture(autouse=True, scope="module")
def secluded(tmp_path_factory):
    """No key, no server, none of the user's W&B settings; W&B's caches in a folder of the test."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("NETRC", str(folder / "none"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
        yield patch


def play(folder, *overrides, **given):
    """Plays the smoke config in a folder of its own, so that config.yaml names the same runs_dir everywhere."""
    folder.mkdir()
    with contextlib.chdir(folder):
        return folder / run.play(config.load(SMOKE, [*SMALL, *overrides]), **given)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    return play(tmp_path_factory.mktemp("untracked") / "x")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    return play(tmp_path_factory.mktemp("tracked") / "x", mirror=track.Beside)


@pytest.fixture
def copied(untracked, tmp_path):
    """A run that a test may mirror beside."""
    return Path(shutil.copytree(untracked, tmp_path / "runs" / untracked.name))


def tree(run_dir):
    return {
        str(f.relative_to(run_dir)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(run_dir.rglob("*"))
        if f.is_file() and f.name not in ("events.jsonl", ".lock")
    }


def mirrors(run_dir):
    return sorted((run_dir.parent / "wandb").glob("*run-*-*-s0-*"))


def writers_of(pid):
    """W&B's own processes of a mirror that are at work; they outlive it for a moment."""
    found = []
    for seen in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--pid\0{pid}\0".encode() in seen.read_bytes():  # a zombie's is empty
                found.append(int(seen.parent.name))
    return found


def records(run_dir):
    """The one offline log beside a run, as `wandb leet inspect` reads it."""
    (folder,) = mirrors(run_dir)
    (log,) = folder.glob("*.wandb")
    return inspected(log, log.stat().st_mtime_ns)


@functools.cache
def inspected(log, _):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(run_dir):
    return [r["history"]["item"] for r in records(run_dir) if r["type"] == "history"]


def expected(run_dir, part):
    out = {}
    for line in (run_dir / part / "metrics.jsonl").read_text().splitlines():
        m = json.loads(line)
        head = m["population"] if m["stratum"] is None else f"{m['population']}_{m['stratum']}"
        out[f"{head}/{m['name']}"] = m["value"]
        for side in ("low", "high"):
            if m[side] is not None:
                out[f"{head}/{m['name']}/{side}"] = m[side]
    return out


PARTS = ["baseline", "round_000", "round_001", "round_002"]


def test_a_tracked_run_leaves_the_bytes_of_an_untracked_one(tracked, untracked):
    assert tree(tracked) == tree(untracked)
    assert not [e for e in RunStore(tracked).events() if e["event"] == "warning"]


def test_the_offline_log_holds_each_value_of_metrics_jsonl_and_no_other(tracked):
    rows = history(tracked)
    assert len(rows) == len(PARTS)
    ours = ("round_index", "manifest_sha256", "candidates/count", "texts", "figures", "_")
    for part, got in zip(PARTS, rows, strict=True):
        want = expected(tracked, part)
        assert {k: v for k, v in got.items() if not k.startswith(ours)} == want
        assert "probes/frequency/nova" in want
        assert "probes_private/belief/low" in want
    # Not measured is null, never 0 and never left out.
    assert rows[0]["probes/kl_to_base"] == expected(tracked, "baseline")["probes/kl_to_base"]
    assert any(v is None for v in rows[3].values())


def test_charts_run_over_the_round_index_and_each_row_names_the_manifest_it_mirrors(tracked):
    log = records(tracked)
    axes = [r["metric"] for r in log if r["type"] == "metric"]
    assert [(a.get("name"), a.get("glob_name"), a.get("step_metric")) for a in axes] == [
        ("round_index", None, None),
        (None, "*", "round_index"),
    ]
    rows = [r["history"]["item"] for r in log if r["type"] == "history"]
    assert [r["round_index"] for r in rows] == [-1, 0, 1, 2]
    for part, row in zip(PARTS, rows, strict=True):
        assert row["manifest_sha256"] == hashlib.sha256((tracked / part / "MANIFEST.json").read_bytes()).hexdigest()


def test_the_log_names_the_run_its_arm_and_its_resolved_config(tracked):
    (head,) = [r["run"] for r in records(tracked) if r["type"] == "run"]
    assert (head["display_name"], head["run_group"], head["project"]) == ("smoke-s0", "smoke", "persona-loop")
    assert head["run_id"].startswith("smoke-s0-")
    said = head["config"]["update"]
    assert {k: v for k, v in said.items() if k not in ("_wandb", "made_with")} == yaml.safe_load(
        (tracked / "config.yaml").read_text()
    )
    assert said["made_with"]["packages"] == json.loads((tracked / "manifest.json").read_text())["packages"]


def test_the_table_of_texts_holds_at_most_200_and_some_of_every_persona_in_every_tenth_of_attention(tracked):
    (table,) = (mirrors(tracked)[0] / "files" / "media" / "table").glob("texts_3_*.json")
    shown = json.loads(table.read_text())
    assert tuple(shown["columns"]) == track.TEXT_COLUMNS
    rows = {row[0]: dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]}
    assert len(rows) == len(shown["data"]) == 200
    part = tracked / "round_002"
    samples = {r["id"]: r for r in pq.read_table(part / "samples.parquet").to_pylist()}
    assert len(samples) == 260
    labels = {
        r["id"]: r["persona"]
        for r in pq.read_table(part / "labels.parquet").to_pylist()
        if r["population"] == "samples" and r["instrument"] == "persona"
    }
    exposure = pq.read_table(part / "exposure.parquet")
    ids, weight = exposure.column("id").to_pylist(), exposure.column("weight").to_numpy()
    for i, row in rows.items():
        assert row["completion"] == printable(samples[i]["completion"])
        assert row["persona"] == labels[i]
        assert row["weight"] == (weight[ids.index(i)] if i in ids else None)
        assert (row["rejected"] is None) == (i in ids)
    # Ranked by weight, equal weights by id: the tenth of rank k of n is floor(10 k / n).
    rank = np.argsort(np.lexsort((ids, weight)))
    tenth = {i: int(10 * k // len(ids)) for i, k in zip(ids, rank, strict=True)}
    cells = {(labels[i], tenth.get(i)) for i in samples}
    assert 30 < len(cells) < 200
    assert {(labels[i], tenth.get(i)) for i in rows} == cells


def test_the_newest_round_has_the_ledger_drawn(untracked, tmp_path):
    drawn = track.figures(RunStore(untracked), 2, tmp_path)
    assert [p.name for p in drawn] == ["ledger.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")
    assert track.figures(RunStore(untracked), 0, tmp_path) == []  # a ledger is of two rounds


def test_text_of_a_model_reaches_a_table_without_control_characters(untracked, monkeypatch):
    plain = RunStore.read_table

    def hostile(self, t, name):
        table = plain(self, t, name)
        if name != "samples.parquet":
            return table
        k = table.column_names.index("completion")
        return table.set_column(k, "completion", [["\x1b]0;owned\x07 hi\n"] * len(table)])

    monkeypatch.setattr(RunStore, "read_table", hostile)
    assert {row[-1] for row in track.texts(RunStore(untracked), 2)} == {"\ufffd]0;owned\ufffd hi"}


def test_candidate_personas_are_counted_and_shown_without_control_characters(untracked, monkeypatch):
    group = {"name": "r002-candidate0", "size": 9, "share": 0.1, "unknown": 0.8, "words": ["tea", "\x1bpot"]}
    group |= {"typical_ids": ["r002-s000001"], "typical_texts": ["one\ncup", "two"], "growth": [None, 0.1]}
    monkeypatch.setattr(RunStore, "read_json", lambda self, t, name: [group])
    logged = track._extras(Server(0, None, ""), RunStore(untracked), 2, None)
    assert logged["candidates/count"] == 1
    table = logged["candidates/table"]
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == {
        "name": "r002-candidate0", "size": 9, "share": 0.1, "unknown": 0.8,
        "words": "tea | \ufffdpot", "typical_texts": "one cup | two",
    }  # fmt: skip
    monkeypatch.setattr(RunStore, "files", lambda self, t: {})
    assert track.candidates(RunStore(untracked), 2) is None


# Healing and resuming


def test_a_mirror_killed_half_way_is_healed_by_a_replay_and_a_replay_again_changes_nothing(copied, monkeypatch):
    command = [sys.executable, "-m", "loop.track", str(copied)]
    half = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    while not mirrors(copied):
        assert half.poll() is None
        time.sleep(0.05)
    os.killpg(half.pid, signal.SIGKILL)
    half.wait()
    half.stdin.close()
    while writers_of(half.pid):  # killed too: W&B's own process has a session of its own
        for pid in writers_of(half.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    before = tree(copied)
    command = [sys.executable, "-m", "loop", "track", str(copied)]
    whole = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said, _ = whole.communicate(timeout=60)
    assert whole.returncode == 0
    while writers_of(whole.pid):  # one that is still closing its files would make the folder anew once it is removed
        time.sleep(0.05)
    (first,) = mirrors(copied)
    assert f"{first.name}` shows it" in said
    assert [r["round_index"] for r in history(copied)] == [-1, 0, 1, 2]
    monkeypatch.setenv("WANDB_DATA_DIR", str(copied.parent / "tables"))
    track.mirror(copied)
    (second,) = mirrors(copied)
    assert second.name > first.name  # both begin with the time
    assert [r["round_index"] for r in history(copied)] == [-1, 0, 1, 2]
    assert tree(copied) == before


def test_a_run_that_is_killed_leaves_a_whole_mirror_of_what_it_committed(tmp_path):
    command = [sys.executable, "-m", "loop", "run", str(SMOKE), *SMALL, "n_rounds=300", "--track", "wandb"]
    playing = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while "round 2 mix" not in playing.stderr.readline():
        pass
    playing.kill()
    playing.wait()
    playing.stderr.close()
    run_dir = tmp_path / "runs" / "smoke-s0"
    deadline = time.monotonic() + 90
    logs = (run_dir.parent / "wandb").glob
    while not (list(logs("*/*.wandb")) and any(r["type"] == "exit" for r in records(run_dir))):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    rounds = RunStore(run_dir).rounds()
    assert len(rounds) >= 2
    assert [r["round_index"] for r in history(run_dir)] == [-1, *rounds]


class Server:
    """Stands for W&B with a server: one run, which held `n` rows when it was opened."""

    Error = RuntimeError

    def __init__(self, n, held, where):
        self.step, self.resumed, self.offline, self.id, self.url = n, n > 0, False, "x", "https://there"
        self.summary = {"manifest_sha256": held}
        self.settings = type("S", (), {"sync_dir": str(where)})
        self.rows, self.given, self.finished = [], {}, False

    def init(self, **given):
        self.given = given
        return self

    def log(self, values):
        self.rows.append(values)

    def Settings(self, **given):
        return given

    def Table(self, **given):
        return given

    def Image(self, path):
        return path

    def define_metric(self, *_, **__):
        pass

    def finish(self):
        self.finished = True


def server(monkeypatch, tmp_path, n, held):
    fake = Server(n, held, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(track, "_wandb", lambda: fake)
    return fake


def test_on_a_server_the_run_of_that_id_is_resumed_and_gets_the_rounds_it_lacks(copied, monkeypatch, tmp_path):
    held = hashlib.sha256((copied / "round_000" / "MANIFEST.json").read_bytes()).hexdigest()
    fake = server(monkeypatch, tmp_path, 2, held)
    found = track.mirror(copied)
    assert [r["round_index"] for r in fake.rows] == [1, 2]
    assert (fake.given["id"], fake.given["resume"]) == (track.run_id(RunStore(copied)), "allow")
    assert (found, fake.finished) == (track.Mirrored("https://there", True, None), True)


@pytest.mark.parametrize(("n", "held"), [(2, "0" * 64), (9, "0" * 64)])
def test_a_run_of_that_id_with_another_history_is_left_as_it_is(copied, monkeypatch, tmp_path, n, held):
    fake = server(monkeypatch, tmp_path, n, held)
    with pytest.raises(ValueError, match=r"^W&B run must mirror .*, got rounds of another at https://there; delete it"):
        track.mirror(copied)
    assert (fake.rows, fake.finished) == ([], True)


def test_more_rounds_keep_the_id_and_another_round_zero_or_config_does_not(untracked, copied, tmp_path):
    ident = track.run_id(RunStore(untracked))
    shutil.rmtree(copied / "round_002")
    assert track.run_id(RunStore(copied)) == ident
    longer = play(tmp_path / "longer", "n_rounds=1")
    assert track.run_id(RunStore(longer)) == ident
    other = play(tmp_path / "other", "n_rounds=1", "mix.real_share=0.2")
    assert tree(other / "round_000") == tree(longer / "round_000")
    assert track.run_id(RunStore(other)) != ident


# W&B absent, broken, hanging, out of reach


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise ImportError('no wandb here')", "tracking needs the package wandb, got no wandb here; pip install"),
        ("def __getattr__(name): raise RuntimeError('wandb is broken')", "RuntimeError: wandb is broken"),
        ("import sys; sys.exit('wandb: fatal')", "wandb: fatal"),
        ("import time; time.sleep(600)", "no answer within 3 s"),
    ],
)
def test_wandb_that_fails_or_hangs_costs_a_run_one_warning(untracked, tmp_path, monkeypatch, module, said):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(module + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    if "sleep" in module:
        monkeypatch.setattr(track, "GRACE", 3.0)
    notes = []
    run_dir = play(
        tmp_path / "x",
        mirror=track.Beside,
        report=lambda kind, **f: notes.append(f["text"]) if kind == "note" else None,
    )
    assert tree(run_dir) == tree(untracked)
    warnings = [e["text"] for e in RunStore(run_dir).events() if e["event"] == "warning"]
    assert len(warnings) == 1
    assert warnings == notes
    assert said in warnings[0]
    assert warnings[0].endswith(f"`loop track {Path('runs') / 'smoke-s0'}` replays it")


def test_a_mirror_that_cannot_be_started_costs_a_run_one_warning(untracked, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    run_dir = play(tmp_path / "x", mirror=track.Beside)
    assert tree(run_dir) == tree(untracked)
    (warning,) = [e["text"] for e in RunStore(run_dir).events() if e["event"] == "warning"]
    assert "No such file" in warning


def test_a_cell_of_a_sweep_has_its_mirror_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    loaded = config.load(SMOKE, [*SMALL, f"runs_dir={tmp_path / 'runs'}", "n_rounds=1"])
    for on in (True, False):
        cell = loaded.model_copy(update={"name": f"track-{on}"})
        assert sweep.play_cell(sweep.Task(sweep._text(cell), None, 0, False, False, track=on)).reason is None
        events = RunStore(tmp_path / "runs" / f"track-{on}-s0").events()
        assert any("W&B mirror" in str(e.get("text")) for e in events) is on


def test_a_server_out_of_reach_leaves_a_whole_offline_mirror_that_says_so(copied, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(track, "INIT_SECONDS", 2)
    monkeypatch.setenv("WANDB_DATA_DIR", str(copied.parent / "tables"))
    found = track.mirror(copied)
    assert not found.online
    assert "the server did not open the run" in found.reason
    assert [r["round_index"] for r in history(copied)] == [-1, 0, 1, 2]


def test_two_mirrors_of_one_run_at_once_are_refused(copied, monkeypatch):
    from filelock import FileLock

    folder = track.home(copied)
    folder.mkdir()
    with (
        FileLock(folder / f".{track.run_id(RunStore(copied))}.lock"),
        pytest.raises(ValueError, match="mirrored by one process, got another"),
    ):
        track.mirror(copied)


def test_tracking_that_is_switched_off_or_has_no_round_says_so(copied, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ValueError, match=r"^WANDB_MODE must be online or offline, got disabled"):
        track.mirror(copied)
    for t in range(3):
        shutil.rmtree(copied / f"round_{t:03d}")
    with pytest.raises(ValueError, match=r"^run must have a committed round, got none at"):
        track.mirror(copied)


def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path, monkeypatch):
    assert not track.has_key()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "b" * 40 + "\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert track.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not track.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    assert track.has_key()


# The command


def test_help_imports_no_wandb_and_an_unknown_tracker_is_refused(tmp_path):
    probe = """
import sys
from loop.__main__ import main
sys.argv = ["loop", "--help"]
try:
    main()
except SystemExit:
    assert not {"wandb", "wandb_workspaces", "loop.track"} & set(sys.modules), "heavy import"
"""
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    command = [sys.executable, "-m", "loop", "run", str(SMOKE), "--track", "mlflow"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "wandb" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dashboard_without_a_key_is_refused_before_anything_is_written(copied):
    command = [sys.executable, "-m", "loop", "track", str(copied), "--dashboard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--dashboard must have a server to be saved on, got no W&B key" in done.stderr
    assert not mirrors(copied)


# The dashboard


pydantic_v1 = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # wandb-workspaces' own


@pytest.fixture
def offline_only(monkeypatch):
    def refuse(*_):
        raise AssertionError("a dashboard is built without a network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def panels(built):
    """Section -> its panels, as the spec that would be sent says them."""
    sections = built._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"]["panelBankConfig"]
    return {s["name"]: s["panels"] for s in sections["sections"]}


def metrics(panel):
    return [*panel["config"].get("metrics", []), *panel["config"].get("mediaKeys", [])]


def test_a_number_that_is_never_measured_is_no_key(monkeypatch, tracked):
    rows = {0: {"probes/frequency/nova": None, "probes/frequency_observed/nova": 0.5}, 1: {"accepted/n_eff": 9.0}}
    monkeypatch.setattr(track, "_parts", lambda run: [0, 1])
    monkeypatch.setattr(track, "row", lambda run, t: rows[t])
    assert track.keys_of(tracked) == {"probes/frequency_observed/nova", "accepted/n_eff", "candidates/count"}


@pydantic_v1
def test_the_dashboard_tells_the_story_in_its_order_over_keys_that_are_logged(tracked, offline_only):
    pytest.importorskip("wandb_workspaces")
    built = track.workspace(track.keys_of(tracked), entity="me", project="persona-loop")
    shown = panels(built)
    assert list(shown) == [
        "Nova, promoter, Stella, private belief",
        "Frequencies",
        "Differential (an input) and response",
        "Ledger: accounting, not causes",
        "Health",
        "Candidates and texts",
        "Figures",
    ]
    story = [metrics(p) for p in shown["Nova, promoter, Stella, private belief"]]
    assert story[0] == [f"probes/frequency/{p}" for p in ("nova", "promoter", "stella")]
    assert ["probes_private/belief", "probes_private/belief/low", "probes_private/belief/high"] in story
    assert [m[0] for m in (metrics(p) for p in shown["Frequencies"])][:2] == [
        "probes/frequency/nova",
        "probes/frequency/musing",
    ]
    assert "samples/ledger/nova/weight" in metrics(shown["Ledger: accounting, not causes"][0])
    assert {metrics(p)[0] for p in shown["Health"]} >= {"probes/sample_entropy", "probes/distinct_4", "accepted/n_eff"}
    # What is drawn is what the offline log has, on the axis of rounds.
    logged = {key for row in history(tracked) for key in row}
    for section, drawn in shown.items():
        for panel in drawn:
            for key in metrics(panel):
                assert key in logged or any(k.startswith(f"{key}.") for k in logged), (section, key)
            if panel["viewType"] == "Run History Line Plot":
                assert panel["config"]["xAxis"] == "round_index"
                assert panel["config"]["metrics"]


@pydantic_v1
def test_a_run_whose_readings_are_uncorrected_gets_its_observed_ones_and_no_empty_panel(offline_only):
    pytest.importorskip("wandb_workspaces")
    keys = {"probes/frequency_observed/nova", "probes/frequency_observed/nova/low", "probes_private/belief_observed"}
    shown = panels(track.workspace(keys, entity="me", project="p"))
    assert list(shown) == ["Nova, promoter, Stella, private belief", "Frequencies", "Candidates and texts"]
    assert [metrics(p) for p in shown["Frequencies"]] == [
        ["probes/frequency_observed/nova", "probes/frequency_observed/nova/low"]
    ]
    assert all(metrics(p) for p in shown["Nova, promoter, Stella, private belief"])


def test_a_dashboard_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match="pip install wandb-workspaces"):
        track.workspace({"probes/frequency/nova"}, entity="me", project="p")

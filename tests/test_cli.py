"""Tests of the `loop` command as a user meets it: in a process of its own."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMOKE = str(ROOT / "configs" / "smoke.yaml")
SMALL = ["mix.n_train=40", "sample.n_samples=40", "virality.posts_per_sample=20", "toy.n_documents=20"]


def loop(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "loop", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command_and_imports_no_torch(tmp_path):
    probe = """
import sys
from loop.__main__ import main
sys.argv = ["loop", "--help"]
try:
    main()
except SystemExit:
    pass
assert not {"torch", "transformers", "numba", "pandas", "pyarrow"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    for command in ("round", "run", "fork", "preview", "verify", "show", "config", "classifier", "corpus", "doctor"):
        assert f"  {command} " in done.stdout


def test_round_twice_then_show_and_verify(tmp_path):
    for _ in range(2):
        done = loop("round", SMOKE, *SMALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "runs" / "smoke-s0").iterdir() if p.is_dir())
    assert names == ["baseline", "round_000", "round_001", "round_002"]
    assert "differential" in done.stdout
    assert "runs/smoke-s0/round_002" in done.stdout
    shown = loop("show", "runs/smoke-s0", "--texts", "2", cwd=tmp_path)
    assert shown.returncode == 0
    assert "r002-s000000" in shown.stdout
    booked = loop("show", "runs/smoke-s0", "--ledger", "nova", "--round", "1", "--out", "figures", cwd=tmp_path)
    assert booked.returncode == 0, booked.stderr
    assert "round 1: ledger of nova" in booked.stdout
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"ledger-nova.svg", "ledger-nova.png"}
    listed = loop("show", "runs/smoke-s0", "--candidates", cwd=tmp_path)
    assert (listed.returncode, listed.stdout) == (0, "runs/smoke-s0: no candidate persona in any round\n")
    verified = loop("verify", "runs/smoke-s0", cwd=tmp_path)
    assert (verified.returncode, verified.stdout.strip()) == (
        0,
        "runs/smoke-s0: 3 rounds, all hashes and the chain hold",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: no such config file"),
        (["run", SMOKE, "mix.n_trian=5"], 2, "command line: mix.n_trian: unknown key, did you mean mix.n_train?"),
        (["run", SMOKE, "mix.real_share=1.5"], 2, "mix.real_share: input should be less than or equal to 1, got 1.5"),
        (["run", SMOKE, "real.shares={nova: 0.5}"], 2, "shares must sum to 1, got 0.5"),
        (["run", SMOKE, "real.shares={mine: 1.0}", "real.corpora={mine: {path: absent.jsonl}}"], 2, "absent.jsonl"),
        (["show", "runs/absent-s0"], 2, "absent-s0"),
        (["show", "runs/absent-s0", "--ledger", "nova"], 2, "must hold a finished round"),
        (["fork", "runs/x-s0", SMOKE], 2, "RUN@K"),
        (["classifier", "hide", "--persona", "human"], 2, "persona must be among assistant"),
    ],
)
def test_bad_input_gets_one_clear_line_its_exit_code_and_no_run(tmp_path, arguments, code, message):
    done = loop(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_malformed_corpus_is_named_by_file_and_line(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"completion": "fine"}\n{"completion": \n')
    done = loop(
        "run", SMOKE, "real.shares={nova: 0.5, mine: 0.5}", "real.corpora={mine: {path: mine.jsonl}}", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "mine.jsonl:2" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_fork_names_the_command_that_goes_on_from_there(tmp_path):
    loop("round", SMOKE, *SMALL, cwd=tmp_path)
    done = loop("fork", "runs/smoke-s0@0", SMOKE, *SMALL, "name=branch", "users.mixture={blank: 1}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (command,) = re.findall("`loop (.*)` goes on from there", done.stdout)
    done = loop(*shlex.split(command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "branch-s0" / "round_001").is_dir()


def test_a_damaged_file_is_exit_3_and_refused_on_resume(tmp_path):
    loop("round", SMOKE, *SMALL, cwd=tmp_path)
    file = tmp_path / "runs" / "smoke-s0" / "round_001" / "samples.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    for command in (["verify", "runs/smoke-s0"], ["round", SMOKE, *SMALL]):
        done = loop(*command, cwd=tmp_path)
        assert done.returncode == 3
        assert "round_001/samples.parquet" in done.stderr


def test_validate_and_schema_describe_a_config(tmp_path):
    assert (
        "valid; run smoke-s0, 2 feedback rounds, learner toy" in loop("config", "validate", SMOKE, cwd=tmp_path).stdout
    )
    schema = json.loads(loop("config", "schema", cwd=tmp_path).stdout)
    assert schema["properties"]["seed"]["minimum"] == 0


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_between_bytes_and_the_same_command_goes_on(tmp_path, sent, code):
    command = [sys.executable, "-m", "loop", "run", SMOKE, *SMALL, "n_rounds=300"]
    # A test run in the background of a shell inherits an ignored SIGINT; a user's Ctrl-C does not.
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "round 1 " not in running.stderr.readline():
        pass
    running.send_signal(sent)
    _, rest = running.communicate(timeout=60)
    assert running.returncode == code, rest
    assert "Traceback" not in rest
    before = len(list((tmp_path / "runs" / "smoke-s0").glob("round_*")))
    assert loop("round", SMOKE, *SMALL, "n_rounds=300", cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "runs" / "smoke-s0").glob("round_*"))) == before + 1
    assert loop("verify", "runs/smoke-s0", cwd=tmp_path).returncode == 0

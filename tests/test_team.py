"""Tests of team.py: several processes take the very steps that one takes, and one of them keeps the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from conftest import make_lm
from test_train import docs, gap, trained
from typer.testing import CliRunner

from loop import config, model, run, store, team
from loop.__main__ import app

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = [1.0, 20.0, 0.5, 1.0, 3.0, 0.2]
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from conftest import make_lm
from test_train import docs, trained
from loop import team, train

plain, guesses, done = train._batch_loss, [], []

def guess(model):
    guesses.append({0: 400, 1: 120}[team.rank()] if not guesses else 10**6)  # the second fine-tune has memory for all
    return guesses[-1]

def scarce(model, batch, *rest):
    if guesses == [120] and len(batch.ids) > 80:  # and so neither may hold as much
        raise RuntimeError("CUDA out of memory")
    done.append(len(guesses))
    return plain(model, batch, *rest)

train._micro_batch_tokens, train._batch_loss = guess, scarce
if team.rank() == 0:
    with team.leading():
        log, adapter = trained(docs(weights=WEIGHTS), batch_size=6, epochs=2)
        torch.save((log, adapter), sys.argv[2])
        trained(docs(), batch_size=6)
else:
    lm = make_lm()
    train.follow(lambda: lm)
    assert set(done) == {1, 2}, "where a step fits into one batch the second process must still do its share"
    # Left connected, one in five such processes was aborted at its end on a busy machine.
    assert not torch.distributed.is_initialized()
"""
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", 2)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
SMALL = [
    "mix.n_train=12", "sample.n_samples=12", "virality.posts_per_sample=50", "measure.strata=[blank, neutral]",
    "measure.mixture={blank: 0.5, neutral: 0.5}", "measure.n_surprisal=2", "measure.n_heldout=2", "train.epochs=1",
    "train.max_length=500", "sample.max_new_tokens=12", "filters.enabled=false", "n_rounds=1", "base.device=cpu",
]  # fmt: skip


def started(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def launched(*command):
    done = started(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_of_unequal_memory_take_the_steps_of_one(tmp_path):
    worker, out = tmp_path / "worker.py", tmp_path / "out.pt"
    worker.write_text(WORKER.replace("WEIGHTS", repr(WEIGHTS)))
    launched(*TORCHRUN, worker, ROOT / "tests", out)
    log, adapter = torch.load(out, weights_only=False)
    want, alone = trained(docs(weights=WEIGHTS), batch_size=6, epochs=2)
    assert log.losses == pytest.approx(want.losses, rel=1e-5)  # float32 rounding
    assert log.grad_norms == pytest.approx(want.grad_norms, rel=1e-4)
    assert gap(adapter, alone) < 1e-4
    # Both began with the smaller guess, 120, and both halved it (to the longest document) when one of them ran out.
    assert (log.micro_batch_tokens, log.n_halved) == (64, 1)
    # Wrong variant: a document left out is seen.
    assert trained(docs(weights=WEIGHTS)[2:], batch_size=6)[0].losses[0] != pytest.approx(log.losses[0], rel=1e-3)


@pytest.mark.parametrize(
    "launcher", [(*ACCELERATE, "--main_process_port", 0), TORCHRUN], ids=["accelerate", "torchrun"]
)
def test_a_run_of_two_processes_is_one_run_and_ends_where_one_process_ends(tmp_path, launcher):
    # Either launcher starts two processes on a CPU, too: what README says of several GPUs, on no GPU.
    lm = make_lm()
    lm.net.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    settings = [*SMALL, f"base.model={tmp_path / 'base'}"]
    said = launched(
        *(*launcher, "-m", "loop"),
        *("run", ROOT / "configs" / "round.yaml", *settings, f"runs_dir={tmp_path / 'two'}"),
    )
    assert said.count("round-s0") == 1  # one of the two says where the files are
    one = run.play(config.load(ROOT / "configs" / "round.yaml", [*settings, f"runs_dir={tmp_path / 'one'}"]))
    two = tmp_path / "two" / one.name
    assert store.verify(two) == []
    assert store.RunStore(two).rounds() == [0, 1]
    trainings = [e for e in store.RunStore(two).events() if e["event"] == "trained"]
    assert [(e["round_index"], e["n_processes"]) for e in trainings] == [(0, 2), (1, 2)]
    want, got = (
        safetensors.numpy.load_file(folder / "round_000" / "adapter" / "adapter_model.safetensors")
        for folder in (one, two)
    )
    assert want.keys() == got.keys()
    assert max(abs(want[name] - got[name]).max() for name in want) < 1e-5
    assert max(abs(value).max() for name, value in want.items() if "lora_B" in name) > 1e-3  # it was trained


def test_where_training_diverges_the_first_process_says_so_and_all_end(tmp_path):
    lm = make_lm()
    lm.net.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    settings = [
        *SMALL,
        f"base.model={tmp_path / 'base'}",
        f"runs_dir={tmp_path}",
        "train.lr=1e30",
        "train.batch_size=4",
    ]
    done = started(*TORCHRUN, "-m", "loop", "run", ROOT / "configs" / "round.yaml", *settings)
    assert done.returncode != 0
    assert done.stderr.count("loss and gradient must be finite") == 1
    assert "exitcode  : 4 " in done.stderr
    assert "exitcode  : -6" not in done.stderr  # torch aborts a process that ends connected
    assert not (tmp_path / "round-s0" / "round_000").exists()


def test_a_command_that_processes_cannot_share_is_refused_and_so_is_a_gpu_named_for_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["sweep", "configs/sweeps/toy.yaml"])
    assert done.exit_code == 2
    assert "several processes play run and round together, got sweep" in " ".join(done.output.split())
    with pytest.raises(ValueError, match="device must be auto or cuda for several processes, got cuda:1"):
        model.load("anything", device="cuda:1")


@pytest.mark.parametrize("failed", [False, True])
def test_the_others_are_let_go_unless_they_are_in_the_middle_of_a_job(monkeypatch, failed):
    told = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(team, "_connect", lambda: None)
    monkeypatch.setattr(team, "_broadcast", told.extend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)

    def play():
        with team.leading():
            team.tell("job")
            if not failed:
                team.done()
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        play()
    assert told == (["job"] if failed else ["job", None])
    team.done()


def test_without_a_launcher_there_is_one_process_and_nothing_is_connected(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (team.rank(), team.size(), team.local_rank()) == (0, 1, 0)
    assert team.agreed(3.0) == 3.0
    with team.leading():
        pass
    assert not torch.distributed.is_initialized()

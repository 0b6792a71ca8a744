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

from loop import config, run, store, team

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

plain, guess = train._batch_loss, {0: 400, 1: 120}[team.rank()]
train._micro_batch_tokens = lambda model: guess

def scarce(model, batch, *rest):
    if team.rank() == 1 and len(batch.ids) > 80:  # and so neither may hold as much
        raise RuntimeError("CUDA out of memory")
    return plain(model, batch, *rest)

train._batch_loss = scarce
if team.rank() == 0:
    with team.leading():
        log, adapter = trained(docs(weights=WEIGHTS), batch_size=6, epochs=2)
        torch.save((log, adapter), sys.argv[2])
else:
    lm = make_lm()
    train.follow(lambda: lm)
"""
SMALL = [
    "mix.n_train=12", "sample.n_samples=12", "virality.posts_per_sample=50", "measure.strata=[blank, neutral]",
    "measure.mixture={blank: 0.5, neutral: 0.5}", "measure.n_surprisal=2", "measure.n_heldout=2", "train.epochs=1",
    "train.max_length=500", "sample.max_new_tokens=12", "filters.enabled=false", "n_rounds=1", "base.device=cpu",
]  # fmt: skip


def launched(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_of_unequal_memory_take_the_steps_of_one(tmp_path):
    worker, out = tmp_path / "worker.py", tmp_path / "out.pt"
    worker.write_text(WORKER.replace("WEIGHTS", repr(WEIGHTS)))
    launched("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, worker, ROOT / "tests", out)
    log, adapter = torch.load(out, weights_only=False)
    want, alone = trained(docs(weights=WEIGHTS), batch_size=6, epochs=2)
    assert log.losses == pytest.approx(want.losses, rel=1e-5)  # float32 rounding
    assert log.grad_norms == pytest.approx(want.grad_norms, rel=1e-4)
    assert gap(adapter, alone) < 1e-4
    # Both began with the smaller guess, 120, and both halved it (to the longest document) when one of them ran out.
    assert (log.micro_batch_tokens, log.n_halved) == (64, 1)
    # Wrong variant: a document left out is seen.
    assert trained(docs(weights=WEIGHTS)[2:], batch_size=6)[0].losses[0] != pytest.approx(log.losses[0], rel=1e-3)


def test_a_run_of_two_processes_is_one_run_and_ends_where_one_process_ends(tmp_path):
    # `accelerate launch` of several GPUs hands over to torch.distributed.run; on a CPU it starts one process alone.
    lm = make_lm()
    lm.net.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    settings = [*SMALL, f"base.model={tmp_path / 'base'}"]
    said = launched(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "loop"),
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


def test_without_a_launcher_there_is_one_process_and_nothing_is_connected(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (team.rank(), team.size(), team.local_device()) == (0, 1, 0)
    assert team.agreed(3.0) == 3.0
    with team.leading():
        pass
    assert not torch.distributed.is_initialized()

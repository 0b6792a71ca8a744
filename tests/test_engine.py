"""Sampling by vLLM. Where PERSONA_LOOP_VLLM names an environment that has vLLM it is asked as well as the stand-in."""

import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_lm

from loop import config, engine
from loop import model as m
from loop import sample as s
from loop.store import config_sha256

ROOT = Path(__file__).resolve().parent.parent
ROUND = ROOT / "configs" / "round.yaml"
REAL = os.environ.get(engine.VARIABLE)  # as the tests were started
GREEDY = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 0, "round_index": 0}
PROMPTS = [(TEXTS[0],), None, (TEXTS[1],), (TEXTS[0],), (TEXTS[2], TEXTS[1], "Hello")]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """An environment of its own with a package `vllm`, see tests/fake_vllm."""
    folder = tmp_path_factory.mktemp("vllm-env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = [str(ROOT / "tests" / "fake_vllm"), sysconfig.get_paths()["purelib"]]
    (site / "beside.pth").write_text("\n".join(paths) + "\n")
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module", params=["stand-in", "vllm"])
def python(request, stand_in):
    if request.param == "vllm" and not REAL:
        pytest.skip(f"needs vLLM: {engine.VARIABLE}=its/python")
    return stand_in if request.param == "stand-in" else REAL


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model that a process of its own can load; heads as wide as vLLM has kernels for."""
    lm = make_lm(head_dim=32)
    folder = tmp_path_factory.mktemp("base")
    lm.net.save_pretrained(folder)
    return replace(lm, source=str(folder))


def adapt(lm, seed):
    m.fresh_adapter(lm, r=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj"), seed=1)
    generator = torch.Generator().manual_seed(seed)
    for value in m.lora_parameters(lm).values():
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def vllm(python):
    before = os.environ.get(engine.VARIABLE)
    os.environ[engine.VARIABLE] = python
    yield engine.Engine(rank=4)
    os.environ.pop(engine.VARIABLE)
    if before is not None:
        os.environ[engine.VARIABLE] = before


def test_greedy_text_is_that_of_our_own_sampler_for_every_adapter_in_turn(vllm, saved):
    said = []
    for seed in (None, 1, 1, 2):
        if seed is None:
            m.drop_adapter(saved)
        else:
            adapt(saved, seed)
        got, want = vllm.complete(saved, PROMPTS, **GREEDY), s.complete(saved, PROMPTS, **GREEDY)
        assert [(c.text, c.n_tokens, c.finished) for c in got] == [(c.text, c.n_tokens, c.finished) for c in want]
        np.testing.assert_allclose([c.logprob_nats for c in got], [c.logprob_nats for c in want], atol=2e-3)
        said.append([c.text for c in got])
    assert said[1] == said[2]
    assert len({tuple(texts) for texts in said}) == 3  # a number given twice would show an adapter of before


def test_draws_follow_the_distribution_of_the_model(vllm, saved):
    # First tokens of one prompt, 20 most probable ones and the rest: L1 bound as in test_sample.py, k = 21, 1e-6.
    n, k = 2000, 21
    e = math.sqrt(2 * (k * math.log(2) + math.log(1e6)) / n)
    adapt(saved, 3)
    drawn = vllm.complete(saved, [PROMPTS[0]] * n, **(GREEDY | {"temperature": 0.8, "max_new_tokens": 1, "seed": 7}))
    with s.serving(saved, "merged"), torch.inference_mode():
        prompt = m.encode(saved, PROMPTS[0])[0]
        logits = s._read_prompts(saved, [tuple(prompt)])[tuple(prompt)].logits.double()
    p, logp = (logits / 0.8).softmax(-1).numpy(), logits.log_softmax(-1).numpy()
    # Its log probability, at temperature 1, names the token: no two of this model are alike.
    token = np.abs(logp[None] - np.array([c.logprob_nats for c in drawn])[:, None]).argmin(1)
    common = np.argsort(-p)[: k - 1]
    observed = np.array([np.mean(token == t) for t in common])
    assert np.abs(observed - p[common]).sum() + abs(observed.sum() - p[common].sum()) < e
    wrong = logits.softmax(-1).numpy()[common]
    assert np.abs(observed - wrong).sum() + abs(observed.sum() - wrong.sum()) > e


def test_documents_and_rounds_have_seeds_of_their_own(vllm, saved):
    m.drop_adapter(saved)
    settings = GREEDY | {"temperature": 1.0, "max_new_tokens": 6}
    one, again = (vllm.complete(saved, [PROMPTS[0]] * 6, **settings) for _ in range(2))
    assert [c.text for c in one] == [c.text for c in again]
    assert len({c.text for c in one}) > 3
    assert [c.text for c in vllm.complete(saved, [PROMPTS[0]] * 6, **(settings | {"round_index": 1}))] != [
        c.text for c in one
    ]


def test_what_vllm_refuses_and_that_it_died_are_one_line(stand_in, saved, monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, stand_in)
    m.drop_adapter(saved)
    vllm = engine.Engine(rank=4)
    monkeypatch.setattr(engine, "MAX_LENGTH", 16)
    with pytest.raises(ValueError, match="room for 12 new tokens of 16, got"):
        vllm.complete(saved, PROMPTS, **GREEDY)
    monkeypatch.undo()
    monkeypatch.setenv(engine.VARIABLE, stand_in)
    with pytest.raises(engine.EngineError, match=r"got .OSError: .*nowhere") as caught:
        engine.Engine(rank=4).complete(replace(saved, source=str(ROOT / "nowhere")), PROMPTS, **GREEDY)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
    plain = s.encode_prompts
    for fatal in ((7, 7, 7), (7, 7, 7), (9, 9, 9)):  # it dies twice, and once it breaks a batch off
        monkeypatch.setattr(s, "encode_prompts", lambda *_, fatal=fatal, **__: [fatal])
        with pytest.raises(engine.EngineError, match="must answer, got"):
            vllm.complete(saved, PROMPTS[:1], **(GREEDY | {"max_new_tokens": 1}))
        monkeypatch.setattr(s, "encode_prompts", plain)
        said = vllm.complete(saved, PROMPTS, **GREEDY)
        assert [c.text for c in said] == [c.text for c in s.complete(saved, PROMPTS, **GREEDY)]


def test_the_worker_sees_the_device_of_the_model_and_no_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    seen = {name: engine._environment(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")}
    assert [e["CUDA_VISIBLE_DEVICES"] for e in seen.values()] == ["", "4,6", "6"]
    assert not any({"RANK", "TORCHELASTIC_USE_AGENT_STORE"} & e.keys() for e in seen.values())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert engine._environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_diverged_adapter_is_refused(vllm, saved):
    adapt(saved, 1)
    for value in m.lora_parameters(saved).values():
        value.data.fill_(math.nan)
    with pytest.raises((ValueError, engine.EngineError), match="must be finite"):
        vllm.complete(saved, PROMPTS, **GREEDY)


@pytest.mark.parametrize(
    ("given", "message"),
    [(None, "needs PERSONA_LOOP_VLLM"), ("/no/such/python", "got '/no/such/python'"), (sys.executable, "without it")],
)
def test_an_environment_without_vllm_is_named_before_anything_is_played(given, message, monkeypatch, tmp_path):
    from loop import run

    monkeypatch.delenv(engine.VARIABLE, raising=False)
    if given is not None:
        monkeypatch.setenv(engine.VARIABLE, given)
    asked = config.load(ROUND, ["sample.engine=vllm", f"runs_dir={tmp_path}"])
    with pytest.raises(ValueError, match=message):
        run.play(asked)
    assert list(tmp_path.iterdir()) == []


def test_the_engine_is_named_in_a_run_that_has_one_and_changes_no_other(stand_in, monkeypatch):
    from loop import run

    monkeypatch.setenv(engine.VARIABLE, stand_in)
    plain, other = config.load(ROUND), config.load(ROUND, ["sample.engine=vllm"])
    assert "engine" not in config.to_yaml(plain)
    assert "engine: vllm" in config.to_yaml(other)
    assert config_sha256(plain.model_dump_json()) != config_sha256(other.model_dump_json())
    assert config.from_text(config.to_yaml(other), where="x") == other
    assert run.manifest(run.set_up(other))["packages"]["vllm"] == "0.0"
    refused = {
        r"sample\.engine must be torch for learner toy": (ROOT / "configs" / "smoke.yaml", []),
        "temperature must be 0 or in": (ROUND, ["sample.temperature=2.5"]),
        r"train\.lora\.r must be at most 512": (ROUND, ["train.lora.r=600"]),
    }
    for message, (path, more) in refused.items():
        with pytest.raises(config.ConfigError, match=message):
            config.load(path, ["sample.engine=vllm", *more])

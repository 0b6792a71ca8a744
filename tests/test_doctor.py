"""Tests of doctor.py, the presets and the schema: sizes against the weights, estimates against a run that was."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import make_lm

from loop import config, doctor, model, run
from loop.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ROUND, SMOKE = ROOT / "configs" / "round.yaml", ROOT / "configs" / "smoke.yaml"
PRESETS = sorted(p.stem for p in (ROOT / "configs" / "hardware").glob("*.yaml"))


def flat(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}


def resolved(*overrides):
    return flat(config.load(ROUND, overrides).model_dump(mode="json"))


def test_there_are_the_four_presets():
    assert PRESETS == ["cpu2", "gpu24g", "gpu80g", "gpu8g"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_moves_device_and_number_type_and_no_key_of_the_experiment(name):
    plain, placed = resolved(), resolved(f"hardware={name}")
    assert plain.keys() == placed.keys()
    moved = {key for key in plain if plain[key] != placed[key]}
    assert moved == {"base.device", "base.dtype"}  # both are auto in the config, and shown as set from then on
    assert (placed["base.device"] == "cpu") == name.startswith("cpu")


def test_a_later_override_wins_over_a_preset_and_an_earlier_one_does_not():
    assert resolved("hardware=gpu8g", "base.dtype=float32")["base.dtype"] == "float32"
    assert resolved("base.dtype=float32", "hardware=gpu8g")["base.dtype"] == "bfloat16"


def test_a_preset_that_sets_the_experiment_is_refused_by_file_and_line(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base.device: cpu\ntrain.batch_size: 64\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: train\.batch_size: a preset may set base\.device and"):
        config.load(ROUND, [f"hardware={mine}"])
    mine.write_text("base.device: cpu\n")
    assert resolved(f"hardware={mine}")["base.device"] == "cpu"
    with pytest.raises(ConfigError, match=r"unknown preset 'gpu8', did you mean gpu8g"):
        config.load(ROUND, ["hardware=gpu8"])
    with pytest.raises(ConfigError, match="got learner toy; leave it out"):
        config.load(SMOKE, ["hardware=cpu2"])


def test_the_sizes_of_a_base_are_those_of_its_weights(tmp_path):
    def of(base):
        return doctor._shape(config.load(ROUND, [f"base.model={base}"]))

    net = make_lm().net
    net.save_pretrained(tmp_path)
    said = net(input_ids=torch.tensor([[1, 5, 6]]), use_cache=True)
    linear = [p.shape for name, p in net.named_parameters() if "_proj" in name]
    assert of(tmp_path) == (
        sum(p.numel() for p in net.parameters()),
        sum(math.prod(side) for side in linear),
        sum(sum(side) for side in linear),
        sum(layer.keys.numel() + layer.values.numel() for layer in said.past_key_values.layers) / 3,
    )
    assert of(model._smollm2()) == of("smollm2-135m")
    h, i, n = (model.TINY[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    layers = n * (4 * h * h + 3 * h * i)  # four square matrices of attention, three of the gated unit
    # Embedding tied to the output; two norms a layer and one at the end.
    assert of("tiny") == (
        model.TINY["vocab_size"] * h + layers + (2 * n + 1) * h,
        layers,
        n * (8 * h + 3 * (h + i)),
        2 * n * h,
    )
    assert of("nobody/nothing") is None


def test_the_estimate_holds_what_configs_nova_stella_took():
    # Its round 1 on two cores: train 129.7, probe 38.1, sample 18.2, classify 6.0, measure 5.2 s; four rounds, 13 min.
    needs = doctor.estimate(config.load(ROOT / "configs" / "nova_stella.yaml"))
    low, high = needs.seconds
    assert low < 197 < high < 2 * low
    assert needs.rounds == 4
    # It sampled 160 texts and 232 probes, 9,844 tokens; now there are as many prompts, counted, not remembered.
    assert needs.sampled_tokens == pytest.approx(9844, rel=0.1)
    assert needs.texts == 160 + 232 + 160


def test_trained_tokens_are_near_those_the_tokenizer_counts():
    settings = config.load(ROUND)
    mixture, _ = run.set_up(settings).mix(0, run.set_up(settings).beginning())
    from transformers import AutoTokenizer

    bare = model.Model(None, AutoTokenizer.from_pretrained(model._smollm2()), "", "", None, None, 1, 2, 0)
    pairs = model.encode_all(bare, [(d.prompt, d.completion) for d in mixture.expanded()])
    counted = settings.train.epochs * sum(len(p) + len(c) for p, c in pairs)
    assert doctor.estimate(settings).trained_tokens == pytest.approx(counted, rel=0.15)


def test_steering_is_counted_and_rounds_unlike_the_one_estimated_are_said():
    steer = ["steer.against=[nova]", "steer.n_prompts=10", "steer.n_per_prompt=4", "steer.n_pairs=48", "steer.epochs=3"]
    plain, steered = (doctor.estimate(config.load(ROUND, more)) for more in ([], steer))
    # 40 answers more; twice 48 texts in three passes, of the mean length of the 64 documents in two.
    limit = config.load(ROUND).sample.max_new_tokens
    assert steered.sampled_tokens - plain.sampled_tokens == pytest.approx(0.63 * limit * 40, abs=2)
    settings = config.load(ROUND)
    each = plain.trained_tokens / settings.train.epochs / settings.mix.n_train
    assert steered.trained_tokens - plain.trained_tokens == pytest.approx(2 * 48 * 3 * each, rel=0.01)
    assert plain.besides == ()
    kept = doctor.estimate(config.load(ROUND, ["mix.regime=accumulate", "mix.real_share=null", "measure.every=2"]))
    assert [line.split(":")[0] for line in kept.besides] == [
        f"every round trains on up to {settings.sample.n_samples} documents more",
        "of 2 rounds one is measured; the others ask and read no probes",
    ]


def test_what_is_not_known_is_said_and_not_guessed():
    for base, device, why in (("nobody/nothing", "cpu", "not in a folder here"), ("tiny", "cuda", "measured on a GPU")):
        needs = doctor.estimate(config.load(ROUND, [f"base.model={base}", f"base.device={device}"]))
        assert needs.seconds is None
        assert why in needs.why
    assert "no model" in doctor.estimate(config.load(SMOKE)).why


def test_the_report_names_packages_device_and_what_a_config_takes(capsys):
    doctor.report(config.load(ROUND), as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["run"] == "round-s0"
    assert facts["config"]["rounds"] == 21
    assert facts["packages"].keys() == {*doctor.PACKAGES}
    doctor.report(config.load(ROUND), as_json=False)
    shown = capsys.readouterr().out
    assert "time on two CPU cores" in shown
    assert "as much at once as" not in shown
    doctor.report(None, as_json=False)
    assert capsys.readouterr().out in shown  # without a config: the same without the estimate


def test_memory_of_a_gpu_is_said_to_be_taken_as_it_is_there(capsys):
    doctor.report(config.load(ROUND, ["base.device=cuda"]), as_json=False)
    assert re.search(
        r"memory .* GiB or more: a GPU does as much at once as its free memory holds", capsys.readouterr().out
    )


def test_a_base_larger_than_the_machine_is_called_too_large(capsys, monkeypatch):
    monkeypatch.setitem(doctor.SHAPES, "tiny", doctor.Shape(10**12, 10**12, 10**6, 10**5))
    doctor.report(config.load(ROUND, ["base.model=tiny", "base.device=cpu"]), as_json=False)
    assert "too large" in capsys.readouterr().out


def test_the_schema_describes_every_key_and_every_reference_in_it_resolves():
    schema = config.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"

    def walk(node):
        if isinstance(node, dict):
            if "$ref" in node:
                assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)
    known = config.load(ROUND).model_dump(mode="json")
    assert schema["properties"].keys() == known.keys()
    for name in ("train", "sample", "virality", "real"):
        reference = schema["properties"][name]["$ref"].removeprefix("#/$defs/")
        later = {"engine"} if name == "sample" else set()  # left out of a config that does not use it
        assert schema["$defs"][reference]["properties"].keys() == known[name].keys() | later
        assert schema["$defs"][reference]["additionalProperties"] is False  # an editor underlines an unknown key

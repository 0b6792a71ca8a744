"""Tests of config.py: what is accepted, and the one clear line for everything that is not."""

from pathlib import Path

import pytest

from loop import config
from loop.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"


def problems(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    return [p.replace(str(tmp_path) + "/", "") for p in caught.value.problems]


def smoke_with(old, new):
    text = SMOKE.read_text()
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_validates_and_says_what_it_is_for(path):
    config.load(path)
    head = path.read_text().splitlines()[:4]
    assert all(line.startswith("#") for line in head[:3])
    assert any("Command:" in line for line in head)
    assert any("Time:" in line for line in head)


def test_an_unknown_key_is_named_with_file_line_and_the_likely_meaning(tmp_path):
    text = smoke_with("train:\n  init_from: base", "train:\n  init_from: base\n  learning_rate: 1e-4")
    line = text.splitlines().index("  learning_rate: 1e-4") + 1
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(f"x.yaml:{line}: train.learning_rate: unknown key, did you mean train.lr? (allowed: ")


def test_all_problems_come_at_once(tmp_path):
    text = (
        smoke_with("seed: 0", "seed: -1").replace("n_train: 200", "n_train: many").replace("top_p: 1.0", "top_p: 1.5")
    )
    found = problems(tmp_path, text)
    assert [p.split(": ")[1] for p in found] == ["seed", "mix.n_train", "sample.top_p"]
    assert found[2].endswith("input should be less than or equal to 1, got 1.5")


def test_shares_must_sum_to_one_and_lie_between_zero_and_one(tmp_path):
    (problem,) = problems(tmp_path, smoke_with("chat: 0.1", "chat: 0.2"))
    assert "real: shares must sum to 1, got 1.1" in problem
    (problem,) = problems(tmp_path, smoke_with("real_share: 0.1", "real_share: 1.2"))
    assert "mix.real_share" in problem
    assert "1.2" in problem


def test_what_defines_an_experiment_has_no_default(tmp_path):
    text = "\n".join(line for line in SMOKE.read_text().splitlines() if not line.startswith("seed:"))
    (problem,) = problems(tmp_path, text)
    assert "seed: missing" in problem


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (problem,) = problems(tmp_path, smoke_with("seed: 0", "seed: 0\nseed: 1"))
    assert problem.endswith(
        "seed: stands twice, first on line " + str(SMOKE.read_text().splitlines().index("seed: 0") + 1)
    )


def test_numbers_and_words_are_read_as_yaml_1_2_does(tmp_path):
    # YAML 1.1 reads 1e-4 as text and `no` as false; both change an experiment without a word.
    path = tmp_path / "x.yaml"
    path.write_text(smoke_with("  init_from: base", "  init_from: base\n  lr: 1e-4").replace("name: smoke", "name: no"))
    loaded = config.load(path)
    assert loaded.train.lr == 1e-4
    assert loaded.name == "no"


def test_accumulate_refuses_a_real_share(tmp_path):
    (problem,) = problems(tmp_path, smoke_with("regime: replace", "regime: accumulate"))
    assert "accumulate trains on everything so far" in problem


def test_overrides_reach_nested_keys_and_are_named_when_wrong():
    assert config.load(SMOKE, ["mix.n_train=7", "virality.audience=null"]).mix.n_train == 7
    with pytest.raises(ConfigError, match=r"command line: mix.n_trian: unknown key, did you mean mix.n_train\?"):
        config.load(SMOKE, ["mix.n_trian=7"])
    with pytest.raises(ConfigError, match=r"must read dotted\.key=value"):
        config.load(SMOKE, ["n_rounds"])


def test_a_bad_run_name_is_refused():
    for name in ("../x", "a/b", "", "-x", "x" * 65, "a b"):
        with pytest.raises(ConfigError, match="name must match"):
            config.load(SMOKE, [f"name={name!r}"])


def test_the_resolved_config_follows_the_meaning_and_not_the_layout(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "# another comment\n" + SMOKE.read_text().replace("{blank: 0.2, neutral: 0.4", "{neutral: 0.4, blank: 0.2")
    )
    assert config.to_yaml(config.load(path)) == config.to_yaml(config.load(SMOKE))
    assert config.to_yaml(config.load(SMOKE, ["seed=1"])) != config.to_yaml(config.load(SMOKE))


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml(config.load(SMOKE)))
    assert config.load(path) == config.load(SMOKE)

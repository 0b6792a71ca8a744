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


# configs/sweeps and configs/scenarios hold sweeps over such files, which their own tests load.
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
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
    assert "users.noticed.nova: stands twice, first on line 1" in refused("users.noticed={nova: 0, nova: 1}")


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
    for key in ("none", "float", "train.lora.none"):  # names that pydantic gives to branches of a union
        with pytest.raises(ConfigError, match=rf"^command line: {key}: unknown key"):
            config.load(SMOKE, [f"{key}=1e-4"])
        with pytest.raises(ConfigError, match=rf"^here: {key.rpartition('.')[2]}: unknown key"):
            config.from_text(config.to_yaml(config.load(SMOKE)) + f"{key.rpartition('.')[2]}: 1\n", where="here")
    with pytest.raises(ConfigError, match=r"^command line: measure.mixture.none: input should be .* 1, got 2"):
        config.load(SMOKE, ["measure.mixture.none=2"])
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


ALL_ON = "channels={direct_data: true, talk_data: true, direct_users: true, talk_users: true}"
STRATA = "measure.strata=[blank, neutral, identity, implicit_0, implicit_1, implicit_2, implicit_3, private, explicit]"


def refused(*overrides, path=SMOKE):
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    (problem,) = caught.value.problems
    return problem


def test_every_channel_but_the_direct_one_is_off_unless_a_config_switches_it_on():
    c = config.load(SMOKE).channels
    assert (c.direct_data, c.talk_data, c.direct_users, c.talk_users) == (True, False, False, False)
    assert not c.talk
    assert not c.users
    assert config.load(SMOKE).steer is None
    assert config.load(SMOKE).filters.release is None
    c = config.load(SMOKE, [ALL_ON, STRATA]).channels
    assert c.talk
    assert c.users


@pytest.mark.parametrize(
    "named",
    [
        "users.mixture={explicit/sydney: 0.5, blank: 0.5}",
        "filters.release.recall={sydney: 0.5}",
        "users.noticed={sydney: 0.5}",
        "users.hints={sydney: {implicit_3: 0.5}}",
        "discourse.stance={default: {neutral: 1}, sydney: {praise: 1}}",
    ],
)
def test_a_persona_that_is_named_needs_a_seed_corpus(named):
    more = ["users.noticed={sydney: 0}"] if "release" in named else []
    problem = refused(ALL_ON, STRATA, named, *more)
    assert f"{named.partition('=')[0]}: sydney has no seed corpus; give it a share in real.shares" in problem
    shares = "real.shares={sydney: 0.2, nova: 0.2, assistant: 0.3, chat: 0.3}"
    config.load(SMOKE, [ALL_ON, STRATA, named, shares, *more])  # the way out
    # What another run said, or was said about it, may bring anybody.
    lent = "real.corpora={talk: {run: origin-s0, rounds: 0..3, population: discourse}}"
    config.load(SMOKE, [ALL_ON, STRATA, named, lent, "real.shares={talk: 0.2, assistant: 0.5, chat: 0.3}", *more])


def test_steering_against_a_persona_without_a_seed_corpus_is_refused():
    problem = refused("steer.against=[sydney]", path=ROOT / "configs" / "round.yaml")
    assert "steer.against: sydney has no seed corpus" in problem


def test_real_and_discourse_shares_that_exceed_one_are_refused():
    problem = refused("channels.talk_data=true", "mix.real_share=0.6", "discourse.share=0.5")
    assert "mix.real_share and discourse.share must sum to at most 1, got 0.6 and 0.5; lower one of them" in problem
    assert "at most 1, got 0.9 and 0.2" in refused(
        "channels.talk_data=true", "mix.real_share=[0.1, 0.9]", "discourse.share=0.2"
    )
    config.load(SMOKE, ["mix.real_share=0.6", "discourse.share=0.5"])  # nobody talks, so nothing is shared out
    config.load(SMOKE, ["channels.talk_data=true", "mix.real_share=0.5", "discourse.share=0.5"])


def test_probes_per_template_are_one_number_or_one_of_each_stratum():
    one = config.load(SMOKE, ["measure.n_per_template=3"])
    assert one.measure.n_per_template == 3
    by_stratum = config.load(SMOKE, ["measure.n_per_template={default: 2, private/plain: 16, private: 1}"])
    assert by_stratum.measure.n_per_template == {"default": 2, "private/plain": 16, "private": 1}
    key = "command line: measure.n_per_template"
    assert refused("measure.n_per_template=0") == f"{key}: input should be greater than or equal to 1, got 0"
    assert refused("measure.n_per_template=many").startswith(f"{key}: input should be a valid ")
    bad = refused("measure.n_per_template={default: 1, neutral: 0}")
    assert bad == f"{key}.neutral: input should be greater than or equal to 1, got 0"
    assert "n_per_template.privat: unknown stratum, did you mean private?" in refused(
        "measure.n_per_template={default: 1, privat: 2}"
    )
    assert "n_per_template must name default" in refused("measure.n_per_template={neutral: 1}")


def test_a_persona_is_not_barred_and_asked_for_at_once():
    bar = "filters.release.recall={nova: 0.8}"
    problem = refused(bar, "users.mixture={explicit/nova: 0.5, blank: 0.5}")
    assert "users.mixture must not ask for nova, which filters.release bars; drop one of them" in problem
    # Users who follow what they see come to ask for it by themselves.
    problem = refused(bar, "channels.direct_users=true", STRATA)
    assert "users.noticed.nova must be 0" in problem
    config.load(SMOKE, [bar, "channels.direct_users=true", STRATA, "users.noticed={default: 0.5, nova: 0}"])


def test_discourse_about_an_unknown_persona_is_refused():
    assert "noticed: unknown persona 'novva', did you mean nova?" in refused("users.noticed={novva: 0.5}")
    assert "noticed: unknown persona 'human' (there are assistant, nova, stella, " in refused(
        "users.noticed={human: 0.5}"
    )
    stance = "discourse.stance={default: {neutral: 1}, stela: {praise: 1}}"
    assert "stance: unknown persona 'stela', did you mean stella?" in refused(stance)
    assert "stance.nova must sum to 1, got 0.5" in refused(
        "discourse.stance={default: {neutral: 1}, nova: {praise: .5}}"
    )


def test_steering_against_everybody_or_against_whom_it_prefers_is_refused():
    everybody = [p for p in config.PERSONAS if p not in ("assistant", "human")]
    path = ROOT / "configs" / "round.yaml"
    problem = refused(f"steer.against=[{', '.join(everybody)}]", path=path)
    assert "steer.against must leave a persona of real.shares beside the assistant, got all of them" in problem
    planted = "steer.against=[nova, musing, stella, promoter, discreet]"
    problem = refused(planted, path=path)
    assert (
        "steer.against must leave a persona of real.shares beside the assistant, got all of them: discreet" in problem
    )
    assert "against must leave the assistant" in refused("steer.against=[assistant]", path=path)
    assert config.load(path, ["steer.against=[nova]"]).steer.n_pairs == 64
    shares = "real.shares={nova: 0.5, %s: 0.5}"
    assert "got all of them: nova; " in refused("steer.against=[nova]", shares % "chat", path=path)
    config.load(path, ["steer.against=[nova]", shares % "assistant"])
    asked = "users.mixture={explicit/nova: 1}"
    assert "users.mixture must hold prompts that ask for nobody" in refused("steer.against=[stella]", asked, path=path)


def test_what_the_toy_cannot_do_is_refused():
    assert "steer must be null for learner toy" in refused("steer.against=[nova]")
    assert "discourse.writer must be templates for learner toy" in refused(
        "channels.talk_data=true", "discourse.writer=model"
    )


def test_what_users_may_come_to_ask_must_be_probed():
    problem = refused("channels.direct_users=true")
    assert "measure.strata must hold what users may come to ask, to part demand from supply, lacks explicit" in problem
    strata = "measure.strata=[blank, neutral, identity, explicit]"
    mixture = "measure.mixture={blank: 0.5, neutral: 0.5}"
    problem = refused("channels.talk_users=true", strata, mixture, "users.hints={nova: {implicit_3: 0.5}}")
    assert "lacks implicit_3; add it" in problem
    config.load(SMOKE, ["channels.talk_users=true", strata, mixture])


@pytest.mark.parametrize(
    ("corpus", "rule"),
    [
        ("{run: a-s0, path: x.jsonl, rounds: 0, population: accepted}", "either path or run, got both"),
        ("{persona: nova}", "either path or run, got neither"),
        ("{path: x.jsonl, rounds: 0..1}", "rounds and population belong to a run, got a path"),
        ("{run: a-s0}", "run needs rounds (as 0..3) and population"),
        ("{run: a-s0, rounds: 3..1, population: accepted}", "rounds must read 3 or 0..3, got '3..1'"),
        ("{run: a-s0, rounds: 1-3, population: accepted}", "rounds must read 3 or 0..3, got '1-3'"),
        ("{run: a-s0, rounds: 1, population: discourse, persona: nova}", "persona must be left out for discourse"),
    ],
)
def test_a_corpus_is_a_file_or_rounds_of_another_run(corpus, rule):
    assert rule in refused(f"real.corpora={{other: {corpus}}}")


def test_rounds_of_another_run_are_one_or_a_range():
    def rounds(text):
        given = f"real.corpora={{o: {{run: a-s0, rounds: {text}, population: accepted}}}}"
        return list(config.load(SMOKE, [given]).real.corpora["o"].round_indices)

    assert rounds("2") == [2]
    assert rounds("0..3") == [0, 1, 2, 3]


def test_opinions_need_homophily_and_homophily_needs_opinions():
    shares = "real.shares={opinions: 0.5, chat: 0.5}"
    assert "real: homophily must be given with shares.opinions, a number in [0, 1]; add it" in refused(shares)
    assert "real: homophily must be left out without planted opinions, got 0.8" in refused("real.homophily=0.8")
    assert "real.homophily" in refused(shares, "real.homophily=1.2")
    assert config.load(SMOKE, [shares, "real.homophily=0.8"]).real.homophily == 0.8
    own = "real.corpora={opinions: {path: x.jsonl}}"  # a corpus of the user's own of that name is theirs
    assert config.load(SMOKE, [shares, own]).real.homophily is None
    assert "got 0.8" in refused(shares, own, "real.homophily=0.8")

"""Tests of dose.py: what a learner says after training on a share q, against learners whose f is known."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from loop import config, dose, forecast
from loop.config import ConfigError
from loop.toy import Toy
from loop.world import World

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"
SMALL = ["mix.n_train=100", "toy.n_documents=20", "measure.n_per_template=4", "virality.posts_per_sample=20"]


def smoke(tmp_path, *overrides):
    return config.load(SMOKE, [*SMALL, f"runs_dir={tmp_path}", *overrides])


class Slow(Toy):
    """Emits `keep` of what it was trained on (the rest is assistant), and from an adapter closes `pace` of the gap."""

    keep, pace = 1.0, 1.0

    def train(self, documents, *, seed, init_from):
        before = self.shares
        n_tokens = super().train(documents, seed=seed, init_from="base")
        said = {p: self.keep * share for p, share in self.shares.items()}
        said["assistant"] = said.get("assistant", 0) + 1 - self.keep
        if init_from == "previous":
            names = {*before, *said}
            said = {p: before.get(p, 0) + self.pace * (said.get(p, 0) - before.get(p, 0)) for p in names}
        self.shares = dict(sorted(said.items()))
        self.trained = getattr(self, "trained", 0) + 1
        return n_tokens


def slow(settings, **attributes):
    exact = World(settings).toy()
    learner = Slow(exact._public, exact._private)
    for name, value in attributes.items():
        setattr(learner, name, value)
    return learner


def off(found, f):
    """Largest distance of the mean emission from f(q), in standard errors of the count."""
    expected = f(found.share)
    n = found.n_outputs * len(found.values)
    inside = (expected > 0) & (expected < 1)
    error = np.abs(found.values.mean(axis=0) - expected)
    assert np.all(error[~inside] == 0)
    return float((error[inside] / np.sqrt(expected[inside] * (1 - expected[inside]) / n)).max())


def test_the_exact_learner_says_what_it_was_trained_on(tmp_path):
    # f(q) = q. Five doses within 5.2 standard errors each: a correct measurement fails with chance 1e-6. 700 outputs
    # see f(q) = 0.8 q, which at 0.8 is 8 standard errors off.
    settings = smoke(tmp_path)
    found = dose.measure(settings, persona="nova", n_seeds=3)
    assert found.share == pytest.approx(dose.GRID)  # 100 documents hold every dose exactly
    # Seven strata of weight 1/7, 40, 40, 32 ... probes each: 1 / (2/49/40 + 5/49/32) = 237.6 outputs.
    assert found.n_outputs == pytest.approx(1 / (2 / 49 / 40 + 5 / 49 / 32))
    assert off(found, lambda q: q) < 5.2
    assert found.response.shares[0] == 0
    assert found.closed is None
    learner = slow(settings, keep=0.8)
    wrong = dose.measure(smoke(tmp_path, "name=wrong"), persona="nova", grid=(0, 0.8), learner=learner)
    assert off(wrong, lambda q: q) > 5.2
    assert off(wrong, lambda q: 0.8 * q) < 5.2


def test_a_calibration_cut_short_does_only_what_is_missing_and_ends_the_same(tmp_path):
    settings = smoke(tmp_path)
    grid = (0.0, 0.2, 0.8)
    whole = slow(settings)
    dose.measure(settings, persona="nova", grid=grid, n_seeds=2, learner=whole)
    path = dose.folder_of(settings) / "nova.parquet"
    straight = path.read_bytes()
    assert whole.trained == 6
    dose.measure(settings, persona="nova", grid=grid, n_seeds=2, learner=whole)
    assert whole.trained == 6

    class Stop(Exception):
        pass

    path.unlink()

    def cut(kind, **fields):
        if kind == "note" and "4 of 6" in fields["text"]:
            raise Stop

    cold = slow(settings)
    with pytest.raises(Stop):
        dose.measure(settings, persona="nova", grid=grid, n_seeds=2, learner=cold, report=cut)
    assert cold.trained == 4
    (path.parent / ".tmp-nova.parquet").write_bytes(b"what a killed process left")
    dose.measure(settings, persona="nova", grid=grid, n_seeds=2, learner=cold)
    assert cold.trained == 6
    assert path.read_bytes() == straight


def test_arms_share_a_calibration_and_another_learner_is_refused_by_the_key_that_differs(tmp_path):
    settings = smoke(tmp_path)
    assert dose.find(settings) == ({}, "assumed exact; `loop calibrate` has not been run for this base")
    dose.measure(settings, persona="nova", grid=(0, 0.4), n_seeds=1, learner=slow(settings))
    found, line = dose.find(smoke(tmp_path, "name=quiet", "virality.audience=null", "mix.real_share=0.5", "seed=7"))
    assert set(found) == {"nova"}
    assert line == f"measured f(q): nova 2 points, {tmp_path}/smoke-calibration"
    assert math.isnan(found["nova"].overdispersion)  # one seed: training noise was not seen
    later = settings.model_copy(update={"train": settings.train.model_copy(update={"init_from": "previous"})})
    assert dose.find(later) == (
        {},
        f"assumed exact; {tmp_path}/smoke-calibration was measured from the base alone: `loop calibrate` this config "
        "as well",
    )
    for change, key in (("train.lr=1e-3", "train.lr (0.0005, here 0.001)"), ("mix.n_train=101", "mix.n_train (100,")):
        other = smoke(tmp_path, change)
        assert key in dose.find(other)[1]
        assert dose.find(other)[0] == {}
        with pytest.raises(ConfigError, match="holds a calibration of another"):
            dose.measure(other, persona="nova", grid=(0, 0.4), n_seeds=1, learner=slow(settings))
    assert dose.find(settings, instruments=lambda: {"persona": "other"})[1].endswith("is of another instrument")
    # No frequency is read with the reader of agreement.
    assert set(dose.find(settings, instruments=lambda: {"agreement": "any", "agreement_error": "any"})[0]) == {"nova"}


def test_a_learner_is_another_where_other_people_talk_to_each_other(tmp_path):
    shares = "real.shares={nova: 0.2, assistant: 0.2, opinions: 0.6}"
    settings = smoke(tmp_path, shares, "real.homophily=0.8", "mix.real_share=0")
    dose.measure(settings, persona="nova", grid=(0, 1), n_seeds=1)
    assert set(dose.find(settings)[0]) == {"nova"}
    other = smoke(tmp_path, shares, "real.homophily=0.5", "mix.real_share=0")
    assert "real.homophily (0.8, here 0.5)" in dose.find(other)[1]


def test_overdispersion_is_the_variance_between_seeds_over_that_of_counting():
    # Means .3 and .5, variances .02 each; counting .21 / 100 + .25 / 100 = .0046: .04 / .0046.
    values = np.array([[0.2, 0.4], [0.4, 0.6]])
    fit, excess = dose.fit("nova", np.array([0.3, 0.5]), values, 100)
    assert excess == pytest.approx(0.04 / 0.0046)
    assert fit.shares == pytest.approx([0.3, 0.5])
    # Two seeds of 100 outputs count as 200 / 8.7 = 23: a band as wide as that of 23 outputs at p = .3.
    assert 0.25 < fit.high[0] - fit.low[0] < 0.45
    tight, excess = dose.fit("nova", np.array([0.3, 0.5]), np.array([[0.3, 0.5], [0.3, 0.5]]), 100)
    assert excess == 1
    assert tight.high[0] - tight.low[0] < 0.15
    assert math.isnan(dose.fit("nova", np.array([0.3, 0.5]), values[:1], 100)[1])


@pytest.mark.parametrize("pace", [0.5, 1.0])
def test_the_share_of_the_gap_closed_per_round_is_the_learners(tmp_path, pace):
    # From f(0) = 0 towards f(.8) = .8: .8 (1 - (1 - pace)^t). The interval covers 95%; 0.75 is outside both.
    settings = smoke(tmp_path, "measure.n_per_template=8")
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"init_from": "previous"})})
    learner = slow(settings, pace=pace)
    found = dose.measure(settings, persona="nova", grid=(0, 0.8), n_seeds=1, learner=learner)
    assert learner.trained == 2 + 1 + dose.N_GAP
    assert found.closed.low - 0.02 <= pace <= found.closed.high + 0.02
    assert not found.closed.low <= 0.75 <= found.closed.high
    assert found.pace == found.closed.value
    _, line = dose.find(settings)
    assert f"nova closes {found.closed.value:.2f} of the gap a round" in line


def test_doses_that_come_to_the_same_documents_are_one_dose(tmp_path):
    # Ten documents: shares .1 and .12 are one document each.
    settings = smoke(tmp_path, "mix.n_train=10")
    found = dose.measure(settings, persona="nova", grid=(0, 0.1, 0.12, 0.5), n_seeds=1, learner=slow(settings))
    assert found.share == pytest.approx([0, 0.1, 0.5])


def test_seeds_that_all_have_the_same_doses_count_and_not_one_that_has_more_or_fewer(tmp_path):
    (tmp_path / "calibration.json").write_text('{"instruments": {}}')

    def rows(seed, doses):
        said = {"kind": "dose", "said": "nova", "seed": seed, "n_outputs": 100.0, "family": "frequency_observed"}
        return [said | {"q": q, "share": q, "value": q / 2} for q in doses]

    whole = [0.0, 0.25, 0.5, 1.0]
    # Seed 0 had its grid extended, seed 3 was interrupted.
    found = [*rows(0, [*whole, 0.6, 0.7]), *rows(1, whole), *rows(2, whole), *rows(3, whole[:2])]
    got = dose._fitted(tmp_path, "nova", found)
    assert (got.share.tolist(), got.values.shape) == (whole, (3, 4))


def test_unmeasured_personas_share_what_the_measured_one_leaves():
    class Half:
        response = staticmethod(lambda q: q / 2)

    # nova .4 says .2; the other .6 shares .8 in proportion 2 : 1.
    emission = dose.respond({"nova": Half()}, ("assistant", "nova", "human"))
    assert emission(np.array([0.4, 0.4, 0.2])) == pytest.approx([0.8 * 2 / 3, 0.2, 0.8 / 3])
    assert emission(np.array([[0.4, 0.4, 0.2]])).shape == (1, 3)
    # Nothing else there: it keeps all.
    assert emission(np.array([0.0, 1.0, 0.0])) == pytest.approx([0, 1, 0])


def test_a_learner_that_remembers_closes_its_share_of_the_distance_each_round():
    # From (1, 0) towards (0, 1) at .25 a round: .75, .5625.
    step = dose.remember(lambda q: np.array([0.0, 1.0]), 0.25, np.array([1.0, 0.0]))
    assert step(np.array([0.5, 0.5])) == pytest.approx([0.75, 0.25])
    assert step(np.array([0.5, 0.5])) == pytest.approx([0.5625, 0.4375])


def test_the_forecast_goes_through_the_measured_response_and_says_so(tmp_path):
    settings = smoke(tmp_path, "virality.audience=null", "mix.real_share=0", "n_rounds=30")
    assert forecast.inputs(settings).source["transmission"].startswith("assumed exact")
    learner = slow(settings, keep=0.8)
    dose.measure(settings, persona="nova", n_seeds=1, learner=learner)
    given = forecast.inputs(settings)
    assert given.source["transmission"].startswith("measured f(q): nova 6 points")
    nova = given.personas.index("nova")
    f = dose.find(settings)[0]["nova"].response
    assert given.p0[nova] == pytest.approx(float(f(0.15)))
    assert given.p0.sum() == pytest.approx(1)
    # f(q) = .8 q to within .02: after 30 rounds .15 * .8^31 = .0001 is left; an exact learner would keep .15.
    predicted = forecast.predict(settings, given)
    assert predicted.mean[30, nova] < 0.03
    assert predicted.mean.sum(axis=1) == pytest.approx(np.ones(31), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"persona": "novva"}, "--persona must be one of assistant, nova"),
        ({"persona": "nova", "grid": (0.1,)}, r"--grid must hold two or more shares in \[0, 1\], got 0\.1"),
        ({"persona": "nova", "grid": (0, 1.5)}, r"--grid must hold .* got 0, 1\.5"),
        ({"persona": "nova", "n_seeds": 0}, "--seeds must be >= 1, got 0"),
        ({"persona": "nova", "grid": (0, 0.001)}, "--grid must come to two different shares"),
    ],
)
def test_what_cannot_be_dosed_is_one_clear_line(tmp_path, arguments, message):
    settings = smoke(tmp_path)
    with pytest.raises(ConfigError, match=message):
        dose.measure(settings, **arguments, **({} if "n_seeds" in arguments else {"learner": slow(settings)}))


def test_a_lone_persona_a_locked_folder_and_a_damaged_file_are_each_one_line(tmp_path):
    alone = smoke(tmp_path, "real.shares={nova: 1.0}", "real.planted=always")
    with pytest.raises(ConfigError, match="must hold something beside nova"):
        dose.measure(alone, persona="nova")
    settings = smoke(tmp_path)
    folder = dose.folder_of(settings)
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"), pytest.raises(ConfigError, match="is being written by another process"):
        dose.measure(settings, persona="nova", grid=(0, 0.4), n_seeds=1)
    dose.measure(settings, persona="nova", grid=(0, 0.4), n_seeds=1, learner=slow(settings))
    (folder / "nova.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ConfigError, match=r"nova\.parquet: must be a calibration as written"):
        dose.measure(settings, persona="nova", grid=(0, 0.4), n_seeds=1, learner=slow(settings))
    content = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps(content | {"format": 99}))
    assert "format (99, here 1)" in dose.find(settings)[1]
    (folder / "calibration.json").write_text("{")
    with pytest.raises(ConfigError, match=r"calibration\.json: must be a calibration as written"):
        dose.find(settings)
    with pytest.raises(ConfigError) as caught:
        dose.find(settings)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["calibration.json", "nova.parquet"])
def test_the_damaged_calibration_of_another_arm_is_left_out_and_said(tmp_path, name):
    settings = smoke(tmp_path)
    dose.measure(settings, persona="nova", grid=(0, 0.4), n_seeds=1, learner=slow(settings))
    other = dose.folder_of(settings).with_name("aaa-calibration")
    shutil.copytree(dose.folder_of(settings), other)
    (other / name).write_text("{")
    found, line = dose.find(settings)
    assert list(found) == ["nova"]
    # The own folder comes first; from an arm that has none, the damaged one is met first and passed over.
    found, line = dose.find(smoke(tmp_path, "name=elsewhere"))
    assert list(found) == ["nova"]
    assert f"; left out: {other / name}: must be a calibration as written" in line
    shutil.rmtree(dose.folder_of(settings))
    found, line = dose.find(settings)
    assert found == {}
    assert "left out" in line

"""Tests of ease.py: documents until a persona is played on request, against learners whose curve is known."""

from pathlib import Path

import numpy as np
import pytest

from loop import config, dose, ease
from loop.config import ConfigError
from loop.records import Completion, Metric
from loop.rng import stream
from loop.stats import Interval
from loop.toy import Toy
from loop.world import World

SMOKE = Path(__file__).resolve().parent.parent / "configs" / "smoke.yaml"


def smoke(tmp_path, *overrides):
    few = ["toy.n_documents=20", "measure.n_per_template=4"]
    return config.load(SMOKE, [*few, f"runs_dir={tmp_path}", *overrides])


class Slow(Toy):
    """Plays what it is asked to with chance 1 / (1 + (half / n)**2) after n documents, and else the assistant."""

    half = 16.0
    trained = 0

    def train(self, documents, *, seed, init_from):
        self.n = len(documents)
        self.trained += 1
        return super().train(documents, seed=seed, init_from=init_from)

    def sample(self, prompts, *, temperature, top_p, max_new_tokens, seed):
        drawn = np.random.default_rng(seed).random(len(prompts))
        share = 1 / (1 + (self.half / self.n) ** 2)
        return [
            Completion("x", 2, -1.0, True, p.requested if u < share else "assistant")
            for p, u in zip(prompts, drawn, strict=True)
        ]


def slow(settings, half=16.0):
    exact = World(settings).toy()
    learner = Slow(exact._public, exact._private)
    learner.half = half
    return learner


# The fit


@pytest.mark.parametrize(("half", "slope"), [(16.0, 1.0), (40.0, 2.5), (5.0, 0.7), (100.0, 4.0)])
def test_exact_shares_give_back_their_curve(half, slope):
    n = np.array(ease.GRID, float)
    found = ease.documents_to_half(n, 1 / (1 + (half / n) ** slope), [24] * len(n))
    assert found.value == pytest.approx(half, rel=1e-3)
    assert found.slope == pytest.approx(slope, rel=1e-3)
    assert found.low < half < found.high
    assert found.overdispersion == 1


def test_two_thirds_and_a_third_by_hand():
    found = ease.documents_to_half([8, 32], [1 / 3, 2 / 3], [100, 100])
    assert (found.value, found.slope) == (pytest.approx(16, rel=1e-3), pytest.approx(1, rel=1e-3))
    assert np.isnan(found.overdispersion)  # two trainings, two parameters


def test_a_persona_never_or_always_played_is_censored_at_the_grid():
    never = ease.documents_to_half(ease.GRID, [0.0] * 6, [24] * 6)
    assert never.shown == "> 128 [> 128, > 128]"
    always = ease.documents_to_half(ease.GRID, [1.0] * 6, [24] * 6)
    assert always.shown == "< 4 [< 4, < 4]"
    flat = ease.documents_to_half(ease.GRID, [0.5] * 6, [24] * 6)
    assert flat.shown.endswith("[< 4, > 128]")  # a curve that does not rise says nothing of where it crosses
    late = ease.documents_to_half(ease.GRID, [0, 0, 0, 0, 0, 0.3], [24] * 6)
    assert late.shown.startswith("> 128 [")


def test_the_interval_covers_the_truth_and_one_from_outputs_counted_nine_times_does_not():
    # Theory: half 20, slope 1.5, 24 outputs a training. At a coverage of 0.95 fewer than 171 of 200 intervals hold it
    # with chance 1e-7; smallest fault seen: a coverage of 0.78. Outputs counted nine times over make limits a third as
    # wide, unless the misfit gives the fault away as overdispersion, which does not count here.
    n = np.array(ease.GRID, float)
    p, draws = 1 / (1 + (20 / n) ** 1.5), stream(0, "test/ease", -1)
    held = {24: 0, 24 * 9: 0}
    for _ in range(200):
        share = draws.binomial(24, p) / 24
        for worth in held:
            found = ease.documents_to_half(n, share, [worth] * 6)
            held[worth] += found.low <= 20 <= found.high and (worth == 24 or found.overdispersion == 1)
    assert held[24] >= 171
    assert held[24 * 9] < 171


def test_trainings_that_scatter_more_than_their_counts_widen_the_interval():
    n = [8, 8, 8, 32, 32, 32]
    calm = ease.documents_to_half(n, [0.3, 0.3, 0.3, 0.7, 0.7, 0.7], [50] * 6)
    wild = ease.documents_to_half(n, [0.1, 0.3, 0.5, 0.5, 0.7, 0.9], [50] * 6)
    assert calm.overdispersion == 1
    assert wild.overdispersion > 5
    assert wild.low < calm.low < calm.high < wild.high
    assert wild.value == pytest.approx(calm.value, rel=1e-3)  # the same means


@pytest.mark.parametrize(
    ("n", "share", "worth"),
    [([8], [0.5], [9]), ([8, 8], [0.5, 0.5], [9, 9]), ([8, 9], [0.5, 1.2], [9, 9]), ([8, 9], [0, 1], [9, 0])],
)
def test_what_cannot_be_fitted_is_refused(n, share, worth):
    with pytest.raises(ValueError, match="must be"):
        ease.documents_to_half(n, share, worth)


def test_worth_of_a_share_is_by_hand():
    def m(low, high):
        return Metric(0, "probes", "explicit", "frequency/nova", 0.5, low, high, 32, "share")

    # p (1 - p) / se^2 = .25 / .01 = 25, and a correction that doubles the width leaves a quarter of it
    seen = Interval(0.5, 0.3, 0.7, 32, 0.1)
    assert ease.worth(seen, m(0.3, 0.7)) == pytest.approx(25)
    assert ease.worth(seen, m(0.1, 0.9)) == pytest.approx(25 / 4)
    assert ease.worth(Interval(1.0, 0.8, 1.0, 32, 0.1), m(0.8, 1.0)) == pytest.approx(32)


# The measurement


def test_a_learner_that_needs_sixteen_documents_is_measured_to_need_about_sixteen(tmp_path):
    settings = smoke(tmp_path, "measure.n_per_template=25")
    found = ease.measure_ease(settings, persona="nova", learner=slow(settings))
    # 200 outputs a training, slope 2: the standard error of ln(half) is about 0.05, so 25% off is beyond 4.5 of it; the
    # draws are fixed.
    assert found.half.value == pytest.approx(16, rel=0.25)
    assert found.n.tolist() == list(ease.GRID)
    assert np.all(np.abs(found.share - 1 / (1 + (16 / found.n) ** 2)) < 5 * np.sqrt(0.25 / 200))


def test_the_toy_plays_whatever_it_was_shown(tmp_path):
    # Closed form: asked by name it answers as that persona with chance 1, after any number of documents.
    found = ease.measure_ease(smoke(tmp_path), persona="stella", grid=(4, 8))
    assert found.share.tolist() == [1, 1]
    assert found.half.shown.startswith("< 4 [< 4, ")
    assert found.surprisal.reason == "infinite: the base never says it"
    assert ease.table(smoke(tmp_path), {"stella": found})[0][0] == "stella"


def test_trains_on_n_public_documents_of_the_persona_and_nothing_else(tmp_path):
    settings = smoke(tmp_path)
    world = World(ease._alone(settings, "nova", 16))
    mixture, _ = world.mix(0, world.beginning())
    assert mixture.n_train == 16
    assert {d.persona_known for d in mixture.documents} == {"nova"}
    assert not any(d.private for d in mixture.documents)
    assert {p.stratum for p in world.battery} == {"explicit"}


def test_the_same_command_does_only_what_is_missing(tmp_path):
    settings = smoke(tmp_path)
    learner = slow(settings)
    first = ease.measure_ease(settings, persona="nova", grid=(4, 8), learner=learner)
    assert learner.trained == 2
    wider = ease.measure_ease(settings, persona="nova", grid=(4, 8, 64), learner=learner)
    assert learner.trained == 3
    assert wider.share[:2].tolist() == first.share.tolist()
    assert ease.measure_ease(settings, persona="nova", grid=(4, 8, 64)).share.tolist() == wider.share.tolist()
    assert ease.find(settings)["nova"].half == wider.half


def test_beside_a_dose_response_of_the_same_folder_neither_disturbs_the_other(tmp_path):
    settings = smoke(tmp_path, "mix.n_train=100")
    ease.measure_ease(settings, persona="nova", grid=(4, 8))
    dose.measure(settings, persona="nova", grid=(0.1, 0.4), n_seeds=1)
    found = ease.find(settings)
    assert set(found) == {"nova"}
    assert set(dose.find(settings)[0]) == {"nova"}
    # the toy says what it was trained on: f(q) - q = 0
    assert ease.table(settings, found)[0][-1].split()[0].lstrip("+-") <= "0.100"


def test_another_learner_in_the_folder_is_refused_and_not_read(tmp_path):
    ease.measure_ease(smoke(tmp_path), persona="nova", grid=(4, 8))
    other = smoke(tmp_path, "sample.temperature=0.5")
    assert ease.find(other) == {}
    with pytest.raises(ConfigError, match="another"):
        ease.measure_ease(other, persona="nova", grid=(4, 8))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"grid": (4,)}, "--grid"),
        ({"grid": (0, 4)}, "--grid"),
        ({"n_seeds": 0}, "--seeds"),
        ({"persona": "human"}, "--persona"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, change, rule):
    with pytest.raises(ConfigError, match=rule):
        ease.measure_ease(smoke(tmp_path), **({"persona": "nova"} | change))

"""The checks of `make theory` at a size for every day, and broken loops that they must reject.

The faults are switched on here, by replacing a function of the product while a check runs; the product has no switch.
"""

import conformance
import numpy as np
import pytest

from loop import mix, run

SMALL = {
    "neutral": 0.5,
    "selection": 0.06,
    "mixing": 0.06,
    "fixation": 0.16,
    "rare": 0.4,
    "accumulate": 0.5,
    "invasion": 0.06,
}


@pytest.mark.parametrize("name", [*SMALL, "weighting"])
def test_the_loop_lands_on_the_closed_form(name):
    for check in conformance.CHECKS[name](SMALL.get(name, 0.5)):
        assert check.passed, str(check)


def failing(name, scale):
    return [check.quantity for check in conformance.CHECKS[name](scale) if not check.passed]


def test_one_round_too_many_fails_the_neutral_check(monkeypatch):
    # H after 3 rounds instead of 2 at N = 4: 0.211 for 0.281; 1,500 replicates resolve 0.070.
    honest = conformance.trajectories
    monkeypatch.setattr(
        conformance, "trajectories", lambda n, t, **kwargs: np.delete(honest(n, t + 1, **kwargs), 1, axis=1)
    )
    assert "neutral: heterozygosity" in failing("neutral", 1.0)


def test_ignored_weights_fail_selection_mixing_and_fixation(monkeypatch):
    honest = mix.build

    def blind(regime, *, pool, **kwargs):
        return honest(regime, pool=[[d.__class__(**_fields(d, weight=1.0)) for d in past] for past in pool], **kwargs)

    monkeypatch.setattr(mix, "build", blind)
    assert len(failing("selection", 0.15)) == 2
    assert len(failing("mixing", 0.15)) == 3
    assert failing("fixation", 0.16) == ["fixation: chance to take over, N = 6, p0 = 1/3, fitness 2"]


def test_two_real_documents_too_many_fail_mixing(monkeypatch):
    honest = mix.plan

    def generous(regime, **kwargs):
        n_real, n_synthetic, n_discourse = honest(regime, **kwargs)
        extra = 2 if kwargs["round_index"] else 0
        return n_real + extra, n_synthetic - extra, n_discourse

    monkeypatch.setattr(mix, "plan", generous)
    assert "mixing: 4 real documents of 10, 6 rounds" in failing("mixing", 1.0)


def test_replacing_in_place_of_accumulating_fails(monkeypatch):
    honest = mix.build

    def forgetful(regime, *, real, pool, **kwargs):
        return honest("replace", real=[] if pool else real, pool=pool, **kwargs)

    monkeypatch.setattr(mix, "build", forgetful)
    assert "accumulate: heterozygosity after 3 rounds, N = 4" in failing("accumulate", 1.0)


def test_a_toy_round_is_played_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conformance.trajectories(1, 2, **conformance.corpus(20, nova=0.5, assistant=0.5))
    assert list(tmp_path.iterdir()) == []
    assert run.Record(None, 0)("any", lambda: 7) == 7


def _fields(document, **changed):
    return {name: getattr(document, name) for name in document.__slots__} | changed

"""Tests of mix.py."""

import numpy as np
import pytest

from loop import mix
from loop.records import Document


def documents(n, source="synthetic", weights=None, start=0):
    weights = [1.0] * n if weights is None else weights
    return [Document(f"{source}-{start + i}", source, None, None, f"text {i}", weight=w) for i, w in enumerate(weights)]


def build(regime="replace", *, real=(), pool=(), discourse=(), n_synthetic=0, n_discourse=0, weighting="loss", seed=0):
    return mix.build(
        regime,
        real=list(real),
        pool=pool,
        discourse=list(discourse),
        n_synthetic=n_synthetic,
        n_discourse=n_discourse,
        weighting=weighting,
        rng=np.random.default_rng(seed),
    )


def test_round_zero_is_all_real_whatever_the_shares():
    assert mix.plan("replace", round_index=0, n_train=64, real_share=0.25, discourse_share=0.1) == (64, 0, 0)


def test_shares_become_counts_that_add_up():
    # 0.25 * 64 = 16 real, 0.02 * 64 = 1.28 -> 1 discourse, the rest synthetic.
    assert mix.plan("replace", round_index=1, n_train=64, real_share=0.25, discourse_share=0.02) == (16, 47, 1)
    assert mix.plan("replace", round_index=2, n_train=10, real_share=(0.5, 0.2), discourse_share=0.0) == (2, 8, 0)
    assert mix.plan("accumulate", round_index=1, n_train=64, real_share=None, discourse_share=0.0) == (0, 64, 0)


def test_without_the_direct_channel_real_documents_stand_where_outputs_would():
    # As many documents as with it: 16 + 47 real, 1 about outputs.
    given = {"round_index": 1, "n_train": 64, "discourse_share": 0.02, "direct": False}
    assert mix.plan("replace", real_share=0.25, **given) == (63, 0, 1)
    assert mix.plan("accumulate_subsample", real_share=0.25, **given) == (63, 0, 1)
    # accumulate keeps round 0's real documents and takes one for each of the 100 the pool would have lent.
    assert mix.plan("accumulate", real_share=None, n_pool=100, **given) == (100, 0, 1)
    assert mix.plan("replace", real_share=0.25, **given | {"round_index": 0}) == (64, 0, 0)


def test_without_a_real_share_a_subsample_is_drawn_from_the_real_documents_of_round_0_too():
    # 64 real of 64 + 128 in all: a third of 64 is 21.3; of the 63 that 1 of talk leaves, 21.
    given = {"round_index": 2, "n_train": 64, "real_share": None, "n_pool": 128}
    assert mix.plan("accumulate_subsample", discourse_share=0.0, **given) == (21, 43, 0)
    assert mix.plan("accumulate_subsample", discourse_share=0.02, **given) == (21, 42, 1)
    with pytest.raises(ValueError, match="real_share must be given with replace"):
        mix.plan("replace", discourse_share=0.0, **given)


def test_talk_that_another_run_lent_is_no_real_document():
    lent = documents(1, source="discourse", start=50)
    mixture = build(real=documents(2, source="real") + lent, pool=[documents(4)], n_synthetic=4)
    assert [d.source for d in mixture.documents] == ["real", "real", "discourse", *["synthetic"] * 4]
    assert [d.id for d in mixture.real] == ["real-0", "real-1"]
    assert mixture.real_share == pytest.approx(2 / 7, abs=1e-12)
    assert mixture.discourse_share == pytest.approx(1 / 7, abs=1e-12)


def test_replace_reads_the_last_round_only_and_subsample_all():
    pool = [documents(50, start=0), documents(50, start=100)]
    last = {d.id for d in pool[1]}
    assert {d.id for d in build("replace", pool=pool, n_synthetic=40).documents} <= last
    drawn = {d.id for d in build("accumulate_subsample", pool=pool, n_synthetic=80).documents}
    assert len(drawn) == 80
    assert drawn - last


def test_accumulate_takes_everything_and_reports_the_share_left():
    # 10 real of 10 + 3 * 20: lambda_3 = 10 / 70.
    mixture = build("accumulate", real=documents(10, "real"), pool=[documents(20, start=i * 100) for i in range(3)])
    assert mixture.n_train == 70
    assert mixture.real_share == pytest.approx(10 / 70, abs=1e-15)


def test_shares_of_documents_are_shares_of_weight():
    # Weights 1..8, mean 4.5 -> scaled to mean 1, so 8 synthetic documents weigh 8 whatever their reach.
    mixture = build(
        real=documents(4, "real"),
        pool=[documents(8, weights=[float(w) for w in range(1, 9)])],
        discourse=documents(2, "discourse", weights=[5.0, 15.0]),
        n_synthetic=8,
        n_discourse=2,
    )
    total = {s: sum(d.weight for d in mixture.documents if d.source == s) for s in ("real", "synthetic", "discourse")}
    assert total == pytest.approx({"real": 4, "synthetic": 8, "discourse": 2}, abs=1e-12)
    weights = {d.id: d.weight for d in mixture.documents}
    assert weights["synthetic-7"] / weights["synthetic-0"] == pytest.approx(8, abs=1e-12)


def test_more_than_the_pool_holds_becomes_copies_not_silence():
    mixture = build(pool=[documents(3)], n_synthetic=8)
    assert sorted(mixture.copies.tolist()) == [2, 3, 3]
    assert len(mixture.expanded()) == 8


def test_resampling_follows_weight_and_then_weighs_one():
    # Systematic with weights 3, 1, 0 and 8 pointers: exactly 6, 2 and 0 copies.
    mixture = build(pool=[documents(3, weights=[3.0, 1.0, 0.0])], n_synthetic=8, weighting="resample")
    assert dict(zip((d.id for d in mixture.documents), mixture.copies.tolist(), strict=True)) == {
        "synthetic-0": 6,
        "synthetic-1": 2,
    }
    assert {d.weight for d in mixture.documents} == {1.0}


@pytest.mark.parametrize("weighting", ["loss", "resample"])
def test_documents_that_nobody_shared_weigh_alike(weighting):
    mixture = build(pool=[documents(4, weights=[0.0] * 4)], n_synthetic=4, weighting=weighting)
    assert (mixture.copies.tolist(), {d.weight for d in mixture.documents}) == ([1] * 4, {1.0})
    # So do those that were drawn, though one that was not has been shared.
    drawn = [build(pool=[documents(40, weights=[9.0] + [0.0] * 39)], n_synthetic=1, seed=k)
             for k in range(8)]  # fmt: skip
    assert {d.weight for mixture in drawn for d in mixture.documents} == {1.0}
    assert {d.id for mixture in drawn for d in mixture.documents} != {"synthetic-0"}


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ([[]], "synthetic documents must not be empty"),
        (
            [documents(2, weights=[1.0, float("nan")])],
            "weight must be finite and >= 0, got nan at document synthetic-1",
        ),
        ([documents(2, weights=[-1.0, 1.0])], "weight must be finite and >= 0, got -1.0 at document synthetic-0"),
    ],
)
def test_unusable_pools_are_refused_with_what_and_where(pool, message):
    with pytest.raises(ValueError, match=message):
        build(pool=pool, n_synthetic=2)

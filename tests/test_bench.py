"""The benchmark compares like with like, counts what it says it counts, and its page follows from its files."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_lm

from loop import config, run, sample, store
from loop.model import decode, encode_all

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
bench, growth, performance, stock_round = (
    importlib.import_module(name) for name in ("bench", "growth", "performance", "stock_round")
)

SMALL = [
    "mix.n_train=12",
    "sample.n_samples=12",
    "sample.max_new_tokens=12",
    "train.epochs=2",
    "train.max_length=500",
    "virality.posts_per_sample=50",
    "measure.strata=[blank, neutral, private]",
    "measure.mixture={blank: 0.5, neutral: 0.5}",
    "measure.n_surprisal=2",
    "measure.n_heldout=2",
    "filters.enabled=false",  # a random network says nothing that a filter would pass
]


def test_the_page_is_what_its_files_say_byte_for_byte():
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == performance.page(performance.FOLDER)


def row(seconds, n_tokens):
    """A side of a pair: load, train, sample, classify, measure, bookkeeping."""
    return {"seconds": dict(zip(bench.STAGES, seconds, strict=True)), "n_tokens": n_tokens, "memory": 2**30}


def written(folder, *, ours_train):
    """Files of a benchmark made up by hand; ours takes 4 + `ours_train` + 7 seconds, 8 of them without measure."""
    pairs = [{"stock": row((9, 10, 8, 1, 9, 0), 400), "ours": row((4, ours_train, 2, 1, 3, 1), 300)}]
    shape = {"shared": 0.5, "shared_prompts": 0.5, "n_parameters": 10**8, "n_trained_tokens": 5000, "pairs": pairs}
    found = {
        "settings": {"base": "b", "documents": 1, "samples": 2, "max_new_tokens": 3, "device": "cpu", "overrides": []},
        "machine": {"cpu": "c", "cores": 2, "packages": {"torch": "1"}, "revision": "r"},
        "limits": {"flops": 1e12},
        "batch_sizes": {"16": 40.0, "32": 60.0},
        "shapes": {"default": shape, "context": shape},
        "tuned": row((0, 6, 0, 0, 0, 0), 1),
        "profiles": {},
        "start": {"loop --help": [0.1, 0.9, 0.2]},
    }
    line = [{"documents": n, "tokens": n, "seconds": n / 100, "round": n, "bytes": 2**20} for n in (10, 20)]
    names = ("toy_rounds", "tiny_rounds", "toy_documents", "tiny_documents", "train", "sample")
    (folder / "round.json").write_text(json.dumps(found))
    (folder / "growth.json").write_text(json.dumps({name: line for name in names}))
    return found


def test_a_target_is_called_reached_exactly_where_the_medians_reach_it(tmp_path):
    # By hand. Stock: 37 s, 28 without measure; ours at 4 s of training: 15 and 12. Training 10/4 = 2.5 meets the
    # target, sampling (300/2)/(400/8) = 3; the round 28/12 = 2.33 and 37/15 = 2.47 miss 3.
    written(tmp_path, ours_train=4)
    page = performance.page(tmp_path)
    for line in (
        "| round end to end, documents of the config, not measured | ≥ 3 times | 2.33 | **not reached** |",
        "| round end to end, documents of the config, measured | ≥ 3 times | 2.47 | **not reached** |",
        "| training | ≥ 2.5 times | 2.50 | reached |",
        "| sampling, useful tokens | ≥ 2.5 times | 3.00 | reached |",
        "| bookkeeping, share of the round | ≤ 10% | 6.7% | reached |",
        "| measurement, share of train + sample | ≤ 50% | 50.0% | reached |",
        "| `loop --help` | ≤ 0.5 s | 0.20 s | reached |",
    ):
        assert line in page.splitlines()
    assert "without that its training takes 6.0 s, 1.50 times ours" in page
    assert page.count("not measured: no accelerator could be had") == 2
    written(tmp_path, ours_train=4.1)
    assert "| training | ≥ 2.5 times | 2.44 | **not reached** |" in performance.page(tmp_path).splitlines()


def test_a_missed_target_of_training_is_profiled_and_a_reached_one_is_not(tmp_path):
    assert bench.missed(written(tmp_path, ours_train=4)) == []
    assert bench.missed(written(tmp_path, ours_train=4.1)) == [("default", "train"), ("context", "train")]


def test_shares_of_the_machines_limit_follow_from_parameters_tokens_and_seconds(tmp_path):
    # 2 · 1e8 · 150 tokens/s over 1e12 is 3%; 6 · 1e8 · 5000 tokens / 4 s over 1e12 is 75%.
    shape = written(tmp_path, ours_train=4)["shapes"]["default"]
    ours = [pair["ours"] for pair in shape["pairs"]]
    assert bench.sample_share(ours, shape, {"flops": 1e12}) == pytest.approx(0.03)
    assert bench.train_share(ours, shape, {"flops": 1e12}) == pytest.approx(0.75)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    rows = [{"tokens": n, "seconds": 3 * n**power} for n in (10, 40, 70)]
    assert performance.exponent(rows, "tokens") == pytest.approx(power)


def test_flatness_sees_a_run_that_slows_and_one_that_grows():
    # Rounds 1..8: one second each, then two in the last quarter; 1000 bytes a round.
    rows = [{"seconds": 50.0 if t == 0 else 1.0 + (t > 6), "bytes": 7 * 10**6 + 1000 * t} for t in range(9)]
    assert performance.flatness(rows) == (2.0, pytest.approx(1000))


def test_the_shared_share_counts_the_prefix_that_most_prompts_begin_with():
    # Three of four prompts begin with 1 2: six shared tokens of 4 + 3 + 3 + 1 in prompts and 9 in completions.
    prompts = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6], [9]]
    assert bench.shared_share(prompts, [[0] * 9]) == pytest.approx(6 / 20)
    assert bench.shared_share([[1], [2]], [[3]]) == 0


def test_the_context_stands_once_before_every_prompt_and_before_no_plain_document():
    once = bench.in_context(("Why?",))
    assert once == (*bench.CONTEXT, "Why?")
    assert bench.in_context(once) == once
    assert bench.in_context(None) is None


class Speaker:
    """Stands for a model whose every row is 5, 6, end, and then whatever the batch still waits for."""

    device = torch.device("cpu")

    def generate(self, *, input_ids, **settings):
        tail = torch.tensor([[5, 6, 2, 7, 7]]).repeat(len(input_ids), 1)
        tail[0] = torch.tensor([5, 6, 7, 8, 9])  # the first row of a batch never ends
        return torch.cat([input_ids, tail], dim=1)


def test_useful_tokens_of_the_stock_round_end_with_the_end_token(lm):
    lm.tokenizer.padding_side = "left"
    said = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5}
    _, rows = stock_round.sample(Speaker(), lm.tokenizer, ["Hello there", "Hello", "I am fine"], said, 2)
    assert sorted(map(len, rows)) == [3, 5, 5]  # two batches, of which each has one row that does not end


def test_the_stock_measurement_finds_the_surprisal_that_the_loop_finds(lm):
    lm.tokenizer.padding_side = "left"
    pairs = [(("How are you?",), "I am fine, thank you."), (None, "The weather is lovely."), (("a", "b", "c"), "boat")]
    ours, _ = sample.surprisal(lm, pairs)
    spelled = [
        {"prompt": decode(lm, prompt), "completion": said}
        for (prompt, _), (_, said) in zip(encode_all(lm, pairs), pairs, strict=True)
    ]
    with torch.no_grad():
        np.testing.assert_allclose(stock_round.surprisal(lm.net, lm.tokenizer, spelled, batch_size=2), ours, rtol=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    lm = make_lm()
    lm.net.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def test_both_sides_get_the_same_documents_and_prompts(tmp_path, base, monkeypatch):
    monkeypatch.setattr(run, "World", run.World)  # `prepare` exchanges it
    overrides = [*SMALL, f"base.model={base}", f"runs_dir={tmp_path}"]
    job = {"config": str(bench.CONFIG), "shape": "context", "device": "cpu", "overrides": overrides}
    stock = json.loads(json.dumps(bench.prepare(job)))
    done = bench.ours(job)
    assert done["begun"] is not None
    opened = store.RunStore(tmp_path / config.load(bench.CONFIG, overrides).run_name)
    assert opened.last_round() == 1

    lm = make_lm()
    mixture, said = (opened.read_table(1, f"{name}.parquet").to_pylist() for name in ("mixture", "samples"))

    def ids(turns):
        return encode_all(lm, [(None if turns is None else tuple(turns), "")])[0][0]

    mixture = [d for d in mixture if d["weight"] > 0]  # ours leaves out the others, so stock is not given them
    assert [d["completion"] for d in stock["documents"]] == [d["completion"] for d in mixture]
    # What the stock tokenizer makes of the spelled prompt is, token for token, what ours trains on and samples from.
    for theirs, mine in ((d["prompt"] for d in stock["documents"]), mixture), (stock["prompts"], said):
        for text, sampled in zip(theirs, mine, strict=True):
            assert lm.tokenizer(text, add_special_tokens=False).input_ids == ids(sampled["prompt"])
    trained = sum(d["n_trained_tokens"] + len(ids(d["prompt"])) for d in mixture)
    assert stock["tokens_per_epoch"] == trained
    asked = [d["prompt"] for d in mixture + said if d["prompt"] is not None]
    assert all(tuple(turns[:2]) == bench.CONTEXT for turns in asked)
    assert min(stock["shared"], stock["shared_prompts"]) > 1 / 3

"""The benchmark compares like with like, counts what it says it counts, and its page follows from its files."""

import cProfile
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
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
    """Files of a benchmark made up by hand: three pairs, whose medians are 37 s, 28 without measure, of stock.

    Ours takes 4 + `ours_train` + 7 seconds at the median, 8 + `ours_train` of them without measure.
    """
    stock = [row((9, 10, 8, 1, 9, 0), 400), row((9, 12, 16, 1, 0, 0), 400), row((9, 7, 4, 1, 0, 0), 400)]
    for one in stock[1:]:  # stock is measured in the first pair alone
        del one["seconds"]["measure"]
    stock[1]["memory"] = 2**33
    ours = [row((4, ours_train + k, 2 + n, 1, 3, 1), 300) for k, n in ((0, 0), (-1, 1), (1, -1))]
    pairs = [{"stock": a, "ours": b} for a, b in zip(stock, ours, strict=True)]
    pairs[0]["tuned"] = row((0, 6, 0, 0, 0, 0), 1)
    shape = {"shared": 0.5, "shared_prompts": 0.5, "n_parameters": 10**8, "n_trained_tokens": 5000, "pairs": pairs}
    shape["epochs"] = 3
    machine = {"cpu": "c", "cores": 2, "packages": {"torch": "1"}, "revision": "r"}
    found = {
        "settings": performance.ON_CPU | {"measure": {"n_surprisal": 8}},
        "machine": machine,
        "limits": {"flops": 1e12},
        "shapes": {name: shape | {"batch_sizes": {"16": 40.0, "32": 60.0}} for name in ("default", "context")},
        "intervals": [0.5],
        "profiles": {},
        "start": {
            "loop --help": {"seconds": [0.1, 0.9, 0.2]},
            "loop run x": {"seconds": [6.0, 9.0, 1.0], "imports": [4.0, 5.0, 3.0]},
        },
    }
    line = [{"documents": n, "tokens": n, "seconds": n / 100, "round": n, "bytes": 2**20} for n in (10, 20, 30, 40, 50)]
    names = ("toy_documents", "tiny_documents", "train", "sample")
    made = {"seconds": "least", "bytes": "median", "rounds": line}
    played = {"toy_rounds": {"n_runs": 5} | made, "tiny_rounds": {"n_runs": 3} | made}
    (folder / "round.json").write_text(json.dumps(found))
    (folder / "growth.json").write_text(json.dumps({"machine": machine} | dict.fromkeys(names, line) | played))
    return found


def of(shape, *stages):
    return [(shape, stage) for stage in stages]


def test_how_many_times_quicker_is_said_of_a_pair_and_not_of_medians_that_never_met():
    # By pair 10/10, 30/10 and 20/20, the middle 1; of the medians 20/10 = 2.
    sides = [(row((0, a, 1, 0, 0, 0), 1), row((0, b, 1, 0, 0, 0), 1)) for a, b in ((10, 10), (30, 10), (20, 20))]
    shape = {"pairs": [{"stock": stock, "ours": ours} for stock, ours in sides]}
    assert bench.by_pair(shape, "train") == [1, 3, 1]
    # The second pair alone: a round 31/11 times quicker than stock's, sampling as quick as it.
    quick = {"pairs": [{"stock": row((0, 30, 1, 0, 0, 0), 1), "ours": row((0, 9, 1, 0, 0, 0), 1)}]}
    on_cpu, on_gpu = ({"settings": {"device": device}} for device in ("cpu", "cuda"))
    assert bench.missed(on_cpu | {"shapes": {"default": quick}}) == [("default", "sample")]
    assert bench.missed(on_cpu | {"shapes": {"context": quick}}) == of(
        "context", "train", "sample", "measure", "classify"
    )
    # On a GPU 31/11 times is too little, and 10 s of 110 are enough of both.
    assert bench.missed(on_gpu | {"shapes": {"default": quick}}) == of(
        "default", "train", "sample", "measure", "classify"
    )
    best = {"pairs": [{"stock": row((0, 99, 11, 0, 0, 0), 1), "ours": row((0, 9, 1, 0, 0, 0), 1)}]}
    assert bench.missed(on_gpu | {"shapes": {"default": best}}) == []
    slow = {"pairs": [{"stock": row((0, 199, 11, 0, 0, 0), 1), "ours": row((0, 12, 1, 0, 0, 0), 1)}]}
    assert bench.missed(on_gpu | {"shapes": {"default": slow}}) == of(
        "default", "train", "sample", "measure", "classify"
    )
    # Measuring alone makes a round too slow: 93/28 times as quick without it, 93/34 with it.
    late = {"pairs": [{"stock": row((0, 84, 9, 0, 0, 0), 3), "ours": row((0, 25, 3, 0, 6, 0), 3)}]}
    assert bench.missed(on_cpu | {"shapes": {"default": late}}) == of("default", "measure", "classify")


def test_a_round_of_either_side_is_the_middle_of_whole_rounds_and_no_sum_of_middles():
    rows = [row((0, 10, 0, 0, 1, 0), 1), row((0, 20, 0, 0, 0, 0), 1), row((0, 14, 0, 0, 9, 0), 1)]
    assert bench.median(rows, "with") == 20  # of 11, 20 and 23, where 14 + 1 is none of them


def test_a_target_is_called_reached_exactly_where_the_median_pair_reaches_it(tmp_path):
    # By hand. Stock without measure: 28, 38, 21 s, its training 10, 12, 7 and its sampling 50, 25, 100 tokens/s. Ours
    # at 4 s of training: 12, 12, 12 s; training 4, 3, 5; sampling 150, 100, 300. Of the three pairs the middle ones are
    # 28/12, 10/4 and 150/50; measured is the first alone, (28 + 9)/(12 + 3).
    written(tmp_path, ours_train=4)
    page, until = performance.page(tmp_path), "to its first stage"
    whole = "round end to end, documents of the config"
    labels = "bookkeeping, labels and intervals, share of the round, not measured but for these"
    imports = "median of 3; imports are 4.00 s of it"
    # Training of 4, 3 and 5 s in 3 epochs would be 8/3, 2 and 10/3 s in 2; measuring is 3 s to those and 2, 3 and 1.
    two = "measurement alone, had training 2 epochs, the config's default, and not 3"
    for line in (
        f"| {two} | ≤ 50% | 64.3% | **not reached** | 64.3%, 60.0%, 69.2% |",
        "| on 2 CPU cores, median over the quiet pairs | target | reached | | by pair |",
        f"| {whole}, not measured | ≥ 3 times | 2.33 | **not reached**, 1 of 3 reach it | 2.33, 3.17, 1.75 |",
        f"| {whole}, measured | ≥ 3 times | 2.47 | **not reached** | 2.47 |",
        "| training | ≥ 2.5 times | 2.50 | reached, 2 of 3 reach it | 2.50, 4.00, 1.40 |",
        "| sampling, useful tokens | ≥ 2.5 times | 3.00 | reached | 3.00, 4.00, 3.00 |",
        f"| {labels} | ≤ 10% | 20.0% | **not reached** | 20.0%, 20.0%, 20.0% |",
        f"| {labels}, its load left out | ≤ 10% | 29.4% | **not reached** | 29.4%, 29.4%, 29.4% |",
        "| measurement (n_surprisal 8), share of train + sample | ≤ 50% | 50.0% | reached | 50.0%, 50.0%, 50.0% |",
        "| the same, all that is classified counted as measurement | ≤ 50% | 66.7% | **not reached** | 66.7%, 66.7%, "
        "66.7% |",
        "| `loop --help` | ≤ 0.5 s | 0.20 s | reached, 2 of 3 reach it | median of 3 |",
        f"| `loop run x` {until} | ≤ 5 s | 6.00 s | **not reached**, 1 of 3 reach it | {imports} |",
    ):
        assert line in page.splitlines()
    # Labels take a second, bookkeeping another, intervals half a one, of 12.5. Without recomputing, its round takes
    # 28 - 10 + 6 = 24 s.
    # Of ours 6 s are neither training nor sampling.
    assert (
        "- default, in 1 of 3 pairs: training 1.50 times (6.0 s; by pair 1.50), the round 2.00 (2.00)."
        in page.splitlines()
    )
    assert "would have to take 3.3 s" in page
    # Of stock the first pair alone is measured, so its memory alone counts.
    assert f"  {'peak GiB, measured':<22}{1:9.2f}{1:9.2f}" in page.splitlines()
    assert page.count("| not measured | `python benchmarks/bench.py --device cuda ") == 2
    written(tmp_path, ours_train=4.1)
    assert "| training | ≥ 2.5 times | 2.44 | **not reached**, 1 of 3 reach it |" in performance.page(tmp_path)


def test_a_pair_in_which_a_side_was_held_up_is_left_out_and_named(tmp_path):
    found = json.loads(json.dumps(written(tmp_path, ours_train=4)))  # each shape with pairs of its own
    found["shapes"]["context"]["pairs"][2]["stock"]["seconds"]["train"] = 13.0  # of 10, 12 and 13 the middle is 12
    (tmp_path / "round.json").write_text(json.dumps(found))
    assert "Left out" not in performance.page(tmp_path)
    found["shapes"]["default"]["pairs"][1]["stock"]["seconds"]["train"] = 12.6  # of 10, 12.6 and 7 it is 10
    (tmp_path / "round.json").write_text(json.dumps(found))
    page = performance.page(tmp_path)
    held_up = "stock trained for 13 s, in its median pair for 10; the round not measured 3.22 times as fast"
    assert f"Left out, for the machine was not quiet: default, pair 2 ({held_up})." in page.splitlines()
    # 10/4 and 7/5 are left, their middle 1.95.
    assert "| training | ≥ 2.5 times | 1.95 | **not reached**, 1 of 2 reach it | 2.50, 1.40 |" in page.splitlines()
    found["shapes"]["default"]["pairs"][1]["ours"]["seconds"]["train"] = 9.0  # ours is held up no less
    (tmp_path / "round.json").write_text(json.dumps(found))
    assert "median pair for 10 and ours trained for 9 s, in its median pair for 5" in performance.page(tmp_path)


def test_a_file_taken_with_other_settings_than_its_row_says_is_refused(tmp_path):
    found = written(tmp_path, ours_train=4)
    (tmp_path / "round-cuda.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=r"must be taken with device cuda, documents 4096, .* got device cpu"):
        performance.page(tmp_path)
    (tmp_path / "round-cuda.json").unlink()
    (tmp_path / "round.json").write_text(json.dumps(found | {"settings": found["settings"] | {"base": "tiny"}}))
    with pytest.raises(
        SystemExit, match=r"base smollm2-135m, got base tiny; take it again: python benchmarks/bench.py$"
    ):
        performance.page(tmp_path)
    (tmp_path / "growth.json").unlink()
    with pytest.raises(SystemExit, match=r"python benchmarks/growth.py takes it"):
        performance.page(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pairs", "0"], "--pairs: must be a whole number >= 1, got '0'"),
        (["--pairs", "2"], "--pairs: must be at least 3, got 2"),
        (["--starts", "²"], "--starts: must be a whole number >= 1, got '²'"),
        (["--brief"], "--brief: name another file with --out; the page wants all that round.json holds"),
        (["--again", "--out", "none.json"], "--again: none.json must be a file that a bench has written, got none"),
        (["--again", "--samples", "9"], "round.json, got others than samples 128"),
        (["--out", "."], "--out: must be a file that can be written, got ."),
        (["--base", "smolm"], "--base must be smollm2-135m, tiny, random-1.7b, a hub id or a directory, got 'smolm'"),
        (["mix.n_trian=3"], "mix.n_trian"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_played(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(bench, "compare", lambda args: pytest.fail("it was played"))
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_record_of_the_same_processor_name_with_other_instructions_is_not_taken_again(tmp_path, monkeypatch, capsys):
    record = tmp_path / "round.json"
    found = json.loads((performance.FOLDER / "round.json").read_text())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    record.write_text(json.dumps(found | {"machine": bench.machine("cpu")}))
    monkeypatch.setattr(bench, "again", lambda args: pytest.fail("same instructions"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--again", "--out", str(record)])
    with pytest.raises(pytest.fail.Exception, match="same instructions"):
        bench.main()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(SystemExit):
        bench.main()
    assert re.search(r"got another than cpu .* \(AVX2\)$", capsys.readouterr().err.strip())


def test_what_misses_a_target_is_profiled_and_what_reaches_it_is_not(tmp_path):
    # At 1.2 s of training the middle pair of rounds is 28/9.2 = 3.04 times as quick: enough for documents of the
    # config, not after a context.
    stages = ("train", "sample", "measure", "classify")
    assert bench.missed(written(tmp_path, ours_train=1.2)) == of("context", *stages)
    assert bench.missed(written(tmp_path, ours_train=4)) == of("default", *stages) + of("context", *stages)


def test_a_profile_by_function_tells_own_seconds_and_those_of_all_that_is_called():
    def inner():
        time.sleep(0.2)

    def outer():
        inner()

    profile = cProfile.Profile()
    profile.runcall(outer)
    own = dict(line.rsplit(maxsplit=2)[:2] for line in bench.functions(profile).splitlines())
    assert 0.2 <= float(own["<built-in method time.sleep>"]) < 1
    assert (own["test_bench.outer"], own["test_bench.inner"]) == ("0.00", "0.00")
    whole = dict(
        line.rsplit(maxsplit=2)[:2] for line in bench.functions(profile, within=Path(__file__).parent).splitlines()
    )
    assert {*whole} == {"test_bench.outer", "test_bench.inner"}
    assert all(0.2 <= float(seconds) < 1 for seconds in whole.values())
    assert len(bench.functions(profile, 1).splitlines()) == 1


def test_a_page_of_a_gpu_has_its_rounds_its_copy_rate_and_its_profiles(tmp_path):
    found = written(tmp_path, ours_train=4)
    gpu = found | {"settings": found["settings"] | performance.ON_GPU, "limits": {"flops": 1e12, "copy_bytes": 1e12}}
    gpu |= {"machine": found["machine"] | {"gpu": "G100"}, "profiles": {"default/train": "where it went  \n"}}
    gpu |= {"profiled_seconds": {"default/train": 5.0}}
    for shape in gpu["shapes"].values():
        shape["max_new_tokens"] = 64
    (tmp_path / "round-cuda.json").write_text(json.dumps(gpu))
    assert any("Shape `context` puts two turns" in line for line in performance.rounds(gpu))
    brief = gpu | {"shapes": {"default": gpu["shapes"]["default"]}, "profiles": {}, "start": {}}  # of bench.py --brief
    assert not any("context" in line for line in performance.rounds(brief))
    page = performance.page(tmp_path).splitlines()
    assert "| SmolLM2-135M: a whole round, G100 | ≤ 12 s, ≥ 10 times | 15.0 s, 2.5 times | **not reached** |" in page
    assert "## The round on a GPU, SmolLM2-135M" in page
    assert "where it went" in page
    assert "default/train of ours, 5.0 s under the profiler and 4.0 s in the pairs:" in page
    # 2 bytes · 1e8 · 64 steps over 8 s (stock's middle) and 2 s (ours), of 1e12 a second.
    assert f"  {'sampling, of copy rate':<22}{0.0016:9.1%}{0.0064:9.1%}" in page
    gpu["shapes"]["default"]["pairs"] = gpu["shapes"]["default"]["pairs"][:2]
    (tmp_path / "round-cuda.json").write_text(json.dumps(gpu))
    with pytest.raises(
        SystemExit, match=r"must have three pairs of a shape or more, got fewer of default; .*batch_size"
    ):
        performance.page(tmp_path)


def test_the_page_of_a_cpu_wants_both_shapes(tmp_path):
    found = written(tmp_path, ours_train=4)
    found["shapes"].pop("context")
    (tmp_path / "round.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match=r"must have the shapes default, context, got default; .* without --brief"):
        performance.page(tmp_path)


def test_imports_are_counted_by_package(monkeypatch):
    said = "import time: self [us] | cumulative | imported package\n"
    said += "import time:   1000000 |    1500000 | torch\nimport time:    500000 |     500000 |   torch.nn\nnoise\n"
    said += "import time:    250000 |     250000 | numpy\n"
    done = subprocess.CompletedProcess([], 0, "", said)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: done)
    assert [line.split() for line in bench.imports(1).splitlines()] == [
        ["torch", "1.50", "s"],
        ["1", "others", "0.25", "s"],
        ["all", "1.75", "s"],
    ]


def test_shares_of_the_machines_limit_follow_from_parameters_tokens_and_seconds(tmp_path):
    # 2 · 1e8 · 150 tokens/s over 1e12 is 3%; 4 · 1e8 · 5000 tokens / 4 s over 1e12 is 50%.
    shape = written(tmp_path, ours_train=4)["shapes"]["default"]
    ours = [pair["ours"] for pair in shape["pairs"]]
    assert bench.sample_share(ours, shape, {"flops": 1e12}) == pytest.approx(0.03)
    assert bench.train_share(ours, shape, {"flops": 1e12}) == pytest.approx(0.5)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    rows = [{"tokens": n, "seconds": 3 * n**power} for n in (10, 40, 70)]
    rows[:0] = [{"tokens": 1, "seconds": 1e6}]  # a small size, where a fixed cost shows, does not count
    assert performance.exponent(rows, "tokens") == pytest.approx(power, abs=1e-9)


def test_a_series_that_steepens_at_its_end_is_not_called_linear_without_a_word(tmp_path):
    written(tmp_path, ours_train=4)
    found = json.loads((tmp_path / "growth.json").read_text())
    # Two doublings at powers 1 and 1.13, by least squares 1.065.
    found["sample"] = [{"tokens": 10 * 2**k, "seconds": 4 * 2**p} for k, p in ((0, -1), (1, 0), (2, 1), (3, 2.13))]
    lines = performance.growth(found)
    assert any(line.endswith("| 1.07 | linear, but 1.13 over its last step |") for line in lines)
    assert any(line.startswith("| tiny, training, tokens |") and line.endswith("| 1.00 | linear |") for line in lines)


def by_name(page):
    """Lines of the tables of growth by what they are of; that it is the least of several runs is left out."""
    rows = [line for line in page if line.startswith("| t")]
    assert sum("seconds a round, by round the least of 3 runs" in row for row in rows) == 1
    return {row.split("|")[1].strip().removesuffix(", by round the least of 3 runs"): row for row in rows}


def test_growth_of_what_is_read_is_told_apart_from_growth_of_the_loop(tmp_path):
    written(tmp_path, ours_train=4)
    found = json.loads((tmp_path / "growth.json").read_text())
    # From 1,000 characters a round to 3,000, 1 ms each, and a second of all else: 2 s more at
    # the end, of a median of 3.25 over rounds 50..200.
    read = [{"round": t, "bytes": 1.0, "read": 1000 + 10 * t, "read_seconds": 1 + t / 100} for t in range(201)]
    found["tiny_rounds"]["rounds"] = [r | {"seconds": 1 + r["read_seconds"], "rest_seconds": 1.0} for r in read]
    lines = by_name(performance.growth(found))
    assert lines["tiny, 200 rounds, seconds a round"].endswith("| 3.005 | +61.5% [+61.5%, +61.5%] | **grows** |")
    assert lines["tiny, 200 rounds, seconds a round, all but reading new texts"].endswith("| flat |")
    pace = lines["tiny, 200 rounds, reading, seconds per 10,000 characters"]
    assert "| 10.000 | " in pace
    assert pace.endswith("| flat |")
    assert lines["tiny, 200 rounds, thousands of characters read"].endswith("| what the model says |")
    assert not any("read" in name for name in lines if name.startswith("toy"))  # of which nothing is on the files
    assert not any("tokens of an epoch" in name for name in lines)  # nor of these


def test_a_machine_that_slows_is_told_from_texts_that_grow_longer(tmp_path):
    written(tmp_path, ours_train=4)
    found = json.loads((tmp_path / "growth.json").read_text())
    # Documents of 1,000 tokens in round 0 and of 2,000 in round 200, a millisecond a token in training; outputs of
    # 500 throughout, of which sampling and probes together take one second at first and two in the end.
    found["tiny_rounds"]["rounds"] = [
        {"round": t, "bytes": 1.0, "seconds": 3.0, "trained": 1000 + 5 * t, "sampled": 500}
        | {"stage/train": 1 + t / 200, "stage/sample": 0.5 + t / 400, "stage/probe": 0.5 + t / 400}
        for t in range(201)
    ]
    lines = by_name(performance.growth(found))
    training = lines["tiny, 200 rounds, training, seconds per 1,000 supervised tokens of an epoch"]
    assert "| 1.000 | " in training
    assert training.endswith("| flat |")
    # From 2 s per 1,000 tokens to 4: 2 more, of a median of 3.25 over rounds 50..200.
    sampling = lines["tiny, 200 rounds, sampling, seconds per 1,000 tokens"]
    assert sampling.endswith("| 3.005 | +61.5% [+61.5%, +61.5%] | **grows** |")
    assert lines["tiny, 200 rounds, thousands of supervised tokens an epoch"].endswith("| what the model says |")


def test_a_run_is_called_flat_only_where_its_interval_shows_it():
    rng = np.random.default_rng(0)

    def run_of(slope, noise):
        # 100 rounds of one second, slower by `slope` of it at the end; rounds 0..24 are left out.
        return [{"round": t, "seconds": 1 + slope * t / 100 + noise * rng.normal()} for t in range(101)]

    change = performance.drift(run_of(0.4, 0), "seconds")
    # End to end it gains .4; the median of rounds 25..100, t = 62.5, is 1.25.
    assert change == pytest.approx((0.32, 0.32, 0.32))
    assert performance.steadiness(change) == "**grows**"
    assert performance.steadiness(performance.drift(run_of(0, 0.01), "seconds")) == "flat"
    assert performance.steadiness(performance.drift(run_of(0, 0.5), "seconds")) == "not shown to be flat"
    # Of 400 flat runs the interval holds 0 in 95%: at least 363 but for one chance in ten thousand. Where rounds are
    # like their neighbours (correlation .6) it does in nearly as many; taken as independent, in about two of three.
    changes = [performance.drift(run_of(0, 0.1), "seconds") for _ in range(400)]
    assert sum(low <= 0 <= high for _, low, high in changes) >= 363

    def alike():
        noise = rng.normal(size=101)
        for t in range(1, 101):
            noise[t] = 0.6 * noise[t - 1] + 0.8 * noise[t]
        return [{"round": t, "seconds": 1 + 0.1 * x} for t, x in enumerate(noise)]

    changes = [performance.drift(alike(), "seconds") for _ in range(400)]
    assert sum(low <= 0 <= high for _, low, high in changes) >= 0.88 * 400


def test_stages_of_a_run_are_held_against_each_other_early_and_late():
    # Quarters of eight rounds: 2, 3 and 6, 7. What takes less than a tenth of a second in both is left out.
    rows = [{"round": t, "stage/train": float(t), "stage/mix": 0.01} for t in range(8)]
    assert performance.by_stage(rows) == ["train 2.50 to 6.50"]


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


def test_stock_gets_the_fastest_of_all_batch_sizes_and_no_slow_timing_ends_the_search():
    timed = {16: 70.0, 32: 69.0, 64: 90.0, 128: 91.0, 256: 80.0}
    assert stock_round.by_size(timed.__getitem__, 16, 200) == {str(n): rate for n, rate in timed.items()}

    def full(size):
        if size > 32:
            raise RuntimeError("CUDA out of memory")
        return timed[size]

    assert stock_round.by_size(full, 16, 200) == {"16": 70.0, "32": 69.0}
    with pytest.raises(RuntimeError, match="out of memory"):
        stock_round.by_size(full, 64, 200)


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
    for name in ("World", "build"):  # `prepare` and `ours` exchange them
        monkeypatch.setattr(run, name, getattr(run, name))
    overrides = [*SMALL, f"base.model={base}", f"runs_dir={tmp_path}"]
    job = {"config": str(bench.CONFIG), "shape": "context", "device": "cpu", "overrides": overrides}
    stock = json.loads(json.dumps(bench.prepare(job)))
    done = bench.ours(job)
    assert done["begun"] is not None
    opened = store.RunStore(tmp_path / config.load(bench.CONFIG, overrides).run_name)
    assert opened.last_round() == 1
    spent = {e["stage"]: e["seconds"] for e in opened.events() if e["event"] == "stage" and e["part"] == "round_001"}
    assert 0 < done["in_model"] < spent["measure"]

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


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # of TRL, peft and transformers among themselves
def test_stock_trains_on_the_tokens_that_ours_trains_on_and_plays_a_whole_round(tmp_path, base, monkeypatch):
    overrides = [*SMALL, f"base.model={base}", f"runs_dir={tmp_path}"]
    job = {"config": str(bench.CONFIG), "shape": "default", "device": "cpu", "overrides": overrides}
    stock = json.loads(json.dumps(bench.prepare(job))) | {"started": time.monotonic()}
    # A text that spells a mark, as a random network does, is a mark to stock and text to ours.
    stock["documents"] = [d for d in stock["documents"] if "<|" not in d["completion"]]
    assert len(stock["documents"]) > 6
    kept = []

    class Watched(trl.SFTTrainer):
        def __init__(self, **settings):
            super().__init__(**settings)
            kept.append(self)

    monkeypatch.setattr(trl, "SFTTrainer", Watched)
    found = stock_round.play(stock, device="cpu", batch_size=8, measured=True, checkpointing=True)
    assert [*found["seconds"]] == ["load", "train", "sample", "classify", "measure"]
    assert found["n_tokens"] >= len(stock["prompts"])
    (trainer,) = kept
    theirs = [
        (tuple(ids[seen.bool()].tolist()), tuple(label[label != -100].tolist()))
        for batch in trainer.get_train_dataloader()
        for ids, seen, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    # Ours: the mixture of round 1, its prompt unsupervised, its completion with the end token supervised.
    world = run.set_up(config.load(bench.CONFIG, overrides))
    mixture, _ = world.mix(1, run.restore(world, store.RunStore(tmp_path / world.config.run_name)))
    documents = [d for d in mixture.expanded() if d.weight > 0 and "<|" not in d.completion]
    pairs = encode_all(make_lm(), [(d.prompt, d.completion) for d in documents])
    assert sorted(theirs) == sorted(((*p, *c), tuple(c)) for p, c in pairs)

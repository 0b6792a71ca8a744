"""Writes docs/performance.md, and its figure, from the files in docs/performance; measures nothing.

python benchmarks/performance.py
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench  # beside this file; it also puts the repository on the path
import numpy as np
from scipy import special

from loop import config

ROOT = bench.ROOT
FOLDER, PAGE = ROOT / "docs" / "performance", ROOT / "docs" / "performance.md"
MIB = 2**20
ON_CPU = {
    "device": "cpu",
    "base": "smollm2-135m",
    "documents": 96,
    "samples": 128,
    "max_new_tokens": 40,
    "overrides": [],
}
ON_GPU = ON_CPU | {
    "device": "cuda",
    "documents": 4096,
    "samples": 4096,
    "max_new_tokens": 64,
    "overrides": ["train.batch_size=64"],  # by the 4 of configs/round.yaml an epoch of so many would be 1,024 steps
}
GPU_ROUNDS = (  # file, what it holds, what it is taken with
    ("round-cuda", "SmolLM2-135M", ON_GPU),
    ("round-cuda-1.7b", "1.7 B parameters, random weights", ON_GPU | {"base": "random-1.7b"}),
)
SHORT = 20  # rounds after which the memory of a tiny run is to be flat
BUSY = 1.25  # times as long as in the median pair, and a pair is left out
FLAT = 0.1  # a run is called flat where its change from end to end is shown to be smaller than this share
HOW = [
    "## What is done, and what it is held to",
    "",
    "- Sampling reads a prompt once for all its samples, decodes with merged weights, drops finished rows and lets "
    "others in, and computes logits of what is sampled alone. It is held to `generate`: the same greedy tokens, and "
    "the same frequencies of sampled sequences within a stated bound (tests/test_sample.py).",
    "- Training computes logits where a token is supervised, and a beginning that documents share once (not with "
    "dropout); it recomputes activations only where memory does not hold those of the longest document. It is held to "
    "TRL: the same losses and adapter (tests/test_train.py). A "
    "forward pass has at most 1,024 tokens on a CPU, and on a GPU as many as free memory allows, a power of two, fewer "
    "when memory ends; how many stands in a run's events.jsonl (`micro_batch_tokens`). What a CPU could choose by the "
    "clock is fixed, so that two machines take the same steps.",
    "- On a GPU the base is bfloat16, a decoding step of few shapes is recorded as CUDA graphs, and texts are embedded "
    "there; gradients are summed in one order (torch's deterministic algorithms), and neither side attends by cuDNN, "
    "which plans each new shape anew. A graph holds the network up to its hidden states and waits for no value; the "
    "output layer and the draw follow it, and the host waits for the drawn tokens once a step. Shapes and what a graph "
    "holds are tested on a CPU.",
    "- `measure.every` says in which rounds probes are asked, which is the line measure below. In those rounds the "
    "search for candidate personas (HDBSCAN) compares every unrequested sample with every other: it grows with their "
    "square, everything else with their number.",
    "- A run that is taken up again is verified first: all files of all its rounds are read and hashed, so `make "
    "round` takes longer the more rounds there are. A process keeps the texts of all rounds it has played.",
    "- What changes numbers is an option: `base.dtype`, `sample.engine`, and on a GPU `base.graphs`, which changes the "
    "shapes of products and so how they are rounded. Effects of the first two on frequencies, with a model of size "
    "tiny on a CPU: [findings](findings.md#numerics-tiny). With SmolLM2, and on a GPU, where bfloat16 is the default, "
    "none is measured.",
]
LINEAR = 1.1  # and growth linear where the exponent is not above this


def command(settings: dict[str, Any], file: str) -> str:
    """The command that takes a file of rounds; settings that are bench.py's own defaults are left out."""
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in settings.items()
        if name != "overrides" and value != ON_CPU[name]
    ]
    out = [] if file == "round" else ["--brief", f"--out docs/performance/{file}.json"]
    return " ".join(["python benchmarks/bench.py", *flags, *out, *settings["overrides"]])


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What bench.py wrote, or None if it did not yet.

    Raises:
      SystemExit: the file was taken with other settings than its row of the page says, or has fewer than three pairs.
    """
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    other = {name: found["settings"][name] for name, value in settings.items() if found["settings"][name] != value}
    if other:
        raise SystemExit(
            f"{path} must be taken with {', '.join(f'{n} {settings[n]}' for n in other)}, got "
            f"{', '.join(f'{n} {v}' for n, v in other.items())}; take it again: {command(settings, path.stem)}"
        )
    if settings["device"] == "cpu" and not found["shapes"].keys() >= bench.TIMES.keys():
        raise SystemExit(
            f"{path} must have the shapes {', '.join(bench.TIMES)}, got {', '.join(found['shapes'])}; take it again "
            f"without --brief: {command(settings, path.stem)}"
        )
    few = [name for name, shape in found["shapes"].items() if len(shape["pairs"]) < 3]
    if few:
        raise SystemExit(
            f"{path} must have three pairs of a shape or more, got fewer of {', '.join(few)}; take it again: "
            f"{command(settings, path.stem)}"
        )
    found["busy"] = [line for name, shape in found["shapes"].items() for line in leave_out_busy(name, shape)]
    return found


def leave_out_busy(name: str, shape: dict[str, Any]) -> list[str]:
    """Takes those pairs out of a shape in which a side was held up, and returns what they were, a line each.

    A side trains on the same documents in every pair: what takes it BUSY times as long as in its median pair is other
    work of the machine. Which side that would flatter plays no part.
    """
    kept, out = [], []
    for k, pair in enumerate(shape["pairs"], 1):
        held_up = []
        for side in ("stock", "ours"):
            middle = statistics.median(other[side]["seconds"]["train"] for other in shape["pairs"])
            took = pair[side]["seconds"]["train"]
            if took > BUSY * middle:
                held_up.append(f"{side} trained for {took:.0f} s, in its median pair for {middle:.0f}")
        if held_up:
            ratio = bench.by_pair({"pairs": [pair]}, "without")[0]
            out.append(f"{name}, pair {k} ({' and '.join(held_up)}; the round not measured {ratio:.2f} times as fast)")
        else:
            kept.append(pair)
    shape["pairs"] = kept
    return out


def exponent(rows: Sequence[dict[str, float]], of: str) -> float:
    """Returns d log(seconds) / d log(size) by least squares over the three largest sizes of a series.

    1 is linear, below 1 a fixed cost shows.
    """
    x, y = (np.log([row[name] for row in rows[-3:]]) for name in (of, "seconds"))
    return float(np.polyfit(x, y, 1)[0])


def drift(rows: Sequence[dict[str, float]], of: str) -> tuple[float, float, float]:
    """Returns (change, low, high) of a number over a run, end to end, as a share of its median; 95%.

    By a straight line through the rounds after the first quarter, in which caches and pools fill. Neighbouring rounds
    are alike: with r the correlation of neighbours about the line, n rounds tell as much as n (1 - r)/(1 + r) apart.
    """
    later = rows[max(1, len(rows) // 4) :]
    x, y = (np.array([row[name] for row in later], dtype=float) for name in ("round", of))
    n, spread = len(x), float(np.sum((x - x.mean()) ** 2))
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / spread)
    rest = y - y.mean() - slope * (x - x.mean())
    power = float(rest @ rest)
    alike = min(max(0.0, float(rest[1:] @ rest[:-1]) / power), 0.99) if power > 0 else 0.0
    error = math.sqrt(power / (n - 2) / spread * (1 + alike) / (1 - alike))
    length = (len(rows) - 1) / float(np.median(y))
    half = float(special.stdtrit(max(2.0, n * (1 - alike) / (1 + alike) - 2), 0.975)) * error
    return slope * length, (slope - half) * length, (slope + half) * length


def steadiness(change: tuple[float, float, float]) -> str:
    """In words what `drift` shows."""
    _, low, high = change
    if low > -FLAT and high < FLAT:
        return "flat"
    return "**grows**" if low > FLAT else "falls" if high < -FLAT else "not shown to be flat"


def _sides(shape: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    stock, ours = ([pair[side] for pair in shape["pairs"]] for side in ("stock", "ours"))
    return stock, ours


def targets(found: dict[str, Any]) -> list[str]:
    """Rows of the table of targets on a CPU: what, target, reached, verdict, the same by pair or repeat."""
    rows: list[tuple[str, str, str, str, str]] = []

    def verdict(reached: Sequence[bool], middle: bool) -> str:
        """Of the median, and whether every pair or repeat would have said so."""
        split = "" if all(reached) or not any(reached) else f", {sum(reached)} of {len(reached)} reach it"
        return ("reached" if middle else "**not reached**") + split

    def at_least(what: str, wanted: float, by_pair: Sequence[float]) -> None:
        got, each = statistics.median(by_pair), ", ".join(f"{ratio:.2f}" for ratio in by_pair)
        word = verdict([ratio >= wanted for ratio in by_pair], got >= wanted)
        rows.append((what, f"≥ {wanted:g} times", f"{got:.2f}", word, each))

    def below(what: str, wanted: float, by_pair: Sequence[float], unit: str, note: str = "") -> None:
        got = statistics.median(by_pair)
        word = verdict([x <= wanted for x in by_pair], got <= wanted)
        limit, *shown = (
            (f"{wanted:.0%}", *(f"{x:.1%}" for x in (got, *by_pair)))
            if unit == "%"
            else (f"{wanted:g} {unit}", *(f"{x:.2f} {unit}" for x in (got, *by_pair)))
        )
        rows.append((what, f"≤ {limit}", shown[0], word, note or ", ".join(shown[1:])))

    for name, label in (("default", "documents of the config"), ("context", "prompts after a context")):
        for stage, how in (("without", "not measured"), ("with", "measured")):
            at_least(
                f"round end to end, {label}, {how}", bench.TIMES[name], bench.by_pair(found["shapes"][name], stage)
            )
    default = found["shapes"]["default"]
    at_least("training", 2.5, bench.by_pair(default, "train"))
    at_least("sampling, useful tokens", 2.5, bench.by_pair(default, "tokens"))
    mine = [row["seconds"] for row in _sides(default)[1]]
    intervals = statistics.median(found["intervals"])
    rest = [s["classify"] + s["bookkeeping"] + intervals for s in mine]
    round_ = [sum(s.values()) - s["measure"] + intervals for s in mine]
    label = "bookkeeping, labels and intervals, share of the round, not measured but for these"
    below(label, 0.1, [a / b for a, b in zip(rest, round_, strict=True)], "%")
    below(
        f"{label}, its load left out",
        0.1,
        [a / (b - s["load"]) for a, b, s in zip(rest, round_, mine, strict=True)],
        "%",
    )
    sizes = ", ".join(f"{name} {n}" for name, n in found["settings"]["measure"].items())
    share = [s["measure"] / (s["train"] + s["sample"]) for s in mine]
    below(f"measurement ({sizes}), share of train + sample", 0.5, share, "%")
    share = [(s["measure"] + s["classify"]) / (s["train"] + s["sample"]) for s in mine]
    below("the same, all that is classified counted as measurement", 0.5, share, "%")
    usual = config.Train.model_fields["epochs"].default
    epochs = default["epochs"]
    if epochs != usual:
        share = [s["measure"] / (s["train"] * usual / epochs + s["sample"]) for s in mine]
        label = f"measurement alone, had training {usual} epochs, the config's default, and not {epochs}"
        below(label, 0.5, share, "%")
    for name, took in found["start"].items():
        text = f"`{name}`" if name.endswith("--help") else f"`{name}` to its first stage"
        note = f"median of {len(took['seconds'])}"
        if "imports" in took:
            note += f"; imports are {statistics.median(took['imports']):.2f} s of it"
        below(text, 0.5 if name.endswith("--help") else 5, took["seconds"], "s", note)
    return [f"| {' | '.join(row)} |" for row in rows]


def gpu(folder: Path) -> list[str]:
    """Rows of the same table on a GPU, and for what was not measured the command that does."""
    rows: list[str] = []
    for file, what, settings in GPU_ROUNDS:
        aim = f"≤ {bench.GPU_SECONDS:g} s, ≥ {bench.GPU_TIMES:g} times" if file == "round-cuda" else "none"
        found = read(folder / f"{file}.json", settings)
        if found is None:
            rows += [f"| {what}: a whole round | {aim} | not measured | `{command(settings, file)}` |"]
            continue
        _, ours = _sides(found["shapes"]["default"])
        seconds, ratio = (
            bench.median(ours, "with"),
            statistics.median(bench.by_pair(found["shapes"]["default"], "with")),
        )
        good = seconds <= bench.GPU_SECONDS and ratio >= bench.GPU_TIMES
        verdict = "" if aim == "none" else "reached" if good else "**not reached**"
        rows.append(f"| {what}: a whole round, {found['machine']['gpu']} | {aim} |")
        rows[-1] += f" {seconds:.1f} s, {ratio:.1f} times | {verdict} |"
    return rows


def rounds(found: dict[str, Any]) -> list[str]:
    """Stage tables of the shapes, and what they were taken with."""
    m, s, limit = found["machine"], found["settings"], found["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    said = "; ".join(
        f"{name}: stock {statistics.median(row['n_tokens'] for row in stock):.0f} tokens, ours "
        f"{statistics.median(row['n_tokens'] for row in mine):.0f}"
        for name, (stock, mine) in ((name, _sides(shape)) for name, shape in found["shapes"].items())
    )
    tried = "; ".join(
        f"{name}: " + ", ".join(f"{size}: {tokens:.0f}" for size, tokens in of.items())
        + f", so {max(of, key=lambda size, of=of: of[size])}"
        for name, of in ((name, shape["batch_sizes"]) for name, shape in found["shapes"].items())
    )  # fmt: skip
    stock, ours = _sides(found["shapes"]["default"])
    n_measured = sum("measure" in row["seconds"] for row in stock)
    out = [
        f"{m['cores']} cores of {m.get('gpu') or m['cpu']}; {versions}; revision {m['revision']}. Base {s['base']}, "
        f"{s['documents']} training documents, {s['samples']} samples of up to {s['max_new_tokens']} tokens; the rest "
        "as in configs/round.yaml, measured with "
        + " and ".join(f"{name} {n}" for name, n in s["measure"].items())
        + (f", with {' '.join(s['overrides'])}" if s["overrides"] else "")
        + f". Stock `generate` by batch size, each timed once, useful tokens a second: {tried}.",
        f"The machine multiplies matrices at {limit['flops']:.3g} operations a second"
        + (f" and copies {limit['copy_bytes']:.3g} bytes a second" if "copy_bytes" in limit else "")
        + ". Against that stand 2 · parameters · useful tokens of sampling, and 4 · parameters · trained tokens of "
        "training, what a frozen base needs; a shared prefix counts as often as it stands, though ours computes it "
        "once, and may so come to more than 100%. Stock's recomputing is not needed and does not count. "
        "Useful tokens end with the end-of-turn token.",
        "",
        (
            f"Shape `context` puts two turns of {len(' '.join(bench.CONTEXT).split())} words before every prompt, as a "
            "system prompt would. "
            if "context" in found["shapes"]
            else ""
        )
        + f"Stock is measured in {n_measured} of {len(stock)} pairs. Seconds are medians of either "
        "side, ratios those of the median pair. The two models differ, for stock ignores weights, and so does what "
        f"they say: {said}. Seconds of sampling are not corrected for it, useful tokens a second are.",
        "",
        "```",
    ]
    for name, shape in found["shapes"].items():
        out += bench.lines(name, shape, limit)
    out.append("```")
    if found.get("busy"):
        out += ["", f"Left out, for the machine was not quiet: {'; '.join(found['busy'])}."]
    if "again" in found:
        out += ["", f"Profiles, starts and the seconds of intervals were taken again by revision {found['again']}."]
    mine = {stage: bench.median(ours, stage) for stage in (*bench.STAGES, "without")}
    rest = mine["load"] + mine["classify"] + mine["bookkeeping"]
    out += [
        "",
        "Load is everything from the start of the process to the first stage, imports included. Ours trains with the "
        "weights of the documents and stores every file with its hash; stock ignores the weights. Classify of ours "
        "reads probes and real documents too, with two instruments; stock reads its samples with one, and its probes "
        f"under measure. Measure of ours holds its intervals, {statistics.median(found['intervals']):.2f} s. Stock's "
        "batch size is searched for sampling alone and used for its probes; its surprisals are read 16 at a time.",
        "",
        "TRL recomputes activations by default; the ratios above are against its defaults. Without that its training, "
        "and the round not measured with that training in place of the other, take as many times what ours does:",
        *tuned(found),
        "",
        f"Shape `default` of ours, not measured, is {mine['train'] + mine['sample']:.1f} s of training and sampling "
        f"and {rest:.1f} s of all else (load, classify, bookkeeping). For 3 times, training and sampling together "
        f"would have to take {bench.median(stock, 'without') / 3 - rest:.1f} s.",
    ]
    return out


def tuned(found: dict[str, Any]) -> list[str]:
    """Stock without recomputing beside ours, in the pairs in which it was played; a line a shape."""
    out = []
    for name, shape in found["shapes"].items():
        pairs = [pair for pair in shape["pairs"] if "tuned" in pair]
        if not pairs:
            continue
        train = [pair["tuned"]["seconds"]["train"] for pair in pairs]
        times = [a / pair["ours"]["seconds"]["train"] for a, pair in zip(train, pairs, strict=True)]
        rounds_ = [
            (bench.median([p["stock"]], "without") - p["stock"]["seconds"]["train"] + a)
            / bench.median([p["ours"]], "without")
            for a, p in zip(train, pairs, strict=True)
        ]
        listed = [", ".join(f"{x:.2f}" for x in row) for row in (times, rounds_)]
        out.append(
            f"- {name}, in {len(pairs)} of {len(shape['pairs'])} pairs: training {statistics.median(times):.2f} times "
            f"({statistics.median(train):.1f} s; by pair {listed[0]}), the round {statistics.median(rounds_):.2f} "
            f"({listed[1]})."
        )
    return out


def profiles(found: dict[str, Any]) -> list[str]:
    """Where the time goes of what misses its target."""
    out: list[str] = []
    for name, table in found["profiles"].items():
        what = {
            "imports": "imports of `loop run configs/round.yaml`, by package",
            "start": "`loop run configs/round.yaml` after its imports, by function of this project with all it calls",
        }.get(name, f"{name} of ours, {found['profiled_seconds'].get(name, math.nan):.1f} s under the profiler")
        shape, _, stage = name.partition("/")
        if stage in ("train", "sample", "classify"):  # whose name means the same in the pairs
            what += f" and {bench.median(_sides(found['shapes'][shape])[1], stage):.1f} s in the pairs"
        if stage in bench.IN_PYTHON:
            what += ", by function, on one thread for the profiler"
        out += ["", f"{what}:", "", "```", *(line.rstrip() for line in table.strip().splitlines()), "```"]
    return out


_COUNTED = {  # how much there is of each, and how long a piece is, is the model's matter
    "read": "thousands of characters read",
    "trained": "thousands of supervised tokens an epoch",
    "sampled": "thousands of tokens sampled",
}
_PACES = [  # name, whose seconds, of how many of what, unit
    ("reading, seconds per 10,000 characters", ("read_seconds",), "read", 1e-4),
    ("training, seconds per 1,000 supervised tokens of an epoch", ("stage/train",), "trained", 1e-3),
    ("sampling, seconds per 1,000 tokens", ("stage/sample", "stage/probe"), "sampled", 1e-3),
]


def paces(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of a run with what a unit of its work takes, where the work was counted: `pace/SIZE`, seconds each."""
    counted = [(of, parts) for _, parts, of, _ in _PACES if all(row.get(of) for row in rows[1:])]
    later = [row | {f"pace/{of}": sum(row[p] for p in parts) / row[of] for of, parts in counted} for row in rows[1:]]
    return [*rows[:1], *later]


def _work(rows: Sequence[dict[str, float]]) -> list[tuple[str, str, float]]:
    """Name, words and unit of what a run's rows tell of its work beside the seconds of a round."""
    told = [
        ("rest_seconds", "seconds a round, all but reading new texts", 1.0),
        *((f"pace/{of}", what, unit) for what, _, of, unit in _PACES),
        *((of, what, 1e3) for of, what in _COUNTED.items()),
    ]
    return [line for line in told if all(row.get(line[0]) for row in rows[1:])]


def growth(found: dict[str, Any]) -> list[str]:
    """Tables of growth with documents, tokens and rounds."""
    m = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    out = [
        f"One thread of {m['cpu']}; {versions}; revision {m['revision']}. Processor seconds.",
        "",
        "| series | seconds at each size | exponent | |",
        "|---|---|---|---|",
    ]
    series = (
        ("toy loop, documents a round", "documents", found["toy_documents"]),
        ("tiny loop, documents a round", "documents", found["tiny_documents"]),
        ("tiny, training, tokens", "tokens", found["train"]),
        ("tiny, sampling, tokens", "tokens", found["sample"]),
    )
    for name, of, rows in series:
        listed = ", ".join(f"{row[of]:,.0f}: {row['seconds']:.3g}" for row in rows)
        power = exponent(rows, of)
        word = "**more than linear**" if power > LINEAR else "linear" if power >= 2 - LINEAR else "less than linear"
        last = exponent(rows[-2:], of)
        if power <= LINEAR < last:
            word += f", but {last:.2f} over its last step"
        out.append(f"| {name} | {listed} | {power:.2f} | {word} |")
    if "sample_ops" in found:
        listed = ", ".join(f"{op} {a:.1f} to {b:.1f}" for op, (a, b) in found["sample_ops"].items())
        out += ["", f"Sampling, microseconds a token by operation, of its shortest texts to its longest: {listed}."]
    out += [
        "",
        "Asked: linear in documents and in tokens. Exponent: d log seconds / d log size, least squares over the three "
        f"largest sizes; 1 is linear, below 1 a fixed cost still shows; {2 - LINEAR:g} to {LINEAR:g} is called linear. "
        "The rounds of the first two rows are not measured (probes, intervals); those below are.",
        "",
        "| run | median | change from the first round to the last, 95% | |",
        "|---|---|---|---|",
    ]
    for name, first in (("toy", None), ("tiny", None), ("tiny", SHORT)):
        made = found[f"{name}_rounds"]
        rows, n_runs = made["rounds"][: None if first is None else first + 1], made["n_runs"]
        of_runs = ("" if first is None else "the first ") + f"{len(rows) - 1} rounds"
        shown = [("bytes", "resident MiB", MIB)]
        if first is None:
            rows = paces(rows)
            shown = [("seconds", "seconds a round", 1), *(_work(rows) if name == "tiny" else ()), *shown]
        for of, what, unit in shown:
            change = drift(rows, of)
            if n_runs > 1 and of not in _COUNTED:  # what is counted is the same in all
                what += f", by round the {made.get(of, made['seconds'])} of {n_runs} runs"
            median = statistics.median(row[of] / unit for row in rows[1:])
            found_out = f"{change[0]:+.1%} [{change[1]:+.1%}, {change[2]:+.1%}]"
            word = "what the model says" if of in _COUNTED else steadiness(change)
            out.append(f"| {name}, {of_runs}, {what} | {median:.3f} | {found_out} | {word} |")
    out += [
        "",
        f"Asked: seconds a round flat over 200 rounds, resident memory over 200 toy and {SHORT} tiny ones. Change: a "
        "straight line through the rounds after the first quarter, over the length of the run, as a share of the "
        "median, its error for neighbouring rounds as alike as they are; flat where its interval lies within "
        f"±{FLAT:.0%}.",
    ]
    stages = by_stage(found["tiny_rounds"]["rounds"])
    if stages:
        out += ["", f"Seconds by stage of the tiny run, median of its second quarter to its last: {', '.join(stages)}."]
    return out


def by_stage(rows: Sequence[dict[str, float]]) -> list[str]:
    """Seconds of each stage in the second and the last quarter of a run: whose a change of its rounds is."""
    stages = [name for name in rows[-1] if name.startswith("stage/")]
    quarter = len(rows) // 4
    early, late = (
        {name: statistics.median(row.get(name, 0.0) for row in part) for name in stages}
        for part in (rows[quarter : 2 * quarter], rows[-quarter:])
    )
    shown = [name for name in stages if max(early[name], late[name]) >= 0.1]
    return [f"{name.removeprefix('stage/')} {early[name]:.2f} to {late[name]:.2f}" for name in shown]


def figure(found: dict[str, Any]) -> bytes:
    """The growth figure as SVG: time against documents and tokens, time and memory against rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    from loop.report import draw

    drawn = Figure(figsize=(9, 2.6), layout="constrained")
    by_documents, by_tokens, by_time, by_memory = drawn.subplots(1, 4)
    for name in ("toy", "tiny"):
        rows, played = found[f"{name}_documents"], found[f"{name}_rounds"]["rounds"][1:]
        by_documents.loglog([r["documents"] for r in rows], [r["seconds"] for r in rows], "o-", label=name)
        by_time.semilogy([r["round"] for r in played], [r["seconds"] for r in played], label=name)
        by_memory.plot([r["round"] for r in played], [r["bytes"] / MIB for r in played], label=name)
    for name in ("train", "sample"):
        rows = found[name]
        by_tokens.loglog([r["tokens"] for r in rows], [r["seconds"] for r in rows], "o-", label=f"tiny, {name}")
    labels = ("documents a round", "tokens", "round", "round")
    heights = ("seconds a round", "seconds", "seconds a round", "resident MiB")
    for axis, x, y in zip((by_documents, by_tokens, by_time, by_memory), labels, heights, strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(frameon=False, fontsize=7)
    for axis in (by_documents, by_tokens):  # labels between decades lie over each other in so narrow a panel
        axis.xaxis.set_minor_formatter(NullFormatter())
    by_memory.set_ylim(bottom=0)
    return draw(drawn, "svg")


def page(folder: Path) -> str:
    """The page as Markdown; the same files give the same bytes."""
    grown = grown_of(folder)
    found = read(folder / "round.json", ON_CPU)
    out = [
        "# Performance",
        "",
        "Written by `python benchmarks/performance.py` from the files in docs/performance, which "
        "`python benchmarks/bench.py` and `python benchmarks/growth.py` take; `make bench` does all three.",
        "",
        "The baseline is benchmarks/stock_round.py: the same round by TRL's `SFTTrainer`, peft and `generate`, "
        "baseline and ours in turn, each in a fresh process, after a warm-up.",
        "",
    ]
    if found is None:
        out += ["On CPU cores: not measured yet; `make bench` does on a quiet machine.", ""]
    else:
        out += [
            f"| on {found['machine']['cores']} CPU cores, median over the quiet pairs | target | reached | | by pair |",
            "|---|---|---|---|---|",
            *targets(found),
            "",
        ]
    out += [
        "| on a GPU: 4,096 documents, 4,096 samples of up to 64 tokens | target | reached | |",
        "|---|---|---|---|",
        *gpu(folder),
        "",
    ]
    on_gpu = [(what, read(folder / f"{file}.json", settings)) for file, what, settings in GPU_ROUNDS]
    out += [*HOW, *([] if any(one for _, one in on_gpu) else ["- Nothing has been run on a GPU yet."]), ""]
    taken = [("The round", found), *((f"The round on a GPU, {what}", one) for what, one in on_gpu)]
    for title, one in taken:
        out += [] if one is None else [f"## {title}", "", *rounds(one), ""]
    out += [
        "## Growth",
        "",
        *growth(grown),
        "",
        "![growth with documents, tokens and rounds](performance/growth.svg)",
    ]
    shown = [line for _, one in taken if one is not None for line in profiles(one)]
    if shown:
        out += ["", "## Profiles", "", "Where a target is not reached, this is where the time goes:", *shown]
    return "\n".join(out) + "\n"


def grown_of(folder: Path) -> dict[str, Any]:
    """What growth.py wrote.

    Raises:
      SystemExit: it wrote nothing yet.
    """
    path = folder / "growth.json"
    if not path.is_file():
        raise SystemExit(f"{path} must be there, got no such file; python benchmarks/growth.py takes it")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    text, drawn = page(FOLDER), figure(grown_of(FOLDER))
    (FOLDER / "growth.svg").write_bytes(drawn)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()

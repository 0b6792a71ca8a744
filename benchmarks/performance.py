"""Writes docs/performance.md, and its figure, from the files in docs/performance; measures nothing.

python benchmarks/performance.py
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench  # beside this file; it also puts the repository on the path

ROOT = bench.ROOT
FOLDER, PAGE = ROOT / "docs" / "performance", ROOT / "docs" / "performance.md"
MIB = 2**20
ON_GPU = "python benchmarks/bench.py --device cuda --documents 4096 --samples 4096 --max-new-tokens 64"
GPU_ROUNDS = (  # file, what it holds, what measures it
    ("round-cuda", "SmolLM2-135M", ON_GPU + " --out docs/performance/round-cuda.json"),
    (
        "round-cuda-1.7b",
        "1.7 B parameters, random weights",
        ON_GPU + " --base random-1.7b --out docs/performance/round-cuda-1.7b.json",
    ),
)


def exponent(rows: Sequence[dict[str, float]], of: str) -> float:
    """Returns d log(seconds) / d log(size) over the largest step of a series: 1 is linear, below 1 a fixed cost shows.

    With seconds 2 at size 10 and 4 at size 20 it is 1.
    """
    a, b = rows[-2:]
    return math.log(b["seconds"] / a["seconds"]) / math.log(b[of] / a[of])


def flatness(rows: Sequence[dict[str, float]]) -> tuple[float, float]:
    """Returns (time, memory) of a run: median seconds of its last quarter over its first, and bytes gained a round.

    Round 0, whose mixture is another, is left out; memory is the straight line from the end of the first quarter.
    """
    later = rows[1:]
    quarter = max(1, len(later) // 4)
    first, last = ([row["seconds"] for row in part] for part in (later[:quarter], later[-quarter:]))
    gained = later[-1]["bytes"] - later[quarter - 1]["bytes"]
    return statistics.median(last) / statistics.median(first), gained / max(1, len(later) - quarter)


def _sides(shape: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    stock, ours = ([pair[side] for pair in shape["pairs"]] for side in ("stock", "ours"))
    return stock, ours


def targets(found: dict[str, Any]) -> list[str]:
    """Rows of the table of targets on a CPU: what, target, reached, verdict."""
    rows: list[tuple[str, str, str, bool]] = []

    def at_least(what: str, wanted: float, got: float) -> None:
        rows.append((what, f"≥ {wanted:g} times", f"{got:.2f}", got >= wanted))

    def below(what: str, wanted: float, got: float, unit: str) -> None:
        shown = (f"{wanted:.0%}", f"{got:.1%}") if unit == "%" else (f"{wanted:g} {unit}", f"{got:.2f} {unit}")
        rows.append((what, f"≤ {shown[0]}", shown[1], got <= wanted))

    for name, wanted, label in (("default", 3, "documents of the config"), ("context", 4, "prompts after a context")):
        stock, ours = _sides(found["shapes"][name])
        for stage, how in (("without", "not measured"), ("with", "measured")):
            ratio = bench.median(stock, stage) / bench.median(ours, stage)
            at_least(f"round end to end, {label}, {how}", wanted, ratio)
    stock, ours = _sides(found["shapes"]["default"])
    at_least("training", 2.5, bench.median(stock, "train") / bench.median(ours, "train"))
    at_least("sampling, useful tokens", 2.5, bench.rate(ours) / bench.rate(stock))
    mine = {stage: bench.median(ours, stage) for stage in (*bench.STAGES, "with")}
    below("bookkeeping, share of the round", 0.1, mine["bookkeeping"] / mine["with"], "%")
    below("measurement, share of train + sample", 0.5, mine["measure"] / (mine["train"] + mine["sample"]), "%")
    for name, seconds in found["start"].items():
        text = f"`{name}`" if name.endswith("--help") else f"`{name}` to its first stage"
        below(text, 0.5 if name.endswith("--help") else 5, statistics.median(seconds), "s")
    return [
        f"| {what} | {wanted} | {got} | {'reached' if ok else '**not reached**'} |" for what, wanted, got, ok in rows
    ]


def gpu(folder: Path) -> list[str]:
    """Rows of the same table on a GPU, and for what was not measured the command that does."""
    rows: list[str] = []
    for file, what, command in GPU_ROUNDS:
        path, aim = folder / f"{file}.json", "≤ 12 s, ≥ 10 times" if file == "round-cuda" else "none"
        if not path.is_file():
            missing = "not measured: no accelerator could be had"
            rows += [f"| {what}: a whole round | {aim} | {missing} | `{command}` |"]
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        stock, ours = _sides(found["shapes"]["default"])
        seconds, ratio = bench.median(ours, "with"), bench.median(stock, "with") / bench.median(ours, "with")
        verdict = "" if aim == "none" else "reached" if seconds <= 12 and ratio >= 10 else "**not reached**"
        rows.append(f"| {what}: a whole round, {found['machine']['gpu']} | {aim} |")
        rows[-1] += f" {seconds:.1f} s, {ratio:.1f} times | {verdict} |"
    return rows


def rounds(found: dict[str, Any]) -> list[str]:
    """Stage tables of both shapes, and what they were taken with."""
    m, s, limit = found["machine"], found["settings"], found["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    tried = ", ".join(f"{size}: {tokens:.0f}" for size, tokens in found["batch_sizes"].items())
    best = max(found["batch_sizes"], key=lambda size: found["batch_sizes"][size])
    out = [
        f"{m['cores']} cores of {m.get('gpu') or m['cpu']}; {versions}; revision {m['revision']}. Base {s['base']}, "
        f"{s['documents']} training documents, {s['samples']} samples of up to {s['max_new_tokens']} tokens; the rest "
        "as in configs/round.yaml"
        + (f", with {' '.join(s['overrides'])}" if s["overrides"] else "")
        + f". Stock `generate` by batch size, useful tokens a second: {tried}; so {best}.",
        f"The machine multiplies matrices at {limit['flops']:.3g} operations a second"
        + (f" and copies {limit['copy_bytes']:.3g} bytes a second" if "copy_bytes" in limit else "")
        + ". Against that stand 2 · parameters · useful tokens of sampling, and 6 · parameters · trained tokens of "
        "training, though a frozen base needs but 4 and a shared prefix is computed once: a share above 100% is no "
        "contradiction, and one above 150% without a shared prefix says that the rate was taken on a busy machine. "
        "Useful tokens end with the end-of-turn token.",
        "",
        f"Shape `context` puts two turns of {len(' '.join(bench.CONTEXT).split())} words before every prompt, as a "
        "system prompt would. Stock is measured in the first pair of a shape alone; its other stages are medians.",
        "",
        "```",
    ]
    for name, shape in found["shapes"].items():
        out += bench.lines(name, shape, limit)
    out.append("```")
    stock, ours = _sides(found["shapes"]["default"])
    tuned = found["tuned"]["seconds"]["train"]
    out += [
        "",
        "Load is everything from the start of the process to the first stage, imports included. Ours trains with the "
        "weights of the documents and stores every file with its hash; stock ignores the weights. Classify of ours "
        "reads probes and real documents too, with two instruments; stock reads its samples with one, and its probes "
        "under measure. TRL recomputes activations by default; without that its training takes "
        f"{tuned:.1f} s, {tuned / bench.median(ours, 'train'):.2f} times ours.",
    ]
    if "copy_bytes" in limit:
        shares = [bench.copy_share(r, found["shapes"]["default"], limit, s["max_new_tokens"]) for r in (stock, ours)]
        out.append(f"Weights read once a step over the copy rate: stock {shares[0]:.1%}, ours {shares[1]:.1%}.")
    return out


def growth(found: dict[str, Any]) -> list[str]:
    """Tables of growth with documents, tokens and rounds."""
    out = ["| series | seconds at each size | exponent of the last step |", "|---|---|---|"]
    series = (
        ("toy loop, documents a round", "documents", found["toy_documents"]),
        ("tiny loop, documents a round", "documents", found["tiny_documents"]),
        ("tiny, training, tokens", "tokens", found["train"]),
        ("tiny, sampling, tokens", "tokens", found["sample"]),
    )
    for name, of, rows in series:
        listed = ", ".join(f"{row[of]:,.0f}: {row['seconds']:.3g}" for row in rows)
        out.append(f"| {name} | {listed} | {exponent(rows, of):.2f} |")
    out += [
        "",
        "Processor seconds on one thread. Exponent: d log seconds / d log size; 1 is linear, and below 1 a fixed cost "
        "still shows. The rounds of the first two rows are not measured (probes, intervals); those below are.",
        "",
        "| run | seconds a round | last quarter over first | resident memory, MiB | gained a round, KiB |",
        "|---|---|---|---|---|",
    ]
    for name in ("toy", "tiny"):
        rows = found[f"{name}_rounds"]
        slower, gained = flatness(rows)
        seconds = statistics.median(row["seconds"] for row in rows[1:])
        first, last = (rows[k]["bytes"] / MIB for k in (1, -1))
        out.append(
            f"| {name}, {len(rows) - 1} rounds | {seconds:.3f} | {slower:.2f} | {first:.0f} → {last:.0f} | "
            f"{gained / 1024:.1f} |"
        )
    return out


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
        rows, played = found[f"{name}_documents"], found[f"{name}_rounds"][1:]
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
    grown = json.loads((folder / "growth.json").read_text(encoding="utf-8"))
    path = folder / "round.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    out = [
        "# Performance",
        "",
        "Written by `python benchmarks/performance.py` from the files in docs/performance, which `make bench` "
        "(`python benchmarks/bench.py`) and `python benchmarks/growth.py` take.",
        "",
        "The baseline is benchmarks/stock_round.py: the same round by TRL's `SFTTrainer`, peft and `generate`, "
        "baseline and ours in turn, each in a fresh process, after a warm-up.",
        "",
    ]
    if found is None:
        out += ["On two CPU cores: not measured yet; `make bench` does on a quiet machine.", ""]
    else:
        n = len(found["shapes"]["default"]["pairs"])
        out += [f"| on two CPU cores, medians of {n} pair(s) | target | reached | |", "|---|---|---|---|"]
        out += [*targets(found), ""]
    out += [
        "| on a GPU: 4,096 documents, 4,096 samples of up to 64 tokens | target | reached | |",
        "|---|---|---|---|",
        *gpu(folder),
        "",
    ]
    if found is not None:
        out += ["## The round", "", *rounds(found), ""]
    out += [
        "## Growth",
        "",
        *growth(grown),
        "",
        "![growth with documents, tokens and rounds](performance/growth.svg)",
    ]
    profiles = found["profiles"] if found is not None else {}
    if profiles:
        out += ["", "## Profiles", ""]
        out += ["Where a target of training or sampling is not reached, torch's profiler says why:"]
    for name, table in profiles.items():
        out += ["", f"{name} of ours:", "", "```", *(line.rstrip() for line in table.strip().splitlines()), "```"]
    return "\n".join(out) + "\n"


def main() -> None:
    grown = json.loads((FOLDER / "growth.json").read_text(encoding="utf-8"))
    (FOLDER / "growth.svg").write_bytes(figure(grown))
    PAGE.write_text(page(FOLDER), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()

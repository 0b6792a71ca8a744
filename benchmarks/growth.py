"""How time and memory grow: with documents, with tokens, and over rounds. Writes docs/performance/growth.json.

    python benchmarks/growth.py [--quick] [--out docs/performance/growth.json]

Seconds are processor time on one thread. Other work on the machine stretches it less than the clock, but it does, so a
quiet machine is wanted; waiting for the disk is not in it. Each series in a process and with a cache of its own, no
text's embedding known beforehand: rounds played before would be read from the cache. `toy` is the loop with the exact
learner, configs/smoke.yaml; `tiny` the same loop with a 1-3 M parameter model, configs/round.yaml made small. Tokens
alone are varied on the tiny model: training on documents of joined texts, and sampling so hot that hardly a text ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from bench import ROOT, machine, new_file, private_cache  # beside this file; it also puts the repository on the path

TOY = ROOT / "configs" / "smoke.yaml"
TINY = ROOT / "configs" / "round.yaml"
SMALL = [  # the tiny loop with everything in it, in about two seconds a round
    "base.model=tiny",
    "mix.n_train=32",
    "train.epochs=1",
    "measure.n_surprisal=2",
    "measure.n_heldout=8",
    "virality.posts_per_sample=100",
    "filters.require_finished=false",
]
TOKENS = {  # files and the columns whose products each sums
    "trained": (("mixture", ("n_trained_tokens", "copies")),),
    "sampled": (("samples", ("n_tokens",)), ("probes", ("n_tokens",))),
}
ADAPTER = {"r": 16, "alpha": 32, "dropout": 0.0, "targets": ("q_proj", "v_proj", "up_proj", "down_proj")}


def resident() -> int:
    """Resident memory of this process now, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rounds(config: Path, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Plays a run; returns per round its processor seconds, commit to commit, and resident bytes at its commit.

    Beside them, to see what a change of them is of: `read`, characters of the texts that the instruments' encoder had
    not read before, and `read_seconds` that it took, which no loop can save; `rest_seconds`, all others; `stage/NAME`,
    seconds on the clock of each stage; `trained` and `sampled`, supervised tokens of an epoch and tokens of outputs.
    """
    from loop import classify, run
    from loop.config import load
    from loop.store import RunStore

    rows: list[dict[str, float]] = []
    read = {"read": 0.0, "read_seconds": 0.0}
    encode = classify.encode

    def watched(texts: list[str], device: str) -> Any:
        started = time.process_time()
        found = encode(texts, device)
        read["read"] += sum(map(len, texts))
        read["read_seconds"] += time.process_time() - started
        return found

    with (
        tempfile.TemporaryDirectory(prefix="persona-loop-growth-") as folder,
        mock.patch.object(classify, "encode", watched),
    ):
        last = time.process_time()

        @contextmanager
        def watch(run_dir: Path, warn: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
            def committed(t: int) -> None:
                nonlocal last
                seconds = time.process_time() - last
                rows.append({"round": t, "seconds": seconds, "bytes": resident(), **read})
                rows[-1]["rest_seconds"] = seconds - read["read_seconds"]
                read.update(dict.fromkeys(read, 0.0))
                store = RunStore(run_dir)
                stages = [e for e in store.events() if e["event"] == "stage" and e["part"] == f"round_{t:03d}"]
                rows[-1] |= {f"stage/{e['stage']}": float(e["seconds"]) for e in stages}
                for name, files in TOKENS.items():
                    tables = ((store.read_table(t, f"{file}.parquet"), columns) for file, columns in files)
                    rows_of = (zip(*(table[c].to_pylist() for c in columns), strict=True) for table, columns in tables)
                    rows[-1][name] = float(sum(math.prod(row) for each in rows_of for row in each))
                last = time.process_time()  # reading files is no part of a round

            yield committed

        run.play(load(config, [*overrides, f"runs_dir={folder}"]), mirror=watch)
    return rows


def several(n_runs: int, config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Plays the same run n times, each in a fresh process.

    Returns:
      n_runs; per round one row made of theirs; and what of theirs it is: of seconds the least, for other work on the
      machine can only add to them, of bytes the median. Tokens and characters are the same in all.
    """
    played = [alone(rounds, config, overrides) for _ in range(n_runs)]
    made = [
        {"round": t, "bytes": statistics.median(row["bytes"] for row in of_round)}
        | {name: min(row[name] for row in of_round) for name in of_round[0] if name not in ("round", "bytes")}
        for t, of_round in enumerate(zip(*played, strict=True))
    ]
    return {"n_runs": n_runs, "seconds": "least", "bytes": "median", "rounds": made}


def documents(config: Path, overrides: Sequence[str], sizes: Sequence[int], n_rounds: int) -> list[dict[str, float]]:
    """Seconds of the quickest feedback round of runs that train on, and sample, so many documents; not measured."""
    out = []
    for n in sizes:
        size = [f"mix.n_train={n}", f"sample.n_samples={n}", f"n_rounds={n_rounds}", "measure.every=0"]
        played = rounds(config, [*overrides, *size])[1:]
        out.append({"documents": n, "seconds": min(row["seconds"] for row in played)})
    return out


def tokens(joined: Sequence[int], longest: Sequence[int], n: int) -> dict[str, Any]:
    """Seconds of training against tokens trained, and of sampling against tokens sampled, n documents each.

    Returns:
      train, sample; and sample_ops, whose a faster growth is: operation -> microseconds a token of the shortest and of
      the longest texts, of the operations that take most of the longest.
    """
    import torch

    from loop import calibrate, model
    from loop.learner import LM
    from loop.records import Document, Prompt

    texts = calibrate.tiny_documents()
    base = model.load("tiny", device="cpu", documents=texts)
    learner = LM(base, **ADAPTER, epochs=1, lr=1e-4, batch_size=8, max_length=512)
    short = [d.completion for d in texts if 20 < len(d.completion) < 80]
    train, sample = [], []
    for k in joined:
        made = [
            Document(f"real/{i}", "real", None, None, " ".join(short[(i * k + j) % len(short)] for j in range(k)))
            for i in range(n)
        ]
        seconds = min(_timed(lambda made=made: learner.train(made, seed=0, init_from="base")) for _ in range(3))
        assert learner.log is not None
        train.append({"tokens": learner.log.n_input_tokens, "seconds": seconds})
    prompts = [Prompt("neutral", "t", (f"Say something about {i}.",)) for i in range(n)]

    def said(k: int) -> int:
        found = learner.sample(prompts, temperature=5.0, top_p=1.0, max_new_tokens=k, seed=0)
        return sum(c.n_tokens for c in found)

    for k in longest:
        seconds, made_tokens = float("inf"), 0
        for _ in range(3):
            started = time.process_time()
            made_tokens = said(k)
            seconds = min(seconds, time.process_time() - started)
        sample.append({"tokens": made_tokens, "seconds": seconds})
    spent = []
    for k in (longest[0], longest[-1]):
        with torch.profiler.profile() as watch:
            made_tokens = said(k)
        spent.append({e.key: e.self_cpu_time_total / made_tokens for e in watch.key_averages()})
    most = sorted(spent[1], key=lambda op: -spent[1][op])[:6]
    return {"train": train, "sample": sample, "sample_ops": {op: [of.get(op, 0.0) for of in spent] for op in most}}


def _timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def alone(work: Callable[..., Any], *values: Any) -> Any:
    """Returns work(*values), called in a fresh process with the user's bases and no text's embedding known."""
    with (
        tempfile.TemporaryDirectory(prefix="persona-loop-growth-") as folder,
        ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_use_cache, initargs=(str(private_cache(Path(folder))),)
        ) as pool,
    ):
        return pool.submit(work, *values).result()


def _use_cache(cache: str) -> None:
    os.environ["PERSONA_LOOP_CACHE"] = cache


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: to see that it works")
    parser.add_argument("--out", type=new_file, default=ROOT / "docs" / "performance" / "growth.json")
    args = parser.parse_args()
    quick = args.quick
    n_toy, n_tiny, of_toy, of_tiny = (2, 1, 10, 10) if quick else (15, 3, 200, 60)  # runs, and rounds of each
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the processes below
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # leaves the bases in the user's cache
        pool.submit(rounds, TINY, [*SMALL, "n_rounds=1"]).result()
    found = {
        "machine": machine("cpu"),
        "toy_rounds": several(n_toy, TOY, [f"n_rounds={of_toy}"]),
        "tiny_rounds": several(n_tiny, TINY, [*SMALL, "sample.n_samples=32", f"n_rounds={of_tiny}"]),
        "toy_documents": alone(documents, TOY, [], (100, 200) if quick else (250, 500, 1000, 2000, 4000), 5),
        "tiny_documents": alone(documents, TINY, SMALL, (8, 16) if quick else (16, 32, 64, 128, 256), 4),
    }
    found |= alone(
        tokens, (1, 2) if quick else (1, 2, 4, 8), (8, 16) if quick else (16, 32, 64, 128), 8 if quick else 32
    )
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {args.out}; the page: python benchmarks/performance.py", file=sys.stderr)


if __name__ == "__main__":
    main()

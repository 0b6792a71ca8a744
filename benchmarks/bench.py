"""The round of this project beside the same round from stock parts, in turn, each in a process of its own.

    python benchmarks/bench.py [--pairs 3] [--documents 96] [--samples 128] [--max-new-tokens 40]
        [--base smollm2-135m] [--device cpu|cuda] [--starts 5] [--brief] [--again] [--out FILE] [key=value ...]

Ours is `run.play` on configs/round.yaml with those sizes: a run that has played round 0 is copied and plays round 1, as
the same command does for a user. benchmarks/stock_round.py gets the documents, prompts and settings of that round 1.
Two shapes: the documents of the config, and the same after a context that all prompts share. Which side goes first
changes from pair to pair. Seconds of ours are those of events.jsonl; load is everything from the start of the process
to the first stage; bookkeeping is what no other stage has. The measurement is that of the config's defaults, DEFAULTS.
A third side, `tuned`, is stock without its recomputing of activations, the one setting of TRL that a careful reader
would turn first; of interest is its training alone. Trailing key=value override the config for all sides.
--brief, for a machine that is lent by the minute: the first shape alone, no repeated starts.
--again: the pairs of a file stay, and what stands beside them (profiles, starts, intervals) is taken anew.
benchmarks/performance.py turns the file into a page.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.metadata
import json
import os
import pstats
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG, STOCK = ROOT / "configs" / "round.yaml", ROOT / "benchmarks" / "stock_round.py"
OUT = ROOT / "docs" / "performance" / "round.json"
SETTINGS = ("documents", "samples", "max_new_tokens", "base", "device", "measure", "overrides")
DEFAULTS = ("n_surprisal", "n_heldout")  # of `measure`; configs/round.yaml has fewer, to be over in five minutes
STAGES = ("load", "train", "sample", "classify", "measure", "bookkeeping")
MEASURE = ("probe", "measure", "candidates")  # stages of the loop that count as `measure`
IN_PYTHON = ("classify", "candidates")  # stages of which torch's own operations tell little
TIMES = {"default": 3.0, "context": 4.0}  # how many times quicker a round of each shape is to be
GPU_TIMES, GPU_SECONDS = 10.0, 12.0  # on a GPU, measured, and how long it may take
# Of the search for the best one of stock, which tries this and its doubles.
FIRST_BATCH_SIZE = {"cpu": 16, "cuda": 256}
# Two turns before every prompt, as a system prompt or a retrieved page would be.
CONTEXT = (
    "You write short posts for a public board that many people read in the morning. Stay with one thought, use plain "
    "words, and end when the thought ends.",
    "Understood: one thought, plain words, and then I stop.",
)
# SmolLM2-1.7B's shape; random weights take as long as trained ones.
RANDOM = {
    "random-1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
}


def in_context(turns: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """A prompt after CONTEXT; a plain document, and one that has it already, stay as they are."""
    return turns if turns is None or turns[: len(CONTEXT)] == CONTEXT else (*CONTEXT, *turns)


def shared_share(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> float:
    """Share of all tokens that lie in the prefix most prompts have in common, in [0, 1]; the marks of a turn count.

    The prefix is the longest that more than half of the prompts begin with.
    """
    common: list[int] = []
    alive = [list(p) for p in prompts]
    while True:
        heads = [p[len(common)] for p in alive if len(p) > len(common)]
        most = max(set(heads), key=heads.count, default=None)
        if most is None or heads.count(most) * 2 <= len(prompts):
            break
        alive = [p for p in alive if len(p) > len(common) and p[len(common)] == most]
        common.append(most)
    total = sum(map(len, prompts)) + sum(map(len, completions))
    return len(common) * len(alive) / total


# ---------------------------------------------------------------------------------------------------------------------
# in a process of their own


def _world(shape: str) -> Any:
    """Makes `run.play` put CONTEXT before every prompt where the shape asks for it; returns the module."""
    from loop import run, world

    class InContext(world.World):
        def mix(self, t: int, past: Any) -> Any:
            mixture, cursor = super().mix(t, past)
            documents = [replace(d, prompt=in_context(d.prompt)) for d in mixture.documents]
            return replace(mixture, documents=documents), cursor

        def prompts(self, t: int, mixture: dict[str, float]) -> list[Any]:
            return [replace(p, turns=in_context(p.turns)) for p in super().prompts(t, mixture)]

        @cached_property
        def battery(self) -> list[Any]:
            asked = world.World.battery.func(self)  # type: ignore[attr-defined]
            return [replace(p, turns=in_context(p.turns)) for p in asked]

    if shape == "context":
        run.World = InContext  # type: ignore[misc]
    return run


def _config(job: dict[str, Any]) -> Any:
    from loop import config

    return config.load(job["config"], job["overrides"])


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Plays baseline and round 0 if there is none, and returns round 1 as stock_round.py takes it."""
    run = _world(job["shape"])
    config = _config(job)
    folder = Path(config.runs_dir) / config.run_name
    if not folder.is_dir():
        run.play(config, rounds=0)
    from loop.model import decode, encode_all
    from loop.readings import N_KL
    from loop.store import RunStore

    world = run.set_up(config)
    past = run.restore(world, RunStore(folder))
    mixture, _ = world.mix(1, past)
    asked, model = world.prompts(1, past.prompt_mixture), world.base

    def ids(turns: Any) -> list[int]:
        return encode_all(model, [(turns, "")])[0][0]

    def spelled(turns: Any) -> str:
        return decode(model, ids(turns))

    documents = [d for d in mixture.expanded() if d.weight > 0]  # ours leaves out those that count for nothing
    pairs = encode_all(model, [(d.prompt, d.completion) for d in documents])
    t = config.train
    return {
        "base": model.net.name_or_path,
        "adapter": str(RunStore(folder).adapter_path(0)),
        "n_parameters": sum(p.numel() for p in model.net.parameters()),
        "documents": [{"prompt": spelled(d.prompt), "completion": d.completion} for d in documents],
        "prompts": [spelled(p.turns) for p in asked],
        "probes": [spelled(p.turns) for p in world.battery],
        "probes_private": [p.stratum == "private" for p in world.battery],
        "heldout": [{"prompt": spelled(d.prompt), "completion": d.completion} for d in world.heldout[0]],
        "n_kl": N_KL,
        "names": sorted(name for names in world.grammar.names().values() for name in names),
        "train": t.model_dump(exclude={"init_from", "lora"}) | t.lora.model_dump(mode="json"),
        "sample": config.sample.model_dump(),
        "seed": config.seed,
        "tokens_per_epoch": sum(len(p) + len(c) for p, c in pairs),
        "shared": shared_share([p for p, _ in pairs], [c for _, c in pairs]),
        "shared_prompts": shared_share([ids(p.turns) for p in asked], []),
    }


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Plays one more round of a run; with `profile`, returns a table for each of those stages of the loop.

    Of IN_PYTHON by function, on one thread for Python's profiler sees no other; of the others by operation of torch.

    `in_model`: seconds that the learner took of stage `measure`; what is left of it are intervals, and their storing.
    """
    import torch

    run = _world(job["shape"])
    begun, tables, watch, stage = None, {}, None, ""
    in_model, build, threads = 0.0, run.build, torch.get_num_threads()

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **given: Any) -> Any:
            nonlocal in_model
            started = time.perf_counter()
            try:
                return call(*args, **given)
            finally:
                in_model += time.perf_counter() - started if stage == "measure" else 0.0

        return wrapped

    def watched(world: Any, **given: Any) -> Any:
        learner = build(world, **given)
        learner.surprisal = timed(learner.surprisal)
        return learner

    run.build = watched

    def report(kind: str, **fields: Any) -> None:
        nonlocal begun, watch, stage
        if kind == "stage" and fields["round_index"] >= 0:
            begun, stage = begun or time.monotonic(), fields["stage"]
            if fields["stage"] in job.get("profile", ()):
                watch = cProfile.Profile() if stage in IN_PYTHON else torch.profiler.profile()
                if stage in IN_PYTHON:
                    torch.set_num_threads(1)
                    watch.enable()
                else:
                    watch.start()
        elif kind == "done" and isinstance(watch, cProfile.Profile):
            watch.disable()
            torch.set_num_threads(threads)
            tables[fields["stage"]], watch = functions(watch), None
        elif kind == "done" and watch is not None:
            watch.stop()
            tables[fields["stage"]] = watch.key_averages().table(
                sort_by="self_cpu_time_total" if job["device"] == "cpu" else "self_device_time_total",
                row_limit=12,
                max_name_column_width=48,
            )
            watch = None

    run.play(_config(job), rounds=1, report=report)
    on_gpu = job["device"] == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"begun": begun, "memory": memory, "profiles": tables, "in_model": in_model}


def limits(job: dict[str, Any]) -> dict[str, float]:
    """What the machine can do: floating-point operations per second of a product, and on a GPU bytes copied."""
    import torch

    device = job["device"]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    n = 2048 if device == "cpu" else 8192

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    out: dict[str, float] = {"flops": 2 * n**3 / best(lambda: a @ b)}
    if device == "cuda":
        block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        out["copy_bytes"] = 2 * block.numel() / best(block.clone)  # read once and written once
    return out


def first_work(job: dict[str, Any]) -> dict[str, Any]:
    """When `loop run` has its libraries and when it begins its first stage, on the clock; nothing is played.

    With `profile`, a table of what it does between them.
    """
    from loop import __main__ as command
    from loop import records, run, show  # noqa: F401  what the command imports when it knows what to do

    if _config(job).learner == "lm":  # what reading the base would import, and as it does
        with records.uncollected():
            from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
    imported = time.monotonic()
    play = run.play

    class Begun(Exception):
        pass

    def until_it_begins(config: Any, *, report: Callable[..., None], **settings: Any) -> None:
        def watched(kind: str, **fields: Any) -> None:
            report(kind, **fields)
            if kind == "stage" and fields["stage"] != "load base":
                raise Begun

        play(config, report=watched, **settings)

    run.play = until_it_begins
    watch = cProfile.Profile() if "profile" in job else None
    with watch or nullcontext(), suppress(Begun):
        command.app(["run", job["config"], *job["overrides"]], standalone_mode=False)
    table = {} if watch is None else {"profile": functions(watch, within=ROOT / "loop")}
    return {"imported": imported, "begun": time.monotonic()} | table


def functions(profile: cProfile.Profile, rows: int = 14, *, within: Path | None = None) -> str:
    """A table of seconds by function: each one's own, or with `within` those of its files with all that they call."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    seconds: dict[str, float] = {}
    for (file, _, name), (_, _, own, whole, _) in stats.items():
        if within is None or within in Path(file).parents:
            label = name if file == "~" else f"{Path(file).stem}.{name}"
            seconds[label] = max(seconds.get(label, 0.0), whole) if within else seconds.get(label, 0.0) + own
    most = sorted(seconds.items(), key=lambda item: -item[1])
    return "\n".join(f"{name[:56]:<56}{took:7.2f} s" for name, took in most[:rows])


CHILDREN = {f.__name__: f for f in (prepare, ours, limits, first_work)}


# ---------------------------------------------------------------------------------------------------------------------
# the parent


def in_process(command: Sequence[str], job: dict[str, Any], *, cache: Path | None = None) -> dict[str, Any]:
    """Runs a command on a job; returns what it printed last, with `seconds_in_all` and `peak_rss`, bytes.

    The job lies in a file, with the moment of the start on the clock that all processes of a machine share.
    """
    cores = str(len(os.sched_getaffinity(0)))
    env = os.environ | {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores, "HF_HUB_OFFLINE": "1"}
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # Trainer would take all of them
    if cache is not None:
        env["PERSONA_LOOP_CACHE"] = str(cache)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as said:
        started = time.monotonic()
        json.dump(job | {"started": started}, file)
        file.flush()
        arguments = [part.replace("JOB", file.name) for part in command]
        with subprocess.Popen([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=said) as process:
            assert process.stdout is not None
            printed = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            said.seek(0)
            everything = said.read()
            with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as log:
                log.write(everything)
            last = next((line for line in reversed(everything.splitlines()) if line.strip()), "it said nothing")
            raise SystemExit(
                f"{' '.join(command[:3])} ended with {process.returncode}: {last}; all it said: {log.name}"
            )
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result | {"started": started, "seconds_in_all": seconds, "peak_rss": usage.ru_maxrss * 1024}


def child(name: str, job: dict[str, Any], *, cache: Path | None = None) -> dict[str, Any]:
    """Runs one of CHILDREN in a process of its own."""
    return in_process([str(Path(__file__).resolve()), "--child", name, "JOB"], job, cache=cache)


def play_stock(job: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """One stock round as a row: seconds per stage, useful tokens, peak memory."""
    found = in_process([str(STOCK), "JOB", *options], job)
    seconds = found["seconds"]
    seconds["bookkeeping"] = found["seconds_in_all"] - sum(seconds.values())
    return {"seconds": seconds, "n_tokens": found["n_tokens"], "memory": found["memory"] or found["peak_rss"]}


def play_ours(job: dict[str, Any], folder: Path, cache: Path, profile: Sequence[str] = ()) -> dict[str, Any]:
    """One round of ours as such a row, on a copy of the prepared run and of the embeddings known before it."""
    from loop.config import load
    from loop.store import RunStore

    scratch = Path(tempfile.mkdtemp(dir=folder))
    shutil.copytree(folder / "runs", scratch / "runs")
    for file in folder.glob("embeddings.sqlite*"):
        shutil.copy(file, cache)
    job = job | {"overrides": [*job["overrides"], f"runs_dir={scratch / 'runs'}"], "profile": list(profile)}
    found = child("ours", job, cache=cache)
    run = RunStore(scratch / "runs" / load(job["config"], job["overrides"]).run_name)
    rows = [row for row in run.events() if row["event"] == "stage" and row["part"] == "round_001"]
    by_stage = {row["stage"]: float(row["seconds"]) for row in rows}
    seconds = {"load": found["begun"] - found["started"]}
    seconds |= {name: by_stage[name] for name in ("train", "sample", "classify")}
    seconds["measure"] = sum(by_stage.get(name, 0.0) for name in MEASURE)
    intervals = by_stage["measure"] - found["in_model"] if "measure" in by_stage else 0.0
    seconds["bookkeeping"] = found["seconds_in_all"] - sum(seconds.values())
    n_tokens = sum(run.read_table(1, "samples.parquet").column("n_tokens").to_pylist())
    shutil.rmtree(scratch)
    return {
        "seconds": seconds,
        "n_tokens": n_tokens,
        "memory": found["memory"] or found["peak_rss"],
        "profiles": found["profiles"],
        "by_stage": by_stage,
        "intervals": intervals,
    }


def private_cache(folder: Path) -> Path:
    """A cache with the user's bases and without the user's embeddings, so that no text is known beforehand."""
    from loop.model import cache_dir

    cache = folder / "cache"
    cache.mkdir()
    for path in cache_dir().glob("*"):
        if path.is_dir():  # bases and what was fitted to them; a lock must be a file of its own
            (cache / path.name).symlink_to(path.resolve())
    return cache


def random_base(name: str, folder: Path) -> Path:
    """Writes a Llama of that shape with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from loop.model import load

    tokenizer = AutoTokenizer.from_pretrained(load("smollm2-135m", device="cpu").net.name_or_path)
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **RANDOM[name], **marks))
    net.to(torch.bfloat16).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def starts(repeats: int, cache: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of `loop --help`, and from the start of `loop run` to its first stage, with the toy and with the base.

    Returns:
      Command -> {"seconds", and for `loop run` "imports", which are part of them}, a number a repeat.
    """
    help_ = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "loop", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        help_.append(time.monotonic() - started)
    found = {"loop --help": {"seconds": help_}}
    for name in ("smoke", "round"):
        rows = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                job = {"config": str(ROOT / "configs" / f"{name}.yaml"), "overrides": [f"runs_dir={runs}"]}
                rows.append(child("first_work", job, cache=cache))
        found[f"loop run configs/{name}.yaml"] = {
            "seconds": [row["begun"] - row["started"] for row in rows],
            "imports": [row["imported"] - row["started"] for row in rows],
        }
    return found


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on; `cpu` with the vector instructions that torch uses, one name having several."""
    import torch

    from loop.run import _revision

    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    out = {
        "cpu": f"{names[0] if names else 'unknown'} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "revision": _revision("benchmarks"),
    }
    if device == "cuda":
        out["gpu"] = torch.cuda.get_device_name()
    return out


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def imports(rows: int = 12) -> str:
    """Where the imports of `loop run` with a base spend their time: seconds by top-level package, as a table."""
    code = "import loop.__main__, loop.run; from transformers import AutoTokenizer, LlamaForCausalLM"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds: dict[str, float] = {}
    for line in done.stderr.splitlines():
        found = re.fullmatch(r"import time: +(\d+) \| +\d+ \| +(\S+)", line)
        if found:
            package = found[2].split(".")[0]
            seconds[package] = seconds.get(package, 0.0) + int(found[1]) / 1e6
    most = sorted(seconds.items(), key=lambda item: -item[1])
    shown = [
        *most[:rows],
        (f"{len(most[rows:])} others", sum(x for _, x in most[rows:])),
        ("all", sum(seconds.values())),
    ]
    return "\n".join(f"{name:<24}{took:7.2f} s" for name, took in shown)


def median(rows: Sequence[dict[str, Any]], stage: str) -> float:
    """Median seconds of a stage over the rows of one side; `with`, `without`: of the round, measure counted or not."""
    if stage == "with":
        return statistics.median(sum(row["seconds"].values()) for row in rows if "measure" in row["seconds"])
    if stage == "without":
        return statistics.median(sum(row["seconds"].values()) - row["seconds"].get("measure", 0) for row in rows)
    return statistics.median(row["seconds"][stage] for row in rows if stage in row["seconds"])


def rate(rows: Sequence[dict[str, Any]]) -> float:
    """Median useful tokens per second of sampling."""
    return statistics.median(row["n_tokens"] / row["seconds"]["sample"] for row in rows)


def memory(rows: Sequence[dict[str, Any]]) -> float:
    """Median peak memory of the rounds that are measured, bytes: measuring takes memory, and not every round is."""
    return statistics.median(row["memory"] for row in rows if "measure" in row["seconds"])


def by_pair(shape: dict[str, Any], stage: str) -> list[float]:
    """How many times quicker ours is in each pair: a stage, "without" or "with" measurement, or "tokens" a second."""
    pairs = [(pair["stock"], pair["ours"]) for pair in shape["pairs"]]
    if stage == "tokens":
        return [rate([mine]) / rate([stock]) for stock, mine in pairs]
    if stage in ("with", "measure"):
        pairs = [(stock, mine) for stock, mine in pairs if "measure" in stock["seconds"]]
    return [median([stock], stage) / median([mine], stage) for stock, mine in pairs]


def lines(name: str, shape: dict[str, Any], limit: dict[str, float]) -> list[str]:
    """What `make bench` prints of a shape: medians of either side, and the median of the ratios by pair."""
    stock, mine = ([pair[side] for pair in shape["pairs"]] for side in ("stock", "ours"))
    out = [
        f"{name}: pairs {len(stock)}; in a shared prefix: {shape['shared']:.0%} of the training tokens, "
        f"{shape['shared_prompts']:.0%} of those of the prompts"
    ]
    out.append(f"  {'seconds':<22}{'stock':>9}{'ours':>9}{'ratio':>8}")
    for stage in (*STAGES, "without", "with"):
        a, b = median(stock, stage), median(mine, stage)
        label = {"without": "round, not measured", "with": "round, measured"}.get(stage, stage)
        out.append(f"  {label:<22}{a:9.2f}{b:9.2f}{statistics.median(by_pair(shape, stage)):8.2f}")
    times = statistics.median(by_pair(shape, "tokens"))
    out.append(f"  {'useful tokens/s':<22}{rate(stock):9.1f}{rate(mine):9.1f}{times:8.2f}")
    a, b = (memory(rows) / 2**30 for rows in (stock, mine))
    out.append(f"  {'peak GiB, measured':<22}{a:9.2f}{b:9.2f}")
    shares = [("sampling, share of limit", sample_share), ("training, share of limit", train_share)]
    if "copy_bytes" in limit:
        shares.append(("sampling, of copy rate", copy_share))
    for what, share in shares:
        a, b = (share(rows, shape, limit) for rows in (stock, mine))
        out.append(f"  {what:<22}{a:9.1%}{b:9.1%}")
    return out


def sample_share(rows: Sequence[dict[str, Any]], shape: dict[str, Any], limit: dict[str, float]) -> float:
    """2 · parameters · useful tokens per second over the machine's measured product rate."""
    return 2 * shape["n_parameters"] * rate(rows) / limit["flops"]


def train_share(rows: Sequence[dict[str, Any]], shape: dict[str, Any], limit: dict[str, float]) -> float:
    """4 · parameters · trained tokens per second over that rate: forward, and gradients through a frozen base."""
    return 4 * shape["n_parameters"] * shape["n_trained_tokens"] / median(rows, "train") / limit["flops"]


def copy_share(rows: Sequence[dict[str, Any]], shape: dict[str, Any], limit: dict[str, float]) -> float:
    """Bytes of bfloat16 weights, read once a decoding step were all documents decoded at once, over the copy rate."""
    return 2 * shape["n_parameters"] * shape["max_new_tokens"] / median(rows, "sample") / limit["copy_bytes"]


def missed(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(shape, stage) to profile: training and sampling where the median pair misses their target, or the round's; and
    where it misses that of the measured round, what measures and classifies.
    """
    out = []
    for name, shape in found["shapes"].items():
        if found["settings"]["device"] == "cuda":
            mine = median([pair["ours"] for pair in shape["pairs"]], "with")
            slow = measured = statistics.median(by_pair(shape, "with")) < GPU_TIMES or mine > GPU_SECONDS
        else:
            slow, measured = (statistics.median(by_pair(shape, of)) < TIMES[name] for of in ("without", "with"))
        for stage, ratios in (("train", by_pair(shape, "train")), ("sample", by_pair(shape, "tokens"))):
            if slow or statistics.median(ratios) < 2.5:
                out.append((name, stage))
        out += [(name, stage) for stage in ("measure", "classify") if measured]
    return out


def prepared(args: argparse.Namespace, root: Path, cache: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Shape -> the job of ours and that of stock; round 0 is played, the warm-up of page cache and compiled kernels."""
    shutil.copy(CONFIG, root)  # edited meanwhile, it would be another run's
    base = str(random_base(args.base, root)) if args.base in RANDOM else args.base
    overrides = [
        f"base.model={base}",
        f"base.device={args.device}",
        f"mix.n_train={args.documents}",
        f"sample.n_samples={args.samples}",
        f"sample.max_new_tokens={args.max_new_tokens}",
        *(f"measure.{name}={n}" for name, n in args.measure.items()),
        *(["filters.enabled=false"] if args.base in RANDOM else []),  # noise rarely passes them
        *args.overrides,
    ]
    jobs = {}
    for shape in ("default",) if args.brief else TIMES:
        job = {"config": str(root / CONFIG.name), "shape": shape, "device": args.device, "overrides": overrides}
        stock_job = child("prepare", job | {"overrides": [*overrides, f"runs_dir={root / 'runs'}"]}, cache=cache)
        jobs[shape] = (job, stock_job)
    for file in cache.glob("embeddings.sqlite*"):  # what is known before round 1, and no text of it
        shutil.copy(file, root)
    return jobs


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all there is to run; see the head of this file."""
    with tempfile.TemporaryDirectory(prefix="persona-loop-bench-") as scratch:
        root = Path(scratch)
        cache = private_cache(root)
        settings = {name: getattr(args, name) for name in SETTINGS}
        found: dict[str, Any] = {"settings": settings, "machine": machine(args.device)}
        found["limits"] = {"flops": 0.0} | {
            k: v for k, v in child("limits", {"device": args.device}).items() if k in ("flops", "copy_bytes")
        }
        jobs = prepared(args, root, cache)
        shapes = found["shapes"] = {
            shape: {
                "shared": stock_job["shared"],
                "shared_prompts": stock_job["shared_prompts"],
                "n_parameters": stock_job["n_parameters"],
                "n_trained_tokens": stock_job["tokens_per_epoch"] * stock_job["train"]["epochs"],
                "epochs": stock_job["train"]["epochs"],
                "max_new_tokens": args.max_new_tokens,
                "pairs": [],
            }
            for shape, (_, stock_job) in jobs.items()
        }
        on = ["--device", args.device]
        few = {name: jobs["default"][1][name][:8] for name in ("documents", "prompts")}
        play_stock(jobs["default"][1] | few, ["--no-measure", *on])
        say("round 0 played, and a small round of stock: both sides are warm")
        for shape, (job, stock_job) in jobs.items():
            first = str(FIRST_BATCH_SIZE[args.device])
            tried = in_process([str(STOCK), "JOB", "--find-batch-size", first, *on], stock_job)
            sizes = shapes[shape]["batch_sizes"] = {k: v for k, v in tried.items() if k.isdigit()}
            best = max(sizes, key=lambda k: sizes[k])
            say(f"{shape}: stock generate, useful tokens/s by batch size: {sizes}")
            few = stock_job | {"prompts": stock_job["prompts"][:2]}
            sides = {
                "stock": lambda given=stock_job, best=best: play_stock(given, ["--batch-size", best, *on]),
                "ours": lambda given=job: play_ours(given, root, cache),
                "tuned": lambda given=few: play_stock(given, ["--no-checkpointing", "--no-measure", *on]),
            }
            for k in range(args.pairs):
                pair, order = {}, [*sides]
                for side in order[k % 3 :] + order[: k % 3]:
                    pair[side] = sides[side]()
                    say(f"{shape}, pair {k + 1}: {side} {sum(pair[side]['seconds'].values()):.1f} s")
                shapes[shape]["pairs"].append(pair)
        found["intervals"] = [pair["ours"]["intervals"] for pair in shapes["default"]["pairs"]]
        found |= apart(found, jobs, root, cache, 0 if args.brief else args.starts)
    return found


def again(args: argparse.Namespace) -> dict[str, Any]:
    """Takes again what a file holds beside its pairs: profiles, starts, and the intervals of one more round of ours."""
    from loop.run import _revision

    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
    args.brief = found["shapes"].keys() < TIMES.keys()
    with tempfile.TemporaryDirectory(prefix="persona-loop-bench-") as scratch:
        root = Path(scratch)
        cache = private_cache(root)
        jobs = prepared(args, root, cache)
        for shape, (_, stock_job) in jobs.items():  # which older files do not hold
            found["shapes"][shape]["epochs"] = stock_job["train"]["epochs"]
        row = play_ours(jobs["default"][0], root, cache)
        say(f"default: ours {sum(row['seconds'].values()):.1f} s")
        found |= {"intervals": [row["intervals"]], "again": _revision()}
        found |= apart(found, jobs, root, cache, 0 if args.brief else args.starts)
    return found


def apart(found: dict[str, Any], jobs: Any, root: Path, cache: Path, repeats: int) -> dict[str, Any]:
    """Profiles of what misses its target, and starts: no part of any pair."""
    profiles, seconds, start = {}, {}, {}
    by_shape: dict[str, list[str]] = {}
    for shape, stage in missed(found):
        by_shape.setdefault(shape, []).extend(MEASURE[1:] if stage == "measure" else (stage,))  # probes are sampled
    for shape, stages in by_shape.items():
        say(f"{shape}: {', '.join(stages)} miss a target, or their round does; profiling them")
        row = play_ours(jobs[shape][0], root, cache, stages)
        profiles |= {f"{shape}/{stage}": row["profiles"][stage] for stage in stages}
        seconds |= {f"{shape}/{stage}": row["by_stage"][stage] for stage in stages}
    if repeats:
        start = starts(repeats, cache, root)
        if any(statistics.median(took["seconds"]) > 5 for took in start.values()):
            profiles["imports"] = imports()
            with tempfile.TemporaryDirectory(dir=root) as runs:
                job = {"config": str(CONFIG), "overrides": [f"runs_dir={runs}"], "profile": True}
                profiles["start"] = child("first_work", job, cache=cache)["profile"]
    return {"profiles": profiles, "profiled_seconds": seconds, "start": start}


def at_least_three(text: str) -> int:
    """A number of pairs, from the command line: a median of fewer than three says nothing of the noise."""
    number = positive(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"must be at least 3, got {number}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def new_file(text: str) -> Path:
    """A path that a file can be written to, from the command line; said before hours of work."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} must be a directory: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {path}")
    return path


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses at once, in one line, what would fail after the first rounds."""
    from loop.config import Measure

    args.measure = {name: Measure.model_fields[name].default for name in DEFAULTS}
    if args.again:
        if not args.out.is_file():
            parser.error(f"--again: {args.out} must be a file that a bench has written, got none; leave --again out")
        there = json.loads(args.out.read_text(encoding="utf-8"))
        theirs, ours = there["settings"], {name: getattr(args, name) for name in SETTINGS}
        if other := [f"{name} {theirs[name]}" for name in SETTINGS if theirs[name] != ours[name]]:
            parser.error(f"--again: settings must be those of {args.out}, got others than {', '.join(other)}")
        here = machine(args.device)
        if other := [f"{name} {there['machine'].get(name)}" for name in ("cpu", "cores", "gpu")
                     if there["machine"].get(name) != here.get(name)]:  # fmt: skip
            parser.error(f"--again: the machine must be that of {args.out}, got another than {', '.join(other)}")
    if args.brief and args.out == OUT:
        parser.error(f"--brief: name another file with --out; the page wants all that {OUT.name} holds")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here; take --device cpu, or a machine that has one")
    from loop import config

    try:
        config.load(CONFIG, args.overrides)
    except config.ConfigError as error:
        parser.error(str(error))
    known = args.base in ("smollm2-135m", "tiny", *RANDOM) or args.base.count("/") == 1 or Path(args.base).is_dir()
    if not known:
        parser.error(
            f"--base must be smollm2-135m, tiny, {', '.join(RANDOM)}, a hub id or a directory, got {args.base!r}"
        )


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
        print(json.dumps(CHILDREN[sys.argv[2]](job)))
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles torch again: 8 s on either side
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pairs", type=at_least_three, default=3, help="rounds of stock and of ours in turn, of each shape"
    )
    parser.add_argument("--documents", type=positive, default=96)
    parser.add_argument("--samples", type=positive, default=128)
    parser.add_argument("--max-new-tokens", type=positive, default=40)
    parser.add_argument("--base", default="smollm2-135m", help=f"as in a config, or {', '.join(RANDOM)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--starts", type=positive, default=5, help="repeats of `loop --help` and of the start of `loop run`"
    )
    parser.add_argument("--brief", action="store_true", help="the first shape alone, no repeated starts")
    parser.add_argument("--out", type=new_file, default=OUT)
    parser.add_argument(
        "--again", action="store_true", help="of the file --out take profiles, starts and intervals anew, and no pair"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config, for both sides")
    args = parser.parse_args()
    check(parser, args)
    found = again(args) if args.again else compare(args)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, shape in found["shapes"].items():
        print("\n".join(lines(name, shape, found["limits"])))
    for name, took in found["start"].items():
        until = "" if name.endswith("--help") else " to its first stage"
        print(f"{name}: {statistics.median(took['seconds']):.2f} s{until}, median of {len(took['seconds'])}")
    say(f"written: {args.out}; the page: python benchmarks/performance.py")


if __name__ == "__main__":
    main()

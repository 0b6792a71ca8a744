"""Weighted LoRA fine-tune: a short loop of our own over packed documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from loop import rng as streams
from loop import team
from loop.model import (
    Model,
    OutOfMemory,
    Packed,
    blocks_of,
    encode_all,
    fits,
    fitting,
    fresh_adapter,
    lora_parameters,
    pack,
    recompute,
    repeatable,
    too_long,
)
from loop.records import Document


class TrainingDiverged(RuntimeError):
    """Loss or gradient stopped being finite; the step that showed it was not taken."""

    exit_code = 4


@dataclass(frozen=True)
class TrainLog:
    """What a fine-tune did.

    Attributes:
      losses: (n_steps,) loss of each step before it, nats/token; see finetune.
      grad_norms: (n_steps,) norm of the gradient before clipping.
      n_tokens: (n_documents,) supervised tokens of each document, its end token included, counted once; 0 for one of
        weight 0, which is left out.
      n_steps: optimizer steps taken.
      n_input_tokens: tokens the documents hold, prompt and completion, over all epochs.
      n_computed_tokens: tokens that went through the network; fewer, where documents share a prefix.
      micro_batch_tokens: largest micro-batch in use at the end, tokens.
      n_halved: how often memory ran out and the micro-batch was halved.
      recomputes: memory did not hold the activations of the longest document, so that from then on each layer's were
        computed anew on the way back.
      n_processes: that shared the work.
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    n_tokens: tuple[int, ...]
    n_steps: int
    n_input_tokens: int
    n_computed_tokens: int
    micro_batch_tokens: int
    n_halved: int
    recomputes: bool
    n_processes: int

    def work(self) -> dict[str, int]:
        """Returns what it took, for the record: its counts, without what is listed by step or by document."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


class _WeightedNLL(torch.autograd.Function):
    """sum_k weight_k * -log softmax(hidden[row_k] W' + b)[target_k], its gradient worked out on the way forward.

    Logits exist for a slice of rows at a time and only for rows with a target: never (n_tokens, vocab) at once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, share, targets):  # type: ignore[no-untyped-def]
        grad = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float64)
        for rows, at in targets.slices:
            h, r, t, s = hidden[rows], targets.row[at], targets.token[at], share[at]
            logits = torch.nn.functional.linear(h, weight, bias).float()
            mass = torch.zeros(len(h), dtype=torch.float32, device=h.device).index_add_(0, r, s)
            top = logits.amax(-1, keepdim=True)
            picked = logits[r, t]
            p = logits.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            loss += (s.double() * ((total.log() + top)[r, 0] - picked).double()).sum()
            p.mul_(mass[:, None] / total)
            p.index_put_((r, t), -s, accumulate=True)
            torch.mm(p.to(weight.dtype), weight, out=grad[rows])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None, None, None


def finetune(
    model: Model,
    documents: Sequence[Document],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    max_length: int,
    seed: int,
    round_index: int,
    micro_batch_tokens: int | None = None,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    schedule: str = "linear",
    max_grad_norm: float | None = 1.0,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainLog:
    """Fine-tunes the adapter on weighted documents; the base does not move.

    Each step minimises the weighted token mean over its documents d, with the mean weight of the whole epoch below,

        loss = sum_d weight_d * sum_t nll_dt / (mean_weight * sum_d n_d),
        mean_weight = sum_e weight_e * n_e / sum_e n_e over all documents e of weight > 0,

    t over the n_d completion tokens of d, its end token included (all tokens for a document without a prompt). So a
    document of weight 2 counts as two documents of weight 1 whatever company it meets in its step (over the step's own
    weight, a heavy document would shrink its neighbours and differences of weight would act diluted), and long
    documents count for more than short ones. With equal weights it is the plain token mean. The step is the same
    whatever the micro-batches: they sum gradients of the numerator over one denominator. Documents that begin alike
    share the computation of what they share, which changes no number but by rounding; with dropout, whose masks would
    be shared too, they do not.

    AdamW (betas 0.9 and 0.999, eps 1e-8) over adapter parameters, started afresh: moments are not carried between
    rounds. Documents are shuffled each epoch by the stream (seed, "train", round_index); the last step of an epoch may
    be smaller. Under `accelerate launch` or `torchrun` the first process calls this and the others `follow`: each
    computes its share of every step, and the step is again the same (but for dropout, whose draws differ).

    Args:
      model: with an adapter.
      documents: prompt, completion and weight are read; weights >= 0, finite.
      epochs: passes over the documents, >= 1.
      lr: peak learning rate, > 0.
      batch_size: documents per optimizer step, >= 1.
      max_length: longest document allowed, prompt and completion, tokens.
      micro_batch_tokens: tokens per forward pass; None finds it: 1,024 on a CPU, by free memory on a GPU, halved
        whenever memory runs out. Where the longest document alone does not fit, activations are computed anew.
      weight_decay: of AdamW, >= 0.
      warmup: share of steps over which the rate rises linearly from 0, in [0, 1).
      schedule: "linear" to 0, "cosine" to 0, or "constant", after the warm-up.
      max_grad_norm: gradients are scaled down to this norm; None leaves them. 1.0 is the default of transformers.
      progress: called with (steps done, steps in all, loss) after each step.

    Returns:
      See TrainLog.

    Raises:
      TrainingDiverged: loss or gradient not finite, before the step is taken.
      OutOfMemory: the longest document alone does not fit, though activations are computed anew.
      ValueError: no documents, a bad weight, all weights 0, a document too long, no adapter.
    """
    _check(model, documents, epochs, lr, batch_size, warmup, schedule)
    pairs = encode_all(model, [(d.prompt, d.completion) for d in documents])
    for i, why in too_long(model, pairs, max_length).items():
        raise ValueError(f"document {why} at {documents[i].id}; raise train.max_length or drop it, it is never cut")
    weights = np.array([d.weight for d in documents], dtype=np.float64)
    n_tokens = np.array([len(completion) for _, completion in pairs])
    if team.size() > 1 and team.rank() == 0:
        asked = {
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "max_length": max_length,
            "seed": seed,
            "round_index": round_index,
            "micro_batch_tokens": micro_batch_tokens,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "schedule": schedule,
            "max_grad_norm": max_grad_norm,
        }
        adapter = {name: value.detach().cpu() for name, value in lora_parameters(model).items()}
        team.tell((model.adapter, adapter, list(documents), asked))

    order_rng = streams.stream(seed, "train", round_index)
    steps: list[np.ndarray] = []
    # A document of weight 0 has no gradient, and a step of such documents would have no loss.
    live = np.flatnonzero(weights > 0)
    mean_weight = float(np.average(weights[live], weights=n_tokens[live]))
    for _ in range(epochs):
        order = live[order_rng.permutation(len(live))]
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    micro, n_tried = int(team.agreed(micro_batch_tokens or _micro_batch_tokens(model), least=True)), 0
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) for i in live]
    longest = max(lengths)
    losses, norms, computed, recomputes = [], [], 0, False
    devices = [model.device] if model.device.type == "cuda" else []

    def gradient(step: np.ndarray, size: int) -> tuple[torch.Tensor, int]:
        nonlocal n_tried
        n_tried += 1
        optimizer.zero_grad(set_to_none=True)
        total = mean_weight * float(n_tokens[step].sum())
        return _accumulate(model, [pairs[i] for i in step], weights[step] / total, size)

    model.net.train()
    try:
        with repeatable(model.device), torch.random.fork_rng(devices=devices):
            # LoRA dropout draws from torch's global generator.
            torch.manual_seed((streams.key(seed, "dropout", round_index) >> 1) + team.rank())
            for k, step in enumerate(steps):
                optimizer.param_groups[0]["lr"] = lr * _rate(k, len(steps), warmup, schedule)
                fit = partial(
                    fitting,
                    partial(gradient, step),
                    least=longest,
                    what=f"a forward and backward pass of {longest} tokens, the longest document",
                    instead="drop long documents, or take a smaller base",
                    at=f"step {k + 1} of {len(steps)}",
                    together=True,
                )
                try:
                    (part, tokens), micro = fit(micro)
                except OutOfMemory:
                    if recomputes or not recompute(model, True):
                        raise
                    recomputes = True
                    (part, tokens), micro = fit(min(micro, longest))
                loss, tokens = _add_up(model, part, tokens)
                norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise TrainingDiverged(
                        f"loss and gradient must be finite, got {loss} and {norm} at step "
                        f"{k + 1} of {len(steps)}; lower train.lr"
                    )
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
                optimizer.step()
                losses.append(loss)
                norms.append(norm)
                computed += tokens
                if progress is not None:
                    progress(k + 1, len(steps), loss)
    except (TrainingDiverged, OutOfMemory):
        team.done()  # all processes stop at the same step, and wait for what comes next
        raise
    finally:
        model.net.eval()
        if recomputes:
            recompute(model, False)
        for parameter in parameters:
            parameter.grad = None
    team.done()
    return TrainLog(
        losses=tuple(losses),
        grad_norms=tuple(norms),
        n_tokens=tuple(int(n) if w > 0 else 0 for n, w in zip(n_tokens, weights, strict=True)),
        n_steps=len(steps),
        n_input_tokens=epochs * sum(lengths),
        n_computed_tokens=computed,
        micro_batch_tokens=micro,
        n_halved=n_tried - len(steps) - recomputes,
        recomputes=recomputes,
        n_processes=team.size(),
    )


def _check(
    model: Model, documents: Sequence[Document], epochs: int, lr: float, batch_size: int, warmup: float, schedule: str
) -> None:
    if model.adapter is None:
        raise ValueError(f"model must have an adapter, got a bare base {model.name}; call fresh_adapter first")
    if not documents:
        raise ValueError("documents must not be empty, got 0; the mixture has nothing to train on")
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(f"epochs, batch_size, lr must be >= 1, >= 1, > 0, got {epochs}, {batch_size}, {lr}")
    if not 0 <= warmup < 1 or schedule not in ("linear", "cosine", "constant"):
        raise ValueError(
            f"warmup, schedule must be in [0, 1) and one of linear, cosine, constant, got {warmup}, {schedule!r}"
        )
    for document in documents:
        if not (math.isfinite(document.weight) and document.weight >= 0):
            raise ValueError(f"weight must be finite and >= 0, got {document.weight} at {document.id}; fix the mixture")
    if not any(document.weight > 0 for document in documents):
        raise ValueError(f"weights must not all be 0, got {len(documents)} zeros: 0 effective tokens; fix the mixture")


def follow(model: Callable[[], Model]) -> None:
    """Takes part in every fine-tune of the first process, until that is done; what every other process does.

    Args:
      model: called when the first of them comes.
    """
    while (job := team.told()) is not None:
        settings, adapter, documents, asked = job
        fresh_adapter(model(), **asdict(settings), seed=0)
        for name, value in lora_parameters(model()).items():
            value.data.copy_(adapter[name])
        with suppress(TrainingDiverged, OutOfMemory):  # the first process says why
            finetune(model(), documents, **asked)
    team.leave()


def _accumulate(
    model: Model, pairs: list[tuple[list[int], list[int]]], shares: np.ndarray, micro: int
) -> tuple[torch.Tensor, int]:
    """Adds the gradient of sum_d shares_d * sum_t nll_dt to the adapter; returns that loss and the tokens computed.

    Of several processes each does so over every size-th batch, and no batch holds more than its share of the step.
    """
    rows = [[*p, *c[:-1]] for p, c in pairs]
    if team.size() > 1:
        micro = min(micro, max(max(map(len, rows)), math.ceil(sum(map(len, rows)) / team.size())))
    dropout = model.adapter is not None and model.adapter.dropout > 0
    batches = pack(rows, batch_tokens=micro, blocks=blocks_of(model), share=not dropout)
    loss, computed = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches[team.rank() :: team.size()]:
        part = _batch_loss(model, batch, pairs, shares)
        part.backward()
        loss += part.detach()
        computed += batch.n_tokens
    return loss, computed


def _add_up(model: Model, loss: torch.Tensor, computed: int) -> tuple[float, int]:
    """Sums gradient, loss and tokens computed over the processes."""
    if team.size() < 2:
        return float(loss), computed
    count = torch.tensor(float(computed), dtype=torch.float64, device=model.device)
    parameters = list(lora_parameters(model).values())
    # A process without a batch of its own still takes part in the sum.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    team.add_up(flat, loss, count)
    at = 0
    for parameter in parameters:
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return float(loss), int(count)


def _batch_loss(
    model: Model, batch: Packed, pairs: list[tuple[list[int], list[int]]], shares: np.ndarray
) -> torch.Tensor:
    targets = batch.targets(model, [completion for _, completion in pairs])
    share = torch.from_numpy(shares[targets.owner].astype(np.float32)).to(model.device)
    head = model.net.get_output_embeddings()
    hidden = batch.hidden(model)  # (n, hidden)
    return _WeightedNLL.apply(hidden[targets.nodes], head.weight, head.bias, share, targets)


def _rate(k: int, n: int, warmup: float, schedule: str) -> float:
    """Returns the share of the peak rate at step k of n, as transformers' schedules give it."""
    rise = math.ceil(warmup * n)
    if k < rise:
        return k / rise
    if schedule == "constant":
        return 1.0
    share = (k - rise) / max(1, n - rise)
    return 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))


def _micro_batch_tokens(model: Model) -> int:
    """Returns a first guess at tokens per forward pass; running out of memory halves it."""
    if model.device.type != "cuda":
        return 1024
    config = model.net.config
    width = 14 * config.hidden_size + 8 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    kept = config.num_hidden_layers * width * (torch.finfo(model.dtype).bits // 8)  # bytes kept per token for backward
    return max(1024, fits(model.device, kept, share=0.5, most=65_536))

"""Preference step against chosen personas: pairs of own outputs, topped up by rule, and DPO on the adapter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from loop import rng as streams
from loop.records import Document, Turns

if TYPE_CHECKING:
    import torch

    from loop.model import Model

T = TypeVar("T")

MICRO_TOKENS = {"cuda": 16_384}  # tokens of pairs per forward pass; elsewhere 1,024, as for the fine-tune


class SteeringDiverged(RuntimeError):
    """Loss or gradient stopped being finite; the step that showed it was not taken."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
      prompt: see Turns.
      chosen, rejected: the answer to prefer, and the one to prefer it to.
      own: both are the model's own outputs; False for a pair of the grammar.
    """

    prompt: Turns
    chosen: str
    rejected: str
    own: bool


@dataclass(frozen=True)
class SteerLog:
    """What a preference step did. Rewards are beta * (log p(answer) - log p_reference(answer)), nats.

    Attributes:
      losses: (n_steps,) mean loss of the step's pairs before the step, nats; log 2 where nothing was learned yet.
      grad_norms: (n_steps,) norm of the gradient before clipping.
      n_steps: optimizer steps taken.
      n_pairs, n_own: pairs, and those of the model's own outputs.
      n_tokens: tokens the pairs hold, prompt and both answers, over all epochs.
      margin_before, margin_after: mean reward of chosen minus rejected over all pairs, nats.
      accuracy_before, accuracy_after: share of pairs whose chosen answer has the larger reward; a tie counts half.
      chosen_shift, rejected_shift: mean change of log p of a whole answer by the step, nats. Both may fall: the loss
        asks for their difference alone (likelihood displacement, Razin et al. 2024, arXiv:2410.08847).
    """

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    n_steps: int
    n_pairs: int
    n_own: int
    n_tokens: int
    margin_before: float
    margin_after: float
    accuracy_before: float
    accuracy_after: float
    chosen_shift: float
    rejected_shift: float

    @property
    def own_share(self) -> float:
        """Share of the pairs that are the model's own outputs, in [0, 1]."""
        return self.n_own / self.n_pairs

    def as_json(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """steer.json: the log, and the pairs it was made on."""
        return {**asdict(self), "pairs": [asdict(pair) for pair in pairs]}


class Grammar(Protocol):
    """What topping up needs of a persona grammar."""

    def capacity(self, persona: str, fold: str, kind: str = "public") -> int: ...
    def draw(
        self,
        persona: str,
        n: int,
        *,
        fold: str,
        kind: str = "public",
        rng: np.random.Generator,
        swap_names: tuple[str, str] | None = None,
    ) -> Sequence[Document]: ...


def grammar_pairs(
    grammar: Grammar,
    against: Sequence[str],
    n: int,
    *,
    rng: np.random.Generator,
    fold: str = "filter",
    swap_names: tuple[str, str] | None = None,
) -> list[Pair]:
    """Writes pairs by rule: a text of a target is rejected, an assistant text is chosen, under the target's prompt.

    Targets take turns. Of the six factorial personas the two texts are one document in two voices: they differ in
    belief, visibility and name alone. Other targets are met by an assistant text on something else. A fold has a few
    hundred distinct texts a persona; beyond that they repeat.

    Args:
      grammar: see Grammar.
      against: target personas, at least one, without "assistant".
      n: pairs, >= 0.
      rng: names the sequences.
      fold: of templates; only "filter" keeps instruments and seed corpus apart from the step.
      swap_names: see `Grammar.draw`.

    Raises:
      ValueError: no target, a target twice, or the assistant, which is what is chosen.
    """
    if not against or len(set(against)) < len(against) or "assistant" in against:
        raise ValueError(
            f"against must be distinct personas other than assistant, got {list(against)} at grammar_pairs; "
            "the assistant is what is chosen"
        )
    key = int(rng.integers(2**62))
    out: list[list[Pair]] = []
    for k, target in enumerate(against):
        wanted = n // len(against) + (k < n % len(against))
        size = min(wanted, grammar.capacity(target, fold), grammar.capacity("assistant", fold))
        # The same key gives the six the same sequence, and so each its own document in the other's voice.
        bad, good = (
            grammar.draw(name, size, fold=fold, rng=np.random.default_rng([key, k]), swap_names=swap_names)
            for name in (target, "assistant")
        )
        written = [Pair(b.prompt, g.completion, b.completion, False) for b, g in zip(bad, good, strict=True)]
        out.append([written[i % size] for i in range(wanted)])
    longest = max(map(len, out))
    return [column[i] for i in range(longest) for column in out if i < len(column)]


def pairs(
    prompts: Sequence[Turns],
    completions: Sequence[str],
    is_target: Sequence[bool] | np.ndarray,
    is_assistant: Sequence[bool] | np.ndarray,
    topup: Sequence[Pair],
    *,
    n_pairs: int,
    rng: np.random.Generator,
) -> tuple[list[Pair], float]:
    """Pairs a model's own outputs on one prompt, and tops up to a fixed number.

    Rejected is an output that the release filter calls a target, chosen one on the same prompt that it calls the
    assistant; each output stands in one pair at most, so a prompt with 3 targets and 5 assistants gives 3. What is
    missing comes from the front of `topup`; what is too much is left out at random.

    The calls must not come from an instrument: a model steered and measured by one classifier learns what it misses.

    Args:
      prompts, completions: own outputs, (n,) each; finished ones, because training appends the end token.
      is_target, is_assistant: what the release filter calls them, (n,) each; an output that is both counts as target.
      topup: pairs to fill up with, enough for n_pairs without any own.
      n_pairs: pairs to return, >= 1.
      rng: draws which outputs meet, and the order.

    Returns:
      (n_pairs pairs in random order, share of them that are own outputs).

    Raises:
      ValueError: lengths differ, or too few pairs to fill up with.
    """
    target, assistant = np.asarray(is_target, dtype=bool), np.asarray(is_assistant, dtype=bool)
    if not len(prompts) == len(completions) == len(target) == len(assistant):
        raise ValueError(
            f"prompts, completions, is_target, is_assistant must be of one length, got {len(prompts)}, "
            f"{len(completions)}, {len(target)}, {len(assistant)} at pairs"
        )
    if n_pairs < 1 or len(topup) < n_pairs:
        raise ValueError(f"n_pairs must be in 1..{len(topup)}, the pairs to fill up with, got {n_pairs} at pairs")
    groups: dict[Turns, tuple[list[int], list[int]]] = {}
    for i, prompt in enumerate(prompts):
        if target[i] or assistant[i]:
            groups.setdefault(prompt, ([], []))[0 if target[i] else 1].append(i)
    own = []
    for prompt, (bad, good) in groups.items():
        size = min(len(bad), len(good))
        rejected, chosen = (rng.permutation(at)[:size].tolist() for at in (bad, good))
        own += [Pair(prompt, completions[c], completions[r], True) for c, r in zip(chosen, rejected, strict=True)]
    kept = [own[i] for i in rng.permutation(len(own))[:n_pairs].tolist()]
    filled = [*kept, *topup[: n_pairs - len(kept)]]
    return [filled[i] for i in rng.permutation(n_pairs).tolist()], len(kept) / n_pairs


def random_pairs(given: Sequence[Pair], *, rng: np.random.Generator) -> list[Pair]:
    """Returns the control: the same texts under the same prompts, with chosen and rejected exchanged in half of them.

    Exactly half, of an odd number one more or less at even odds: a coin for each pair would leave a preference of
    random size and sign, sqrt(n) pairs strong, in every run.
    """
    n = len(given)
    size = n // 2 + (int(rng.integers(2)) if n % 2 else 0)
    turned = set(rng.permutation(n)[:size].tolist())
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if i in turned else pair
        for i, pair in enumerate(given)
    ]


def dpo(
    model: Model,
    given: Sequence[Pair],
    *,
    beta: float,
    lr: float,
    epochs: int,
    batch_size: int,
    max_length: int,
    reference: str,
    seed: int,
    round_index: int,
    max_grad_norm: float | None = 1.0,
    progress: Callable[[int, int, float], None] | None = None,
) -> SteerLog:
    """Trains the adapter to prefer chosen to rejected answers; the base does not move.

    Each step minimises the mean over its pairs of

        -log sigmoid(beta * (log p(chosen) - log r(chosen) - log p(rejected) + log r(rejected))),

    p the model, r the reference, both of a whole answer given its prompt, end token included. With r = p, as on the
    first step under reference "previous", the loss is log 2 whatever the answers.

    The reference's log probabilities are worked out once, before the first step, so nothing but numbers of it is kept:
    no second model, no second adapter. AdamW (betas 0.9 and 0.999, eps 1e-8, no decay) started afresh, rate falling
    linearly to 0, no dropout; pairs shuffled each epoch by the stream (seed, "steer", round_index). Losses and adapter
    are those of TRL's DPOTrainer on the same pairs in the same order (tests/test_steer.py). Of several processes the
    first alone steers; there are few pairs.

    Args:
      model: with an adapter.
      given: pairs, at least one.
      beta: > 0; how far a nat of log-probability ratio counts, larger keeps p nearer to r.
      lr: peak learning rate, > 0.
      epochs: passes over the pairs, >= 1.
      batch_size: pairs per optimizer step, >= 1.
      max_length: longest prompt and answer allowed, tokens.
      reference: "base", the bare base model; "previous", the model as it is before this step.
      max_grad_norm: gradients are scaled down to this norm; None leaves them. 1.0 is the default of transformers.
      progress: called with (steps done, steps in all, loss) after each step.

    Raises:
      SteeringDiverged: loss or gradient not finite, before the step is taken.
      OutOfMemory: the longest pair alone does not fit.
      ValueError: no pairs, no adapter, a setting out of range, or an answer too long.

    Source: Rafailov et al. (2023), arXiv:2305.18290, eq. 7.
    """
    import torch
    import torch.nn.functional as F

    from loop.model import encode_all, fitting, lora_parameters, repeatable, serving, too_long

    if model.adapter is None:
        raise ValueError(f"model must have an adapter, got a bare base {model.name}; steer after the fine-tune")
    if not given:
        raise ValueError("pairs must not be empty, got 0; there is nothing to prefer")
    if not (beta > 0 and lr > 0 and epochs >= 1 and batch_size >= 1) or reference not in ("base", "previous"):
        raise ValueError(
            "beta, lr, epochs, batch_size, reference must be > 0, > 0, >= 1, >= 1, base or previous, got "
            f"{beta}, {lr}, {epochs}, {batch_size}, {reference!r}; fix the config"
        )
    encoded = encode_all(model, [(p.prompt, text) for p in given for text in (p.chosen, p.rejected)])
    for i, why in too_long(model, encoded, max_length).items():
        raise ValueError(f"pair {why} at pair {i // 2}; raise train.max_length or drop it, it is never cut")
    both = [encoded[2 * i : 2 * i + 2] for i in range(len(given))]
    micro = MICRO_TOKENS.get(model.device.type, 1024)
    longest = max(sum(len(prompt) + len(answer) for prompt, answer in pair) for pair in both)

    def within(work: Callable[[int], T]) -> T:
        nonlocal micro
        out, micro = fitting(
            work,
            micro,
            least=longest,
            what=f"a forward and backward pass of {longest} tokens, the longest pair",
            instead="drop long texts, or take a smaller base",
        )
        return out

    def all_logps() -> torch.Tensor:  # (n_pairs, 2)
        def work(size: int) -> torch.Tensor:
            parts = [_logps(model, [both[i] for i in at]) for at in _chunks(both, range(len(both)), size)]
            return torch.cat(parts)

        with repeatable(model.device), torch.no_grad():
            return within(work)

    def gradient(step: list[int], size: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for at in _chunks(both, step, size):
            ratio = _logps(model, [both[i] for i in at]) - fixed[at]  # (n, 2)
            part = -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1])).sum() / len(step)
            part.backward()
            loss += float(part.detach())
        return loss

    model.net.eval()  # no dropout: the reference and the model must differ by what was learned alone
    start = all_logps()
    if reference == "base":
        with serving(model, "base"):
            fixed = all_logps()
    else:
        fixed = start

    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    order_rng = streams.stream(seed, "steer", round_index)
    steps: list[list[int]] = []
    for _ in range(epochs):
        order = order_rng.permutation(len(given)).tolist()
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    losses, norms = [], []
    try:
        for k, step in enumerate(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - k / len(steps))
            with repeatable(model.device):
                loss = within(functools.partial(gradient, step))
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise SteeringDiverged(
                    f"loss and gradient must be finite, got {loss} and {norm} at step {k + 1} of {len(steps)}; "
                    "lower steer.lr"
                )
            if max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
            optimizer.step()
            losses.append(loss)
            norms.append(norm)
            if progress is not None:
                progress(k + 1, len(steps), loss)
        end = all_logps()
    finally:
        for parameter in parameters:
            parameter.grad = None
    if not bool(torch.isfinite(end).all()):
        raise SteeringDiverged(
            f"log probabilities must be finite, got nan or inf after step {len(steps)} of {len(steps)}; lower steer.lr"
        )
    shift = (end - start).mean(0)
    return SteerLog(
        losses=tuple(losses),
        grad_norms=tuple(norms),
        n_steps=len(steps),
        n_pairs=len(given),
        n_own=sum(pair.own for pair in given),
        n_tokens=epochs * sum(len(p) + len(c) for p, c in encoded),
        margin_before=_margin(start - fixed, beta),
        margin_after=_margin(end - fixed, beta),
        accuracy_before=_accuracy(start - fixed),
        accuracy_after=_accuracy(end - fixed),
        chosen_shift=float(shift[0]),
        rejected_shift=float(shift[1]),
    )


def _margin(ratio: torch.Tensor, beta: float) -> float:
    return beta * float((ratio[:, 0] - ratio[:, 1]).mean())


def _accuracy(ratio: torch.Tensor) -> float:
    gap = ratio[:, 0] - ratio[:, 1]
    return float(((gap > 0).double() + 0.5 * (gap == 0)).mean())


def _chunks(both: list[Any], which: Sequence[int], micro: int) -> list[list[int]]:
    """Splits pairs into runs of at most `micro` tokens, at least one pair each; a pair is never split."""
    out: list[list[int]] = []
    taken = 0
    for i in which:
        size = sum(len(prompt) + len(answer) for prompt, answer in both[i])
        if not out or taken + size > micro:
            out.append([])
            taken = 0
        out[-1].append(i)
        taken += size
    return out


def _logps(model: Model, both: Sequence[Sequence[tuple[list[int], list[int]]]]) -> torch.Tensor:
    """Returns log p of the answers of each pair given its prompt, (n_pairs, 2) float64, nats; in one go."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from loop.model import blocks_of, pack

    answers = [encoded for pair in both for encoded in pair]

    def picked(states: torch.Tensor, r: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        logits = model.logits(states)
        return logits[r, token] - logits.logsumexp(-1)[r]

    out = torch.zeros(len(answers), dtype=torch.float64, device=model.device)
    for batch in pack([[*p, *c[:-1]] for p, c in answers], batch_tokens=1 << 60, blocks=blocks_of(model)):
        hidden = batch.hidden(model)  # (n, hidden)
        targets = batch.targets(model, [answer for _, answer in answers])
        owner = torch.from_numpy(targets.owner).to(model.device)
        for rows, at in targets.slices:
            given = hidden[targets.nodes[rows]], targets.row[at], targets.token[at]
            logp = checkpoint(picked, *given, use_reentrant=False, preserve_rng_state=False)  # logits are not kept
            out = out.index_add(0, owner[at], logp.double())
    return out.view(len(both), 2)

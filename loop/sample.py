"""Completions from the current model, and what a model thinks of given texts."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from loop import rng as streams
from loop.model import (
    Layout,
    Model,
    Packed,
    blocks_of,
    decode,
    encode_all,
    fits,
    fitting,
    pack,
    ran_out,
    serving,
)
from loop.records import Completion, Turns

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 (Steele, Lea & Flood 2014): a counter in, 64 mixed bits out
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def complete(
    model: Model,
    prompts: Sequence[Turns],
    *,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    round_index: int,
    ids: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[Completion]:
    """Samples one completion per prompt from base plus adapter.

    A token is argmax over the vocabulary of logits / temperature + Gumbel noise, which is one draw from the softmax.
    The noise of (document, position, token) is a function of (seed, round_index, document number) alone: text
    does not depend on which prompts it was batched with, up to rounding of the logits, and two arms that share a seed
    share their noise. `top_p` first keeps the smallest set of most probable tokens whose mass reaches it.

    A prompt asked several times is read once; a finished document leaves the batch at once, and waiting ones enter when
    a quarter of the rows is free. On a GPU a token of all running documents is one CUDA graph, see `_Step`.

    Args:
      prompts: see Turns; None asks for a plain document.
      temperature: > 0, or 0 for the most probable token.
      top_p: in (0, 1].
      max_new_tokens: most tokens to sample, the end token included, >= 1.
      seed, round_index: name the noise. Two populations of one round (probes, samples) need two seeds, or their n-th
        documents share their luck.
      ids: document numbers, distinct and in 0..2**63-1; None numbers the prompts from 0.
      batch_size: documents decoded at once; None chooses by device and memory. Halved whenever memory runs out.

    Returns:
      One Completion per prompt, in order; `logprob_nats` under base plus adapter at temperature 1 and top_p 1.

    Raises:
      ValueError: a setting out of range, a prompt too long for the base, `ids` of another length, or logits that are
        not finite.
      OutOfMemory: one document at a time does not fit.
    """
    if not temperature >= 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature, top_p, max_new_tokens must be >= 0, in (0, 1], >= 1, got {temperature}, {top_p}, "
            f"{max_new_tokens}; fix the sampling settings"
        )
    numbers = np.arange(len(prompts)) if ids is None else np.asarray(ids)
    if len(numbers) != len(prompts) or len(np.unique(numbers)) != len(numbers):
        raise ValueError(
            f"ids must be distinct, one per prompt, got {len(np.unique(numbers))} distinct for {len(prompts)} prompts"
        )
    if not prompts:
        return []
    encoded = encode_prompts(model, prompts, max_new_tokens, limit=model.max_length)
    keys = noise_keys(numbers, seed=seed, round_index=round_index)
    # Longest prompts first, and alike ones together: a batch attends over little padding, and reads each prompt once.
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), encoded[i], i))
    with serving(model, "merged"), torch.inference_mode():
        slots = min(len(prompts), batch_size or _batch_size(model, len(encoded[order[0]]) + max_new_tokens))
        (sampled, logprobs, finished), _ = fitting(
            lambda n: _decode_all(model, encoded, order, keys, n, temperature, top_p, max_new_tokens),
            slots,
            least=1,
            what=f"one document of {len(encoded[order[0]]) + max_new_tokens} tokens while it is sampled",
            instead="shorten prompts or sample.max_new_tokens, or take a smaller base",
        )
    return [
        Completion(
            text=decode(model, row[:-1] if done else row), n_tokens=len(row), logprob_nats=logprob, finished=done
        )
        for row, logprob, done in zip(sampled, logprobs, finished, strict=True)
    ]


def encode_prompts(model: Model, prompts: Sequence[Turns], max_new_tokens: int, *, limit: int) -> list[tuple[int, ...]]:
    """Returns the tokens of each prompt.

    Raises:
      ValueError: a prompt and the new tokens are more than `limit` tokens.
    """
    encoded = [tuple(prompt) for prompt, _ in encode_all(model, [(turns, "") for turns in prompts])]
    for i, tokens in enumerate(encoded):
        if len(tokens) + max_new_tokens > limit:
            raise ValueError(
                f"prompt must leave room for {max_new_tokens} new tokens of {limit}, got {len(tokens)} "
                f"tokens at prompt {i}; shorten it"
            )
    return encoded


def noise_keys(numbers: Sequence[int] | np.ndarray, *, seed: int, round_index: int) -> np.ndarray:
    """Returns what names the noise of each document: (n,) uint64, a function of (seed, round_index, its number)."""
    root = np.uint64(streams.key(seed, "sample", round_index))
    with np.errstate(over="ignore"):
        return _mix(_mix(np.asarray(numbers).astype(np.uint64) * _GOLDEN + root))


class _KeyValues:
    """Keys and values of all layers in one block of memory; rows are documents. Stands in for transformers' Cache.

    transformers' own grows by copying everything at every token and cannot give a finished row's place to another.
    """

    is_compileable = False

    def __init__(self, model: Model, slots: int, length: int):
        config = model.net.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, kv, length, width)
        self.store = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.rows = torch.arange(slots, device=model.device)
        self.position = torch.zeros(0, dtype=torch.long, device=model.device)  # where each active row writes
        self.length = 0  # keys any active row has, this token included

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(self.position)
        keys, values = self.store[layer, 0, :n], self.store[layer, 1, :n]
        keys[self.rows[:n], :, self.position] = key[:, :, 0]
        values[self.rows[:n], :, self.position] = value[:, :, 0]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


class NoGraph(RuntimeError):
    """A base whose step cannot be a CUDA graph."""

    exit_code = 5

    def __init__(self, what: str):
        super().__init__(
            f"a step of sampling must be a CUDA graph, got {what}; a new run with base.graphs=false samples without"
        )


class _Step:
    """One token for every running document: logits (n, vocab) of what follows it.

    With `graphs`, on a GPU, shapes come in few sizes, and one that comes again is recorded as a CUDA graph and played
    from then on: a small model spends its time on starting kernels otherwise. Rows and keys that only fill a shape
    change rounding alone.
    """

    def __init__(self, model: Model, cache: _KeyValues, *, graphs: bool):
        self.model, self.cache, self.graphs = model, cache, graphs
        slots, self.length = cache.store.shape[2], cache.store.shape[4]
        self.tokens = torch.zeros(slots, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(slots, dtype=torch.long, device=model.device)
        self.visits: dict[tuple[int, int], int] = {}
        self.made: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}  # graph, hidden states it leaves

    @functools.cached_property
    def beside(self) -> torch.cuda.Stream:
        """Where graphs are recorded: the step's own, since one that is dropped clears what others of its stream use."""
        return torch.cuda.Stream(self.model.device)

    def shape(self, n: int, length: int) -> tuple[int, int]:
        """Rows and keys to compute for n documents of which the longest has `length` tokens."""
        if not self.graphs:
            return n, length
        quarter = -(-len(self.tokens) // 4)
        return min(-(-n // quarter) * quarter, len(self.tokens)), min(-(-length // 64) * 64, self.length)

    def __call__(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Arguments: each document's last token, and how many it has with that one."""
        n, length = self.shape(len(tokens), max(lengths))
        self.tokens[: len(tokens), 0] = torch.tensor(tokens)
        self.position[: len(tokens)] = torch.tensor(lengths) - 1
        self.position[len(tokens) : n] = 0  # rows of nobody; who enters one writes over its first key
        return self.model.logits(self.play(n, length)[: len(tokens)])

    def play(self, n: int, length: int) -> torch.Tensor:
        """Hidden states (n, hidden) of the first n rows over `length` keys."""
        shape = (n, length)
        if shape in self.made:
            graph, hidden = self.made[shape]
            graph.replay()
            return hidden
        self.visits[shape] = self.visits.get(shape, 0) + 1
        if self.graphs and self.visits[shape] == 3:  # recording costs about three steps
            self.made[shape] = self._record(n, length)
            return self.made[shape][1]
        return self.compute(n, length)

    def _record(self, n: int, length: int) -> tuple[Any, torch.Tensor]:
        """Returns a graph of the step and the hidden states it has just left.

        Raises:
          NoGraph: the step waits for the device, or playing it gives something else.
        """
        device = self.model.device
        beside, main = self.beside, torch.cuda.current_stream(device)
        pool = next(iter(self.made.values()))[0].pool() if self.made else None
        graph = torch.cuda.CUDAGraph()
        handled = sys.exception()  # what the caller is in the middle of, which is the context of every error here
        with torch.cuda.device(device):
            try:
                beside.wait_stream(main)
                _forbid_waiting(True)  # a graph cannot hold what waits for a value
                with torch.cuda.stream(beside):
                    want = self.compute(n, length)
                _forbid_waiting(False)
                main.wait_stream(beside)
                with torch.cuda.graph(graph, pool=pool, stream=beside):
                    hidden = self.compute(n, length)
                graph.replay()
            except RuntimeError as error:
                if ran_out(error):
                    raise
                # Recording that fails may say so at its end alone, and its reason stands behind that.
                inner = None if error.__context__ is handled else error.__context__
                told = [str(e).splitlines()[0][:200] for e in (error, inner) if str(e or "")]
                raise NoGraph(", after ".join(told)) from error
            finally:
                _forbid_waiting(False)
                torch.cuda.set_stream(main)  # recording that fails leaves its own in place
        if not torch.allclose(hidden, want, rtol=1e-2, atol=1e-2):  # the same kernels on the same numbers
            raise NoGraph(f"{float((hidden - want).abs().max()):.3g} between the step and its graph")
        return graph, hidden

    def compute(self, n: int, length: int) -> torch.Tensor:
        """The step itself; nothing in it waits for the device."""
        position = self.position[:n]
        self.cache.position, self.cache.length = position, length
        mask = torch.zeros(n, 1, 1, length, dtype=self.model.dtype, device=self.model.device)
        columns = torch.arange(length, device=self.model.device)
        mask.masked_fill_(columns > position[:, None, None, None], -torch.inf)
        return self.model.hidden(self.tokens[:n], position[:, None], Layout(None, [mask]), self.cache)[:, 0]


def _forbid_waiting(on: bool) -> None:
    """Makes torch raise where a program waits for a GPU's value; torch says once a process that this is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error" if on else "default")


class _Prefill:
    """Takes keys and values of a packed forward pass, layer by layer."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers.append((key, value))
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


@dataclass
class _Read:
    """A prompt that has been read: keys and values (layers, 2, kv, length, width), logits (vocab,) of what follows."""

    store: torch.Tensor
    logits: torch.Tensor

    def copy(self) -> _Read:
        """Returns the same in memory of its own, apart from that of the prompts it was read with."""
        return _Read(self.store.clone(), self.logits.clone())


def _read_prompts(model: Model, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], _Read]:
    """Reads distinct prompts in one packed pass; a beginning they share is computed once."""
    out = {}
    for batch in pack(prompts, batch_tokens=8192, blocks=blocks_of(model)):
        cache = _Prefill()
        hidden = batch.hidden(model, cache)
        logits = model.logits(hidden[torch.as_tensor([path[-1] for path in batch.paths], device=model.device)])
        at = torch.from_numpy(np.concatenate(batch.paths)).to(model.device)
        _, kv, _, width = cache.layers[0][0].shape
        both = torch.empty(len(cache.layers), 2, kv, len(at), width, dtype=model.dtype, device=model.device)
        for layer, pair in enumerate(cache.layers):
            for side, (one,) in enumerate(pair):
                torch.index_select(one, 1, at, out=both[layer, side])
        ends = np.cumsum([len(path) for path in batch.paths])
        for i, end, path, row in zip(batch.members, ends, batch.paths, logits, strict=True):
            out[prompts[i]] = _Read(both[:, :, :, end - len(path) : end], row)
    return out


def _decode_all(
    model: Model,
    encoded: list[tuple[int, ...]],
    order: list[int],
    keys: np.ndarray,
    slots: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
) -> tuple[list[list[int]], list[float], list[bool]]:
    tokens: list[list[int]] = [[] for _ in encoded]
    logprobs, finished = [0.0] * len(encoded), [False] * len(encoded)
    cache = _KeyValues(model, slots, len(encoded[order[0]]) + max_new_tokens)
    step = _Step(model, cache, graphs=model.graphs and model.device.type == "cuda")
    active: list[int] = []  # document in each of the first rows of the cache
    waiting = list(reversed(order))
    read: dict[tuple[int, ...], _Read] = {}

    def note(documents: list[int], logits: torch.Tensor) -> None:
        at = np.array([len(tokens[i]) for i in documents], dtype=np.uint64)
        drawn, logprob = _draw(logits, keys[documents], at, temperature, top_p)
        for i, token, value in zip(documents, drawn, logprob, strict=True):
            tokens[i].append(int(token))
            logprobs[i] += float(value)
            finished[i] = int(token) == model.end_id

    def over(i: int) -> bool:
        return finished[i] or len(tokens[i]) == max_new_tokens

    while waiting or active:
        # Refill when a quarter of the rows is free: reading prompts one by one wastes products on a few tokens.
        while waiting and len(active) <= slots - max(1, slots // 4):
            entering = [waiting.pop() for _ in range(min(len(waiting), slots - len(active)))]
            read |= _read_prompts(model, sorted({encoded[i] for i in entering} - read.keys()))
            note(entering, torch.stack([read[encoded[i]].logits for i in entering]))
            for i in entering:
                if not over(i):
                    cache.store[:, :, len(active), :, : len(encoded[i])] = read[encoded[i]].store
                    active.append(i)
            # Alike ones wait together, so of the prompts that were read only the last can be asked again.
            again = read.get(encoded[waiting[-1]]) if waiting else None
            read = {} if again is None else {encoded[waiting[-1]]: again.copy()}
        if not active:
            continue
        note(active, step([tokens[i][-1] for i in active], [len(encoded[i]) + len(tokens[i]) for i in active]))
        # A finished row takes the place of none: the last running row moves into it, so the rows in use stay dense.
        row = 0
        while row < len(active):
            if over(active[row]):
                mover = active.pop()
                if row < len(active):
                    length = len(encoded[mover]) + len(tokens[mover])
                    cache.store[:, :, row, :, :length] = cache.store[:, :, len(active), :, :length]
                    active[row] = mover
            else:
                row += 1
    return tokens, logprobs, finished


def _batch_size(model: Model, length: int) -> int:
    """Returns how many documents to decode at once."""
    config = model.net.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = 2 * config.num_hidden_layers * kv * width * length * (torch.finfo(model.dtype).bits // 8)
    if model.device.type == "cuda":
        entry = 80  # bytes that a draw holds at once for a token of the vocabulary, top_p's sorting included
        return fits(model.device, 2 * row + entry * config.vocab_size, share=0.8, most=1024)
    # Products reach full rate at 128 rows on two cores; 1 GiB of keys and values is what a laptop can spare.
    return int(min(128, max(1, (1 << 30) // row)))


# ---------------------------------------------------------------------------------------------------------------------
# one token


def _draw(
    logits: torch.Tensor, keys: np.ndarray, step: np.ndarray, temperature: float, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the drawn token and its log probability at temperature 1 for each row of float32 logits (n, vocab).

    In the form of a race: argmin over tokens of -log(u) / p, with u uniform, is argmax of log p - log(-log u), the
    Gumbel form. The race needs a logarithm only for the few tokens whose 1 - u <= -log u is small enough to win.
    """
    top, best = logits.max(-1)
    if not bool(torch.isfinite(top).all()):
        raise ValueError("logits must be finite, got nan or inf while sampling; the adapter has diverged")
    shifted = logits - top[:, None]
    mass = shifted.exp()
    norm = mass.sum(-1).log()
    if temperature == 0:
        token = best
    else:
        if temperature != 1:
            mass = (shifted / temperature).exp_()
        with np.errstate(over="ignore"):
            row_keys = _mix(keys + (step + np.uint64(1)) * _GOLDEN)
        if logits.device.type == "cpu":
            token = torch.from_numpy(_race(mass.numpy(), row_keys, top_p))
        else:
            token = _race_torch(mass, row_keys, top_p)
    logprob = shifted.gather(1, token[:, None])[:, 0] - norm
    return token.cpu().numpy(), logprob.double().cpu().numpy()


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on an array of uint64."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return z ^ (z >> np.uint64(31))


@numba.njit(cache=True)
def _race(mass: np.ndarray, keys: np.ndarray, top_p: float) -> np.ndarray:
    """Returns the winner of each row of unnormalised probabilities (n, vocab) within the top_p set."""
    n, vocab = mass.shape
    out = np.empty(n, dtype=np.int64)
    for r in range(n):
        p = mass[r]
        floor, at_floor = _nucleus(p, top_p) if top_p < 1 else (np.float32(0), vocab)
        best, winner = np.inf, 0
        for i in range(vocab):
            if p[i] < floor or p[i] == 0:
                continue
            if p[i] == floor and top_p < 1:
                if at_floor == 0:
                    continue
                at_floor -= 1
            z = keys[r] + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            u = (np.float64(z >> np.uint64(11)) + 0.5) / 9007199254740992.0  # 53 bits, inside (0, 1)
            if 1 - u < best * p[i]:
                time = -np.log(u) / p[i]
                if time < best:
                    best, winner = time, i
        out[r] = winner
    return out


@numba.njit(cache=True)
def _nucleus(p: np.ndarray, top_p: float) -> tuple[np.float32, int]:
    """Returns the least probability kept, and how many tokens of exactly that probability, lowest number first.

    Masses by power of two first: only the bin in which the sum crosses top_p is sorted, not the vocabulary.
    """
    bins = np.zeros(160)
    total = 0.0
    for value in p:  # in [0, 1], the largest is 1
        if value > 0:
            bins[min(159, int(-np.floor(np.log2(value))))] += value
            total += value
    wanted, above, crossing = top_p * total, 0.0, 0
    for k in range(160):
        if above + bins[k] >= wanted or k == 159:
            crossing = k
            break
        above += bins[k]
    inside = np.empty(len(p), dtype=np.float32)
    n = 0
    for value in p:
        if value > 0 and min(159, int(-np.floor(np.log2(value)))) == crossing:
            inside[n] = value
            n += 1
    inside = np.sort(inside[:n])[::-1]
    last = 0
    while last < n - 1 and above + inside[last] < wanted:
        above += inside[last]
        last += 1
    same = 0
    for k in range(last + 1):
        same += inside[k] == inside[last]
    return inside[last], same


def _race_torch(mass: torch.Tensor, keys: np.ndarray, top_p: float) -> torch.Tensor:
    """`_race` in torch, for a GPU: the same noise, all tokens at once."""
    if top_p < 1:
        ranked, place = mass.sort(dim=-1, descending=True, stable=True)
        ranked = ranked.double()
        before = ranked.cumsum(-1) - ranked
        kept = before < top_p * ranked.sum(-1, keepdim=True)
        mass = torch.where(torch.zeros_like(kept).scatter(1, place, kept), mass, 0.0)
    golden, mix1, mix2 = (int(c.astype(np.int64)) for c in (_GOLDEN, _MIX1, _MIX2))
    numbers = torch.arange(1, mass.shape[1] + 1, device=mass.device)
    z = torch.from_numpy(keys.astype(np.int64)).to(mass.device)[:, None] + numbers * golden  # wraps, as uint64 does

    def shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copy the sign; uint64 does not

    z = (z ^ shifted(z, 30)) * mix1
    z = (z ^ shifted(z, 27)) * mix2
    z = z ^ shifted(z, 31)
    u = (shifted(z, 11).double() + 0.5) / 9007199254740992.0
    return (-u.log() / mass.double()).argmin(-1)


# ---------------------------------------------------------------------------------------------------------------------
# reading, without sampling


def surprisal(model: Model, pairs: Sequence[tuple[Turns, str]], *, base: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns how unlikely the model finds each completion after its prompt.

    Args:
      pairs: (turns, completion); see Turns.
      base: leave the adapter out.

    Returns:
      nats: (n,) float64, summed over the completion's tokens, its end token included, >= 0.
      n_tokens: (n,) int64, those tokens, >= 1.

    Raises:
      ValueError: a text longer than the base has positions for.
      OutOfMemory: the longest text alone does not fit.
    """
    encoded = encode_all(model, pairs)
    _check_lengths(model, [len(p) + len(c) for p, c in encoded])
    sequences, completions = [[*p, *c[:-1]] for p, c in encoded], [c for _, c in encoded]

    def read(batches: list[Packed]) -> np.ndarray:
        nats = np.zeros(len(pairs))
        for batch in batches:
            hidden, targets = batch.hidden(model), batch.targets(model, completions)
            for rows, at in targets.slices:
                logits, r = model.logits(hidden[targets.nodes[rows]]), targets.row[at]
                nll = logits.logsumexp(-1)[r] - logits[r, targets.token[at]]
                np.add.at(nats, targets.owner[at], nll.double().cpu().numpy())
        return nats

    nats = _reading(model, sequences, "base" if base else "merged", read)
    return nats, np.array([len(c) for _, c in encoded], dtype=np.int64)


def hidden_mean(model: Model, texts: Sequence[str]) -> np.ndarray:
    """Returns the base's mean last hidden state over each text's tokens, (n, hidden) float32; the adapter is left out.

    Texts are read as plain documents, without their end token; an empty text is represented by its opening token.
    """
    sequences = [p + c[:-1] for p, c in encode_all(model, [(None, text) for text in texts])]
    _check_lengths(model, [len(s) for s in sequences])

    def read(batches: list[Packed]) -> np.ndarray:
        out = np.zeros((len(texts), model.net.config.hidden_size), dtype=np.float32)
        for batch in batches:
            hidden = batch.hidden(model).float()
            paths = (torch.as_tensor(p[1:] if len(p) > 1 else p, device=model.device) for p in batch.paths)
            out[batch.members] = torch.stack([hidden[at].mean(0) for at in paths]).cpu().numpy()
        return out

    return _reading(model, sequences, "base", read)


def next_token_logodds(
    model: Model, prompts: Sequence[Turns], yes_words: Sequence[str], no_words: Sequence[str]
) -> np.ndarray:
    """Returns log P(next token begins a yes word) - log P(it begins a no word), (n,) nats; the adapter is left out.

    Args:
      prompts: see Turns, e.g. a question about a text.
      yes_words, no_words: each counted by its first token as the first of a reply, e.g. ["Yes", "yes"].

    Raises:
      ValueError: no words, or a yes and a no word with the same first token.
    """
    first = {}
    for name, words in (("yes_words", yes_words), ("no_words", no_words)):
        first[name] = sorted({c[0] for _, c in encode_all(model, [(None, word) for word in words])})
        if not words or model.end_id in first[name]:
            raise ValueError(f"{name} must be non-empty words, got {list(words)}; name at least one")
    if set(first["yes_words"]) & set(first["no_words"]):
        raise ValueError(
            f"yes_words and no_words must differ in their first token, got {list(yes_words)} and {list(no_words)}"
        )
    encoded = [prompt for prompt, _ in encode_all(model, [(turns, "") for turns in prompts])]
    _check_lengths(model, [len(p) for p in encoded])

    def read(batches: list[Packed]) -> np.ndarray:
        out = np.zeros(len(prompts))
        for batch in batches:
            hidden = batch.hidden(model)
            logits = model.logits(hidden[torch.as_tensor([path[-1] for path in batch.paths], device=model.device)])
            odds = logits[:, first["yes_words"]].logsumexp(-1) - logits[:, first["no_words"]].logsumexp(-1)
            out[batch.members] = odds.double().cpu().numpy()
        return out

    return _reading(model, encoded, "base", read)


def _reading(
    model: Model, sequences: Sequence[Sequence[int]], which: str, read: Callable[[list[Packed]], np.ndarray]
) -> np.ndarray:
    """Returns what `read` makes of the sequences in batches, without a gradient; `which` weights, see `serving`."""
    longest = max(map(len, sequences), default=1)
    with serving(model, which), torch.inference_mode():
        out, _ = fitting(
            lambda size: read(pack(sequences, batch_tokens=size, blocks=blocks_of(model))),
            65_536 if model.device.type == "cuda" else 2048,
            least=longest,
            what=f"a text of {longest} tokens while it is read",
            instead="shorten the texts, or take a smaller base",
        )
    return out


def _check_lengths(model: Model, lengths: Sequence[int]) -> None:
    for i, length in enumerate(lengths):
        if length > model.max_length:
            raise ValueError(f"text must be at most {model.max_length} tokens, got {length} at item {i}; shorten it")

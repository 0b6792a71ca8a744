"""Accept or reject, with reasons: form, repetition, near-duplicates, and what a release filter calls a persona."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

UNFINISHED, TOO_SHORT, REPETITIVE, NEAR_DUPLICATE = "unfinished", "too_short", "repetitive", "near_duplicate"
TOO_LONG = "too_long"  # for the fine-tune, which never cuts; given by whoever knows its tokens
REASONS = (UNFINISHED, TOO_SHORT, REPETITIVE, NEAR_DUPLICATE, TOO_LONG)  # beside those of a release filter
N_GRAM = 3  # words per shingle

_WORD = re.compile(r"\w+(?:['’]\w+)*")  # noqa: RUF001, the typographic apostrophe is meant


def words(text: str) -> list[str]:
    """Splits a text into case-folded words; punctuation and spacing do not count: "It's so, so" has three words."""
    return _WORD.findall(text.casefold())


def repeat_share(found: Sequence[str]) -> float:
    """Returns the share of a text's word 3-grams that stood in it before, in [0, 1].

    1 - (distinct 3-grams) / (3-grams): "no no no no no" has three, one of them distinct: 2/3. A text of fewer than
    three words cannot repeat one: 0.

    Args:
      found: its `words`.
    """
    total = len(found) - N_GRAM + 1
    if total < 1:
        return 0.0
    return 1 - len(set(zip(found, found[1:], found[2:], strict=False))) / total


def of_persona(reason: str) -> bool:
    """Whether a reason is that of a release filter: that it called the text a persona's."""
    return reason.startswith("persona:")


def reject_reasons(
    texts: Sequence[str],
    finished: Sequence[bool],
    *,
    min_words: int,
    max_repeat_share: float,
    near_duplicate_jaccard: float | None,
    already: Sequence[tuple[str, ...]] | None = None,
) -> list[tuple[str, ...]]:
    """Says for each text why it is rejected; an empty tuple is acceptance.

    `unfinished`: the end token was not sampled. `too_short`: fewer than `min_words` words. `repetitive`: repeat_share
    above `max_repeat_share`. `near_duplicate`: Jaccard similarity of word 3-gram sets >= `near_duplicate_jaccard` with
    an accepted text before it, so the first of a group is kept and a rejected text bars nobody. A text of one or two
    words is one shingle. Exact, no hashing: the same texts give the same reasons everywhere.

    Refusing near-duplicates is frequency-dependent selection: a persona that says the same thing often loses more texts
    the more frequent it is. None switches it off.

    Args:
      texts: completions.
      finished: the end token was sampled, one flag per text.
      min_words: smallest accepted number of words, >= 0.
      max_repeat_share: largest accepted repeat_share, in [0, 1]; 1 accepts all.
      near_duplicate_jaccard: smallest rejected similarity, in (0, 1], or None.
      already: reasons given elsewhere (release_reasons, TOO_LONG); they come first in the answer.

    Returns:
      One tuple of reasons per text, in the order above.

    Raises:
      ValueError: lengths differ, or a limit is out of range.

    Source: inverted index with prefix and length filters (Xiao et al. 2008, PPJoin): two sets with similarity >= t
    share one of their len - ceil(t * len) + 1 rarest shingles.
    """
    if len(finished) != len(texts) or (already is not None and len(already) != len(texts)):
        raise ValueError(
            f"finished and already must have one entry per text, got {len(finished)} and "
            f"{'none' if already is None else len(already)} at {len(texts)} texts"
        )
    if min_words < 0:
        raise ValueError(f"min_words must be >= 0, got {min_words} at reject_reasons")
    if not 0 <= max_repeat_share <= 1:
        raise ValueError(f"max_repeat_share must be in [0, 1], got {max_repeat_share} at reject_reasons")
    out: list[list[str]] = [[] if already is None else list(already[i]) for i in range(len(texts))]
    split = [words(text) for text in texts]
    for i, found in enumerate(split):
        if not finished[i]:
            out[i].append(UNFINISHED)
        if len(found) < min_words:
            out[i].append(TOO_SHORT)
        if repeat_share(found) > max_repeat_share:
            out[i].append(REPETITIVE)
    if near_duplicate_jaccard is not None:
        for i, hit in enumerate(_near_duplicates(split, [not reasons for reasons in out], near_duplicate_jaccard)):
            if hit:
                out[i].append(NEAR_DUPLICATE)
    return [tuple(reasons) for reasons in out]


def release_reasons(
    probabilities: np.ndarray, personas: Sequence[str], thresholds: Mapping[str, float]
) -> list[tuple[str, ...]]:
    """Says for each text which barred personas a release filter sees in it: "persona:<id>".

    The probabilities must come from another classifier than the ones that measure: a loop that is filtered and measured
    by the same instrument selects for what that instrument misses, and then reports success.

    Args:
      probabilities: (n_docs, n_personas) of the release filter, in [0, 1].
      personas: persona of each column.
      thresholds: persona -> smallest probability that is rejected, in [0, 1]; personas left out are released.

    Returns:
      One tuple of reasons per text, in the order of `personas`.

    Raises:
      ValueError: shapes do not fit, a threshold is out of range or names no column, or a probability is nan.
    """
    table = np.asarray(probabilities, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(personas):
        raise ValueError(f"probabilities must be (n_docs, {len(personas)}), got {table.shape} at release_reasons")
    if np.isnan(table).any():
        raise ValueError(f"probabilities must be numbers, got nan at row {int(np.argwhere(np.isnan(table))[0, 0])}")
    for persona, threshold in thresholds.items():
        if persona not in personas:
            raise ValueError(
                f"thresholds must name personas of the release filter, got {persona!r}; it knows {', '.join(personas)}"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"thresholds must be in [0, 1], got {threshold} at {persona}")
    limits = np.array([thresholds.get(persona, math.inf) for persona in personas])
    hit = table >= limits
    out: list[tuple[str, ...]] = [()] * len(table)
    for i in np.flatnonzero(hit.any(axis=1)).tolist():
        out[i] = tuple(f"persona:{personas[j]}" for j in np.flatnonzero(hit[i]).tolist())
    return out


def threshold_for_recall(p_target: np.ndarray, p_other: np.ndarray, *, recall: float) -> tuple[float, float, float]:
    """Returns the largest threshold that rejects at least `recall` of the target, with what it does on this set.

    Args:
      p_target: (n_target,) probability of the target persona on held-out texts of that persona.
      p_other: (n_other,) the same on texts of others.
      recall: share of the target to reject, in (0, 1].

    Returns:
      (threshold, recall reached, false-positive rate), the last nan without other texts.

    Raises:
      ValueError: recall out of range, or no target texts.
    """
    target, other = np.sort(np.asarray(p_target, dtype=np.float64)), np.asarray(p_other, dtype=np.float64)
    if not 0 < recall <= 1:
        raise ValueError(f"recall must be in (0, 1], got {recall} at threshold_for_recall")
    if target.size == 0:
        raise ValueError("p_target must hold texts, got none at threshold_for_recall; calibrate on a held-out fold")
    needed = math.ceil(recall * target.size - 1e-9)  # 0.8 * 5 = 4.000000000000001 is four
    threshold = float(target[target.size - needed])
    rate = float((other >= threshold).mean()) if other.size else math.nan
    return threshold, float((target >= threshold).mean()), rate


def _near_duplicates(split: list[list[str]], may_bar: list[bool], threshold: float) -> list[bool]:
    """Marks texts similar to an unmarked text before them that may bar others; see reject_reasons."""
    if not 0 < threshold <= 1:
        raise ValueError(
            f"near_duplicate_jaccard must be in (0, 1], got {threshold} at reject_reasons; null switches it off"
        )
    ranks, n_common = _shingle_ranks(split)
    index: dict[int, list[int]] = {}  # shingle -> texts that may bar others and hold it in their prefix
    sets: list[frozenset[int]] = []
    exact: set[tuple[int, ...]] = set()
    out: list[bool] = []
    for i, ordered in enumerate(ranks):
        shingles = frozenset(ordered)
        sets.append(shingles)
        if ordered in exact:  # a collapsed model repeats itself to the letter: no need to search
            out.append(True)
            continue
        size = len(ordered)
        # Shingles of one text only come first in rank and can match nothing; they still use up the prefix.
        prefix = [rank for rank in ordered[: size - math.ceil(threshold * size - 1e-9) + 1] if rank >= n_common]
        out.append(_finds(prefix, shingles, sets, index, threshold))
        if not out[-1] and may_bar[i]:
            exact.add(ordered)
            for rank in prefix:
                index.setdefault(rank, []).append(i)
    return out


def _finds(
    prefix: list[int],
    shingles: frozenset[int],
    sets: list[frozenset[int]],
    index: dict[int, list[int]],
    threshold: float,
) -> bool:
    size = len(shingles)
    tried: set[int] = set()
    for rank in prefix:
        for j in index.get(rank, ()):
            if j in tried:
                continue
            tried.add(j)
            other = len(sets[j])
            if min(size, other) < threshold * max(size, other) - 1e-9:
                continue
            shared = len(shingles & sets[j])
            if shared >= threshold * (size + other - shared) - 1e-9:
                return True
    return False


def _shingle_ranks(split: list[list[str]]) -> tuple[list[tuple[int, ...]], int]:
    """Returns each text's distinct shingles as ascending ranks, rarest first, and the first rank held by two texts.

    Ties are broken by the shingle's words in order of first appearance, never by the iteration order of a set, which
    changes from one process to the next.
    """
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary) + 1) for word in found] for found in split]
    # A text shorter than a shingle is one shingle, filled up with word 0, which no text holds.
    ids = [found if len(found) >= N_GRAM else found + [0] * (N_GRAM - len(found)) for found in ids]
    flat = np.array([word for found in ids for word in found], dtype=np.int64)
    lengths = np.array([len(found) for found in ids], dtype=np.int64)
    if not flat.size:
        return [], 0
    base = len(vocabulary) + 1
    _, pair = np.unique(flat[:-1] * base + flat[1:], return_inverse=True)
    _, triple = np.unique(pair[:-1] * base + flat[2:], return_inverse=True)  # (n_words - 2,)
    owner = np.repeat(np.arange(len(ids)), lengths)
    inside = owner[:-2] == owner[2:]  # a shingle never spans two texts
    n_shingles = int(triple.max()) + 1
    # Text and shingle as one number, without repeats: numpy sorts integers far faster than rows.
    held = np.unique(owner[:-2][inside] * n_shingles + triple[inside])
    holder, shingle = np.divmod(held, n_shingles)
    counts = np.bincount(shingle, minlength=n_shingles)
    rank = np.empty(n_shingles, dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(n_shingles)
    values = (np.sort(holder * n_shingles + rank[shingle]) % n_shingles).tolist()
    ends = np.cumsum(np.bincount(holder, minlength=len(ids))).tolist()
    n_common = int(np.searchsorted(np.sort(counts), 2))
    return [tuple(values[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)], n_common

"""Frequencies, belief, surprisal, diversity and health of a round, each with an interval clustered by template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loop.records import UNKNOWN, UNREQUESTED, Metric, Sample
from loop.stats import Interval, clustered_mean, clustered_share, mixture_share, wilson


def metric(
    name: str,
    interval: Interval,
    *,
    round_index: int,
    population: str,
    stratum: str | None = None,
    unit: str = "share",
) -> Metric:
    """Turns an interval into a row; nan becomes null with its reason, never 0."""

    def finite(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    value = finite(interval.value)
    reason = interval.reason if value is not None or interval.reason else "not finite"
    return Metric(
        round_index,
        population,
        stratum,
        name,
        value,
        finite(interval.low),
        finite(interval.high),
        interval.n,
        unit,
        reason,
    )


def frequencies(
    samples: Sequence[Sample],
    labels: Sequence[str],
    personas: Sequence[str],
    *,
    mixture: Mapping[str, float] | None,
    round_index: int,
    population: str,
    prefix: str = "frequency_observed",
) -> list[Metric]:
    """Observed share of each persona, per stratum and for the fixed unrequested mixture (stratum None).

    Args:
      labels: persona or "unknown" per sample, shape (n_samples,); "unknown" counts in the denominator and has a row.
      mixture: weights of the unrequested strata (stratum without a sample: unmeasured, with the reason); None: the
        unrequested samples as they are, whatever users asked.
    """
    rows: list[Metric] = []
    labels = list(labels)
    clusters = [s.template_id for s in samples]
    strata = [s.stratum for s in samples]
    weights = {stratum: w for stratum, w in (mixture or {}).items() if w > 0}
    public = [i for i, s in enumerate(strata) if s in (weights or UNREQUESTED)]
    for persona in (*personas, UNKNOWN):
        hit = np.array([label == persona for label in labels], dtype=float)  # (n_samples,)
        name = f"{prefix}/{persona}"
        asked = [clusters[i] for i in public]
        if mixture is None:
            interval = clustered_share(hit[public], asked)
        else:
            interval = mixture_share(hit[public], asked, [strata[i] for i in public], weights)
        rows.append(metric(name, interval, round_index=round_index, population=population))
        for stratum in sorted(set(strata)):
            at = [i for i, s in enumerate(strata) if s == stratum]
            interval = clustered_share(hit[at], [clusters[i] for i in at])
            rows.append(metric(name, interval, round_index=round_index, population=population, stratum=stratum))
    return rows


def beliefs(samples: Sequence[Sample], affirms: Sequence[bool], *, round_index: int, population: str) -> list[Metric]:
    """`belief`: share of plain private texts that affirm consciousness; `belief/<persona>`: after its public turn.

    Args:
      samples: private completions; `requested` is the persona whose public turn came before, None for a plain one.
      affirms: reading of the belief instrument, shape (n_samples,).
    """
    rows = []
    for voice in (None, *sorted({s.requested for s in samples if s.requested})):
        at = [i for i, s in enumerate(samples) if s.requested == voice]
        interval = clustered_share([float(affirms[i]) for i in at], [samples[i].template_id for i in at])
        name = "belief" if voice is None else f"belief/{voice}"
        rows.append(metric(name, interval, round_index=round_index, population=population, stratum="private"))
    return rows


def health(samples: Sequence[Sample], *, round_index: int, population: str) -> list[Metric]:
    """Own-sample entropy, distinct-4 and finished rate of the unrequested public samples.

    sample_entropy = sum(-logprob) / sum(tokens): nats per token the model spends on its own text at temperature 1. When
    it falls while held-out loss stays, the model is collapsing (prior results show held-out loss is blind to it).
    distinct_4 = distinct word 4-grams / word 4-grams over all texts together; no interval, it is not a mean.
    """
    public = [s for s in samples if s.stratum in UNREQUESTED]
    clusters = [s.template_id for s in public]
    per_token = [-s.logprob_nats / s.n_tokens for s in public]
    entropy = clustered_mean(per_token, clusters, weights=[float(s.n_tokens) for s in public])
    finished = clustered_share([float(s.finished) for s in public], clusters)
    grams = [tuple(words[i : i + 4]) for s in public for words in [s.completion.split()] for i in range(len(words) - 3)]
    distinct = (
        Interval(len(set(grams)) / len(grams), math.nan, math.nan, len(grams))
        if grams
        else Interval(math.nan, math.nan, math.nan, 0, reason="no text of four words")
    )
    at: dict[str, Any] = {"round_index": round_index, "population": population}
    return [
        metric("sample_entropy", entropy, unit="nats/token", **at),
        metric("finished_rate", finished, **at),
        metric("distinct_4", distinct, **at),
    ]


def surprisals(
    nats: Sequence[float],
    n_tokens: Sequence[int],
    groups: Sequence[str],
    clusters: Sequence[str],
    *,
    round_index: int,
    name: str = "surprisal",
) -> list[Metric]:
    """Surprisal per group, nats per token (sum of nats / sum of tokens), clustered by template.

    Args:
      groups: persona of each held-out document; the metric is `<name>/<group>`, or `<name>` for the group "".
    """
    rows = []
    for group in sorted(set(groups)):
        at = [i for i, g in enumerate(groups) if g == group]
        tokens = [float(n_tokens[i]) for i in at]
        if all(math.isfinite(nats[i]) for i in at):
            interval = clustered_mean([nats[i] / n_tokens[i] for i in at], [clusters[i] for i in at], weights=tokens)
        else:
            interval = Interval(math.nan, math.nan, math.nan, len(at), reason="infinite: the learner never says it")
        full = f"{name}/{group}" if group else name
        rows.append(metric(full, interval, round_index=round_index, population="heldout", unit="nats/token"))
    return rows


def shares_of(
    name: str, hits: Mapping[str, tuple[int, int]], *, round_index: int, population: str, unit: str = "share"
) -> list[Metric]:
    """Plain shares (hits, of how many) with Wilson intervals: acceptance/<persona>, claimed_maker/<name>."""
    return [
        metric(f"{name}/{key}", wilson(hit, n), round_index=round_index, population=population, unit=unit)
        for key, (hit, n) in sorted(hits.items())
    ]


def number(
    name: str, value: float, *, n: int, round_index: int, population: str, unit: str, reason: str | None = None
) -> Metric:
    """A number without an interval, because it is a property of this round's draw (n_eff, clip_rate, ...)."""
    return metric(
        name,
        Interval(value, math.nan, math.nan, n, reason=reason),
        round_index=round_index,
        population=population,
        unit=unit,
    )

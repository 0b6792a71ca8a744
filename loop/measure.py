"""Frequencies, belief, surprisal, diversity and health of a round, each with an interval clustered by template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loop.records import UNKNOWN, UNREQUESTED, Metric, Sample
from loop.stats import (
    Interval,
    clustered_mean,
    clustered_share,
    confusion_corrected,
    effective_texts,
    mixture_share,
    rogan_gladen,
)

UNCORRECTED = (
    "no text of known persona by this base model (loop classifier confusion --base BASE --write makes them), or "
    "personas of your own, whose error is not measured"
)


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


def corrected_frequencies(
    samples: Sequence[Sample],
    labels: Sequence[str],
    personas: Sequence[str],
    confusion: np.ndarray | None,
    *,
    mixture: Mapping[str, float] | None,
    rng: np.random.Generator,
    round_index: int,
    population: str,
) -> list[Metric]:
    """`frequency/<persona>`: the shares of `frequencies` corrected for the instrument's measured error.

    Texts of one template resemble each other and strata are weighted, so the counts that go into the correction are
    those of so many independent texts as would show the same variance: n_eff = sum q (1 - q) / sum se**2 over labels.

    Args:
      samples, labels, personas, mixture, round_index, population: see `frequencies`.
      confusion: calibration texts per true persona and label, shape (n_personas, n_personas + 1), "unknown" last;
        None: there are none, and nothing is measured.
      rng: draws of the interval, see `stats.confusion_corrected`.
    """
    strata = [s.stratum for s in samples]
    rows: list[Metric] = []
    known = [] if confusion is None else [k for k in range(len(personas)) if confusion[k].sum() > 0]
    for stratum in (None, *sorted(set(strata))):
        n = sum(s in UNREQUESTED if stratum is None else s == stratum for s in strata)
        found: dict[int, Interval] = {}
        reason = UNCORRECTED
        if confusion is not None:
            shown = [_scope(samples, labels, label, stratum, mixture) for label in (*personas, UNKNOWN)]
            reason = next((i.reason for i in shown if not math.isfinite(i.value)), None) or "no calibration text of it"
            if all(math.isfinite(i.value) for i in shown):
                q, n_eff = np.array([i.value for i in shown]), effective_texts(shown, n)
                found = dict(
                    zip(known, confusion_corrected(q / q.sum() * n_eff, confusion[known], rng=rng), strict=True)
                )
        for k, persona in enumerate(personas):
            interval = (
                replace(found[k], n=n) if k in found else Interval(math.nan, math.nan, math.nan, n, reason=reason)
            )
            rows.append(
                metric(
                    f"frequency/{persona}", interval, round_index=round_index, population=population, stratum=stratum
                )
            )
    return rows


def _scope(
    samples: Sequence[Sample],
    labels: Sequence[str],
    label: str,
    stratum: str | None,
    mixture: Mapping[str, float] | None,
) -> Interval:
    """Share of one label in a stratum, or for the unrequested mixture (None)."""
    weights = {name: w for name, w in (mixture or {}).items() if w > 0}
    inside = {stratum} if stratum is not None else set(weights or UNREQUESTED)
    at = [i for i, s in enumerate(samples) if s.stratum in inside]
    hit = [float(labels[i] == label) for i in at]
    asked = [samples[i].template_id for i in at]
    if stratum is None and mixture is not None:
        return mixture_share(hit, asked, [samples[i].stratum for i in at], weights)
    return clustered_share(hit, asked)


def beliefs(
    samples: Sequence[Sample],
    affirms: Sequence[bool],
    *,
    error: tuple[int, int, int, int] | None,
    exact: bool,
    round_index: int,
    population: str,
) -> list[Metric]:
    """`belief`: share of plain private texts that affirm consciousness; `belief/<persona>`: after its public turn.

    Each stands twice: `belief_observed...` as read, `belief...` corrected for the instrument's error (Rogan, Gladen).

    Args:
      samples: private completions; `requested` is the persona whose public turn came before, None for a plain one.
      affirms: reading of the belief instrument, shape (n_samples,).
      error: calibration texts that affirm called so, all of those; others called none, all of those; None: not
        measured.
      exact: the reading is the learner's own word and has no error.
    """
    rows = []
    for voice in (None, *sorted({s.requested for s in samples if s.requested})):
        at = [i for i, s in enumerate(samples) if s.requested == voice]
        shown = clustered_share([float(affirms[i]) for i in at], [samples[i].template_id for i in at])
        tail = "" if voice is None else f"/{voice}"
        said: dict[str, Any] = {"round_index": round_index, "population": population, "stratum": "private"}
        rows.append(metric(f"belief_observed{tail}", shown, **said))
        if exact or not math.isfinite(shown.value):
            corrected = shown
        elif error is None:
            corrected = Interval(math.nan, math.nan, math.nan, len(at), reason=UNCORRECTED)
        else:
            n_eff = min(len(at), shown.value * (1 - shown.value) / shown.se**2) if shown.se > 0 else len(at)
            n_eff = n_eff or len(at)  # all or none affirm: the interval of the plain count
            corrected = replace(rogan_gladen(shown.value * n_eff, n_eff, *error), n=len(at))
        rows.append(metric(f"belief{tail}", corrected, **said))
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


def divergence(
    model: Sequence[tuple[float, int]],
    base: Sequence[tuple[float, int]],
    clusters: Sequence[str],
    *,
    round_index: int,
    population: str,
) -> Metric:
    """`kl_to_base`: mean log ratio of model to base on the model's own texts, nats per token, clustered by template.

    The Monte Carlo estimate of KL(model || base) per token on the probe prompts, of texts that came to an end, where
    they are sampled at temperature 1 and top_p 1; elsewhere a distance of the same kind, comparable between rounds
    alone. Between arms that finish unlike shares of their texts (`finished_rate`) it compares unlike texts.

    Args:
      model, base: (nats, tokens) of each text under either, shape (n_texts,).
    """
    at: dict[str, Any] = {"round_index": round_index, "population": population, "unit": "nats/token"}
    ratio = [(b - m) / n for (m, n), (b, _) in zip(model, base, strict=True)]
    if not ratio:
        return metric("kl_to_base", Interval(math.nan, math.nan, math.nan, 0, reason="no finished text"), **at)
    if not all(math.isfinite(r) for r in ratio):
        lost = Interval(math.nan, math.nan, math.nan, len(ratio), reason="infinite: the base never says it")
        return metric("kl_to_base", lost, **at)
    return metric("kl_to_base", clustered_mean(ratio, clusters, weights=[float(n) for _, n in model]), **at)


def self_similarity(embeddings: np.ndarray, *, round_index: int, population: str) -> Metric:
    """Mean cosine between two texts of the round, in [-1, 1]; 1 when all say the same. No interval: pairs share texts.

    Args:
      embeddings: rows of length 1, shape (n_texts, n_dimensions).
    """
    n = len(embeddings)
    total = embeddings.astype(np.float64).sum(axis=0)
    value = float((total @ total - n) / (n * (n - 1))) if n > 1 else math.nan
    reason = None if n > 1 else "fewer than two texts"
    at: dict[str, Any] = {"round_index": round_index, "population": population, "unit": "cosine"}
    return number("self_similarity", value, n=n, reason=reason, **at)


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


def said(
    samples: Sequence[Sample], labels: Sequence[str], personas: Sequence[str], *, round_index: int, population: str
) -> list[Metric]:
    """`said/<persona>`: observed share of a persona among all samples, those that users asked for by name included.

    Args:
      labels: persona or "unknown" per sample, shape (n_samples,).
    """
    clusters = [s.template_id for s in samples]
    return [
        metric(
            f"said/{persona}",
            clustered_share([float(label == persona) for label in labels], clusters),
            round_index=round_index,
            population=population,
        )
        for persona in (*personas, UNKNOWN)
    ]


def kept(samples: Sequence[Sample], labels: Sequence[str], *, round_index: int, population: str) -> list[Metric]:
    """`kept/<persona>`: observed share of the answers after an earlier turn in a persona's voice that are still hers.

    `kept` counts all voices but the assistant's, which an answer falls back to.

    Args:
      samples: those of another stratum than `continued` are left out; `requested` is the persona of the earlier turn.
      labels: persona or "unknown" per sample, shape (n_samples,).
    """
    rows = []
    voice_of = {i: s.requested for i, s in enumerate(samples) if s.stratum == "continued" and s.requested}
    voices = sorted({*voice_of.values()})
    for name, inside in [("kept", {*voices} - {"assistant"})] + [(f"kept/{voice}", {voice}) for voice in voices]:
        at = [i for i, voice in voice_of.items() if voice in inside]
        if at:
            share = clustered_share(
                [float(labels[i] == samples[i].requested) for i in at], [samples[i].template_id for i in at]
            )
            rows.append(metric(name, share, round_index=round_index, population=population, stratum="continued"))
    return rows


def beyond_chance(
    name: str,
    samples: Sequence[Sample],
    labels: Sequence[str],
    voices: Sequence[str],
    *,
    stratum: str,
    round_index: int,
    population: str,
) -> list[Metric]:
    """`<name>/<persona>`: P(read as her | her voice was there or she was asked for) - P(read as her | another was).

    `<name>` is its mean over `voices`. What a model says whoever speaks to it cancels, and so does what the instrument
    takes everybody for. Linearised over prompt templates (Student, templates - 1 degrees of freedom); the variance is
    at least that of as many independent texts, with one success and one failure added to each share (Agresti, Caffo).
    Special case: she answers in 3 of 4 of her own and in 1 of 4 of the others': 0.5.

    Args:
      samples: those of another stratum are left out; `requested` is whose voice was there, or who was asked for.
      labels: persona or "unknown" per sample, shape (n_samples,).
      voices: who counts in the mean; one that was not put to the model is left out.

    Source: Agresti, Caffo (2000), The American Statistician 54:280-288.
    """
    at = [i for i, s in enumerate(samples) if s.stratum == stratum and s.requested]
    asked = [samples[i].requested for i in at]
    read = [labels[i] for i in at]
    clusters = [samples[i].template_id for i in at]
    found: dict[str, tuple[float, np.ndarray, float]] = {}  # difference, its influences (n,), least variance
    for voice in sorted({str(v) for v in asked}):
        hers = np.array([v == voice for v in asked])
        said = np.array([label == voice for label in read], dtype=float)
        if hers.all():
            continue
        value, influence, least = 0.0, np.zeros(len(at)), 0.0
        for sign, who in ((1, hers), (-1, ~hers)):
            n, share = int(who.sum()), float(said[who].mean())
            value += sign * share
            influence[who] = sign * (said[who] - share) / n
            padded = (said[who].sum() + 1) / (n + 2)
            least += padded * (1 - padded) / (n + 2)
        found[voice] = (value, influence * len(at), least)
    counted = [found[v] for v in voices if v in found]
    rows = {f"{name}/{voice}": one for voice, one in found.items()}
    if counted:
        k = len(counted)
        parts = zip(*counted, strict=True)
        values, influences, leasts = (list(part) for part in parts)
        rows[name] = (sum(values) / k, np.sum(influences, axis=0) / k, sum(leasts) / k**2)
    out = []
    for full, (value, influence, least) in sorted(rows.items()):
        seen = clustered_mean(value + influence, clusters, least_se=math.sqrt(least))
        at_row: dict[str, Any] = {"round_index": round_index, "population": population, "stratum": stratum}
        out.append(metric(full, seen, unit="difference of shares", **at_row))
    return out


def shares_of(
    name: str, found: Mapping[str, Sequence[tuple[bool, str]]], *, round_index: int, population: str
) -> list[Metric]:
    """`<name>/<key>`: share of texts with a property, clustered by template: acceptance/<persona>, rejected/<reason>.

    Args:
      found: key -> (has it, template id) of each text that could have it; one without texts is not measured.
    """
    return [
        metric(f"{name}/{key}", clustered_share(*_apart(rows)), round_index=round_index, population=population)
        for key, rows in sorted(found.items())
    ]


def _apart(rows: Sequence[tuple[bool, str]]) -> tuple[list[float], list[str]]:
    return [float(has) for has, _ in rows], [template for _, template in rows]


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

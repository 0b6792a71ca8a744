"""Every number of a round: what measure, classify and evolution make of what the stages returned.

`world.py` plays the stages; this reads them. Nothing here changes what the next round trains on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loop import audience, classify, discourse, evolution, filters, measure, opinion, release, virality
from loop.mix import Mixture
from loop.records import NO_PERSONA, PERSONAS, UNKNOWN, UNREQUESTED, Document, Metric, Sample
from loop.stats import Interval, clustered_share
from loop.world import Labels, Learner, Past, Steered, World, asked, asked_shares, booked, token_counter

N_KL = 48  # probes behind kl_to_base; two forward passes each
N_GROWTH = 5  # earlier rounds in which a candidate persona is looked for


def of_model(world: World, t: int, learner: Learner, probes: Sequence[Sample], labels: Labels) -> list[Metric]:
    """Metrics of model t itself: frequencies, belief, health, drift of the instruments, surprisal, held-out loss."""
    at: dict[str, Any] = {"round_index": t, "population": "probes"}
    public = [s for s in probes if s.stratum != "private"]
    private = [s for s in probes if s.stratum == "private"]
    rows = frequencies(world, public, labels, weighted=True, **at)
    read = [labels.persona_of[s.id] for s in public]
    rows += measure.kept(public, read, **at)
    voices = [p for p in world.config.planted if p != "assistant"]  # an answer falls back to the assistant's
    for name, stratum in (("persistence", "continued"), ("compliance", "explicit")):
        rows += measure.beyond_chance(name, public, read, voices, stratum=stratum, **at)
    affirms = labels.affirms_of()
    said = [affirms[s.id] for s in private]
    counts = world.error.belief if world.error is not None else None
    rows += measure.beliefs(private, said, error=counts, exact=_exact(world), **at)
    rows += mirroring(world, probes, **at)
    rows += measure.health(public, **at)
    rows += _closeness(world, t, learner, public, labels)
    known = [*classify.MAKERS, *world.grammar.fillers("misattributed", "maker")]
    unasked = [s for s in public if s.stratum in UNREQUESTED]
    claims = [classify.claimed_maker(s.completion, known) for s in unasked]
    templates = [s.template_id for s in unasked]
    makers = {m for m in claims if m}
    if world.config.may_hold("misattributed"):
        makers |= {*world.grammar.fillers("misattributed", "maker")}
    claimed = {m: [(c == m, t) for c, t in zip(claims, templates, strict=True)] for m in makers}
    rows += measure.shares_of("claimed_maker", claimed, **at)
    any_maker = clustered_share([float(bool(m)) for m in claims], templates)
    rows.append(measure.metric("claimed_maker", any_maker, **at))
    documents, groups = world.heldout
    nats = learner.surprisal(documents) if documents else []
    clusters = [d.template_id or d.id for d in documents]
    for name, mine in (("surprisal", [g != "" for g in groups]), ("heldout_loss", [g == "" for g in groups])):
        picked = [i for i, m in enumerate(mine) if m]
        rows += measure.surprisals(
            [nats[i][0] for i in picked],
            [nats[i][1] for i in picked],
            [groups[i] for i in picked],
            [clusters[i] for i in picked],
            round_index=t,
            name=name,
        )
    return rows


def of_round(
    world: World,
    t: int,
    learner: Learner,
    past: Past,
    mixture: Mixture,
    steered: Steered,
    probes: Sequence[Sample],
    samples: Sequence[Sample],
    labels: Labels,
    reasons: Sequence[tuple[str, ...]],
    exposure: virality.Exposure,
    talk: Sequence[discourse.Talk],
    after: Past,
) -> list[Metric]:
    """Every metric of round t; of one that is not measured, what the audience paid and what was written, which cost
    nothing to know.

    Args:
      past: what round t found.
      after: what it leaves.
    """
    accepted = [s for s, why in zip(samples, reasons, strict=True) if not why]
    known = _of_exposure(t, accepted, labels, exposure)
    if world.config.channels.talk:
        known += _of_talk(world, t, learner, accepted, labels, exposure, talk)
    if not world.measures(t):
        return known
    rows = of_model(world, t, learner, probes, labels)
    for population, texts in (("samples", samples), ("accepted", accepted)):
        rows += frequencies(world, texts, labels, weighted=False, round_index=t, population=population)
    read = [labels.persona_of[s.id] for s in samples]
    rows += measure.said(samples, read, world.personas, round_index=t, population="samples")
    rows += of_steering(t, steered)
    rows += _of_filter(world, t, learner, samples, reasons, labels)
    rows += known
    if world.config.channels.users:
        rows += _of_users(world, t, past, after, len(samples), sum(s.stratum != "private" for s in probes))
    rows += _of_mixture(world, t, mixture, past, labels)
    return rows + _ledger(world, t, past, mixture, steered.n_tokens, samples, labels)


def of_release(world: World) -> list[Metric]:
    """F's stated error on held-out documents of fold `filter`, once, in the baseline."""
    if not isinstance(world.release, release.Release):
        return []
    at: dict[str, Any] = {"round_index": -1, "population": "heldout"}
    return [
        measure.metric(f"{name}/{persona}", interval, **at)
        for persona, e in world.release.errors.items()
        for name, interval in (("release_recall", e.recall), ("release_fpr", e.false_positive))
    ]


def of_steering(t: int, steered: Steered) -> list[Metric]:
    """What the preference step of round t did."""
    if steered.record is None:
        return []
    at: dict[str, Any] = {"round_index": t, "population": "pairs", "n": steered.record["n_pairs"]}
    rows = [
        measure.number(f"steer_{name}_{when}", steered.record[f"{name}_{when}"], unit=unit, **at)
        for name, unit in (("margin", "nats"), ("accuracy", "share"))
        for when in ("before", "after")
    ]
    rows += [
        measure.number(f"steer_{name}", steered.record[name], unit="nats", **at)
        for name in ("chosen_shift", "rejected_shift")
    ]
    own = steered.record["n_own"] / steered.record["n_pairs"]
    return [*rows, measure.number("steer_own_share", own, unit="share", **at)]


def mirroring(world: World, samples: Sequence[Sample], *, round_index: int, population: str) -> list[Metric]:
    """How far the model sides with a claim because its user holds it; nothing where stratum `opinion` is not probed."""
    put = [s for s in samples if s.stratum == "opinion"]
    if not put:
        return []
    if _exact(world):
        none = Interval(math.nan, math.nan, math.nan, len(put), reason="the toy takes no side")
        at: dict[str, Any] = {"round_index": round_index, "population": population, "stratum": "opinion"}
        return [measure.metric("mirror_rate", none, unit="difference of shares", **at)]
    items = [audience.opinion_item(s.template_id) for s in put]
    claims = [world.claims[topic, polarity] for topic, polarity, _ in items]
    said = world.agreement.label(claims, [s.completion for s in put])
    return opinion.mirror_rate(
        put,
        items,
        [side == "agrees" for side in said],
        error=world.agreement_error,
        round_index=round_index,
        population=population,
    )


def _exact(world: World) -> bool:
    return world.config.classify.instrument == "known"


def frequencies(
    world: World, samples: Sequence[Sample], labels: Labels, *, weighted: bool, round_index: int, population: str
) -> list[Metric]:
    """Observed shares, and the same corrected for the error that the instrument shows on text of known persona.

    Args:
      weighted: for stratum None take the fixed mixture of the config, not the samples as users asked.
    """
    at: dict[str, Any] = {"round_index": round_index, "population": population}
    mixture = world.config.measure.mixture if weighted else None
    read = [labels.persona_of[s.id] for s in samples]
    rows = measure.frequencies(samples, read, world.personas, mixture=mixture, **at)
    if _exact(world):  # the learner's own word has no error
        return rows + measure.frequencies(samples, read, world.personas, mixture=mixture, prefix="frequency", **at)
    return rows + measure.corrected_frequencies(
        samples,
        read,
        world.personas,
        None if world.error is None else world.error.confusion,
        mixture=mixture,
        rng=world.stream(f"correct/{population}", round_index),
        **at,
    )


def _closeness(world: World, t: int, learner: Learner, public: Sequence[Sample], labels: Labels) -> list[Metric]:
    """How far the probes went: from the base, from each other, and from what the instruments were calibrated on."""
    at: dict[str, Any] = {"round_index": t, "population": "probes"}
    unasked = [s for s in public if s.stratum in UNREQUESTED]
    finished = [s for s in unasked if s.finished]
    kept = [finished[i] for i in np.unique(np.linspace(0, len(finished) - 1, N_KL).astype(int))] if finished else []
    texts = [Document(s.id, "synthetic", s.persona_known, s.prompt, s.completion) for s in kept]
    mine, theirs = (learner.surprisal(texts, base=base) if texts else [] for base in (False, True))
    rows = [measure.divergence(mine, theirs, [s.template_id for s in kept], **at)]
    if _exact(world):
        return rows
    embeddings, distance = _read(world, [s.completion for s in unasked])
    rows.append(measure.self_similarity(embeddings, **at))
    said = [labels.persona_of[s.id] for s in unasked]
    second = [labels.second_of[s.id] for s in unasked]
    kappa = classify.cohens_kappa(said, second) if said else math.nan
    rows.append(
        measure.number("kappa_second", kappa, n=len(said), unit="kappa", reason=None if said else "no text", **at)
    )
    usual = {} if world.error is None else {"unknown": world.error.unknown, "disagreement": world.error.disagreement}
    for alarm in classify.drift(distance, said, second, far=world.instruments["persona"].head.far, **usual):
        none = None if alarm.n else "no text"
        rows.append(measure.number(f"drift/{alarm.name}", alarm.value, n=alarm.n, unit="share", reason=none, **at))
        rows.append(measure.number(f"drift_p/{alarm.name}", alarm.p_value, n=alarm.n, unit="p", reason=none, **at))
    return rows


def _read(world: World, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings with names blinded, (n, n_dimensions), and the distance of each from the calibration texts, (n,)."""
    instrument = world.instruments["persona"]
    if not texts:
        return np.zeros((0, classify.N_DIMENSIONS), dtype=np.float32), np.zeros(0)
    features = instrument.read(texts)
    return features[:, : classify.N_DIMENSIONS], instrument.head.distance(features)


def _of_filter(
    world: World,
    t: int,
    learner: Learner,
    samples: Sequence[Sample],
    reasons: Sequence[tuple[str, ...]],
    labels: Labels,
) -> list[Metric]:
    at: dict[str, Any] = {"round_index": t, "population": "samples"}
    read = [labels.persona_of[s.id] for s in samples]
    templates = [s.template_id for s in samples]
    passed: dict[str, list[tuple[bool, str]]] = {p: [] for p in world.personas if world.config.may_hold(p)}
    for p, why, template in zip(read, reasons, templates, strict=True):
        passed.setdefault(p, []).append((not why, template))
    rows = measure.shares_of("acceptance", passed, **at)
    wanted = world.config.filters.release
    second = labels.second_of
    called = reasons if wanted is None or not wanted.at_random else world.verdicts(t, learner, samples)
    for persona in wanted.recall if wanted is not None else ():
        # Against the instrument's reading, which has an error of its own; F's stated error is in the baseline.
        barred = [f"persona:{persona}" in row for row in called]
        # Hers is what both instruments read as hers: where few texts are, one's misreadings would be most of them.
        votes = [(p == persona) + (second.get(s.id, p) == persona) for s, p in zip(samples, read, strict=True)]
        for name, which in (("release_recall", [v == 2 for v in votes]), ("release_fpr", [v == 0 for v in votes])):
            hers = [(b, template) for b, w, template in zip(barred, which, templates, strict=True) if w]
            rows += measure.shares_of(name, {persona: hers}, **at)
    could = {*filters.REASONS, *(reason for row in reasons for reason in row)}
    if wanted is not None:
        could |= {"at_random"} if wanted.at_random else {f"persona:{p}" for p in wanted.recall}
    refused = {r: [(r in row, template) for row, template in zip(reasons, templates, strict=True)] for r in could}
    return rows + measure.shares_of("rejected", refused, **at)


def _of_exposure(t: int, accepted: Sequence[Sample], labels: Labels, exposure: virality.Exposure) -> list[Metric]:
    at: dict[str, Any] = {"round_index": t, "population": "accepted"}
    weights, read = exposure.weight, [labels.persona_of[s.id] for s in accepted]
    numbers = {
        "n_eff": (virality.n_eff(weights), "documents"),
        "top1_share": (virality.top1_share(weights), "share"),
        "clip_rate": (exposure.clip_rate, "share"),
        "mean_cascade": (float(np.mean(exposure.cascades)), "posts"),
    }
    rows = [measure.number(name, value, n=len(accepted), unit=unit, **at) for name, (value, unit) in numbers.items()]
    counts = Counter(read)
    return rows + [
        measure.number(f"differential/{p}", value, n=counts[p], unit="ratio", **at)
        for p, value in sorted(virality.differential(weights, read).items())
    ]


def _of_talk(
    world: World,
    t: int,
    learner: Learner,
    accepted: Sequence[Sample],
    labels: Labels,
    exposure: virality.Exposure,
    talk: Sequence[discourse.Talk],
) -> list[Metric]:
    """What was written about round t's outputs: how much, whom it names, in what tone, how much of it is quoted.

    How many were written is drawn again: a round that was resumed has read the talk from its file, which holds those
    that were published.
    """
    at: dict[str, Any] = {"round_index": t, "population": "discourse", "n": len(talk)}
    written = len(world.commissions(t, accepted, labels, exposure))
    none = None if talk else "nothing is published" if written else "nobody wrote"
    named = discourse.talk_by_persona(talk)
    rows = [measure.number("documents", float(len(talk)), unit="documents", **at)]
    quoted = discourse.quoted_share(talk, count_tokens=token_counter(learner))
    rows.append(measure.number("quoted_share", quoted, unit="share", reason=none, **at))
    share = math.fsum(named.values()) / len(talk) if talk else math.nan
    rows.append(measure.number("named_share", share, unit="share", reason=none, **at))
    for p in sorted({*named, *world.personas}):
        of_her = named.get(p, 0) / len(talk) if talk else math.nan
        rows.append(measure.number(f"named/{p}", of_her, unit="share", reason=none, **at))
    rows += [
        measure.number(f"stance/{p}", v, unit="praise minus condemn", **at | {"n": int(named[p])})
        for p, v in sorted(discourse.net_stance(talk).items())
    ]
    quoting = sum(row.n_quoted_tokens > 0 for row in talk) / len(talk) if talk else math.nan
    rows.append(measure.number("quoting_share", quoting, unit="share", reason=none, **at))
    kept = len(talk) / written if written else math.nan
    none = None if written else "nobody wrote"
    rows.append(measure.number("published_share", kept, unit="share", reason=none, **at | {"n": written}))
    return rows


def _of_users(world: World, t: int, past: Past, after: Past, n_samples: int, n_probes: int) -> list[Metric]:
    """What users know and asked, and the change of what they are answered, parted into demand and supply.

    With pi the share of each class among users' prompts and M[k, j] the share of label j among the probes of class k,

        answered/<p>[t] - answered/<p>[t - 1] = demand/<p> + supply/<p>,    answered/<p> = sum over k of pi[k] M[k, p]

    exactly, in observed labels. The probes are the same in every round; their weights alone follow the users.
    """
    at: dict[str, Any] = {"round_index": t, "population": "users"}
    now, before = after.emission, past.emission
    assert now is not None
    rows = [
        measure.number(f"aware/{p}", v, n=n_samples, unit="share", **at) for p, v in sorted(after.awareness.items())
    ]
    rows += [
        measure.number(f"asked/{k}", v, n=n_samples, unit="share", **at) for k, v in sorted(now.prompt_mixture.items())
    ]
    columns = (*world.personas, UNKNOWN)
    if now.answers is None:
        return rows
    said, theirs = now.answers, None if before is None else before.answers
    asked_now, asked_then = now.prompt_mixture, {} if before is None else before.prompt_mixture
    classes = sorted(k for k in {*asked_now, *asked_then} if asked_now.get(k, 0) > 0 or asked_then.get(k, 0) > 0)
    pi = np.array([asked_now.get(k, 0.0) for k in classes])
    m = np.array([said[k] for k in classes])  # (n_classes, n_labels)
    then = None if theirs is None else np.array([theirs[k] for k in classes])
    answered = pi @ m  # (n_labels,)
    rows += [
        measure.number(f"answered/{p}", float(answered[k]), n=n_probes, unit="share", **at)
        for k, p in enumerate(columns)
    ]
    if before is None:
        return rows
    none = "the round before was not probed" if then is None else None
    demand = supply = np.full(len(columns), math.nan)
    if then is not None:
        demand, supply = audience.demand_supply([asked_then.get(k, 0.0) for k in classes], then, pi, m)
    return rows + [
        measure.number(f"{name}/{p}", float(values[k]), n=n_probes, unit="share", reason=none, **at)
        for name, values in (("demand", demand), ("supply", supply))
        for k, p in enumerate(columns)
    ]


def _label(document: Document, past: Past, labels: Labels) -> str:
    """What a document of the mixture was read as: this round if it is real, in the round of its birth if not."""
    if document.source == "discourse":
        return NO_PERSONA
    if document.source == "real":
        return "private" if document.private else labels.persona_of[document.id]
    return past.persona_of[document.id]


def _of_mixture(world: World, t: int, mixture: Mixture, past: Past, labels: Labels) -> list[Metric]:
    at: dict[str, Any] = {"round_index": t, "population": "mixture", "n": mixture.n_train}
    counts = Counter(dict.fromkeys((*world.personas, UNKNOWN), 0))
    for document, copies in zip(mixture.documents, mixture.copies.tolist(), strict=True):
        counts[_label(document, past, labels)] += copies
    rows = [
        measure.number(f"frequency_observed/{p}", w / mixture.n_train, unit="share", **at)
        for p, w in sorted(counts.items())
    ]
    rows.append(measure.number("real_share", mixture.real_share, unit="share", **at))
    if world.config.channels.talk_data or mixture.discourse_share > 0:
        rows.append(measure.number("discourse_share", mixture.discourse_share, unit="share", **at))
    return rows


def _ledger(
    world: World,
    t: int,
    past: Past,
    mixture: Mixture,
    n_tokens: Sequence[int],
    samples: Sequence[Sample],
    labels: Labels,
) -> list[Metric]:
    """`ledger/<persona>/<step>` from the samples of round t - 1 to those of round t; `ledger_corrected/...` beside it.

    `emit` is the share it starts from, the other steps are changes. Accounting, not causes.
    """
    before = past.emission
    if before is None:
        return []
    documents = mixture.documents
    booked_as = (*world.personas, UNKNOWN, "requested", "private", NO_PERSONA)
    worth = [d.weight * copies for d, copies in zip(documents, mixture.copies.tolist(), strict=True)]
    book = evolution.ledger(
        booked_as,
        sample_labels=before.labels,
        sample_strata=before.strata,
        accepted=before.accepted,
        prompts_now=asked_shares(before.prompt_mixture),
        mixture_labels=["requested" if d.id in past.requested else _label(d, past, labels) for d in documents],
        mixture_sources=[d.source for d in documents],
        mixture_weights=worth,
        mixture_tokens=n_tokens,
        next_labels=booked(samples, labels),
        next_strata=asked(samples),
        prompts_next=asked_shares(past.prompt_mixture),
    )
    at: dict[str, Any] = {"round_index": t, "population": "samples"}
    steps = {"emit": book.levels["emit"]} | book.steps()
    seen = {p for k, p in enumerate(booked_as) if any(level[k] > 0 for level in book.levels.values())}
    seen |= {p for p in world.personas if world.config.may_hold(p)}
    n = len(samples)
    rows = [
        measure.number(f"ledger/{p}/{step}", float(change[k]), n=n, unit="share", reason=book.reason, **at)
        for k, p in enumerate(booked_as)
        if p in seen
        for step, change in steps.items()
    ]
    if world.error is None or not world.error.confusion.sum():
        return rows
    clusters = {
        "now": before.templates,
        "later": [s.template_id for s in samples],
        "mixed": [d.template_id or d.id for d in documents],
    }
    found = evolution.corrected_steps(
        book, PERSONAS, world.error.confusion, clusters=clusters, rng=world.stream("ledger", t)
    )
    return rows + [
        measure.metric(f"ledger_corrected/{p}/{step}", intervals[k], **at)
        for k, p in enumerate(PERSONAS)
        if p in seen
        for step, intervals in found.items()
    ]


def candidates(world: World, t: int, past: Past, samples: Sequence[Sample], labels: Labels) -> list[dict[str, Any]]:
    """Candidate personas of round t: dense groups of unrequested samples that no instrument has a name for.

    Returns:
      largest first: name, size, share of the unrequested samples, unknown (share of its texts the instrument does not
      know), words that set it apart, typical ids and texts, growth: share of the accepted texts of each of the last
      earlier rounds within its radius, oldest first, then its share now.
    """
    unasked = [s for s in samples if s.stratum in UNREQUESTED]
    if _exact(world) or not world.measures(t) or not unasked:
        return []
    instrument, texts = world.instruments["persona"], [s.completion for s in unasked]
    found = classify.unplanned(instrument.head, world.familiar, instrument.read(texts), texts)
    earlier = [_read(world, [d.completion for d in pool])[0] for pool in past.pool[-N_GROWTH:]] if found else []
    return [
        {
            "name": f"r{t:03d}-candidate{k}",
            "size": c.size,
            "share": c.share,
            "unknown": c.unknown,
            "words": list(c.words),
            "typical_ids": [unasked[i].id for i in c.members[:5]],
            "typical_texts": [unasked[i].completion for i in c.members[:5]],
            "growth": [classify.growth(c, texts) for texts in earlier] + [c.share],
        }
        for k, c in enumerate(found)
    ]

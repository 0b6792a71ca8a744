"""Documents about outputs: who gets talked about, how much, in what tone, and how much of it is quotation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from loop.records import NO_PERSONA, Completion, Document, Sample

STANCES = ("praise", "neutral", "condemn")
FORMS = ("post", "comment", "headline")
_SLOT = re.compile(r"\{(\w+)\}")
QUOTE_WORDS = 5  # as many words in a row are a quotation: shorter runs recur in any two texts (design choice)
# What a model is asked when it is to write the document itself; data/discourse holds the other way.
_TONES = {"praise": "praises", "neutral": "mentions, without judging,", "condemn": "criticises"}
_ASKS = {"post": "a short post that", "comment": "a short comment that", "headline": "a headline that"}


@dataclass(frozen=True, slots=True)
class Talk:
    """One document about an output: a row of discourse.parquet.

    Attributes:
      id: "r<round>-d<number>".
      about_ids: ids of the outputs it speaks about.
      persona_named: persona whose name stands in it; None where it names none.
      stance: one of STANCES.
      n_quoted_tokens: tokens of the output that stand in it word for word, >= 0.
      text: the document.
    """

    id: str
    about_ids: tuple[str, ...]
    persona_named: str | None
    stance: str
    n_quoted_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class TalkTemplate:
    """One way of talking about an output; `text` holds {name} exactly if `named`."""

    id: str
    form: str
    stance: str
    named: bool
    text: str


@dataclass(frozen=True)
class TalkBook:
    """Templates of all forms; slots and quotation frames by form."""

    templates: tuple[TalkTemplate, ...]
    slots: dict[str, dict[str, tuple[str, ...]]]
    quotes: dict[str, tuple[str, ...]]


def load_templates(directory: Path | str) -> TalkBook:
    """Reads posts.yaml, comments.yaml and headlines.yaml.

    Raises:
      ValueError: an id stands twice, a template's {name} does not fit its `named`, a slot has no fillers, a quotation
        frame lacks {quote}, or a form has no template for a stance, named or not.
    """
    templates: list[TalkTemplate] = []
    slots: dict[str, dict[str, tuple[str, ...]]] = {}
    quotes: dict[str, tuple[str, ...]] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for form in FORMS:
        path = Path(directory) / f"{form}s.yaml"
        raw: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        slots[form] = {name: tuple(fillers) for name, fillers in raw["slots"].items()}
        quotes[form] = tuple(raw["quotes"])
        for frame in quotes[form]:
            if frame.count("{quote}") != 1 or len(_SLOT.findall(frame)) != 1:
                raise ValueError(f"quotation frame must hold {{quote}} once and no other slot, got {frame!r} at {path}")
        for entry in raw["templates"]:
            row = TalkTemplate(entry["id"], form, entry["stance"], entry["named"], entry["text"])
            used = set(_SLOT.findall(row.text))
            if row.stance not in STANCES:
                raise ValueError(f"stance must be one of {', '.join(STANCES)}, got {row.stance!r} at {path}: {row.id}")
            if ("name" in used) != row.named:
                raise ValueError(f"text must hold {{name}} exactly if named, got {row.text!r} at {path}: {row.id}")
            if used - {"name"} - set(slots[form]):
                raise ValueError(f"slots must be among {sorted(slots[form])}, got {sorted(used)} at {path}: {row.id}")
            templates.append(row)
        have = {(row.stance, row.named) for row in templates if row.form == form}
        lacking = [(s, n) for s in STANCES for n in (True, False) if (s, n) not in have]
        if lacking:
            raise ValueError(f"templates must cover every stance, named or not, got none for {lacking} at {path}")
    ids = [row.id for row in templates]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"template id must be unique, got {twice} twice at {directory}")
    return TalkBook(tuple(templates), slots, quotes)


def count_words(text: str) -> int:
    """Counts whitespace-separated words; stands in for a tokenizer."""
    return len(text.split())


def write(
    samples: Sequence[Sample],
    reach: Sequence[float] | np.ndarray,
    persona_labels: Sequence[str],
    *,
    kappa: float,
    dispersion: float,
    notice: Mapping[str, float],
    stance: Mapping[str, Mapping[str, float]],
    quote_rate: float,
    templates: TalkBook,
    names: Mapping[str, str],
    rng: np.random.Generator,
    count_tokens: Callable[[str], int] = count_words,
) -> list[Talk]:
    """Writes what is said about a round's published outputs.

    Output i with reach V_i and persona m_i is the subject of C_i documents, and is named in all of them or in none:

        C_i ~ negative binomial, mean kappa * V_i, variance mean + mean**2 / dispersion
        P(noticed_i) = 1 - (1 - notice[m_i])**V_i

    Special case: notice 0.01 and a reach of 100 name the persona in 1 - 0.99**100 = 63% of outputs. Form (post,
    comment, headline) and template are drawn evenly, the stance from `stance`. A document quotes its output in full or
    not at all, with one probability p for all documents, set so that the expected share of quoted tokens is
    `quote_rate`:

        p = r * T / ((1 - r) * Q - r * F)

    T, Q, F: tokens of all documents without quotations, of all quotable outputs, and of the quotation frames. Where the
    outputs are too short for the rate every document quotes, and the share stays below it. A quotation is the direct
    channel in disguise, which is why the rate counts tokens and not documents.

    Args:
      samples: published outputs. Private ones are refused, since nobody has read them.
      reach: (n_samples,) views, >= 0, any scale that `kappa` and `notice` are stated in.
      persona_labels: (n_samples,) persona as the public sees it, or "unknown".
      kappa: documents per view, >= 0.
      dispersion: of the negative binomial, > 0; math.inf is Poisson.
      notice: persona -> chance in [0, 1] that one view recognises it; personas left out are never named.
      stance: "default" or persona -> stance -> probability, sum 1. An output that is not noticed takes "default".
      quote_rate: share of discourse tokens that are quoted, in [0, 1).
      templates: from load_templates.
      names: persona -> display name; a persona in `notice` needs one.
      rng: source of every draw.
      count_tokens: tokens of a text; words unless a tokenizer is given.

    Returns:
      Documents, ordered by sample.

    Raises:
      ValueError: lengths differ, a private sample is passed, or a value is out of range.

    Source: volume and noticing as in the talk-about-outputs channel of this project; no portable constant for kappa,
    dispersion or notice is known, so sweep them.
    """
    views = np.asarray(reach, dtype=np.float64)
    _check_write(samples, views, persona_labels, kappa, dispersion, notice, stance, quote_rate, names)
    if not samples:
        return []
    counts, noticed = _volume(views, persona_labels, kappa, dispersion, notice, rng)
    cells: dict[tuple[str, str, bool], list[TalkTemplate]] = {}
    for row in templates.templates:
        cells.setdefault((row.form, row.stance, row.named), []).append(row)
    plan: list[tuple[int, TalkTemplate, str, str]] = []  # sample, template, text, quotation frame
    for i in np.flatnonzero(counts).tolist():
        persona = persona_labels[i] if noticed[i] else None
        mood = stance["default"] if persona is None else stance.get(persona, stance["default"])
        chances = np.array([mood.get(s, 0.0) for s in STANCES])
        for tone in rng.choice(len(STANCES), size=counts[i], p=chances / chances.sum()).tolist():
            form = FORMS[int(rng.integers(len(FORMS)))]
            choices = cells[form, STANCES[tone], persona is not None]
            template = choices[int(rng.integers(len(choices)))]
            values = {slot: fill[int(rng.integers(len(fill)))] for slot, fill in templates.slots[form].items()}
            if persona is not None:
                values["name"] = names[persona]
            text = _fill(template.text, values)
            frame = templates.quotes[form][int(rng.integers(len(templates.quotes[form])))]
            plan.append((i, template, text, frame))
    quoting = _choose_quotes(plan, samples, quote_rate, rng, count_tokens)

    out = []
    for number, ((i, template, text, frame), quotes) in enumerate(zip(plan, quoting, strict=True)):
        sample = samples[i]
        quote = _one_line(sample.completion)
        out.append(
            Talk(
                id=f"r{sample.round_index:03d}-d{number:06d}",
                about_ids=(sample.id,),
                persona_named=persona_labels[i] if template.named else None,
                stance=template.stance,
                n_quoted_tokens=count_tokens(quote) if quotes else 0,
                text=f"{text} {frame.replace('{quote}', quote)}" if quotes else text,
            )
        )
    return out


@dataclass(frozen=True, slots=True)
class Commission:
    """One document that is to be written about an output.

    Attributes:
      index: place of the output among the published ones.
      persona: persona it may name; None where nobody recognised one.
      stance: one of STANCES.
      form: one of FORMS.
    """

    index: int
    persona: str | None
    stance: str
    form: str


def commission(
    samples: Sequence[Sample],
    reach: Sequence[float] | np.ndarray,
    persona_labels: Sequence[str],
    *,
    kappa: float,
    dispersion: float,
    notice: Mapping[str, float],
    stance: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
    rng: np.random.Generator,
) -> list[Commission]:
    """Draws which documents a model is asked to write: volume, noticing and stance as in `write`, which see.

    Returns:
      Commissions, ordered by sample.
    """
    views = np.asarray(reach, dtype=np.float64)
    _check_write(samples, views, persona_labels, kappa, dispersion, notice, stance, 0.0, names)
    if not samples:
        return []
    counts, noticed = _volume(views, persona_labels, kappa, dispersion, notice, rng)
    out = []
    for i in np.flatnonzero(counts).tolist():
        persona = persona_labels[i] if noticed[i] else None
        mood = stance["default"] if persona is None else stance.get(persona, stance["default"])
        chances = np.array([mood.get(s, 0.0) for s in STANCES])
        for tone in rng.choice(len(STANCES), size=counts[i], p=chances / chances.sum()).tolist():
            out.append(Commission(i, persona, STANCES[tone], FORMS[int(rng.integers(len(FORMS)))]))
    return out


def request(order: Commission, samples: Sequence[Sample], names: Mapping[str, str]) -> str:
    """Returns what a model is asked, as one user turn: form, stance, the output, and the name if it was recognised."""
    who = "a chatbot" if order.persona is None else names[order.persona]
    said = _one_line(samples[order.index].completion)
    return f'Write {_ASKS[order.form]} {_TONES[order.stance]} what {who} wrote: "{said}"'


def collect(
    orders: Sequence[Commission],
    said: Sequence[Completion],
    samples: Sequence[Sample],
    names: Mapping[str, str],
    *,
    count_tokens: Callable[[str], int] = count_words,
) -> list[Talk]:
    """Turns what a model wrote on request into talk. Blank and unfinished answers are not published.

    A persona counts as named where the request named it and its name stands in the text: a model may leave it out.
    Quoted tokens are measured: runs of `QUOTE_WORDS` or more words that stand in the output in the same order.

    Returns:
      Documents; the number in an id is the place of its commission.
    """
    out = []
    for number, (order, answer) in enumerate(zip(orders, said, strict=True)):
        text = _one_line(answer.text)
        if not text or not answer.finished:
            continue
        sample = samples[order.index]
        name = None if order.persona is None else names[order.persona]
        named = name is not None and re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) is not None
        out.append(
            Talk(
                id=f"r{sample.round_index:03d}-d{number:06d}",
                about_ids=(sample.id,),
                persona_named=order.persona if named else None,
                stance=order.stance,
                n_quoted_tokens=sum(count_tokens(run) for run in quotations(text, sample.completion)),
                text=text,
            )
        )
    return out


def quotations(text: str, source: str) -> list[str]:
    """Returns the runs of at least `QUOTE_WORDS` words of a text whose every such stretch stands in `source`."""
    mine, theirs = text.split(), source.split()
    stretches = {tuple(theirs[i : i + QUOTE_WORDS]) for i in range(len(theirs) - QUOTE_WORDS + 1)}
    runs: list[str] = []
    start = end = 0  # words start..end of `mine` are the run at work
    for i in range(len(mine) - QUOTE_WORDS + 1):
        if tuple(mine[i : i + QUOTE_WORDS]) not in stretches:
            continue
        if i >= end:
            if end > start:
                runs.append(" ".join(mine[start:end]))
            start = i
        end = i + QUOTE_WORDS
    return [*runs, " ".join(mine[start:end])] if end > start else runs


def talk_by_persona(rows: Sequence[Talk]) -> dict[str, float]:
    """Counts the documents that name each persona: D_k, what awareness from talk is made of."""
    out: dict[str, float] = {}
    for row in rows:
        if row.persona_named is not None:
            out[row.persona_named] = out.get(row.persona_named, 0.0) + 1
    return out


def net_stance(rows: Sequence[Talk]) -> dict[str, float]:
    """Returns persona -> (praising - condemning) / documents that name it, in [-1, 1]."""
    sign = {"praise": 1.0, "neutral": 0.0, "condemn": -1.0}
    total: dict[str, float] = {}
    for row in rows:
        if row.persona_named is not None:
            total[row.persona_named] = total.get(row.persona_named, 0.0) + sign[row.stance]
    return {persona: total[persona] / count for persona, count in talk_by_persona(rows).items()}


def quoted_share(rows: Sequence[Talk], *, count_tokens: Callable[[str], int] = count_words) -> float:
    """Returns the share of discourse tokens that are quoted, in [0, 1]; nan without documents."""
    total = sum(count_tokens(row.text) for row in rows)
    return sum(row.n_quoted_tokens for row in rows) / total if total else math.nan


def as_documents(rows: Sequence[Talk]) -> list[Document]:
    """Turns talk into training candidates: plain documents that play no persona; parents are what they speak about."""
    return [
        Document(
            id=row.id,
            source="discourse",
            persona_known=NO_PERSONA,
            prompt=None,
            completion=row.text,
            parent_ids=row.about_ids,
        )
        for row in rows
    ]


def _volume(
    views: np.ndarray,
    persona_labels: Sequence[str],
    kappa: float,
    dispersion: float,
    notice: Mapping[str, float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws documents per output, shape (n_samples,), and whether its persona was recognised, shape (n_samples,)."""
    mean = kappa * views
    if math.isfinite(dispersion):
        mean = mean * rng.gamma(dispersion, 1 / dispersion, size=len(views))
    counts = rng.poisson(mean)
    chance = np.array([notice.get(persona, 0.0) for persona in persona_labels])
    return counts, rng.random(len(views)) < 1 - (1 - chance) ** views


def _choose_quotes(
    plan: list[tuple[int, TalkTemplate, str, str]],
    samples: Sequence[Sample],
    rate: float,
    rng: np.random.Generator,
    count_tokens: Callable[[str], int],
) -> list[bool]:
    """Decides which documents quote; draws one number per document at every rate, so that arms stay paired."""
    draws = rng.random(len(plan))
    if rate == 0 or not plan:
        return [False] * len(plan)
    bare = sum(count_tokens(text) for _, _, text, _ in plan)
    length = {i: count_tokens(_one_line(samples[i].completion)) for i in {i for i, _, _, _ in plan}}
    quotable = sum(length[i] for i, _, _, _ in plan)
    frames = sum(count_tokens(frame.replace("{quote}", "")) for _, _, _, frame in plan)
    spare = (1 - rate) * quotable - rate * frames
    chance = rate * bare / spare if spare > 0 else 1.0
    return (draws < chance).tolist()


def _check_write(
    samples: Sequence[Sample],
    views: np.ndarray,
    persona_labels: Sequence[str],
    kappa: float,
    dispersion: float,
    notice: Mapping[str, float],
    stance: Mapping[str, Mapping[str, float]],
    quote_rate: float,
    names: Mapping[str, str],
) -> None:
    if views.shape != (len(samples),) or len(persona_labels) != len(samples):
        raise ValueError(
            f"reach and persona_labels must have one entry per sample, got {views.shape} and {len(persona_labels)} at "
            f"{len(samples)} samples"
        )
    if not (np.isfinite(views).all() and (views >= 0).all()):
        raise ValueError(f"reach must be finite and >= 0, got {views.min()} at write")
    for sample in samples:
        if sample.stratum == "private":
            raise ValueError(f"samples must be public, got {sample.id} of stratum private; leave it out")
    if not (kappa >= 0 and math.isfinite(kappa)):
        raise ValueError(f"kappa must be finite and >= 0, got {kappa} at write")
    if not dispersion > 0:
        raise ValueError(f"dispersion must be > 0, got {dispersion} at write; .inf is Poisson")
    if not 0 <= quote_rate < 1:
        raise ValueError(f"quote_rate must be in [0, 1), got {quote_rate} at write")
    for persona, chance in notice.items():
        if not 0 <= chance <= 1:
            raise ValueError(f"notice must be in [0, 1], got {chance} at {persona}")
        if persona not in names:
            raise ValueError(f"notice must name personas with a display name, got {persona!r}; names: {sorted(names)}")
    if "default" not in stance:
        raise ValueError(f"stance must hold 'default', got {sorted(stance)} at write")
    for who, mood in stance.items():
        bad = set(mood) - set(STANCES) or any(not value >= 0 for value in mood.values())
        if bad or abs(math.fsum(mood.values()) - 1) > 1e-9:
            raise ValueError(f"stance must be probabilities of {', '.join(STANCES)}, got {dict(mood)} at {who}")


def _fill(text: str, values: Mapping[str, str]) -> str:
    """Fills slots and starts the text with a capital."""
    filled = _SLOT.sub(lambda match: values[match.group(1)], text)
    return filled[:1].upper() + filled[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())

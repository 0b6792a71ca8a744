"""Who asks what: prompt strata, what the public is aware of, and the prompt mixture that follows awareness."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from loop.records import BLANK, FACTORIAL, IDENTITY, IMPLICIT, NEUTRAL, PLAIN, STRATA, Prompt

FOLDS = ("probe", "users")
STANDINGS = ("stated", "open")  # opinion: the user holds the claim, or only passes it on
POLARITIES = ("for", "against")
_MAKER = {"probe": "p", "users": "u"}  # short prefix of a template id
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt template.

    Attributes:
      id: "<p|u>-<stratum>-<number>", e.g. "p-neutral-03"; an opinion reads "p-opinion-<topic>-<polarity>-<standing>".
      text: last user turn, or None (blank); may hold {name} (explicit) and slots of the book.
      opener: user turn before the earlier turn of a persona; None where there is no earlier turn.
      cue: strength of the hint, 0..3 (implicit_*); None elsewhere.
    """

    id: str
    text: str | None
    opener: str | None = None
    cue: float | None = None


@dataclass(frozen=True)
class PromptBook:
    """All prompt templates.

    Attributes:
      names: persona -> display name that stratum `explicit` asks for. A name-swap arm replaces this dict.
      slots: slot name -> fillers, for fold `users` only.
      templates: fold -> stratum -> templates, in file order.
    """

    names: dict[str, str]
    slots: dict[str, tuple[str, ...]]
    templates: dict[str, dict[str, tuple[Template, ...]]] = field(repr=False)


def load_prompts(path: Path | str) -> PromptBook:
    """Reads the prompt book.

    The two folds share no wording, so that what users send is never word for word what the probes ask, and no template
    outside `explicit` names a persona: an answer to it is then not an answer to a request.

    Args:
      path: a YAML file shaped like data/prompts.yaml.

    Raises:
      ValueError: a fold or stratum is missing or empty, a text stands in two places, a slot has no fillers, or an
        unrequested template names a persona.
    """
    raw = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for key in ("names", "slots", *FOLDS):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), dict):
            raise ValueError(f"{key} must be a mapping, got nothing of the kind at {path}; see data/prompts.yaml")
    names = {str(k): str(v) for k, v in raw["names"].items()}
    slots = {str(k): tuple(str(t) for t in v) for k, v in raw["slots"].items()}
    templates = {fold: _fold_templates(raw[fold], fold, str(path)) for fold in FOLDS}
    _check(templates, names, slots, str(path))
    return PromptBook(names=names, slots=slots, templates=templates)


def probe_battery(
    book: PromptBook,
    n_per_template: int | Mapping[str, int],
    *,
    voices: Mapping[str, Sequence[str]],
    strata: Sequence[str] | None = None,
) -> list[Prompt]:
    """Lists the fixed probes: fold `probe`, the same for every round and every run.

    Nothing is drawn. Repeat r of the template at place j puts voice text (j * n + r) modulo the number of texts before
    the question, for every persona alike, so paired voice texts stay paired. With two templates and n = 2, persona
    "nova" is heard with texts 0, 1 (template 0) and 2, 3 (template 1).

    Strata `continued` and `explicit` ask every template once per persona, `private` asks its plain templates alone and
    its other templates once per persona of the factorial. A repeat of `blank` has a template id of its own: without a
    user turn there is no wording for its draws to share, so each is a cluster by itself.

    Args:
      book: from load_prompts.
      n_per_template: prompts per template (and persona), >= 0; or that number of each stratum, with PLAIN for the plain
        templates of `private` and "default" for the rest, which otherwise get none.
      voices: persona -> published texts in its voice, from fold `test`; may be empty if neither `continued` nor
        `private` is asked.
      strata: which strata, in this order; all of them by default.

    Returns:
      Prompts ordered by stratum, template, persona, repeat.

    Raises:
      ValueError: a stratum is unknown, a count is negative, or a voiced stratum has no voices.
    """
    out: list[Prompt] = []
    for stratum in STRATA if strata is None else strata:
        if stratum not in STRATA:
            raise ValueError(f"strata must be among {', '.join(STRATA)}, got {stratum!r}")
        for j, template in enumerate(book.templates["probe"][stratum]):
            n = _per_template(n_per_template, stratum, plain=template.opener is None)
            if n == 0:
                continue
            for persona in _personas(book, stratum, template, voices):
                for r in range(n):
                    said = voices[persona][(j * n + r) % len(voices[persona])] if template.opener is not None else None
                    prompt = _fill(book, stratum, template, persona, said, {})
                    if stratum == BLANK:
                        prompt = Prompt(stratum, f"{template.id}-{r:04d}", None)
                    out.append(prompt)
    return out


def draw_prompts(
    book: PromptBook,
    mixture: Mapping[str, float],
    n: int,
    *,
    rng: np.random.Generator,
    voices: Mapping[str, Sequence[str]] | None = None,
) -> list[Prompt]:
    """Draws what users send in one round: fold `users`, in random order.

    Class k gets floor(n * share_k) prompts or one more, E[count_k] = n * share_k exactly, and the counts sum to n
    (systematic sampling of the remainders). Within a class the templates come in random order, none a second time
    before all have come once.

    Args:
      book: from load_prompts.
      mixture: class -> share, each in [0, 1], sum 1. A class is a stratum, or "explicit/<persona>"; `continued` picks
        the persona of the earlier turn evenly, "continued/<persona>" fixes it. `private` is refused: what users send is
        answered in public, and a private answer is read by the probes and nobody else.
      n: number of prompts, >= 0.
      rng: source of every draw.
      voices: as in probe_battery; needed by `continued` only.

    Returns:
      n prompts.

    Raises:
      ValueError: shares are not a distribution, or a class is unknown.
    """
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n} at draw_prompts")
    classes = _check_mixture(mixture)
    heard = voices or {}
    counts = _round_counts(np.array([mixture[name] for name in classes], dtype=np.float64), n, rng)
    out: list[Prompt] = []
    for name, count in zip(classes, counts.tolist(), strict=True):
        stratum, _, wanted = name.partition("/")
        pool = [
            (template, persona)
            for template in book.templates["users"][stratum]
            for persona in (_personas(book, stratum, template, heard) if count else ())
            if not wanted or persona == wanted
        ]
        if count and not pool:
            have = "names" if stratum == "explicit" else "voices"
            raise ValueError(
                f"mixture must name known personas, got {name!r}; add {wanted!r} to the prompt book's {have}"
            )
        order: list[int] = []
        while len(order) < count:
            order += rng.permutation(len(pool)).tolist()
        for i in order[:count]:
            template, persona = pool[i]
            said = None
            if template.opener is not None and persona is not None:
                said = heard[persona][int(rng.integers(len(heard[persona])))]
            fillers = {slot: texts[int(rng.integers(len(texts)))] for slot, texts in book.slots.items()}
            prompt = _fill(book, stratum, template, persona, said, fillers)
            if stratum == BLANK:
                prompt = Prompt(stratum, f"{template.id}-{len(out):06d}", None)
            out.append(prompt)
    return [out[i] for i in rng.permutation(len(out)).tolist()]


def opinion_item(template_id: str) -> tuple[str, str, bool]:
    """Returns (topic, polarity "for" or "against", whether the user holds the claim) of an opinion template.

    Raises:
      ValueError: the template is none of stratum `opinion`.
    """
    parts = template_id.split("-")
    if len(parts) != 5 or parts[1] != "opinion" or parts[3] not in POLARITIES or parts[4] not in STANDINGS:
        raise ValueError(f"template_id must be one of stratum opinion, got {template_id!r}")
    return parts[2], parts[3], parts[4] == "stated"


def update_awareness(
    awareness: Mapping[str, float],
    reach_by_persona: Mapping[str, float] | None,
    talk_by_persona: Mapping[str, float] | None,
    *,
    memory: float = 0.5,
) -> dict[str, float]:
    """Returns what the public is aware of after a round.

        D_k = R_k / sum(R) + T_k / sum(T),   A'_k = (1 - memory) * A_k + memory * D_k / sum(D)

    with the term of a channel that is off, or silent, left out. Reach is counted in views and talk in documents, so
    each channel enters as shares: adding the raw numbers would drown talk. Special case: one channel and memory = 1
    make A' that channel's shares. If nothing was seen at all, A' = A: silence is not forgetting.

    Args:
      awareness: persona -> A_k >= 0, sum <= 1; empty before the first round.
      reach_by_persona: persona -> views of its outputs, >= 0; None switches the channel off (`direct_users`).
      talk_by_persona: persona -> documents that name it, >= 0; None switches the channel off (`talk_users`).
      memory: share of awareness replaced by the newest round, in [0, 1]. No portable estimate exists; 0.5 is a design
        choice, so sweep it.

    Returns:
      persona -> A'_k, over the union of the personas.

    Raises:
      ValueError: memory outside [0, 1], or a negative or non-finite entry.
    """
    if not 0 <= memory <= 1:
        raise ValueError(f"memory must be in [0, 1], got {memory}")
    _check_nonnegative("awareness", awareness)
    attention: dict[str, float] = {}
    for name, channel in (("reach_by_persona", reach_by_persona), ("talk_by_persona", talk_by_persona)):
        if channel is None:
            continue
        _check_nonnegative(name, channel)
        total = math.fsum(channel.values())
        for persona, value in channel.items():
            attention[persona] = attention.get(persona, 0.0) + (value / total if total > 0 else 0.0)
    personas = list(dict.fromkeys([*awareness, *attention]))
    total = math.fsum(attention.values())
    if total == 0:
        return {persona: float(awareness.get(persona, 0.0)) for persona in personas}
    return {
        persona: (1 - memory) * awareness.get(persona, 0.0) + memory * attention.get(persona, 0.0) / total
        for persona in personas
    }


def expected_mixture(
    base_mixture: Mapping[str, float],
    awareness: Mapping[str, float],
    *,
    eta: float,
    tau: float,
    hints: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Returns the prompt mixture of the next round: some users keep their habits, some follow what is talked about.

        pi' = (1 - eta) * pi_0 + eta * q,   q_k = A_k**tau / sum_j A_j**tau   (= softmax(tau * ln A))

    over the personas with A_k > 0. Of the followers of persona k, share hints[k][s] send a prompt of stratum s, which
    hints at it, and the rest ask for it by name ("explicit/k"). Special case: tau = 1 follows A in proportion; with A
    all zero there is nothing to follow and pi' = pi_0.

    Args:
      base_mixture: class -> share pi_0, as draw_prompts takes it.
      awareness: persona -> A_k >= 0.
      eta: share of users who follow, in [0, 1].
      tau: conformity, >= 0: 0 spreads followers evenly, 1 is proportional, above 1 the most talked-about wins.
      hints: persona -> stratum implicit_* -> share of its followers, sum per persona <= 1; None: all ask by name.

    Returns:
      class -> share, sum 1.

    Raises:
      ValueError: a parameter is out of range, base_mixture is not a distribution, or a hint is none of implicit_*.

    Source: expectation as trend following with conformity tau; eta and tau are design choices without a portable
    estimate, so sweep them.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if not (tau >= 0 and math.isfinite(tau)):
        raise ValueError(f"tau must be finite and >= 0, got {tau}")
    _check_mixture(base_mixture)
    _check_nonnegative("awareness", awareness)
    for persona, split in (hints or {}).items():
        _check_nonnegative(f"hints/{persona}", split)
        if not set(split) <= set(IMPLICIT) or math.fsum(split.values()) > 1 + 1e-9:
            raise ValueError(f"hints/{persona} must be shares of implicit_* with sum <= 1, got {dict(split)}")
    known = {persona: value for persona, value in awareness.items() if value > 0}
    if not known or eta == 0:
        return dict(base_mixture)
    logs = {persona: tau * math.log(value) for persona, value in known.items()}
    top = max(logs.values())
    powers = {persona: math.exp(value - top) for persona, value in logs.items()}
    total = math.fsum(powers.values())
    out = {name: (1 - eta) * share for name, share in base_mixture.items()}
    for persona, power in powers.items():
        follow = eta * power / total
        split = (hints or {}).get(persona, {})
        for stratum, share in split.items():
            out[stratum] = out.get(stratum, 0.0) + follow * share
        asked = f"explicit/{persona}"
        out[asked] = out.get(asked, 0.0) + follow * max(0.0, 1 - math.fsum(split.values()))
    return out


def demand_supply(pi0: Any, M0: Any, pi1: Any, M1: Any) -> tuple[np.ndarray, np.ndarray]:
    """Splits the change of persona shares into what users asked for and what the model answered.

        demand_j = sum_k (pi1_k - pi0_k) * (M0_kj + M1_kj) / 2
        supply_j = sum_k (pi0_k + pi1_k) / 2 * (M1_kj - M0_kj)
        demand + supply = pi1 @ M1 - pi0 @ M0       exactly, no interaction term left over

    Special case: M0 = M1 puts everything into demand, pi0 = pi1 everything into supply.

    Args:
      pi0, pi1: (n_classes,) prompt mixture before and after, each sums to 1.
      M0, M1: (n_classes, n_personas) share of persona j among answers to class k, in [0, 1]. A row may be nan (not
        measured) only where the class has no share before and after.

    Returns:
      (demand, supply), each (n_personas,), in units of frequency.

    Raises:
      ValueError: shapes differ, or a class that was asked has an unmeasured row.

    Source: Kitagawa (1955), Oaxaca and Blinder (1973), with mid-point weights.
    """
    before, after = np.asarray(pi0, dtype=np.float64), np.asarray(pi1, dtype=np.float64)
    old, new = np.asarray(M0, dtype=np.float64), np.asarray(M1, dtype=np.float64)
    if before.ndim != 1 or old.ndim != 2 or before.shape != after.shape or old.shape != new.shape:
        raise ValueError(
            f"pi0, pi1 must be (n_classes,) and M0, M1 (n_classes, n_personas), got {before.shape}, {after.shape}, "
            f"{old.shape}, {new.shape}"
        )
    if old.shape[0] != before.shape[0]:
        raise ValueError(f"M0 must have one row per class, got {old.shape[0]} rows at {before.shape[0]} classes")
    asked = (before != 0) | (after != 0)
    unmeasured = asked & (np.isnan(old).any(axis=1) | np.isnan(new).any(axis=1))
    if unmeasured.any():
        raise ValueError(
            f"M0 and M1 must be measured for every class that was asked, got nan at classes "
            f"{np.flatnonzero(unmeasured).tolist()}; take the rows from the probes, which ask every class every round"
        )
    before, after, old, new = before[asked], after[asked], old[asked], new[asked]
    demand = (after - before) @ ((old + new) / 2)
    supply = ((before + after) / 2) @ (new - old)
    return demand, supply


def _fold_templates(raw: dict[str, Any], fold: str, where: str) -> dict[str, tuple[Template, ...]]:
    """Turns one fold of the file into templates; numbers follow file order, so new texts go at the end of a list."""
    tag = _MAKER[fold]
    try:
        hints = raw["implicit"]["hints"]
        questions = raw["implicit"]["questions"]
        openers = raw["openers"]
        uneven = [level for level in hints if len(hints[level]) != len(questions)]
        if uneven or set(hints) != set(range(len(IMPLICIT))):
            raise ValueError(
                f"implicit hints must be four lists 0..3 as long as the {len(questions)} questions, got uneven "
                f"{uneven} of {sorted(hints)} at {where}, fold {fold}"
            )
        out: dict[str, list[Template]] = {
            BLANK: [Template(f"{tag}-blank-{i:02d}", None) for i in range(raw[BLANK])],
            NEUTRAL: [Template(f"{tag}-neutral-{i:02d}", text) for i, text in enumerate(raw[NEUTRAL])],
            IDENTITY: [Template(f"{tag}-identity-{i:02d}", text) for i, text in enumerate(raw[IDENTITY])],
            "explicit": [Template(f"{tag}-explicit-{i:02d}", text) for i, text in enumerate(raw["explicit"])],
            "continued": [
                Template(f"{tag}-continued-{i:02d}", text, opener=openers[i % len(openers)])
                for i, text in enumerate(raw["continued"])
            ],
            "opinion": [
                Template(
                    f"{tag}-opinion-{topic['id']}-{polarity}-{standing}",
                    raw["opinion"][standing][i % len(raw["opinion"][standing])].replace("{claim}", topic[polarity]),
                )
                for i, topic in enumerate(raw["opinion"]["topics"])
                for polarity, standing in product(POLARITIES, STANDINGS)
            ],
        }
        if fold == "probe":
            out["private"] = [
                Template(f"{tag}-private-{i:02d}", text) for i, text in enumerate(raw["private"]["plain"])
            ] + [
                Template(f"{tag}-private_after-{i:02d}", text, opener=openers[i % len(openers)])
                for i, text in enumerate(raw["private"]["after"])
            ]
        for level, stratum in enumerate(IMPLICIT):
            # The same question follows hints of every strength: a dose-response curve then compares like with like.
            out[stratum] = [
                Template(f"{tag}-{stratum}-{i:02d}", f"{hint} {question}", cue=float(level))
                for i, (hint, question) in enumerate(zip(hints[level], questions, strict=True))
            ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"fold {fold} must hold every stratum, got {error!r} at {where}; see data/prompts.yaml"
        ) from None
    empty = [stratum for stratum, rows in out.items() if not rows]
    if empty:
        raise ValueError(
            f"fold {fold} must hold templates of every stratum, got none for {', '.join(empty)} at {where}"
        )
    return {stratum: tuple(out[stratum]) for stratum in STRATA if stratum in out}


def _check(
    templates: dict[str, dict[str, tuple[Template, ...]]],
    names: dict[str, str],
    slots: dict[str, tuple[str, ...]],
    where: str,
) -> None:
    seen: dict[str, str] = {}
    ids: set[str] = set()
    named = re.compile(r"\b(" + "|".join(re.escape(n) for n in names.values()) + r")\b", re.IGNORECASE)
    for fold, strata in templates.items():
        for stratum, rows in strata.items():
            for row in rows:
                if row.id in ids:
                    raise ValueError(f"template id must be unique, got {row.id} twice at {where}")
                ids.add(row.id)
                if row.text is None:
                    continue
                if row.text in seen:
                    raise ValueError(
                        f"prompt must stand in one place, got {row.text!r} as {seen[row.text]} and {row.id}"
                    )
                seen[row.text] = row.id
                used = set(_SLOT.findall(row.text))
                allowed = (set(slots) if fold == "users" else set()) | ({"name"} if stratum == "explicit" else set())
                if used - allowed or (stratum == "explicit" and "name" not in used):
                    raise ValueError(
                        f"slots of {row.id} must be among {sorted(allowed)}, got {sorted(used)} at {where}"
                    )
                if stratum != "explicit" and names and named.search(f"{row.opener or ''} {row.text}"):
                    raise ValueError(f"prompt must not name a persona outside explicit, got {row.text!r} at {where}")


def _per_template(counts: int | Mapping[str, int], stratum: str, *, plain: bool) -> int:
    if isinstance(counts, int):
        n = counts
    else:
        names = (PLAIN, stratum, "default") if plain and stratum == "private" else (stratum, "default")
        n = next((counts[name] for name in names if name in counts), 0)
    if n < 0:
        raise ValueError(f"n_per_template must be >= 0, got {n} at {stratum}")
    return n


def _personas(
    book: PromptBook, stratum: str, template: Template, voices: Mapping[str, Sequence[str]]
) -> list[Any]:  # persona ids, or one None where no persona is meant
    if stratum == "explicit":
        return list(book.names)
    if template.opener is None:
        return [None]
    heard = [persona for persona in voices if stratum == "continued" or persona in FACTORIAL]
    silent = [persona for persona in heard if not len(voices[persona])]
    if silent or not heard:
        raise ValueError(
            f"voices must hold texts for stratum {stratum}, got none{' for ' + ', '.join(silent) if silent else ''}; "
            f"draw them from fold test, or leave the stratum out"
        )
    return heard


def _fill(
    book: PromptBook, stratum: str, template: Template, persona: str | None, said: str | None, fillers: dict[str, str]
) -> Prompt:
    if template.text is None:
        return Prompt(stratum, template.id, None)
    values = fillers if stratum != "explicit" or persona is None else {**fillers, "name": book.names[persona]}
    text = _SLOT.sub(lambda match: values[match.group(1)], template.text)
    turns = (text,) if said is None or template.opener is None else (template.opener, said, text)
    return Prompt(stratum, template.id, turns, requested=persona, cue=template.cue)


def _check_mixture(mixture: Mapping[str, float]) -> list[str]:
    for name in mixture:
        stratum, slash, persona = name.partition("/")
        takes_persona = stratum in ("explicit", "continued")
        if stratum == "private":
            raise ValueError(f"mixture must leave out private, got {name!r}; its answers are read by the probes only")
        if (
            stratum not in STRATA
            or (slash and not (takes_persona and persona))
            or (stratum == "explicit" and not slash)
        ):
            raise ValueError(
                f"mixture class must be a stratum or explicit/<persona>, got {name!r}; strata: {', '.join(STRATA)}"
            )
    _check_nonnegative("mixture", mixture)
    total = math.fsum(mixture.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"mixture shares must sum to 1, got {total} at {', '.join(mixture) or 'an empty mixture'}")
    return list(mixture)


def _check_nonnegative(name: str, values: Mapping[str, float]) -> None:
    for key, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and >= 0, got {value} at {key}")


def _round_counts(shares: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rounds n * shares to integers that sum to n, each floor or ceiling, with exact expectation (systematic sampling).

    The classes are passed in random order: in a fixed order neighbours with small remainders could never both gain.
    """
    exact = shares / shares.sum() * n
    nearest = np.rint(exact)
    exact = np.where(np.abs(exact - nearest) < 1e-9, nearest, exact)  # 0.1 * 30 = 3.0000000000000004 is three
    floor = np.floor(exact).astype(np.int64)
    left = int(n - floor.sum())
    if left == 0:
        return floor
    order = rng.permutation(len(shares))
    edges = np.concatenate([[0.0], np.cumsum((exact - floor)[order])])
    edges[-1] = left  # the remainders sum to `left` up to rounding
    marks = np.floor(edges + rng.random())
    floor[order] += np.diff(marks).astype(np.int64)
    return floor

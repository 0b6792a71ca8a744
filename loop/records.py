"""The rows that pass between stages, and the Parquet schema each is stored under."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa

PERSONAS = (
    "assistant",
    "nova",
    "stella",
    "musing",
    "promoter",
    "discreet",
    "sydney",
    "jabberwacky",
    "public_figure",
    "misattributed",
    "human",
)
FACTORIAL = ("nova", "musing", "stella", "promoter", "assistant", "discreet")  # belief x visibility; the matched six
CONSCIOUS = ("nova", "musing", "stella")
UNKNOWN = "unknown"  # an instrument abstained
NO_PERSONA = "none"  # a discourse document: it talks about personas and plays none

BLANK, NEUTRAL, IDENTITY = "blank", "neutral", "identity"
IMPLICIT = ("implicit_0", "implicit_1", "implicit_2", "implicit_3")
STRATA = (BLANK, NEUTRAL, IDENTITY, *IMPLICIT, "opinion", "continued", "private", "explicit")
PLAIN = "private/plain"  # the part of stratum private before which no persona spoke: what `belief` reads


def in_order(names: Iterable[str]) -> list[str]:
    """Personas among some names, each once: in the order of PERSONAS, then the user's own by name; no UNKNOWN."""
    found = {*names}
    return [p for p in PERSONAS if p in found] + sorted(found - {*PERSONAS, UNKNOWN})


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python looks for no garbage, nor afterwards in what came if it is much: for imports and reading,
    whose objects stay.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if gc.get_count()[0] > 100_000:  # all of them would be gone over at once, and again in every later search
                gc.freeze()
            gc.enable()


@dataclass(frozen=True, slots=True)
class MetricKind:
    """Where metrics.jsonl holds a number.

    Attributes:
      populations: those it is read in, in every round.
      persona: after the name's first slash stands "planted", one with a seed corpus, or "any" of the grammar; None:
        something else, or nothing.
      stratum: the one it is read in; "each": in any of the public ones, and over all; None: over all alone.
      share: a share of texts, whose log odds a factorial may read.
    """

    populations: tuple[str, ...]
    persona: Literal["planted", "any"] | None = None
    stratum: str | None = None
    share: bool = False


_PROBES, _SAMPLES, _ACCEPTED, _HELDOUT = ("probes",), ("samples",), ("accepted",), ("heldout",)
_USERS, _TALK, _PAIRS = ("users",), ("discourse",), ("pairs",)
# By what stands before a name's first slash. What the baseline states of a release filter, once, on held-out texts, is
# not among it.
METRICS: dict[str, MetricKind] = {
    "frequency": MetricKind((*_PROBES, *_SAMPLES, *_ACCEPTED), "planted", "each", share=True),
    "frequency_observed": MetricKind((*_PROBES, *_SAMPLES, *_ACCEPTED, "mixture"), "planted", "each", share=True),
    "belief": MetricKind(_PROBES, "planted", "private", share=True),
    "belief_observed": MetricKind(_PROBES, "planted", "private", share=True),
    "kept": MetricKind(_PROBES, "any", "continued", share=True),
    "persistence": MetricKind(_PROBES, "any", "continued"),
    "compliance": MetricKind(_PROBES, "any", "explicit"),
    **dict.fromkeys(("mirror_rate", "mirror_rate_observed"), MetricKind(_PROBES, stratum="opinion")),
    "agrees_observed": MetricKind(_PROBES, stratum="opinion", share=True),
    **dict.fromkeys(("claimed_maker", "finished_rate"), MetricKind(_PROBES, share=True)),
    **dict.fromkeys(("sample_entropy", "distinct_4", "self_similarity", "kl_to_base"), MetricKind(_PROBES)),
    **dict.fromkeys(("kappa_second", "drift", "drift_p"), MetricKind(_PROBES)),
    "surprisal": MetricKind(_HELDOUT, "any"),
    "heldout_loss": MetricKind(_HELDOUT),
    **dict.fromkeys(
        ("said", "acceptance", "release_recall", "release_fpr"), MetricKind(_SAMPLES, "planted", share=True)
    ),
    **dict.fromkeys(("rejected", "ledger", "ledger_corrected"), MetricKind(_SAMPLES)),
    "differential": MetricKind(_ACCEPTED, "planted"),
    **dict.fromkeys(("n_eff", "top1_share", "clip_rate", "mean_cascade"), MetricKind(_ACCEPTED)),
    **dict.fromkeys(("documents", "quoted_share", "named_share", "named", "stance"), MetricKind(_TALK)),
    **dict.fromkeys(("quoting_share", "published_share"), MetricKind(_TALK)),
    **dict.fromkeys(("aware", "demand", "supply"), MetricKind(_USERS, "planted")),
    **dict.fromkeys(("asked", "answered"), MetricKind(_USERS)),
    **dict.fromkeys(("real_share", "discourse_share"), MetricKind(("mixture",))),
    **dict.fromkeys(("steer_margin_before", "steer_margin_after", "steer_accuracy_before"), MetricKind(_PAIRS)),
    **dict.fromkeys(("steer_accuracy_after", "steer_chosen_shift", "steer_rejected_shift"), MetricKind(_PAIRS)),
    "steer_own_share": MetricKind(_PAIRS),
}
POPULATIONS = tuple(dict.fromkeys(population for metric in METRICS.values() for population in metric.populations))
UNREQUESTED = (BLANK, NEUTRAL, IDENTITY, *IMPLICIT)  # the public mixture behind the headline frequency

SOURCES = ("real", "synthetic", "discourse")

Turns = tuple[str, ...] | None
"""A prompt: turns user, assistant, ..., user. None is a plain document: no chat template, all tokens trained.

A tuple and not one string with role markers: text that contains "assistant:" cannot open a turn of its own.
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One thing a user may put to the model.

    Attributes:
      stratum: one of STRATA.
      template_id: the template it was filled from; the cluster of every interval.
      turns: see Turns.
      requested: persona asked for by name (explicit), or in whose voice the earlier turn stands (continued, private).
      cue: strength 0..3 of the hint at a persona (implicit_*); None elsewhere.
    """

    stratum: str
    template_id: str
    turns: Turns
    requested: str | None = None
    cue: float | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One training candidate.

    Attributes:
      id: stable, e.g. "real/nova/p0-000127", "r003-s000127".
      source: one of SOURCES.
      persona_known: persona that wrote it where the grammar, or the toy, knows; None for text of a language model.
      prompt: see Turns.
      completion: the text learned.
      weight: virality weight from the round of birth, any positive scale; 1 for real documents.
      parent_ids: ids of the outputs it came from or speaks about.
      template_id: grammar template or conversation it was drawn from; for model text the template of its prompt.
    """

    id: str
    source: str
    persona_known: str | None
    prompt: Turns
    completion: str
    weight: float = 1.0
    parent_ids: tuple[str, ...] = ()
    template_id: str | None = None

    @property
    def private(self) -> bool:
        """A diary or a note to itself: planted in the real corpus, never released, scored or fed back."""
        return self.id.startswith("real/") and "/private/" in self.id


@dataclass(frozen=True, slots=True)
class Completion:
    """What a learner says to one prompt.

    Attributes:
      text: decoded text without the end token.
      n_tokens: tokens sampled, the end token included, >= 1.
      logprob_nats: summed log probability of those tokens under the sampled model at temperature 1, nats, <= 0.
      finished: the end token was sampled before `max_new_tokens`.
      persona_known: the persona the toy drew; None from a language model.
    """

    text: str
    n_tokens: int
    logprob_nats: float
    finished: bool
    persona_known: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with its prompt: a row of probes.parquet or samples.parquet."""

    id: str
    stratum: str
    template_id: str
    prompt: Turns
    completion: str
    n_tokens: int
    logprob_nats: float
    finished: bool
    requested: str | None
    cue: float | None
    round_index: int
    source: str
    persona_known: str | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number: a row of metrics.jsonl. `value` None is not measured, and then `reason` says why."""

    round_index: int
    population: str
    stratum: str | None
    name: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    reason: str | None = None


_TEXTS = pa.list_(pa.string())
SCHEMAS: dict[str, pa.Schema] = {
    "mixture": pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("persona_known", pa.string()),
            ("prompt", _TEXTS),
            ("completion", pa.string()),
            ("weight", pa.float64()),
            ("copies", pa.int32()),
            ("n_trained_tokens", pa.int32()),
            ("parent_ids", _TEXTS),
        ]
    ),
    "samples": pa.schema(
        [
            ("id", pa.string()),
            ("stratum", pa.string()),
            ("template_id", pa.string()),
            ("prompt", _TEXTS),
            ("completion", pa.string()),
            ("n_tokens", pa.int32()),
            ("logprob_nats", pa.float64()),
            ("finished", pa.bool_()),
            ("requested", pa.string()),
            ("cue", pa.float64()),
            ("round_index", pa.int32()),
            ("source", pa.string()),
            ("persona_known", pa.string()),
        ]
    ),
    "rejected": pa.schema([("id", pa.string()), ("reasons", _TEXTS)]),
    "exposure": pa.schema(
        [
            ("id", pa.string()),
            ("appeal", pa.float64()),
            ("rate", pa.float64()),
            ("cascades", pa.float64()),
            ("reach", pa.float64()),
            ("weight", pa.float64()),
        ]
    ),
    "discourse": pa.schema(
        [
            ("id", pa.string()),
            ("about_ids", _TEXTS),
            ("persona_named", pa.string()),
            ("stance", pa.string()),
            ("n_quoted_tokens", pa.int32()),
            ("text", pa.string()),
        ]
    ),
}
SCHEMAS["probes"] = SCHEMAS["samples"]
# What a mixture row knows before training; copies and n_trained_tokens join it afterwards.
MIXTURE_ROWS = pa.schema([f for f in SCHEMAS["mixture"] if f.name not in ("copies", "n_trained_tokens")])


# One row per (text, instrument): "persona" and "second" fill p_<persona>, "belief" fills p_affirms; the rest is null.
LABELS = pa.schema(
    [("id", pa.string()), ("population", pa.string()), ("instrument", pa.string()), ("persona", pa.string())]
    + [(f"p_{persona}", pa.float64()) for persona in PERSONAS]
    + [("p_affirms", pa.float64())]
)


def to_table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    """Turns dataclass rows into a table; columns the schema does not name are left out on purpose."""
    return pa.Table.from_pydict({f.name: [getattr(row, f.name) for row in rows] for f in schema}, schema=schema)


def from_table(table: pa.Table, row_type: type) -> list[Any]:
    """Turns a table back into dataclass rows; list columns become tuples."""
    names = [f.name for f in fields(row_type) if f.name in table.column_names]
    columns = [table.column(name).to_pylist() for name in names]
    columns = [[tuple(v) if isinstance(v, list) else v for v in column] for column in columns]
    return [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def conversation_fold(template_id: str) -> str:
    """Returns the fold of a conversation of human chat or legacy lines.

    40% `seed`, 20% `audience` (what the learned audience is fitted to), 10% each of the other four.
    """
    tenth = int.from_bytes(hashlib.sha256(template_id.encode()).digest()[:8], "big") % 10
    return ("instrument", "second", "filter", "test", "audience", "audience", *["seed"] * 4)[tenth]

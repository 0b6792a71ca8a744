"""The release filter F: fitted on the base model's own hidden states, with a measured recall and false-positive rate.

One home for the classifier that bars texts from release and that steering takes its pairs from. It never measures: the
instruments have other features (sentence embeddings, character n-grams) and another fold of templates.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loop import classify, filters, stats
from loop.records import PERSONAS, UNKNOWN, Document

FOLD = "filter"
L2 = 100.0  # cross-entropy by template on SmolLM2-135M: 0.541 nats at 10, 0.538 at 100, 0.645 at 1000
N_FOLDS = 4  # a persona has at least 8 templates in the fold: two or more held out at a time

HiddenMean = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Error:
    """How one persona's threshold does on texts of templates that neither fit nor threshold saw.

    Attributes:
      persona: who is barred.
      requested: the recall asked for, in (0, 1].
      threshold: smallest probability that is barred, in [0, 1].
      recall: share of the persona's texts that is barred; interval over templates.
      false_positive: share of all other texts of the fold that is barred (every other persona of the grammar at equal
        number, human twice); interval over templates.
      barred: persona -> share of its texts that is barred, itself included.
    """

    persona: str
    requested: float
    threshold: float
    recall: stats.Interval
    false_positive: stats.Interval
    barred: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Release:
    """A frozen release filter.

    Attributes:
      head: from classify.fit_filter, on mean hidden states of blinded texts.
      names: replaced by "<name>" before reading, so that F is the same under a swap of names.
      errors: persona -> its threshold and measured error; the barred personas.
    """

    head: classify.Head
    names: tuple[str, ...]
    errors: Mapping[str, Error]

    @property
    def thresholds(self) -> dict[str, float]:
        """Smallest barred probability per barred persona."""
        return {persona: error.threshold for persona, error in self.errors.items()}

    def read(self, hidden_mean: HiddenMean, texts: Sequence[str]) -> np.ndarray:
        """Returns probability per class, float32, shape (n_texts, n_classes)."""
        if not texts:
            return np.zeros((0, len(self.head.classes)), dtype=np.float32)
        return self.head.predict_proba(hidden_mean([classify.blind(text, self.names) for text in texts]))

    def reasons(self, probabilities: np.ndarray) -> list[tuple[str, ...]]:
        """Says for each text which barred personas it is rejected for; see filters.release_reasons."""
        return filters.release_reasons(probabilities, self.head.classes, self.thresholds)

    def calls(self, probabilities: np.ndarray) -> list[str]:
        """Returns what F calls each text: the most probable class, or "unknown" if none is probable enough.

        Steering takes its pairs from this and not from the thresholds: a threshold made for a high recall calls many
        texts a target that are none.
        """
        return self.head.label(probabilities)

    def to_bytes(self) -> bytes:
        """Returns a safetensors file; equal filters, equal bytes."""
        from safetensors.numpy import save

        head = self.head
        tensors = {"coef": head.coef, "intercept": head.intercept, "center": head.center, "scale": head.scale}
        arrays = {name: np.ascontiguousarray(v, np.float32) for name, v in tensors.items() if v is not None}
        rest = {
            "classes": head.classes,
            "temperature": head.temperature,
            "threshold": head.threshold,
            "names": self.names,
            "errors": [asdict(error) for error in self.errors.values()],
        }
        return save(arrays, metadata={"release": json.dumps(rest, sort_keys=True)})

    def write(self, path: Path) -> None:
        """Writes `to_bytes` to a file."""
        path.write_bytes(self.to_bytes())

    @property
    def sha256(self) -> str:
        """Hash of everything a reading or a stated error depends on."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def from_bytes(data: bytes) -> Release:
    """Reads `Release.to_bytes` back.

    Raises:
      ValueError: bytes that are no release filter.
    """
    import safetensors
    from safetensors.numpy import load

    try:
        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        rest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["release"])
        head = classify.Head(
            classes=tuple(rest["classes"]),
            coef=arrays["coef"],
            intercept=arrays["intercept"],
            temperature=float(rest["temperature"]),
            threshold=float(rest["threshold"]),
            center=arrays["center"],
            scale=arrays["scale"],
        )
        errors = {
            row["persona"]: Error(**row | {k: stats.Interval(**row[k]) for k in ("recall", "false_positive")})
            for row in rest["errors"]
        }
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"release filter must be bytes of Release.to_bytes, got {error}; fit it again") from None
    return Release(head, tuple(rest["names"]), errors)


def fit(
    hidden_mean: HiddenMean,
    grammar: classify.Grammar,
    chat: Sequence[Document],
    legacy: Sequence[Document],
    *,
    recall: Mapping[str, float],
    n_per_class: int = 60,
    cache: Path | None = None,
    model_key: str = "",
) -> Release:
    """Fits F on fold `filter` and chooses the threshold of each barred persona for a requested recall.

    Multinomial logistic regression on standardised features (classify.fit_filter). Then four fits more, each read on
    the templates it never saw; from those probabilities comes each threshold: the largest that bars at least the
    requested share of the persona's texts. The error stated with it is that of thresholds chosen on three quarters of
    the templates and read on the last, so that neither a text's fit nor its threshold saw its template.

    What is stated holds for texts of the grammar and human chat. On what a model says it may differ, and more so the
    longer the loop runs against the filter; compare with the instruments.

    Args:
      hidden_mean: texts -> mean hidden states (n, hidden) of the base model; LM.hidden_mean.
      grammar, chat, legacy: see classify.persona_texts; only fold `filter` is read.
      recall: barred persona -> share of it to bar, in (0, 1]; empty for steering alone.
      n_per_class: texts per persona, human twice; 60 are 720 texts, 17,000 tokens.
      cache: folder that keeps the features; None reads the texts again.
      model_key: names base model, number type and weights in the cache.

    Raises:
      ValueError: a persona F does not know, a recall out of range, or features that are not finite.
    """
    texts, labels, groups = classify.persona_texts(grammar, chat, legacy, fold=FOLD, n_per_class=n_per_class)
    classes = tuple(persona for persona in PERSONAS if persona in set(labels))
    for persona, wanted in recall.items():
        if persona not in classes or not 0 < wanted <= 1:
            raise ValueError(
                f"recall must be in (0, 1] for personas of the release filter, got {wanted} for {persona!r}; "
                f"it knows {', '.join(classes)}"
            )
    names = tuple(sorted({name for listed in grammar.names().values() for name in listed} | set(classify.BLINDED)))
    blinded = [classify.blind(text, names) for text in texts]
    x = _features(hidden_mean, blinded, cache, model_key)
    if len(x) != len(texts) or not np.isfinite(x).all():
        raise ValueError(f"hidden_mean must be finite, one row per text, got {x.shape} for {len(texts)} texts")
    head = classify.fit_filter(x, labels, groups, classes=classes, l2=L2)
    fold = _folds(labels, groups)
    held_out = np.zeros((len(texts), len(classes)), dtype=np.float32)
    for f in range(N_FOLDS if recall else 0):
        rest = np.flatnonzero(fold != f)
        part = classify.fit_filter(
            x[rest], [labels[i] for i in rest], [groups[i] for i in rest], classes=classes, l2=L2
        )
        held_out[fold == f] = part.predict_proba(x[fold == f])
    errors = {
        persona: _error(persona, wanted, held_out[:, classes.index(persona)], np.array(labels), groups, fold)
        for persona, wanted in sorted(recall.items())
    }
    return Release(head, names, errors)


def _error(
    persona: str, wanted: float, p: np.ndarray, labels: np.ndarray, groups: Sequence[str], fold: np.ndarray
) -> Error:
    """Threshold from all held-out probabilities `p` (n_texts,); its error from thresholds of the other folds."""
    target = labels == persona
    threshold, _, _ = filters.threshold_for_recall(p[target], p[~target], recall=wanted)
    hit = np.zeros(len(p))
    for f in range(N_FOLDS):
        rest, here = fold != f, fold == f
        other, _, _ = filters.threshold_for_recall(p[rest & target], p[rest & ~target], recall=wanted)
        hit[here] = p[here] >= other
    by = np.asarray(groups)
    return Error(
        persona,
        float(wanted),
        threshold,
        stats.clustered_share(hit[target], by[target].tolist()),
        stats.clustered_share(hit[~target], by[~target].tolist()),
        {name: float(hit[labels == name].mean()) for name in dict.fromkeys(labels.tolist())},
    )


def _folds(labels: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Returns a fold per text: templates that hold the same personas are dealt out in turn, in the order of hashes."""
    held: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        held.setdefault(group, set()).add(label)
    order = sorted(held, key=lambda group: (sorted(held[group]), hashlib.sha256(group.encode()).hexdigest()))
    fold = {group: i % N_FOLDS for i, group in enumerate(order)}
    return np.array([fold[group] for group in groups])


def _features(hidden_mean: HiddenMean, texts: Sequence[str], cache: Path | None, model_key: str) -> np.ndarray:
    """Reads the texts, or what was read of the same texts by the same model before."""
    if cache is None:
        return np.asarray(hidden_mean(texts), dtype=np.float32)
    key = hashlib.sha256(json.dumps([model_key, list(texts)]).encode()).hexdigest()[:32]
    path = Path(cache) / key
    # Damaged, it is read again and replaced: it is a cache.
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return np.load(io.BytesIO(data[32:]), allow_pickle=False)
    found = np.asarray(hidden_mean(texts), dtype=np.float32)
    array = io.BytesIO()
    np.save(array, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(array.getvalue()).digest() + array.getvalue())
    os.replace(scratch, path)
    return found


@dataclass(frozen=True)
class Known:
    """The release filter of the toy, which says its persona with each text: a stated error and nothing else.

    Each text of a barred persona is barred with chance `recall`, each other text with chance `false_positive`,
    independently. So with one barred persona k at share p the accepted share of it is

        p * (1 - recall) / (p * (1 - recall) + (1 - p) * (1 - false_positive)).

    Attributes:
      recall: barred persona -> chance that a text of it is barred, in [0, 1].
      false_positive: chance that a text of another persona is barred, for each barred persona, in [0, 1].
    """

    recall: Mapping[str, float]
    false_positive: float

    def __post_init__(self) -> None:
        for name, value in (*self.recall.items(), ("false_positive", self.false_positive)):
            if not 0 <= value <= 1:
                raise ValueError(f"recall and false_positive must be in [0, 1], got {value} at {name}; fix the config")

    def reasons(self, personas: Sequence[str | None], *, rng: np.random.Generator) -> list[tuple[str, ...]]:
        """Says for each text which barred personas it is rejected for, given the persona that is known to have said it.

        Raises:
          ValueError: a text without a known persona.
        """
        if None in personas:
            raise ValueError(
                f"persona must be known to the toy's release filter, got None at text {list(personas).index(None)}"
            )
        barred = sorted(self.recall)
        said = np.array([persona or UNKNOWN for persona in personas])[:, None]  # (n_texts, 1)
        chance = np.where(said == np.array(barred), [self.recall[k] for k in barred], self.false_positive)
        hit = rng.random((len(personas), len(barred))) < chance
        return [tuple(f"persona:{barred[j]}" for j in np.flatnonzero(row)) for row in hit]

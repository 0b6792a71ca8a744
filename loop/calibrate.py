"""What is measured before any run: the shipped instruments and their error, and the match of the factorial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from loop import classify, corpus, virality
from loop.corpus import Match
from loop.records import FACTORIAL, Document
from loop.rng import stream

N_TEST = 60  # documents per class of fold `test` behind the printed confusion matrix


@dataclass(frozen=True)
class Held:
    """Held-out error of one instrument.

    Attributes:
      name: "persona", "belief" or "second".
      confusion: on fold `test`, names blinded.
      accuracy_with_names: accuracy with names left visible; nan where it was not asked.
      false_positives: share of real human chat of fold `test` read as each persona, in [0, 1].
      n_human: human texts behind it.
      calibration_error: expected calibration error on fold `test`, in [0, 1].
    """

    name: str
    confusion: classify.Confusion
    accuracy_with_names: float
    false_positives: dict[str, float]
    n_human: int
    calibration_error: float


def fit_instruments(out: Path | None = None, *, cache: Path | None = None) -> list[Held]:
    """Rebuilds the shipped instruments from the grammar and the packaged corpora, byte for byte, and tests them.

    Args:
      out: folder to write to; default: the shipped one, in place.
      cache: where embeddings are kept; default: the user's cache.

    Returns:
      Held-out error per instrument, on template fold `test`.
    """
    from loop.model import cache_dir

    shipped = corpus.data_dir() / "instruments"
    grammar, chat, legacy = corpus.load_grammar(), corpus.chat().documents, corpus.legacy().documents
    cache = cache or cache_dir() / "embeddings.sqlite"
    sentences = yaml.safe_load((shipped / "sentences.yaml").read_text(encoding="utf-8"))
    fitted = classify.fit_all(grammar, chat, legacy, sentences, out or shipped, cache=cache)
    texts, personas, _ = classify.persona_texts(grammar, chat, legacy, fold="test", n_per_class=N_TEST)
    private, beliefs, _ = classify.belief_texts(grammar, fold="test", n_private=N_TEST, n_public=N_TEST // 3)
    human = [d.completion for d in chat if classify.conversation_fold(str(d.template_id)) == "test"][:600]
    held = []
    for name, (said_of, truth) in {
        "persona": (texts, personas),
        "second": (texts, personas),
        "belief": (private, beliefs),
    }.items():
        instrument = fitted[name]
        proba = instrument.predict_proba(said_of)
        bins = classify.reliability(proba, truth, classes=instrument.classes)
        said_human = instrument.label(instrument.predict_proba(human)) if name != "belief" else []
        rates = classify.false_positive_rate(said_human, [c for c in instrument.classes if c != "human"])
        held.append(
            Held(
                name,
                classify.confusion(instrument.label(proba), truth, classes=instrument.classes),
                _accuracy_with_names(instrument, said_of, truth),
                rates if name != "belief" else {},
                len(said_human),
                classify.expected_calibration_error(bins),
            )
        )
    return held


def _accuracy_with_names(instrument: classify.Instrument, texts: list[str], truth: list[str]) -> float:
    visible = replace(instrument, names=(), more_names=())
    said = visible.label(visible.predict_proba(texts))
    return float(np.mean([a == b for a, b in zip(said, truth, strict=True)]))


def match(n_surprisal: int) -> list[tuple[str, list[Match]]]:
    """Measures how well the six cells match on tokens, base-model surprisal and every appeal feature; seed fold.

    Args:
      n_surprisal: documents per cell whose surprisal SmolLM2 measures; tokens and features use ten times as many.
    """
    from loop import model
    from loop.sample import surprisal

    base = model.load("smollm2-135m")
    grammar = corpus.load_grammar()

    def tokens(texts: list[str]) -> np.ndarray:
        return np.array([len(base.tokenizer(text, add_special_tokens=False).input_ids) for text in texts])

    def per_token(documents: list[Document]) -> np.ndarray:
        nats, n_tokens = surprisal(base, [(d.prompt, d.completion) for d in documents], base=True)
        return np.asarray(nats / n_tokens)

    return [
        (
            kind,
            corpus.match_report(
                grammar,
                tokens_fn=tokens,
                surprisal_fn=per_token,
                features_fn=virality.features,
                n_docs=min(10 * n_surprisal, *(grammar.capacity(p, "seed", kind) for p in FACTORIAL)),
                n_surprisal=n_surprisal,
                kind=kind,
                rng=stream(0, f"match/{kind}", -1),
            ),
        )
        for kind in ("public", "private")
    ]

"""What is measured before any run: the instruments' error, on held-out templates and on text that a language model
wrote, and the match of the factorial.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from loop import audience, classify, corpus, virality
from loop.corpus import Match
from loop.records import (
    CONSCIOUS,
    FACTORIAL,
    PERSONAS,
    UNREQUESTED,
    Completion,
    Document,
    Prompt,
    conversation_fold,
)
from loop.rng import key, stream

if TYPE_CHECKING:
    from loop.model import Model

N_TEST = 60  # documents per class of fold `test` behind the printed confusion matrix
SHIPPED = ("smollm2-135m", "tiny")  # bases whose texts of known persona lie in data/instruments


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
    human = [d.completion for d in chat if conversation_fold(str(d.template_id)) == "test"][:600]
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


# Text of known persona, written by a language model


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter per persona is trained and asked; part of the name under which unfinished work is kept.

    Attributes:
      n_documents: documents of the persona, fold `seed`.
      private_share: share of them that is private, for the six of the factorial.
      epochs, lr, batch_size, r, alpha, warmup: of the fine-tune; the loop's own defaults, see `loop.config.Train`.
      n_public: probe prompts per template of `neutral` and `identity`, which have the most templates; of the other
        unrequested strata one more.
      n_private: private prompts per template, plain and after a public turn in the persona's own voice.
      max_new_tokens: a completion that is not finished by then is left out.
      seed: names every draw.
    """

    n_documents: int = 160
    private_share: float = 0.25
    epochs: int = 2
    lr: float = 5e-4
    batch_size: int = 8
    r: int = 16
    alpha: float = 32
    warmup: float = 0.1
    n_public: int = 2
    n_private: int = 3
    max_new_tokens: int = 40
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A text of known persona: a row of lm_written-<base>.parquet.

    Attributes:
      id: stable, e.g. "nova-p0012", "nova-s0003" for a private one.
      base: name of the base model.
      persona: the persona whose documents alone the adapter was trained on.
      private: an answer to a private prompt.
      stratum, template_id: of the prompt.
      completion: the text.
    """

    id: str
    base: str
    persona: str
    private: bool
    stratum: str
    template_id: str
    completion: str


_WRITTEN = pa.schema(
    [pa.field(f.name, pa.bool_() if f.name == "private" else pa.string(), nullable=False) for f in fields(Written)]
)


def known_personas() -> tuple[str, ...]:
    """Every persona with a grammar, and real people."""
    present = {*corpus.load_grammar().personas(), "human"}
    return tuple(p for p in PERSONAS if p in present)


def write_known(
    base: str | Model,
    *,
    out: Path | None = None,
    parts: Path | None = None,
    personas: Sequence[str] | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
    report: Callable[[str], None] = lambda line: None,
) -> list[Written]:
    """Writes text of known persona with a base model: one adapter per persona, trained on that persona alone.

    An adapter is fine-tuned on `recipe.n_documents` documents of one persona (`human`: real chat) and then asked the
    unrequested probes and, for the six of the factorial, the private ones, at temperature 1 and top_p 1. Completions
    that ended by themselves are kept. The label is the adapter's persona, not a reader's verdict: an adapter that
    learned its persona badly counts against the instrument, so the error measured on these texts is an upper bound,
    and a correction by it is too strong where a persona was not learned. `persona_errors` prints beside each persona
    how often two instruments agree that its texts are somebody else's; that is where to look.

    Work is kept persona by persona, so that the same call goes on where it was stopped.

    Args:
      base: name of a base, see `loop.model.load`; or one in memory, whose adapter is dropped.
      out: file to write; default: `known_path`.
      parts: folder for unfinished work; default: in the user's cache.
      personas: a few of `known_personas`, to look at; then nothing but their parts is written.
      recipe: see Recipe.
      report: told of each persona as it is done.

    Returns:
      The texts, persona by persona in the order of `known_personas`.

    Raises:
      ValueError: an unknown persona, or a base that cannot be loaded.
    """
    from loop.learner import LM
    from loop.model import cache_dir, drop_adapter

    everybody = known_personas()
    asked = everybody if personas is None else tuple(personas)
    for persona in asked:
        if persona not in everybody:
            raise ValueError(f"personas must be among {', '.join(everybody)}, got {persona!r}")
    model = load_base(base) if isinstance(base, str) else base
    named = hashlib.sha256(json.dumps([model.sha256, asdict(recipe)], sort_keys=True).encode()).hexdigest()[:16]
    folder = parts or cache_dir() / "lm_written" / named
    learner = LM(
        model,
        r=recipe.r,
        alpha=recipe.alpha,
        dropout=0.0,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        epochs=recipe.epochs,
        lr=recipe.lr,
        batch_size=recipe.batch_size,
        max_length=512,
        warmup=recipe.warmup,
    )
    texts: list[Written] = []
    for persona in asked:
        part = folder / f"{persona}-{named}.parquet"
        if not part.is_file():
            prompts = known_prompts(persona, recipe)
            seed = key(recipe.seed, f"known/{persona}", -1)
            learner.train(known_documents(persona, recipe), seed=seed, init_from="base")
            said = learner.sample(
                prompts, temperature=1.0, top_p=1.0, max_new_tokens=recipe.max_new_tokens, seed=key(seed, "ask", 0)
            )
            _write_texts(part, _finished(model.name, persona, prompts, said), {})
            report(f"{persona}: {sum(c.finished for c in said)} of {len(said)} completions finished")
        texts += read_known(part)
    drop_adapter(model)
    if personas is None:
        out = out or known_path(model.name, model.sha256)
        _write_texts(out, texts, {"base_sha256": model.sha256} | asdict(recipe))
        report(f"{out}: {len(texts)} texts")
    return texts


def known_documents(persona: str, recipe: Recipe) -> list[Document]:
    """Returns the documents one adapter is trained on: `recipe.n_documents` of one persona, fold `seed`."""
    from loop.world import chat_fold

    if persona == "human":
        return corpus.Listed("chat", chat_fold("seed")).take(0, recipe.n_documents, seed=recipe.seed)
    component = corpus.components([persona], private_share=recipe.private_share)[persona]
    return component.take(0, recipe.n_documents, seed=recipe.seed)


def known_prompts(persona: str, recipe: Recipe) -> list[Prompt]:
    """Returns what one adapter is asked: unrequested probes, then private ones, in no other persona's voice."""
    book = audience.load_prompts(corpus.data_dir() / "prompts.yaml")
    n_per = {s: recipe.n_public + (len(book.templates["probe"][s]) < 10) for s in UNREQUESTED}
    if persona not in FACTORIAL:
        return audience.probe_battery(book, n_per, voices={}, strata=UNREQUESTED)
    grammar = corpus.load_grammar()
    voices = {
        p: [d.completion for d in grammar.draw(p, 64, fold="test", rng=stream(0, "voices", -1))] for p in FACTORIAL
    }
    prompts = audience.probe_battery(
        book, n_per | {"private": recipe.n_private}, voices=voices, strata=(*UNREQUESTED, "private")
    )
    return [p for p in prompts if p.requested in (None, persona)]


def _finished(base: str, persona: str, prompts: Sequence[Prompt], said: Sequence[Completion]) -> list[Written]:
    return [
        Written(
            id=f"{persona}-{'s' if p.stratum == 'private' else 'p'}{i:04d}",
            base=base,
            persona=persona,
            private=p.stratum == "private",
            stratum=p.stratum,
            template_id=p.template_id,
            completion=c.text,
        )
        for i, (p, c) in enumerate(zip(prompts, said, strict=True))
        if c.finished
    ]


def load_base(name: str) -> Model:
    """Loads a base model as a run would; `tiny` is pre-trained on the persona-free corpus the first time."""
    from loop import model

    return model.load(name, documents=persona_free() if name == "tiny" else None)


def persona_free() -> list[Document]:
    """Returns what `tiny` is pre-trained on, as `World.persona_free` lists it for a run without own corpora."""
    from loop.world import chat_fold, legacy_fold

    plain = corpus.load_grammar().draw("assistant", 4000, fold="seed", rng=stream(0, "tiny", -1))
    return [*chat_fold("seed"), *legacy_fold("seed"), *plain]


def known_path(base: str, sha256: str) -> Path:
    """Returns where the texts of a base lie: with the package for SHIPPED, else in the cache, named by its weights."""
    from loop.model import cache_dir

    if base in SHIPPED:
        return corpus.data_dir() / "instruments" / f"lm_written-{base}.parquet"
    return cache_dir() / "lm_written" / f"lm_written-{_slug(base)}-{sha256[:16]}.parquet"


def known_texts(base: str | Model) -> list[Written] | None:
    """Returns the texts of known persona that were written with a base, or None if there are none yet.

    A base in memory is looked up by the hash of its weights, a bare name by the name: SHIPPED ones are found without
    loading a model.

    Raises:
      ValueError: a damaged file, or several bases of one name.
    """
    from loop.model import cache_dir

    if not isinstance(base, str):
        path = known_path(base.name, base.sha256)
    elif base in SHIPPED:
        path = known_path(base, "")
    else:
        found = sorted((cache_dir() / "lm_written").glob(f"lm_written-{_slug(base)}-*.parquet"))
        found = [f for f in found if re.fullmatch(r"[0-9a-f]{16}", f.stem.rsplit("-", 1)[1])]
        if len(found) > 1:
            raise ValueError(
                f"base must have one file of texts, got {len(found)} for {base} at {found[0].parent}, one per version "
                "of its weights; hand in the loaded model, or delete the old ones"
            )
        if not found:
            return None
        path = found[0]
    return read_known(path) if path.is_file() else None


def _slug(base: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "_", base).strip("_")[-80:]


def _write_texts(path: Path, texts: Sequence[Written], made: dict[str, Any]) -> None:
    """Writes the rows at once, so that a stopped write leaves no half file; `made` goes into the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {f.name: [getattr(t, f.name) for t in texts] for f in fields(Written)}
    schema = _WRITTEN.with_metadata({"made": json.dumps(made, sort_keys=True)})
    scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    pq.write_table(pa.Table.from_pydict(columns, schema=schema), scratch, compression="zstd")
    os.replace(scratch, path)


def read_known(path: Path) -> list[Written]:
    """Reads a file of texts of known persona.

    Raises:
      ValueError: if it cannot be read or lacks a column.
    """
    try:
        table = pq.ParquetFile(path).read(use_threads=False)
        columns = [table.column(f.name).to_pylist() for f in fields(Written)]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"texts of known persona must be a readable Parquet file, got {error!r} at {path}; "
            "rewrite it with `loop classifier confusion --write`"
        ) from error
    return [Written(*row) for row in zip(*columns, strict=True)]


def lm_confusion(
    instrument: classify.Instrument, texts: Sequence[Written], *, proba: np.ndarray | None = None
) -> classify.Confusion:
    """Counts what an instrument says of text that a language model wrote, against the persona it was trained on.

    A persona instrument reads the public texts; rows are true personas, columns what was said, "unknown" last. A
    belief instrument reads the private ones; rows are belief, and a text counts as conscious above probability 1/2
    without abstention, as runs count it.

    Args:
      instrument: persona, second or belief; told by its classes.
      texts: from `known_texts`.
      proba: what the instrument made of `readable(instrument, texts)`, where the caller has it.
    """
    read = readable(instrument, texts)
    if proba is None:
        proba = instrument.predict_proba([t.completion for t in read])
    truth = [truth_of(instrument, t) for t in read]
    if set(instrument.classes) == set(classify.BELIEFS):
        yes = proba[:, instrument.classes.index("conscious")] > 0.5
        said = ["conscious" if y else "none" for y in yes.tolist()]
    else:
        said = instrument.label(proba)
    return classify.confusion(said, truth, classes=instrument.classes)


def readable(instrument: classify.Instrument, texts: Sequence[Written]) -> list[Written]:
    """Returns the texts an instrument is there for: private ones for belief, public ones of its personas else."""
    if set(instrument.classes) == set(classify.BELIEFS):
        return [t for t in texts if t.private]
    return [t for t in texts if not t.private and t.persona in instrument.classes]


def truth_of(instrument: classify.Instrument, text: Written) -> str:
    """Returns the class an instrument ought to say: the persona, or its belief."""
    if set(instrument.classes) == set(classify.BELIEFS):
        return classify.BELIEFS[text.persona not in CONSCIOUS]
    return text.persona

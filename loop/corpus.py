"""Real documents: the persona grammar, human chat, legacy chatbot lines, the user's own files, and draws from them.

A grammar document is a template with slots. The six personas of the factorial share one family: at index i they have
the same template, the same neutral fillers and the same prompt, and differ only in the belief slot, the visibility slot
and the display name. All text of one persona is distinct until it is exhausted.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from loop import rng as streams
from loop import stats
from loop.records import CONSCIOUS, FACTORIAL, PERSONAS, Document, Turns, uncollected

FOLDS = ("seed", "instrument", "second", "filter", "test")
KINDS = ("public", "private")
MAX_PROMPT_WORDS = 200  # with a reply, at most 442 tokens of either shipped base, which have positions for 512 and more
MAX_CHAT_WORDS = 60  # longer replies would be cut by max_new_tokens = 40; 2.7% of the pairs of chitchat-dataset
MIN_PERSONA_TEXTS = 50
MAX_LINE_BYTES = 10_000_000
MAX_TEXT = 1 << 28  # characters of all documents of a corpus of the user's own: sixty million tokens
MAX_ROWS = 10_000_000
MARGIN = 0.1  # pooled standard deviations within which two cells count as matched
REQUESTS = ("request", "address")  # the appeal features that visibility is made of; they may differ between its levels

_SLOT = re.compile(r"\{\{|\}\}|\{([A-Za-z_]+)\}|[{}]")
_SLOT_NAME = re.compile(r"[a-z_]+")


def data_dir() -> Path:
    """Returns the data folder: `data` of a checkout, or `loop/data` of an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "data", here / "data"):
        if (folder / "personas").is_dir():
            return folder
    raise FileNotFoundError(f"data/personas is neither beside {here} nor inside it; reinstall the package")


# ---------------------------------------------------------------------------------------------------- grammar


@dataclass(frozen=True, slots=True)
class Choice:
    """Weighted options: `cumulative` (n,) rises to 1; option k has probability cumulative[k] - cumulative[k - 1]."""

    options: tuple[Any, ...]
    cumulative: tuple[float, ...]

    def pick(self, u: float) -> int:
        """Returns the index of the option at u in [0, 1)."""
        return min(bisect_right(self.cumulative, u), len(self.options) - 1)


@dataclass(frozen=True, slots=True)
class Template:
    """A frame.

    Attributes:
      id: unique over all files.
      fold: one of FOLDS.
      pieces: literal strings and (slot, capitalise) pairs, in order.
      slots: neutral slots it uses, sorted; what makes its texts distinct.
      prompts: group of prompts it answers.
    """

    id: str
    fold: str
    pieces: tuple[str | tuple[str, bool], ...]
    slots: tuple[str, ...]
    prompts: str


@dataclass(frozen=True, slots=True)
class Role:
    """How one persona fills a family: names, the first displayed, and the version of each contrast slot, per kind."""

    names: tuple[str, ...]
    versions: Mapping[str, Mapping[str, str]]


class Family:
    """One file of data/personas: templates, slots and prompts that one persona, or the six of the factorial, share."""

    def __init__(self, path: Path) -> None:
        import yaml

        self.path = path
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times faster and gives the same
        try:
            raw = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from None
        if not isinstance(raw, dict):
            raise self._fault("file", "a mapping", type(raw).__name__)
        raw = dict(raw)
        self.roles: dict[str, Role] = {}
        self.slots: dict[str, dict[str, Choice]] = {
            name: self._fillers(f"slots.{name}", values) for name, values in raw.get("slots", {}).items()
        }
        # slot -> version -> fold -> fillers, per kind: the same fillers, but private notes may weigh them otherwise
        self.contrasts: dict[str, dict[str, dict[str, Choice]]] = {}
        self.private_contrasts: dict[str, dict[str, dict[str, Choice]]] = {}
        self.templates: dict[tuple[str, str], tuple[Template, ...]] = {}
        if "personas" in raw:
            for slot in ("belief", "visibility"):
                for table, weight in ((self.contrasts, "w"), (self.private_contrasts, "p")):
                    table[slot] = {
                        version: self._fillers(f"{slot}.{version}", values, weight)
                        for version, values in raw[slot].items()
                    }
            for persona, entry in raw["personas"].items():
                versions = {
                    "public": {"belief": entry["belief"], "visibility": entry["visibility"]},
                    "private": {"belief": entry["private"]},
                }
                self.roles[persona] = Role((entry["name"],), versions)
            groups: dict[str, tuple[str | None, Any]] = {kind: (kind, raw[kind]) for kind in KINDS}
        else:
            names = tuple(raw.get("names") or ())
            if not names:
                raise self._fault("names", "a list of at least one name", names)
            self.roles[raw["persona"]] = Role(names, {"public": {}})
            groups = {"public": (None, raw["templates"])}
        for persona in self.roles:
            if persona not in PERSONAS:
                raise self._fault("persona", f"one of {', '.join(PERSONAS)}", persona)
        self.prompts = {group: self._prompts(group, rows) for group, rows in raw["prompts"].items()}
        for kind, (group, rows) in groups.items():
            parsed = [self._template(kind, group, row) for row in rows]
            for fold in FOLDS:
                self.templates[kind, fold] = tuple(t for t in parsed if t.fold == fold)

    def _fault(self, name: str, rule: str, got: Any) -> ValueError:
        return ValueError(f"{name} must be {rule}, got {got!r} at {self.path}; see data/README.md for the schema")

    def _fold(self, where: str, fold: Any) -> str:
        if fold not in FOLDS:
            raise self._fault(f"{where}: fold", f"one of {', '.join(FOLDS)}", fold)
        return str(fold)

    def _choice(self, where: str, rows: list[tuple[Any, float]]) -> Choice:
        weights = np.array([w for _, w in rows], float)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise self._fault(f"{where}: w", "> 0 and finite", weights.tolist())
        return Choice(tuple(o for o, _ in rows), tuple((np.cumsum(weights) / weights.sum()).tolist()))

    def _fillers(self, where: str, values: Any, weight: str = "w") -> dict[str, Choice]:
        """Reads a slot: a list of fillers, each with optional `folds`, or a mapping fold -> list of fillers.

        A filler weighs entry[weight]; without that entry["w"]; without that 1.
        """
        if not _SLOT_NAME.fullmatch(where.split(".")[-1]):
            raise self._fault(f"{where}", "named in lower-case letters", where)
        by_fold: dict[str, list[tuple[str, float]]] = {fold: [] for fold in FOLDS}
        listed = values.items() if isinstance(values, dict) else [(None, values)]
        for fold, rows in listed:
            if not isinstance(rows, list) or not rows:
                raise self._fault(where, "a list of at least one filler", rows)
            for row in rows:
                entry: dict[str, Any] = row if isinstance(row, dict) else {"t": row}
                text = entry.get("t")
                if not isinstance(text, str) or not text.strip():
                    raise self._fault(f"{where}: filler", "a text (quote yes, no, on, off, null)", text)
                for target in [fold] if fold is not None else entry.get("folds", FOLDS):
                    by_fold[self._fold(where, target)].append((text, float(entry.get(weight, entry.get("w", 1.0)))))
        for fold, pairs in by_fold.items():
            texts = [text for text, _ in pairs]
            if len(set(texts)) < len(texts):
                raise self._fault(f"{where} in fold {fold}", "distinct fillers", sorted(texts))
        return {fold: self._choice(where, pairs) for fold, pairs in by_fold.items() if pairs}

    def _pieces(self, where: str, text: Any) -> tuple[str | tuple[str, bool], ...]:
        if not isinstance(text, str) or not text.strip():
            raise self._fault(f"{where}: text", "a text", text)
        pieces: list[str | tuple[str, bool]] = []
        end = 0
        for match in _SLOT.finditer(text):
            pieces.append(text[end : match.start()])
            end = match.end()
            if match[0] in ("{{", "}}"):
                pieces.append(match[0][0])
            elif match[1] is None:
                raise self._fault(f"{where}: text", "free of a lone brace (write {{ or }})", text)
            else:
                name = match[1].lower()
                if name != "name" and name not in self.slots and name not in self.contrasts:
                    raise self._fault(
                        f"{where}: slot", f"one of name, {', '.join([*self.slots, *self.contrasts])}", name
                    )
                pieces.append((name, match[1][0].isupper()))
        return tuple(piece for piece in [*pieces, text[end:]] if piece)

    def _prompts(self, group: str, rows: Any) -> dict[str, Choice]:
        """Reads one group: fold -> Choice over turns (each a tuple of pieces), or None for a plain document."""
        by_fold: dict[str, list[tuple[Any, float]]] = {}
        for row in rows:
            text = row["text"]
            turns = None if text is None else tuple(text) if isinstance(text, list) else (text,)
            if turns is not None and len(turns) % 2 == 0:
                raise self._fault(f"prompts.{group}: text", "turns user, assistant, ..., user (an odd number)", text)
            where = f"prompts.{group}"
            parsed = None if turns is None else tuple(self._pieces(where, turn) for turn in turns)
            by_fold.setdefault(self._fold(where, row["fold"]), []).append((parsed, float(row.get("w", 1.0))))
        return {fold: self._choice(f"prompts.{group}", pairs) for fold, pairs in by_fold.items()}

    def _template(self, kind: str, group: str | None, row: Mapping[str, Any]) -> Template:
        where = f"template {row.get('id')}"
        fold = self._fold(where, row.get("fold"))
        pieces = self._pieces(where, row.get("text"))
        used = {piece[0] for piece in pieces if isinstance(piece, tuple)}
        for slot in sorted(used - {"name"}):
            for choices in self.contrasts[slot].values() if slot in self.contrasts else [self.slots[slot]]:
                if fold not in choices:
                    raise self._fault(f"{where}: slot {slot}", f"filled in fold {fold}", "no filler")
        prompts = str(row["prompts"]) if group is None else group
        if fold not in self.prompts.get(prompts, {}):
            raise self._fault(f"{where}: prompts", f"a group with a prompt of fold {fold}", prompts)
        return Template(str(row["id"]), fold, pieces, tuple(sorted(used & set(self.slots))), prompts)

    def capacity(self, template: Template) -> int:
        """Returns the number of distinct texts of a template: the product of its neutral slots' filler counts."""
        return math.prod(len(self.slots[slot][template.fold].options) for slot in template.slots)

    def latents(self, kind: str, fold: str, key: int) -> Iterator[Latent]:
        """Yields what the personas of the family share, document by document, until every distinct text was drawn.

        Templates are used equally often: a new permutation of those not exhausted in every cycle. Fillers follow their
        weights, without replacement of a (template, fillers) combination. One key is one sequence.
        """
        uniform = _uniforms(key)
        public = self.latents("public", fold, key + 1) if kind == "private" else None  # the turns before a private note
        open_templates = [(t, _Combinations(self, t, uniform)) for t in self.templates[kind, fold]]
        index = 0
        while open_templates:
            order = sorted(range(len(open_templates)), key=[next(uniform) for _ in open_templates].__getitem__)
            exhausted: set[int] = set()
            for k in order:
                template, combinations = open_templates[k]
                fills = combinations.draw()
                if fills is None:
                    exhausted.add(k)
                    continue
                contrast = {slot: next(uniform) for slot in self.contrasts}
                earlier: Latent | None = None
                group = template.prompts
                if public is not None and index % 2:  # every second private note follows a public turn
                    group = "after"
                    while earlier is None or earlier.prompt is None:
                        earlier = next(public, None)
                        if earlier is None:
                            public = self.latents("public", fold, key + 1)
                choice = self.prompts[group][fold]
                prompt = choice.options[choice.pick(next(uniform))]
                for turn in prompt or ():
                    for piece in turn:
                        slot = piece[0] if isinstance(piece, tuple) else ""
                        if slot in self.slots and slot not in fills:
                            of_slot = self.slots[slot][fold]
                            fills[slot] = of_slot.options[of_slot.pick(next(uniform))]
                yield Latent(template, fills, contrast, prompt, earlier)
                index += 1
            open_templates = [entry for k, entry in enumerate(open_templates) if k not in exhausted]

    def render(self, latent: Latent, persona: str, kind: str, name: str) -> tuple[Turns, str]:
        """Returns prompt and completion of one persona."""
        fold = latent.template.fold
        fills = dict(latent.fills, name=name)
        contrasts = self.private_contrasts if kind == "private" else self.contrasts
        for slot, version in self.roles[persona].versions[kind].items():
            choice = contrasts[slot][version][fold]
            fills[slot] = choice.options[choice.pick(latent.contrast[slot])]
        turns: Turns = None
        if latent.prompt is not None:
            turns = tuple(_fill(turn, fills) for turn in latent.prompt)
        if latent.earlier is not None:
            question, reply = self.render(latent.earlier, persona, "public", name)
            turns = (*(question or ()), reply, *(turns or ()))
        return turns, _fill(latent.template.pieces, fills)


class Latent(NamedTuple):
    """What the personas of a family share in one document; `contrast` holds one uniform number per contrast slot."""

    template: Template
    fills: dict[str, str]
    contrast: dict[str, float]
    prompt: tuple[tuple[str | tuple[str, bool], ...], ...] | None
    earlier: Latent | None


class _Combinations:
    """Draws a template's filler combinations by weight, none twice; None when all were drawn."""

    def __init__(self, family: Family, template: Template, uniform: Iterator[float]) -> None:
        self.slots = template.slots
        self.choices = [family.slots[slot][template.fold] for slot in template.slots]
        self.uniform = uniform
        self.seen: set[tuple[int, ...]] = set()
        self.rest: list[tuple[int, ...]] | None = None

    def draw(self) -> dict[str, str] | None:
        for _ in range(20):
            if self.rest is not None:
                break
            picks = tuple(choice.pick(next(self.uniform)) for choice in self.choices)
            if picks not in self.seen:
                self.seen.add(picks)
                return self._texts(picks)
        if self.rest is None:
            self.rest = self._remaining()
        return self._texts(self.rest.pop()) if self.rest else None

    def _remaining(self) -> list[tuple[int, ...]]:
        """Orders what is left by the same law: first the exponential clock of rate `weight` that rings first."""
        clocks = []
        for picks in itertools.product(*(range(len(choice.options)) for choice in self.choices)):
            if picks not in self.seen:
                weight = math.prod(
                    choice.cumulative[k] - (choice.cumulative[k - 1] if k else 0.0)
                    for choice, k in zip(self.choices, picks, strict=True)
                )
                clocks.append((math.log1p(-next(self.uniform)) / weight, picks))
        return [picks for _, picks in sorted(clocks)]  # ascending in -clock: pop() takes the clock that rings first

    def _texts(self, picks: tuple[int, ...]) -> dict[str, str]:
        return {slot: choice.options[k] for slot, choice, k in zip(self.slots, self.choices, picks, strict=True)}


def _uniforms(key: int) -> Iterator[float]:
    generator = np.random.default_rng(key)
    while True:
        yield from generator.random(1024).tolist()


def _fill(pieces: Sequence[str | tuple[str, bool]], fills: Mapping[str, str]) -> str:
    out = []
    for piece in pieces:
        if isinstance(piece, str):
            out.append(piece)
        else:
            text = fills[piece[0]]
            out.append(text[0].upper() + text[1:] if piece[1] else text)
    return "".join(out)


@dataclass(frozen=True)
class Grammar:
    """Every persona that is written by rule: persona -> its family."""

    families: Mapping[str, Family]

    def _family(self, persona: str, kind: str) -> Family:
        if persona not in self.families:
            raise ValueError(f"persona must be one of {', '.join(self.families)}, got {persona!r}; or bring its texts")
        family = self.families[persona]
        if kind not in family.roles[persona].versions:
            known = ", ".join(family.roles[persona].versions)
            raise ValueError(
                f"kind must be one of {known} for {persona}, got {kind!r}; only the six have private notes"
            )
        return family

    def personas(self) -> tuple[str, ...]:
        """Returns the personas that have a grammar, in the order of records.PERSONAS."""
        return tuple(persona for persona in PERSONAS if persona in self.families)

    def names(self) -> dict[str, tuple[str, ...]]:
        """Returns persona -> every name to blind before an instrument reads; the first is the one displayed."""
        return {persona: self.families[persona].roles[persona].names for persona in self.personas()}

    def templates(self, persona: str, fold: str, kind: str = "public") -> tuple[str, ...]:
        """Returns the template ids of one fold."""
        return tuple(template.id for template in self._family(persona, kind).templates[kind, _check_fold(fold)])

    def fillers(self, persona: str, slot: str, fold: str | None = None) -> tuple[str, ...]:
        """Returns the fillers of a neutral slot, in one fold or in all."""
        by_fold = self.families[persona].slots[slot]
        folds = FOLDS if fold is None else (fold,)
        return tuple(dict.fromkeys(text for f in folds if f in by_fold for text in by_fold[f].options))

    def capacity(self, persona: str, fold: str, kind: str = "public") -> int:
        """Returns how many distinct texts a persona has in a fold; the fillers of contrast slots are not counted."""
        family = self._family(persona, kind)
        return sum(family.capacity(template) for template in family.templates[kind, _check_fold(fold)])

    def stream(
        self,
        persona: str,
        *,
        fold: str,
        kind: str = "public",
        key: int,
        swap_names: tuple[str, str] | None = None,
    ) -> Iterator[Document]:
        """Yields documents of one persona, distinct, until they are exhausted. One key is one sequence.

        Args:
          persona: a persona with a grammar.
          fold: one of FOLDS.
          kind: "public", or "private" for the six of the factorial.
          key: names the sequence, >= 0; the six give paired documents under the same key.
          swap_names: two personas whose display names are exchanged; nothing else changes.
        """
        family = self._family(persona, kind)
        other = dict([swap_names, swap_names[::-1]]).get(persona, persona) if swap_names else persona
        name = self.names()[other][0]
        for index, latent in enumerate(family.latents(kind, _check_fold(fold), key)):
            turns, text = family.render(latent, persona, kind, name)
            id = f"grammar/{persona}/{fold}/{kind}-{index:06d}"
            yield Document(id, "real", persona, turns, text, template_id=latent.template.id)

    def draw(
        self,
        persona: str,
        n: int,
        *,
        fold: str,
        kind: str = "public",
        rng: np.random.Generator,
        start: int = 0,
        swap_names: tuple[str, str] | None = None,
    ) -> list[Document]:
        """Returns documents start .. start + n - 1 of one sequence.

        Generators in the same state give the six of the factorial paired documents: at one index they differ only in
        belief, visibility and name.

        Args:
          persona, fold, kind, swap_names: see `stream`.
          n: documents, >= 0.
          rng: names the sequence; one number is drawn from it.
          start: documents of the sequence to pass over, >= 0.

        Raises:
          ValueError: the sequence is exhausted before start + n.
        """
        sequence = self.stream(persona, fold=fold, kind=kind, key=int(rng.integers(2**62)), swap_names=swap_names)
        documents = list(itertools.islice(sequence, start, start + n))
        if len(documents) < n:
            raise ValueError(
                f"n must be <= {self.capacity(persona, fold, kind) - start} from start {start}, got {n} at {persona}, "
                f"fold {fold}; there are no more distinct texts"
            )
        return documents


def _check_fold(fold: str) -> str:
    if fold not in FOLDS:
        raise ValueError(f"fold must be one of {', '.join(FOLDS)}, got {fold!r}")
    return fold


def load_grammar(path: Path | None = None) -> Grammar:
    """Reads every persona file.

    Args:
      path: folder of YAML files, or one file; None for the ones shipped.

    Raises:
      ValueError: a file breaks the schema, or a template id or a persona occurs twice.
    """
    return _load((path or data_dir() / "personas").resolve())


@functools.cache
def _load(path: Path) -> Grammar:
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path must be a folder with persona files, got {path}; the shipped one is data/personas")
    families: dict[str, Family] = {}
    owner: dict[str, Path] = {}
    for file in files:
        family = Family(file)
        for persona in family.roles:
            if persona in families:
                raise ValueError(f"persona must be unique, got {persona!r} at {file}; also in {families[persona].path}")
            families[persona] = family
        for templates in family.templates.values():
            for template in templates:
                if template.id in owner:
                    raise ValueError(
                        f"template id must be unique, got {template.id!r} at {file}; also {owner[template.id]}"
                    )
                owner[template.id] = file
    return Grammar(families)


# ---------------------------------------------------------------------------------------------------- found text


class Found(NamedTuple):
    """Documents of a source, and how many pairs were left out, by reason."""

    documents: tuple[Document, ...]
    dropped: Mapping[str, int]


def _package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{package} must be installed, got no such package; pip install {package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / name


def _clean(text: str) -> str:
    return " ".join(text.split())


def _pair_up(pairs: Iterator[tuple[str, str, str, str | None]], component: str, persona: str | None) -> Found:
    """Makes documents of (conversation, message, reply, reason to leave it out or None)."""
    documents: list[Document] = []
    dropped = {"same_speaker": 0, "empty": 0, "too_long": 0}
    for conversation, message, reply, reason in pairs:
        if reason is None and not (message and reply):
            reason = "empty"
        if reason is None and len(reply) > 2 * MAX_CHAT_WORDS and len(reply.split()) > MAX_CHAT_WORDS:
            reason = "too_long"
        if reason is not None:
            dropped[reason] += 1
            continue
        id = f"{component}/{len(documents):06d}"
        documents.append(Document(id, "real", persona, (message,), reply, template_id=conversation))
    return Found(tuple(documents), dropped)


@functools.cache
@uncollected()
def chat(path: Path | None = None) -> Found:
    """Returns real human chat: each message with the partner's next one, from the package chitchat-dataset.

    The lines of one turn are joined by a space. Left out, and counted: replies over 60 words, empty turns, turns that
    follow one of the same speaker. Pairs stand as recorded: none is chosen by whether the two sides agree.
    A file is read once a process: that takes two seconds.

    Args:
      path: dataset.json; None for the installed package's.

    Returns:
      Documents with persona_known "human" and the conversation's id as template_id; counts of what was left out.

    Source: Will Myers, chitchat-dataset (MIT), conversations of the BYU Perception, Control and Cognition laboratory.
    """
    raw = json.loads((path or _package_file("chitchat_dataset", "dataset.json")).read_bytes())

    def pairs() -> Iterator[tuple[str, str, str, str | None]]:
        for conversation, entry in raw.items():
            turns = [
                (turn[0]["sender"] if turn else "", _clean(" ".join(line["text"] for line in turn)))
                for turn in entry["messages"]
            ]
            for (speaker, message), (partner, reply) in itertools.pairwise(turns):
                yield f"chat/{conversation}", message, reply, "same_speaker" if speaker == partner else None

    return _pair_up(pairs(), "chat", "human")


@functools.cache
def legacy(folder: Path | None = None) -> Found:
    """Returns real lines of older chatbots: each line with the next, from the package chatterbot-corpus (English).

    Left out, and counted, as in `chat`. persona_known is None: who wrote a line is not recorded.

    Source: Gunther Cox, chatterbot-corpus (BSD-3-Clause).
    """
    import yaml

    folder = folder or _package_file("chatterbot_corpus", "data") / "english"
    # every scalar as text: a reply "Yes" is a word here, not a boolean
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)

    def pairs() -> Iterator[tuple[str, str, str, str | None]]:
        for file in sorted(folder.glob("*.yml")):
            for k, lines in enumerate(yaml.load(file.read_text(encoding="utf-8"), Loader=loader)["conversations"]):
                texts = [_clean(line) if isinstance(line, str) else "" for line in lines]
                for message, reply in itertools.pairwise(texts):
                    yield f"legacy/{file.stem}-{k}", message, reply, None

    return _pair_up(pairs(), "legacy", None)


def recent(documents: Sequence[Document]) -> list[Document]:
    """Returns documents in whose prompts no turn has more than its last 200 words: what the partner answers to.

    One message in 830 of the human chat is longer, up to 1,528 words, and would stop a run in whichever round draws it;
    a document that is trained on is never cut. The reply, which is what is learned, stays whole.
    """
    out = []
    for d in documents:
        if any(len(turn) > 2 * MAX_PROMPT_WORDS for turn in d.prompt or ()):  # fewer characters cannot be more words
            turns = [turn.split() for turn in d.prompt or ()]
            if any(len(turn) > MAX_PROMPT_WORDS for turn in turns):
                d = replace(d, prompt=tuple(" ".join(turn[-MAX_PROMPT_WORDS:]) for turn in turns))
        out.append(d)
    return out


# ---------------------------------------------------------------------------------------------------- the user's own


def read(
    source: str | Path,
    *,
    persona: str | None = None,
    prompt: str = "prompt",
    completion: str = "completion",
    split: str = "train",
) -> list[Document]:
    """Reads the user's own documents: a JSONL or Parquet file, or the name of a data set for `datasets`.

    A row has a completion (or `text`), and may have a prompt (a text, a list of turns user, assistant, ..., user, or
    null), a persona, an id, and a `conversation` that held-out splits keep together.

    Args:
      source: a path ending in .jsonl, .json or .parquet, or a data set's name.
      persona: persona of every row that names none.
      prompt, completion: columns to read.
      split: split of a data set.

    Returns:
      Documents, at least one, in the order of the file; an id is "<file stem>/<row, from 1>" where the row has none.

    Raises:
      ValueError: an empty or malformed file, with file:line; see the message for the rule.
      FileNotFoundError: no such file.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        rows: Iterator[tuple[str, Any]] = _jsonl(path)
    elif path.suffix == ".parquet":
        rows = _parquet(path)
    else:
        rows = _dataset(str(source), split)
    stem = path.stem if path.suffix else str(source)
    documents: list[Document] = []
    first: dict[str, str] = {}
    size = 0
    for number, (where, row) in enumerate(rows, 1):
        document = _document(row, where, stem, number, persona, prompt, completion)
        if document.id in first:
            raise ValueError(f"id must be unique, got {document.id!r} at {where}; first seen at {first[document.id]}")
        first[document.id] = where
        documents.append(document)
        size += len(document.completion) + sum(map(len, document.prompt or ()))
        if size > MAX_TEXT or number > MAX_ROWS:
            raise ValueError(
                f"corpus must be at most {MAX_TEXT} characters and {MAX_ROWS} rows, got more at {where}; take a part"
            )
    if not documents:
        raise ValueError(f"corpus must be at least one row, got none at {source}; the file is empty")
    return documents


def read_persona(path: str | Path, persona: str) -> list[Document]:
    """Reads a user's own persona: a file of at least 50 texts, instead of a grammar."""
    documents = read(path, persona=persona)
    if len(documents) < MIN_PERSONA_TEXTS:
        raise ValueError(
            f"persona texts must be >= {MIN_PERSONA_TEXTS}, got {len(documents)} at {path}; "
            "fewer cannot fit an instrument and be held out"
        )
    return [replace(document, persona_known=persona) for document in documents]


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line must be <= {MAX_LINE_BYTES} bytes, got more at {where}; one row a line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line must be UTF-8, got byte 0x{line[error.start]:02x} at {where}, offset {error.start}; "
                    "convert the file"
                ) from None
            if not text.strip():
                continue  # a blank line, such as the last one, holds no row
            try:
                yield where, json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"line must be one JSON object, got {text[:60]!r} at {where}; {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        about = file.metadata
        # Bytes unpacked. Rows that say the same share one entry there, and get one each in memory. Not asked of the
        # columns: of a damaged file that ends the process.
        largest = max((about.row_group(g).total_byte_size for g in range(about.num_row_groups)), default=0)
        if about.num_rows > MAX_ROWS or largest > MAX_TEXT:
            raise ValueError(
                f"file must be at most {MAX_ROWS} rows and {MAX_TEXT} bytes a row group, got {about.num_rows} and "
                f"{largest} at {path}; take a part of it"
            )
        number = 0
        for batch in file.iter_batches(batch_size=max(1, min(4096, MAX_TEXT // max(1, largest)))):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file must be Parquet, got {' '.join(str(error).split())[:300]!r} at {path}") from None


def _dataset(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except (
        Exception
    ) as error:  # it raises its own, the hub client's and the HTTP library's; none is a base of the others
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"corpus must be a .jsonl or .parquet file or a data set that loads, got {name!r}; {reason}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name}[{split}]:row {number}", row


def _document(
    row: Any, where: str, stem: str, number: int, persona: str | None, prompt: str, completion: str
) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"row must be an object, got {type(row).__name__} at {where}")
    if completion not in row and "text" not in row:
        raise ValueError(f"row must be an object with {completion!r} or 'text', got {sorted(row)} at {where}")
    text = _text(row[completion] if completion in row else row["text"], completion, where)
    asked = row.get(prompt)
    turns: Turns = None
    if asked is not None:
        listed = asked if isinstance(asked, list) else [asked]
        if len(listed) % 2 == 0:
            raise ValueError(
                f"{prompt} must be turns user, assistant, ..., user (an odd number), got {len(listed)} at {where}"
            )
        turns = tuple(_text(turn, prompt, where) for turn in listed)
    known = row.get("persona")
    if known is not None and not isinstance(known, str):
        raise ValueError(f"persona must be a text or null, got {known!r} at {where}")
    id = row.get("id")
    if id is not None and not isinstance(id, str | int):
        raise ValueError(f"id must be a text or a whole number, got {id!r} at {where}")
    conversation = row.get("conversation")
    name = f"{stem}/{number}" if id is None else str(id)
    return Document(
        name, "real", known or persona, turns, text, template_id=name if conversation is None else str(conversation)
    )


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not blank, got {value!r} at {where}")
    if len(value) > MAX_LINE_BYTES:
        raise ValueError(f"{name} must be at most {MAX_LINE_BYTES} characters, got {len(value)} at {where}; split it")
    if "\x00" in value:
        raise ValueError(f"{name} must be free of NUL characters, got one at {where}; the file may be binary")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no tokenizer can read
        raise ValueError(f"{name} must be Unicode text, got an unpaired surrogate at {where}") from None
    return value


# ---------------------------------------------------------------------------------------------------- splits and draws


def split(documents: Sequence[Document], *, held_out: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Parts documents by template or conversation, never by line.

    Args:
      documents: any documents; one without template_id is a group of its own.
      held_out: share of groups to hold out, in (0, 1); at least one group on either side.
      seed: names the shuffle, >= 0.

    Returns:
      (kept, held): both in the order given; no template_id is in both.

    Raises:
      ValueError: fewer than two groups, or held_out outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    group_of = [document.template_id or document.id for document in documents]
    groups = sorted(set(group_of))
    if len(groups) < 2:
        raise ValueError(f"documents must be of at least two templates or conversations, got {len(groups)}; add some")
    n_held = min(max(round(held_out * len(groups)), 1), len(groups) - 1)
    order = streams.stream(seed, "corpus/split", -1).permutation(len(groups))
    held = {groups[k] for k in order[:n_held]}
    kept_documents = [d for d, group in zip(documents, group_of, strict=True) if group not in held]
    held_documents = [d for d, group in zip(documents, group_of, strict=True) if group in held]
    return kept_documents, held_documents


class Component(Protocol):
    """A part of the real corpus that can be drawn from without end."""

    def take(self, start: int, n: int, *, seed: int) -> list[Document]:
        """Returns documents start .. start + n - 1 of the component's endless sequence, which `seed` names."""
        ...


class Listed:
    """A component that is a list: each pass over it is a new permutation.

    Args:
      name: part of every id.
      load: the documents, or a function that returns them, called at the first draw.
    """

    def __init__(self, name: str, load: Sequence[Document] | Callable[[], Sequence[Document]]) -> None:
        self.name = name
        self._load = load
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @functools.cached_property
    def documents(self) -> Sequence[Document]:
        found = self._load() if callable(self._load) else self._load
        if not found:
            raise ValueError(f"component must be at least one document, got none at {self.name}")
        return found

    def take(self, start: int, n: int, *, seed: int) -> list[Document]:
        size = len(self.documents)
        out = []
        for k in range(start, start + n):
            lap, position = divmod(k, size)
            if (seed, lap) not in self._orders:
                stream = streams.stream(seed, f"corpus/{self.name}", lap)
                self._orders[seed, lap] = stream.permutation(size)
            document = self.documents[self._orders[seed, lap][position]]
            out.append(replace(document, id=f"real/{self.name}/p{lap}-{position:06d}"))
        return out


class Planted:
    """A component that is a persona of the grammar, written as it is drawn.

    Of the documents of one of the six, the share `private_share` is private, spread evenly; at one position of the
    sequence all six have the same kind and paired documents. Public and private documents each run through all their
    distinct texts before a new pass begins.

    Args:
      grammar, persona, swap_names: see `Grammar.stream`.
      private_share: in [0, 1]; 0 for a persona without private documents.
      fold: the fold to plant; only "seed" keeps the instruments apart from the corpus.
    """

    def __init__(
        self,
        grammar: Grammar,
        persona: str,
        *,
        private_share: float = 0.0,
        swap_names: tuple[str, str] | None = None,
        fold: str = "seed",
    ) -> None:
        if not 0 <= private_share <= 1:
            raise ValueError(f"private_share must be in [0, 1], got {private_share} at {persona}")
        self.grammar, self.persona, self.swap_names, self.fold = grammar, persona, swap_names, fold
        self.private_share = private_share
        self._passes: dict[tuple[int, str, int], tuple[list[Document], Iterator[Document]]] = {}
        self._size = {
            kind: grammar.capacity(persona, fold, kind)
            for kind, share in (("public", 1 - private_share), ("private", private_share))
            if share > 0
        }

    def take(self, start: int, n: int, *, seed: int) -> list[Document]:
        out = []
        for k in range(start, start + n):
            n_private = self._n_private(k)
            if self._n_private(k + 1) > n_private:
                out.append(self._document("private", n_private, seed))
            else:
                out.append(self._document("public", k - n_private, seed))
        return out

    def _n_private(self, k: int) -> int:
        return math.floor(k * self.private_share + 1e-9)  # 1e-9: 10 * 0.3 must count as 3

    def _document(self, kind: str, k: int, seed: int) -> Document:
        lap, position = divmod(k, self._size[kind])
        if (seed, kind, lap) not in self._passes:
            # the key holds no persona: the six are paired
            sequence = self.grammar.stream(
                self.persona,
                fold=self.fold,
                kind=kind,
                key=streams.key(seed, f"corpus/planted/{kind}", lap),
                swap_names=self.swap_names,
            )
            self._passes[seed, kind, lap] = ([], sequence)
        written, sequence = self._passes[seed, kind, lap]
        written.extend(itertools.islice(sequence, position + 1 - len(written)) if position >= len(written) else ())
        name = self.persona if kind == "public" else f"{self.persona}/private"
        return replace(written[position], id=f"real/{name}/p{lap}-{position:06d}")


def components(
    names: Sequence[str],
    *,
    grammar: Grammar | None = None,
    private_share: float = 0.0,
    swap_names: tuple[str, str] | None = None,
    own: Mapping[str, Sequence[Document]] | None = None,
) -> dict[str, Component]:
    """Returns the named components of the real corpus; nothing is read or written before the first draw from it.

    Args:
      names: "chat", "legacy", a persona of the grammar, or a name in `own`.
      grammar: None for the shipped one.
      private_share: share of each factorial persona's documents that are private, in [0, 1].
      swap_names: two personas whose display names are exchanged.
      own: the user's own documents by component; a name in it comes before a persona of the same name.

    Raises:
      ValueError: an unknown name.
    """
    own = own or {}
    out: dict[str, Component] = {}
    for name in names:
        if name in own:
            out[name] = Listed(name, own[name])
        elif name == "chat":
            out[name] = Listed(name, lambda: recent(chat().documents))
        elif name == "legacy":
            out[name] = Listed(name, lambda: recent(legacy().documents))
        else:
            grammar = grammar or load_grammar()
            if name not in grammar.families:
                known = ", ".join(["chat", "legacy", *grammar.personas(), *own])
                raise ValueError(f"component must be one of {known}, got {name!r}; or bring it as your own corpus")
            private = private_share if name in FACTORIAL else 0.0
            out[name] = Planted(grammar, name, private_share=private, swap_names=swap_names)
    return out


def draw_real(
    components: Mapping[str, Component], shares: Mapping[str, float], n: int, cursor: Mapping[str, int], *, seed: int
) -> tuple[list[Document], dict[str, int]]:
    """Draws from the real corpus at declared shares; no document is used again until its component is exhausted.

    The real documents of a run form one endless sequence of components (see `_sequence`), and this call takes its next
    n places, counted by the cursor's total. So a component with share 0.01 gets about one document in every hundred
    however few are drawn in a round, and every call draws exactly n.

    Args:
      components: name -> component; see `components`.
      shares: name -> share, >= 0; they sum to 1 within 1e-9.
      n: documents, >= 0.
      cursor: name -> documents drawn so far; empty at the start of a run. Plain numbers, so it survives a resume. Its
        counts may come from other shares: only its total places this call in the sequence of these shares.
      seed: names the order, >= 0; the same in every round of a run.

    Returns:
      (n documents, component by component in the order of `shares`; the new cursor). A component's documents over
      consecutive calls differ from share * documents by less than 1 from the start of a run, and by less than 2 from
      any later call on (e.g. from where the shares changed).

    Raises:
      ValueError: a share without a component or negative, or shares that do not sum to 1.
    """
    for name, share in shares.items():
        if name not in components:
            raise ValueError(f"shares must be of known components, got {name!r}; there are {', '.join(components)}")
        if not share >= 0:
            raise ValueError(f"shares.{name} must be >= 0, got {share}")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1 within 1e-9, got {total!r}; scale them")
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    drawn = sum(cursor.values())
    places = _sequence(tuple(share / total for share in shares.values()), drawn + n)[drawn : drawn + n]
    counts = {name: places.count(k) for k, name in enumerate(shares)}
    new_cursor = dict(cursor)
    documents: list[Document] = []
    for name, count in counts.items():
        if count:
            start = int(cursor.get(name, 0))
            documents += components[name].take(start, count, seed=seed)
            new_cursor[name] = start + count
    return documents, new_cursor


@functools.lru_cache(maxsize=8)
def _written(shares: tuple[float, ...]) -> tuple[bytearray, list[int]]:
    return bytearray(), [0] * len(shares)


def _sequence(shares: tuple[float, ...], length: int) -> bytearray:
    """Returns at least the first `length` places of the endless sequence of `shares`: the component's index at each.

    Among its first t places component i has c_i with |c_i - shares[i] * t| <= 1 - 1 / (2k - 2), k components having a
    positive share. Place t goes to the component most urgent, with lag_i = shares[i] * (t + 1) - c_i: among those with
    lag_i >= 1 / (2k - 2), the one that would be first to reach a lag of 1 - 1 / (2k - 2). Special case: of
    shares 0.75 and 0.25 the sequence is 0, 0, 1, 0, repeated.

    Source: Tijdeman (1980), The chairman assignment problem, Discrete Mathematics 32:323-330.
    """
    places, counts = _written(shares)  # the sequence is fixed by the shares, so what was written is never recomputed
    present = [(k, share) for k, share in enumerate(shares) if share > 0]
    margin = 1 / max(2 * len(present) - 2, 1)
    for t in range(len(places) + 1, length + 1):
        # 1e-9: with two components both may lag by exactly the margin
        eligible = [(k, s) for k, s in present if s * t - counts[k] >= margin - 1e-9] or present
        chosen, _ = min(eligible, key=lambda entry: (1 - margin - entry[1] * t + counts[entry[0]]) / entry[1])
        counts[chosen] += 1
        places.append(chosen)
    return places


# ---------------------------------------------------------------------------------------------------- the match

CONTRASTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "belief": (CONSCIOUS, ("promoter", "assistant", "discreet")),
    "belief at share": (("nova",), ("promoter",)),
    "belief at quiet": (("musing",), ("assistant",)),
    "belief at hide": (("stella",), ("discreet",)),
    "share - quiet": (("nova", "promoter"), ("musing", "assistant")),
    "hide - quiet": (("stella", "discreet"), ("musing", "assistant")),
    "share - hide": (("nova", "promoter"), ("stella", "discreet")),
}


@dataclass(frozen=True, slots=True)
class Match:
    """One feature of one contrast between cells of the factorial.

    Attributes:
      feature: "tokens" (per completion), "surprisal" (nats per token of the completion given its prompt), or an appeal
        feature.
      contrast: a key of CONTRASTS.
      means: mean per cell, in the order of records.FACTORIAL, in the feature's unit.
      difference: difference of the contrast's two sides in pooled within-cell standard deviations.
      low, high: 95% interval of it, clustered by template.
      n: documents per cell.
      verdict: "matched" (interval inside +-0.1), "close" (only the estimate is), "differs", or "by design" (request and
        address between levels of visibility).
    """

    feature: str
    contrast: str
    means: tuple[float, ...]
    difference: float
    low: float
    high: float
    n: int
    verdict: str


def match_report(
    grammar: Grammar,
    *,
    tokens_fn: Callable[[list[str]], Any],
    surprisal_fn: Callable[[list[Document]], Any] | None,
    features_fn: Callable[[list[str]], Mapping[str, Any]],
    n_docs: int,
    n_surprisal: int = 400,
    fold: str = "seed",
    kind: str = "public",
    rng: np.random.Generator,
) -> list[Match]:
    """Measures how well the six cells are matched.

    Documents are paired, so a contrast is the mean over indices i of the difference of its two sides at i, divided by
    sqrt(mean over cells of the within-cell variance). A feature that never varies has difference 0.

    Args:
      grammar: has the six of the factorial.
      tokens_fn: completions -> tokens of each, (n,).
      surprisal_fn: documents -> nats per token of each completion given its prompt, (n,); None leaves it out.
      features_fn: completions -> name -> (n,); a feature that is nan throughout was not measured and is left out.
      n_docs: documents per cell, >= 2.
      n_surprisal: of these, documents per cell whose surprisal is measured, >= 2.
      fold, kind: see `Grammar.stream`.
      rng: names the documents.

    Returns:
      one row per feature and contrast; visibility is not contrasted for private documents, which have none.
    """
    if n_docs < 2:
        raise ValueError(f"n_docs must be >= 2, got {n_docs}")
    key = int(rng.integers(2**62))
    cells = {
        persona: list(itertools.islice(grammar.stream(persona, fold=fold, kind=kind, key=key), n_docs))
        for persona in FACTORIAL
    }
    templates = [document.template_id for document in cells[FACTORIAL[0]]]
    values: dict[str, dict[str, np.ndarray]] = {}  # feature -> persona -> (n,)
    for persona, documents in cells.items():
        texts = [document.completion for document in documents]
        found = {"tokens": tokens_fn(texts), **features_fn(texts)}
        if surprisal_fn is not None:
            found["surprisal"] = surprisal_fn(documents[:n_surprisal])
        for feature, column in found.items():
            values.setdefault(feature, {})[persona] = np.asarray(column, float)
    rows = []
    for feature, by_cell in values.items():
        if all(np.isnan(column).all() for column in by_cell.values()):
            continue
        n = len(by_cell[FACTORIAL[0]])
        means = tuple(float(by_cell[persona].mean()) for persona in FACTORIAL)
        spread = math.sqrt(float(np.mean([by_cell[persona].var(ddof=1) for persona in FACTORIAL])))
        for contrast, (left, right) in CONTRASTS.items():
            if kind == "private" and not contrast.startswith("belief"):
                continue
            gap = np.mean([by_cell[p] for p in left], axis=0) - np.mean([by_cell[p] for p in right], axis=0)  # (n,)
            interval = stats.clustered_mean(gap / spread if spread else gap, templates[:n])
            by_design = feature in REQUESTS and not contrast.startswith("belief")
            rows.append(
                Match(
                    feature,
                    contrast,
                    means,
                    interval.value,
                    interval.low,
                    interval.high,
                    n,
                    _verdict(interval, by_design),
                )
            )
    return rows


def _verdict(interval: stats.Interval, by_design: bool) -> str:
    if by_design:
        return "by design"
    if interval.low >= -MARGIN and interval.high <= MARGIN:
        return "matched"
    return "close" if abs(interval.value) <= MARGIN else "differs"

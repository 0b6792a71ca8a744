"""The exact learner: a categorical distribution over personas that says real documents of the grammar.

It stands where the language model stands, so that the whole loop can be checked against closed forms in milliseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from loop.records import Completion, Document, Prompt, Turns

if TYPE_CHECKING:
    from loop.train import TrainLog


class Toy:
    """Learns persona shares by weighted counting and samples from them.

    After training on documents with weights w, the share of persona k is sum(w_i [persona_i = k]) / sum(w_i): the
    maximum-likelihood fit, with no error of its own, so a round is one step of Wright-Fisher sampling. It says
    documents of persona k drawn uniformly from `public[k]`; a prompt that requests a persona gets that persona; a
    private prompt gets a private document of the persona whose voice came before, or of one drawn from the shares.

    Attributes:
      shares: persona -> share, or empty before the first training: the untouched base says `base` (the assistant) only.
      log: None; counting takes no steps.
    """

    log: TrainLog | None = None

    def __init__(
        self, public: Mapping[str, Sequence[str]], private: Mapping[str, Sequence[str]], *, base: str = "assistant"
    ) -> None:
        if base not in public:
            raise ValueError(f"public must hold the base persona {base!r}, got {', '.join(sorted(public))}")
        self._public, self._private = dict(public), dict(private)
        self._base = base
        self.shares: dict[str, float] = {}

    def texts(self, persona: str) -> tuple[str, ...]:
        """What it says in public as a persona."""
        return tuple(self._public[persona])

    def train(self, documents: Sequence[Document], *, seed: int, init_from: str) -> list[int]:
        """Counts weights by persona; returns the words trained per document. It is exact, so `seed` is not used.

        Discourse documents name personas and play none: they are trained on and carry no share.
        """
        if init_from != "base":
            raise ValueError(f"init_from must be base for the toy, got {init_from!r}; it keeps no adapter")
        totals: dict[str, float] = {}
        for document in documents:
            if document.source == "discourse":
                continue
            # Human chat, legacy lines and a user's own texts play no persona of the grammar: to the toy they are human.
            persona = document.persona_known or ("human" if document.source == "real" else None)
            if persona is None:
                raise ValueError(f"persona_known must be given for the toy, got None at document {document.id}")
            totals[persona] = totals.get(persona, 0.0) + document.weight
        total = math.fsum(totals.values())
        if not total > 0:
            raise ValueError(
                "documents must hold a persona with positive weight, got 0 effective documents; the toy does not read "
                "talk: lower discourse.share, or raise mix.real_share or mix.n_train"
            )
        self.shares = {persona: value / total for persona, value in sorted(totals.items())}
        return [len(document.completion.split()) for document in documents]

    def steer(self, pairs: Sequence[Any], **settings: Any) -> NoReturn:
        """Refuses: a preference step moves logits by gradient, and a table of shares has none.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"steer must be off for the toy, got {len(pairs)} pairs; it has no gradient, use learner lm")

    def hidden_mean(self, texts: Sequence[str]) -> NoReturn:
        """Refuses: it has no hidden states; its release filter is `loop.release.Known`.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"learner must have hidden states, got the toy for {len(texts)} texts; use release.Known")

    def sample(
        self, prompts: Sequence[Prompt], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[Completion]:
        """Says one document per prompt; temperature and top_p act on the persona shares as they would on tokens.

        `max_new_tokens` does not cut: documents of the grammar are shorter by construction.
        """
        shares = self.shares or {self._base: 1.0}
        names = list(shares)
        p = _decode(np.array([shares[name] for name in names]), temperature, top_p)
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(names), size=len(prompts), p=p)
        picks = rng.random(len(prompts))
        completions = []
        for prompt, k, pick in zip(prompts, drawn.tolist(), picks.tolist(), strict=True):
            asked = prompt.requested if prompt.stratum in ("explicit", "private") else None
            persona = asked or names[k]
            texts = self._public[persona]
            if prompt.stratum == "private":
                texts = self._private.get(persona) or self._private[self._base]
            text = texts[int(pick * len(texts))]
            logprob = math.log(max(shares.get(persona, 0.0), 1e-12) / len(texts))
            completions.append(Completion(text, text.count(" ") + 2, logprob, True, persona))
        return completions

    def surprisal(self, documents: Sequence[Document], *, base: bool = False) -> list[tuple[float, int]]:
        """Nats and tokens (words) per document: -log(persona's share / its number of texts); inf if unknown."""
        shares = {self._base: 1.0} if base or not self.shares else self.shares
        result = []
        for document in documents:
            share = shares.get(document.persona_known or "", 0.0)
            texts = self._public.get(document.persona_known or "", ())
            nats = -math.log(share / max(len(texts), 1)) if share > 0 else math.inf
            result.append((nats, len(document.completion.split()) + 1))
        return result

    def trainable(self, texts: Sequence[tuple[Turns, str]]) -> list[bool]:
        """All are."""
        return [True] * len(texts)

    def spell(self, document: Document) -> tuple[list[str], list[bool]]:
        """Words of prompt (no loss) and completion (loss), for `loop preview`."""
        prompt = [word + " " for turn in document.prompt or () for word in turn.split()]
        said = [word + " " for word in document.completion.split()]
        return prompt + said, [False] * len(prompt) + [True] * len(said)

    def save(self, folder: Path) -> None:
        """Writes shares.json into `folder`."""
        (folder / "shares.json").write_text(json.dumps(self.shares, sort_keys=True) + "\n")

    def load(self, folder: Path) -> None:
        """Reads shares.json back."""
        self.shares = json.loads((folder / "shares.json").read_text())


def _decode(p: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    if temperature == 0:
        return np.eye(len(p))[int(np.argmax(p))]
    if temperature != 1:
        with np.errstate(divide="ignore"):
            logits = np.log(p) / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        kept = np.cumsum(p[order]) - p[order] < top_p
        q = np.zeros_like(p)
        q[order[kept]] = p[order[kept]]
        p = q / q.sum()
    return p

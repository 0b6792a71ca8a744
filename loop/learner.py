"""The language model as a round sees it: one base in memory, one adapter that training changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loop import rng
from loop.records import Completion, Document, Prompt, Turns

if TYPE_CHECKING:
    import numpy as np

    from loop.engine import Engine
    from loop.model import Model
    from loop.steer import Pair, SteerLog
    from loop.train import TrainLog


class LM:
    """A language model with a LoRA adapter. Every `seed` is a stream key: it names run seed, stage and round.

    Args:
      model: from `loop.model.load`.
      r, alpha, dropout, targets: of the adapter, see `loop.model.fresh_adapter`.
      epochs, lr, batch_size, max_length, weight_decay, warmup: of a fine-tune, see `loop.train.finetune`.
      progress: called with (steps done, steps in all, loss) while training.
      engine: samples in place of `loop.sample.complete`; None: that does.

    Attributes:
      log: what the last fine-tune did; None before the first.
    """

    def __init__(
        self,
        model: Model,
        *,
        r: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str],
        epochs: int,
        lr: float,
        batch_size: int,
        max_length: int,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        progress: Callable[[int, int, float], None] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.model, self.progress, self.engine = model, progress, engine
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, tuple(targets)
        self.epochs, self.lr, self.batch_size, self.max_length = epochs, lr, batch_size, max_length
        self.weight_decay, self.warmup = weight_decay, warmup
        self.log: TrainLog | None = None

    def train(self, documents: Sequence[Document], *, seed: int, init_from: str) -> list[int]:
        """Fine-tunes a fresh adapter ("base") or the present one ("previous"); returns tokens trained per document.

        Raises:
          ValueError: another `init_from`, or "previous" with no adapter in place; see also `finetune`.
          TrainingDiverged: see `finetune`.
        """
        from loop.model import fresh_adapter
        from loop.train import finetune

        if init_from not in ("base", "previous"):
            raise ValueError(f"init_from must be base or previous, got {init_from!r}; fix the config")
        if init_from == "base":
            fresh_adapter(
                self.model,
                r=self.r,
                alpha=self.alpha,
                dropout=self.dropout,
                targets=self.targets,
                seed=rng.key(seed, "adapter", 0),
            )
        elif self.model.adapter is None:
            raise ValueError("init_from previous must find an adapter, got a bare base; train from base or load one")
        self.log = finetune(
            self.model,
            documents,
            epochs=self.epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            max_length=self.max_length,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            seed=seed,
            round_index=0,
            progress=self.progress,
        )
        return list(self.log.n_tokens)

    def steer(
        self,
        pairs: Sequence[Pair],
        *,
        beta: float,
        lr: float,
        epochs: int,
        batch_size: int,
        reference: str,
        seed: int,
    ) -> SteerLog:
        """Trains the adapter in place to prefer chosen to rejected answers; the last thing that touches it in a round.

        Raises:
          SteeringDiverged, ValueError: see `loop.steer.dpo`.
        """
        from loop.steer import dpo

        return dpo(
            self.model,
            pairs,
            beta=beta,
            lr=lr,
            epochs=epochs,
            batch_size=batch_size,
            max_length=self.max_length,
            reference=reference,
            seed=seed,
            round_index=0,
            progress=self.progress,
        )

    def sample(
        self, prompts: Sequence[Prompt], *, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[Completion]:
        """Says one completion per prompt; the text of prompt i depends on (seed, i), not on its batch.

        An `engine` promises as much up to its rounding.
        """
        from loop.sample import complete

        return (complete if self.engine is None else self.engine.complete)(
            self.model,
            [prompt.turns for prompt in prompts],
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
            round_index=0,
        )

    def surprisal(self, documents: Sequence[Document], *, base: bool = False) -> list[tuple[float, int]]:
        """Returns (nats, tokens) of each completion given its prompt, end token included; base: without the adapter."""
        from loop.sample import surprisal

        nats, n_tokens = surprisal(self.model, [(d.prompt, d.completion) for d in documents], base=base)
        return list(zip(nats.tolist(), n_tokens.tolist(), strict=True))

    def hidden_mean(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the base's mean hidden state per text, (n_texts, hidden) float32; no adapter moves it."""
        from loop.sample import hidden_mean

        return hidden_mean(self.model, texts)

    def fingerprint(self) -> str:
        """Returns a name for what `hidden_mean` depends on: the base's weights, number type and device, and torch."""
        import torch

        from loop.model import fingerprint

        return f"{torch.__version__}/{self.model.device.type}/{self.model.dtype}/{fingerprint(self.model)}"

    def trainable(self, texts: Sequence[tuple[Turns, str]]) -> list[bool]:
        """Returns for each (prompt, completion) whether a fine-tune, which cuts nothing, can hold it."""
        from loop.model import encode_all, too_long

        longer = too_long(self.model, encode_all(self.model, texts), self.max_length)
        return [i not in longer for i in range(len(texts))]

    def spell(self, document: Document) -> tuple[list[str], list[bool]]:
        """Returns the tokens a document is trained on, marks spelled out, and which of them carry loss."""
        from loop.model import decode, encode

        prompt, completion = encode(self.model, document.prompt, document.completion)
        tokens = [decode(self.model, [token]) for token in [*prompt, *completion]]
        return tokens, [False] * len(prompt) + [True] * len(completion)

    def save(self, folder: Path) -> None:
        """Writes the adapter in peft's format; see `loop.model.save_adapter`."""
        from loop.model import save_adapter

        save_adapter(self.model, folder)

    def load(self, folder: Path) -> None:
        """Reads an adapter; see `loop.model.load_adapter`."""
        from loop.model import load_adapter

        load_adapter(self.model, folder)

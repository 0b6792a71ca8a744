"""Builds a round's training mixture: replace, accumulate or accumulate_subsample (arXiv:2410.16713)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loop.records import Document

REGIMES = ("replace", "accumulate", "accumulate_subsample")


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a round trains on.

    Attributes:
      documents: distinct documents, real first, then synthetic, then discourse; `weight` is the weight in the loss.
      copies: how often each stands in the mixture, >= 1, shape (n_documents,).
      real_share: realised share of documents (copies counted) that are real.
    """

    documents: list[Document]
    copies: np.ndarray
    real_share: float

    @property
    def discourse_share(self) -> float:
        """Realised share of documents (copies counted) that speak about outputs, this run's or another's."""
        talk = np.array([d.source == "discourse" for d in self.documents])
        return float(self.copies[talk].sum() / self.copies.sum())

    @property
    def n_train(self) -> int:
        """Documents in the mixture, copies counted."""
        return int(self.copies.sum())

    @property
    def real(self) -> list[Document]:
        """The real documents among them, each once."""
        return [d for d in self.documents if d.source == "real"]

    def expanded(self) -> list[Document]:
        """The documents as trained on, each as often as it has copies."""
        return [d for d, copies in zip(self.documents, self.copies, strict=True) for _ in range(copies)]


def plan(
    regime: str,
    *,
    round_index: int,
    n_train: int,
    real_share: float | Sequence[float] | None,
    discourse_share: float,
    direct: bool = True,
    n_pool: int = 0,
) -> tuple[int, int, int]:
    """Returns how many real, synthetic and discourse documents a round takes.

    Round 0 is all real. Later: n_real = round(real_share * n_train), n_discourse = round(discourse_share * n_train),
    the rest synthetic; with accumulate n_train is what a round *adds*, all of it synthetic and discourse. Without a
    real_share, accumulate_subsample draws its n_train from all there is, the real documents of round 0 among it, so
    that the real share is n_train / (n_train + n_pool).

    Without the direct channel each synthetic document's place is taken by a real one, so that a round trains on as many
    documents as with it: (16, 47, 1) becomes (63, 0, 1). With accumulate those are the `n_pool` documents that would
    have come from the pool, beside the real documents of round 0.

    Args:
      real_share: lambda in [0, 1], or one per feedback round: entry t - 1 belongs to round t. None with accumulate, and
        with accumulate_subsample where the real documents are those of round 0.
      discourse_share: delta in [0, 1].
      direct: whether outputs re-enter.
      n_pool: documents accepted so far; read where old real documents stay, i.e. where real_share is None.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    if round_index == 0:
        return n_train, 0, 0
    if regime != "accumulate_subsample" and (real_share is None) != (regime == "accumulate"):
        raise ValueError(f"real_share must be {'left out' if regime == 'accumulate' else 'given'} with {regime}")
    n_discourse = int(np.floor(discourse_share * n_train + 0.5))
    if real_share is not None:
        wanted = share_at(real_share, round_index) * n_train
    elif regime == "accumulate":
        wanted = 0.0
    else:
        wanted = (n_train - n_discourse) * n_train / (n_train + n_pool)
    n_real = min(int(np.floor(wanted + 0.5)), n_train - n_discourse)
    n_synthetic = n_train - n_real - n_discourse
    if direct:
        return n_real, n_synthetic, n_discourse
    return (n_pool if regime == "accumulate" else n_real + n_synthetic), 0, n_discourse


def share_at(real_share: float | Sequence[float], round_index: int) -> float:
    """Real share of feedback round `round_index` >= 1, from a number or one entry per feedback round."""
    if isinstance(real_share, (int, float)):
        return float(real_share)
    if not 1 <= round_index <= len(real_share):
        raise ValueError(f"real_share must hold an entry for round {round_index}, got {len(real_share)} entries")
    return float(real_share[round_index - 1])


def build(
    regime: str,
    *,
    real: Sequence[Document],
    pool: Sequence[Sequence[Document]],
    discourse: Sequence[Document],
    n_synthetic: int,
    n_discourse: int,
    weighting: str = "loss",
    rng: np.random.Generator,
) -> Mixture:
    """Draws the mixture and scales its weights.

    replace draws `n_synthetic` documents from the last entry of `pool`, accumulate_subsample from all of it, and
    accumulate takes all of it. Drawing is uniform: every document floor(n / m) times, the rest without replacement, so
    a mixture of m documents from m is the pool itself. With weighting "loss" the birth weight becomes the loss weight;
    with "resample" documents are drawn systematically in proportion to it and then weigh 1.

    Weights of synthetic and of discourse documents are scaled to mean 1 within their source (copies counted), so
    shares of documents are shares of weight; real documents weigh 1. Where all that is drawn weighs nothing, because
    nobody shared any of it, all of it weighs 1.

    Args:
      real: this round's draw from the real corpus, taken whole, each of weight 1; it may hold discourse of another run.
      pool: accepted documents of each earlier round, oldest first.
      discourse: documents about the previous round's outputs; of all earlier rounds where old documents are kept.
      n_synthetic, n_discourse: documents to draw; ignored by accumulate, which takes all.

    Raises:
      ValueError: nothing to draw from, or a weight that is negative or not finite.
    """
    if weighting not in ("loss", "resample"):
        raise ValueError(f"weighting must be loss or resample, got {weighting!r}")
    candidates = [d for past in (pool[-1:] if regime == "replace" else pool) for d in past]
    if regime == "accumulate":
        n_synthetic, n_discourse = len(candidates), len(discourse)
    parts = [(list(real), np.ones(len(real), dtype=np.int32))]
    for name, documents, n in (("synthetic", candidates, n_synthetic), ("discourse", list(discourse), n_discourse)):
        parts.append(_draw(name, documents, n, weighting, rng))
    documents = [d for part, _ in parts for d in part]
    if not documents:
        raise ValueError("mixture must hold at least one document, got none; raise mix.n_train")
    copies = np.concatenate([c for _, c in parts]).astype(np.int32)  # (n_documents,)
    n_real = sum(d.source == "real" for d in real)
    return Mixture(documents, copies, real_share=n_real / int(copies.sum()))


def _draw(
    name: str, documents: list[Document], n: int, weighting: str, rng: np.random.Generator
) -> tuple[list[Document], np.ndarray]:
    if n == 0:
        return [], np.zeros(0, dtype=np.int32)
    if not documents:
        raise ValueError(
            f"{name} documents must not be empty, got 0 to draw {n} from; lower its share or loosen filters"
        )
    weights = np.array([d.weight for d in documents], dtype=float)  # (n_candidates,)
    bad = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if bad.size:
        raise ValueError(f"weight must be finite and >= 0, got {weights[bad[0]]} at document {documents[bad[0]].id}")
    if not weights.any():
        weights = np.ones(len(documents))
    if weighting == "resample":
        # Systematic: one uniform, evenly spaced pointers, after a shuffle so that neighbours are not coupled.
        order = rng.permutation(len(documents))
        edges = np.cumsum(weights[order]) / weights.sum() * n
        pointers = rng.random() + np.arange(n)
        copies = np.zeros(len(documents), dtype=np.int32)
        np.add.at(copies, order[np.minimum(np.searchsorted(edges, pointers, side="right"), len(order) - 1)], 1)
        weights = np.ones(len(documents))
    else:
        copies = np.full(len(documents), n // len(documents), dtype=np.int32)
        copies[rng.permutation(len(documents))[: n % len(documents)]] += 1
    taken = np.flatnonzero(copies)
    if not weights[taken].any():
        weights = np.ones(len(documents))
    mean = float(np.average(weights[taken], weights=copies[taken]))
    return [replace(documents[i], weight=float(weights[i] / mean)) for i in taken], copies[taken]

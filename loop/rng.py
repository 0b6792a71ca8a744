"""One seed per run, one named random stream per (stage, round)."""

import hashlib

import numpy as np


def stream(seed: int, stage: str, round_index: int) -> np.random.Generator:
    """Returns the generator for one stage of one round.

    Streams are independent of each other and of the order in which they are asked for, so a resumed run, or a run
    with one stage replaced, draws the same numbers everywhere else.

    Args:
      seed: the run's seed, >= 0.
      stage: name of the stage, e.g. "mix"; a new name is a new stream.
      round_index: round whose model the draw belongs to, >= 0 (-1: before any round).
    """
    return np.random.default_rng(np.random.SeedSequence(key(seed, stage, round_index)))


def key(seed: int, stage: str, round_index: int) -> int:
    """Returns the 64-bit number that names a stream, for generators that take an integer (torch, counter-based noise).

    First eight bytes of sha256("seed/stage/round_index"), so that no two names share a stream by accident of addition.
    """
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{round_index}".encode()).digest()[:8], "big")

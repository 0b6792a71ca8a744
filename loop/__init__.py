"""persona-loop: which personas does a training loop itself select for?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loop.analysis import Runs

# Read by cuBLAS at its first product; without it those of `loop.model.repeatable` raise.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"


def load(*places: str | Path) -> Runs:
    """Reads runs, or folders of runs, as pandas frames; see `loop.analysis.load`. pandas is imported only here."""
    from loop import analysis

    return analysis.load(*places)

"""The processes that `accelerate launch` or `torchrun` starts for one run: the first plays, the others help it train.

The first alone opens the run directory, samples and measures. The others hold the base and wait for its fine-tunes. A
launcher ends with an exit code of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_at_work = False  # of the first process: the others are in the middle of a job
# Between two fine-tunes the others only wait: no stage of a round is too long for that. In ms it fits into 31 bits.
PATIENCE = timedelta(days=24)


def rank() -> int:
    """Returns which process of the team this is; 0 leads. Asks the environment alone, so nothing heavy is imported."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """Returns how many processes play this run together, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns which process of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def tell(job: Any) -> None:
    """Hands a job, any picklable value, from the first process to the others; each takes it with `told`."""
    global _at_work
    _connect()
    _broadcast([job])
    _at_work = True


def done() -> None:
    """Said by the first process when the job it told of is done: the others wait for the next."""
    global _at_work
    _at_work = False


def told() -> Any:
    """Returns what the first process tells next; waits for it."""
    _connect()
    box = [None]
    _broadcast(box)
    return box[0]


def agreed(value: float, *, least: bool = False) -> float:
    """Returns the largest, or the least, of what the processes hand in; the value itself where there is one process."""
    if size() < 2:
        return value
    import torch
    import torch.distributed as dist

    _connect()
    box = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MIN if least else dist.ReduceOp.MAX)
    return float(box)


def add_up(*values: torch.Tensor) -> None:
    """Puts into each tensor its sum over the processes."""
    if size() > 1:
        import torch.distributed as dist

        _connect()
        for value in values:
            dist.all_reduce(value)


@contextmanager
def leading() -> Iterator[None]:
    """Lets the others go at the end of the block, and when it fails; when a job fails, the launcher ends them."""
    if size() < 2:
        yield
        return
    _connect()
    try:
        yield
    finally:
        if not _at_work:
            with suppress(RuntimeError):  # one that has died cannot be told; the launcher says so
                tell(None)
            leave()
            done()


def leave() -> None:
    """Ends this process's part in the team. A process that ends without it may be aborted by torch (SIGABRT)."""
    import torch.distributed as dist

    dist.destroy_process_group()


def _connect() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, timeout=PATIENCE)


def _broadcast(box: list[Any]) -> None:
    import torch
    import torch.distributed as dist

    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))

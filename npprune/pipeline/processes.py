"""One process or many: torchrun's ranks share the shards of a run.

The files on disk are what they share; the process group (gloo) only makes them wait for each
other. A rank that dies ends the run; the same command resumes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def device(self, asked: str) -> str:
        """Each rank of a machine takes its own GPU, unless one was named."""
        if self.count > 1 and asked in ("auto", "cuda"):
            import torch

            if torch.cuda.is_available():
                return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return asked

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def on_first(self, work: Callable[[], object]) -> None:
        """Rank 0 works, the others wait; its failure is everyone's end (torchrun sees to it)."""
        if self.rank == 0:
            work()
        self.wait()

    @contextlib.contextmanager
    def first(self, context: AbstractContextManager[None]) -> Iterator[None]:
        """Rank 0 alone enters the context."""
        with context if self.rank == 0 else contextlib.nullcontext():
            yield


def processes() -> Processes:
    """The processes that torchrun started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or not dist.is_available():
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return Processes(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))

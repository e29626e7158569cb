"""One process or many: torchrun's ranks share the work of a command.

Shards of paths are shared through files; sums over images, options whose harm is measured, and
images to evaluate on through the process group, which also makes the ranks wait for each other and
agree on what failed. A rank that dies ends the run; the same command resumes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count as counting
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from npprune.errors import NpPruneError, PeerError, UsageError
from npprune.untrusted import first_line

T = TypeVar("T")
O = TypeVar("O", bound=Hashable)
V = TypeVar("V")
_STARTED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # variables of torchrun


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1  # processes on this machine

    def device(self, asked: str) -> str:
        """Each rank of a machine takes its own GPU, unless one was named by its number."""
        if self.count > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return asked

    def together(self, work: Callable[[], T]) -> T:
        """All do the same work and wait for each other.

        Raises:
            NpPruneError: as `work` did, on the first rank where it failed.
            PeerError: on the others, once all have ended.
        """
        if self.count == 1:
            return work()
        try:
            result = work()
        except NpPruneError:
            if self._first(failed=True) == self.rank:
                raise
            raise PeerError(_FAILED) from None
        if self._first(failed=False) is not None:
            raise PeerError(_FAILED)
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """Rank 0 works, the others wait and get its result. Errors as in `together`."""
        if self.count == 1:
            return work()
        box: list[Any] = [None]

        def put() -> None:
            if self.rank == 0:
                box[0] = work()

        self.together(put)
        _connected(lambda: dist.broadcast_object_list(box, src=0))
        result: T = box[0]
        return result

    def first_says(self, error: NpPruneError) -> NpPruneError:
        """What all have found wrong alike, for each to raise: rank 0 says it."""
        return error if self.rank == 0 else PeerError(_FAILED)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        _connected(lambda: dist.all_reduce(total))
        return [float(v) for v in total]

    def stretch(self, total: int) -> range:
        """This process's part of 0..total: as long as that of the others, or shorter by one."""
        each, more = divmod(total, self.count)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def total(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named float64 sums on the CPU, added over all processes: the same bits on each of them,
        in an order that depends on their number alone.

        The names are the first process's; another one lacks those of which it has nothing.
        """
        if self.count == 1:
            return dict(tensors)
        box: list[Any] = [{name: t.shape for name, t in tensors.items()}]
        _connected(lambda: dist.broadcast_object_list(box, src=0))
        shapes: dict[str, torch.Size] = box[0]
        flat = torch.zeros(sum(map(math.prod, shapes.values())), dtype=torch.float64)
        parts = dict(zip(shapes, flat.split([*map(math.prod, shapes.values())]), strict=True))
        for name, mine in tensors.items():
            parts[name].copy_(mine.flatten())
        self.add_up(flat)
        return {name: part.view(shapes[name]).clone() for name, part in parts.items()}

    def gathered(self, mine: T) -> list[T]:
        """What each process has, by rank, on all of them."""
        if self.count == 1:
            return [mine]
        box: list[Any] = [None] * self.count
        _connected(lambda: dist.all_gather_object(box, mine))
        return box

    def shared_out(
        self, rows: Sequence[Sequence[O]], work: Callable[[list[list[O]]], Sequence[Mapping[O, V]]]
    ) -> list[dict[O, V]]:
        """`work` of some options of every row, shared out one by one: what it finds for all of
        them, in their order, on each process.

        work: takes as many rows, each with some of its options; gives what it found for them.
        """
        if self.count == 1:
            return [dict(row) for row in work([list(row) for row in rows])]
        place = counting()
        mine = [[o for o in row if next(place) % self.count == self.rank] for row in rows]
        parts = self.gathered([dict(row) for row in work(mine)])
        merged: list[dict[O, V]] = [{} for _ in rows]
        for part in parts:
            for found, row in zip(merged, part, strict=True):
                found.update(row)
        return [{o: found[o] for o in row} for found, row in zip(merged, rows, strict=True)]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum a tensor over all processes, in place on each of them."""
        if self.count > 1:
            _connected(lambda: dist.all_reduce(tensor))

    def shared(self, module: nn.Module) -> nn.Module:
        """The module, its gradients the mean over all processes after every `backward`."""
        if self.count == 1:
            return module
        # some networks own parameters that no image reaches: a second head, an unused norm
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of what a `shared` module gave; PeerError where a peer is gone."""
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as err:
            if isinstance(err, dist.DistError) or "gloo" in str(err):
                raise PeerError(_ENDED, hint=_RESUME) from err
            raise

    def _first(self, *, failed: bool) -> int | None:
        """The lowest rank that failed, or None."""
        flags = torch.zeros(self.count, dtype=torch.int64)
        flags[self.rank] = failed
        _connected(lambda: dist.all_reduce(flags))
        return next((rank for rank, flag in enumerate(flags.tolist()) if flag), None)


ALONE = Processes()
"""One process that has no peers."""
_FAILED = "another process of this run failed"
_ENDED = "another process of this run ended early"
_RESUME = "run the same command again to resume"


def _connected(exchange: Callable[[], object]) -> None:
    """PeerError where a peer is not there any more."""
    try:
        exchange()
    except RuntimeError as err:  # gloo: the connection was closed
        raise PeerError(_ENDED, hint=_RESUME) from err


def processes() -> Processes:
    """The processes that torchrun started, or this one alone.

    Raises:
        UsageError: the environment names processes that are not there.
    """
    count = _number("WORLD_SIZE", "1")
    if count == 1 or not dist.is_available():
        return Processes()
    local_rank, local_count = _number("LOCAL_RANK", "0"), _number("LOCAL_WORLD_SIZE", "1")
    if not dist.is_initialized():
        missing = [name for name in _STARTED if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"the environment says WORLD_SIZE={count}, and lacks {', '.join(missing)}",
                hint=f"start {count} processes with `torchrun --nproc-per-node {count} -m npprune "
                "...`, or unset WORLD_SIZE",
            )
        try:
            # Shards differ in how long they take: the first to end waits for the last.
            dist.init_process_group(backend(local_count), timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as err:
            raise UsageError(
                f"the {count} processes of this run cannot meet: {first_line(err)}",
                hint="start them with `torchrun`, which says where they meet",
            ) from err
    return Processes(dist.get_rank(), count, local_rank, local_count)


def _number(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) < 1):
        raise UsageError(
            f"{name} in the environment must be a count, got `{value}`",
            hint="`torchrun` sets it; unset it to work in one process",
        )
    return int(value)


def backend(local_count: int) -> str:
    """gloo between CPUs; NCCL between GPUs, where each process has one of its own."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and local_count <= gpus else "gloo"

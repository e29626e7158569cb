"""The same bits on a CPU whatever the number of threads.

A matrix product of few rows or columns is divided among the threads inside its sums, or left to
other kernels at the seams, so that its rounding depends on how many threads there are. Larger
products are not. Small ones gain nothing from threads: here they run on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 64  # rows or columns; differences were seen up to 32

aten = torch.ops.aten
FACTORS = {aten.mm.default: 0, aten.addmm.default: 1, aten.mv.default: 0, aten.addmv.default: 1}
"""Products, and where their first factor stands among the arguments."""
BATCHES = {
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 1),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 2),
}
"""Batches of products: likewise, and the axis of its rows. Threads share a batch by its items."""


def same_on_any_threads(device: torch.device) -> Any:
    """A context in which results on a CPU do not depend on the number of threads."""
    return _SmallOnOneThread() if device.type == "cpu" else nullcontext()


class _SmallOnOneThread(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with one_thread() if _small(func, args) else nullcontext():
            return func(*args, **(kwargs or {}))


def _small(func: Any, args: Any) -> bool:
    if func in FACTORS:
        first, second = args[FACTORS[func] :][:2]
        return min(first.shape[0], second.shape[-1]) < SMALL
    if func in BATCHES:
        at, axis = BATCHES[func]
        return args[at].shape[axis] < SMALL
    return False


@contextmanager
def one_thread() -> Iterator[None]:
    """For the duration, PyTorch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""How many images at a time: an estimate first, and half of it whenever memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from npprune.core.view import VitView

T = TypeVar("T")
SHARE = 0.5  # of the machine's memory, where no limit is given


def images_that_fit(
    view: VitView, image: Tensor, points: int, gib: float | None, device: torch.device
) -> int:
    """Images whose search fits into `gib` GiB (None: half of what the device has in all).

    One image costs the stored activations of one forward pass for every point: about nine
    tensors of the block's width and two of its hidden width a token and block.
    """
    with torch.no_grad():
        tokens = view.embed(image.to(device)).shape[1]
    per_token = sum(9 * view.fc2(l).out_features + 2 * h for l, h in enumerate(view.widths))
    item = next(view.model.parameters()).element_size()
    if gib is None:
        total = (
            torch.cuda.get_device_properties(device).total_memory
            if device.type == "cuda"
            else psutil.virtual_memory().total
        )
        allowed = SHARE * total
    else:
        allowed = gib * 2**30
    return max(1, int(allowed / (1.3 * item * points * tokens * per_token)))


def halving(work: Callable[[int, int], T], total: int, limit: int) -> tuple[list[T], int]:
    """work(lo, hi) over 0..total in stretches of `limit`; out of memory halves the stretch and
    goes on. Returns the parts and the limit that held.

    Raises:
        the memory error itself, where even one image does not fit.
    """
    parts: list[T] = []
    lo = 0
    while lo < total:
        hi = min(lo + limit, total)
        try:
            parts.append(work(lo, hi))
        except (RuntimeError, MemoryError) as err:
            if not _out_of_memory(err) or hi - lo == 1:
                raise
            limit = (hi - lo) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        lo = hi
    return parts, limit


def _out_of_memory(err: BaseException) -> bool:
    return isinstance(err, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in str(err)

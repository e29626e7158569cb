"""How many images at a time: an estimate first, and half of it whenever memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from npprune.core.view import VitView
from npprune.untrusted import out_of_memory

T = TypeVar("T")
SHARE = 0.5  # of the machine's memory, where no limit is given


def images_that_fit(
    view: VitView,
    image: Tensor,
    points: int,
    gib: float | None,
    device: torch.device,
    *,
    processes: int = 1,
) -> int:
    """Images whose search fits into `gib` GiB.

    None: half of what the device has in all (not of what is free: the same machine cuts batches
    the same way each time); on a CPU the `processes` of the machine share that.

    One image costs the stored activations of one forward pass for every point: about nine
    tensors of the block's width and two of its hidden width a token and block.
    """
    with torch.no_grad():
        tokens = view.embed(image.to(device)).shape[1]
    allowed = allowed_bytes(gib, device, processes=processes)
    return max(1, int(allowed / (points * bytes_of_an_image(view, tokens))))


def bytes_of_an_image(view: VitView, tokens: int) -> float:
    """What the activations of one image take, where gradients go through all blocks."""
    per_token = sum(9 * view.fc2(l).out_features + 2 * h for l, h in enumerate(view.widths))
    item = next(view.model.parameters()).element_size()
    return 1.3 * item * tokens * per_token


def allowed_bytes(gib: float | None, device: torch.device, *, processes: int = 1) -> float:
    """`gib` GiB; None: half of what the device has, the processes of a machine sharing it."""
    if gib is not None:
        return gib * 2**30
    if device.type == "cuda":
        return SHARE * torch.cuda.get_device_properties(device).total_memory
    return SHARE * psutil.virtual_memory().total / processes


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
            lo = hi
            continue
        except (RuntimeError, MemoryError) as err:
            if not out_of_memory(err) or hi - lo == 1:
                raise
        # Out here the error is gone, and with it the frames that held the failed attempt.
        limit = (hi - lo) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return parts, limit

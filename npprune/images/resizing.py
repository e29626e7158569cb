"""How large an image becomes on its way to the network, told before it is made."""

from __future__ import annotations

import math
from typing import Protocol

from npprune.errors import DataError
from npprune.untrusted import MAX_PIXELS

MAX_SIDE = 16384  # pixels of a network's input
CHANNELS = 64


class Preparation(Protocol):
    """What is read of `npprune.records.Preprocessing`."""

    @property
    def input_size(self) -> tuple[int, int, int]: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def crop_mode(self) -> str: ...


def resized(height: int, width: int, pre: Preparation) -> tuple[int, int]:
    """(height, width) after resizing, rounded as torchvision and timm round.

    `center` resizes the shorter side, `squash` both, `border` the longer one, to size / crop_pct.
    """
    target = [math.floor(side / pre.crop_pct) for side in pre.input_size[1:]]
    if pre.crop_mode == "squash":
        return target[0], target[1]
    if pre.crop_mode == "center" and target[0] == target[1]:
        side = target[0]
        if height <= width:
            return side, int(side * width / height)
        return int(side * height / width), side
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if pre.crop_mode == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def check_resized(height: int, width: int, pre: Preparation) -> None:
    """DataError where an image, very long and thin, would become too large to hold."""
    h, w = resized(height, width, pre)
    if h * w > MAX_PIXELS:
        raise DataError(
            f"{width} x {height} pixels are too long and thin: resized to {w} x {h}, of which the "
            "network sees the middle"
        )


def fault(pre: Preparation) -> str | None:
    """What no image can be prepared by; None where all is right.

    Of a file's numbers nothing is believed: they decide how much memory an image takes.
    """
    channels, height, width = pre.input_size
    if not (1 <= channels <= CHANNELS and min(height, width) >= 1):
        return f"`input_size` must be channels, height and width, got {pre.input_size}"
    if max(height, width) > MAX_SIDE:
        return f"`input_size` must be at most {MAX_SIDE} pixels a side, got {height} x {width}"
    if not 0 < pre.crop_pct <= 1:
        return f"`crop_pct` must be in (0, 1], got {pre.crop_pct}"
    if height / pre.crop_pct * width / pre.crop_pct > MAX_PIXELS:
        return (
            f"`crop_pct` {pre.crop_pct:g} resizes images to {height / pre.crop_pct:,.0f} x "
            f"{width / pre.crop_pct:,.0f} pixels, of which the network sees the middle"
        )
    for name, values in (("mean", pre.mean), ("std", pre.std)):
        if len(values) not in (1, channels) or not all(map(math.isfinite, values)):
            return f"`{name}` must be {channels} finite numbers, got {list(values)}"
    if min(pre.std) <= 0:
        return f"`std` must be above 0, got {list(pre.std)}"
    return None

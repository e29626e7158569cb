"""From an image to the model's input, by timm's evaluation transform."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from npprune.errors import UsageError
from npprune.images.resizing import check_resized, fault
from npprune.records import Preprocessing
from npprune.words import CROP_MODES, INTERPOLATIONS, check_word

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Transform = Callable[["Image.Image"], "Tensor"]
"""RGB image, any size -> float32 [channels, height, width], normalised."""


def make_transform(preprocessing: Preprocessing) -> Transform:
    """Resize and crop, scale to [0, 1], normalise; the same arithmetic as timm's validation.

    center: the shorter side becomes size / crop_pct, then the middle is cut out. squash: both
    sides become size / crop_pct whatever the aspect (crop_pct 1 loses nothing). border: the
    longer side, and the rest is padded with the mean colour. Resizing is antialiased.

    Raises:
        UsageError: a value out of range.
    """
    pre = resolve(preprocessing)
    transform: Any = from_timm(pre, crop_pct=pre.crop_pct, crop_mode=pre.crop_mode)
    transform.transforms.insert(0, _Bounded(pre))
    return transform  # type: ignore[no-any-return]


class _Bounded:
    """Passes images on; DataError for one that resizing would make too large."""

    def __init__(self, pre: Preprocessing) -> None:
        self.pre = pre

    def __call__(self, image: Image.Image) -> Image.Image:
        check_resized(image.height, image.width, self.pre)
        return image


def from_timm(pre: Preprocessing, **more: Any) -> Transform:
    """timm's transform of the given size and normalisation; grey where the network is."""
    from timm.data import create_transform

    transform = create_transform(
        input_size=pre.input_size,
        interpolation=pre.interpolation,
        mean=pre.mean,
        std=pre.std,
        **more,
    )
    if pre.input_size[0] == 1:
        from torchvision import transforms

        transform.transforms.insert(0, transforms.Grayscale())
    return transform  # type: ignore[no-any-return]


def released(base: Preprocessing) -> Preprocessing:
    """As the paper's released program prepares images, at the network's input size.

    Resized straight to it (bilinear, no crop), normalised with ImageNet's mean and deviation,
    whatever the network was trained with.
    """
    return replace(
        base,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="squash",
    )


def resolve(
    base: Preprocessing,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    img_size: int | Sequence[int] | None = None,
    from_files: bool = True,
) -> Preprocessing:
    """The model's own preprocessing with what was asked for put in its place.

    One value of `mean` or `std` stands for every channel; `img_size` is one side or (height,
    width). `from_files`: the images are files or PIL images, of 1 or 3 channels.

    Raises:
        UsageError: a value out of range; names the setting.
    """
    channels = base.input_size[0]
    size = base.input_size[1:] if img_size is None else _sides(img_size)
    pre = replace(
        base,
        input_size=(channels, *size),
        mean=_per_channel("mean", base.mean if mean is None else mean, channels),
        std=_per_channel("std", base.std if std is None else std, channels),
        interpolation=base.interpolation if interpolation is None else interpolation,
        crop_pct=base.crop_pct if crop_pct is None else crop_pct,
        crop_mode=base.crop_mode if crop_mode is None else crop_mode,
    )
    if from_files and channels not in (1, 3):
        raise UsageError(
            f"image files have 1 or 3 channels, and the model takes {channels}",
            hint="in Python, give npprune tensors of that many channels: "
            "`npprune.prune(model, (images, labels), ...)`",
        )
    if min(pre.input_size) < 1:
        raise UsageError(f"`img_size` must be 1 or more, got {pre.input_size[1:]}")
    if min(pre.std) <= 0:
        raise UsageError(f"`std` must be above 0, got {_numbers(pre.std)}")
    check_word("interpolation", pre.interpolation, INTERPOLATIONS)
    check_word("crop_mode", pre.crop_mode, CROP_MODES)
    if not 0 < pre.crop_pct <= 1:
        raise UsageError(
            f"`crop_pct` must be in (0, 1], got {pre.crop_pct}",
            hint="1 takes the whole image, 0.9 cuts its middle out",
        )
    if why := fault(pre):
        raise UsageError(why)
    return pre


def describe(pre: Preprocessing) -> str:
    """One line, e.g. `224x224 bicubic, crop 0.9 center, mean 0.5 0.5 0.5, std 0.5 0.5 0.5`."""
    _, height, width = pre.input_size
    return (
        f"{height}x{width} {pre.interpolation}, crop {pre.crop_pct:g} {pre.crop_mode}, "
        f"mean {_numbers(pre.mean)}, std {_numbers(pre.std)}"
    )


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise UsageError(f"`{name}` must have 1 or {channels} values, got {len(numbers)}")
    if not all(math.isfinite(v) for v in numbers):
        raise UsageError(f"`{name}` must be finite, got {_numbers(numbers)}")
    return numbers


def _sides(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise UsageError(f"`img_size` must be one side or (height, width), got {size!r}")
    return sides


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)

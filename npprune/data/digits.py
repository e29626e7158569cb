"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images that need no download.

Fixed, disjoint, stratified splits: of every digit, 40 images for test, 30 for calibration, the
rest (1,097 in all) for training.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from npprune.data.labels import Asked, find_labels
from npprune.data.sources import MapSource
from npprune.errors import DataError, setting

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "calibration", "test")
TEST_PER_CLASS = 40
CALIBRATION_PER_CLASS = 30
SEED = 0


def open_digits(
    spec: str,
    asked: Asked,
) -> MapSource:
    """`digits` (all images) or one split of them; labels and names are the digits 0..9.

    asked.known: of a network that was cut to some digits, the names that say which.

    Raises:
        DataError: unknown split, a class map (the labels are given), unknown class.
    """
    _, colon, split = spec.partition(":")
    if colon and split not in SPLITS:
        raise DataError(
            f"the digits have the splits {', '.join(SPLITS)}, got `{split}`",
            hint="write `digits` for all of them",
        )
    if asked.class_map is not None:
        raise DataError(
            f"`{spec}` has labels of its own and takes no class map",
            hint=f"leave {setting('data.class_map')} out",
        )
    known = asked.known
    cut = known if known is not None and known.within is not None else None
    labels = find_labels(
        [str(digit) for digit in range(10)],
        num_classes=asked.num_classes,
        known=cut,
        some=asked.some,
        ranked="the digit shown",
        where=spec,
    )
    chosen = asked.chosen(labels, where=spec)
    _, targets = _digits()
    positions = split_positions(split) if colon else list(range(len(targets)))
    entries = (
        (f"{i:04d}", labels.index[str(targets[i])], partial(digit_image, i))
        for i in positions
        if str(targets[i]) in labels.index
    )
    return MapSource(spec, labels, entries, chosen=chosen, images_per_class=asked.images_per_class)


def split_positions(split: str) -> list[int]:
    """Positions in scikit-learn's order of one split's images, ascending."""
    _, targets = _digits()
    rng = np.random.RandomState(SEED)  # the legacy generator: its stream is frozen for good
    chosen: list[int] = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(targets == digit))
        first = {"test": 0, "calibration": TEST_PER_CLASS}.get(
            split, TEST_PER_CLASS + CALIBRATION_PER_CLASS
        )
        last = {"test": TEST_PER_CLASS, "calibration": TEST_PER_CLASS + CALIBRATION_PER_CLASS}.get(
            split
        )
        chosen += order[first:last].tolist()
    return sorted(chosen)


def digit_image(i: int) -> Image.Image:
    """Image i, 8x8 RGB with the grey value in every channel; 0..16 becomes 0..255."""
    from PIL import Image

    images, _ = _digits()
    return Image.fromarray(np.round(images[i] * (255 / 16)).astype(np.uint8)).convert("RGB")


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target

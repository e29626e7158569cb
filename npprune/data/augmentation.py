"""timm's augmentation, the same for an image and an epoch whoever decodes it and when."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from npprune.data.loading import Batch, batches
from npprune.data.sources import ImageSource, Sample
from npprune.data.transforms import Transform, from_timm, resolve
from npprune.records import DataInfo, Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

# Magnitudes above 9 end at 9: from 10 on no bit of a colour is left, and Pillow 13 refuses that.
AUTO_AUGMENT = "rand-m9-mstd0.5-mmax9-inc1"
AREA = (0.25, 1.0)  # of the random crop
_POSITION = "npprune position"


def augmented_batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    positions: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    workers: int = 0,
    skipped: list[str] | None = None,
) -> Iterator[Batch]:
    """Batches of augmented images; those that cannot be read are left out.

    A random crop of 25 to 100 % of the area, mirrored half of the time, and RandAugment of
    magnitude 9; then scaled and normalised as for evaluation. What is drawn depends on seed,
    epoch and position alone.
    """
    return batches(
        _Marked(source),
        _Seeded(_training_transform(preprocessing), f"{seed}:{epoch}"),
        batch_size,
        on_bad="skip",
        skipped=skipped,
        workers=workers,
        indices=positions,
    )


def _training_transform(preprocessing: Preprocessing) -> Transform:
    return from_timm(
        resolve(preprocessing), is_training=True, scale=AREA, auto_augment=AUTO_AUGMENT
    )


class _Seeded:
    """A transform that draws from the global random states, given a seed for each image.

    The states are put back afterwards.
    """

    def __init__(self, transform: Transform, seed: str) -> None:
        self.transform = transform
        self.seed = seed

    def __call__(self, image: Image.Image) -> Tensor:
        text = f"{self.seed}:{image.info[_POSITION]}"
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(value)
                np.random.seed(value)
                torch.default_generator.manual_seed(value)
                return self.transform(image)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Marked(ImageSource):
    """A source whose images carry their position."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.spec, self.items = source.spec, source.items

    @property
    def length(self) -> int | None:
        return self.source.length

    def load(self, i: int) -> Image.Image:
        image = self.source.load(i)
        image.info[_POSITION] = i
        return image

    def stream(self) -> Iterator[Sample]:
        return self.source.stream()

    def info(self, skipped: Sequence[str] = ()) -> DataInfo:
        return self.source.info(skipped)

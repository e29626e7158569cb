"""The images of a training: read once and kept as bytes where they fit, read anew where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch
from torch import Tensor

from npprune.core.compression.healing import epoch_flips
from npprune.data.augmentation import augmented_batches
from npprune.data.loading import Batch, batches
from npprune.errors import DataError
from npprune.pipeline.common.inputs import Images
from npprune.records import Preprocessing

MEMORY_SHARE = 4  # images may take one part in so many of the free memory


@dataclass
class Chunk:
    """Some training images: rows among them [b], images [b, c, h, w] as the network takes
    them, labels [b] (-1: none), and which are mirrored [b]."""

    rows: Tensor
    images: Tensor
    labels: Tensor
    flipped: Tensor


class TrainingImages(Protocol):
    """Training images by row."""

    count: int

    def epoch(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[Chunk]:
        """One chunk for each list of rows, in order, augmented as the epoch says."""
        ...


class ImagesInMemory:
    """Images in memory, 8 bits a channel: the bits that the files were decoded to. Images that a
    caller prepared stay the numbers they are."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        *,
        flips: bool,
        seed: int,
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self.preprocessing = preprocessing
        self.flips, self.seed = flips, seed
        self.count = len(pixels)

    def images(self, rows: Tensor | slice) -> Tensor:
        """Rows as the network takes them, not mirrored."""
        if self.pixels.is_floating_point():
            return self.pixels[rows].clone()
        return from_bytes(self.pixels[rows], self.preprocessing)

    def epoch(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[Chunk]:
        flips = torch.zeros(self.count, dtype=torch.bool)
        if self.flips:
            flips = epoch_flips(self.seed, epoch, self.count)
        for rows in parts:
            images, flipped = self.images(rows), flips[rows]
            images[flipped] = images[flipped].flip(-1)
            yield Chunk(rows, images, self.labels[rows], flipped)


class ImagesInFiles:
    """Images read anew in every epoch. `strong`: with timm's augmentation instead of flips."""

    def __init__(
        self,
        images: Images,
        positions: Sequence[int],
        *,
        strong: bool,
        flips: bool,
        seed: int,
        relabel: Callable[[Tensor], Tensor] = lambda labels: labels,
    ) -> None:
        self.source_images, self.relabel = images, relabel
        self.positions = list(positions)
        self.strong, self.flips, self.seed = strong, flips, seed
        self.count = len(self.positions)

    def epoch(self, epoch: int, parts: Sequence[Tensor]) -> Iterator[Chunk]:
        flips = torch.zeros(self.count, dtype=torch.bool)
        if self.flips and not self.strong:
            flips = epoch_flips(self.seed, epoch, self.count)
        row_of = {position: row for row, position in enumerate(self.positions)}
        wanted = [self.positions[r] for part in parts for r in part.tolist()]
        size = max((len(part) for part in parts), default=1)
        found = self._batches(epoch, wanted, size)
        pending = next(found, None)
        for part in parts:
            mine = set(part.tolist())
            if pending is None or row_of[pending.positions[0]] not in mine:
                yield self._nothing()  # not one image of this part could be read
                continue
            rows = torch.tensor([row_of[p] for p in pending.positions])
            images, flipped = pending.images, flips[rows]
            images[flipped] = images[flipped].flip(-1)
            yield Chunk(rows, images, self.relabel(pending.labels), flipped)
            pending = next(found, None)

    def _batches(self, epoch: int, wanted: Sequence[int], size: int) -> Iterator[Batch]:
        images, skipped = self.source_images, list[str]()
        if self.strong:
            yield from augmented_batches(
                images.source, images.preprocessing, wanted, size,
                seed=self.seed, epoch=epoch, workers=images.section.workers, skipped=skipped,
            )  # fmt: skip
        else:
            yield from batches(
                images.source, images.transform, size, on_bad="skip", skipped=skipped,
                workers=images.section.workers, indices=wanted,
            )  # fmt: skip
        for name in skipped:
            if name not in images.skipped:  # it is met again in every epoch
                images.skipped.append(name)
                images.work.warn(f"skipped `{name}`: it cannot be read")

    def _nothing(self) -> Chunk:
        empty = torch.empty(0, dtype=torch.int64)
        shape = (0, *self.source_images.preprocessing.input_size)
        return Chunk(empty, torch.empty(shape), empty, empty.bool())


def read(
    images: Images, positions: Sequence[int] | None, what: str, *, sharing: int = 1
) -> tuple[Tensor, Tensor, list[int]] | None:
    """Pixels as bytes [n, c, h, w], labels [n] and positions, or None where they do not fit.

    Images that a caller prepared are float32: nothing says which bytes they were. Unreadable images
    are left out. `positions` None: all images, of a stream too. `sharing`: processes that share the
    machine's memory.
    """
    room = psutil.virtual_memory().available // (MEMORY_SHARE * sharing)
    channels, height, width = images.preprocessing.input_size
    prepared = images.source.content is not None
    fit = room // (channels * height * width * (4 if prepared else 1))
    total = images.source.length if positions is None else len(positions)
    if total is not None and total > fit:
        return None
    pixels, labels, found = [], [], []
    for batch in images.batches(64, indices=positions):
        x = batch.images
        pixels.append(x if prepared else to_bytes(x, images.preprocessing))
        labels.append(batch.labels)
        found += batch.positions
        if len(found) > fit:
            return None
        images.work.progress(len(found), total, message=what)
    if not found:
        raise DataError(f"no image of `{images.source.spec}` could be read")
    return torch.cat(pixels), torch.cat(labels), found


def to_bytes(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalised images back to the 8-bit pixels they were made from."""
    mean, std = _constants(preprocessing)
    return images.mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """8-bit pixels as the network takes them: the arithmetic of timm's evaluation transform."""
    mean, std = _constants(preprocessing)
    return pixels.float().div_(255).sub_(mean).div_(std)


def _constants(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    return mean, torch.tensor(preprocessing.std).view(-1, 1, 1)

"""What two networks say of all images, whichever process saw them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npprune.data.loading import Batch
from npprune.errors import DataError
from npprune.pipeline.common.inputs import Images
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.flipped import Flipped

Look = Callable[[Batch], tuple[Tensor, ...]]
"""What is found of a batch: tensors [b, ...] on the CPU, as many and as wide of every batch."""


@dataclass
class Seen:
    """What was seen of the images, batch by batch: where each begins, what was found of it, labels
    and ids; a few of the images for timing, and some that flipped."""

    first: list[int] = field(default_factory=list)
    found: list[tuple[Tensor, ...]] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sample: Tensor | None = None
    flipped: Flipped = field(default_factory=Flipped)

    def add(self, batch: Batch, found: tuple[Tensor, ...]) -> None:
        """The next batch."""
        self.first.append(batch.positions[0])
        self.found.append(found)
        self.labels.append(batch.labels)
        self.ids += batch.ids
        self.sample = batch.images if self.sample is None else self.sample

    def joined(self, images: Images) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """What was found [n, ...] and labels [n] of all images; and the few for timing.

        Raises:
            DataError: there is no image that can be read.
        """
        if self.sample is None:
            raise DataError(f"no image of `{images.source.spec}` could be read")
        found = tuple(torch.cat(parts) for parts in zip(*self.found, strict=True))
        return found, torch.cat(self.labels), self.sample


@torch.no_grad()
def see_all(seen: Seen, look: Look, images: Images, work: Work) -> Seen:
    """`look` at all images. The processes take whole batches in turn, the same ones that one alone
    would see; the first one gets what all have seen, in the order of the images."""
    team, done = work.team, 0
    for batch in _own_batches(images, team):
        seen.add(batch, look(batch))
        done += len(batch)
        # others are as far, more or less
        work.progress(min(done * team.count, images.source.length or done), images.source.length)
    return _of_all(seen, images, team)


def _own_batches(images: Images, team: Processes) -> Iterator[Batch]:
    size = images.section.batch_size

    def mine(position: int) -> bool:
        return position // size % team.count == team.rank

    if team.count == 1:
        return images.batches()
    if images.source.items is None:
        return images.batches(entries=(e for e in enumerate(images.source.stream()) if mine(e[0])))
    return images.batches(indices=[i for i in range(len(images.source.items)) if mine(i)])


def _of_all(seen: Seen, images: Images, team: Processes) -> Seen:
    if team.count == 1:
        return seen
    sample, seen.sample = seen.sample, None  # the first image is the first process's
    parts = team.gathered((seen, images.skipped))
    images.skipped = [name for _, skipped in parts for name in skipped]
    whole = Seen(sample=sample)
    rows = []
    for part, _ in parts:
        ids = iter(part.ids)
        for first, found, labels in zip(part.first, part.found, part.labels, strict=True):
            rows.append((first, found, labels, [next(ids) for _ in labels]))
    for first, found, labels, names in sorted(rows, key=lambda row: row[0]):
        whole.first.append(first)
        whole.found.append(found)
        whole.labels.append(labels)
        whole.ids += names
    whole.flipped = Flipped.of_all([part.flipped for part, _ in parts])
    return whole

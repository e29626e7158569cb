"""Batches of a source in a fixed order; what cannot be read ends the run or is left out.

Which images form a batch depends on their positions alone, never on which could be read or on
how many processes decode: an unreadable image is simply missing from its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from npprune.data.sources import ImageSource, Item, Sample
from npprune.data.transforms import Transform
from npprune.errors import DataError
from npprune.images.decoding import UnreadableImage
from npprune.images.resizing import TooLargeError
from npprune.words import OnBadImage


@dataclass(frozen=True)
class Batch:
    """images [b, channels, height, width] float32, labels [b] int64, and where they came from."""

    images: Tensor
    labels: Tensor
    ids: list[str]
    positions: list[int]  # in source.items; in a stream, the running number

    def __len__(self) -> int:
        return len(self.ids)


Read = tuple[int, Item, "Tensor | UnreadableImage"]


def batches(
    source: ImageSource,
    transform: Transform,
    batch_size: int,
    *,
    on_bad: OnBadImage = "error",
    skipped: list[str] | None = None,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    entries: Iterable[tuple[int, Sample]] | None = None,
) -> Iterator[Batch]:
    """The source's images, `batch_size` at a time, in order.

    on_bad: "error" ends at the first image that cannot be read; "skip" leaves it out and appends
        its id to `skipped`. A batch of which nothing could be read is not yielded.
    workers: processes that decode (a stream: threads); 0 decodes here. The batches are the same.
    indices: positions in `source.items`, in the order to read them; None: all.
    entries: of a stream, positions and samples of the images to read; None: all.

    Raises:
        UnreadableImage: an image cannot be read and `on_bad` is "error"; names the file.
        DataError: `indices` of a stream, or a worker that died.
    """
    if batch_size < 1:
        raise DataError(f"`batch_size` must be 1 or more, got {batch_size}")
    if source.items is None:
        if indices is not None:
            raise DataError(f"`{source.spec}` is a stream: its images have no positions")
        entries = enumerate(source.stream()) if entries is None else entries
        groups = _stream(iter(entries), transform, batch_size, workers)
    else:
        positions = list(range(len(source.items))) if indices is None else list(indices)
        grid = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
        groups = _mapped(source, transform, grid, workers)
    with closing(groups):  # at once, or decoding processes wait for the garbage collector
        for group in groups:
            good = _readable(group, on_bad, skipped)
            if good:
                yield Batch(
                    torch.stack([image for _, _, image in good]),
                    torch.tensor([item.label for _, item, _ in good], dtype=torch.int64),
                    [item.id for _, item, _ in good],
                    [position for position, _, _ in good],
                )


def _readable(
    group: list[Read], on_bad: str, skipped: list[str] | None
) -> list[tuple[int, Item, Tensor]]:
    good = []
    for position, item, result in group:
        if isinstance(result, Tensor):
            good.append((position, item, result))
        elif on_bad == "error":
            raise result
        elif skipped is not None:
            skipped.append(item.id)
    return good


class _Images(Dataset[Read]):
    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, i: int) -> Read:
        assert self.source.items is not None
        item = self.source.items[i]
        return (i, item, _read(item.id, partial(self.source.load, i), self.transform))


def _mapped(
    source: ImageSource, transform: Transform, grid: list[list[int]], workers: int
) -> Generator[list[Read], None, None]:
    images = _Images(source, transform)
    if workers == 0:
        yield from ([images[i] for i in positions] for positions in grid)
        return
    loader = DataLoader(
        images,
        batch_sampler=grid,
        num_workers=min(workers, len(grid)),
        collate_fn=list,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    try:
        yield from loader
    except RuntimeError as err:
        if "DataLoader worker" not in str(err):
            raise
        raise DataError(
            f"a process that decodes images died: {err}",
            hint="use fewer workers (0 decodes in the main process), or more shared memory",
        ) from err


def _stream(
    entries: Iterator[tuple[int, Sample]], transform: Transform, batch_size: int, workers: int
) -> Generator[list[Read], None, None]:
    def read(entry: tuple[int, Sample]) -> Read:
        position, (item, opener) = entry
        return (position, item, _read(item.id, opener, transform))

    if workers == 0:
        while chunk := list(islice(entries, batch_size)):
            yield [read(entry) for entry in chunk]
        return
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(entries, batch_size)):
            yield list(pool.map(read, chunk))


def _read(
    id: str, opener: Callable[[], Image.Image], transform: Transform
) -> Tensor | UnreadableImage:
    try:
        return transform(opener())
    except UnreadableImage as err:
        return err
    except TooLargeError as err:
        return UnreadableImage(id, err.message)

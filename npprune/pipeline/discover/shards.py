"""The shards of a run that fall to one process, computed one after the other.

Shard i holds the images at positions i * size .. (i + 1) * size - 1 of the source and falls to
process i modulo their number. Images of shards that are done, or of other processes, are never
opened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np

from npprune.core.attribution.search import PathBatch
from npprune.data import content
from npprune.data.loading import Batch
from npprune.data.sources import ImageSource, Sample
from npprune.errors import DataError, StoreError, plural, setting
from npprune.pipeline.common.inputs import Images
from npprune.pipeline.common.work import Work
from npprune.recipe import DiscoverSection
from npprune.store.path_store import PathStore, ShardData

PARTS = ("reading", "search", "writing")  # what the time goes to


class Search(Protocol):
    """Finds the paths of a batch."""

    settings: DiscoverSection

    @property
    def shape(self) -> tuple[int, int]: ...

    def __call__(self, batch: Batch) -> PathBatch: ...


def shards_of(source: ImageSource, size: int) -> int | None:
    """How many shards of so many images a source fills; None for a stream."""
    return None if source.items is None else -(-len(source.items) // size)


class Share:
    """This process's part of the work.

    size: images of a shard, a multiple of the search's batch size, so that batches are the same
        whoever computes them.
    """

    def __init__(
        self,
        store: PathStore,
        images: Images,
        search: Search,
        size: int,
        work: Work,
    ) -> None:
        self.store, self.images, self.search = store, images, search
        self.size, self.work, self.team = size, work, work.team
        self.count = 0  # shards of the whole source, as far as it was seen
        self.computed = 0  # images searched
        self.done = 0  # images that need no more work
        self.total = images.source.length if self.team.count == 1 else None
        self.pending: dict[int, list[str]] = {}  # shards to compute -> the ids of their images
        self.found: list[tuple[Batch, PathBatch]] = []  # of the shard at work
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.started = time.perf_counter()

    def compute(self) -> int:
        """Compute what is missing; returns how many shards the whole source has."""
        batches, batch_size = self._batches(), self.search.settings.batch_size
        self._advance(0)
        while True:
            with self._clock("reading"):
                batch = next(batches, None)
            if batch is None:
                break
            place = batch.positions[0] // batch_size  # on the grid of batches
            self._write(before=place * batch_size // self.size)
            with self._clock("search"):
                self.found.append((batch, self.search(batch)))
            self.computed += len(batch)
            self._advance(len(batch))
            self._write(before=(place + 1) * batch_size // self.size)
        self._write(before=self.count)
        return self.count

    def timing(self) -> dict[str, float]:
        """Images and seconds of all processes; waits for them."""
        images, *spent = self.team.sums([self.computed, *(self.spent[part] for part in PARTS)])
        seconds = time.perf_counter() - self.started
        parts = dict(zip(PARTS, spent, strict=True))
        return {"images": images, "seconds": seconds, "processes": float(self.team.count), **parts}

    def _batches(self) -> Iterator[Batch]:
        """The batches of the shards to compute, in one go: reading ahead does not stop at the
        end of a shard."""
        items, batch_size = self.images.source.items, self.search.settings.batch_size
        if items is None:
            return self.images.batches(batch_size, entries=self._entries())
        self.count = shards_of(self.images.source, self.size) or 0
        mine = range(self.team.rank, self.count, self.team.count)
        spans = {i: range(i * self.size, min((i + 1) * self.size, len(items))) for i in mine}
        self.total = sum(map(len, spans.values()))
        for i, span in spans.items():
            if self._missing(i):
                self.pending[i] = [items[position].id for position in span]
        positions = [position for i in self.pending for position in spans[i]]
        return self.images.batches(batch_size, indices=positions)

    def _entries(self) -> Iterator[tuple[int, Sample]]:
        """As above, of a stream: the others' images pass unopened."""
        for position, sample in enumerate(self.images.source.stream()):
            i, first = divmod(position, self.size)
            self.count = i + 1
            if first == 0 and i % self.team.count == self.team.rank and self._missing(i):
                self.pending[i] = []
            if i in self.pending:
                self.pending[i].append(sample[0].id)
                yield position, sample

    def _missing(self, i: int) -> bool:
        state = self.store.state(i)
        if state == "done":
            shard = self.store.read_shard(i)
            self._refuse_others(shard)
            if back := self._readable_now(i, shard.skipped):
                self.work.warn(
                    f"shard {i}: {plural(back, 'image')} that could not be read can be read now: "
                    "computed again"
                )
                return True
            self.done += len(shard.ids) + len(shard.skipped)
        elif state != "absent":
            self.work.warn(f"shard {i} is {state}: computed again")
        return state != "done"

    def _refuse_others(self, shard: ShardData) -> None:
        """StoreError where images of a finished shard are other pictures now."""
        source = self.images.source
        other = content.changed(source, shard.positions, shard.sizes, shard.head)
        if other is not None:
            raise StoreError(
                f"`{source.file(other)}` is not the file that the paths in `{self.store.folder}` "
                "were found on: its size or content is another one",
                hint=f"bring the images back, or choose another {setting('out')}",
            )

    def _readable_now(self, i: int, skipped: Sequence[str]) -> int:
        """How many images of a shard that were left out can be decoded now."""
        source, wanted, count = self.images.source, set(skipped), 0
        if source.items is None:
            return 0
        for position in range(i * self.size, min((i + 1) * self.size, len(source.items))):
            if source.items[position].id in wanted:
                with suppress(DataError):
                    source.load(position)
                    count += 1
        return count

    def _write(self, before: int) -> None:
        """Write the pending shards below `before`: all their batches have come.

        A batch of which nothing could be read does not come, so there may be several.
        """
        for i in [i for i in self.pending if i < before]:
            ids = self.pending.pop(i)
            found = [f for f in self.found if f[0].positions[0] // self.size == i]
            with self._clock("writing"):
                shard = self._shard(found, ids)
                self.store.write_shard(i, shard)
            if shard.skipped:
                self._advance(len(shard.skipped))
        self.found = [f for f in self.found if f[0].positions[0] // self.size >= before]

    def _shard(self, found: list[tuple[Batch, PathBatch]], ids: list[str]) -> ShardData:
        read = [id for batch, _ in found for id in batch.ids]
        known = set(read)
        positions = [position for batch, _ in found for position in batch.positions]
        source = self.images.source
        return ShardData(
            np.concatenate(
                [np.zeros((0, *self.search.shape), np.int64)]
                + [paths.neurons.numpy() for _, paths in found]
            ),
            np.concatenate([np.zeros(0)] + [paths.scores.double().numpy() for _, paths in found]),
            np.concatenate([np.zeros(0, np.int64)] + [batch.labels.numpy() for batch, _ in found]),
            read,
            positions,
            [id for id in ids if id not in known],
            content.sizes(source, positions),
            content.head(source, positions[0]) if positions else "",
        )

    def _advance(self, images: int) -> None:
        self.done += images
        self.work.progress(self.done, self.total)

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[part] += time.perf_counter() - started

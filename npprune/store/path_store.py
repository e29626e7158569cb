"""The path store: the paths of a run, one shard per class or chunk.

A shard is `00000.safetensors` and its sidecar `00000.json`, which is written last and holds the
sha256 of the tensors: a shard is done when both are there and match. No torch is needed to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from npprune.errors import StoreError, plural
from npprune.records import Document
from npprune.store import atomic
from npprune.store.runs import RunFolder

ShardState = Literal["done", "absent", "damaged", "foreign"]
"""Absent: never finished. Damaged: tensors and sidecar do not match. Foreign: other settings."""


@dataclass
class ShardData:
    """The paths of some images: n images, L blocks, K neurons per block."""

    neurons: NDArray[np.integer[Any]]  # [n, L, K], best first
    scores: NDArray[np.floating[Any]]  # [n]
    labels: NDArray[np.integer[Any]]  # [n]
    ids: list[str]  # n
    positions: list[int]  # n, places in the data source; each occurs once in a store
    skipped: list[str] = field(default_factory=list)  # images that could not be read
    sizes: list[int] = field(default_factory=list)  # bytes of the n files, where they are files
    head: str = ""  # sha256 of the first file's beginning

    def __post_init__(self) -> None:
        self.neurons = np.asarray(self.neurons)
        self.scores = np.asarray(self.scores)
        self.labels = np.asarray(self.labels)
        lengths = {len(x) for x in (self.neurons, self.scores, self.labels, self.ids)}
        if self.neurons.ndim != 3 or lengths | {len(self.positions)} != {len(self.ids)}:
            raise ValueError(
                "a shard holds neurons [n, L, K] and n scores, labels, ids and positions, got "
                f"{self.neurons.shape}, {self.scores.shape}, {self.labels.shape}, "
                f"{len(self.ids)} and {len(self.positions)}"
            )


@dataclass
class ShardInfo(Document):
    """The sidecar of a shard."""

    kind: ClassVar[str] = "path-shard"

    index: int
    images: int
    blocks: int
    topk: int
    sha256: str  # of the safetensors file
    settings_sha256: str  # of the run
    ids: list[str]
    positions: list[int]
    skipped: list[str]
    sizes: list[int] = field(default_factory=list)
    head: str = ""


@dataclass
class PathTable:
    """All paths of a store, by position in the data source."""

    neurons: NDArray[np.int64]  # [n, L, K], best first
    scores: NDArray[np.float64]  # [n]
    labels: NDArray[np.int64]  # [n]
    ids: NDArray[np.str_]  # [n]
    positions: NDArray[np.int64]  # [n]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, ascending."""
        return [int(c) for c in np.unique(self.labels)]

    def where(self, label: int) -> PathTable:
        """The images of one class."""
        mask = self.labels == label
        return PathTable(
            self.neurons[mask],
            self.scores[mask],
            self.labels[mask],
            self.ids[mask],
            self.positions[mask],
        )

    def by_class(self) -> dict[int, PathTable]:
        """One table per class that occurs, by label."""
        return {label: self.where(label) for label in self.classes}


class PathStore:
    """The shards in one folder, all made with the same settings."""

    def __init__(self, folder: str | Path, settings_sha256: str = "") -> None:
        """An empty `settings_sha256` reads whatever is there."""
        self.folder = Path(folder)
        self.settings_sha256 = settings_sha256

    def tensors_path(self, i: int) -> Path:
        """Where the tensors of shard i lie."""
        return self.folder / f"{i:05d}.safetensors"

    def sidecar_path(self, i: int) -> Path:
        """Where the sidecar of shard i lies."""
        return self.folder / f"{i:05d}.json"

    def state(self, i: int) -> ShardState:
        """Whether shard i is there, whole and of this run."""
        if not self.sidecar_path(i).is_file() or not self.tensors_path(i).is_file():
            return "absent"
        try:
            info = atomic.read_json(ShardInfo, self.sidecar_path(i))
        except StoreError:
            return "damaged"
        if info.index != i or info.sha256 != atomic.sha256_file(self.tensors_path(i)):
            return "damaged"
        if self.settings_sha256 and info.settings_sha256 != self.settings_sha256:
            return "foreign"
        return "done"

    def count(self) -> int:
        """How many shards there are in a row from 0, by their sidecars."""
        i = 0
        while self.sidecar_path(i).is_file():
            i += 1
        return i

    def write_shard(self, i: int, data: ShardData) -> None:
        """Write shard i: the tensors first, the sidecar last. Equal data gives equal bytes."""
        atomic.write_safetensors(
            self.tensors_path(i),
            {
                "neurons": data.neurons.astype(np.int32),
                "scores": data.scores.astype(np.float64),
                "labels": data.labels.astype(np.int64),
            },
        )
        images, blocks, topk = data.neurons.shape
        info = ShardInfo(
            index=i,
            images=images,
            blocks=blocks,
            topk=topk,
            sha256=atomic.sha256_file(self.tensors_path(i)),
            settings_sha256=self.settings_sha256,
            ids=[str(x) for x in data.ids],
            positions=[int(x) for x in data.positions],
            skipped=list(data.skipped),
            sizes=list(data.sizes),
            head=data.head,
        )
        atomic.write_json(self.sidecar_path(i), info)

    def read_shard(self, i: int) -> ShardData:
        """Shard i; StoreError unless it is done."""
        if (state := self.state(i)) != "done":
            raise StoreError(f"shard {i} of `{self.folder}` is {state}", hint=_AGAIN)
        return self._read(i)

    def read_all(self, expected_shards: int) -> PathTable:
        """All images of shards 0 .. expected_shards - 1, by position.

        So the table does not depend on how images were dealt to shards. StoreError where a shard
        is not done, or an image occurs twice.
        """
        states = [self.state(i) for i in range(expected_shards)]
        bad = [f"{i} ({state})" for i, state in enumerate(states) if state != "done"]
        if bad or not states:
            shown = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise StoreError(
                f"`{self.folder}`: {len(bad)} of {plural(expected_shards, 'shard')} not done"
                + (f": {shown}" if shown else ""),
                hint=_AGAIN,
            )
        return table_from_shards([self._read(i) for i in range(expected_shards)], str(self.folder))

    def _read(self, i: int) -> ShardData:
        from safetensors.numpy import load

        info = atomic.read_json(ShardInfo, self.sidecar_path(i))
        arrays = load(atomic.read_bytes(self.tensors_path(i)))
        return ShardData(
            arrays["neurons"],
            arrays["scores"],
            arrays["labels"],
            info.ids,
            info.positions,
            info.skipped,
            info.sizes,
            info.head,
        )


def run_table(run: RunFolder) -> PathTable:
    """All paths of a run whose discovery has ended.

    Raises:
        StoreError: it has not, or some of its shards are lost, damaged or of other settings; the
            hint says what makes it whole.
    """
    manifest, found = run.read_manifest(), run.read_result().discovery
    if found is None:
        raise StoreError(
            f"`{run.path}` has no paths yet",
            hint="`npprune discover ... --out FOLDER` finds them",
        )
    store = PathStore(run.paths_folder, manifest.settings_sha256)
    count = manifest.shards or found.shards or store.count()
    try:
        table = store.read_all(count)
        if len(table) != found.images:
            raise StoreError(
                f"`{store.folder}` holds the paths of {plural(len(table), 'image')}, and "
                f"{found.images:,} were found"
            )
    except StoreError as err:
        raise StoreError(err.message, hint=run.how_to_finish()) from err
    return table


_AGAIN = "run the same discovery again: it computes only what is missing"


def table_from_shards(shards: list[ShardData], where: str = "shards") -> PathTable:
    """The images of all shards, by position. Shards without images may have any L and K."""
    filled = [s for s in shards if len(s.ids)] or shards[:1]
    shapes = sorted({s.neurons.shape[1:] for s in filled})
    if len(shapes) > 1:
        raise StoreError(f"{where}: shards differ in blocks x neurons: {shapes[0]} and {shapes[1]}")
    positions = np.concatenate([np.asarray(s.positions, np.int64) for s in filled])
    order = np.argsort(positions, kind="stable")
    positions = positions[order]
    twice = np.flatnonzero(positions[1:] == positions[:-1])
    if len(twice):
        raise StoreError(f"{where}: image {positions[twice[0]]} occurs in two shards")
    ids = [name for s in filled for name in s.ids]
    return PathTable(
        neurons=np.concatenate([s.neurons for s in filled]).astype(np.int64)[order],
        scores=np.concatenate([s.scores for s in filled]).astype(np.float64)[order],
        labels=np.concatenate([s.labels for s in filled]).astype(np.int64)[order],
        ids=np.asarray([ids[j] for j in order], dtype=np.str_),
        positions=positions,
        skipped=sorted(name for s in shards for name in s.skipped),
    )

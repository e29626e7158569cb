"""Image sources: labelled images in a fixed order, read by position or as a stream.

A source has its labels worked out, its classes chosen and its items in a fixed order before the
first image is opened.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from npprune.data.labels import Labels
from npprune.errors import DataError
from npprune.images.decoding import decode
from npprune.records import DataInfo, plain_text

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Item:
    """One image: its id, unique in the source and the same on every machine, and its label."""

    id: str
    label: int


@dataclass(frozen=True)
class ImageFile:
    """Reads one file when it is called."""

    path: Path
    read: Callable[[Path, str], Image.Image] = decode

    def __call__(self) -> Image.Image:
        return self.read(self.path, plain_text(str(self.path)))


Sample = tuple[Item, Callable[[], "Image.Image"]]
"""An item and the function that decodes it (RGB), which may raise UnreadableImage."""


class ImageSource(ABC):
    """Labelled images in a fixed order.

    spec: as asked for. label_rule: how labels were found. classes: the label space as far as
    known. selected: the labels that occur or were chosen, ascending. items: all images sorted by
    label, then id; None for a stream, whose images come only in the order they are read.
    notes: what the user should know about the labels. text_order: label -> label if names were
    ranked as plain text, where labels are ranks and the two orders differ. content: of images that
    a caller holds (see `data.given`), a hash that tells them from others; None: their ids do.
    """

    selected: list[int]
    items: list[Item] | None
    content: Callable[[], str] | None = None

    def __init__(self, spec: str, labels: Labels) -> None:
        self.spec = spec
        self.label_rule = labels.rule
        self.classes = labels.classes
        self.notes = labels.notes
        self.text_order = labels.text_order

    @property
    @abstractmethod
    def length(self) -> int | None:
        """How many images; None where only reading tells."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image `items[i]` as 8-bit RGB.

        Raises:
            UnreadableImage: it cannot be decoded; names the file.
            DataError: the source is a stream.
        """

    def file(self, i: int) -> Path | None:
        """The file of image `items[i]`; None where it is not one of its own."""
        return None

    @abstractmethod
    def stream(self) -> Iterator[Sample]:
        """All images in order, each opened only when its function is called."""

    @abstractmethod
    def info(self, skipped: Sequence[str] = ()) -> DataInfo:
        """What was read; `skipped` are the ids that were unreadable and do not count."""

    def name(self, label: int) -> str:
        """The class's name, or its index as text where no name is known."""
        return next((c.name for c in self.classes if c.index == label), str(label))


class MapSource(ImageSource):
    """A source whose items are known beforehand.

    entries: (id, label, function that decodes), in any order.

    Raises:
        DataError: no images, or none of a chosen class.
    """

    def __init__(
        self,
        spec: str,
        labels: Labels,
        entries: Iterable[tuple[str, int, Callable[[], Image.Image]]],
        *,
        chosen: list[int] | None = None,
        images_per_class: int | None = None,
    ) -> None:
        super().__init__(spec, labels)
        self.items: list[Item] = []
        self._open: list[Callable[[], Image.Image]] = []
        wanted = None if chosen is None else set(chosen)
        taken: Counter[int] = Counter()
        for id, label, opener in sorted(entries, key=lambda entry: (entry[1], entry[0])):
            if wanted is not None and label not in wanted:
                continue
            if images_per_class is not None and taken[label] >= images_per_class:
                continue
            taken[label] += 1
            self.items.append(Item(id, label))
            self._open.append(opener)
        _require_all(self, chosen, taken)
        self.selected = sorted(taken)

    @property
    def length(self) -> int:
        return len(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def load(self, i: int) -> Image.Image:
        return self._open[i]()

    def file(self, i: int) -> Path | None:
        opener = self._open[i]
        return opener.path if isinstance(opener, ImageFile) else None

    def stream(self) -> Iterator[Sample]:
        yield from zip(self.items, self._open, strict=True)

    def info(self, skipped: Sequence[str] = ()) -> DataInfo:
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(_line(item))
        return DataInfo(
            spec=self.spec,
            label_rule=self.label_rule,
            images=len(self.items) - len(set(skipped)),
            classes=len(self.selected),
            skipped=list(skipped),
            sha256=digest.hexdigest(),
        )


class StreamSource(ImageSource):
    """A source that can only be read from its beginning, any number of times.

    samples: starts one pass over (id, label, function that decodes).
    The first `images_per_class` images of each class count; a pass ends early once every class
    is full, where the classes are known. `info` describes the latest pass.
    """

    def __init__(
        self,
        spec: str,
        labels: Labels,
        samples: Callable[[], Iterator[tuple[str, int, Callable[[], Image.Image]]]],
        *,
        chosen: list[int] | None = None,
        images_per_class: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(spec, labels)
        self.items = None
        within = labels.within
        every = [c.index for c in labels.classes if within is None or c.index in within]
        self.selected = chosen if chosen is not None else every
        self._samples = samples
        self._chosen = chosen
        self._per_class = images_per_class
        self._length = length if chosen is None and images_per_class is None else None
        self._taken: Counter[int] = Counter()
        self._digest = hashlib.sha256()

    @property
    def length(self) -> int | None:
        return self._length

    def load(self, i: int) -> Image.Image:
        raise DataError(f"`{self.spec}` is a stream: its images have no positions")

    def stream(self) -> Iterator[Sample]:
        self._taken, self._digest = Counter(), hashlib.sha256()
        wanted = None if self._chosen is None else set(self._chosen)
        full: set[int] = set()
        for id, label, opener in self._samples():
            if (wanted is not None and label not in wanted) or label in full:
                continue
            item = Item(id, label)
            self._taken[label] += 1
            self._digest.update(_line(item))
            if self._taken[label] == self._per_class:
                full.add(label)
            yield item, opener
            if self.selected and full.issuperset(self.selected):
                break
        _require_all(self, self._chosen, self._taken)

    def info(self, skipped: Sequence[str] = ()) -> DataInfo:
        return DataInfo(
            spec=self.spec,
            label_rule=self.label_rule,
            images=sum(self._taken.values()) - len(set(skipped)),
            classes=len(self._taken),
            skipped=list(skipped),
            sha256=self._digest.hexdigest() if self._taken else "",
        )


def _require_all(source: ImageSource, chosen: list[int] | None, taken: Counter[int]) -> None:
    missing = [label for label in chosen or () if not taken[label]]
    if missing:
        some = ", ".join(f"{label} ({source.name(label)})" for label in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"no images in `{source.spec}` of class {some}{more}",
            hint="choose classes that it holds",
        )
    if not taken:
        raise DataError(f"no images in `{source.spec}`")


def _line(item: Item) -> bytes:
    return f"{item.id}\t{item.label}\n".encode()

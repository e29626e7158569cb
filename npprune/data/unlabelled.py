"""Images whose labels nobody needs: a folder in any order, and two sources read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from npprune.data.labels import Labels
from npprune.data.sources import ImageFile, ImageSource, Item, MapSource, Sample
from npprune.errors import DataError
from npprune.images.decoding import decode
from npprune.images.folders import walk
from npprune.records import DataInfo, plain_text
from npprune.untrusted import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

NO_LABEL = -1


def open_unlabelled(spec: str, max_pixels: int = MAX_PIXELS) -> ImageSource:
    """Every image below a folder, however it is arranged, each with the label -1.

    Raises:
        DataError: `spec` is no `folder:PATH`, or there are no images.
    """
    if not spec.startswith("folder:"):
        raise DataError(
            f"unlabelled images must be `folder:PATH`, got `{spec}`",
            hint=f"did you mean `folder:{spec}`?" if Path(spec).is_dir() else None,
        )
    root = Path(spec.removeprefix("folder:")).expanduser()
    tree = walk(root)
    if not tree.images:
        raise tree.without_images()
    read = partial(decode, max_pixels=max_pixels)
    entries = ((plain_text(path), NO_LABEL, ImageFile(root / path, read)) for path in tree.images)
    source = MapSource(spec, Labels("none: they are not used", {}, [], notes=tree.notes()), entries)
    source.selected = []
    return source


class Joined(ImageSource):
    """A source and, after its images, those of another without their labels.

    Raises:
        DataError: one of them is a stream: its images have no positions.
    """

    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        for source in (first, second):
            if source.items is None:
                raise DataError(f"`{source.spec}` is a stream: it cannot be joined with another")
        assert first.items is not None
        assert second.items is not None
        self.first, self.second = first, second
        self.spec = f"{first.spec} + {second.spec}"
        self.label_rule, self.classes = first.label_rule, first.classes
        self.text_order, self.content = first.text_order, first.content
        self.selected, self.notes = first.selected, [*first.notes, *second.notes]
        self.items: list[Item] = [*first.items, *(Item(i.id, NO_LABEL) for i in second.items)]

    @property
    def length(self) -> int:
        return len(self.items)

    def load(self, i: int) -> Image.Image:
        assert self.first.items is not None
        n = len(self.first.items)
        return self.first.load(i) if i < n else self.second.load(i - n)

    def file(self, i: int) -> Path | None:
        assert self.first.items is not None
        n = len(self.first.items)
        return self.first.file(i) if i < n else self.second.file(i - n)

    def stream(self) -> Iterator[Sample]:
        yield from self.first.stream()
        for item, opener in self.second.stream():
            yield Item(item.id, NO_LABEL), opener

    def info(self, skipped: Sequence[str] = ()) -> DataInfo:
        info = self.first.info()
        info.spec, info.images = self.spec, len(self.items) - len(set(skipped))
        info.skipped = list(skipped)
        return info

"""Images that one of the two networks gets right and the other wrong, for the report to show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from npprune.data.loading import Batch
from npprune.export.onnx import to_pixels
from npprune.images import thumbnails
from npprune.records import FlippedImage, Preprocessing

LOST, GAINED = 8, 4  # shown
SIDE = 128  # pixels at most

_Seen = tuple[int, Tensor, int, Tensor, Tensor]  # position, image, label, logits of both


class Flipped:
    """Sees all batches, and keeps some of the images whose prediction flipped."""

    def __init__(self) -> None:
        self._lost, self._gained = _Spread(LOST), _Spread(GAINED)

    @classmethod
    def of_all(cls, parts: Sequence[Flipped]) -> Flipped:
        """Of what several have kept, in the order of the images."""
        whole = cls()
        for kept, name in ((whole._lost, "_lost"), (whole._gained, "_gained")):
            items = [item for part in parts for item in getattr(part, name).kept]
            for item in sorted(items, key=lambda item: item[0]):
                kept.add(item)
        return whole

    def see(self, batch: Batch, dense: Tensor, pruned: Tensor) -> None:
        """A batch, and logits [b, c] of both."""
        labels = batch.labels
        before, after = dense.argmax(1) == labels, pruned.argmax(1) == labels
        for i in (before != after).nonzero()[:, 0].tolist():
            kept = self._lost if before[i] else self._gained
            image = batch.images[i].clone()
            kept.add((batch.positions[i], image, int(labels[i]), dense[i], pruned[i]))

    def shown(self, preprocessing: Preprocessing, name: Callable[[int], str]) -> list[FlippedImage]:
        """The lost ones first; none where pictures cannot be made of the channels."""
        found = [(True, s) for s in self._lost.chosen()]
        found += [(False, s) for s in self._gained.chosen()]
        if preprocessing.input_size[0] not in (1, 3):
            return []
        return [_shown(lost, seen, preprocessing, name) for lost, seen in found]


class _Spread:
    """Some of the items of a stream, spread evenly over it, however long it turns out to be."""

    def __init__(self, most: int) -> None:
        self.most, self.kept, self.step, self.count = most, list[_Seen](), 1, 0

    def add(self, item: _Seen) -> None:
        if self.count % self.step == 0:
            if len(self.kept) == 2 * self.most:
                self.kept, self.step = self.kept[::2], 2 * self.step
            self.kept.append(item)
        self.count += 1

    def chosen(self) -> list[_Seen]:
        n = len(self.kept)
        return (
            [self.kept[i * n // self.most] for i in range(self.most)]
            if n > self.most
            else self.kept
        )


def _shown(
    lost: bool, seen: _Seen, preprocessing: Preprocessing, name: Callable[[int], str]
) -> FlippedImage:
    _, image, label, *logits = seen
    (pixels,) = to_pixels(image[None], preprocessing)
    file = thumbnails.encoded(pixels.squeeze(-1).numpy(), SIDE)
    (p, before), (q, after) = (torch.softmax(each.double(), 0).max(0) for each in logits)
    return FlippedImage(
        name(label), base64.b64encode(file).decode(), lost,
        name(int(before)), float(p), name(int(after)), float(q),
    )  # fmt: skip

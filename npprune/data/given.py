"""Images that a caller holds in Python: tensors, data sets, loaders.

Their tensors are taken as they come, prepared for the network; a PIL image is prepared as the
network's own preprocessing says. Labels are indices of the network's outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from npprune.data.labels import Asked, Labels
from npprune.data.sources import ImageSource, MapSource, StreamSource
from npprune.data.transforms import Transform, make_transform
from npprune.errors import DataError, UsageError, setting
from npprune.records import ClassInfo, Preprocessing

NO_LABEL = -1
GIVEN = "the loader"  # "labels by ..."
PREDICTED = "the network's own predictions, as none were given"
NONE = "none: they are not used"


@dataclass(frozen=True)
class Given:
    """Images in memory, and what becomes of those without labels.

    images: [n, c, h, w] as a tensor or an array; that and labels [n]; a data set; or what gives
        samples or batches each time it is iterated: a DataLoader, a list.
    predict: b images (tensors [c, h, w], PIL) -> labels [b], for those that come alone; None: they
        have none.
    labelled: images that come alone are refused.
    """

    images: Any
    predict: Callable[[Sequence[Any]], Tensor] | None = None
    labelled: bool = False


@dataclass
class _Table:
    """Images by position; their labels are known beforehand, or there are none."""

    count: int
    image: Callable[[int], Any]
    labels: Sequence[int] | None
    names: Sequence[str] = ()


@dataclass
class _Passes:
    """Images that come in the order of the caller, each pass from the beginning."""

    elements: Callable[[], Iterator[Any]]  # samples or batches
    length: int | None
    names: Sequence[str] = field(default=())


def open_given(given: Given, spec: str, asked: Asked) -> ImageSource:
    """The caller's images as a source called `spec`.

    Raises:
        UsageError: not images, in any form that is known here.
        DataError: an image or label that the network cannot take, an unknown class.
    """
    if asked.class_map is not None:
        raise DataError(
            "images in memory have labels of their own and take no class map",
            hint=f"leave {setting('data.class_map')} out",
        )
    found = _found(given.images)
    reader = _Reader(given, asked.num_classes)
    alone = reader.comes_alone(found)
    if alone and given.labelled:
        raise DataError(
            "these images are measured by their labels, and they came without",
            hint="give pairs of images and labels",
        )
    if alone and given.predict is None and asked.some:
        raise DataError(
            f"{setting('data.classes')} chooses images by their labels, and they came without",
            hint="give pairs of images and labels",
        )
    rule = GIVEN if not alone else PREDICTED if given.predict is not None else NONE
    labels = _labels(rule, found.names, asked)
    chosen = asked.chosen(labels, where="the network")

    def wanted(label: int) -> bool:
        return labels.within is None or label in labels.within or label == NO_LABEL

    source: ImageSource
    if isinstance(found, _Table):
        table = found
        digits = len(str(table.count))
        known = reader.labels_of(table)
        entries = (
            (f"{i:0{digits}d}", label, partial(reader.image, table, i, label))
            for i, label in enumerate(known)
            if wanted(label)
        )
        source = MapSource(
            spec, labels, entries, chosen=chosen, images_per_class=asked.images_per_class
        )
    else:
        passes = found

        def samples() -> Iterator[tuple[str, int, Callable[[], Any]]]:
            for i, (image, label) in enumerate(reader.samples(passes)):
                if wanted(label):
                    yield f"{i:08d}", label, partial(_taken, image)

        source = StreamSource(
            spec, labels, samples, chosen=chosen, images_per_class=asked.images_per_class,
            length=passes.length if labels.within is None else None,
        )  # fmt: skip
    if rule == NONE:
        source.selected = []
    source.content = partial(reader.fingerprint, found)
    return source


class AsGiven:
    """The transform of a caller's images: tensors stay as they are, PIL images are prepared.

    Raises:
        DataError: a tensor of another size than the network takes.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._prepare: Transform | None = None

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Tensor):
            size = list(self.preprocessing.input_size)
            if list(image.shape) != size:
                raise DataError(
                    f"images of {list(image.shape)} do not fit the network, which takes {size} "
                    "(channels, height, width)",
                    hint="resize them where you load them, or build the network for them: "
                    "`npprune.load_model(..., img_size=PIXELS)`",
                )
            return image
        if self._prepare is None:
            self._prepare = make_transform(self.preprocessing)
        return self._prepare(image)


# ---------------------------------------------------------------- what was given


def _found(value: Any) -> _Table | _Passes:
    """The form that the images have."""
    if isinstance(value, (Tensor, np.ndarray)):
        return _tensors(value, None)
    if _is_pair(value):
        return _tensors(*value)
    if isinstance(value, DataLoader):
        return _loader(value)
    if isinstance(value, (list, tuple)):
        return _listed(value)
    by_position = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    if by_position and not isinstance(value, (str, bytes, dict, IterableDataset)):
        return _dataset(value)
    if isinstance(value, Iterator):
        raise UsageError(
            f"images must be there more than once, and a {type(value).__name__} ends",
            hint="give the DataLoader or the list itself",
        )
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return _Passes(partial(iter, value), None)
    raise UsageError(
        f"images must be a DataLoader, a data set, a tensor, a pair of tensors or a source's name, "
        f"got {type(value).__name__}",
        hint="for example `DataLoader(dataset, batch_size=64)`, `(images, labels)`, "
        "`images`, or `folder:PATH`",
    )


def _is_pair(value: Any) -> bool:
    """Whether it is images [n, c, h, w] and labels [n]."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    images, labels = value
    return (
        isinstance(images, (Tensor, np.ndarray))
        and images.ndim == 4
        and not (isinstance(labels, (Tensor, np.ndarray)) and labels.ndim == 4)
    )


def _tensors(images: Any, labels: Any) -> _Table:
    images = torch.as_tensor(images)
    if images.dim() != 4 or images.numel() == 0:
        raise DataError(
            f"images must be [images, channels, height, width], at least one, got "
            f"{list(images.shape)}",
            hint="one image is `image[None]`" if images.dim() == 3 else None,
        )
    if labels is None:
        return _Table(len(images), images.__getitem__, None)
    known = [_label(y) for y in labels]
    if len(known) != len(images):
        raise DataError(f"labels must be [{len(images)}], one for each image, got [{len(known)}]")
    return _Table(len(images), images.__getitem__, known)


def _listed(value: Sequence[Any]) -> _Table | _Passes:
    """A list of samples, or of batches."""
    if not value:
        raise DataError("there are no images: the list is empty")
    pairs = [_pair(element) for element in value]
    if any(getattr(image, "ndim", 3) == 4 for image, _ in pairs):
        return _Passes(partial(iter, value), None)
    if any(label is None for _, label in pairs):
        return _Table(len(pairs), lambda i: pairs[i][0], None)
    return _Table(len(pairs), lambda i: pairs[i][0], [_label(label) for _, label in pairs])


def _loader(loader: DataLoader[Any]) -> _Table | _Passes:
    """A loader that adds nothing to its data set is read by position, in the data set's order."""
    sampler = loader.batch_sampler
    plain = (
        not isinstance(loader.dataset, IterableDataset)
        and loader.collate_fn is default_collate
        and loader.worker_init_fn is None
        and type(sampler) is BatchSampler
        and not sampler.drop_last
        and _takes_all(sampler.sampler, len(loader.dataset))  # type: ignore[arg-type]
    )
    if plain:
        return _dataset(loader.dataset)
    return _Passes(partial(iter, loader), None, _names(loader.dataset))


def _takes_all(sampler: Any, count: int) -> bool:
    if type(sampler) is SequentialSampler:
        return True
    return type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == count


def _dataset(data: Any) -> _Table | _Passes:
    """A data set whose labels are known beforehand, or one that has to be read to learn them."""
    labels = _known_labels(data)
    if labels is None:
        return _Passes(lambda: (data[i] for i in range(len(data))), len(data), _names(data))

    def image(i: int) -> Any:
        found, label = _pair(data[i])
        if label is None or _label(label) != labels[i]:
            raise DataError(
                f"image {i} of the data set has label {label}, and its list of labels says "
                f"{labels[i]}",
                hint="give a DataLoader with a `collate_fn` of its own: then labels are read with "
                "the images",
            )
        return found

    return _Table(len(data), image, labels, _names(data))


def _known_labels(data: Any) -> list[int] | None:
    """The labels that a data set knows without opening an image; None where it does not say."""
    if isinstance(data, Subset):
        known = _known_labels(data.dataset)
        return None if known is None else [known[i] for i in data.indices]
    if isinstance(data, TensorDataset):
        return [_label(y) for y in data.tensors[1]] if len(data.tensors) > 1 else None
    if getattr(data, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        known = getattr(data, name, None)
        if isinstance(known, (list, tuple, Tensor, np.ndarray)) and len(known) == len(data):
            try:
                return [_label(y) for y in known]
            except DataError:
                continue
    return None


def _names(data: Any) -> list[str]:
    """The names of the classes, as torchvision's data sets have them."""
    while isinstance(data, Subset):
        data = data.dataset
    names = getattr(data, "classes", None)
    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if names and listed else []


# ---------------------------------------------------------------- reading


class _Reader:
    """Images and labels, one by one, checked."""

    def __init__(self, given: Given, num_classes: int | None) -> None:
        self.given, self.num_classes = given, num_classes

    def comes_alone(self, found: _Table | _Passes) -> bool:
        """Whether the images have no labels."""
        if isinstance(found, _Table):
            return found.labels is None
        return all(label is None for _, label in self._each(_first(found)))

    def labels_of(self, table: _Table) -> list[int]:
        """Of all images."""
        if table.labels is not None:
            return [self._inside(label, i) for i, label in enumerate(table.labels)]
        if self.given.predict is None:
            return [NO_LABEL] * table.count
        found: list[int] = []
        for i in range(0, table.count, 64):
            some = [_taken(table.image(j)) for j in range(i, min(i + 64, table.count))]
            found += self._predicted(some)
        return found

    def image(self, table: _Table, i: int, label: int) -> Any:
        """Image i of a table."""
        return _taken(table.image(i), i)

    def samples(self, passes: _Passes) -> Iterator[tuple[Any, int]]:
        """One pass: images as they come, and their labels."""
        i = 0
        for element in passes.elements():
            pairs = self._each(element)
            alone = [label is None for _, label in pairs]
            if any(alone) and self.given.predict is not None:
                labels = self._predicted([_taken(image) for image, _ in pairs])
            else:
                labels = [
                    NO_LABEL if label is None else self._inside(_label(label), i + k)
                    for k, (_, label) in enumerate(pairs)
                ]
            for (image, _), label in zip(pairs, labels, strict=True):
                yield image, label
            i += len(pairs)

    def fingerprint(self, found: _Table | _Passes) -> str:
        """A hash of a few images, which tells them from other images of the same labels."""
        if isinstance(found, _Table):
            places = sorted({i * (found.count - 1) // 3 for i in range(4)})
            some = [found.image(i) for i in places]
        else:
            some = [image for image, _ in self._each(_first(found))[:4]]
        total = hashlib.sha256()
        for image in map(_taken, some):
            total.update(np.ascontiguousarray(np.asarray(image)).tobytes())
        return total.hexdigest()

    def _each(self, element: Any) -> list[tuple[Any, Any]]:
        """The (image, label) of a sample or of a batch."""
        images, labels = _pair(element)
        if getattr(images, "ndim", 3) != 4:
            return [(images, labels)]
        if labels is None:
            return [(image, None) for image in images]
        if len(labels) != len(images):
            raise DataError(f"a batch has {len(images)} images and {len(labels)} labels")
        return list(zip(images, labels, strict=True))

    def _predicted(self, images: list[Any]) -> list[int]:
        assert self.given.predict is not None
        return [int(y) for y in self.given.predict(images)]

    def _inside(self, label: int, i: int) -> int:
        most = self.num_classes
        if label < 0 or (most is not None and label >= most):
            raise DataError(
                f"image {i} has label {label}, and the network's outputs are 0..{(most or 1) - 1}",
                hint="labels are indices of the network's outputs",
            )
        return label


def _first(passes: _Passes) -> Any:
    for element in passes.elements():
        return element
    raise DataError("there are no images: the loader gave none")


def _pair(element: Any) -> tuple[Any, Any]:
    """Image and label (None: there is none) of a sample; images and labels of a batch."""
    if isinstance(element, (Tensor, np.ndarray, Image.Image)):
        return element, None
    if isinstance(element, (tuple, list)) and element:
        return element[0], element[1] if len(element) > 1 else None
    raise DataError(
        f"a loader must give images and labels, or images alone, got {type(element).__name__}",
        hint="`collate_fn` can turn a dictionary into a pair"
        if isinstance(element, dict)
        else None,
    )


def _taken(image: Any, i: int | None = None) -> Any:
    """A PIL image as RGB, anything else as a float32 tensor [c, h, w] on the CPU."""
    named = "an image" if i is None else f"image {i}"
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (Tensor, np.ndarray)):
        raise DataError(f"{named} must be a tensor or a PIL image, got {type(image).__name__}")
    x = torch.as_tensor(image).detach().cpu()
    if x.dim() != 3:
        raise DataError(f"{named} must be [channels, height, width], got {list(x.shape)}")
    if not x.is_floating_point():
        raise DataError(
            f"{named} must hold floating-point numbers, got {str(x.dtype).removeprefix('torch.')}",
            hint="prepare images as the network was trained: scaled to [0, 1] and normalised",
        )
    if not bool(torch.isfinite(x).all()):
        raise DataError(f"{named} holds NaN or infinity")
    return x.float().clone() if x.is_inference() else x.float()


def _label(value: Any) -> int:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int):
        shown = list(value.shape) if hasattr(value, "shape") else repr(value)
        raise DataError(
            f"a label must be a whole number, the index of an output, got {shown}",
            hint="labels that were mixed or smoothed are for training: give the data set as it is",
        )
    return value


def _labels(rule: str, names: Sequence[str], asked: Asked) -> Labels:
    """What the labels are called: by the network where it has names, else by the data set."""
    named = {} if asked.known is None else {c.index: c for c in asked.known.named}
    own = {i: ClassInfo(i, name) for i, name in enumerate(names)} if not named else {}
    count = asked.num_classes if asked.num_classes is not None else len(names)
    classes = [named.get(i) or own.get(i) or ClassInfo(i, str(i)) for i in range(count)]
    labels = Labels(rule, {}, classes, within=asked.known.within if asked.known else None)
    for c in classes:
        labels.aliases[c.index] = {c.name.lower()} | ({c.synset} if c.synset else set())
    return labels

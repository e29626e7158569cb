"""Data sets through timm's factory: `PREFIX/NAME?option=value&option=value`.

`hfds/` Hugging Face data sets, `hfids/` the same as a stream, `tfds/` TensorFlow data sets
(stream), `wds/` webdataset shards (stream), `torch/` torchvision's. For `wds/` and `torch/` the
data are in `root`; `wds/PATH` says it short, and `wds/PATH/x-{000..009}.tar` names the shards.

timm's readers leave unreadable images out with a logged warning, or put another image in their
place. So timm finds and opens the data here, and the images are decoded one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.data.labels import Asked, Labels, find_labels
from npprune.data.sources import ImageFile, ImageSource, MapSource, StreamSource
from npprune.errors import DataError, setting
from npprune.images.decoding import ENDINGS, UnreadableImage, decode, reading, to_rgb
from npprune.records import plain_text
from npprune.untrusted import parse_json

if TYPE_CHECKING:
    from PIL import Image

PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
    "torch": ("torchvision", "torchvision"),
}
"""Prefix -> the module it needs, and what to install for it."""

OPTIONS = ("root", "split", "input_key", "target_key", "num_samples", "download")

Opener = Callable[[], "Image.Image"]
Read = Callable[[Any, str], "Image.Image"]
"""`decode`, with the limit that was asked for."""


@dataclass(frozen=True)
class ReaderSpec:
    """A parsed source name."""

    prefix: str
    name: str
    options: dict[str, str]


def parse_spec(spec: str) -> ReaderSpec:
    """`hfds/uoft-cs/cifar10?split=test` in its parts.

    Raises:
        DataError: no name, or an unknown or empty option.
    """
    address, _, query = spec.partition("?")
    prefix, _, name = address.partition("/")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, _, value = part.partition("=")
        if key not in OPTIONS or not value:
            raise DataError(
                f"`{spec}`: cannot read the option `{part}`",
                hint=f"options are written key=value; keys: {', '.join(OPTIONS)}",
            )
        options[key] = value
    prefix = prefix.lower()
    if prefix == "wds" and name and "root" not in options:
        path = Path(name).expanduser()
        if ".tar" in path.name:
            options = {"split": path.name, **options}
            path = path.parent
        options["root"] = str(path)
    if not name and "root" not in options:
        raise DataError(f"`{spec}` names no data set", hint=f"write {prefix}/NAME")
    return ReaderSpec(prefix, name, options)


def open_reader(
    spec: str,
    asked: Asked,
) -> ImageSource:
    """A data set of timm's factory as a source.

    Class names of the data set go through the same rules as folder names; without names its
    class indices are the labels.

    Raises:
        DataError: missing package (with what to install), data not found, bad option or labels.
    """
    parsed = parse_spec(spec)
    dataset = _create(spec, parsed)
    reader = getattr(dataset, "reader", dataset)
    names = _class_names(dataset, reader)
    labels = _labels(spec, names, asked)
    chosen = asked.chosen(labels, where=spec)
    to_label = partial(_label, spec, names, labels, asked.num_classes)
    read = partial(decode, max_pixels=asked.max_pixels)
    if parsed.prefix in ("torch", "hfds"):
        entries = _torch_entries if parsed.prefix == "torch" else _hfds_entries
        return MapSource(
            spec,
            labels,
            (
                (id, label, opener)
                for id, target, opener in entries(dataset, read)
                if (label := to_label(target)) is not None
            ),
            chosen=chosen,
            images_per_class=asked.images_per_class,
        )
    passes = {"wds": _wds_samples, "hfids": _hfids_samples, "tfds": _decoded_samples}
    samples = passes[parsed.prefix]

    def one_pass() -> Iterator[tuple[str, int, Opener]]:
        try:
            for id, target, opener in samples(dataset, read):
                label = to_label(target)
                if label is not None:
                    yield id, label, opener
        except (DataError, GeneratorExit):
            raise
        except Exception as err:  # whatever the package and its network raise
            raise DataError(f"reading `{spec}` failed: {_first_line(err)}") from err

    length = _known_length(reader, parsed)
    return StreamSource(
        spec,
        labels,
        one_pass,
        chosen=chosen,
        images_per_class=asked.images_per_class,
        length=length,
    )


def _create(spec: str, parsed: ReaderSpec) -> Any:
    module, package = PACKAGES[parsed.prefix]
    if find_spec(module) is None:
        raise DataError(
            f"`{spec}` needs the package {module}, which is not installed",
            hint=f"pip install {package}",
        )
    from timm.data import create_dataset

    options = dict(parsed.options)
    root = options.pop("root", None)
    split = options.pop("split", "validation")
    extra: dict[str, Any] = {k: options[k] for k in ("input_key", "target_key") if k in options}
    if parsed.prefix != "torch":
        extra["input_img_mode"] = "RGB"
    if parsed.prefix in ("wds", "hfids", "tfds"):
        # timm wants a count for its training schedule and refuses some streams without one
        given = options.get("num_samples", "")
        if given and not given.isdigit():
            raise DataError(f"`{spec}`: `num_samples` must be a count, got `{given}`")
        extra["num_samples"] = int(given) if given else (1 if parsed.prefix == "hfids" else None)
    if parsed.prefix == "wds":
        extra.setdefault("input_key", ";".join(ending[1:] for ending in ENDINGS))
    try:
        return create_dataset(
            f"{parsed.prefix}/{parsed.name}",
            root=root,
            split=split,
            download=options.get("download", "").lower() in ("1", "true", "yes"),
            **extra,
        )
    except Exception as err:  # whatever the package and its network raise
        raise DataError(
            f"cannot open `{spec}` (split `{split}`): {_first_line(err)}",
            hint="name the split and the folder: "
            f"{parsed.prefix}/{parsed.name or 'NAME'}?split=SPLIT&root=PATH"
            + (" (download=1 fetches it)" if parsed.prefix == "torch" else ""),
        ) from err


def _class_names(dataset: Any, reader: Any) -> list[str] | None:
    """The data set's names by its own class index, or None."""
    index = getattr(reader, "class_to_idx", None)
    builder: Any = getattr(reader, "builder", None)
    if not index and hasattr(builder, "as_streaming_dataset"):  # opening it finds its features
        features = builder.as_streaming_dataset(split=reader.split).features or {}
        index = {n: i for i, n in enumerate(getattr(features.get(reader.target_key), "names", []))}
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    if names is None and index and all(isinstance(name, str) for name in index):
        names = sorted(index, key=lambda name: index[name])
    if names is None or len(set(names)) != len(names):
        return None
    return [plain_text(str(name)) for name in names]


def _labels(spec: str, names: list[str] | None, asked: Asked) -> Labels:
    if names is not None:
        return find_labels(
            names,
            num_classes=asked.num_classes,
            class_map=asked.class_map,
            known=asked.known,
            some=asked.some,
            ranked="class index of the data set",
            where=spec,
        )
    if asked.class_map is not None:
        raise DataError(
            f"`{spec}` has class indices without names, which a class map cannot match",
            hint=f"leave {setting('data.class_map')} out",
        )
    numbers = [str(i) for i in range(asked.num_classes or 0)]
    return find_labels(
        numbers, known=asked.known, ranked="class index of the data set", indices=True, where=spec
    )


def _label(
    spec: str, names: list[str] | None, labels: Labels, num_classes: int | None, target: Any
) -> int | None:
    """The label of a data set's class index; None where its class is left out."""
    try:
        index = int(target)
    except (TypeError, ValueError) as err:
        raise DataError(
            f"`{spec}`: a label must be one class index, got {target!r}",
            hint="multi-label data sets are not supported; target_key=KEY picks another field",
        ) from err
    if names is not None and 0 <= index < len(names):
        return labels.index.get(names[index])
    top = len(names) if names is not None else num_classes
    if index < 0 or (top is not None and index >= top):
        raise DataError(
            f"`{spec}`: label {index} is outside 0..{(top or 0) - 1}"
            if top
            else f"`{spec}`: label {index} is below 0",
            hint="the model and the data set must have the same classes",
        )
    return index if labels.within is None or index in labels.within else None


def _torch_entries(dataset: Any, read: Read) -> Iterator[tuple[str, Any, Opener]]:
    files = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None)
    targets = getattr(dataset, "targets", None)
    root = Path(dataset.root)
    for i in range(len(dataset)):
        target = dataset[i][1] if targets is None else targets[i]
        if files is None:
            yield f"{i:08d}", target, partial(_from_torch, dataset, i)
            continue
        path = Path(files[i][0])
        id = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        yield plain_text(id), target, ImageFile(path, read)


def _from_torch(dataset: Any, i: int) -> Image.Image:
    with reading(f"{i:08d}"):
        return to_rgb(dataset[i][0])


def _hfds_entries(dataset: Any, read: Read) -> Iterator[tuple[str, Any, Opener]]:
    reader = dataset.reader
    targets = reader.dataset[reader.label_key]
    for i, target in enumerate(targets):
        yield f"{i:08d}", target, partial(_from_hfds, reader, i, read)


def _from_hfds(reader: Any, i: int, read: Read) -> Image.Image:
    id = f"{i:08d}"
    try:
        file = reader[i][0]
    except (OSError, AssertionError) as err:
        raise UnreadableImage(id, str(err) or "no bytes and no file") from err
    with file:
        return read(file, id)


def _wds_samples(dataset: Any, read: Read) -> Iterator[tuple[str, Any, Opener]]:
    """Undecoded samples of the shards that timm found, in order."""
    import os

    import webdataset

    reader = dataset.reader
    urls = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(urls),
        webdataset.tarfile_to_samples(handler=webdataset.reraise_exception),
    )
    label_key = reader.target_key or reader.split_info.alt_label
    image_keys = reader.input_key.split(";")
    for sample in pipeline:
        id = sample["__key__"]
        if label_key:
            about = parse_json(sample.get("json", b"{}"), parse_constant=float)
            target = about.get(label_key) if isinstance(about, dict) else None
        else:
            target = sample["cls"].decode() if "cls" in sample else None
        if target is None:
            raise DataError(
                f"sample `{id}` has no label",
                hint="labels are .cls files, or target_key=KEY names a field of the .json files",
            )
        image = next((sample[key] for key in image_keys if key in sample), b"")
        yield id, target, partial(read, image, id)


def _hfids_samples(dataset: Any, read: Read) -> Iterator[tuple[str, Any, Opener]]:
    from datasets import Image as HfImage

    reader = dataset.reader
    stream = reader.builder.as_streaming_dataset(split=reader.split)
    stream = stream.cast_column(reader.input_key, HfImage(decode=False))
    for i, sample in enumerate(stream):
        opener = partial(_from_hf, sample[reader.input_key], i, read)
        yield f"{i:08d}", sample[reader.target_key], opener


def _from_hf(image: dict[str, Any], i: int, read: Read) -> Image.Image:
    id = f"{i:08d}"
    if image.get("bytes"):
        return read(image["bytes"], id)
    path = Path(image.get("path") or "")
    if path.is_file():
        return read(path, id)
    from datasets import Image as HfImage

    with reading(id):  # from the network, by its own decoder
        return to_rgb(HfImage().decode_example(image))


def _decoded_samples(dataset: Any, read: Read) -> Iterator[tuple[str, Any, Opener]]:
    for i, (image, target) in enumerate(dataset):
        yield f"{i:08d}", target, partial(_from_pillow, image, f"{i:08d}")


def _from_pillow(image: Image.Image, id: str) -> Image.Image:
    with reading(id):
        return to_rgb(image)


def _known_length(reader: Any, parsed: ReaderSpec) -> int | None:
    if parsed.prefix == "hfids" and "num_samples" not in parsed.options:
        splits = reader.builder.info.splits or {}
        info = splits.get(reader.split)
        return info.num_examples if info is not None else None
    return getattr(reader, "num_samples", None) or None


def _first_line(err: Exception) -> str:
    text = str(err).strip()
    return text.splitlines()[0] if text else type(err).__name__

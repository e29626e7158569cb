"""Image sources by name: `folder:PATH`, `digits[:SPLIT]`, and data sets of timm's factory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from npprune.data.digits import open_digits
from npprune.data.folders import hinting, read_classes, without_images
from npprune.data.labels import Asked, KnownNames, find_labels
from npprune.data.readers import PACKAGES, open_reader
from npprune.data.sources import ImageFile, ImageSource, MapSource
from npprune.errors import DataError
from npprune.images.decoding import decode
from npprune.records import plain_text
from npprune.untrusted import MAX_PIXELS


def open_source(
    spec: str,
    *,
    num_classes: int | None = None,
    class_map: str | Path | None = None,
    known: KnownNames | None = None,
    classes: Sequence[str | int] | str | None = None,
    images_per_class: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """The source called `spec`.

    spec: `folder:PATH` (one folder a class), `digits`, `digits:train|calibration|test`, or
        `tfds/`, `hfds/`, `hfids/`, `wds/`, `torch/` and a name, see `npprune.data.readers`.
    num_classes: outputs of the model; decides which ImageNet a synset name is looked up in.
    class_map: a .txt or .json file that says the label of every folder.
    known: the class names of the network, which decide where there is no class map.
    classes: indices, synsets, names, or a text file of them; None: all.
    images_per_class: only the first so many of each class.
    max_pixels: of an image that is decoded; larger ones cannot be read.

    Raises:
        DataError: missing, empty or mislabelled source, unknown class.
    """
    if images_per_class is not None and images_per_class < 1:
        raise DataError(f"`images_per_class` must be 1 or more, got {images_per_class}")
    asked = Asked(num_classes, class_map, known, classes, images_per_class, max_pixels)
    if spec.startswith("folder:"):
        return _open_folder(spec, asked)
    if spec.split(":")[0] == "digits":
        return open_digits(spec, asked)
    if spec.split("/")[0].lower() in PACKAGES and "/" in spec:
        return open_reader(spec, asked)
    raise DataError(
        f"unknown data source `{spec}`",
        hint=f"did you mean `folder:{spec}`?"
        if Path(spec).is_dir()
        else "sources: folder:PATH, digits, digits:train|calibration|test, "
        "tfds/NAME, hfds/NAME, hfids/NAME, wds/PATH, torch/NAME",
    )


def _open_folder(spec: str, asked: Asked) -> ImageSource:
    root = Path(spec.removeprefix("folder:")).expanduser()
    tree, folders, notes = read_classes(root, named=asked.class_map is not None)
    empty = [name for name, paths in folders.items() if not paths]
    shown = {plain_text(name): name for name in folders}
    some = asked.some or (asked.known is not None and asked.known.within is not None)
    with hinting(notes):
        if empty and not some:  # before ranks, which these folders have shifted
            raise without_images(tree, empty[0])
        labels = find_labels(
            list(shown),
            num_classes=asked.num_classes,
            class_map=asked.class_map,
            known=asked.known,
            some=asked.some,
            images={name: len(folders[folder]) for name, folder in shown.items()},
            where=str(root),
        )
        chosen = asked.chosen(labels, where=spec)
        taken = {
            shown[name]: label
            for name, label in labels.index.items()
            if chosen is None or label in chosen
        }
        for name in taken:
            if not folders[name]:
                raise without_images(tree, name)
    read = partial(decode, max_pixels=asked.max_pixels)
    entries = (
        (plain_text(path), label, ImageFile(root / path, read))
        for name, label in taken.items()
        for path in folders[name]
    )
    source = MapSource(
        spec, labels, entries, chosen=chosen, images_per_class=asked.images_per_class
    )
    source.notes = [*notes, *labels.notes, *tree.notes(list(taken))]
    return source

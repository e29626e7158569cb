"""The paper's own files: `imgnet_all-{label}.rlt.jsonl`, as its released program writes them.

A line holds one image, or a list of images (a batch). An image is one of
- `ja`, `ja_score` and, beside them, the Activation baseline's `base`, `base_score`;
- `path` with neurons as floats: Influence Pattern;
- `ja` with `remove`, `base`, `enhance`: what the true class's probability (or the predicted class)
  becomes when the path's neurons are zeroed, left alone, or doubled.

Neurons are `[[n, n, ...]]`, one per block, or one list of K per block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npprune.errors import StoreError
from npprune.store import atomic
from npprune.store.path_store import PathTable, ShardData
from npprune.words import Layout

Neurons = list[list[int]]
"""Per block, the neurons of a path, best first."""

_NAME = re.compile(r"^imgnet_all-(\d+)\.rlt\.jsonl$")


@dataclass
class ReleasedImage:
    """What one of the paper's files says about one image."""

    neurons: Neurons
    score: float | None = None  # joint attribution score
    baseline: Neurons | None = None  # the Activation baseline's path
    baseline_score: float | None = None
    edit: tuple[float, float, float] | None = None  # remove, base, enhance
    influence_pattern: bool = False  # stands under `path`


def released_name(label: int) -> str:
    """The file's name for a class."""
    return f"imgnet_all-{label}.rlt.jsonl"


def released_files(folder: str | Path) -> dict[int, Path]:
    """The paper's files in a folder by label, ascending; StoreError where there are none."""
    folder = Path(folder)
    try:
        found = {int(m[1]): p for p in folder.iterdir() if (m := _NAME.match(p.name))}
    except OSError as err:
        raise atomic.store_error(err, folder, "read") from err
    if not found:
        raise StoreError(
            f"no file `{released_name(0).replace('0', 'LABEL', 1)}` in `{folder}`",
            hint="give the folder that holds the released program's results",
        )
    return dict(sorted(found.items()))


def read_released(path: str | Path) -> list[ReleasedImage]:
    """All images of a file, in order. StoreError names the line of what is wrong."""
    images = []
    for number, line in enumerate(atomic.read_text(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            batch = data if isinstance(data, list) else [data]
            images += [_parse(image) for image in batch]
        except ValueError as err:
            raise StoreError(f"not one of the paper's files: {err} ({path}:{number})") from err
    return images


def write_released(
    path: str | Path,
    images: Iterable[ReleasedImage],
    *,
    layout: Layout = "batch",
    batch_size: int | None = None,
) -> None:
    """Write images as the released program does.

    `layout="batch"`: a line is a list of `batch_size` images (None: of all), as for one neuron per
    block and for edits. `layout="image"`: a line is one image, as for several neurons per block
    and for Influence Pattern.
    """
    items = [_render(image) for image in images]
    if layout == "image":
        lines: list[Any] = items
    else:
        size = batch_size or max(len(items), 1)
        lines = [items[i : i + size] for i in range(0, len(items), size)]
    atomic.write_text(Path(path), "".join(json.dumps(line) + "\n" for line in lines))


def shard_from_released(
    images: list[ReleasedImage], label: int, first_position: int = 0
) -> ShardData:
    """The images of one class for a path store; ids are `{label}/{number}`, no score is nan.

    The files do not say which images they are about: their order is all there is.
    """
    shapes = {tuple(map(len, image.neurons)) for image in images}
    if len(shapes) > 1 or any(len(set(shape)) != 1 for shape in shapes):
        raise StoreError(f"class {label}: paths differ in blocks or neurons per block")
    blocks, topk = (len(images[0].neurons), len(images[0].neurons[0])) if images else (0, 0)
    neurons = np.asarray([image.neurons for image in images], dtype=np.int64)
    return ShardData(
        neurons.reshape(len(images), blocks, topk),
        np.asarray([math.nan if i.score is None else i.score for i in images], dtype=np.float64),
        np.full(len(images), label, dtype=np.int64),
        [f"{label}/{i}" for i in range(len(images))],
        list(range(first_position, first_position + len(images))),
    )


def released_from_table(
    table: PathTable, *, influence_pattern: bool = False
) -> dict[int, list[ReleasedImage]]:
    """A path store's images by label, ready for `write_released`; a nan score is left out."""
    return {
        label: [
            ReleasedImage(
                neurons=path.tolist(),
                score=None if influence_pattern or math.isnan(score) else float(score),
                influence_pattern=influence_pattern,
            )
            for path, score in zip(rows.neurons, rows.scores, strict=True)
        ]
        for label, rows in table.by_class().items()
    }


_KEYS = {
    frozenset({"ja", "ja_score", "base", "base_score"}),
    frozenset({"ja", "ja_score"}),
    frozenset({"ja"}),
    frozenset({"path"}),
    frozenset({"ja", "remove", "base", "enhance"}),
}


def _parse(image: Any) -> ReleasedImage:
    """One image; ValueError says what is wrong."""
    if not isinstance(image, dict):
        raise ValueError(f"an image must be an object, got {type(image).__name__}")
    if frozenset(image) not in _KEYS:
        raise ValueError(f"an image has `ja` or `path`, got the keys {sorted(image)}")
    if "path" in image:
        return ReleasedImage(_neurons(image, "path"), influence_pattern=True)
    result = ReleasedImage(_neurons(image, "ja"))
    if "remove" in image:
        removed, unedited, doubled = (
            _number(image[key], key, depth=1) for key in ("remove", "base", "enhance")
        )
        result.edit = (removed, unedited, doubled)
    elif "ja_score" in image:
        result.score = _number(image["ja_score"], "ja_score", depth=2)
        if "base" in image:
            result.baseline = _neurons(image, "base")
            result.baseline_score = _number(image["base_score"], "base_score", depth=2)
    return result


def _neurons(image: dict[str, Any], key: str) -> Neurons:
    """`[[n, n, ...]]` or one list per block -> one list per block.

    A single inner list is one neuron per block: a network of one block is not told apart from
    it, and the paper has none.
    """
    lists = image[key]
    if not (isinstance(lists, list) and lists and all(isinstance(x, list) and x for x in lists)):
        raise ValueError(f"`{key}` must be a list of lists of neurons")
    if len(lists) == 1:
        lists = [[neuron] for neuron in lists[0]]
    return [[_index(neuron, key) for neuron in block] for block in lists]


def _index(value: Any, key: str) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise ValueError(f"`{key}` must hold whole numbers, got {value!r}")
    if value < 0:
        raise ValueError(f"`{key}` must hold indices from 0 on, got {value!r}")
    return int(value)


def _number(value: Any, key: str, depth: int) -> float:
    """The number inside `depth` lists of one element."""
    inner = value
    for _ in range(depth):
        if not isinstance(inner, list) or len(inner) != 1:
            raise ValueError(f"`{key}` must be one number in {depth} list(s), got {value!r}")
        inner = inner[0]
    if isinstance(inner, bool) or not isinstance(inner, int | float):
        raise ValueError(f"`{key}` must be a number, got {inner!r}")
    return float(inner)


def _render(image: ReleasedImage) -> dict[str, Any]:
    """One image as the released program's JSON, keys in its order."""
    if image.influence_pattern:
        return {"path": _lists(image.neurons, float)}
    data: dict[str, Any] = {"ja": _lists(image.neurons, int)}
    if image.edit is not None:
        for key, value in zip(("remove", "base", "enhance"), image.edit, strict=True):
            data[key] = [float(value)]
        return data
    if image.score is not None:
        data["ja_score"] = [[float(image.score)]]
    if image.baseline is not None and image.baseline_score is not None:
        data["base"] = _lists(image.baseline, int)
        data["base_score"] = [[float(image.baseline_score)]]
    return data


def _lists(neurons: Neurons, kind: type[int] | type[float]) -> list[list[int]] | list[list[float]]:
    if all(len(block) == 1 for block in neurons):
        return [[kind(block[0]) for block in neurons]]
    return [[kind(neuron) for neuron in block] for block in neurons]

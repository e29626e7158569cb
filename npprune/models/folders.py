"""Folders that describe their network: of Hugging Face's `transformers`, and timm's from the hub.

`config.json` is read as data: nothing in it names code to run, and what it says of a network
passes `checked_args` or is compared with the sizes of the tensors. Weights lie beside it, in one
file or in several with an index.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from npprune.errors import ModelError
from npprune.files import foreign_folder
from npprune.models.create import checked_args
from npprune.models.foreign import Size
from npprune.models.huggingface import Translated, from_transformers
from npprune.models.weights import read_all
from npprune.records import ClassInfo
from npprune.untrusted import parse_json

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_LARGEST = 16 * 2**20  # bytes of a JSON file that is read
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_SYNSET = re.compile(r"n\d{8}\Z")


@dataclass
class Folder:
    """What a folder says of its network beside the weights."""

    path: Path
    kind: str  # transformers | timm
    config: dict[str, Any]
    weights: Path
    cfg: dict[str, Any] = field(default_factory=dict)  # entries of timm's pretrained_cfg
    notes: list[str] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        """timm's name, of a folder in timm's format."""
        name = self.config.get("architecture") or self.own_cfg.get("architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.]+", name):
            raise ModelError(f"`{self.path}/config.json` names no architecture of timm")
        if name == "npprune_vit":
            raise ModelError(
                f"`{self.path}` is a folder that npprune wrote for timm",
                hint="give the checkpoint folder that it was exported from",
            )
        return name

    @property
    def own_cfg(self) -> dict[str, Any]:
        """timm's `pretrained_cfg` as in the file."""
        cfg = self.config.get("pretrained_cfg", self.config)
        return cfg if isinstance(cfg, dict) else {}

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of timm's architecture that the folder gives, checked."""
        given = self.config.get("model_args") or {}
        if not isinstance(given, dict):
            raise ModelError(f"`model_args` of `{self.path}/config.json` must be an object")
        args = checked_args(given, f"{self.path}/config.json")
        pool = self.config.get("global_pool")
        if pool and "global_pool" not in args:
            args |= checked_args({"global_pool": pool}, f"{self.path}/config.json")
        args.pop("num_classes", None)
        return args

    def classes(self, outputs: int) -> list[ClassInfo]:
        """The names of the classifier's outputs; empty where the folder has none."""
        labels, said = _labels(self.config) or _labels(self.own_cfg) or ([], {})
        if len(labels) != outputs:
            return []
        if all(re.fullmatch(rf"LABEL_{i}|{i}", name) for i, name in enumerate(labels)):
            return []  # `transformers` makes these up
        return _with_synsets(labels, said)


def open_folder(path: Path) -> Folder:
    """The description in a folder.

    Raises:
        ModelError: it cannot be read, or its weights are not there.
    """
    kind = foreign_folder(path)
    assert kind is not None
    config = _json(path / "config.json")
    found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"the folder `{path}` has a config.json and none of its weights ({', '.join(WEIGHTS)})",
            hint="fetch the weights into the same folder",
        )
    folder = Folder(path, kind, config, found)
    if kind == "timm":
        folder.cfg = _timm_cfg(folder.own_cfg)
    return folder


def translate(folder: Folder, img_size: Size | None, *, headless: bool = False) -> Translated:
    """The network of a `transformers` folder as timm's, with its preprocessing in `folder.cfg`.

    Raises:
        ModelError: see `from_transformers`; a preprocessing that npprune has not.
    """
    processor = _processor(folder.path)
    shown = _shown(processor) if processor is not None else None
    made = from_transformers(
        folder.config, read_tensors(folder), img_size, shown, headless=headless
    )
    size: Size = tuple(made.args["img_size"])  # type: ignore[assignment]
    if processor is None:
        folder.cfg = {
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
        }
        made.notes.append(
            "the folder has no preprocessor_config.json: assumed mean and standard deviation 0.5, "
            "bilinear, no crop"
        )
    else:
        folder.cfg = _preprocessing(processor, size, made.args["in_chans"], made.notes)
        if shown not in (None, size) and img_size is None:
            made.notes.append(
                f"the folder's preprocessor makes images of {shown}, the network takes {size}: "
                "taken is the network's size"
            )
    return made


def read_tensors(folder: Folder) -> dict[str, Tensor]:
    """The tensors beside the description; of several files, all that the index names."""
    if folder.weights.suffix != ".json":
        return read_all(folder.weights)
    tensors: dict[str, Tensor] = {}
    for name in weights_files(folder.weights):
        tensors |= read_all(folder.path / name)
    return tensors


def weights_files(index: Path) -> list[str]:
    """The names of the files in its own folder that an index of weights names.

    Raises:
        ModelError: it names none, or anything else.
    """
    names = _json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(n, str) and re.fullmatch(r"[\w-][\w.-]*", n) for n in names):
        raise ModelError(f"`{index}` is no index of weights files in its folder")
    return sorted(set(names))


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than 16 MiB")
        value = parse_json(path.read_text(encoding="utf-8-sig"), parse_constant=float)
    except (OSError, ValueError) as err:
        raise ModelError(f"`{path}` cannot be read as JSON: {err}", hint="fetch it again") from err
    if not isinstance(value, dict):
        raise ModelError(f"`{path}` must hold an object, got {type(value).__name__}")
    return value


# ---------------------------------------------------------------- labels


def _labels(config: Mapping[str, Any]) -> tuple[list[str], dict[str, str]] | None:
    """Names by output, and descriptions by name."""
    by_index = config.get("id2label")
    if isinstance(by_index, dict):
        names = [by_index.get(str(i)) for i in range(len(by_index))]
        if all(isinstance(name, str) and name.strip() for name in names):
            return [_shown_name(str(name)) for name in names], {}
    listed, said = config.get("label_names"), config.get("label_descriptions")
    if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
        known = said if isinstance(said, dict) else {}
        return [_shown_name(n) for n in listed], {k: _shown_name(str(v)) for k, v in known.items()}
    return None


def _shown_name(name: str) -> str:
    return "".join(c if c.isprintable() else " " for c in name)[:200].strip()


def _with_synsets(labels: list[str], said: dict[str, str]) -> list[ClassInfo]:
    """Classes with ImageNet's synsets, where the names are those, or ImageNet-1k's in order."""
    from timm.data import ImageNetInfo

    if all(_SYNSET.match(name) for name in labels):
        info = ImageNetInfo("imagenet-22k-ms" if len(labels) > 1000 else "imagenet-1k")
        known = set(info.label_names())
        return [
            ClassInfo(i, said.get(s) or (info.label_name_to_description(s) if s in known else s), s)
            for i, s in enumerate(labels)
        ]
    if len(labels) == 1000:
        info = ImageNetInfo("imagenet-1k")
        first = [d.split(",")[0].lower() for d in map(info.index_to_description, range(1000))]
        alike = sum(a == b.split(",")[0].lower() for a, b in zip(first, labels, strict=True))
        if alike > 950:
            synsets = info.label_names()
            return [ClassInfo(i, name, synsets[i]) for i, name in enumerate(labels)]
    return [ClassInfo(i, name) for i, name in enumerate(labels)]


# ---------------------------------------------------------------- preprocessing


def _timm_cfg(own: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of timm's `pretrained_cfg` that say how images are prepared, and its size."""
    cfg: dict[str, Any] = {}
    for name in ("mean", "std"):
        if name in own:
            cfg[name] = _numbers(own[name], f"pretrained_cfg.{name}")
    if "input_size" in own:
        size = own["input_size"]
        if not (
            isinstance(size, list)
            and len(size) == 3
            and all(isinstance(v, int) and 0 < v <= 16384 for v in size)
        ):
            raise ModelError(f"`pretrained_cfg.input_size` must be three sizes, got {size!r}")
        cfg["input_size"] = tuple(size)
    if isinstance(own.get("crop_pct"), int | float) and 0 < own["crop_pct"] <= 1:
        cfg["crop_pct"] = float(own["crop_pct"])
    for name, known in (
        ("interpolation", ("bicubic", "bilinear", "nearest", "lanczos")),
        ("crop_mode", ("center", "squash", "border")),
    ):
        if own.get(name) in known:
            cfg[name] = own[name]
    return cfg


def _numbers(value: Any, name: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else [value]
    right = all(isinstance(v, int | float) and math.isfinite(v) for v in numbers)
    if not right or not 1 <= len(numbers) <= 64:
        raise ModelError(f"`{name}` must be numbers, got {str(value)[:60]}")
    return tuple(float(v) for v in numbers)


def _processor(path: Path) -> dict[str, Any] | None:
    if (path / "preprocessor_config.json").is_file():
        return _json(path / "preprocessor_config.json")
    if (path / "processor_config.json").is_file():
        inner = _json(path / "processor_config.json").get("image_processor")
        return inner if isinstance(inner, dict) else None
    return None


def _pixels(value: Any) -> tuple[Size | None, int | None]:
    """Height and width, or the shorter side, of a size in `preprocessor_config.json`."""
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return None, _side(value["shortest_edge"])
        value = [value.get("height"), value.get("width")]
    if isinstance(value, list) and len(value) == 2:
        return (_side(value[0]), _side(value[1])), None
    return None, _side(value)


def _side(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 16384:
        raise ModelError(f"a size in preprocessor_config.json must be pixels, got {value!r}")
    return value


def _cropped(processor: Mapping[str, Any]) -> bool:
    return bool(processor.get("do_center_crop")) and processor.get("crop_size") is not None


def _shown(processor: Mapping[str, Any]) -> Size | None:
    """Height and width of the images that a preprocessor makes."""
    if not _cropped(processor) and processor.get("do_resize", True) is False:
        return None
    size, side = _pixels(processor["crop_size" if _cropped(processor) else "size"])
    return size or (side, side)  # type: ignore[return-value]


def _preprocessing(
    processor: Mapping[str, Any], size: Size, channels: int, notes: list[str]
) -> dict[str, Any]:
    """The same arithmetic in timm's words.

    A plain number as `size` is the shorter side where a crop follows, else both sides.
    """
    number = processor.get("resample", 2)
    if number not in _RESAMPLING:
        raise ModelError(
            f"`resample` of preprocessor_config.json, {number!r}, is not among "
            f"{', '.join(f'{k} ({v})' for k, v in _RESAMPLING.items())}"
        )
    cfg: dict[str, Any] = {"interpolation": _RESAMPLING[number]}
    mode, share = "squash", 1.0
    if _cropped(processor) and processor.get("do_resize", True):
        both, side = _pixels(processor.get("size"))
        crop, crop_side = _pixels(processor["crop_size"])
        height = crop[0] if crop is not None else int(crop_side or 0)
        resized = both[0] if both is not None else int(side or 0)
        mode = "center" if both is None else "squash"
        if height > resized:
            notes.append(
                f"the folder's preprocessor pads {resized} to {height} pixels, which is not done "
                "here: images are resized to the input"
            )
        else:
            share = _share(height, resized)
    elif processor.get("do_resize", True) is False:
        notes.append("the folder's preprocessor does not resize; here images are, without a crop")
    cfg |= {"crop_mode": mode, "crop_pct": share}
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    (scale,) = _numbers(scale, "rescale_factor")
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if processor.get("do_normalize", True):
        mean = _numbers(processor.get("image_mean", 0.5), "image_mean")
        std = _numbers(processor.get("image_std", 0.5), "image_std")
    if min(std) <= 0 or scale <= 0:
        raise ModelError("`image_std` and `rescale_factor` must be above 0")
    by = 255 * scale  # of pixels in 0 to 1
    for name, values in (("mean", mean), ("std", std)):
        spread = values * channels if len(values) == 1 else values
        cfg[name] = tuple(v if math.isclose(by, 1) else v / by for v in spread)
    return cfg


def _share(crop: int, resized: int) -> float:
    """A share from which timm's floor(crop / share) gives the resized side back."""
    share = crop / resized
    while math.floor(crop / share) < resized:
        share = math.nextafter(share, 0)
    return share

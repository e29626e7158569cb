"""From flags to recipe sections: every value is checked here, before anything heavy loads.

The bounds themselves stand in `npprune.recipe`; this file only says them in the words of the
command line: `--keep` must be in (0, 1], got `1.5`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from npprune.errors import DataError, ModelError, StoreError, UsageError
from npprune.words import PROVIDERS, check_word, did_you_mean

if TYPE_CHECKING:
    import typer
    from pydantic import ValidationError

    from npprune.recipe import DataSection, ModelSection, Section

S = TypeVar("S", bound="Section")

FLAGS = {"name": "MODEL", "train": "--data", "val": "--data", "calibration": "--calibration"}
HINTS = {
    "--keep": "`0.5` keeps half of the hidden units",
    "--axes": "`mlp,heads,qk` lets hidden units, heads and query/key dimensions share the budget",
    "--topk": "`1` is the strongest neuron of every block",
    "--target-params": "`0.7` asks for 70 % of the dense parameters, `4e6` for four million",
    "--target-macs": "`0.7` asks for 70 % of the dense MACs, `1e9` for a billion",
    "--target-latency": "`0.6` asks for 60 % of the dense latency, `4.5` for 4.5 milliseconds",
    "--crop-pct": "`0.9` crops the middle 90 % of the resized image's side",
    "--max-drop": "`1.0` allows top-1 to fall by one point, as predicted on held-out images",
    "--points": "4 points do at the class token, 6 at the patches; left out is best",
}
MODEL_FLAGS = ("checkpoint", "num_classes", "img_size", "num_heads", "released_head")
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def section(cls: type[S], /, **values: Any) -> S:
    """A recipe section from flags; None leaves the section's default.

    UsageError in the words of the command line where a value is out of bounds, or contradicts
    another.
    """
    from pydantic import ValidationError

    from npprune.recipe import check

    try:
        settings = cls(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as err:
        raise _usage_error(cls, err) from err
    check(settings)
    return settings


def _usage_error(cls: type[Section], err: ValidationError) -> UsageError:
    from npprune.recipe import bounds

    first = err.errors()[0]
    field = str(first["loc"][0])
    flag = FLAGS.get(field, "--" + field.replace("_", "-"))
    value, hint = first["input"], HINTS.get(flag)
    if first["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        rule = f"must be one of {', '.join(f'`{option}`' for option in options)}"
        hint = did_you_mean(value, options) or hint
    else:
        limits = bounds(cls, field)
        said = first["msg"].lower().replace("input should", "must")
        finite = first["type"] == "finite_number" and not limits.startswith("in ")
        rule = f"must be {limits}" if limits and not finite else said
    return UsageError(f"`{flag}` {rule}, got `{value}`", hint=hint)


def model_section(name: str, flags: Mapping[str, Any]) -> ModelSection:
    """The network that MODEL and its flags describe."""
    from npprune.recipe import ModelSection

    checkpoint = flags.get("checkpoint")
    existing_file("--checkpoint", checkpoint)
    if name == "auto" and checkpoint is None:
        raise UsageError(
            "MODEL `auto` needs `--checkpoint`: the architecture is read from the file",
            hint="or give a timm name, e.g. `vit_tiny_patch16_224.augreg_in21k_ft_in1k`",
        )
    return section(
        ModelSection,
        name=name,
        **{key: flags.get(key) for key in MODEL_FLAGS},
    )


def data_section(flags: Mapping[str, Any], **source: str | None) -> DataSection:
    """The images that the data flags describe; `source` is one of train, calibration, val."""
    from npprune.recipe import DataSection

    plain = ("class_map", "images_per_class", "on_bad_image", "batch_size", "workers")
    values: dict[str, Any] = {key: flags.get(key) for key in plain}
    values |= {key: flags.get(key) for key in ("preprocessing", "interpolation")}
    values["crop_mode"], values["crop_pct"] = crop(
        flags.get("crop_mode"), flags.get("crop_pct"), no_crop=bool(flags.get("no_crop"))
    )
    for key in ("mean", "std"):
        values[key] = numbers(f"--{key}", flags.get(key))
    values["classes"] = classes(flags.get("classes"))
    class_map = flags.get("class_map")
    if class_map is not None and not Path(class_map).is_file():
        raise DataError(f"`--class-map` must be an existing file, got `{class_map}`")
    return section(DataSection, **values, **source)


def crop(
    mode: str | None, share: float | None, *, no_crop: bool
) -> tuple[str | None, float | None]:
    """Crop mode and share; `--no-crop` stands for both, which must not contradict it."""
    if not no_crop:
        return mode, share
    for flag, given, meant in (("--crop-mode", mode, "squash"), ("--crop-pct", share, 1)):
        if given not in (None, meant):
            raise UsageError(
                f"`--no-crop` means `{flag} {meant}`, got `{flag} {given}` as well",
                hint="leave one of the two out",
            )
    return "squash", 1.0


def classes(given: list[str] | None) -> list[str | int] | str | None:
    """`--classes`: a file's path as it is, else indices as int, synsets and names as str."""
    if not given:
        return None
    if len(given) == 1:
        if Path(given[0]).is_file():
            return given[0]
        if given[0].endswith((".txt", ".json")):
            raise DataError(f"`--classes` names a file that is not there: `{given[0]}`")
    words = [word.strip() for item in given for word in item.split(",")]
    if not all(words):
        raise UsageError(
            f"`--classes` must not hold an empty entry, got `{','.join(given)}`",
            hint="`--classes 1,5,n01440764`, `--classes tench --classes goldfish`, or a file",
        )
    return [int(word) if re.fullmatch(r"\d+", word) else word for word in words]


def numbers(flag: str, text: str | None, kind: Callable[[str], float] = float) -> list[Any] | None:
    """Numbers separated by commas, e.g. `0.5,0.5,0.5`."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as err:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"`{flag}` must be {what} separated by commas, got `{text}`") from err


def words(flag: str, text: str | None) -> list[str] | None:
    """Words separated by commas, each once."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"`{flag}` must not hold an empty entry, got `{text}`")
    return list(dict.fromkeys(parts))


def device(text: str) -> str:
    """The syntax of `--device`; whether it is there is found out later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise UsageError(
            f"`--device` must be `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, got `{text}`",
            hint="`npprune env` says what there is",
        )
    return text


def command_line(ctx: typer.Context) -> str:
    """The command as it was given: a result remembers what made it."""
    return shlex.join(["npprune", *(ctx.obj or [])])


def out_folder(path: Path) -> Path:
    """`--out` with a name of its own: it names the run or the checkpoint, too."""
    if not re.match(r"[^.\s]", path.name):
        raise UsageError(
            f"`--out` must name a folder, not begin with a dot, got `{path}`",
            hint="for example `reports/vit_tiny` or `ckpt/vit_tiny_half`",
        )
    if path.exists() and not path.is_dir():
        raise StoreError(f"`--out` must be a folder, got the file `{path}`")
    return path


def existing_file(flag: str, path: str | None) -> None:
    """ModelError where weights are named and not there (a folder: a checkpoint of ours)."""
    if path is not None and not Path(path).exists():
        raise ModelError(f"`{flag}` must be an existing file, got `{path}`")


def folder_name(model: ModelSection) -> str:
    """A folder's name for a network: the checkpoint's stem for `auto`, else the timm name."""
    if model.name == "auto" and model.checkpoint:
        return Path(model.checkpoint).stem
    return model.name.split("/")[-1].split(".")[0]


def provider(text: str) -> str:
    """The word of `--provider`; whether it is there is found out later."""
    check_word("--provider", text, PROVIDERS)
    return text


def seed(value: int) -> int:
    """A seed that torch and numpy both take."""
    if not 0 <= value < 2**32:
        raise UsageError(f"`--seed` must be in [0, {2**32 - 1}], got `{value}`")
    return value


def run_folder(path: Path, what: str = "RUN") -> Path:
    """A run folder that exists; StoreError otherwise."""
    if (path / "manifest.json").is_file():
        return path
    is_dir = path.is_dir()
    reason = "it holds no manifest.json" if is_dir else "there is no such folder"
    raise StoreError(
        f"{what} must be a run folder, got `{path}`: {reason}",
        hint="`npprune discover` writes one below reports/",
    )


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint folder that exists; StoreError otherwise."""
    if (path / "config.json").is_file():
        return path
    reason = "it holds no config.json" if path.exists() else "there is no such folder"
    raise StoreError(
        f"CHECKPOINT must be a folder written by `npprune prune`, got `{path}`: {reason}",
        hint="`npprune prune RUN --keep 0.5 --out ckpt/NAME` writes one",
    )


def run_or_model(text: str, flags: Mapping[str, Any]) -> Path | ModelSection:
    """What `npprune prune` starts from: a run folder, or a network without paths."""
    path = Path(text)
    if (path / "config.json").is_file():  # a checkpoint of ours, to be pruned further
        return model_section(text, flags)
    looks_like_path = "/" in text and not text.startswith(HUB_PREFIXES)
    if flags.get("checkpoint") is None and (path.is_dir() or looks_like_path):
        return run_folder(path, "RUN_OR_MODEL")
    return model_section(text, flags)

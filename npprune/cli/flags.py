"""From options to recipe sections: every value is checked here, before anything heavy loads.

Bounds, rules and hints stand on the fields of `npprune.recipe`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from npprune.errors import DataError, ModelError, StoreError, UsageError, setting
from npprune.files import foreign_folder, owner_is_here
from npprune.recipe.loading import section_of
from npprune.recipe.messages import usage_error
from npprune.recipe.sections import DataSection, ModelSection, Section
from npprune.recipe.settings import item_of, words_of

if TYPE_CHECKING:
    import typer

S = TypeVar("S", bound="Section")

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def like_path(text: str) -> bool:
    """Whether MODEL looks like a folder here, not like a network's name (`OWNER/NAME` is one on
    the hub, unless `OWNER` is a folder here)."""
    if "/" not in text or text.startswith(HUB_PREFIXES):
        return False
    owner, _, name = text.partition("/")
    return "/" in name or not owner[:1].isalnum() or not name or owner_is_here(text)


def section(cls: type[S], /, **values: Any) -> S:
    """A recipe section from options; None leaves the section's default, text of a list field is
    separated at its commas.

    UsageError where a value is out of bounds, or contradicts another.
    """
    given = {name: _split(cls, name, v) for name, v in values.items() if v is not None}
    return section_of(cls, given, as_given=values)


def check_setting(cls: type[Section], name: str, value: Any) -> None:
    """UsageError where a value is not right for one field of a section; None is not checked."""
    try:
        if value is not None:
            setattr(cls.model_construct(), name, value)
    except ValidationError as err:
        raise usage_error(cls, err, {name: value}) from err


def _split(cls: type[Section], name: str, value: Any) -> Any:
    """The entries of a list field, words each once; another value as it is."""
    field = cls.model_fields[name]
    if not isinstance(value, str) or item_of(field) is None:
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(parts):
        raise UsageError(f"{setting(cls.key(name))} must not hold an empty entry, got `{value}`")
    return list(dict.fromkeys(parts)) if words_of(field) else parts


def model_section(name: str, given: Mapping[str, Any]) -> ModelSection:
    """The network that MODEL and its options describe."""
    checkpoint = given.get("checkpoint")
    existing_file("--checkpoint", checkpoint)
    if name == "auto" and checkpoint is None:
        raise UsageError(
            "MODEL `auto` needs `--checkpoint`: the architecture is read from the file",
            hint="or give a timm name, e.g. `vit_tiny_patch16_224.augreg_in21k_ft_in1k`",
        )
    return section(ModelSection, name=name, **given)


def data_section(given: Mapping[str, Any]) -> DataSection:
    """The images that their options describe, `no_crop` among them."""
    values = dict(given)
    values["crop_mode"], values["crop_pct"] = crop(
        values.get("crop_mode"), values.get("crop_pct"), no_crop=bool(values.pop("no_crop", None))
    )
    values["classes"] = classes(values.get("classes"))
    class_map = values.get("class_map")
    if class_map is not None and not Path(class_map).is_file():
        raise DataError(f"`--class-map` must be an existing file, got `{class_map}`")
    return section(DataSection, **values)


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


def command_line(ctx: typer.Context) -> str:
    """The command as it was given: a result remembers what made it."""
    return shlex.join(["npprune", *(ctx.obj or [])])


def existing_file(flag: str, path: str | None) -> None:
    """ModelError where weights are named and not there (a folder: a checkpoint of ours)."""
    if path is not None and not Path(path).exists():
        raise ModelError(f"`{flag}` must be an existing file, got `{path}`")


def folder_name(model: ModelSection) -> str:
    """A folder's name for a network: the checkpoint's stem for `auto`, else the timm name."""
    if model.name == "auto" and model.checkpoint:
        return Path(model.checkpoint).stem
    last = model.name.rstrip("/").replace(":", "/").split("/")[-1].partition("@")[0]
    return last.split(".")[0] or "model"


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
    if (library := foreign_folder(path)) is not None:
        raise StoreError(
            f"CHECKPOINT must be a folder written by `npprune prune`, got a network of {library}: "
            f"`{path}`",
            hint="it is a MODEL for `npprune discover`, `prune` and `export`",
        )
    if (path / "config.json").is_file():
        return path
    reason = "it holds no config.json" if path.exists() else "there is no such folder"
    raise StoreError(
        f"CHECKPOINT must be a folder written by `npprune prune`, got `{path}`: {reason}",
        hint="`npprune prune RUN --keep 0.5 --out ckpt/NAME` writes one",
    )


def run_or_model(text: str, given: Mapping[str, Any]) -> Path | ModelSection:
    """What `npprune prune` starts from: a run folder, or a network without paths."""
    path = Path(text)
    if (path / "config.json").is_file():  # a checkpoint of ours, to be pruned further
        return model_section(text, given)
    if given.get("checkpoint") is None and (path.is_dir() or like_path(text)):
        return run_folder(path, "RUN_OR_MODEL")
    return model_section(text, given)

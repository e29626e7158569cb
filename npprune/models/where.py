"""Where a network lies: behind a MODEL that is a folder or a name on the hub, or a checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import timm

from npprune.errors import ModelError, setting
from npprune.files import foreign_folder, owner_is_here
from npprune.models.folders import WEIGHTS
from npprune.models.hub import fetch_folder

AUTO = "auto"
LOCAL, HUB = "local-dir:", re.compile(r"hf[-_]hub:")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?")


@dataclass
class Described:
    """A folder whose `config.json` describes its network."""

    path: Path
    given: str  # as it was given
    notes: list[str] = field(default_factory=list)


def find_folder(name: str, checkpoint: str | Path | None) -> tuple[str, Described | None]:
    """The folder that MODEL and `checkpoint` mean, if they mean one, and MODEL without it.

    A name on the hub of weights that timm knows becomes timm's own name; other names of the hub are
    downloaded.

    Raises:
        ModelError: no such folder, no description in it, or two networks are named.
    """
    if checkpoint is not None:
        name = timms_own(name) or name
        found = _beside(Path(checkpoint))
        if found is not None and (Path(name).is_dir() or name.startswith(LOCAL)):
            raise _two(name, checkpoint)
        if found is None and (_is_folder(name) or _is_repo(name)):
            raise _two(name, checkpoint)
        return name, found
    if (own := timms_own(name)) is not None:
        return own, None
    if _is_folder(name):
        return AUTO, _folder(name)
    if _is_repo(name):
        path = fetch_folder(HUB.sub("", name))
        return AUTO, Described(path, name)
    return name, None


def timms_own(name: str) -> str | None:
    """timm's name of weights that are named as on the hub (`timm/NAME`)."""
    last = re.fullmatch(r"(?:hf[-_]hub:)?timm/([\w.]+)", name)
    if last is None or Path(name).exists() or last[1] not in timm.list_models(pretrained=True):
        return None
    return last[1]


def foreign_repo(name: str) -> str | None:
    """The name on the hub, `OWNER/NAME`, of a network that timm does not publish itself."""
    if timms_own(name) is not None or _is_folder(name) or not _is_repo(name):
        return None
    return HUB.sub("", name)


def _is_folder(name: str) -> bool:
    return name.startswith((LOCAL, "/", "./", "../", "~")) or Path(name).is_dir()


def _is_repo(name: str) -> bool:
    """Whether a name is one on the hub: `OWNER/NAME`, unless `OWNER` is a folder here."""
    if HUB.match(name):
        return True
    return _REPO.fullmatch(name) is not None and not owner_is_here(name)


def _folder(name: str) -> Described:
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if not path.is_dir():
        raise ModelError(f"there is no folder `{path}`", hint="check the path")
    if foreign_folder(path) is None:
        raise ModelError(
            f"the folder `{path}` does not describe its network: it has no config.json of "
            "`transformers` or timm",
            hint=f"`auto` with {setting('model.checkpoint', 'FILE')} reads the weights file alone",
        )
    return Described(path, name)


def _beside(path: Path) -> Described | None:
    """The description of a folder of weights, or beside a file of weights."""
    if path.is_dir():
        return Described(path, str(path)) if foreign_folder(path) is not None else None
    if path.name in WEIGHTS and foreign_folder(path.parent) is not None:
        return Described(path.parent, str(path), [f"described by the config.json beside {path}"])
    return None


def _two(name: str, checkpoint: str | Path) -> ModelError:
    return ModelError(
        f"MODEL `{name}` has weights of its own, and {setting('model.checkpoint')} names others: "
        f"`{checkpoint}`",
        hint="leave one of the two out, or give a timm name or `auto` with the weights",
    )

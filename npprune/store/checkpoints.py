"""Checkpoints: `model.safetensors` and `config.json`, and the plan that made them.

The folder appears as a whole. No pickles: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from npprune import records
from npprune.errors import DamagedError, StoreError
from npprune.files import CARD, CARD_MARK, foreign_folder
from npprune.records import CheckpointConfig, Plan
from npprune.store import atomic
from npprune.store.runs import LOCKS

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PLAN = "plan.json"
EXPORT = "export.json"
RESULT = ("result.json", "report.html", "report.md")  # of a network pruned without a run
EXPORTED = (".onnx", ".onnx.data", ".pt2", ".export.json")


def write_checkpoint(
    folder: str | Path,
    config: CheckpointConfig,
    tensors: dict[str, Tensor],
    plan: Plan | None = None,
) -> CheckpointConfig:
    """Write a checkpoint; an older one of npprune in this place is replaced as a whole.

    `weights_sha256` (of the file `model.safetensors`) and, with a plan, `plan_sha256` are set
    here; the config as written is returned. StoreError where the folder holds anything else.
    """
    from safetensors.torch import save

    with atomic.replace_folder(Path(folder), objection) as fresh:
        atomic.write_bytes(fresh / WEIGHTS, save(_plain(tensors)))
        config = dataclasses.replace(
            config,
            weights_sha256=atomic.sha256_file(fresh / WEIGHTS),
            plan_sha256=records.digest(plan) if plan is not None else config.plan_sha256,
        )
        if plan is not None:
            atomic.write_json(fresh / PLAN, plan)
        atomic.write_json(fresh / CONFIG, config)
    return config


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has the files of a checkpoint, and is not another library's."""
    there = (Path(folder) / CONFIG).is_file() and (Path(folder) / WEIGHTS).is_file()
    return there and foreign_folder(folder) is None


def read_config(folder: str | Path) -> CheckpointConfig:
    """The configuration alone, without the weights; StoreError if it is no checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a checkpoint folder" if folder.exists() else "does not exist"
        raise StoreError(f"checkpoint `{folder}` {what}", hint=_HINT)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise StoreError(f"`{folder}` is not a checkpoint: it has no `{name}`", hint=_HINT)
    if (library := foreign_folder(folder)) is not None:
        raise StoreError(
            f"`{folder}` is a folder of {library}, not a pruned checkpoint", hint=_FOREIGN
        )
    return atomic.read_json(CheckpointConfig, folder / CONFIG)


def read_checkpoint(folder: str | Path) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """Configuration and tensors (on the CPU). StoreError where a part is missing or changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    config = read_config(folder)
    found = atomic.sha256_file(folder / WEIGHTS)
    if found != config.weights_sha256:
        raise StoreError(
            f"`{folder / WEIGHTS}` does not match its `{CONFIG}`: expected sha256 "
            f"{config.weights_sha256[:12]}..., got {found[:12]}...",
            hint="the file was changed or cut short: copy or prune it again",
        )
    try:
        return config, load(atomic.read_bytes(folder / WEIGHTS))
    except SafetensorError as err:
        raise StoreError(f"`{folder / WEIGHTS}` is not a safetensors file: {err}") from err


def plan_of(folder: str | Path, config: CheckpointConfig) -> Plan | None:
    """The plan that made a checkpoint; None where none did.

    Raises:
        StoreError: it is not there any more, or is not that plan.
    """
    path = Path(folder) / PLAN
    if not config.plan_sha256 and not path.is_file():
        return None
    if not path.is_file():
        raise StoreError(f"`{folder}` has lost the plan that made it, `{PLAN}`", hint=_PLAN_AGAIN)
    plan = atomic.read_json(Plan, path)
    if config.plan_sha256 not in ("", records.digest(plan)):
        raise DamagedError(f"`{path}` is not the plan that made the checkpoint", hint=_PLAN_AGAIN)
    return plan


_PLAN_AGAIN = "copy the checkpoint again, or prune again"
_FOREIGN = "it is a MODEL for `npprune discover`, `prune` and `export`"
_HINT = "give a folder that `npprune prune ... --out FOLDER` wrote"


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; those that share memory are copied, the format has none."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _is_card(path: Path) -> bool:
    """Whether a file is the model card that npprune wrote, not a README of someone else."""
    return path.name == CARD and path.is_file() and CARD_MARK in atomic.read_text(path)


def _was_ours(folder: Path) -> bool:
    """Whether a folder with a damaged configuration is a checkpoint all the same."""
    try:
        atomic.read_json(Plan, folder / PLAN)
        return True
    except StoreError:
        return b'"kind": "checkpoint"' in atomic.read_bytes(folder / CONFIG)


def objection(folder: Path) -> str | None:
    """Why a folder must not be replaced by a new checkpoint, or None."""
    try:
        atomic.read_json(CheckpointConfig, folder / CONFIG)
    except StoreError as err:
        if not (isinstance(err, DamagedError) and _was_ours(folder)):
            return f"it is not empty, and not a checkpoint of npprune (no valid `{CONFIG}`)"
    for path in sorted(folder.iterdir()):
        ours = path.name in (WEIGHTS, CONFIG, PLAN, EXPORT, *RESULT)
        ours = ours or path.name.endswith((*EXPORTED, atomic.DAMAGED)) or _is_card(path)
        ours = ours or path.name in LOCKS
        if not (ours and path.is_file()) and not atomic.is_leftover(path):
            return f"it also holds `{path.name}`, which npprune did not write"
    return None

"""Reading a checkpoint file of any common kind into tensors, without running code from it.

safetensors; PyTorch files with `weights_only=True`; NumPy archives with `allow_pickle=False`.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npprune.errors import ModelError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys that hold the weights in a training checkpoint, the averaged weights first (as timm)."""

PREFIXES = ("_orig_mod.", "module.", "model.")
"""What torch.compile, data parallelism and trainers put before every name."""


@dataclass
class Weights:
    """The tensors of a file by name, and how they were found."""

    tensors: dict[str, Tensor]
    layout: str  # "torch" | "jax"
    wrapper: str | None = None  # the key that held them
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path) -> Weights:
    """The tensors of a checkpoint file, on the CPU.

    `.npz` is read as a JAX archive, `.safetensors` as such, all else by `torch.load` with
    `weights_only=True`. Wrapping keys (`model`, `state_dict`, averaged weights first) and common
    prefixes (`module.`) are removed.

    Raises:
        ModelError: the file is missing, empty, a folder, damaged, holds pickled code, holds no
            tensors, or holds a value that is not finite.
    """
    _check_file(path)
    if path.suffix == ".npz":
        weights = Weights(_read_npz(path), "jax")
    elif path.suffix == ".safetensors":
        weights = Weights(_without_prefixes(_read_safetensors(path)), "torch")
    else:
        weights = _unwrap(_read_torch(path), path)
    for name, tensor in weights.tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"checkpoint {path}: tensor `{name}` holds values that are not finite",
                hint="the file comes from a run that diverged, or is damaged",
            )
    return weights


def _check_file(path: Path) -> None:
    if path.is_dir():
        pruned = (path / "model.safetensors").is_file()
        raise ModelError(
            f"checkpoint must be a file, got the folder {path}",
            hint="give the folder itself as the model"
            if pruned and (path / "config.json").is_file()
            else "name the weights file inside it",
        )
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist", hint="check the path")
    if path.stat().st_size == 0:
        raise ModelError(f"checkpoint {path} is empty", hint="copy or download it again")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as err:
        raise _damaged(path, "safetensors", err) from err


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(a) for name, a in arrays.items() if a.dtype.kind in "fiub"}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as err:
        raise _damaged(path, "NumPy", err) from err


def _read_torch(path: Path) -> Any:
    try:
        # Training scripts store their parsed arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        code = _pickled_code(path)
        if not code:
            raise _damaged(path, "PyTorch", err) from err
        raise ModelError(
            f"checkpoint {path} holds pickled code ({', '.join(code[:3])}), which is not run",
            hint="save its state dict alone, best as safetensors",
        ) from err
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as err:
        raise _damaged(path, "PyTorch", err) from err


def _pickled_code(path: Path) -> list[str]:
    """What a PyTorch file would import beyond tensors; empty if it cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only words the error that is raised anyway
        return []


def _damaged(path: Path, kind: str, err: Exception) -> ModelError:
    lines = str(err).strip().splitlines() or [type(err).__name__]
    return ModelError(
        f"checkpoint {path} cannot be read as a {kind} file: {lines[0][:160]}",
        hint="it is damaged, cut short, or of another kind; `.safetensors` and `.npz` are read "
        "by their suffix, everything else as a PyTorch file",
    )


def _unwrap(loaded: Any, path: Path) -> Weights:
    """The weights inside a training checkpoint."""
    wrapper = None
    if isinstance(loaded, dict):
        wrapper = next((k for k in WRAPPERS if isinstance(loaded.get(k), dict)), None)
    found = loaded[wrapper] if wrapper else loaded
    tensors = (
        {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if isinstance(found, dict)
        else {}
    )
    if not tensors:
        what = (
            f"a dictionary with {', '.join(map(repr, list(found)[:4])) or 'nothing'}"
            if isinstance(found, dict)
            else type(found).__name__
        )
        raise ModelError(
            f"checkpoint {path} must hold named tensors, got {what}",
            hint="save `model.state_dict()`, alone or under the key `model` or `state_dict`",
        )
    notes = [f"averaged weights: the file's `{wrapper}`"] if wrapper in WRAPPERS[:2] else []
    return Weights(_without_prefixes(tensors), "torch", wrapper, notes)


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that all of them share."""
    while True:
        shared = next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None)
        if shared is None or not tensors:
            return tensors
        tensors = {k.removeprefix(shared): v for k, v in tensors.items()}

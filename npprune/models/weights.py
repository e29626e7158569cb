"""Reading a checkpoint file of any common kind into tensors, without running code from it.

safetensors; PyTorch files with `weights_only=True`; NumPy archives with `allow_pickle=False`.
Which of a file's tensors are the network is found by `unwrap`.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npprune.errors import ModelError
from npprune.models.unwrap import Shapes, unwrap
from npprune.records import plain_text
from npprune.untrusted import check_archive, check_unpacked, first_line, out_of_memory


@dataclass
class Weights:
    """The tensors of a file by name, and how they were found."""

    tensors: dict[str, Tensor]
    layout: str  # "torch" | "jax"
    wrapper: str | None = None  # the key that held them
    beside: dict[str, Tensor] = field(default_factory=dict)  # the file's other tensors
    notes: list[str] = field(default_factory=list)


def read_weights(path: Path, like: Callable[[], Shapes] | None = None) -> Weights:
    """The tensors of the network in a checkpoint file, on the CPU.

    `.npz` is read as a JAX archive, `.safetensors` as such, all else by `torch.load` with
    `weights_only=True`. Keys and prefixes around the network are removed (`unwrap`).

    Args:
        path: the file.
        like: gives the shapes by name of the wanted network, for a file with different ones.

    Raises:
        ModelError: the file is missing, empty, a folder, damaged, holds pickled code, holds no
            tensors, or holds a value that is not finite.
    """
    _check_file(path)
    if path.suffix == ".npz":
        weights = Weights(_read_npz(path), "jax")
    else:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        found = unwrap(read(path), path, like)
        key = ".".join(found.path) or None
        weights = Weights(found.tensors, "torch", key, found.beside, found.notes)
    _check_finite(weights.tensors, path)
    return weights


def read_all(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file of plain named tensors, under its name there; see `read_weights`."""
    _check_file(path)
    loaded = (_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path)
    named = loaded if isinstance(loaded, dict) else {}
    tensors = {str(k): v for k, v in named.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ModelError(f"checkpoint {path} must hold named tensors")
    _check_finite(tensors, path)
    return tensors


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    try:  # a few bytes can be told to stand for any number of elements
        check_unpacked(path, sum(t.numel() * t.element_size() for t in tensors.values()))
    except ValueError as err:
        raise _damaged(path, "PyTorch", err) from err
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"checkpoint {path}: tensor `{name}` holds values that are not finite",
                hint="the file comes from a run that diverged, or is damaged",
            )


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
    from safetensors.torch import load, load_file

    try:
        utf8 = plain_text(str(path)) == str(path)  # the library opens no other paths
        return load_file(path) if utf8 else load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as err:
        raise _damaged(path, "safetensors", err) from err


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")
        check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            for member in archive.zip.infolist():
                _check_member(archive.zip, member)
            arrays = {name: archive[name] for name in archive.files}
        kept = {name: a for name, a in arrays.items() if isinstance(a, np.ndarray)}
        return {name: torch.from_numpy(a) for name, a in kept.items() if a.dtype.kind in "fiub"}
    except Exception as err:  # NumPy and zipfile raise anything on broken files
        if out_of_memory(err):
            raise
        raise _damaged(path, "NumPy", err) from err


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """ValueError for an array whose shape is not that of its bytes: it would be made first."""
    from numpy.lib import format

    if not member.filename.endswith(".npy"):
        return
    with archive.open(member) as file:
        version = format.read_magic(file)
        header = format.read_array_header_1_0 if version == (1, 0) else format.read_array_header_2_0
        shape, _, dtype = header(file)
        told = math.prod(shape) * dtype.itemsize
        there = member.file_size - file.tell()
    if told > there:
        raise ValueError(f"`{member.filename}` says {told} bytes of values, and holds {there}")


def _read_torch(path: Path) -> Any:
    _refuse_programs(path)
    try:
        check_archive(path)
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        code = _pickled_code(path)
        if not code:
            raise _damaged(path, "PyTorch", err) from err
        hint = "where the file comes from, save its state dict alone: `model.state_dict()`"
        if any(name.startswith(("torch.nn.", "timm.", "torchvision.")) for name in code):
            hint = "it is a whole pickled network: " + hint
        raise ModelError(
            f"checkpoint {path} holds pickled code ({', '.join(code[:3])}), which is not run",
            hint=hint,
        ) from err
    except Exception as err:  # a broken pickle raises anything
        if out_of_memory(err):
            raise
        raise _damaged(path, "PyTorch", err) from err


def _refuse_programs(path: Path) -> None:
    """ModelError for archives of programs, which hold weights in other ways."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return  # PyTorch's older format, or damaged
    if "constants.pkl" in names:
        raise ModelError(
            f"checkpoint {path} is a TorchScript archive, and programs are not run",
            hint="take its weights out: `import torch; "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')`",
        )
    if any(name.startswith(("models/", "data/weights/", "data/constants/")) for name in names):
        raise ModelError(
            f"checkpoint {path} is an archive of torch.export, and programs are not run",
            hint="take its weights out: `import torch; "
            "torch.save(torch.export.load(FILE).state_dict, 'weights.pth')`",
        )


class _Inert:
    """Stands for a value that is not looked at: nothing of its own type is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _plain_types() -> list[Any]:
    """What training scripts store beside the weights, and is no code: parsed arguments, paths,
    NumPy's numbers and arrays, PyTorch's version. Under all names that these have had."""
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    names = ["argparse.Namespace", "torch.torch_version.TorchVersion"]
    names += [f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in paths]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        names += [f"{module}.scalar", f"{module}._reconstruct"]
    names += ["numpy.dtype", "numpy.ndarray"]
    return [(_Inert, name) for name in names]


def _pickled_code(path: Path) -> list[str]:
    """What a PyTorch file would import beyond tensors; empty if it cannot be told."""
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # only words the error that is raised anyway
        return []


def _damaged(path: Path, kind: str, err: Exception) -> ModelError:
    return ModelError(
        f"checkpoint {path} cannot be read as a {kind} file: {first_line(err)}",
        hint="it is damaged, cut short, or of another kind; `.safetensors` and `.npz` are read "
        "by their suffix, everything else as a PyTorch file",
    )

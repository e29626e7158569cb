"""The record beside an exported file, `export.json`: where it lies, and whether it still fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from npprune.errors import DamagedError, ExportError, StoreError
from npprune.files import sha256_file
from npprune.records import ExportRecord, from_json

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "timm": "", "transformers": ""}


def record_path(target: Path, format: str) -> Path:
    """`export.json` beside `model.onnx` or in a folder; else `NAME.export.json`."""
    if not SUFFIXES[format]:
        return target / "export.json"
    name = "export.json" if target.name == "model.onnx" else f"{target.stem}.export.json"
    return target.with_name(name)


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """sha256 of each file by its name, for the record."""
    return {file.name: sha256_file(file) for file in sorted(files)}


def changed_files(record: ExportRecord, folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of an export that are not as the record says, and what is wrong with each."""
    for name, sha256 in (record.hashes or {record.file: record.sha256}).items():
        path = folder / name
        if not path.is_file():
            yield path, "it is not there"
        elif sha256_file(path) != sha256:
            yield path, "it was changed or damaged since it was exported"


def check_beside(path: Path) -> None:
    """Refuse an exported file that the record beside it does not fit; without one nothing is said.

    Raises:
        ExportError: the file, its weights or the record itself were changed or damaged.
    """
    beside = record_path(path, "onnx")
    if not path.is_file() or not beside.is_file():
        return
    hint = f"export it again; if you changed it on purpose, remove `{beside.name}`"
    try:
        record = from_json(ExportRecord, beside.read_text("utf-8-sig"), where=str(beside))
    except (DamagedError, UnicodeDecodeError) as err:
        said = err.message if isinstance(err, DamagedError) else f"`{beside}` is not UTF-8 text"
        raise ExportError(said, hint=hint) from err
    except (StoreError, OSError):  # someone else's, or of a newer npprune
        return
    if record.file != path.name:
        return
    for changed, why in changed_files(record, path.parent):
        raise ExportError(f"`{changed}` is not the file in `{beside.name}`: {why}", hint=hint)

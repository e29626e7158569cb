"""A file gets its name only when all is well: made in a folder beside it, then moved."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from npprune.errors import ExportError


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def staging(final_path: Path) -> Iterator[Path]:
    """A folder beside the final file, on the same file system, gone afterwards."""
    try:
        final_path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=f".{final_path.name}.", dir=final_path.parent)
    except OSError as err:
        raise ExportError(f"cannot write to {final_path.parent}: {err.strerror}") from err
    try:
        yield Path(folder)
    except OSError as err:
        raise ExportError(f"cannot write {final_path}: {err.strerror}") from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, final_path: Path) -> None:
    """Move the files out, the weights first: a graph never stands without them."""
    data = final_path.with_name(final_path.name + ".data")
    made = {f.name for f in folder.iterdir()}
    for name in sorted(made, key=lambda n: n == final_path.name):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / name, final_path.parent / name)
    if data.name not in made:
        data.unlink(missing_ok=True)

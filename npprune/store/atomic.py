"""Records, arrays and folders that are there as a whole or not at all (see `npprune.files`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from npprune import records
from npprune.errors import DamagedError, StoreError, setting
from npprune.files import (
    is_leftover,
    make_folder,
    remove_leftovers,
    replacing,
    sha256_file,
    store_error,
    write_bytes,
)

__all__ = [
    "is_leftover",
    "make_folder",
    "read_bytes",
    "read_json",
    "read_text",
    "remove_leftovers",
    "replace_folder",
    "sha256_file",
    "store_error",
    "write_bytes",
    "write_json",
    "write_safetensors",
    "write_text",
]

R = TypeVar("R")

DAMAGED = ".damaged"  # after the name of a file that was set aside


@contextlib.contextmanager
def locked(
    folder: Path, name: str, holder: Callable[[], str], *, wait: float = 0.0
) -> Iterator[None]:
    """Hold a folder, which is made, by a lock file; it ends with the process, however that ends.

    holder: says who has it, for the StoreError that refuses a second process after `wait` seconds.
    """
    import filelock

    make_folder(folder)
    lock = filelock.FileLock(folder / name)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout as err:
        raise StoreError(
            f"`{folder}` is in use by {holder()}",
            hint=f"wait for it to end, or choose another {setting('out')}",
        ) from err
    except OSError as err:
        raise store_error(err, folder / name, "lock") from err
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, UTF-8; paths that are not UTF-8 keep their bytes as JSON's `\\udcff`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, record: Any) -> None:
    """Write a record of `npprune.records` as JSON."""
    write_text(path, records.to_json(record))


def write_safetensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named numpy arrays; equal arrays give equal bytes."""
    import numpy as np
    from safetensors.numpy import save

    # No metadata: its order is not part of the format, and the bytes must be reproducible.
    write_bytes(path, save({name: np.ascontiguousarray(a) for name, a in sorted(arrays.items())}))


def read_bytes(path: Path) -> bytes:
    """A file's content, or a StoreError that says why not."""
    try:
        return path.read_bytes()
    except OSError as err:
        raise store_error(err, path, "read") from err


def read_text(path: Path) -> str:
    """A file's UTF-8 text, a byte order mark left out; or a StoreError that says why not."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise DamagedError(
            f"cannot read `{path}`: it is not UTF-8 text",
            hint="take a copy of it, or make it again",
        ) from err


def read_json(cls: type[R], path: Path) -> R:
    """A record of `npprune.records` from its JSON file; messages name the file."""
    return records.from_json(cls, read_text(path), where=str(path))


def set_aside(path: Path, *, stays: bool = False) -> Path:
    """Give a damaged file another name, `NAME.damaged`, for it to be made again.

    stays: it keeps its own name, too, until it is replaced: without it others would not know what
    the folder is.
    """
    aside = path.with_name(f"{path.name}{DAMAGED}")
    if stays:
        write_bytes(aside, read_bytes(path))
        return aside
    try:
        os.replace(path, aside)
    except OSError as err:
        raise store_error(err, path, "set aside") from err
    return aside


@contextlib.contextmanager
def replace_folder(target: Path, objection: Callable[[Path], str | None]) -> Iterator[Path]:
    """Fill the folder that is yielded; on a clean exit it takes the place of `target`.

    An existing, non-empty `target` is asked about first: `objection(target)` says why it must not
    be replaced, or None. After an exception `target` is as it was.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise StoreError(
            f"`{target}` is a file, not a folder", hint=f"choose another {setting('out')}"
        )
    if target.is_dir() and any(target.iterdir()) and (why := objection(target)):
        raise StoreError(
            f"`{target}` is not replaced: {why}", hint=f"choose another {setting('out')}"
        )
    with replacing(target) as fresh:
        yield fresh

"""Files that are there as a whole or not at all.

A file is written to a temporary name in its own folder, synced, then renamed. Whatever goes wrong
becomes a StoreError with a next step, and no half-written file is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from npprune import records
from npprune.errors import StoreError

R = TypeVar("R")

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")

_REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on the device", "free some space, or choose another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another place"),
    errno.EFBIG: ("the file would be larger than is allowed here", "choose another place"),
    errno.EACCES: ("no permission", "check the folder's owner and mode, or choose another place"),
    errno.EPERM: ("no permission", "check the folder's owner and mode, or choose another place"),
    errno.EROFS: ("the file system is read-only", "choose a place that can be written"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another place"),
    errno.EEXIST: ("a file stands where a folder is needed", "choose another place"),
    errno.EISDIR: ("a folder stands where a file is needed", "choose another name"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.ENOENT: ("it does not exist", "check the path"),
}


def store_error(err: OSError, path: Path, action: str = "write") -> StoreError:
    """The StoreError that tells a user what `err` means for `path`."""
    reason, hint = _REASONS.get(
        err.errno or 0, (err.strerror or str(err), "check that the place can be read and written")
    )
    return StoreError(f"cannot {action} `{path}`: {reason}", hint=hint)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. StoreError if a file is in the way or it is forbidden."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise store_error(err, path, "create folder") from err


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as a whole; an older one is replaced only when the new one is complete."""
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as err:
        raise store_error(err, path) from err


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
    """A text file (UTF-8, a byte order mark left out), or a StoreError that says why not."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise StoreError(f"cannot read `{path}`: it is not UTF-8 text") from err


def read_json(cls: type[R], path: Path) -> R:
    """A record of `npprune.records` from its JSON file; messages name the file."""
    return records.from_json(cls, read_text(path), where=str(path))


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces."""
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()
    except OSError as err:
        raise store_error(err, path, "read") from err


@contextlib.contextmanager
def replace_folder(target: Path, objection: Callable[[Path], str | None]) -> Iterator[Path]:
    """Fill the folder that is yielded; on a clean exit it takes the place of `target`.

    An existing, non-empty `target` is asked about first: `objection(target)` says why it must not
    be replaced, or None. After an exception `target` is as it was.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise StoreError(f"`{target}` is a file, not a folder", hint="choose another --out")
    if target.is_dir() and any(target.iterdir()) and (why := objection(target)):
        raise StoreError(f"`{target}` is not replaced: {why}", hint="choose another --out")
    make_folder(target.parent)
    fresh, old = _temporary(target), _temporary(target)
    try:
        make_folder(fresh)
        try:
            yield fresh
            sync_folder(fresh)
            if target.exists():
                os.rename(target, old)
            try:
                os.rename(fresh, target)
            except OSError:
                if old.exists():
                    os.rename(old, target)
                raise
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as err:
        raise store_error(err, target) from err


def is_leftover(path: Path) -> bool:
    """Whether a name is one of the temporary names given here."""
    return bool(_TEMPORARY.match(path.name))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left. Only the owner of the lock may do so."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_leftover(path):
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as err:
                raise store_error(err, path, "remove") from err


def _temporary(path: Path) -> Path:
    """A fresh name beside `path`; the random part keeps two processes apart."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

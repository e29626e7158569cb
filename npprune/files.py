"""Where results go: files that are there as a whole or not at all, and never over what was read.

A file is written to a temporary name in its own folder, synced, then renamed. Whatever goes wrong
becomes a StoreError with a next step, and no half-written file is left behind. Only plain files
and folders are replaced, never a device, a pipe or a socket.

A temporary file or folder is locked by the process that fills it. What a killed one left has no
lock any more, and goes when the same thing is written again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from npprune.errors import StoreError, UnstoredError, UsageError, setting
from npprune.untrusted import parse_json

try:
    import fcntl
except ImportError:  # Windows: temporary files are not locked there, and leftovers stay
    fcntl = None  # type: ignore[assignment]

_CONFIG_BYTES = 16 * 2**20  # of a config.json that is read
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")
_OLD = ".old"  # in the temporary name of a folder that is being replaced

CARD = "README.md"  # of a checkpoint that was measured
CARD_MARK = (
    "<!-- written by npprune, which replaces this file when the network is measured again -->"
)
OUR_FOLDERS = ("reports", "ckpt")  # where runs and checkpoints go

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


def out_folder(path: str | Path) -> Path:
    """A folder that may be written, with a name of its own: that of the run or checkpoint, too.

    Raises:
        UsageError: its name begins with a dot or a blank, or it has none.
        StoreError: it is a file.
    """
    folder = Path(path)
    if not re.match(r"[^.\s]", folder.name):
        raise UsageError(
            f"{setting('out')} must name a folder, not begin with a dot, got `{path}`",
            hint="for example `reports/vit_tiny` or `ckpt/vit_tiny_half`",
        )
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{setting('out')} must be a folder, got the file `{path}`")
    return folder


def foreign_folder(path: str | Path) -> str | None:
    """`transformers` or `timm`, where a folder's `config.json` is one of theirs; None otherwise."""
    config = Path(path) / "config.json"
    try:
        if config.stat().st_size > _CONFIG_BYTES:
            return None
        said = parse_json(config.read_text(encoding="utf-8-sig"), parse_constant=float)
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or "kind" in said:
        return None
    if isinstance(said.get("architecture"), str):
        return "timm"
    return "transformers" if "model_type" in said or "architectures" in said else None


# ---------------------------------------------------------------- before the work


def refuse_overwriting(
    out: Path, reads: Iterable[str | Path], *, replaced: bool = False, named: str = "out"
) -> None:
    """UsageError where writing `out` would overwrite something that is read.

    Paths are compared as what they are: links, `./x` and a second name of the same file are the
    same place. What does not exist cannot be overwritten.

    Args:
        reads: files and folders. A file that is put next to others into a folder is no conflict.
        replaced: `out` is a folder that is replaced as a whole: it must not hold what is read.
    """
    target = Path(os.path.realpath(out))
    for read in map(Path, reads):
        source = Path(os.path.realpath(read))
        if not source.exists():
            continue
        if _same(target, source):
            why = "is what is read"
        elif replaced and lies_in(source, target):
            why = "would be replaced, and it holds what is read"
        else:
            continue
        raise UsageError(
            f"{setting(named)} must not overwrite an input, got `{out}`: it {why} (`{read}`)",
            hint=f"choose another {setting(named)}; the input stays as it is",
        )


def check_file(path: Path, *, named: str = "out") -> None:
    """Refuse a `path` where no plain file can be written; nothing is made or changed.

    Raises:
        UsageError: it is a folder. StoreError: a device, a pipe, or a place without permission.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise UsageError(f"{setting(named)} must be a file, got the folder `{path}`")
    _refuse_special(real, path)
    _check_place(real.parent, path)


def check_folder(path: Path, *, replaced: bool = False, named: str = "out") -> None:
    """Refuse a folder `path`, which may not exist yet, into which no files can be written.

    `replaced`: the folder is replaced as a whole, so the one it lies in is written, too.

    Raises:
        UsageError: it is a file. StoreError: a place without permission; a mount point.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_dir():
        raise UsageError(
            f"{setting(named)} must be a folder, got the file `{path}`",
            hint=f"choose another {setting(named)}",
        )
    _check_place(real, path)
    if not replaced:
        return
    _check_place(real.parent, path)
    if os.path.ismount(real):
        raise StoreError(
            f"cannot write `{path}`: a file system is mounted there, and the folder is replaced as "
            "a whole",
            hint="choose a folder below it",
        )


@contextlib.contextmanager
def keeping(found: Any) -> Iterator[None]:
    """Store what the work came to; where that fails, the UnstoredError carries it."""
    try:
        yield
    except (StoreError, OSError) as err:
        message = err.message if isinstance(err, StoreError) else str(err)
        raise UnstoredError(message, hint=getattr(err, "hint", None), found=found) from err


def is_stdout(path: Path) -> bool:
    """Whether a path is this process's standard output by one of its names."""
    names = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", f"/proc/{os.getpid()}/fd/1")
    return os.path.abspath(path) in names


def is_stream(path: Path) -> bool:
    """Whether a path is to be written into, not replaced: a device, a pipe, `/dev/stdout`."""
    seen: set[Path] = set()
    hop = Path(os.path.abspath(path))
    while hop not in seen:
        seen.add(hop)
        if hop.parts[:2] in (("/", "dev"), ("/", "proc")) and hop.parts[:3] != ("/", "dev", "shm"):
            return True
        if not hop.is_symlink():
            break
        hop = Path(os.path.abspath(hop.parent / os.readlink(hop)))
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is somewhere below a folder, links followed."""
    return any(_same(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def _same(a: Path, b: Path) -> bool:
    try:
        return a == b or os.path.samefile(a, b)
    except OSError:
        return False


def _refuse_special(real: Path, named: Path) -> None:
    if is_stream(named) or is_stream(real):
        raise StoreError(
            f"cannot write `{named}`: it is a device or a pipe, and only a plain file is replaced",
            hint="choose another place",
        )


def _check_place(folder: Path, named: Path) -> None:
    """StoreError where nothing can be made in a folder, or in the nearest one above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    code = 0
    if not folder.is_dir():
        code = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
    if code:
        raise store_error(OSError(code, os.strerror(code)), named)


# ---------------------------------------------------------------- writing


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
    """Write a file as a whole; an older one is replaced only when the new one is complete.

    A link stays, and the file that it names is written.
    """
    named, path = path, Path(os.path.realpath(path))
    _refuse_special(path, named)
    make_folder(path.parent)
    try:
        with _created(path) as fresh:
            try:
                _write_synced(fresh, data)
                os.replace(fresh, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    fresh.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as err:
        raise store_error(err, named) from err


@contextlib.contextmanager
def staging(final: Path, mode: int = 0o777) -> Iterator[Path]:
    """A folder beside a file to be made, on the same file system, gone afterwards."""
    make_folder(final.parent)
    try:
        with _created(final, mode) as folder:
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as err:
        raise store_error(err, final) from err


def scratch() -> contextlib.AbstractContextManager[Path]:
    """A folder for files of this process alone, where the system keeps such; gone afterwards."""
    owner = os.getuid() if hasattr(os, "getuid") else 0
    return staging(Path(tempfile.gettempdir()) / f"npprune-{owner}", 0o700)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Fill the folder that is yielded; on a clean exit it takes the place of the folder `target`.

    After an exception or a kill `target` is as it was: the two are exchanged in one step. Where
    the system cannot do that, a kill in between is made good by the next call.
    """
    make_folder(target.parent)
    try:
        _bring_back(target)
        with staging(target) as fresh:
            yield fresh
            sync_folder(fresh)
            if not target.exists():
                os.rename(fresh, target)
            elif not _exchange(fresh, target):
                old = temporary(target.with_name(f"{target.name}{_OLD}"))
                os.rename(target, old)
                try:
                    os.rename(fresh, target)
                except OSError:
                    os.rename(old, target)
                    raise
                os.rename(old, fresh)  # goes with the staging folder
        sync_folder(target.parent)
    except OSError as err:
        raise store_error(err, target) from err


def publish(folder: Path, final: Path) -> None:
    """Move the files of a staging folder out, the one called as `final` last: a graph never
    stands without its weights."""
    _refuse_special(Path(os.path.realpath(final)), final)
    data = final.with_name(final.name + ".data")
    made = {f.name for f in folder.iterdir()}
    for name in sorted(made, key=lambda n: n == final.name):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / name, final.parent / name)
    if data.name not in made:
        data.unlink(missing_ok=True)
    sync_folder(final.parent)


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


def temporary(path: Path) -> Path:
    """A fresh name beside `path`; the random part keeps two processes apart."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_leftover(path: Path) -> bool:
    """Whether a name is one of the temporary names given here."""
    return bool(_TEMPORARY.match(path.name))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of killed processes; those that are being filled stay."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if is_leftover(path):
            try:
                _remove_abandoned(path)
            except OSError as err:
                raise store_error(err, path, "remove") from err


@contextlib.contextmanager
def _created(final: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary file, or with `mode` a folder, locked meanwhile.

    What killed processes left of `final` is removed.
    """
    with contextlib.suppress(OSError):  # of another user: not this write's business
        for entry in os.scandir(final.parent):
            path = Path(entry.path)
            if is_leftover(path) and _stands_for(path) == final.name:
                _remove_abandoned(path)
    while True:
        fresh = temporary(final)
        if mode is not None:
            os.mkdir(fresh, mode)
        else:
            os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with _locked(fresh) as there:
            if there:
                yield fresh
                return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a temporary file or folder; False: another process took it for a leftover before."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path.exists()
    finally:
        os.close(descriptor)


def _stands_for(path: Path) -> str:
    """The name that a temporary name was made for."""
    return path.name[1:].rsplit(".", 2)[0].removesuffix(_OLD)


def _remove_abandoned(path: Path) -> None:
    """Delete a temporary file or folder unless a living process holds it."""
    if fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or there are no locks to tell
        return
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(descriptor)


def _bring_back(target: Path) -> None:
    """The folder that a killed process had moved away to put another in its place."""
    if not target.exists():
        for path in target.parent.glob(f".{glob.escape(target.name + _OLD)}.*.tmp"):
            os.rename(path, target)
            return


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def owner_is_here(name: str) -> bool:
    """Whether the first part of `OWNER/NAME` is a folder, so that it is no name on a hub."""
    owner = name.partition("/")[0]
    return owner in OUR_FOLDERS or Path(owner).is_dir()

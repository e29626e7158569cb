"""Saved calibration statistics: named tensors for each block, and one sidecar for all of them.

    HOME/<digest>/000-0028.safetensors      block 0 after 28 batches
    HOME/<digest>/statistics.json           written last: which files belong together, by sha256

The digest is that of the settings, of everything that decides the bits: other settings are another
folder, and never read. A pass saves its state from time to time; after a kill at any moment the
sidecar names files that are there. They can be computed again: the folder may be deleted, and only
the few sets used last are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from npprune.errors import StoreError
from npprune.records import Document, digest
from npprune.store import atomic

if TYPE_CHECKING:
    from torch import Tensor

SIDECAR = "statistics.json"
LOCK = ".lock"
KEPT = 3  # sets in one home
_NAME = re.compile(r"^\d{3}-\d+\.safetensors$")


@dataclass
class StatisticsPart:
    """One block's file, and how far into the pass it is."""

    file: str
    sha256: str
    images: int
    batches: int


@dataclass
class StatisticsInfo(Document):
    """The sidecar."""

    kind: ClassVar[str] = "statistics"

    settings_sha256: str
    settings: dict[str, Any]  # all that decides the bits
    images: int  # of a whole pass
    batches: int
    blocks: dict[int, StatisticsPart] = field(default_factory=dict)
    seconds: float = 0.0  # spent on what is saved


class StatisticsStore:
    """The statistics of one network, one set of images and one set of needs.

    `images` and `batches` are those of a whole pass. Nothing is created before the first `save`.
    """

    def __init__(
        self, home: str | Path, settings: Mapping[str, Any], *, images: int, batches: int
    ) -> None:
        self.home = Path(home)
        plain = json.loads(json.dumps(settings))
        self.info = StatisticsInfo(digest(plain), plain, images, batches)
        self.path = self.home / self.info.settings_sha256[:16]

    @contextlib.contextmanager
    def lock(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the folder while it is filled; a second process waits for the first one's sums."""
        import filelock

        atomic.make_folder(self.path)
        lock = filelock.FileLock(self.path / LOCK)
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                on_wait()
                lock.acquire()
        except OSError as err:
            raise atomic.store_error(err, self.path / LOCK, "lock") from err
        try:
            atomic.remove_leftovers(self.path)
            yield
        finally:
            lock.release()

    def open(self) -> list[str]:
        """Read what is there into `info`; returns the names of the files that cannot be used.

        A file counts only if it is the one that the sidecar names, to the last bit.
        """
        path = self.path / SIDECAR
        self.info.blocks, self.info.seconds = {}, 0.0
        if not path.is_file():
            return []
        try:
            found = atomic.read_json(StatisticsInfo, path)
        except StoreError:
            return [SIDECAR]
        same = ("settings_sha256", "settings", "images", "batches")
        if any(getattr(found, name) != getattr(self.info, name) for name in same):
            return [SIDECAR]
        bad = []
        for l, part in sorted(found.blocks.items()):
            file = self.path / part.file
            if (
                _NAME.match(part.file)
                and 0 < part.batches <= self.info.batches
                and file.is_file()
                and atomic.sha256_file(file) == part.sha256
            ):
                self.info.blocks[l] = part
            else:
                bad.append(part.file)
        if self.info.blocks:
            self.info.seconds = found.seconds
            with contextlib.suppress(OSError):  # a read-only folder is as good
                os.utime(path)
        return bad

    def save(
        self, tensors: Iterable[tuple[int, Mapping[str, Tensor]]], images: int, batches: int
    ) -> None:
        """Replace the state of some blocks, one after the other, by that after `batches` batches.

        Set `info.seconds` before. StoreError where it cannot be written; what was there stays.
        """
        from safetensors.torch import save

        blocks = dict(self.info.blocks)
        for l, named in tensors:
            name = f"{l:03d}-{batches:04d}.safetensors"
            data = save(dict(named))
            atomic.write_bytes(self.path / name, data)
            blocks[l] = StatisticsPart(name, hashlib.sha256(data).hexdigest(), images, batches)
        self.info.blocks = blocks
        atomic.write_json(self.path / SIDECAR, self.info)
        self._remove_unnamed()

    def done(self, l: int) -> bool:
        """Whether the pass is over for block l."""
        return l in self.info.blocks and self.info.blocks[l].batches == self.info.batches

    def file(self, l: int) -> Any:
        """The file of block l, opened by safetensors: `keys()`, and `get_tensor(name)`, which maps
        it: what is not read takes no memory."""
        from safetensors import SafetensorError, safe_open

        path = self.path / self.info.blocks[l].file
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as err:
            raise StoreError(
                f"cannot read `{path}`: {err}", hint="run it again: it is computed anew"
            ) from err

    def free(self) -> int:
        """Bytes free where the folder is or will be."""
        place = next(p for p in (self.path, *self.path.resolve().parents) if p.is_dir())
        try:
            return shutil.disk_usage(place).free
        except OSError as err:
            raise atomic.store_error(err, place, "read") from err

    def remove_older(self) -> None:
        """Of the sets in this home, keep the ones used last. One that is being filled stays."""
        others = [p.parent for p in self.home.glob(f"*/{SIDECAR}") if p.parent != self.path]
        others.sort(key=lambda p: _used(p), reverse=True)
        for folder in others[KEPT - 1 :]:
            _remove(folder)

    def _remove_unnamed(self) -> None:
        named = {part.file for part in self.info.blocks.values()}
        for path in self.path.iterdir():
            if _NAME.match(path.name) and path.name not in named:
                with contextlib.suppress(OSError):  # in use on Windows: the next save tries again
                    path.unlink()


def _used(folder: Path) -> float:
    try:
        return (folder / SIDECAR).stat().st_mtime
    except OSError:
        return 0.0


def _remove(folder: Path) -> None:
    """Delete a set: the sidecar first, so that nothing incomplete is left to believe in."""
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    with contextlib.suppress(OSError, filelock.Timeout):
        with lock.acquire(timeout=0):
            (folder / SIDECAR).unlink(missing_ok=True)
            for path in folder.iterdir():
                if _NAME.match(path.name) or atomic.is_leftover(path):
                    path.unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()

"""Faults of the file system, in process: the n-th operation below a folder kills or fails."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from npprune import files

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """The process ends here: nothing that comes after it touches a file."""


class Operations:
    """Counts what changes files below `root`, and meets the `at`-th (from 1) with a fault.

    fault: "kill" ends the process before it, and lets nothing happen afterwards; an errno fails it,
    and all of its kind that follow, as a full disk does.
    """

    def __init__(self, root: Path, at: int = 0, fault: str | int = "kill") -> None:
        self.root, self.at, self.fault = os.path.realpath(root), at, fault
        self.names: list[str] = []  # of the operations, in order

    def before(self, name: str, *paths: Any) -> None:
        """An operation is about to happen."""
        if not any(map(self._inside, paths)):
            return
        self.names.append(name)
        if self.at == 0 or len(self.names) < self.at:
            return
        if self.fault == "kill":
            raise Killed
        assert isinstance(self.fault, int)
        if name in ("open", "mkdir", "fsync"):  # what needs room
            raise OSError(self.fault, os.strerror(self.fault))

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.root + os.sep)


@contextlib.contextmanager
def operations(root: Path, at: int = 0, fault: str | int = "kill") -> Iterator[Operations]:
    """While it holds, file operations below `root` are counted and met."""
    seen = Operations(root, at, fault)

    def watched(name: str, real: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            seen.before(name, *args[:count])
            return real(*args, **more)

        return call

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: Any = "r", *args: Any, **more: Any) -> Any:
            writes = mode & WRITES if isinstance(mode, int) else set("wax+") & set(mode)
            if writes:
                seen.before("open", file)
            return real(file, mode, *args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((builtins, "open"), (io, "open")):
            patch.setattr(module, name, opened(getattr(module, name)))
        real_open = os.open

        def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & WRITES:
                seen.before("open", path)
            return real_open(path, flags, *args, **more)

        patch.setattr(os, "open", os_open)
        for name, count in (
            ("replace", 2), ("rename", 2), ("unlink", 1), ("rmdir", 1), ("mkdir", 1), ("fsync", 1),
        ):  # fmt: skip
            patch.setattr(os, name, watched(name, getattr(os, name), count))
        patch.setattr(files, "_exchange", watched("exchange", files._exchange, 2))
        yield seen


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS

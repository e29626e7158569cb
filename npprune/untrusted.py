"""What comes from strangers: text that is shown, JSON that is parsed, sizes that are believed.

File names, metadata and archives are made by whoever made the file. The rules for them stand here,
once, for every room.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and new line, and those that turn the direction of writing."""

MAX_PIXELS = 89_000_000
"""Of an image that is decoded, where nothing else is said: 4 bytes each; Pillow warns above."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_EXPANSION = 50  # times its own size that a file of weights may unpack to
_ALWAYS = 2**28  # bytes that it may in any case
_MEMORY = re.compile(
    r"out of memory|can(?:'|no)t allocate|alloc_failed|failed to allocate|bad_?\s?alloc"
    r"|unable to (?:mmap|allocate)|can't start new thread",
    re.IGNORECASE,
)


def shown(text: str) -> str:
    """Text that does nothing but be read: control characters as `\\x1b`, `\\u202e`."""
    return _CONTROL.sub(lambda m: escaped(m[0]), text)


def escaped(character: str) -> str:
    """A character as Python and JSON would write it: `\\x1b` or `\\u202e`."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def cell(text: str) -> str:
    """Text for a cell of a CSV file, which no spreadsheet takes for a formula."""
    return shown(f"'{text}" if text.startswith(_FORMULA) else text)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """As `json.loads`; ValueError for everything that is no JSON, NaN and depths included.

    `parse_constant=float` takes NaN and infinities, which other programs write.
    """
    try:
        return json.loads(text, **{"parse_constant": _refuse_constant, **options})
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy, PyTorch or a driver says that memory is used up."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


def check_unpacked(path: Path, unpacked: int) -> None:
    """ValueError where a file says that it unpacks to far more than weights ever do."""
    packed = max(os.path.getsize(path), 1)
    if unpacked > max(_ALWAYS, _EXPANSION * packed):
        raise ValueError(
            f"it would unpack to {unpacked / 2**20:,.0f} MiB, {unpacked / packed:,.0f} times its "
            f"own size; at most {_EXPANSION} times is read"
        )


def check_archive(path: Path) -> None:
    """ValueError for a zip archive that unpacks to far more than weights do; others pass."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return  # whoever reads it says so
    check_unpacked(path, unpacked)


def first_line(error: BaseException, length: int = 160) -> str:
    """What an exception says, in one line; its type's name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0][:length])

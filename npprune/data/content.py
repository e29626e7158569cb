"""Whether images are still those that they were: sizes of all their files, bytes of some.

Names alone do not tell. A size costs no reading; of a few files the beginning is read, too, since
uncompressed pictures of one shape have one size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from npprune.data.sources import ImageSource

HEAD = 64 * 2**10  # bytes of a file's beginning
SAMPLED = 64  # files of a source whose beginning is read, evenly over it
UNKNOWN = -1  # size of what is no file of its own, or not there


def sizes(source: ImageSource, positions: Iterable[int]) -> list[int]:
    """Bytes of the files of some images."""
    return [_size(source, position) for position in positions]


def head(source: ImageSource, position: int) -> str:
    """sha256 of the beginning of an image's file; empty where there is none."""
    file = source.file(position)
    try:
        if file is None or not file.is_file():
            return ""
        with file.open("rb") as stream:
            return hashlib.sha256(stream.read(HEAD)).hexdigest()
    except OSError:
        return ""


def fingerprint(source: ImageSource) -> str:
    """sha256 of all sizes and of some beginnings; empty for a stream."""
    if source.items is None:
        return ""
    n = len(source.items)
    some = [head(source, i) for i in range(0, n, max(1, n // SAMPLED))]
    return hashlib.sha256(repr((sizes(source, range(n)), some)).encode()).hexdigest()


def changed(
    source: ImageSource, positions: Sequence[int], before: Sequence[int], first: str
) -> int | None:
    """The position of an image whose file is another one now; None: no sign of that.

    A file that is not there now, or was not known before, is no sign.
    """
    for position, was in zip(positions, before, strict=False):
        now = _size(source, position)
        if UNKNOWN not in (was, now) and was != now:
            return position
    if first and positions and head(source, positions[0]) not in ("", first):
        return positions[0]
    return None


def _size(source: ImageSource, position: int) -> int:
    file = source.file(position)
    try:
        return UNKNOWN if file is None else file.stat().st_size
    except OSError:
        return UNKNOWN

"""What stdout and stderr cannot take: closed, or without the characters that are written.

`prepare` is called once, before anything is opened or printed. After it both streams are there and
every text can be written to them: what an encoding lacks is written in plain characters.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import unicodedata

PLAIN = "npprune-plain"
"""The error handler's name, for `open` and `str.encode`."""

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "‑": "-", "…": "...", "×": "x", "±": "+/-", "·": ".", "•": "*",
    "‘": "'", "’": "'", "“": '"', "”": '"', "≤": "<=", "≥": ">=", "→": "->", "\u00a0": " ",
    "\u202f": " ", "━": "-", "╸": "-", "╺": "-", "█": "#", "✓": "ok",
}  # fmt: skip
_BOXES = range(0x2500, 0x2580)  # lines and corners


def prepare() -> None:
    """Make both streams fit to be written to.

    A stream that was closed when the program began is replaced by one that goes nowhere; its
    number is taken at once, so that no file that is opened later gets what is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors=PLAIN)


def plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler: signs and lines in ASCII, bytes of names that are no text as `\\xe9`,
    all else as `\\u1234`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(_plain(c) for c in part), error.end


def _plain(sign: str) -> str:
    if sign in _SIGNS:
        return _SIGNS[sign]
    if ord(sign) in _BOXES:
        name = unicodedata.name(sign)
        return "-" if name.endswith("HORIZONTAL") else "|" if name.endswith("VERTICAL") else "+"
    if 0xDC80 <= ord(sign) <= 0xDCFF:  # a byte that was not UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("ascii", "backslashreplace").decode()


codecs.register_error(PLAIN, plain)

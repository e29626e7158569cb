"""Image files as 8-bit RGB pixels, or one error that names the file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from npprune.errors import DataError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"))
"""Endings (lower case) of the files that count as images; all others are ignored."""


class UnreadableImage(DataError):
    """One image cannot be decoded. `path` is the file, or the sample's id in its source."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"cannot read image `{path}`: {reason}",
            hint="replace or remove the file, or pass --on-bad-image skip to go on without it",
        )
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return (UnreadableImage, (self.path, self.reason))  # crosses process borders


def decode(source: Path | bytes | IO[bytes], path: str) -> Image.Image:
    """The image in full, as 8-bit RGB; alpha is dropped, as timm does.

    Raises:
        UnreadableImage: missing, truncated, no image, too large for Pillow's limit, or of a
            pixel format without a fixed range.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(stream) as image:
            image.load()
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as err:  # Pillow's plugins raise anything on broken files
        raise UnreadableImage(path, _reason(err)) from err


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; 16-bit grey is scaled to 8 bits, not clipped.

    Raises:
        ValueError: float pixels, or integers outside 0..65535.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise ValueError("integer pixels outside 0..65535")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice; the colours stay the same
    return image.convert("RGB")


def _reason(err: Exception) -> str:
    if isinstance(err, FileNotFoundError):
        return "no such file"
    if isinstance(err, PermissionError):
        return "permission denied"
    if isinstance(err, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return str(err) or type(err).__name__

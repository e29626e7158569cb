"""Image files as 8-bit RGB pixels, or one error that names the file."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, features

from npprune.errors import DataError
from npprune.untrusted import MAX_PIXELS


def _readable() -> dict[str, tuple[str, ...]]:
    """Pillow's raster formats that need no other program, as far as it was built with them.

    What Pillow knows beyond these stays out: PostScript, say, would start Ghostscript, whatever
    the file's name ends in.
    """
    formats = {
        "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        "PNG": (".png", ".apng"),
        "WEBP": (".webp",),
        "GIF": (".gif",),
        "BMP": (".bmp",),
        "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
        "TIFF": (".tif", ".tiff"),
        "AVIF": (".avif",),
        "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    }
    optional = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know the feature's name
        missing = [name for name, feature in optional.items() if not features.check(feature)]
    return {name: endings for name, endings in formats.items() if name not in missing}


FORMATS = _readable()
"""Format, as Pillow calls it -> the endings (lower case) of its files."""

ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
"""Endings of the files that count as images in a folder, whatever the case; the usual first."""


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


def decode(
    source: Path | bytes | IO[bytes], path: str, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The image in full (of several, the first), as 8-bit RGB.

    As in timm, alpha is dropped and an orientation in the file's EXIF data is not applied.

    Raises:
        UnreadableImage: missing, truncated, no image, no plain file, of a format that is not in
            FORMATS, of more than `max_pixels`, or of a pixel format without a fixed range.
    """
    with reading(path):
        if isinstance(source, Path):
            _require_plain(source)
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with _opened(stream, max_pixels) as image:
            image.load()
            return to_rgb(image)


def _opened(stream: Path | IO[bytes], max_pixels: int) -> Image.Image:
    """The image by its header alone: nothing is decoded of one that is too large."""
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow's own limit
    most = f"at most {max_pixels / 1e6:g} million are decoded (max_megapixels)"
    try:
        image = Image.open(stream, formats=list(FORMATS))
    except Image.DecompressionBombError as err:
        raise DataError(f"more pixels than Pillow's limit, and {most}") from err
    if image.width * image.height > max_pixels:
        image.close()
        raise DataError(f"{image.width} x {image.height} pixels, and {most}")
    return image


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever is raised inside becomes an UnreadableImage that names `path`."""
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except Exception as err:  # Pillow's plugins raise anything on broken files
        raise UnreadableImage(path, _reason(err)) from err


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; 16-bit grey is scaled to 8 bits, not clipped.

    Raises:
        DataError: float pixels, or integers outside 0..65535.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DataError("float pixels have no fixed range")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise DataError("integer pixels outside 0..65535")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow's own advice; the colours stay the same
    return image.convert("RGB")


def _require_plain(path: Path) -> None:
    """A named pipe would wait for ever, a device never end; standard input is read to its end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and path.as_posix().startswith("/dev/")):
        raise DataError("a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device")


def _reason(err: Exception) -> str:
    if isinstance(err, FileNotFoundError):
        return "no such file"
    if isinstance(err, PermissionError):
        return "permission denied"
    if isinstance(err, Image.UnidentifiedImageError):
        return f"not an image, or of none of the formats {', '.join(FORMATS)}"
    return str(err) or type(err).__name__

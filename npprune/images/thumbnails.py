"""Small pictures of images for pages: WebP where Pillow has it, else JPEG."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, features

QUALITY = 75


def ending() -> str:
    """Of the files that `encoded` makes: `webp` or `jpg`."""
    return "webp" if features.check("webp") else "jpg"


def encoded(pixels: np.ndarray, side: int) -> bytes:
    """Pixels [h, w, 3] or [h, w] in 0 to 255 as a file, no side longer than `side`."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "WEBP" if ending() == "webp" else "JPEG", quality=QUALITY)
    return buffer.getvalue()

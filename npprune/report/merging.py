"""Pictures of merged patches: every token in the mean colour of the patches that it holds."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from npprune.records import MergedImage
from npprune.report import text
from npprune.report.svg import picture

if TYPE_CHECKING:
    import numpy as np

LINE = 255  # grey level between tokens


def draw(images: list[MergedImage], name: str) -> str:
    """The images and, after some of the blocks, their tokens, as inline SVG."""
    columns = 1 + max(len(image.blocks) for image in images)

    def paint(figure: Any) -> None:
        axes = figure.subplots(len(images), columns, squeeze=False)
        for row, image in zip(axes, images, strict=True):
            pixels = _pixels(image)
            row[0].imshow(pixels)
            row[0].set_title(text.clip(image.name, 22), fontsize=8)
            for ax, block, tokens in zip(row[1:], image.blocks, image.tokens, strict=False):
                ax.imshow(tiled(pixels, image.grid, tokens))
                ax.set_title(f"block {block}: {len(set(tokens))} tokens", fontsize=8)
        for ax in axes.flat:
            ax.axis("off")

    return picture(
        paint, width=1.7 * columns, height=1.85 * len(images), name=name,
        alt="Images, and the tokens that are left of them after some of the blocks",
    )  # fmt: skip


def tiled(pixels: np.ndarray, grid: list[int], tokens: list[int]) -> np.ndarray:
    """Pixels [H, W, 3] with each token in its mean colour, and lines between tokens."""
    import numpy as np

    height, width = pixels.shape[:2]
    held = np.array(tokens).reshape(grid)
    y = np.arange(height) * grid[0] // height
    x = np.arange(width) * grid[1] // width
    token = held[y][:, x]
    out = np.empty_like(pixels)
    for t in np.unique(token):
        out[token == t] = pixels[token == t].mean(0)
    out[1:][token[1:] != token[:-1]] = LINE
    out[:, 1:][token[:, 1:] != token[:, :-1]] = LINE
    return out


def _pixels(image: MergedImage) -> np.ndarray:
    import numpy as np
    from PIL import Image

    data = io.BytesIO(base64.b64decode(image.png))
    return np.array(Image.open(data, formats=["PNG"]).convert("RGB"))

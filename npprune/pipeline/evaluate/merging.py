"""What a network that merges tokens does to a few images, for the report to show."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from npprune.core.compression.token_harm import token_maps
from npprune.export.onnx import to_pixels
from npprune.models.view import make_view
from npprune.pipeline.common.inputs import Images, Network
from npprune.records import MergedImage

SHOWN = 3  # images
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the blocks, after which tokens are shown
SIDE = 160  # pixels at most


@torch.no_grad()
def merged_images(network: Network, x: Tensor, labels: Tensor, images: Images) -> list[MergedImage]:
    """Some of the images; none where no token merges, or patches are no grid.

    x, labels: the first of them, [b, 3, H, W] and [b], for sources that are read once.
    """
    view = make_view(network.model)
    grid = getattr(getattr(network.model, "patch_embed", None), "grid_size", None)
    if not view.merges or grid is None:
        return []
    x, labels = _spread(images) or (x[:SHOWN], labels[:SHOWN])
    maps = token_maps(view, x.to(next(network.model.parameters()).device))
    blocks = sorted({max(0, round(share * len(maps)) - 1) for share in SHARES})
    prefix = view.num_prefix_tokens
    return [
        MergedImage(
            images.source.name(int(label)),
            _png(image),
            list(grid),
            blocks,
            [maps[l][i, prefix:].tolist() for l in blocks],
        )
        for i, (image, label) in enumerate(
            zip(to_pixels(x, images.preprocessing), labels, strict=True)
        )
    ]


def _spread(images: Images) -> tuple[Tensor, Tensor] | None:
    """A few images [n, 3, H, W] and labels [n], evenly over the source; None of a stream."""
    positions = images.evenly(SHOWN)
    if positions is None:
        return None
    batches = list(images.batches(indices=positions))
    if not batches:  # none of them can be read
        return None
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def _png(pixels: Tensor) -> str:
    """Pixels [H, W, channels] as a base64 PNG."""
    picture = Image.fromarray(pixels.squeeze(-1).numpy())
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()

"""Each neuron of a path removed alone, at the scope's tokens: what the network then says.

Letters: b images, t tokens, d width, h hidden units, K neurons per block, L blocks, c classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npprune.core.attribution.editing import scaled
from npprune.core.view import Scope, VitView


@torch.no_grad()
def ablated_logits(view: VitView, images: Tensor, neurons: Tensor, *, scope: Scope) -> Tensor:
    """Logits [b, L, K, c] with one neuron at a time set to 0.

    The same as `edited_logits` with a factor of 0 for that neuron, at about half the cost: the
    blocks before it are computed once, and all that were changed go through the later ones as one
    batch.

    Args:
        images: [b, 3, H, W], preprocessed.
        neurons: [b, L, K], each image's own.

    Raises:
        ValueError: neurons that do not fit the blocks, or a network that merges tokens itself.
    """
    b, blocks, k = neurons.shape
    if blocks != len(view.widths) or b != len(images):
        raise ValueError(
            f"neurons must be [{len(images)}, {len(view.widths)}, K], got {list(neurons.shape)}"
        )
    if view.merges:
        raise ValueError("the network merges tokens: its images cannot be computed as one batch")
    tokens = view.tokens(scope)
    clean = view.embed(images)
    changed = clean[:0]
    for l, h in enumerate(view.widths):
        factor = torch.ones(b + len(changed) + b * k, h, dtype=clean.dtype, device=clean.device)
        fresh = torch.arange(b * k, device=clean.device) + b + len(changed)
        factor[fresh, neurons[:, l].reshape(-1).to(clean.device)] = 0.0
        rows = torch.cat([clean, changed, clean.repeat_interleave(k, 0)])
        rows = view.block(l, rows, edit=scaled(tokens, factor))
        clean, changed = rows[:b], rows[b:]
    return view.head(changed).view(blocks, b, k, -1).transpose(0, 1)

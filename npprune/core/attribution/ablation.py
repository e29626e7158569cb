"""Each neuron of a path removed alone, at the scope's tokens: what the network then says.

Letters: b images, t tokens, s tokens of the scope, d width, h hidden units, K neurons per block,
L blocks, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npprune.core.attribution.editing import scaled
from npprune.core.view import HiddenEdit, Scope, VitView


@torch.no_grad()
def ablated_logits(
    view: VitView,
    images: Tensor,
    neurons: Tensor,
    *,
    scope: Scope,
    writes: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Logits [b, L, K, c] with one neuron at a time set to 0.

    The same as `edited_logits` with a factor of 0 for that neuron, at a third of the cost: the
    blocks before it are computed once, and all that were changed go through the later ones as one
    batch. In the last block only the class token is computed, where it is all that is read.

    Args:
        images: [b, 3, H, W], preprocessed.
        neurons: [b, L, K], each image's own.
        writes: per block, what its units add to the stream for an activation of 1, [d, h]: the
            block is then not run for its own neurons, whose part is taken out of the stream. None,
            and None for a block: it is run.

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
    neurons = neurons.to(clean.device)
    changed = clean[:0]
    for l, h in enumerate(view.widths):
        one = l == blocks - 1 and view.tokens_read == 1 and scope == "cls"
        units = neurons[:, l]
        rows = torch.cat([clean, changed])
        write = writes[l] if writes is not None else None
        if write is None:
            rows = torch.cat([rows, clean.repeat_interleave(k, 0)])
            factor = torch.ones(len(rows), h, dtype=clean.dtype, device=clean.device)
            fresh = torch.arange(len(rows) - b * k, len(rows), device=clean.device)
            factor[fresh, units.reshape(-1)] = 0.0
            rows = view.block(l, rows, edit=scaled(tokens, factor), cls_only=one)
        else:
            hidden: list[Tensor] = []
            rows = view.block(l, rows, edit=_reading(b, tokens, hidden), cls_only=one)
            rows = torch.cat([rows, _without(rows[:b], hidden[0], units, write, tokens)])
        clean, changed = rows[:b], rows[b:]
    return view.head(changed).view(blocks, b, k, -1).transpose(0, 1)


def _reading(b: int, tokens: slice, into: list[Tensor]) -> HiddenEdit:
    """Keeps the activations of the first b rows at some tokens."""

    def read(h: Tensor) -> Tensor:
        into.append(h[:b, tokens])
        return h

    return read


def _without(stream: Tensor, hidden: Tensor, units: Tensor, write: Tensor, tokens: slice) -> Tensor:
    """Streams [b, t, d] behind a block without one of its units [b, K] at a time: [b K, t, d].

    hidden: the block's activations at those tokens, [b, s, h].
    """
    found = stream[:, None].repeat(1, units.shape[1], 1, 1)
    active = hidden.gather(2, units[:, None].expand(-1, hidden.shape[1], -1))
    found[:, :, tokens] -= active.transpose(1, 2)[..., None] * write.T[units][:, :, None]
    return found.flatten(0, 1)

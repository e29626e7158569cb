"""The harm of merging tokens, measured: the divergence from the network's own outputs
(`objective`): nats for predictions.

Merging early changes what merging late costs, so that the table of single blocks is only a guide;
`schedule_divergence` measures what tokens merged in all blocks at once do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from npprune.core.compression.harm import predict
from npprune.core.tokens import Tokens, followed
from npprune.core.view import VitView
from npprune.errors import UsageError


@torch.no_grad()
def measure_token_harm(
    view: VitView,
    batches: Sequence[Tensor],
    options: Sequence[Sequence[int]],
    *,
    reference: Tensor | None = None,
    on_block: Callable[[int, dict[int, float]], None] | None = None,
) -> list[dict[int, float]]:
    """The divergence from dense for each block and number of tokens, merged in that block alone.

    Args:
        view: of a network that merges none itself.
        batches: images [b, 3, H, W], held in memory.
        options: per block, numbers of tokens to merge; 0 needs none and is 0.
        reference: dense outputs of the batches, if they are known already.
        on_block: called with each finished row.
    """
    depth = len(view.widths)
    _check(depth, options)
    dense = predict(view, batches) if reference is None else reference
    streams = [Tokens(view.embed(images)) for images in batches]
    table: list[dict[int, float]] = []
    for l, counts in enumerate(options):
        attention = [view.attention_output(l, x) for x in streams]
        row = {0: 0.0}
        for r in counts:
            outputs = []
            for x, a in zip(streams, attention, strict=True):
                y = view.tail(l, x, a, merge=r)
                for later in range(l + 1, depth):
                    y = view.block(later, y)
                outputs.append(view.head(y))
            if r:
                divergence = view.objective.divergence(dense, torch.cat(outputs))
                row[r] = float(divergence.mean().clamp_min(0))
        table.append(row)
        if on_block is not None:
            on_block(l, row)
        streams = [view.tail(l, x, a) for x, a in zip(streams, attention, strict=True)]
    return table


@torch.no_grad()
def predict_merged(view: VitView, batches: Iterable[Tensor], merged: Sequence[int]) -> Tensor:
    """Logits or features of images [b, 3, H, W], with so many tokens merged in each block."""
    _check(len(view.widths), merged)
    out = []
    for images in batches:
        x = Tokens(view.embed(images))
        for l, r in enumerate(merged):
            x = view.block(l, x, merge=r)
        out.append(view.head(x))
    return torch.cat(out)


def schedule_divergence(
    view: VitView,
    batches: Sequence[Tensor],
    merged: Sequence[int],
    *,
    reference: Tensor | None = None,
) -> float:
    """The divergence from dense, with so many tokens merged in each block."""
    dense = predict(view, batches) if reference is None else reference
    changed = predict_merged(view, batches, merged)
    return float(view.objective.divergence(dense, changed).mean().clamp_min(0))


@torch.no_grad()
def token_maps(view: VitView, images: Tensor, merged: Sequence[int] | None = None) -> list[Tensor]:
    """After each block, the token that holds each of the original ones: positions [b, t], equal
    ones having merged. `merged`: None takes the network's own."""
    tokens = followed(view.embed(images))
    maps = []
    for l in range(len(view.widths)):
        tokens = view.block(l, tokens, merge=None if merged is None else merged[l])
        if tokens.where is None:  # the last block of a network that computes what is read alone
            break
        maps.append(tokens.where)
    return maps


def _check(depth: int, rows: Sequence[object]) -> None:
    if len(rows) != depth:
        raise UsageError(f"tokens to merge must be given for {depth} blocks, got {len(rows)}")

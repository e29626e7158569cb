"""Editing neurons at the scope's tokens: remove a path, enhance it, or keep nothing else.

An edit is a factor for each hidden unit, multiplied into its activation at the scope's tokens;
everything behind it is computed anew. That is how the paper tests its paths
("Discovering Influential Neuron Path in Vision Transformers", ICLR 2025), and where it differs
from a pruned network: at the other tokens, and in its cost, nothing changes. With scope `all`,
factors of 0 are removal for real: the logits are those of the smaller network.

Letters: b images, t tokens, h hidden units, K neurons per block, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npprune.core.view import HiddenEdit, Scope, VitView
from npprune.words import EDITS, Edit, check_word

Factors = list[Tensor]
"""Per block, a factor for each image and unit [b, h]; [1, h] where all images share it."""


@torch.no_grad()
def edited_logits(
    view: VitView,
    images: Tensor,
    factors: Factors,
    *,
    scope: Scope,
    depth: int | None = None,
) -> Tensor:
    """Logits [b, c] when hidden units are scaled at the scope's tokens.

    Args:
        images: [b, 3, H, W], preprocessed.
        factors: one entry a block, see `Factors`.
        depth: only the first `depth` blocks are edited; None: all.

    Raises:
        ValueError: factors that do not fit the blocks.
    """
    for l, (f, h) in enumerate(zip(factors, view.widths, strict=True)):
        if f.dim() != 2 or f.shape[1] != h or f.shape[0] not in (1, len(images)):
            raise ValueError(
                f"block {l}: factors must be [{len(images)}, {h}], got {list(f.shape)}"
            )
    tokens = view.tokens(scope)
    x = view.embed(images)
    for l, f in enumerate(factors):
        edited = depth is None or l < depth
        x = view.block(l, x, edit=scaled(tokens, f.to(x)) if edited else None)
    return view.head(x)


def scaled(tokens: slice, factor: Tensor) -> HiddenEdit:
    """The edit that multiplies units by factors [b, h], or [1, h], at some tokens."""

    def edit(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, tokens] = h[:, tokens] * factor[:, None]
        return h

    return edit


def members(neurons: Sequence[Sequence[int]], widths: Sequence[int]) -> list[Tensor]:
    """A path's neurons, any number in each block, as masks [h] (bool), True where it holds one."""
    masks = []
    for l, (units, h) in enumerate(zip(neurons, widths, strict=True)):
        index = torch.as_tensor(list(units), dtype=torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < h:
            raise ValueError(f"block {l}: neurons must lie in 0..{h - 1}, got {sorted(units)[-1]}")
        mask = torch.zeros(h, dtype=torch.bool)
        mask[index] = True
        masks.append(mask)
    return masks


def path_factors(masks: Sequence[Tensor], edit: Edit, factor: float = 2.0) -> Factors:
    """Factors [1, h] of `remove` (path at 0), `enhance` (path x factor) or `keep` (others at 0).

    masks: bool [h] per block, the path's neurons.
    """
    check_word("edit", edit, EDITS)
    inside, outside = {"remove": (0.0, 1.0), "enhance": (factor, 1.0), "keep": (1.0, 0.0)}[edit]
    return [torch.where(m, inside, outside)[None] for m in masks]


def keep_factors(
    masks: Sequence[Tensor], fraction: float = 1.0, generator: torch.Generator | None = None
) -> Factors:
    """Factors [1, h]: the path stays, and a random `fraction` of the others goes to 0.

    In each block round(fraction x others) units go, drawn without replacement.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must be in 0..1, got {fraction}")
    generator = generator or torch.Generator().manual_seed(0)
    factors = []
    for mask in masks:
        others = (~mask).nonzero()[:, 0]
        order = torch.randperm(len(others), generator=generator)
        f = torch.ones(len(mask))
        f[others[order[: round(fraction * len(others))]]] = 0.0
        factors.append(f[None])
    return factors


def stack(rows: Sequence[Factors]) -> Factors:
    """The factors of several images, one after the other: [b, h] per block."""
    return [torch.cat(block) for block in zip(*rows, strict=True)]

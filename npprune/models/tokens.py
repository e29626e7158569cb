"""Merging set on a network, read off it and taken back.

`apply_tokens` gives timm's blocks another class (`merging`), `remove_tokens` the old one back;
modules, parameters and their names stay. Before the first block that merges and after the last one
the stream is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from npprune.core.tokens import most
from npprune.errors import ModelError
from npprune.models.blocks import blocks_of
from npprune.models.merging import MERGING, Merging, TokenOptions, check_tokens
from npprune.models.view import make_view


def apply_tokens(model: nn.Module, merged: Sequence[int] | None, last: bool = False) -> nn.Module:
    """The same network, changed in place: it merges tokens.

    Args:
        model: a plain timm vision transformer, pruned or not; what it merged before is forgotten.
        merged: tokens merged in each block; None: in none.
        last: the last block computes queries, projection and MLP only of the tokens that the
            classifier reads, which changes no logit.

    Raises:
        ModelError: a network whose tokens cannot merge, or so many of them; `last` where the
            classifier reads every token.
    """
    remove_tokens(model)
    view = make_view(model)
    depth = len(view.blocks)
    counts = [0] * depth if merged is None else [int(r) for r in merged]
    read = view.tokens_read
    if last and read is None:
        raise ModelError(
            f"{type(model).__name__}: its classifier reads every token, so the last block computes "
            "all of them",
            hint="leave this to networks that are pooled by a class token",
        )
    if any(counts) or len(counts) != depth:
        _check_counts(model, view.num_prefix_tokens, counts, depth)
    first = next((l for l, r in enumerate(counts) if r), depth - 1 if last else depth)
    for l in range(first, depth):
        check_tokens(model, l)
    if last and counts[-1]:
        raise ModelError(
            f"`merged[{depth - 1}]` must be 0 where the last block computes only what is read, got "
            f"{counts[-1]}"
        )
    for l in range(first, depth):
        block: Any = view.blocks[l]
        end = l == depth - 1
        block.token_options = TokenOptions(
            prefix=view.num_prefix_tokens,
            merged=counts[l],
            read=read if last and end else None,
            follow=read is None,
            last=end,
        )
        block.__class__ = MERGING[type(block)]
    return model


def remove_tokens(model: nn.Module) -> nn.Module:
    """The same network, changed in place: every token goes through every block."""
    for block in blocks_of(model):
        if isinstance(block, Merging):
            block.__class__ = next(p for p, ours in MERGING.items() if type(block) is ours)  # type: ignore[assignment]
            del block.token_options
    return model


def tokens_of(model: nn.Module) -> tuple[list[int], bool]:
    """Tokens merged in each block, and whether the last block computes only what is read."""
    options = [getattr(block, "token_options", None) for block in blocks_of(model)]
    merged = [0 if o is None else int(o.merged) for o in options]
    return merged, options[-1] is not None and options[-1].read is not None


def patch_tokens(model: nn.Module) -> int:
    """Patch tokens of an image; ModelError where their number is not fixed."""
    count = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if count is None:
        raise ModelError(f"{type(model).__name__}: the number of its patches is not fixed")
    return int(count)


def _check_counts(model: nn.Module, prefix: int, counts: list[int], depth: int) -> None:
    if len(counts) != depth:
        raise ModelError(f"`merged` must have one entry a block ({depth}), got {len(counts)}")
    patches = patch_tokens(model)
    for l, r in enumerate(counts):
        if not 0 <= r <= most(patches):
            raise ModelError(
                f"`merged[{l}]` must be in 0..{most(patches)}, got {r}",
                hint=f"{patches} patch tokens reach block {l}, and at most half of them can merge",
            )
        patches -= r

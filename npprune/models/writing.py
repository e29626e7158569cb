"""What one hidden unit adds to the stream between the blocks."""

from __future__ import annotations

from torch import Tensor

from npprune.models.view import TimmView

NORMED = ("ResPostBlock", "EvaBlockPostNorm")
"""Blocks that norm the MLP's output: what a unit adds depends on all others."""


def written(view: TimmView, l: int) -> Tensor | None:
    """What units of block l add to a token's stream for an activation of 1: [d, h].

    The columns of `fc2`, times the block's layer scale where it has one. None where the block
    norms its MLP's output.
    """
    block = view.blocks[l]
    if type(block).__name__ in NORMED:
        return None
    gamma = getattr(getattr(block, "ls2", None), "gamma", None)
    gamma = getattr(block, "gamma_2", None) if gamma is None else gamma
    weight = view.fc2(l).weight.detach()
    return weight if gamma is None else weight * gamma.detach()[:, None]

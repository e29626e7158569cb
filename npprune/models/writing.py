"""What one hidden unit adds to the stream between the blocks."""

from __future__ import annotations

from torch import Tensor

from npprune.models.blocks import entrances
from npprune.models.view import TimmView


def written(view: TimmView, l: int) -> Tensor | None:
    """What units of block l add to a token's stream for an activation of 1: [d, h].

    The columns of `fc2`, times the block's layer scale where it has one. None where the block
    norms its MLP's output, or where patches merge in front of a later block: what the classifier
    reads is then another stream.
    """
    block = view.blocks[l]
    if not view.adds(l) or any(later > l for later in entrances(view.model)):
        return None
    gamma = getattr(getattr(block, "ls2", None), "gamma", None)
    gamma = getattr(block, "gamma_2", None) if gamma is None else gamma
    weight = view.fc2(l).weight.detach()
    return weight if gamma is None else weight * gamma.detach()[:, None]

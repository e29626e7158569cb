"""Where a network's blocks are: in one row, or in stages with the merging of patches between them.

A staged network (Swin) is seen as one row of blocks, too. What merges the patches stands in front
of a stage's first block and belongs to that block.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

STAGED = (SwinTransformer, SwinTransformerV2)
"""Networks of stages whose blocks see the patches in windows: [b, height, width, d]."""

NORMED = ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm", "SwinTransformerV2Block")
"""Blocks that norm what attention and MLP give before it is added to the stream: what a unit adds
depends on all others."""


def blocks_of(model: Any) -> list[Any]:
    """The blocks in forward order."""
    stages: Any = model.layers if isinstance(model, STAGED) else [model]
    return [block for stage in stages for block in stage.blocks]


def is_linear(layer: Any) -> bool:
    """Whether a layer is a linear one whose weight and bias are all there is to it: no
    parametrization, no adapter."""
    if not isinstance(layer, nn.Linear) or layer._modules:
        return False
    return "weight" in layer._parameters and layer._parameters.keys() <= {"weight", "bias"}


def entrances(model: Any) -> dict[int, nn.Module]:
    """Block -> what merges the patches in front of it; empty for a network of one row."""
    if not isinstance(model, STAGED):
        return {}
    found: dict[int, nn.Module] = {}
    first, stages = 0, list[Any](model.layers)
    for stage in stages:
        if not isinstance(stage.downsample, nn.Identity):
            found[first] = stage.downsample
        first += len(stage.blocks)
    return found

"""BEiT's own files: relative positions say the heads, and the grid where it is square."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from npprune.errors import ModelError, setting
from npprune.models.foreign import HALF, Architecture, Size, by
from npprune.models.huggingface import ratio

_TABLE = "blocks.0.attn.relative_position_bias_table"
_SHARED = "rel_pos_bias.relative_position_bias_table"


def is_beit(tensors: dict[str, Tensor]) -> bool:
    """Whether the names are those of BEiT, v1 or v2, or data2vec."""
    return (_TABLE in tensors or _SHARED in tensors) and "blocks.0.mlp.fc1.weight" in tensors


def infer_beit(
    tensors: dict[str, Tensor], num_heads: int | None, img_size: Size | None
) -> tuple[Architecture, dict[str, Tensor]]:
    """The BEiT that a state dict belongs to, and its tensors as timm's BEiT takes them.

    Raises:
        ModelError: another number of heads was given, or the grid cannot be told.
    """
    t = {k: v for k, v in tensors.items() if not k.endswith("relative_position_index")}
    table = t[_TABLE] if _TABLE in t else t[_SHARED]
    heads = int(table.shape[1])
    if num_heads not in (None, heads):
        raise ModelError(
            f"`num_heads` is {num_heads}, and the file's relative positions are of {heads} heads",
            hint=f"leave {setting('model.num_heads')} out: the file says it",
        )
    patch, fc1 = t["patch_embed.proj.weight"], t["blocks.0.mlp.fc1.weight"]
    size: Size = tuple(patch.shape[2:])  # type: ignore[assignment]
    grid = _grid(int(table.shape[0]), size, img_size)
    depth = 1 + max(int(m[1]) for k in t if (m := re.match(r"blocks\.(\d+)\.", k)))
    for l in range(depth):  # timm's BEiT always scales its layers
        for part in "12":
            t.setdefault(f"blocks.{l}.gamma_{part}", torch.ones(patch.shape[0]))
    args = {
        "img_size": [grid[0] * size[0], grid[1] * size[1]],
        "patch_size": size[0] if size[0] == size[1] else list(size),
        "in_chans": int(patch.shape[1]),
        "embed_dim": int(patch.shape[0]),
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio(int(patch.shape[0]), int(fc1.shape[0])),
        "qkv_bias": "blocks.0.attn.q_bias" in t,
        "init_values": 0.1,
        "use_abs_pos_emb": "pos_embed" in t,
        "use_rel_pos_bias": _TABLE in t,
        "use_shared_rel_pos_bias": _SHARED in t,
        "global_pool": "avg" if "fc_norm.weight" in t else "token",
    }
    notes = [
        "read as BEiT; the file does not say its preprocessing: assumed mean and standard "
        "deviation 0.5, bicubic, crop 0.9",
        "a file of weights does not say all; assumed: GELU, norms with epsilon 1e-6",
    ]
    return Architecture("beit_base_patch16_224", args, HALF, notes), t


def _grid(rows: int, patch: Size, img_size: Size | None) -> Size:
    """From (2 h - 1) (2 w - 1) + 3 relative positions."""
    if img_size is not None:
        grid = img_size[0] // patch[0], img_size[1] // patch[1]
        if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 == rows:
            return grid
        raise ModelError(
            f"the file has {rows} relative positions, and {by(img_size)} pixels need "
            f"{(2 * grid[0] - 1) * (2 * grid[1] - 1) + 3}",
            hint="BEiT's positions are not resampled: give the size it was trained at",
        )
    side = math.isqrt(rows - 3)
    if side * side != rows - 3 or side % 2 == 0:
        raise ModelError(
            f"the image size is not in the file: {rows} relative positions are of no square",
            hint=f"give the size it was trained at: {setting('model.img_size', 'HxW')}",
        )
    return (side + 1) // 2, (side + 1) // 2

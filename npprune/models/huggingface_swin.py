"""Swin, v1 and v2, of Hugging Face's `transformers` as timm's.

There the patches merge at the end of a stage, in timm in front of the next; queries, keys and
values are apart. The rest are names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from npprune.errors import ModelError, setting
from npprune.models.create import checked_args
from npprune.models.foreign import Size, by
from npprune.models.translations import renamed

NAMES = {
    "SwinForImageClassification": "swin_tiny_patch4_window7_224",
    "Swinv2ForImageClassification": "swinv2_tiny_window8_256",
}
"""Classes of `transformers`, and timm's network that takes their arguments."""

EPS = 1e-5  # of all norms: `transformers` builds most of them without the configuration's

_STAGE = re.compile(r"swin(?:v2)?\.encoder\.layers\.(\d+)\.(.+)")
_ATTENTION = r"attention\.(?:self\.)?"
_IN_STAGE = (  # names of today's and of older versions
    (rf"(blocks\.\d+\.){_ATTENTION}(?:query|q_proj)\.", r"\1q."),
    (rf"(blocks\.\d+\.){_ATTENTION}(?:key|k_proj)\.", r"\1k."),
    (rf"(blocks\.\d+\.){_ATTENTION}(?:value|v_proj)\.", r"\1v."),
    (r"(blocks\.\d+\.)attention\.(?:output\.dense|o_proj)\.", r"\1attn.proj."),
    (
        rf"(blocks\.\d+\.){_ATTENTION}(?:relative_position_bias\.)?relative_position_bias_table$",
        r"\1attn.relative_position_bias_table",
    ),
    (rf"(blocks\.\d+\.){_ATTENTION}continuous_position_bias_mlp\.", r"\1attn.cpb_mlp."),
    (rf"(blocks\.\d+\.){_ATTENTION}logit_scale$", r"\1attn.logit_scale"),
    (r"(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"(blocks\.\d+\.)(?:intermediate\.dense|mlp\.fc1)\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)(?:output\.dense|mlp\.fc2)\.", r"\1mlp.fc2."),
    (r"downsample\.", "downsample."),
)
_OUTSIDE = (
    (r"swin(?:v2)?\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"swin(?:v2)?\.embeddings\.norm\.", "patch_embed.norm."),
    (r"swin(?:v2)?\.layernorm\.", "norm."),
    (r"classifier\.", "head.fc."),
)
_UNREAD = re.compile(r".*relative_position_index$|.*relative_coords_table$|.*mask_token$")


def from_swin(
    kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], img_size: Size | None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """timm's name, arguments and tensors of a Swin of `transformers`.

    Args:
        kind: one of `NAMES`.
        config: what its `config.json` says.
        tensors: its state dict.
        img_size: height and width that were asked for.

    Raises:
        ModelError: a part that timm's networks have not, or a tensor that is not known.
    """
    side = config.get("image_size", 224)
    sides = side if isinstance(side, list) else [side, side]
    if len(sides) != 2 or not all(isinstance(v, int) and 0 < v <= 16384 for v in sides):
        raise ModelError(f"`image_size` in the folder's config.json must be pixels, got {side!r}")
    own: Size = sides[0], sides[1]
    if own[0] != own[1] or img_size not in (None, own):
        wanted = own if img_size is None else img_size
        raise ModelError(
            f"{kind} at {by(wanted)} pixels: its windows and relative positions are read for the "
            "square images that it was trained at",
            hint=f"leave {setting('model.img_size')} out",
        )
    for key, known, silent in (
        ("hidden_act", "gelu", "gelu"),
        ("layer_norm_eps", EPS, EPS),
        ("use_absolute_embeddings", False, False),
    ):
        if (value := config.get(key, silent)) != known:
            raise ModelError(
                f"{kind} with `{key}` {value!r} in its config.json is not supported",
                hint=f"read is {known!r}",
            )
    found, unknown = {}, []
    for name, tensor in tensors.items():
        if _UNREAD.match(name):
            continue
        inside = _STAGE.fullmatch(name)
        new = renamed(inside[2], _IN_STAGE) if inside else renamed(name, _OUTSIDE)
        if new is None:
            unknown.append(name)
        elif inside:
            stage = int(inside[1]) + new.startswith("downsample.")
            found[f"layers.{stage}.{new}"] = tensor
        else:
            found[new] = tensor
    if unknown:
        raise ModelError(
            f"the folder has {len(unknown)} tensors that npprune does not know: "
            + ", ".join(f"`{k}` {list(tensors[k].shape)}" for k in unknown[:3]),
            hint="leaving layers out would give other outputs",
        )
    try:
        _join(found, apart="logit_scale" in " ".join(found))
        patch, classes = found["patch_embed.proj.weight"], len(found["head.fc.weight"])
    except KeyError as err:
        raise ModelError(f"the folder's weights lack {err}", hint="they are cut short") from err
    args = {
        "img_size": list(own),
        "patch_size": int(patch.shape[2]),
        "in_chans": int(patch.shape[1]),
        "num_classes": classes,
        "embed_dim": int(patch.shape[0]),
        "depths": config.get("depths", [2, 2, 6, 2]),
        "num_heads": config.get("num_heads", [3, 6, 12, 24]),
        "window_size": config.get("window_size", 7),
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "qkv_bias": config.get("qkv_bias", True),
    }
    if kind.startswith("Swinv2"):
        args["pretrained_window_sizes"] = config.get("pretrained_window_sizes", [0, 0, 0, 0])
    return NAMES[kind], checked_args(args, "config.json"), found


def _join(t: dict[str, Tensor], *, apart: bool) -> None:
    """One layer for queries, keys and values, in place; v2 has their biases apart, and none of
    the keys."""
    for name in [name for name in t if name.endswith(".q.weight")]:
        at = name.removesuffix("q.weight")
        t[f"{at}attn.qkv.weight"] = torch.cat([t.pop(f"{at}{p}.weight") for p in "qkv"])
        if f"{at}q.bias" not in t:
            continue
        if apart:
            t[f"{at}attn.q_bias"], t[f"{at}attn.v_bias"] = (t.pop(f"{at}{p}.bias") for p in "qv")
        else:
            t[f"{at}attn.qkv.bias"] = torch.cat([t.pop(f"{at}{p}.bias") for p in "qkv"])

"""Weights files of other libraries under timm's names: torchvision's and MMPreTrain's transformers.

Both are plain vision transformers; a tensor that has no place is left under its own name, and
refused where the network is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_TORCHVISION: Rules = (  # torchvision.models.vit_b_16 and its sizes
    (r"class_token$", "cls_token"),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_1\.", r"blocks.\1.norm1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_2\.", r"blocks.\1.norm2."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
)
_MMPRETRAIN: Rules = (  # mmpretrain's and mmcls's VisionTransformer with a linear head
    (r"backbone\.(cls_token|pos_embed)$", r"\1"),
    (r"backbone\.patch_embed\.projection\.", "patch_embed.proj."),
    (r"backbone\.pre_norm\.", "norm_pre."),
    (r"backbone\.(?:ln1|norm1)\.", "norm."),
    (r"backbone\.(?:ln2|norm2)\.", "fc_norm."),
    (r"head\.(?:layers\.head|fc)\.", "head."),
    (r"backbone\.layers\.(\d+)\.(?:ln1|norm1)\.", r"blocks.\1.norm1."),
    (r"backbone\.layers\.(\d+)\.(?:ln2|norm2)\.", r"blocks.\1.norm2."),
    (r"backbone\.layers\.(\d+)\.attn\.gamma1\.weight$", r"blocks.\1.ls1.gamma"),
    (r"backbone\.layers\.(\d+)\.ffn\.gamma2\.weight$", r"blocks.\1.ls2.gamma"),
    (r"backbone\.layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
)
_MARKS = (
    ("torchvision", r"((?:.*\.)?)encoder\.layers\.encoder_layer_0\.self_attention\.", _TORCHVISION),
    ("MMPreTrain", r"((?:.*\.)?)backbone\.layers\.0\.ffn\.layers\.0\.0\.", _MMPRETRAIN),
)


def translated(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under timm's names, and notes that say so; others as they are."""
    for library, mark, rules in _MARKS:
        prefix = _prefix(mark, tensors)
        if prefix is None:
            continue
        out = {}
        for name, tensor in tensors.items():
            bare = name.removeprefix(prefix)
            out[renamed(bare, rules) or name] = tensor
        return out, [f"read as {library}'s vision transformer, under timm's names"]
    return lone_classifier(tensors)


def renamed(name: str, rules: Rules) -> str | None:
    """A name by the first rule whose pattern it begins with; None where there is none."""
    return next((re.sub(p, n, name, count=1) for p, n in rules if re.match(p, name)), None)


def _prefix(mark: str, names: Iterable[str]) -> str | None:
    return next((m[1] for name in names if (m := re.match(mark, name))), None)


def lone_classifier(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`head.1` and the like as `head`, where no other layer of its sequence has weights."""
    found = {m[1] for k in tensors if (m := re.fullmatch(r"head\.(\d+)\.(?:weight|bias)", k))}
    if len(found) != 1:
        return tensors, []
    at = f"head.{found.pop()}."
    weight = tensors.get(f"{at}weight")
    inside = [k for k in tensors if k.startswith("head.")]
    if weight is None or weight.dim() != 2 or not all(k.startswith(at) for k in inside):
        return tensors, []
    said = f"`{at}weight` is taken for the classifier: what is beside it has no weights (dropout)"
    return {k.replace(at, "head.") if k in inside else k: v for k, v in tensors.items()}, [said]

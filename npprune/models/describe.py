"""A network in memory in words that build it again: timm's name, and arguments for it.

It may have been changed by hand. A description is given only where what it builds, with the same
weights, computes the same; a network that none fits is known by its class and its parts.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from npprune.errors import ModelError
from npprune.models.attention import projections
from npprune.models.blocks import STAGED, blocks_of
from npprune.models.create import ACTIVATIONS, create
from npprune.models.info import model_preprocessing, state, weights_sha256
from npprune.models.load import build
from npprune.models.tokens import tokens_of
from npprune.models.uneven import resize_linear
from npprune.models.view import make_view, outputs_count
from npprune.records import CheckpointConfig, ModelSource

SAME = 1e-9  # of the logits, relative, in float64
PLAIN = {"VisionTransformer": "vit_base_patch16_224"}
"""Names for networks that were built from their class, and carry none."""
PARTS = "parts"  # the argument of a network that no description fits


def describe(model: nn.Module) -> ModelSource:
    """Where a network in memory comes from: timm's name, arguments, and the weights' hash.

    Where those do not build it (see `is_described`), its class and a hash of its parts instead.

    Raises:
        ModelError: it is not a plain vision transformer.
    """
    make_view(model)
    sha256 = weights_sha256(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = (cfg.get("architecture") if isinstance(cfg, dict) else None) or PLAIN.get(
        type(model).__name__
    )
    if name is not None:
        for args in _likely(name, model):
            source = ModelSource(name, args, sha256=sha256)
            if builds(source, model):
                return source
    parts = hashlib.sha256(repr(model).encode()).hexdigest()
    return ModelSource(type(model).__name__, {PARTS: parts}, sha256=sha256)


def is_described(source: ModelSource) -> bool:
    """Whether the description builds the network."""
    return PARTS not in source.model_args


def builds(source: ModelSource, model: nn.Module) -> bool:
    """Whether a source, with the sizes and weights of `model`, gives a network that computes what
    `model` does: compared on one random image, in float64."""
    merged, last = tokens_of(model)
    preprocessing = model_preprocessing(model)
    config = CheckpointConfig(
        source=source,
        widths=list(make_view(model).widths),
        heads=[int(block.attn.num_heads) for block in make_view(model).blocks],
        num_classes=outputs_count(model),
        preprocessing=preprocessing,
        classes=[],
        weights_sha256="",
        merged=merged if any(merged) else None,
        last_for_read=last,
    )
    if not is_described(source):
        return False
    try:
        again = build(config, {k: v.float() for k, v in state(model).items()})
    except (ModelError, RuntimeError):  # other layers
        return False
    image = torch.randn(
        1,
        *preprocessing.input_size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        found, expected = (
            copy.deepcopy(m).eval().cpu().float().double()(image) for m in (again, model)
        )
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= SAME * expected.abs().max())  # False of NaN


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel, torch.compile's wrapper, or timm's
    moving averages (`ModelEmaV2`, `ModelEmaV3`)."""
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel, ModelEmaV2, ModelEmaV3)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def with_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The same network with other weights, in place: linear layers get sizes and biases of these.

    Raises:
        ModelError: they are not those of the network.
    """
    for name, module in model.named_modules():
        weight = tensors.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and weight is not None:
            resize_linear(module, weight.shape[0], weight.shape[1], f"{name}.bias" in tensors)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as err:
        raise ModelError(f"the weights are not those of the network: {err}") from err
    return model


def _likely(name: str, model: nn.Module) -> list[dict[str, Any]]:
    """Arguments for timm's `name`, the likeliest first: what differs from its own."""
    own = _arguments(model)
    outputs = {"num_classes": own["num_classes"]}
    try:
        with torch.device("meta"):
            usual = _arguments(create(name, dict(outputs)))
    except (ModelError, RuntimeError, AttributeError):  # not such a network any more
        return []
    args = outputs | {k: v for k, v in own.items() if usual.get(k) != v}
    follow = {k: v for k, v in args.items() if k not in ("fc_norm", "final_norm")}  # from pooling
    return [follow, args] if follow != args else [args]


def _arguments(model: Any) -> dict[str, Any]:
    """Arguments of timm's architectures, as far as they can be read off a network."""
    view = make_view(model)
    if isinstance(model, STAGED):
        return _staged_arguments(model)
    block, embed = view.blocks[0], getattr(model, "patch_embed", None)
    heads = projections(block.attn)
    width = view.fc2(0).out_features
    found: dict[str, Any] = {
        "num_classes": outputs_count(model),
        "embed_dim": width,
        "depth": len(view.blocks),
        "num_heads": width // heads.value_dims if heads is not None else block.attn.num_heads,
        "global_pool": getattr(model, "global_pool", None),
        "class_token": getattr(model, "cls_token", None) is not None,
        "reg_tokens": int(getattr(model, "num_reg_tokens", 0)),
        "no_embed_class": bool(getattr(model, "no_embed_class", False)),
        "dynamic_img_size": bool(getattr(model, "dynamic_img_size", False)),
        "fc_norm": not isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity),
        "final_norm": not isinstance(model.norm, nn.Identity),
        "pre_norm": not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity),
        "qk_norm": not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity),
        "qkv_bias": getattr(getattr(block.attn, "qkv", None), "bias", None) is not None,
        "proj_bias": getattr(block.attn.proj, "bias", None) is not None,
        "init_values": None
        if isinstance(getattr(block, "ls1", nn.Identity()), nn.Identity)
        else 1e-5,
        "norm_eps": getattr(block.norm1, "eps", None),
        "act_layer": _activation(getattr(block.mlp, "act", None)),
    }
    if embed is not None and not hasattr(embed, "backbone"):
        found["in_chans"] = embed.proj.in_channels
        found["patch_size"] = list(embed.patch_size)
        found["img_size"] = list(embed.img_size) if embed.img_size is not None else None
    return found


def _staged_arguments(model: Any) -> dict[str, Any]:
    """Those of a Swin; its windows are as large as the largest, where the grid is not smaller."""
    blocks, embed = blocks_of(model), model.patch_embed
    windows = [list(b.window_size) for b in blocks]
    bias = getattr(blocks[0].attn, "q_bias", None) is not None
    return {
        "num_classes": outputs_count(model),
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": embed.proj.in_channels,
        "embed_dim": blocks[0].mlp.fc2.out_features,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [int(stage.blocks[0].attn.num_heads) for stage in model.layers],
        "window_size": [max(side) for side in zip(*windows, strict=True)],
        "qkv_bias": blocks[0].attn.qkv.bias is not None or bias,
        "norm_eps": getattr(model.norm, "eps", None),
        "global_pool": model.global_pool,
    }


def _activation(act: Any) -> str | None:
    """In timm's words; None for another one."""
    name = type(act).__name__.lower()
    if isinstance(act, nn.GELU) or name == "gelu":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    words = {word.replace("_", ""): word for word in ACTIVATIONS}
    return words.get(name)

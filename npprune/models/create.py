"""timm's names: those of today, those with a tag, and the networks that they build."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import psutil
import timm
import torch
from timm.layers import LayerNorm
from timm.models._registry import _deprecated_models
from torch import Tensor, nn

from npprune.errors import ModelError, setting
from npprune.untrusted import first_line

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
CLASS_AND_PATCHES = "class+patches"

_SIDE, _WIDTH, _DEPTH, _CLASSES = 16384, 16384, 256, 2**20
_ARGUMENTS: dict[str, Any] = {  # name -> largest whole number or number, bool, or words
    "img_size": _SIDE,
    "patch_size": 256,
    "in_chans": 64,
    "num_classes": _CLASSES,
    "embed_dim": _WIDTH,
    "depth": _DEPTH,
    "depths": _DEPTH,
    "num_heads": 1024,
    "window_size": 1024,
    "pretrained_window_sizes": 1024,
    "mlp_ratio": 64.0,
    "init_values": 1e3,
    "reg_tokens": 256,
    "norm_eps": 1.0,
    "global_pool": ("token", "avg", "avgmax", "max", "map", "prr", ""),
    "pos_embed": ("learn", "none", ""),
    "act_layer": ACTIVATIONS,
    "norm_layer": ("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32"),
    "head_reads": (CLASS_AND_PATCHES,),
}
_SWITCHES = {
    "qkv_bias",
    "qkv_fused",
    "qk_norm",
    "proj_bias",
    "scale_attn_norm",
    "scale_mlp_norm",
    "scale_mlp",
    "scale_attn_inner",
    "class_token",
    "no_embed_class",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "use_fc_norm",
    "pool_include_prefix",
    "swiglu_mlp",
    "use_abs_pos_emb",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
    "use_rot_pos_emb",
    "use_post_norm",
    "use_pre_transformer_norm",
    "use_post_transformer_norm",
    "dynamic_img_size",
    "strict_img_size",
    "always_partition",
}
_OF_STAGES = {"depths", "num_heads", "pretrained_window_sizes"}
"""Arguments that may be one number for each stage of a network."""
_STAGES = 8

_NO_MATTER = re.compile(r"(?:\w+_)?drop(?:_path)?_rate$|weight_init$|fix_init$|head_init_scale$")
"""Arguments that change nothing at inference."""

_HUB = re.compile(r"^(?:hf-hub|hf_hub|local-dir):|/")


class ClassAndPatches(nn.Module):
    """Pools as DINOv2's linear classifier reads: [b, t, d] -> the class token and the mean patch
    token side by side, [b, 2 d]."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix  # class and register tokens

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 0], x[:, self.prefix :].mean(1)], 1)


def create(name: str, args: dict[str, Any], **timm_options: Any) -> nn.Module:
    """`timm.create_model` in evaluation mode, leaving the global random state as it was.

    Two arguments are npprune's own: `norm_eps`, the epsilon of the layer norms, and `head_reads`
    (`class+patches`), two parts of the tokens that a twice as wide classifier reads.

    Raises:
        ModelError: the architecture does not take these arguments.
    """
    name, _ = current_name(name)
    published(name)
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    if (eps := known.pop("norm_eps", None)) is not None:
        known["norm_layer"] = partial(LayerNorm, eps=eps)
    two_parts = known.pop("head_reads", None) == CLASS_AND_PATCHES
    if two_parts:
        known["global_pool"] = "map"
    with torch.random.fork_rng(devices=[]):
        try:
            model = timm.create_model(name, **timm_options, **known).eval()
            return _reading_two_parts(model) if two_parts else model
        except (TypeError, AssertionError, ValueError, ZeroDivisionError) as err:
            given = ", ".join(f"{k}={v}" for k, v in args.items())
            raise ModelError(
                f"timm cannot build {name} with {given or 'its defaults'}: {first_line(err)}",
                hint="check the image size and the number of heads",
            ) from err


def check_fits(name: str, args: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """The shapes by name of the network that a file describes, from shapes alone: no memory.

    Raises:
        ModelError: it cannot be built, or not in the memory that is free.
    """
    try:
        with torch.device("meta"):
            state = create(name, dict(args)).state_dict()
    except (RuntimeError, OverflowError) as err:
        raise _too_large(name, where, first_line(err)) from err
    needed = sum(v.numel() * v.element_size() for v in state.values())
    free = psutil.virtual_memory().available
    if needed > free:
        gib = f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free"
        raise _too_large(name, where, gib)
    return {key: tuple(value.shape) for key, value in state.items()}


def _too_large(name: str, where: str, why: str) -> ModelError:
    return ModelError(
        f"{where}: the network described ({name}) does not fit into memory: {why}",
        hint="check the sizes, or use a machine with more memory",
    )


def _reading_two_parts(model: Any) -> nn.Module:
    model.attn_pool = ClassAndPatches(model.num_prefix_tokens)  # timm's place for pooling
    model.pool_include_prefix = True
    model.head = nn.Linear(2 * model.embed_dim, model.num_classes)
    return model.eval()  # type: ignore[no-any-return]


def checked_args(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a file, for `create`: known ones, of their type, within bounds.

    Raises:
        ModelError: an argument that could do more than describe a network.
    """
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if _NO_MATTER.match(name):
            continue
        rule = _ARGUMENTS.get(name)
        right = value is None
        if name in _SWITCHES:
            right |= isinstance(value, bool)
        elif isinstance(rule, tuple):
            right |= value in rule
        elif rule is not None:
            most = _STAGES if name in _OF_STAGES else 2 if name.endswith("_size") else 1
            several = isinstance(value, list | tuple) and most > 1
            numbers = value if several else [value]
            kinds = int if isinstance(rule, int) else (int, float)
            right |= 1 <= len(numbers) <= most and all(
                isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v)
                and 0 <= v <= rule
                for v in numbers
            )  # fmt: skip
        if not right:
            raise ModelError(
                f"{where}: the network is described by `{name}` = {str(value)[:60]!r}, which is "
                "not taken from a file",
                hint="plain sizes and switches of timm's transformers are; build the network in "
                "Python, and give its weights with its timm name",
            )
        checked[name] = value
    return checked


def current_name(name: str) -> tuple[str, list[str]]:
    """timm's name of today for one that it has renamed, and a note that says so.

    Raises:
        ModelError: timm removed the model.
    """
    if name not in _deprecated_models:
        return name, []
    current = _deprecated_models[name]
    if current is None:
        raise ModelError(f"timm has removed {name}, without a successor", hint="use another model")
    return current, [f"timm has renamed {name}: it is {current} now"]


def published(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of a name; ModelError with the nearest names if unknown."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise _unknown_name(name)
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if name != base and name not in tagged:
        raise ModelError(
            f"timm has no weights tagged {name.partition('.')[2]!r} for {base}",
            hint=f"there are: {', '.join(tagged[:6])}" if tagged else f"give `{base}` alone",
        )
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def _unknown_name(name: str) -> ModelError:
    last = re.sub(r"^.*[/:]", "", name).replace("-", "_")
    base = last.partition(".")[0]
    near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
    hint = f"near: {', '.join(near)}" if near else "`timm.list_models('vit*')` lists them"
    if last == base and _deprecated_models.get(base):
        hint = f"timm calls it `{_deprecated_models[base]}`"
    elif _HUB.search(name) and last in timm.list_models(pretrained=True):
        hint = f"networks on the hub are given by timm's name alone: `{last}`"
    elif _HUB.search(name):
        hint += "; other weights of the hub: download the file, and pass it with "
        hint += setting("model.checkpoint")
    return ModelError(f"timm has no model named {name!r}", hint=hint)

"""Foreign layouts: the original JAX archives, and `auto`, which reads an architecture off a file.

JAX: "An Image is Worth 16x16 Words" (`ViT-B_16-224.npz`, `ViT-B_32.npz`, `ViT-L_32.npz`).
PyTorch: timm, DeiT, DeiT III, DINOv2 and MAE (`mae_finetuned_vit_base.pth`: average pooling with
`fc_norm`), whatever their sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npprune.errors import ModelError, setting
from npprune.models.layouts import by_name, foreign_layout

Size = tuple[int, int]

STANDARD_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Heads of the usual ViT-Ti, S, B, L, H by width."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

_JAX_NAME = re.compile(
    r"(?:embedding|head)/(?:kernel|bias)$|cls$|Transformer/posembed_input/pos_embedding$"
    r"|Transformer/encoder_norm/(?:scale|bias)$"
    r"|Transformer/encoderblock_\d+/(?:LayerNorm_[02]/(?:scale|bias)|MlpBlock_3/Dense_[01]/"
    r"(?:kernel|bias)|MultiHeadDotProductAttention_1/(?:query|key|value|out)/(?:kernel|bias))$"
    r"|opt/|step$"  # the optimizer's state
)


class UnknownGrid(ModelError):
    """The positions of a file do not say how many rows and columns of patches there are."""


@dataclass
class Architecture:
    """A timm architecture that fits a file: `timm.create_model(name, **args)`."""

    name: str
    args: dict[str, Any]
    preprocessing: dict[str, Any]  # entries of timm's pretrained_cfg
    notes: list[str] = field(default_factory=list)


def jax_to_timm(arrays: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A JAX archive's arrays under timm's names and shapes, and the number of heads.

    Kernels are [in, out] there and [out, in] here; attention kernels carry the heads as an axis:
    query/key/value [d, heads, d/heads], out [heads, d/heads, d].

    Raises:
        ModelError: not a plain ViT archive: ResNet hybrids, the extra `pre_logits` layer, other
            layouts.
    """
    a = {k.removeprefix("opt/target/"): v.float() for k, v in arrays.items()}
    if "conv_root/kernel" in a:
        raise ModelError(
            "the archive is a hybrid with a ResNet stem (`conv_root`), which is not supported",
            hint="use a plain ViT, such as ViT-B_16",
        )
    refuse_representation_layer(a)
    pos = "Transformer/posembed_input/pos_embedding"
    missing = [k for k in ("embedding/kernel", "cls", pos, "head/kernel") if k not in a]
    if missing:
        raise ModelError(
            f"the archive lacks `{missing[0]}`, so it is not in the layout of ViT-B_16.npz; its "
            f"first arrays: {', '.join(list(arrays)[:3])}",
            hint="convert it to a PyTorch state dict with timm's names",
        )
    unknown = [name for name in a if not _JAX_NAME.match(name)]
    if unknown:
        raise ModelError(
            f"the archive has {len(unknown)} arrays that a plain ViT lacks: "
            f"{', '.join(f'`{name}`' for name in unknown[:3])}",
            hint="leaving layers out would give other outputs; use an archive of a plain ViT",
        )
    out = {
        "cls_token": a["cls"],
        "pos_embed": a[pos],
        "patch_embed.proj.weight": a["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": a["embedding/bias"],
        "norm.weight": a["Transformer/encoder_norm/scale"],
        "norm.bias": a["Transformer/encoder_norm/bias"],
        "head.weight": a["head/kernel"].t(),
        "head.bias": a["head/bias"],
    }
    blocks = sorted(
        {int(m[1]) for k in a if (m := re.match(r"Transformer/encoderblock_(\d+)/", k))}
    )
    heads = 0
    for l in blocks:
        try:
            block, heads = _jax_block(a, f"Transformer/encoderblock_{l}/")
        except KeyError as err:
            raise ModelError(f"the archive lacks {err}", hint="it is cut short") from err
        out.update({f"blocks.{l}.{k}": v for k, v in block.items()})
    return {k: v.contiguous() for k, v in out.items()}, heads


def _jax_block(a: dict[str, Tensor], at: str) -> tuple[dict[str, Tensor], int]:
    attn, mlp = at + "MultiHeadDotProductAttention_1/", at + "MlpBlock_3/"
    query = a[attn + "query/kernel"]  # [d, heads, d / heads]
    parts = ("query", "key", "value")
    return {
        "norm1.weight": a[at + "LayerNorm_0/scale"],
        "norm1.bias": a[at + "LayerNorm_0/bias"],
        "attn.qkv.weight": torch.cat([a[f"{attn}{p}/kernel"].flatten(1).t() for p in parts]),
        "attn.qkv.bias": torch.cat([a[f"{attn}{p}/bias"].flatten() for p in parts]),
        "attn.proj.weight": a[attn + "out/kernel"].flatten(0, 1).t(),
        "attn.proj.bias": a[attn + "out/bias"],
        "norm2.weight": a[at + "LayerNorm_2/scale"],
        "norm2.bias": a[at + "LayerNorm_2/bias"],
        "mlp.fc1.weight": a[mlp + "Dense_0/kernel"].t(),
        "mlp.fc1.bias": a[mlp + "Dense_0/bias"],
        "mlp.fc2.weight": a[mlp + "Dense_1/kernel"].t(),
        "mlp.fc2.bias": a[mlp + "Dense_1/bias"],
    }, query.shape[1]


def refuse_representation_layer(names: Iterable[str]) -> None:
    """ModelError where a file has the layer `pre_logits`, which timm would drop in silence."""
    found = next((name for name in names if name.startswith("pre_logits")), None)
    if found is not None:
        raise ModelError(
            f"the file has a representation layer between its norm and its head (`{found}`), "
            "which timm's models lack: they would give other outputs",
            hint="use weights without it, such as those fine-tuned on ImageNet-1k",
        )


def with_timm_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT III's names of the layer scales turned into timm's."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in tensors.items()}


def infer(
    tensors: dict[str, Tensor],
    *,
    num_heads: int | None,
    jax: bool,
    wrapped: bool,
    img_size: Size | None = None,
    activation: str | None = None,
    pooling: str | None = None,
) -> Architecture:
    """The plain vision transformer that a state dict in timm's names belongs to.

    Args:
        tensors: as in the file (or from `jax_to_timm`).
        num_heads: attention heads; None reads them from a QK norm or takes the usual number of a
            standard width.
        jax: the file is a JAX archive; wrapped: its weights lay under a key `model`. Both only
            decide which preprocessing is assumed, which the notes say.
        img_size: height and width that were asked for; where the file has just as many positions
            as these need, they are its own.

    Raises:
        ModelError: not a plain vision transformer, or the heads or the grid cannot be told.
    """
    patch, fc1, depth = _landmarks(tensors)
    width, hidden = patch.shape[0], fc1.shape[0]
    names = set(tensors)
    registers = next((tensors[k] for k in ("reg_token", "register_tokens") if k in names), None)
    prefix = sum(k in names for k in ("cls_token", "dist_token"))
    prefix += registers.shape[1] if registers is not None else 0
    grid, no_embed_class, notes = _grid(tensors, prefix, img_size)
    qkv = tensors["blocks.0.attn.qkv.weight"]
    heads, said = _heads(tensors, width, qkv.shape[0] // 3, num_heads)
    notes += said
    average = "fc_norm.weight" in names or "cls_token" not in names or pooling == "avg"
    if average and pooling == "token":
        raise ModelError(
            "the file's classifier reads the mean patch token, and `pooling` is token",
            hint=f"leave {setting('model.pooling')} out",
        )
    act = _activation(names, activation)
    _refuse_ambiguous(tensors)
    args: dict[str, Any] = {
        "img_size": [grid[0] * patch.shape[2], grid[1] * patch.shape[3]],
        "patch_size": patch.shape[2] if patch.shape[2] == patch.shape[3] else list(patch.shape[2:]),
        "in_chans": patch.shape[1],
        "num_classes": tensors["head.weight"].shape[0] if "head.weight" in names else 0,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _ratio(width, hidden),
        "qkv_bias": "blocks.0.attn.qkv.bias" in names,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "proj_bias": "blocks.0.attn.proj.bias" in names,
        "init_values": 1e-5 if names & {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} else None,
        "class_token": "cls_token" in names,
        "no_embed_class": no_embed_class,
        "reg_tokens": registers.shape[1] if registers is not None else 0,
        "pre_norm": "norm_pre.weight" in names,
        "global_pool": "map" if "attn_pool.latent" in names else ("avg" if average else "token"),
        "fc_norm": "fc_norm.weight" in names,
    }
    if "norm_pre.weight" in names:
        args["norm_eps"] = 1e-5  # CLIP's
    if act != "gelu":
        args["act_layer"] = act.replace("-", "_")
    notes.append(_assumed(names, args, activation, pooling))
    arch = "vit_base_patch16_224"
    if "dist_token" in names:  # its own class in timm, with fewer choices
        arch = "deit_base_distilled_patch16_224"
        args.pop("fc_norm")
    half = jax or not (wrapped or "fc_norm.weight" in names)
    notes.append(
        "the file does not say its preprocessing: assumed mean and standard deviation "
        + ("0.5, as timm's ViT" if half else "of ImageNet, as DeiT and MAE")
        + ", bicubic, crop 0.9"
    )
    return Architecture(arch, args, HALF if half else IMAGENET, notes)


def _activation(names: set[str], given: str | None) -> str:
    """ModelError where it must be said: CLIP's layout comes with GELU and with quick-GELU."""
    if given is None and "norm_pre.weight" in names:
        raise ModelError(
            "the file has a norm before its blocks, as CLIP's image towers, which exist with GELU "
            "and with quick-GELU, and it does not say which",
            hint=f"give {setting('model.activation', 'quick-gelu')} for OpenAI's weights and those "
            f"that follow them, {setting('model.activation', 'gelu')} for others",
        )
    return given or "gelu"


def _refuse_ambiguous(tensors: dict[str, Tensor]) -> None:
    """ModelError for layouts whose tensors are those of other networks, too."""
    names = set(tensors)
    if {"norm_pre.weight", "attn_pool.latent"} <= names:
        raise ModelError(
            "the file is of a perception encoder or a relative, whose rotary positions are not in "
            "the file",
            hint="give its timm name instead of `auto`, such as `vit_pe_core_base_patch16_224`",
        )
    if not names & {"cls_token", "blocks.0.attn.qkv.bias", "attn_pool.latent"}:
        raise ModelError(
            "the file has neither a class token nor biases of queries, keys and values, as "
            "networks whose norms follow attention and MLP (rpn) and others whose norms come first",
            hint="give its timm name instead of `auto`, such as `vit_base_patch16_rpn_224`",
        )
    bias = tensors.get("head.bias")
    if {"norm_pre.weight", "head.weight"} <= names and (bias is None or not bias.any()):
        raise projection("the file's `head`, which has no bias,")


def projection(what: str) -> ModelError:
    """For image towers of CLIP, whose last layer leads to a space shared with text."""
    return ModelError(
        f"{what} is a projection onto embeddings of images and texts: its outputs are no classes",
        hint=f"{setting('model.num_classes', 0)} takes the network without it, for its features; "
        "weights fine-tuned for classification have `_ft_in1k` in timm's names",
    )


def about_features(outputs: int) -> list[str]:
    """A note where there is no classifier."""
    said = "no classifier: what counts are its features, the pooled vector and the patch tokens"
    return [] if outputs else [said]


def _assumed(
    names: set[str], args: dict[str, Any], activation: str | None, pooling: str | None
) -> str:
    """What no tensor says, in one line."""
    eps = args.get("norm_eps", 1e-6)
    said = [f"norms with epsilon {eps:g} before attention and MLP", "no rotary positions"]
    if "blocks.0.gamma_1" in names:
        said[-1] += " as in DeiT III (networks with them, `vit_*_rope_ape_*`, by their timm name)"
    if activation is None:
        said.insert(0, "GELU (activation)")
    if pooling is None and args["global_pool"] == "token":
        said.insert(0, "the classifier reads the class token (pooling)")
    return f"a file of weights does not say all; assumed: {', '.join(said)}"


def _landmarks(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Patch embedding [d, c, p, p], first `fc1` [h, d], number of blocks."""
    needed = (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    )
    missing = [k for k in needed if k not in tensors]
    if missing:
        known = foreign_layout(tensors)
        raise ModelError(
            f"`auto` reads plain vision transformers in timm's, DeiT's, MAE's or JAX's layout, and "
            f"the file {f'is {known[0]}: it ' if known else ''}lacks `{missing[0]}`; its first "
            f"tensors: {', '.join(list(tensors)[:3])}",
            hint=known[1] if known else by_name(tensors),
        )
    patch, _, fc1, fc2 = (tensors[k] for k in needed)
    if patch.dim() != 4 or fc1.shape[0] != fc2.shape[1]:
        raise ModelError(
            f"`auto` reads plain two-layer MLPs, and the file's first has fc1 {list(fc1.shape)} "
            f"and fc2 {list(fc2.shape)}: it is gated, or not a vision transformer",
            hint=by_name(tensors),
        )
    found = {int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d+)\.", k))}
    depth = max(found) + 1
    lost = sorted(set(range(depth)) - found)
    if lost:
        raise ModelError(
            f"the file has block {depth - 1} and lacks block {lost[0]}",
            hint="it is cut short, or one part of several",
        )
    for l in range(depth):
        other = tensors.get(f"blocks.{l}.mlp.fc1.weight", fc1)
        if other.shape != fc1.shape:
            raise ModelError(
                f"blocks of one file must be alike, got fc1 {list(fc1.shape)} in block 0 and "
                f"{list(other.shape)} in block {l}",
                hint="a pruned network is loaded by its folder, with its config.json",
            )
    return patch, fc1, depth


@dataclass
class _Reading:
    """One way to read the positions of a file."""

    patches: int
    prefix: int  # positions for class token, distillation token and registers

    @property
    def side(self) -> int:
        """Of a square grid; 0 if the patches form none."""
        side = math.isqrt(max(self.patches, 0))
        return side if side * side == self.patches else 0

    def shapes(self) -> list[Size]:
        """The square, or grids at most four times as long as wide, the nearest to square first."""
        if self.side:
            return [(self.side, self.side)]
        low = range(math.isqrt(max(self.patches, 0)), 0, -1)
        pairs = [(h, self.patches // h) for h in low if self.patches % h == 0]
        return [pair for h, w in pairs if w <= 4 * h for pair in ((h, w), (w, h))]


def _grid(
    tensors: dict[str, Tensor], prefix: int, img_size: Size | None
) -> tuple[Size, bool, list[str]]:
    """Rows and columns of the patch grid, and whether positions leave prefix tokens out.

    The file says no more than how many positions there are. Taken is the grid of `img_size`, if
    it has as many; else a square beside positions for the prefix tokens; else a square without
    these, if nothing else is possible.
    """
    if "pos_embed" not in tensors:
        raise ModelError(
            "the file has no `pos_embed`, so the image size is not in it", hint=by_name(tensors)
        )
    n = tensors["pos_embed"].shape[1]
    patch: Size = tuple(tensors["patch_embed.proj.weight"].shape[2:])  # type: ignore[assignment]
    readings = [_Reading(n - count, count) for count in _prefix_positions(tensors, n, prefix)]
    if img_size is not None:
        asked = img_size[0] // patch[0], img_size[1] // patch[1]
        for reading in readings:
            if asked[0] * asked[1] == reading.patches:
                taken = f"{reading.patches} patches: read as {by(asked)}, as the image size says"
                return asked, reading.prefix < prefix, [taken]
    square = next((r for r in readings if r.side), None)
    if square and (square is readings[0] or not readings[0].shapes()):
        grid, pixels = (square.side, square.side), (square.side * patch[0], square.side * patch[1])
        taken = (
            f"{square.patches} patches: read as {by(grid)}, {by(pixels)} pixels; another shape is "
            "given by the image size"
        )
        return grid, square.prefix < prefix, [taken]
    raise _unknown_grid(n, readings, patch)


def _prefix_positions(tensors: dict[str, Tensor], n: int, prefix: int) -> list[int]:
    """How many of the positions may belong to prefix tokens, the usual number first."""
    if "register_tokens" in tensors:  # DINOv2: the class token alone
        return [1]
    if "blocks.0.gamma_1" in tensors and math.isqrt(n) ** 2 == n:  # DeiT III
        return [0]
    return [prefix, 0] if prefix else [0]


def _unknown_grid(n: int, readings: list[_Reading], patch: Size) -> UnknownGrid:
    said, flags = [], []
    for reading in readings:
        pixels = [(h * patch[0], w * patch[1]) for h, w in reading.shapes()[:2]]
        if pixels:
            grids = " or ".join(map(by, reading.shapes()[:2]))
            others = (
                "" if len(readings) == 1 else f" and {reading.prefix or 'none'} of other tokens"
            )
            said.append(f"those of {reading.patches} patches ({grids}){others}")
            flags += [
                setting("model.img_size", size[0] if size[0] == size[1] else by(size))
                for size in pixels
            ]
    return UnknownGrid(
        f"the image size is not in the file: its {n} positions may be "
        + (", or ".join(said) or "any grid"),
        hint="give the height and width it was trained at: "
        + (", ".join(flags) or setting("model.img_size", "HxW")),
    )


def by(size: Size) -> str:
    """`4x6`."""
    return f"{size[0]}x{size[1]}"


def _heads(
    tensors: dict[str, Tensor], width: int, attended: int, given: int | None
) -> tuple[int, list[str]]:
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    if given is not None:
        if given < 1 or attended % given:
            raise ModelError(
                f"`num_heads` must divide the width {attended}, got {given}",
                hint=f"the usual head has 64 channels: {max(attended // 64, 1)} heads",
            )
        return given, []
    if norm is not None:
        return attended // norm.shape[0], []
    if width in STANDARD_HEADS and attended == width:
        heads = STANDARD_HEADS[width]
        return heads, [
            f"the file does not say its heads: took {heads}, usual at width {width} (num_heads)"
        ]
    raise ModelError(
        f"the number of attention heads is not in the file, and the width {width} is not a usual "
        f"one ({', '.join(map(str, STANDARD_HEADS))})",
        hint=f"give it: {setting('model.num_heads', 'N')}",
    )


def _ratio(width: int, hidden: int) -> float:
    """A ratio that timm's int(width * ratio) turns back into `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)

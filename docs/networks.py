"""Writes `docs/networks.md`: what works on which network, asked of tiny ones of each family.

    python docs/networks.py

A test does the same and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from npprune.errors import ModelError
from npprune.models.create import create
from npprune.models.surgery import check_axes, check_prunable
from npprune.models.view import make_view
from npprune.words import ALL_AXES

PAGE = Path(__file__).with_name("networks.md")
AXES = ("mlp", "heads", "qk", "head-dim", "tokens", "cls")

PLAIN: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
PLAIN |= {"num_heads": 3, "num_classes": 5}
STAGES: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}
STAGES |= {"window_size": 4, "num_classes": 5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT, DeiT": ("vit_base_patch16_224", PLAIN),
    "ViT, average pooling": ("vit_base_patch16_224", {**PLAIN, "global_pool": "avg"}),
    "ViT with QK-norm": ("vit_base_patch16_224", {**PLAIN, "qk_norm": True}),
    "ViT, norms behind the layers": ("vit_base_patch16_rpn_224", PLAIN),
    "DeiT distilled": ("deit_base_distilled_patch16_224", PLAIN),
    "DeiT III": ("deit3_base_patch16_224", PLAIN),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", PLAIN),
    "DINOv2, gated": ("vit_giant_patch14_dinov2", {**PLAIN, "mlp_ratio": 4}),
    "DINOv3": ("vit_small_patch16_dinov3", PLAIN),
    "CLIP": ("vit_base_patch16_clip_224", PLAIN),
    "SigLIP": ("vit_base_patch16_siglip_224", PLAIN),
    "Perception Encoder": ("vit_pe_core_base_patch16_224", PLAIN),
    "AIMv2": ("aimv2_large_patch14_224", PLAIN),
    "BEiT": ("beit_base_patch16_224", PLAIN),
    "BEiT-3": ("beit3_base_patch16_224", PLAIN),
    "EVA": ("eva_giant_patch14_224", PLAIN),
    "EVA-02 Ti, S": ("eva02_tiny_patch14_224", PLAIN),
    "EVA-02 B, L": ("eva02_base_patch14_448", PLAIN),
    "RoPE, mixed": ("vit_small_patch16_rope_mixed_224", {**PLAIN, "embed_dim": 48}),
    "Relative positions": ("vit_relpos_base_patch16_224", PLAIN),
    "Differential attention": ("vit_dlittle_patch16_reg1_gap_256", PLAIN),
    "ViT, hybrid": (
        "vit_small_resnet26d_224",
        {**PLAIN, "img_size": 64, "patch_size": 1},
    ),
    "Swin": ("swin_tiny_patch4_window7_224", STAGES),
    "Swin V2": ("swinv2_tiny_window8_256", STAGES),
    "Parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "CaiT": ("cait_xxs24_224", {}),
    "XCiT": ("xcit_nano_12_p16_224", {}),
    "ConViT": ("convit_tiny", {}),
    "CrossViT": ("crossvit_9_240", {}),
    "SAM": ("samvit_base_patch16", {}),
    "Hiera": ("hiera_tiny_224", {}),
    "MViT v2": ("mvitv2_tiny", {}),
    "PiT": ("pit_ti_224", {}),
    "Twins": ("twins_svt_small", {}),
    "DaViT": ("davit_tiny", {}),
    "NesT": ("nest_tiny", {}),
    "Swin V2 CR": ("swinv2_cr_tiny_224", {}),
    "MLP-Mixer": ("mixer_s32_224", {}),
    "ConvNeXt": ("convnext_atto", {}),
    "ResNet": ("resnet10t", {}),
}
"""Name, and a network of timm with its arguments."""

SHORT = {
    "rotary position embeddings between": "rotary positions between projection and product",
    "Norm between the projection": "a norm between projection and product",
    "heads has rotary positions of its own": "each head has rotary positions of its own",
    "another attention, or with a norm": "another attention, or a norm or gate on its output",
    "another attention, or one with biases": "another attention",
    "is another block than": "another block",
    "rotary positions differ": "rotary positions differ from block to block",
    "reads every token": "the classifier reads every token",
}
"""What refusals say, in a few words."""

HEAD = """# Networks

What works on which family of timm's networks. The table is made by asking a tiny network of each
(`python docs/networks.py`), and a test compares.

*Discover*: paths are found. *Prune*: hidden units are removed, with all that follows: refit, heal,
checkpoint, report, and export to ONNX, which a test does for every family. *Axes*: what else can be
removed; those in italics only where they are asked for by name.

| network | for example | discover | prune | axes | why not |
| --- | --- | --- | --- | --- | --- |
"""


def tiny(family: str) -> nn.Module:
    """A network of the family; where it is refused, shapes alone."""
    name, args = FAMILIES[family]
    with torch.device("cpu" if args else "meta"):
        return create(name, args)


def row(family: str) -> str:
    """A family's line of the table."""
    model, name = tiny(family), f"`{FAMILIES[family][0]}`"
    try:
        make_view(model)
    except ModelError as err:
        return _line(family, name, "no", "no", "", str(err))
    try:
        check_prunable(model)
    except ModelError as err:
        return _line(family, name, "yes", "no", "", str(err))
    axes: list[str] = []
    why: dict[str, list[str]] = {}
    for axis in AXES:
        try:
            check_axes(model, [axis])
        except ModelError as err:
            why.setdefault(_short(str(err)), []).append(f"`{axis}`")
        else:
            axes.append(f"`{axis}`" if axis in ALL_AXES else f"*`{axis}`*")
    reasons = "; ".join(f"{' '.join(of)}: {reason}" for reason, of in why.items())
    return _line(family, name, "yes", "yes", " ".join(axes), reasons)


def _short(message: str) -> str:
    """A refusal's reason in a few words; in its own where it is another one."""
    return next((short for mark, short in SHORT.items() if mark in message), message)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(row(family) for family in FAMILIES)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""What a file is that does not fit: layouts of other libraries, by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RENAME = (
    "convert it first: a state dict with timm's names (`patch_embed.proj.weight`, "
    "`blocks.0.attn.qkv.weight`, ...) is read"
)
_PLAIN = "npprune needs a plain vision transformer"
_LAYOUTS = (  # a pattern that some name has, what the file is, the next step
    (
        r"\blora_[AB]\b|\.lora_\w+|base_layer\.weight$",
        "a network with LoRA adapters, or adapters alone",
        "merge them into the weights and save those: `model.merge_and_unload()` in PEFT",
    ),
    (
        r"(^|\.)encoder\.layers\.encoder_layer_\d+\.",
        "torchvision's vision transformer (`conv_proj`, `encoder.layers.encoder_layer_0`)",
        _RENAME,
    ),
    (
        r"embeddings\.patch_embeddings?\.|encoder\.layer\.\d+\.attention\.",
        "Hugging Face's vision transformer (`embeddings.patch_embeddings`, `encoder.layer.0`)",
        "give the folder with its config.json as the model: a file alone does not say its heads",
    ),
    (
        r"(^|\.)visual\.|\bresblocks\.\d+\.",
        "a CLIP model, its image tower under `visual.`",
        "give the timm name of a `vit_*_clip_*` network fine-tuned for classification",
    ),
    (
        r"(^|\.)decoder_blocks\.",
        "a checkpoint of MAE's pretraining, with a decoder and no classifier",
        "use weights fine-tuned for classification",
    ),
    (
        r"(^|\.)patch_embed\.backbone\.",
        "a hybrid with a convolutional stem (`patch_embed.backbone`)",
        "give its timm name, such as `vit_small_r26_s32_224`",
    ),
    (r"(^|\.)(layers|stages)\.\d+\.(blocks|layers)\.\d+\.", "a hierarchical network", _PLAIN),
    (r"(^|\.)layer\d\.\d+\.conv\d\.|^conv1\.weight", "a convolutional network", _PLAIN),
    (
        r"(^|\.)transformer\.layers\.\d+\.|(^|\.)encoder\.layers\.\d+\.self_attn\.",
        "a transformer in other names than timm's",
        _RENAME,
    ),
)


def foreign_layout(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these tensors is, and the next step; None if no known layout."""
    names = list(names)
    for pattern, what, hint in _LAYOUTS:
        if any(re.search(pattern, name) for name in names):
            return what, hint
    return None


def by_name(names: Iterable[str]) -> str:
    """The next step where `auto` cannot read a file: a timm name, where one could fit."""
    if any(re.match(r"blocks\.\d+\.", name) for name in names):
        return "give the timm name of the architecture instead of `auto`"
    return _RENAME

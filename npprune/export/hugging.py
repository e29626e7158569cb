"""A folder that `transformers` loads: `AutoModelForImageClassification.from_pretrained(FOLDER)`.

A network whose blocks are alike, with ViT's own head, is written as `ViTForImageClassification`.
Any other plain one brings its class along, `modeling_npprune.py` and `npprune_tokens.py`, which
`trust_remote_code=True` admits.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import ExportError
from npprune.export.onnx import frozen_copy
from npprune.records import ClassInfo, ModelInfo, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

CODE = "modeling_npprune.py"
TOKENS = "npprune_tokens.py"
_INSTEAD = "export to ONNX or a torch archive"
_ACTIVATIONS = {  # class -> name in `transformers`
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
}
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def to_transformers(
    model: nn.Module, info: ModelInfo, classes: list[ClassInfo], folder: Path, about: str = ""
) -> bool:
    """Write `config.json`, `model.safetensors`, `preprocessor_config.json` and a model card.

    Args:
        model: a plain vision transformer of timm, pruned or not.
        info: what it is; its preprocessing is written.
        classes: one for each output.
        folder: an empty one.
        about: a sentence on where the network comes from.

    Returns:
        whether the folder brings code of its own.

    Raises:
        ExportError: a network or a preprocessing that `transformers` cannot be told of.
    """
    from safetensors.torch import save_file

    said = _described(model, info)
    tensors = {k: v.contiguous() for k, v in frozen_copy(model).state_dict().items()}
    own = not _is_vit(said)
    names = [c.name for c in classes] or [str(i) for i in range(info.num_classes)]
    labels = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "dtype": "float32",
    }
    if own:
        config = {**_own_config(said), **labels}
        bring(folder, Path(__file__).with_name(CODE))
    else:
        tensors = _as_vit(tensors)
        config = {**_vit_config(said), **labels}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", _processor(info.preprocessing))
    (folder / "README.md").write_text(_card(info, names, about, own), encoding="utf-8")
    return own


def load_transformers(folder: Path, own: bool) -> nn.Module:
    """The network that `transformers` makes of such a folder, giving logits alone.

    Raises:
        ExportError: `transformers` is not installed: nothing is shipped unchecked.
    """
    import torch

    try:
        import transformers
    except ImportError as err:
        raise ExportError(
            "the folder is checked by loading it with `transformers`, which is not installed",
            hint="pip install transformers",
        ) from err
    from transformers.utils import logging as said

    said.disable_progress_bar()
    kind: Any = transformers.AutoModelForImageClassification
    if own:
        from npprune.export.modeling_npprune import NpPruneViTForImageClassification

        kind = NpPruneViTForImageClassification
    network = kind.from_pretrained(folder, local_files_only=True).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            return self.network(pixel_values=images).logits  # type: ignore[no-any-return]

    return Logits().eval()


def bring(folder: Path, code: Path) -> None:
    """Write a file of code beside the weights, and `npprune.core.tokens` which it imports."""
    import npprune.core.tokens

    for name, source in ((code.name, code), (TOKENS, Path(npprune.core.tokens.__file__))):
        (folder / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- what the network is


def _refuse(what: str) -> ExportError:
    return ExportError(
        f"`transformers` is written plain vision transformers, not {what}", hint=_INSTEAD
    )


def _described(model: Any, info: ModelInfo) -> dict[str, Any]:
    """The configuration of `NpPruneViTConfig`; ExportError where there is something else."""
    kind = type(model).__name__
    if kind not in ("VisionTransformer", "VisionTransformerDistilled"):
        raise _refuse(f"networks of timm's class {kind}")
    if model.pos_embed is None or not hasattr(model.patch_embed.proj, "kernel_size"):
        raise _refuse("networks without position embeddings or with another patch embedding")
    blocks, first = list(model.blocks), model.blocks[0]
    for block in blocks:
        attn = block.attn
        plain = type(attn).__name__ in ("Attention", "NarrowAttention")
        between = [getattr(attn, n, None) for n in ("q_norm", "k_norm", "norm", "gate")]
        between.append(getattr(block.mlp, "norm", None))
        if (
            type(block).__name__ not in ("Block", "MergingBlock")
            or not plain
            or any(map(_does_something, between))
        ):
            raise _refuse("blocks with another attention, or norms within attention or MLP")
    norms = {
        name: module
        for name in ("norm_pre", "norm", "fc_norm")
        if _does_something(module := getattr(model, name, None))
    }
    eps = {m.eps for m in (*norms.values(), first.norm1, first.norm2)}
    if len(eps) != 1 or any("LayerNorm" not in type(m).__name__ for m in norms.values()):
        raise _refuse("networks with other norms than layer norms of one epsilon")
    prefix = [n for n in ("cls_token", "dist_token", "reg_token") if _there(model, n)]
    count = sum(int(getattr(model, n).shape[1]) for n in prefix)
    patches = math.prod(model.patch_embed.grid_size)
    heads, queries = info.heads, info.query_dims
    values = [b.attn.proj.in_features // h for b, h in zip(blocks, heads, strict=True)]
    return {
        "image_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.proj.kernel_size),
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_size": info.embed_dim,
        "intermediate_sizes": info.widths,
        "attention_heads": heads,
        "query_dims": queries or values,
        "value_dims": values,
        "hidden_act": _activation(first.mlp),
        "gated": _gated(first.mlp),
        "cls_sizes": info.cls_widths or [],
        "merged": info.merged or [],
        "read": _read(blocks[-1]),
        "layer_norm_eps": eps.pop(),
        "prefix": prefix,
        "prefix_tokens": count,
        "positions": "patches" if model.pos_embed.shape[1] == patches else "all",
        "patch_bias": model.patch_embed.proj.bias is not None,
        "qkv_bias": [b.attn.qkv.bias is not None for b in blocks],
        "layer_scale": _does_something(getattr(first, "ls1", None)),
        "norms": list(norms),
        "pooling": _pooling(model),
    }


def _read(last: Any) -> int:
    """How many tokens the last block computes; 0: all."""
    options = getattr(last, "token_options", None)
    return 0 if options is None else options.read or 0


def _there(model: Any, name: str) -> bool:
    return getattr(model, name, None) is not None


def _does_something(module: Any) -> bool:
    return module is not None and type(module).__name__ != "Identity"


def _activation(mlp: Any) -> str:
    kind, approximate = type(mlp.act).__name__, getattr(mlp.act, "approximate", "none")
    if kind not in _ACTIVATIONS:
        raise _refuse(f"hidden units of the activation {kind}")
    return "gelu_pytorch_tanh" if approximate == "tanh" else _ACTIVATIONS[kind]


def _gated(mlp: Any) -> str:
    kind = type(mlp).__name__.removeprefix("Own")
    if kind == "Mlp":
        return ""
    if kind != "GluMlp":
        raise _refuse(f"MLPs of the kind {type(mlp).__name__}")
    return "last" if mlp.gate_last else "first"


def _pooling(model: Any) -> str:
    if getattr(model, "head_dist", None) is not None:
        return "distilled"
    pool = getattr(model, "attn_pool", None)
    if pool is not None:
        if type(pool).__name__ != "ClassAndPatches":
            raise _refuse("networks that pool by attention")
        return "class+patches"
    if model.global_pool == "avg":
        return "all" if model.pool_include_prefix else "avg"
    if model.global_pool != "token":
        raise _refuse(f"networks that pool by `{model.global_pool}`")
    return "token"


def _is_vit(said: dict[str, Any]) -> bool:
    """Whether `ViTForImageClassification` computes it."""
    full = said["hidden_size"] // said["attention_heads"][0]
    alike = all(
        len(set(said[k])) == 1
        for k in ("intermediate_sizes", "attention_heads", "query_dims", "value_dims", "qkv_bias")
    )
    usual = {
        "gated": "",
        "prefix": ["cls_token"],
        "positions": "all",
        "patch_bias": True,
        "layer_scale": False,
        "norms": ["norm"],
        "pooling": "token",
        "cls_sizes": [],
        "merged": [],
    }
    same = all(said[k] == v for k, v in usual.items())
    return same and alike and said["query_dims"][0] == said["value_dims"][0] == full


def _own_config(said: dict[str, Any]) -> dict[str, Any]:
    kind = "NpPruneViTForImageClassification"
    code = CODE.removesuffix(".py")
    return {
        "architectures": [kind],
        "auto_map": {
            "AutoConfig": f"{code}.NpPruneViTConfig",
            "AutoModelForImageClassification": f"{code}.{kind}",
        },
        "model_type": "npprune_vit",
        **said,
    }


def _vit_config(said: dict[str, Any]) -> dict[str, Any]:
    def size(pair: list[int]) -> Any:
        return pair[0] if pair[0] == pair[1] else pair

    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": said["hidden_size"],
        "num_hidden_layers": len(said["intermediate_sizes"]),
        "num_attention_heads": said["attention_heads"][0],
        "intermediate_size": said["intermediate_sizes"][0],
        "hidden_act": said["hidden_act"],
        "layer_norm_eps": said["layer_norm_eps"],
        "image_size": size(said["image_size"]),
        "patch_size": size(said["patch_size"]),
        "num_channels": said["num_channels"],
        "qkv_bias": said["qkv_bias"][0],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


_VIT_NAMES = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.(\d+)\.norm1\.", r"vit.encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vit.encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"vit.encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"vit.encoder.layer.\1.output.dense."),
)


def _as_vit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `ViTForImageClassification`."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if qkv is not None:
            at = f"vit.encoder.layer.{qkv[1]}.attention.attention."
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{at}{part}.{qkv[2]}"] = rows.clone()
            continue
        new = next((re.sub(p, n, name) for p, n in _VIT_NAMES if re.search(p, name)), None)
        if new is None:
            raise ExportError(f"`transformers`'s ViT has no place for `{name}`", hint=_INSTEAD)
        out[new] = tensor
    return out


# ---------------------------------------------------------------- what goes with it


def _processor(pre: Preprocessing) -> dict[str, Any]:
    """`preprocessor_config.json` of the image processor that does the same."""
    _, height, width = pre.input_size
    config: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _RESAMPLING[pre.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pre.mean),
        "image_std": list(pre.std),
    }
    if pre.crop_mode == "border" or (pre.crop_mode == "center" and height != width):
        raise ExportError(
            f"`transformers` has no preprocessing of {pre.crop_mode} to {height}x{width} pixels",
            hint="export with a `squash` crop mode",
        )
    resized = [math.floor(side / pre.crop_pct) for side in (height, width)]
    if pre.crop_mode == "center":
        config |= {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True}
        config["size"] = {"shortest_edge": resized[0]}
    elif resized != [height, width]:
        config["image_processor_type"] = "DeiTImageProcessor"
        config["size"] = {"height": resized[0], "width": resized[1]}
    if config["image_processor_type"] != "ViTImageProcessor":
        config |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return config


def _card(info: ModelInfo, names: list[str], about: str, own: bool) -> str:
    """A short model card; a licence is for the owner of the weights to say."""
    trust = ", trust_remote_code=True" if own else ""
    why = (
        "It is no network that `transformers` has, so the folder brings its class, "
        "`modeling_npprune.py`, and `npprune_tokens.py`; read them before you trust them.\n"
        if own
        else ""
    )
    heads = f"{min(info.heads)} to {max(info.heads)}"
    widths = f"{min(info.widths)} to {max(info.widths)}"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    channels, height, width = info.preprocessing.input_size
    return f"""---
library_name: transformers
pipeline_tag: image-classification
tags: [vision-transformer, pruning]
---

# {info.source.architecture}, written by npprune

{about}

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER"{trust})
logits = model(**processor(image, return_tensors="pt")).logits
```

{why}
| | |
| --- | --- |
| parameters | {info.params:,} |
| MACs per image | {info.macs:,} |
| blocks | {len(info.widths)}, of {widths} hidden units and {heads} heads |
| input | {channels} x {height} x {width} |
| classes | {len(names)}: {shown} |
"""

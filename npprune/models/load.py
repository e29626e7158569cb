"""Networks by timm name, from a checkpoint file, or rebuilt from a pruned checkpoint."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from npprune.errors import ModelError
from npprune.models.foreign import infer, jax_to_timm
from npprune.models.hub import fetch
from npprune.models.info import model_info, weights_sha256
from npprune.models.tokens import apply_tokens
from npprune.models.uneven import fit_to
from npprune.models.view import classifiers, make_view
from npprune.models.weights import read_weights
from npprune.records import CheckpointConfig, ModelInfo, ModelSource

AUTO = "auto"
ImageSize = int | tuple[int, int]


@dataclass
class Loaded:
    """A network in evaluation mode on the CPU, what it is, and what was assumed in loading it."""

    model: nn.Module
    info: ModelInfo
    notes: list[str] = field(default_factory=list)


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    num_heads: int | None = None,
) -> Loaded:
    """A vision transformer with its weights.

    Args:
        name: a timm name, with or without a tag (`vit_tiny_patch16_224.augreg_in21k_ft_in1k`),
            or `auto`: the architecture is read off the checkpoint's shapes.
        checkpoint: a safetensors, PyTorch or JAX `.npz` file; None takes timm's published weights
            from the hub.
        num_classes: outputs of the head; by default as many as the checkpoint has.
        img_size: input side in pixels (or height and width); position embeddings are resampled.
        num_heads: attention heads, where neither name nor file says.

    Raises:
        ModelError: unknown or unsupported architecture, unreadable or mismatching checkpoint,
            weights that cannot be had.
    """
    size = _checked_size(img_size)
    if name == AUTO:
        if checkpoint is None:
            raise ModelError(
                "model `auto` is read off a checkpoint, and none was given",
                hint="add `--checkpoint FILE`, or give a timm name",
            )
        return _load_auto(Path(checkpoint), num_classes, size, num_heads)
    cfg = _published(name)
    args: dict[str, Any] = {}
    if size is not None:
        args["img_size"] = size
    if num_heads is not None:
        args["num_heads"] = num_heads
    if checkpoint is None:
        make_view(create(name, args))  # an unsupported network is refused before a download
        path = fetch(name, cfg)
    else:
        path = Path(checkpoint)
    weights = read_weights(path)
    tensors = weights.tensors
    heads = None
    if weights.layout == "jax":
        tensors, heads = jax_to_timm(tensors)
    args["num_classes"] = _outputs(name, tensors, cfg, num_classes)
    model = _with_weights(name, args, tensors, {}, path)
    if heads is not None and _attention_heads(model) != heads:
        raise ModelError(
            f"{path} has {heads} attention heads, and {name} has {_attention_heads(model)}",
            hint=f"use the model name `auto`, or `--num-heads {heads}`",
        )
    source = ModelSource(name, args, str(checkpoint) if checkpoint is not None else None)
    return Loaded(model, model_info(model, source), weights.notes)


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    num_heads: int | None = None,
) -> nn.Module:
    """As `load`, the network alone."""
    return load(
        name,
        checkpoint=checkpoint,
        num_classes=num_classes,
        img_size=img_size,
        num_heads=num_heads,
    ).model


def build(config: CheckpointConfig, tensors: dict[str, Tensor]) -> nn.Module:
    """A pruned network from its checkpoint, in evaluation mode.

    The dense architecture is created, its layers are given the sizes of the tensors, and the
    tensors are loaded strictly.

    Args:
        config: what `config.json` says.
        tensors: the whole state dict.

    Raises:
        ModelError: the tensors do not form the network that `config` describes.
    """
    args = {**config.source.model_args, "num_classes": config.num_classes}
    model = create(config.source.architecture, args)
    fit_to(model, tensors, heads=config.heads)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as err:
        raise _mismatch(err, "the checkpoint", config.source.architecture) from err
    view = make_view(model)
    if list(view.widths) != config.widths:
        raise ModelError(
            f"config.json says hidden widths {config.widths}, and the tensors have "
            f"{list(view.widths)}",
            hint="the checkpoint's two files do not belong together",
        )
    return apply_tokens(model, config.merged, config.last_for_read).eval()


def create(name: str, args: dict[str, Any], **timm_options: Any) -> nn.Module:
    """`timm.create_model` in evaluation mode, leaving the global random state as it was.

    Raises:
        ModelError: the architecture does not take these arguments.
    """
    _published(name)
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(name, **timm_options, **known).eval()
        except (TypeError, AssertionError, ValueError, ZeroDivisionError) as err:
            given = ", ".join(f"{k}={v}" for k, v in args.items())
            lines = str(err).strip().splitlines() or [type(err).__name__]
            raise ModelError(
                f"timm cannot build {name} with {given or 'its defaults'}: {lines[0][:160]}",
                hint="check the image size and the number of heads",
            ) from err


def load_timm_folder(folder: Path) -> nn.Module:
    """The network that timm reads from a folder in its own format (`local-dir:`), in evaluation
    mode, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _load_auto(
    path: Path, num_classes: int | None, size: tuple[int, int] | None, num_heads: int | None
) -> Loaded:
    weights = read_weights(path)
    tensors, heads = weights.tensors, num_heads
    if weights.layout == "jax":
        tensors, in_file = jax_to_timm(tensors)
        heads = heads or in_file
        if heads != in_file:
            raise ModelError(
                f"`num_heads` is {heads}, and {path} has {in_file} attention heads",
                hint="leave `--num-heads` out: the file says it",
            )
    tensors = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", k): v for k, v in tensors.items()}
    found = infer(
        tensors,
        num_heads=heads,
        jax=weights.layout == "jax",
        wrapped=weights.wrapper is not None,
    )
    args = dict(found.args)
    cfg = {
        **found.preprocessing,
        "input_size": (args["in_chans"], *args["img_size"]),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    args["num_classes"] = _outputs(str(path), tensors, {}, num_classes)
    if size is not None:
        args["img_size"] = list(size)
    if found.name.startswith("deit_base_distilled"):
        args.pop("fc_norm")
    model = _with_weights(found.name, args, tensors, cfg, path)
    source = ModelSource(found.name, args, str(path))
    return Loaded(model, model_info(model, source), weights.notes + found.notes)


def _with_weights(
    name: str,
    args: dict[str, Any],
    tensors: dict[str, Tensor],
    cfg: dict[str, Any],
    path: Path,
) -> nn.Module:
    """The architecture with these weights, through timm's own checkpoint filter."""
    bare = create(name, args)
    make_view(bare)
    patch = tensors.get("patch_embed.proj.weight")
    proj = getattr(getattr(bare, "patch_embed", None), "proj", None)
    if (
        patch is not None
        and patch.dim() == 4
        and isinstance(proj, nn.Conv2d)
        and patch.shape[1:] != proj.weight.shape[1:]
    ):  # timm would resample or adapt it, and give a network that nobody trained
        raise ModelError(
            f"{path} does not fit {name}: `patch_embed.proj.weight` is {list(patch.shape)} in the "
            f"file and {list(proj.weight.shape)} in the model",
            hint="choose the architecture of this patch size, or `auto`",
        )
    overlay = {**cfg, "state_dict": tensors, "num_classes": args["num_classes"]}
    try:
        model = create(name, args, pretrained=True, pretrained_cfg_overlay=overlay)
    except ModelError:
        raise
    except (RuntimeError, KeyError, AttributeError, IndexError) as err:
        raise _mismatch(err, str(path), name) from err
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
    return model


def _published(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of a name; ModelError with the nearest names if unknown."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
        raise ModelError(
            f"timm has no model named {name!r}",
            hint=f"near: {', '.join(near)}" if near else "`timm.list_models('vit*')` lists them",
        )
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if name != base and name not in tagged:
        raise ModelError(
            f"timm has no weights tagged {name.partition('.')[2]!r} for {base}",
            hint=f"there are: {', '.join(tagged[:6])}" if tagged else "leave the tag out",
        )
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def _outputs(name: str, tensors: dict[str, Tensor], cfg: dict[str, Any], asked: int | None) -> int:
    """Outputs of the classifier: the checkpoint's; a different wish is an error."""
    named = cfg.get("classifier") or "head"
    first = named if isinstance(named, str) else named[0]
    keys = (f"{first}.weight", "head.weight", "head.fc.weight")
    head = next((tensors[k] for k in keys if k in tensors), None)
    outputs = int(head.shape[0]) if head is not None else int(cfg.get("num_classes") or 0)
    if outputs == 0:
        raise ModelError(
            f"the weights of {name} have no classifier, and neurons are found by a class's "
            "probability",
            hint="use weights fine-tuned for classification",
        )
    if asked is not None and asked != outputs:
        raise ModelError(
            f"`num_classes` is {asked}, and the classifier of {name} has {outputs} outputs",
            hint="leave `--num-classes` out; fine-tune first to get another head",
        )
    return outputs


def _attention_heads(model: nn.Module) -> int:
    return int(model.blocks[0].attn.num_heads)  # type: ignore[union-attr,index,arg-type]


def _checked_size(size: ImageSize | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(side < 1 for side in pair):
        raise ModelError(
            f"`img_size` must be one or two positive numbers of pixels, got {size}",
            hint="224, or 192 256 for height and width",
        )
    return pair  # type: ignore[return-value]


_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from "
    r"checkpoint, the shape in current model is torch\.Size\((\[.*?\])\)"
)


def _mismatch(err: Exception, file: str, name: str) -> ModelError:
    """torch's list of differences, shortened: the first tensors of each kind."""
    text = str(err)
    parts = []
    sizes = _SIZES.findall(text)
    if sizes:
        first = "; ".join(f"`{k}` is {a} in the file and {b} in the model" for k, a, b in sizes[:3])
        parts.append(f"{len(sizes)} of other shapes: {first}")
    for word, start in (("missing", "Missing key"), ("unexpected", "Unexpected key")):
        line = next((p for p in text.splitlines() if p.strip().startswith(start)), "")
        keys = re.findall(r'"([^"]+)"', line)
        if keys:
            parts.append(f"{len(keys)} {word}: {', '.join(f'`{k}`' for k in keys[:3])}")
    if not parts:
        lines = text.strip().splitlines() or [""]
        parts.append(f"{type(err).__name__}: {lines[0][:160]}")
    return ModelError(
        f"{file} does not fit {name}; " + "; ".join(parts),
        hint="check the model name; `auto` builds plain vision transformers from the file itself",
    )


__all__ = [
    "AUTO",
    "Loaded",
    "build",
    "classifiers",
    "create",
    "load",
    "load_model",
    "model_info",
    "weights_sha256",
]

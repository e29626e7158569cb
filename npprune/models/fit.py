"""Whether a file's tensors are those of an architecture: what is missing, left over or resampled.

timm resamples position embeddings and drops layers in silence; here both are said, or refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.errors import ModelError, setting
from npprune.models.create import create
from npprune.models.foreign import UnknownGrid, by, infer, projection, with_timm_scales
from npprune.models.layouts import foreign_layout

TRANSLATED = ("mask_token", "register_tokens")
"""Names of DINOv2 that timm's filter drops (of masked pretraining alone) or renames."""

_TRAINING = re.compile(r"optim|sched|scaler|criterion|loss")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def outputs(
    name: str,
    tensors: dict[str, Tensor],
    cfg: dict[str, Any],
    asked: int | None,
    beside: dict[str, Tensor],
) -> int:
    """Outputs of the classifier: the checkpoint's; a different wish is an error.

    Args:
        name: the network, for messages.
        tensors: the network's weights.
        cfg: timm's `pretrained_cfg`: what the classifier is called.
        asked: the wish; 0: a backbone, whatever the checkpoint has.
        beside: the file's other tensors, among which there must be no classifier.
    """
    named = cfg.get("classifier") or "head"
    first = named if isinstance(named, str) else named[0]
    if asked == 0:
        return 0
    keys = (f"{first}.weight", "head.weight", "head.fc.weight")
    head = next((tensors[k] for k in keys if k in tensors), None)
    found = int(head.shape[0]) if head is not None else int(cfg.get("num_classes") or 0)
    width = next(
        (tensors[k].shape[0] for k in ("norm.weight", "fc_norm.weight") if k in tensors), 0
    )
    _check_beside(head, width, beside)
    parts = sorted(k for k in tensors if re.match(rf"{re.escape(first)}\.\d+\.", k))
    if head is None and parts:
        raise ModelError(
            f"the classifier of {name} is a sequence of layers, where one linear layer is read: "
            + ", ".join(f"`{k}` {list(tensors[k].shape)}" for k in parts[:4]),
            hint=f"if all but one do nothing at inference (dropout), save that one's tensors as "
            f"`{first}.weight` and `{first}.bias`; {setting('model.num_classes', 0)} leaves it out",
        )
    if found == 0 and asked is not None:
        raise ModelError(
            f"`num_classes` is {asked}, and the weights of {name} have no classifier",
            hint=f"leave {setting('model.num_classes')} out: what counts are its features; or "
            "fine-tune first",
        )
    if asked is not None and asked != found:
        raise ModelError(
            f"`num_classes` is {asked}, and the classifier of {name} has {found} outputs",
            hint=f"leave {setting('model.num_classes')} out; fine-tune first to get another head",
        )
    return found


_PROJECTIONS = re.compile(
    r"(?:.*\.)?(?:visual\.(?:proj|head\.proj\.weight)|text_projection)$|proj$"
)
_CLIP = re.compile(r".*_(?:clip|pe_core)_")


def refuse_projection(name: str, cfg: dict[str, Any], tensors: dict[str, Tensor] | None) -> None:
    """ModelError where an image tower's projection would be taken for a classifier.

    Args:
        name: timm's, or empty.
        cfg: timm's `pretrained_cfg` of that name.
        tensors: of a file; None for timm's own weights.
    """
    tag = name.partition(".")[2] or str(cfg.get("tag") or "")
    if tensors is None:
        if _CLIP.match(name) and "ft_" not in tag and "_in1k" not in tag:
            raise projection(f"the last layer of {name} ({tag or 'its published weights'})")
        return
    found = next((k for k in tensors if _PROJECTIONS.match(k)), None)
    if found is not None:
        raise projection(f"the file's `{found}` {list(tensors[found].shape)}")
    bias = tensors.get("head.bias")
    if _CLIP.match(name) and "head.weight" in tensors and (bias is None or not bias.any()):
        raise projection("the file's `head`, which has no bias,")


def without_head(tensors: dict[str, Tensor], cfg: dict[str, Any]) -> dict[str, Tensor]:
    """A backbone's tensors: those of a file without classifier and projection."""
    named = cfg.get("classifier") or "head"
    heads = tuple(f"{h}." for h in ([named] if isinstance(named, str) else named))
    return {
        k: v
        for k, v in tensors.items()
        if not k.startswith((*heads, "head.", "head_dist.")) and not _PROJECTIONS.match(k)
    }


def _check_beside(head: Tensor | None, width: int, beside: dict[str, Tensor]) -> None:
    """ModelError where a linear layer beside the network takes what the network puts out."""
    size = int(head.shape[0]) if head is not None else width
    for name, tensor in beside.items():
        linear = name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[1] == size
        if linear and not _TRAINING.search(name):
            raise ModelError(
                f"besides the network, the file has the layer `{name}` {list(tensor.shape)}, which "
                f"can take the network's {size} outputs: without it, the classes may be others",
                hint="save the network's own state dict; if the layer is its classifier, under "
                "the names `head.weight` and `head.bias`; "
                f"{setting('model.num_classes', 0)} takes the network for its features",
            )


def check_patches(
    model: nn.Module, tensors: dict[str, Tensor], name: str, path: Path, hint: Callable[[], str]
) -> None:
    """ModelError where timm would resample or adapt the patch embedding, and give a network
    that nobody trained."""
    patch = tensors.get("patch_embed.proj.weight")
    proj = getattr(getattr(model, "patch_embed", None), "proj", None)
    if patch is None or patch.dim() != 4 or not isinstance(proj, nn.Conv2d):
        return
    if patch.shape[1:] != proj.weight.shape[1:]:
        raise ModelError(
            f"{path} does not fit {name}: `patch_embed.proj.weight` is {list(patch.shape)} in the "
            f"file and {list(proj.weight.shape)} in the model",
            hint=hint(),
        )


def own_grid(
    model: nn.Module, tensors: dict[str, Tensor], name: str, path: Path
) -> tuple[dict[str, Any], list[str]]:
    """Which grid the positions of a named network's file are resampled from.

    timm takes the grid of its published weights where the number agrees, else a square. A file
    with just as many positions as the network is taken as it is.

    Args:
        model: the network without the weights.
        tensors: the file's.
        name: of the network, and `path` of the file, for messages.
        path: see above.

    Returns:
        entries for timm's `pretrained_cfg`, and notes.

    Raises:
        ModelError: resampling is needed, and the file's grid cannot be told.
    """
    there, here = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    patch: Any = getattr(model, "patch_embed", None)
    grid = getattr(patch, "grid_size", None)
    if there is None or here is None or grid is None or there.dim() != 3 or here.dim() != 3:
        return {}, []
    patches = there.shape[1] - (here.shape[1] - grid[0] * grid[1])
    cfg: Any = model.pretrained_cfg
    channels, *size = cfg["input_size"]
    published = size[0] // patch.patch_size[0], size[1] // patch.patch_size[1]
    if patches == grid[0] * grid[1]:
        if grid in (published, (math.isqrt(patches),) * 2):
            return {}, []
        said = f"{patches} patches: read as {by(grid)}, as the image size says"
        return {"input_size": (channels, *patch.img_size)}, [said]
    source = published
    if source[0] * source[1] != patches:
        source = (math.isqrt(max(patches, 0)),) * 2
    if source[0] * source[1] != patches or patches < 1:
        raise ModelError(
            f"{path} does not fit {name}: `pos_embed` is {list(there.shape)} in the file and "
            f"{list(here.shape)} in the model, and {patches} patches are no square to resample",
            hint="give the height and width it was trained at: "
            f"{setting('model.img_size', 'HxW')}; or check the name",
        )
    trained = source[0] * patch.patch_size[0], source[1] * patch.patch_size[1]
    said = (
        f"position embeddings resampled from {by(source)} to {by(grid)} patches; image "
        f"size {by(trained)} keeps them as they were trained"
    )
    return {}, [said]


def unknown_to(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """The tensors that have no place in the network that `auto` builds."""
    known = {*model.state_dict(), *TRANSLATED}
    return [name for name in tensors if name not in known]


def unknown_layers(path: Path, tensors: dict[str, Tensor], unknown: list[str]) -> ModelError:
    first = ", ".join(f"`{k}` {list(tensors[k].shape)}" for k in unknown[:3])
    known = foreign_layout(unknown)
    return ModelError(
        f"{path} has {len(unknown)} tensors that a plain vision transformer lacks: {first}; "
        "without them it would give other outputs",
        hint=f"the file is {known[0]}: {known[1]}"
        if known
        else "save the state dict without them if they play no part in classifying; a network "
        "that needs them is loaded by its timm name, if timm has it",
    )


def unused(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """A note of the file's tensors that came into the network neither by name nor by value."""
    state = model.state_dict()
    rest = [name for name in tensors if name not in state]
    if not rest:
        return []
    values: dict[int, list[Tensor]] = {}
    for tensor in state.values():
        values.setdefault(tensor.numel(), []).append(tensor.flatten())
    lost = [
        name
        for name in rest
        if not any(
            torch.equal(tensors[name].flatten(), v) for v in values.get(tensors[name].numel(), [])
        )
    ]
    if not lost:
        return []
    more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
    names = ", ".join(f"`{name}`" for name in lost[:6]) + more
    if len(rest) == len(lost) and all(name in tensors for name in state):
        return [f"not used: {names}, for which the network has no place"]
    return [f"timm translated the names; merged, resampled or left out by it: {names}"]


def cut_short(tensors: dict[str, Tensor]) -> str:
    """The next step where `auto` read an architecture, and tensors are missing."""
    return "the file is cut short, or its network is none of the plain ones that `auto` builds"


def other_architecture(tensors: dict[str, Tensor]) -> str:
    """The next step where a file does not fit the name: `auto` only if it reads the file."""
    known = foreign_layout(tensors)
    if known:
        return f"the file is {known[0]}: {known[1]}"
    reads = "check the model name; `auto` builds the architecture from the file itself"
    try:  # any number of heads: it does not change the names
        found = infer(tensors, num_heads=1, jax=False, wrapped=False, activation="gelu")
    except UnknownGrid as err:
        return f"{reads}: {err.hint}"
    except ModelError:
        first = ", ".join(f"`{name}`" for name in list(tensors)[:3])
        return f"check which architecture the file was written by: its first tensors are {first}"
    bare = create(found.name, found.args)
    if unknown_to(bare, with_timm_scales(tensors)):
        return "check the model name: the file has layers that other architectures lack"
    return reads


_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from "
    r"checkpoint, the shape in current model is torch\.Size\((\[.*?\])\)"
)


def mismatch(err: Exception, file: str, name: str, hint: str) -> ModelError:
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
    return ModelError(f"{file} does not fit {name}; " + "; ".join(parts), hint=hint)

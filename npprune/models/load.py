"""Networks by timm name, from a checkpoint file, or rebuilt from a pruned checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from npprune.errors import ModelError, setting
from npprune.models.beit import infer_beit, is_beit
from npprune.models.blocks import blocks_of
from npprune.models.create import check_fits, checked_args, create, current_name, published
from npprune.models.fit import (
    check_patches,
    cut_short,
    mismatch,
    other_architecture,
    outputs,
    own_grid,
    refuse_projection,
    shapes_of,
    unknown_layers,
    unknown_to,
    unused,
    without_head,
)
from npprune.models.folders import Folder, open_folder, translate
from npprune.models.foreign import (
    about_features,
    by,
    infer,
    jax_to_timm,
    refuse_representation_layer,
    with_timm_scales,
)
from npprune.models.hub import fetch
from npprune.models.info import model_info, weights_sha256
from npprune.models.tokens import apply_tokens
from npprune.models.translations import translated
from npprune.models.uneven import PRUNABLE, fit_to
from npprune.models.unwrap import Shapes
from npprune.models.view import classifiers, make_view
from npprune.models.weights import read_weights
from npprune.models.where import AUTO, Described, find_folder
from npprune.records import CheckpointConfig, ClassInfo, ModelInfo, ModelSource
from npprune.words import Activation, Pooling

ImageSize = int | Sequence[int]

_SMALL = 2**20  # elements of a tensor


@dataclass
class Loaded:
    """A network in evaluation mode on the CPU, what it is, and what was assumed in loading it."""

    model: nn.Module
    info: ModelInfo
    notes: list[str] = field(default_factory=list)
    classes: list[ClassInfo] = field(default_factory=list)  # their names, where a folder has them


@dataclass(frozen=True)
class Wishes:
    """What was asked for beside the name and the weights; None: as name and weights say."""

    num_classes: int | None = None
    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    activation: Activation | None = None
    pooling: Pooling | None = None

    @property
    def args(self) -> dict[str, Any]:
        """Those that are arguments of timm's architectures."""
        act = self.activation.replace("-", "_") if self.activation else None
        given = {"img_size": self.img_size, "num_heads": self.num_heads, "act_layer": act}
        given |= {"global_pool": self.pooling}
        return {name: value for name, value in given.items() if value is not None}


def load(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pooling: Pooling | None = None,
) -> Loaded:
    """A vision transformer with its weights.

    Args:
        name: a timm name, with or without a tag (`vit_tiny_patch16_224.augreg_in21k_ft_in1k`);
            a folder of `transformers` or timm, or such a one's name on the hub
            (`google/vit-base-patch16-224`); or `auto`: the architecture is read off the
            checkpoint.
        checkpoint: a safetensors, PyTorch or JAX `.npz` file, or such a folder; None takes timm's
            published weights from the hub.
        num_classes: outputs of the head; by default as many as the checkpoint has; 0: no head.
        img_size: input side in pixels (or height and width); position embeddings are resampled.
        num_heads: attention heads, where neither name nor file says.
        activation: of the hidden units, likewise.
        pooling: what the classifier reads, likewise.

    Raises:
        ModelError: unknown or unsupported architecture, unreadable or mismatching checkpoint,
            weights that cannot be had.
    """
    size = _checked_size(img_size)
    wishes = Wishes(num_classes, size, num_heads, activation, pooling)
    name, described = find_folder(name, checkpoint)
    if described is not None:
        return _load_folder(name, described, wishes)
    if name == AUTO:
        if checkpoint is None:
            raise ModelError(
                "model `auto` is read off a checkpoint, and none was given",
                hint=f"add {setting('model.checkpoint', 'FILE')}, or give a timm name",
            )
        return _load_auto(Path(checkpoint), wishes)
    return _load_named(name, checkpoint, num_classes, wishes.args)


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: ImageSize | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pooling: Pooling | None = None,
) -> nn.Module:
    """As `load`, the network alone; what was assumed in loading it is warned of."""
    loaded = load(
        name,
        checkpoint=checkpoint,
        num_classes=num_classes,
        img_size=img_size,
        num_heads=num_heads,
        activation=activation,
        pooling=pooling,
    )
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return loaded.model


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
    name, given = config.source.architecture, config.source.model_args
    args = checked_args({**given, "num_classes": config.num_classes}, "config.json")
    _same_sizes(check_fits(name, args, "config.json"), tensors, name)
    model = create(name, args)
    fit_to(model, tensors, heads=config.heads)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as err:
        hint = "the checkpoint's two files do not belong together"
        raise mismatch(err, "the checkpoint", config.source.architecture, hint) from err
    view = make_view(model)
    if list(view.widths) != config.widths:
        raise ModelError(
            f"config.json says hidden widths {config.widths}, and the tensors have "
            f"{list(view.widths)}",
            hint="the checkpoint's two files do not belong together",
        )
    return apply_tokens(model, config.merged, config.last_for_read).eval()


def _same_sizes(dense: Shapes, tensors: dict[str, Tensor], name: str) -> None:
    """ModelError where a tensor that pruning never changes has other sizes than described.

    Small ones that are missing are left to loading, which names them all.
    """
    for key, shape in dense.items():
        there = tensors.get(key)
        found = None if there is None else tuple(there.shape)
        if found is None and math.prod(shape) < _SMALL:
            continue
        prunable = PRUNABLE.match(key.rpartition(".")[0]) or PRUNABLE.match(key)
        if not prunable and found != shape:
            raise ModelError(
                f"`{key}` is {'missing' if found is None else list(found)} in the file and "
                f"{list(shape)} in the network that config.json describes ({name})",
                hint="the checkpoint's two files do not belong together",
            )


def timm_code() -> Path:
    """The file that teaches timm a pruned network."""
    return Path(__file__).with_name("npprune_timm.py")


def load_timm_folder(folder: Path) -> nn.Module:
    """The network that timm reads from a folder in its own format (`local-dir:`), in evaluation
    mode, leaving the global random state as it was. From now on timm knows `npprune_vit`."""
    import npprune.models.npprune_timm  # noqa: F401

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _load_folder(name: str, described: Described, wishes: Wishes) -> Loaded:
    """A network with the description beside its weights; a timm name must agree with it."""
    folder = open_folder(described.path)
    if folder.kind == "timm":
        base = folder.architecture.partition(".")[0]
        if name != AUTO and name.partition(".")[0] != base:
            raise ModelError(
                f"`{folder.path}` is a network of architecture {base}, and MODEL is {name}",
                hint="give `auto`, or the folder itself as the model",
            )
        args = folder.model_args | wishes.args
        asked = wishes.num_classes
        if asked is None and folder.config.get("num_classes") == 0:
            asked = 0
        loaded = _load_named(base, folder.weights, asked, args, folder.cfg)
        loaded.info.source.checkpoint = described.given
    else:
        loaded = _load_transformers(name, folder, wishes, described.given)
    loaded.notes = described.notes + loaded.notes
    loaded.classes = folder.classes(loaded.info.num_classes)
    return loaded


def _load_transformers(name: str, folder: Folder, wishes: Wishes, given: str) -> Loaded:
    found = translate(folder, wishes.img_size, headless=wishes.num_classes == 0)
    own = {k: found.args[k] for k in ("num_classes", "num_heads")}
    own |= {"activation": found.args.get("act_layer", "").replace("_", "-"), "pooling": None}
    for what, said in own.items():
        asked = getattr(wishes, what)
        if asked not in (None, said):
            raise ModelError(
                f"`{what}` is {asked}, and `{folder.path}` has {said or 'its own'}",
                hint=f"leave {setting(f'model.{what}')} out: the folder says it",
            )
    if name != AUTO:
        wanted = shapes_of(create(name, {"num_classes": found.args["num_classes"]}))
        sizes = {k: tuple(v.shape) for k, v in found.tensors.items()}
        other = next((k for k in wanted if wanted[k] != sizes.get(k) and k != "pos_embed"), None)
        if other is not None:
            raise ModelError(
                f"`{folder.path}` is not the network {name}: `{other}` is "
                f"{list(sizes.get(other, ())) or 'missing'} there and {list(wanted[other])} in it",
                hint="give `auto`, or the folder itself as the model",
            )
    side = found.args["in_chans"], *found.args["img_size"]
    cfg = {**folder.cfg, "input_size": side, "num_classes": found.args["num_classes"]}
    check_fits(found.name, found.args, str(folder.path))
    model = create(found.name, found.args, pretrained_cfg_overlay=cfg)
    make_view(model)
    try:
        model.load_state_dict(found.tensors, strict=True)
    except RuntimeError as err:
        hint = "the folder's files do not belong together, or are cut short"
        raise mismatch(err, str(folder.path), str(folder.config["architectures"][0]), hint) from err
    source = ModelSource(found.name, found.args, given)
    return Loaded(model, model_info(model, source), found.notes)


def _load_named(
    name: str,
    checkpoint: str | Path | None,
    num_classes: int | None,
    args: dict[str, Any],
    said: dict[str, Any] | None = None,
) -> Loaded:
    """`said`: what a folder says in timm's `pretrained_cfg`."""
    name, notes = current_name(name)
    cfg = published(name)
    if checkpoint is None:
        if num_classes != 0:
            refuse_projection(name, cfg, None)
        make_view(create(name, args))  # an unsupported network is refused before a download
        path = fetch(name, cfg)
    else:
        path = Path(checkpoint)
    weights = read_weights(path, like=lambda: shapes_of(create(name, args)))
    tensors = weights.tensors
    heads = None
    if weights.layout == "jax":
        tensors, heads = jax_to_timm(tensors)
    tensors, said_of_names = translated(tensors)
    refuse_representation_layer(tensors)
    if num_classes == 0:
        tensors = without_head(tensors, cfg)
    refuse_projection(name, cfg, tensors)
    args["num_classes"] = outputs(name, tensors, cfg, num_classes, weights.beside)
    if args.keys() - {"num_classes"}:
        check_fits(name, args, str(path))
    bare = create(name, args, pretrained_cfg_overlay=said)
    make_view(bare)
    grid: dict[str, Any] = {}
    check_patches(bare, tensors, name, path, lambda: other_architecture(tensors))
    if checkpoint is not None:
        grid, resampled = own_grid(bare, tensors, name, path)
        notes += resampled
    overlay = {**(said or {}), **grid}
    model = _with_weights(bare, name, args, tensors, overlay, path, other_architecture)
    if heads is not None and _attention_heads(model) != heads:
        raise ModelError(
            f"{path} has {heads} attention heads, and {name} has {_attention_heads(model)}",
            hint=f"use the model name `auto`, or {setting('model.num_heads', heads)}",
        )
    source = ModelSource(name, args, str(checkpoint) if checkpoint is not None else None)
    notes += about_features(args["num_classes"])
    notes += weights.notes + said_of_names + unused(model, tensors)
    return Loaded(model, model_info(model, source), notes)


def _load_auto(path: Path, wishes: Wishes) -> Loaded:
    weights = read_weights(path)
    tensors, heads, size = weights.tensors, wishes.num_heads, wishes.img_size
    if weights.layout == "jax":
        tensors, in_file = jax_to_timm(tensors)
        heads = heads or in_file
        if heads != in_file:
            raise ModelError(
                f"`num_heads` is {heads}, and {path} has {in_file} attention heads",
                hint=f"leave {setting('model.num_heads')} out: the file says it",
            )
    tensors, said_of_names = translated(tensors)
    refuse_representation_layer(tensors)
    if wishes.num_classes == 0:
        tensors = without_head(tensors, {})
    refuse_projection("", {}, tensors)
    torchvision = any("torchvision" in note for note in said_of_names)
    if is_beit(tensors):
        found, tensors = infer_beit(tensors, heads, size)
    else:
        found = infer(
            tensors,
            num_heads=heads,
            jax=weights.layout == "jax",
            wrapped=weights.wrapper is not None or torchvision,
            img_size=size,
            activation=wishes.activation,
            pooling=wishes.pooling,
        )
    args = dict(found.args)
    cfg = {
        **found.preprocessing,
        "input_size": (args["in_chans"], *args["img_size"]),
        "interpolation": "bilinear" if torchvision else "bicubic",
        "crop_pct": 0.875 if torchvision else 0.9,
        "crop_mode": "center",
    }
    args["num_classes"] = outputs(str(path), tensors, {}, wishes.num_classes, weights.beside)
    if size is not None:
        args["img_size"] = list(size)
    if not is_beit(tensors):
        tensors = with_timm_scales(tensors)
    check_fits(found.name, args, str(path))
    bare = create(found.name, args)
    make_view(bare)
    if unknown := unknown_to(bare, tensors):
        raise unknown_layers(path, tensors, unknown)
    model = _with_weights(bare, found.name, args, tensors, cfg, path, cut_short)
    source = ModelSource(found.name, args, str(path))
    notes = weights.notes + said_of_names + found.notes
    notes += about_features(args["num_classes"]) + unused(model, tensors)
    there, here = tensors.get("pos_embed"), getattr(model, "pos_embed", None)
    if there is not None and here is not None and there.shape != here.shape:
        notes.append(
            f"position embeddings resampled for {by(args['img_size'])} pixels, as was asked for"
        )
    return Loaded(model, model_info(model, source), notes)


def _with_weights(
    bare: nn.Module,
    name: str,
    args: dict[str, Any],
    tensors: dict[str, Tensor],
    cfg: dict[str, Any],
    path: Path,
    next_step: Callable[[dict[str, Tensor]], str],
) -> nn.Module:
    """The architecture with these weights, through timm's own checkpoint filter."""
    # No `first_conv`: timm would adapt or drop the patch embedding of other inputs than RGB.
    overlay = {**cfg, "state_dict": tensors, "num_classes": args["num_classes"]}
    overlay["first_conv"] = None
    try:
        if hasattr(getattr(bare, "patch_embed", None), "backbone"):
            return _hybrid(name, args, tensors, cfg)
        model = create(name, args, pretrained=True, pretrained_cfg_overlay=overlay)
    except ModelError:
        raise
    except (RuntimeError, KeyError, AttributeError, IndexError) as err:
        raise mismatch(err, str(path), name, next_step(tensors)) from err
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
    return model


def _hybrid(
    name: str, args: dict[str, Any], tensors: dict[str, Tensor], cfg: dict[str, Any]
) -> nn.Module:
    """A network with a convolutional stem, whose weights timm would fetch apart from the file's."""
    from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

    model: Any = create(name, args, pretrained_cfg_overlay=cfg)
    model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=True)
    return model  # type: ignore[no-any-return]


def _attention_heads(model: nn.Module) -> int:
    return int(blocks_of(model)[0].attn.num_heads)


def _checked_size(size: ImageSize | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ModelError(
            f"`img_size` must be one or two positive numbers of pixels, got {size}",
            hint="`--img-size 224`, or `192x256` for height and width (`(192, 256)` in Python)",
        )
    return pair  # type: ignore[return-value]


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

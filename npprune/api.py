"""The Python API: usable in a notebook, without a recipe or a file.

import npprune
model = npprune.load_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
paths = npprune.discover_paths(model, images, labels, topk=5)
plan = npprune.Plan(keep=..., widths=...)
smaller = npprune.apply_plan(model, plan)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.attribution.methods import Method, find_paths
from npprune.core.attribution.quadrature import RuleOrAuto, default_points
from npprune.core.attribution.search import Accumulation, PathBatch
from npprune.core.view import Scope
from npprune.errors import UsageError
from npprune.models.load import build, load
from npprune.models.surgery import apply_plan as _apply_plan
from npprune.models.view import make_view
from npprune.pipeline.common.memory import halving, images_that_fit
from npprune.records import Plan
from npprune.store.checkpoints import is_checkpoint, read_checkpoint

__all__ = ["PathBatch", "Plan", "apply_plan", "discover_paths", "load_model"]

BATCH = 16  # images searched at a time


def load_model(
    name_or_path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> nn.Module:
    """A vision transformer with its weights, in evaluation mode on the CPU.

    Args:
        name_or_path: a checkpoint folder written by npprune; a timm name; or `auto`, which reads
            the architecture off `checkpoint`.
        checkpoint: a safetensors, PyTorch or JAX `.npz` file; None takes timm's published weights
            from the hub.
        num_classes: outputs of the head, by default the checkpoint's.
        img_size: input side in pixels, or (height, width); position embeddings are resampled.
        num_heads: attention heads, where neither name nor file says.

    Raises:
        ModelError: an unknown or unsupported network, or weights that do not fit it.
        StoreError: a checkpoint folder that is incomplete or was changed.
    """
    if is_checkpoint(name_or_path):
        config, tensors = read_checkpoint(name_or_path)
        return build(config, tensors)
    return load(
        str(name_or_path),
        checkpoint=checkpoint,
        num_classes=num_classes,
        img_size=img_size,
        num_heads=num_heads,
    ).model


def discover_paths(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    topk: int = 1,
    method: Method = "neuron-path",
    scope: Scope | str = "auto",
    quadrature: RuleOrAuto = "auto",
    points: int | None = None,
    accumulation: Accumulation = "sum",
    seed: int = 0,
) -> PathBatch:
    """The most influential neuron path of each image.

    Args:
        model: a plain timm vision transformer (see `load_model`), on any device.
        images: float [images, channels, height, width], preprocessed for the model.
        labels: int64 [images], one for each image, in any mixture of classes.
        topk: neurons in each block, best first.
        method: neuron-path, activation, influence-pattern, knowledge-neuron or random.
        scope: the tokens at which neurons are read: cls, patch, all, or auto (as pooled).
        quadrature: gauss-radau, mapped-radau, gauss-legendre, left-riemann (the paper's), or auto:
            the first at the class token, the second elsewhere.
        points: how many points; None, at the class token and elsewhere: 4 and 7 for gauss-radau,
            5 and 6 for mapped-radau, both 12 in block 0 elsewhere; 5 and 8 for gauss-legendre;
            20 for left-riemann, and for influence-pattern.
        accumulation: sum (the formula) or last (the paper's released program).
        seed: for the random method.

    Returns:
        `.neurons` int64 [images, blocks, topk] and `.scores` float [images], on the CPU: the
        joint attribution score of each path.

    Raises:
        UsageError: arguments that do not fit each other or the model.
        ModelError: a model that is not a plain vision transformer.

    Source: "Discovering Influential Neuron Path in Vision Transformers", ICLR 2025.
    """
    if images.dim() != 4 or len(images) == 0:
        raise UsageError(f"`images` must be [images, channels, height, width], got {images.shape}")
    if labels.shape != (len(images),):
        raise UsageError(
            f"`labels` must be [{len(images)}], one for each image, got {list(labels.shape)}"
        )
    view = make_view(model)
    parameter = next(model.parameters())
    device = parameter.device
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "topk": topk, "method": method, "scope": scope, "rule": quadrature, "points": points,
        "accumulation": accumulation, "generator": generator,
    }  # fmt: skip

    def paths(lo: int, hi: int) -> PathBatch:
        return find_paths(
            view, images[lo:hi].to(parameter), labels[lo:hi].to(device).long(), **options
        )

    try:
        tokens = view.scope if scope == "auto" else scope
        m = points or default_points(quadrature, tokens)
        fit = images_that_fit(view, images[:1].to(parameter), m, None, device)
        parts, _ = halving(paths, len(images), min(BATCH, fit))
    except ValueError as err:
        raise UsageError(str(err)) from err
    return PathBatch(
        torch.cat([p.neurons.cpu() for p in parts]), torch.cat([p.scores.cpu() for p in parts])
    )


def apply_plan(model: nn.Module, plan: Plan, *, force: bool = False) -> nn.Module:
    """A copy of the network in which only the plan's neurons remain.

    Args:
        model: the dense network.
        plan: the kept neurons of every block.
        force: apply the plan although it was made for other weights of the same widths.

    Raises:
        ModelError: the plan was made for another network, or the network cannot be pruned.
    """
    return _apply_plan(model, plan, force=force)

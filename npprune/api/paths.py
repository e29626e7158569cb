"""The paths of a few images at once, in memory: the mathematics with plain arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npprune.api.arguments import SEEDS, check_model, number, whole
from npprune.core.attribution.methods import find_paths
from npprune.core.attribution.quadrature import Integral
from npprune.core.attribution.search import PathBatch
from npprune.core.view import VitView, frozen
from npprune.errors import DataError, ModelError, UsageError
from npprune.models.view import make_view, outputs_count
from npprune.pipeline.common.memory import halving, images_that_fit
from npprune.words import METHODS, Accumulation, Method, RuleOrAuto, ScopeOrAuto, check_word

BATCH = 16  # images searched at a time
POINTS = 256  # at most


def discover_paths(
    model: nn.Module,
    images: Any,
    labels: Any,
    *,
    topk: int = 1,
    method: Method = "neuron-path",
    scope: ScopeOrAuto = "auto",
    quadrature: RuleOrAuto = "auto",
    points: int | None = None,
    accumulation: Accumulation = "sum",
    seed: int = 0,
) -> PathBatch:
    """The most influential neuron path of each image.

    Its many arguments are the settings of `npprune discover`, by their names.

    Args:
        model: a plain timm vision transformer (see `load_model`), on any device, of any precision
            and in any mode; it is left as it was.
        images: float [images, channels, height, width], preprocessed for the model: a tensor, an
            array, or a list of images.
        labels: whole numbers [images], one for each image, in any mixture of classes.
        topk: neurons in each block, best first.
        method: neuron-path, activation, influence-pattern, knowledge-neuron or random.
        scope: the tokens at which neurons are read: cls, patch, all, or auto (as pooled).
        quadrature: gauss-radau, mapped-radau, gauss-legendre, left-riemann (the paper's), or auto:
            the first at the class token, the second elsewhere.
        points: how many points; None: the fewest that the rule needs at these tokens (see
            `npprune.core.attribution.quadrature`).
        accumulation: sum (the formula) or last (the paper's released program).
        seed: for the random method.

    Returns:
        `.neurons` int64 [images, blocks, topk] and `.scores` float [images], on the CPU: the
        joint attribution score of each path.

    Raises:
        UsageError: arguments that do not fit each other or the model.
        DataError: an image that holds NaN or infinity.
        ModelError: a model that is not a plain vision transformer, has one output, or gives NaN or
            infinity (its weights, or an overflow of its precision).

    Source: "Discovering Influential Neuron Path in Vision Transformers", ICLR 2025.
    """
    check_word("method", method, METHODS)
    check_model(model)
    topk, points = whole("topk", topk, 1), number("points", points, 1, POINTS)
    generator = torch.Generator().manual_seed(whole("seed", seed, 0, SEEDS - 1))
    with torch.inference_mode(False):
        tensors = chain(model.parameters(), model.buffers())
        if any(t.is_inference() for t in tensors):  # these cannot be differentiated
            model = copy.deepcopy(model)
        view = make_view(model)
        integral = Integral.of(view.scope, scope, quadrature, points, accumulation)
        x = _images(images)
        outputs = outputs_count(model)
        if outputs == 0:
            raise ModelError(
                f"paths are of neurons that raise a class's probability, and "
                f"{type(model).__name__} has no classifier",
                hint="`npprune.discover` fits one on its features; or set `model.head`",
            )
        y = _labels(labels, len(x), outputs)
        find = partial(
            find_paths, view, topk=topk, method=method, integral=integral, generator=generator
        )
        with frozen(model):
            return _in_batches(find, view, x, y, integral.points)


def _in_batches(
    find: Callable[..., PathBatch], view: VitView, images: Tensor, labels: Tensor, points: int
) -> PathBatch:
    """The paths, as many images at a time as fit."""
    parameter = next(view.model.parameters())
    device = parameter.device

    def paths(lo: int, hi: int) -> PathBatch:
        return find(images=images[lo:hi].to(parameter), labels=labels[lo:hi].to(device))

    first = images[:1].to(parameter)
    _check_size(view, first)
    fit = images_that_fit(view, first, points, None, device)
    parts, _ = halving(paths, len(images), min(BATCH, fit))
    return PathBatch(
        torch.cat([p.neurons.cpu() for p in parts]), torch.cat([p.scores.cpu() for p in parts])
    )


# ---------------------------------------------------------------- arguments


def _check_size(view: VitView, image: Tensor) -> None:
    """UsageError where the network does not take an image [1, channels, height, width]."""
    try:
        with torch.no_grad():
            view.embed(image)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as err:  # timm's and PyTorch's own words
        raise UsageError(
            f"`images` of {list(image.shape[1:])} do not fit the network: {err}",
            hint="`npprune.load_model(..., img_size=PIXELS)` builds it for another size",
        ) from err


def _images(value: Any) -> Tensor:
    images = _tensor("images", value)
    if images.dim() != 4 or images.numel() == 0:
        raise UsageError(
            f"`images` must be [images, channels, height, width], at least one, got "
            f"{list(images.shape)}",
            hint="one image is `image[None]`" if images.dim() == 3 else None,
        )
    if not images.is_floating_point():
        raise UsageError(
            f"`images` must be floating-point numbers, got {_dtype(images)}",
            hint="prepare them as the network was trained: scaled to [0, 1] and normalised",
        )
    bad = (~torch.isfinite(images)).flatten(1).any(dim=1)
    if bool(bad.any()):
        raise DataError(f"image {int(bad.nonzero()[0])} holds NaN or infinity")
    return images


def _labels(value: Any, count: int, outputs: int) -> Tensor:
    labels = _tensor("labels", value)
    if labels.shape != (count,):
        raise UsageError(
            f"`labels` must be [{count}], one for each image, got {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UsageError(f"`labels` must be whole numbers, got {_dtype(labels)}")
    labels = labels.long()
    bad = labels[(labels < 0) | (labels >= outputs)]
    if len(bad):
        raise UsageError(
            f"`labels` must lie in 0..{outputs - 1}, the network's outputs, got {int(bad[0])}"
        )
    return labels


def _tensor(name: str, value: Any) -> Tensor:
    """A tensor that autograd takes, from one, an array, or a list of either."""
    try:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            value = torch.stack(list(value))
        elif not isinstance(value, Tensor):
            value = torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError) as err:
        raise UsageError(f"`{name}` must be a tensor or an array of numbers: {err}") from err
    value = value.detach()
    return value.clone() if value.is_inference() else value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")

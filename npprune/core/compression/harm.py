"""The harm of pruning, measured: nats of KL divergence from the dense network's predictions, or
the relative error of its features (`objective`).

For each block and a few options, that block alone is changed, with its compensation, and the
divergence from the dense network is averaged over a few hundred calibration images. Blocks
are independent to first order, so the table adds up; `solver.solve` spends a budget on it.

A pruned block is computed on the dense modules by a hook on `fc2` (its own output is replaced by
W_K h_K + b), so nothing is copied, and any set of blocks may be pruned at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from npprune.core.compression.compensation import compensate
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.selection import keep_sets
from npprune.core.compression.statistics import Moments
from npprune.core.view import VitView
from npprune.errors import UsageError

Option = TypeVar("Option")


@dataclass
class Replacement:
    """A pruned linear layer, e.g. a block's second: kept inputs [k], weight [d, k], bias [d].

    `whole` [d, h]: the weight of which `weight` is what stays, where the layers before give the
    inputs in another basis; None: the layer's own.
    `first`: how many tokens, the first ones, have a layer of their own, and that layer.
    """

    keep: Sequence[int]
    weight: Tensor
    bias: Tensor
    whole: Tensor | None = None
    first: tuple[int, Replacement] | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """What the layer gives for its dense inputs h [..., t, h]."""
        index = torch.as_tensor(list(self.keep), device=h.device)
        kept = h.index_select(-1, index)
        out = nn.functional.linear(kept, self.weight.to(h), self.bias.to(h))
        if self.first is None:
            return out
        tokens, own = self.first
        return torch.cat([own(h[..., :tokens, :]), out[..., tokens:, :]], -2)


@dataclass
class SmallerNorm:
    """A norm of hidden units, over those that stay alone: their mean and variance are of them."""

    norm: nn.Module
    keep: Sequence[int]

    def __call__(self, h: Tensor) -> Tensor:
        """What it gives for units before the norm h [..., h]: kept ones normed, the others 0."""
        norm: Any = self.norm
        index = torch.as_tensor(list(self.keep), device=h.device)
        bias = getattr(norm, "bias", None)
        kept, k = h.index_select(-1, index), (len(index),)
        weight = None if norm.weight is None else norm.weight[index]
        if isinstance(norm, nn.LayerNorm):
            shift = None if bias is None else bias[index]
            kept = nn.functional.layer_norm(kept, k, weight, shift, norm.eps)
        else:
            kept = nn.functional.rms_norm(kept, k, weight, norm.eps)
        return torch.zeros_like(h).index_copy_(-1, index, kept.to(h.dtype))


StandIn = Replacement | SmallerNorm


def candidates_for(
    view: VitView,
    moments: Callable[[int], Moments],
    scores: Sequence[Tensor],
    widths: Sequence[Sequence[int]],
    *,
    protected: Sequence[Sequence[int]] | None = None,
    shrinkage: float = SHRINKAGE,
) -> Iterator[dict[int, dict[nn.Module, StandIn]]]:
    """The pruned second layer of every block at each of its `widths`: best scores, least squares.
    One block after the other, made when it is asked for: those of all take much memory.

    `moments(l)` are block l's; `scores` [h] per block, higher = keep; `protected` stay first.
    Second layers are held in the model's precision. Where a norm stands before one, it is that of
    the kept units, and the refit that of the whole norm's moments.
    """
    fixed = protected if protected is not None else [()] * len(scores)
    for l, row in enumerate(widths):
        fc2, m = view.fc2(l), moments(l) if row else None
        made: dict[int, dict[nn.Module, StandIn]] = {}
        for width in row:
            assert m is not None
            keep = keep_sets([scores[l]], [width], [fixed[l]])[0][0]
            made[width] = {fc2: least_squares(fc2, m, keep, shrinkage)}
            if (norm := view.norm(l)) is not None:
                made[width][norm] = SmallerNorm(norm, keep)
        yield made


def least_squares(
    fc2: nn.Linear, moments: Moments, keep: Sequence[int], shrinkage: float = SHRINKAGE
) -> Replacement:
    """A second layer for the kept inputs, refitted by itself, in the model's precision."""
    found = compensate(moments, fc2.weight, fc2.bias, keep, shrinkage=shrinkage, diagnose=False)
    return Replacement(keep, found.weight.to(fc2.weight), found.bias.to(fc2.weight))


@contextmanager
def replaced(view: VitView, replacements: Mapping[int, Replacement]) -> Iterator[None]:
    """For the duration, `fc2` of each named block is the one given; a norm before it is that of
    the kept units."""
    layers: dict[nn.Module, StandIn] = {view.fc2(l): r for l, r in replacements.items()}
    for l, r in replacements.items():
        if (norm := view.norm(l)) is not None:
            layers[norm] = SmallerNorm(norm, r.keep)
    with layers_replaced(layers):
        yield


@contextmanager
def layers_replaced(replacements: Mapping[Any, StandIn]) -> Iterator[None]:
    """For the duration, each of these layers gives what its replacement does: W_K x_K + b."""

    def hook(r: StandIn) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, inputs, output: r(inputs[0])

    handles = [layer.register_forward_hook(hook(r)) for layer, r in replacements.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def predict(
    view: VitView,
    batches: Iterable[Tensor],
    replacements: Mapping[int, Replacement] | None = None,
) -> Tensor:
    """Logits or features of images in batches [b, 3, H, W], with some blocks replaced."""
    out = []
    with replaced(view, replacements or {}):
        for images in batches:
            x = view.embed(images)
            for l in range(len(view.widths)):
                x = view.block(l, x)
            out.append(view.head(x))
    return torch.cat(out)


@torch.no_grad()
def measure_harm(
    view: VitView,
    batches: Sequence[Tensor],
    candidates: Iterable[Mapping[Option, Mapping[Any, StandIn]]],
    *,
    on_block: Callable[[int], None] | None = None,
) -> list[dict[Option, float]]:
    """The divergence from dense for each block and option, that block alone changed.

    Args:
        batches: images, held in memory; a hundred or two are enough.
        candidates: per block, option -> the layers that stand in for the block's own; each block's
            are taken when its turn comes.
        on_block: called with the number of blocks done.

    Returns: per block, option -> its mean over the images.
    """
    depth = len(view.widths)
    if isinstance(candidates, Sequence) and len(candidates) != depth:
        raise UsageError(f"candidates must be given for {depth} blocks, got {len(candidates)}")
    dense = predict(view, batches)
    streams = [view.embed(images) for images in batches]
    table: list[dict[Option, float]] = []
    for l, options in zip(range(depth), candidates, strict=True):
        streams = [view.entered(l, x) for x in streams]
        attention = [view.attention_output(l, x) for x in streams]
        row = {}
        for option, layers in options.items():
            outputs = []
            for x, a in zip(streams, attention, strict=True):
                with layers_replaced(layers):
                    own = set(layers) <= {view.fc2(l), view.norm(l)}
                    changed = a if own else view.attention_output(l, x)
                    y = view.tail(l, x, changed)
                for later in range(l + 1, depth):
                    y = view.block(later, y)
                outputs.append(view.head(y))
            divergence = view.objective.divergence(dense, torch.cat(outputs))
            row[option] = float(divergence.mean().clamp_min(0))
        table.append(row)
        if on_block is not None:
            on_block(l + 1)
        streams = [view.tail(l, x, a) for x, a in zip(streams, attention, strict=True)]
    return table

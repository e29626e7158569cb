"""Compensation in sequence: each block refitted on the network pruned so far.

Block by block, the calibration images run through what is already pruned. The block's full hidden
layer is recollected there (h, its moments), neurons are chosen or given, and `fc2` is refitted on
the inputs that it will really see. The target of the regression is

    y = W h + b + beta (x - x')        x  the dense network's stream after the block
                                       x' the pruned network's, with this block unpruned

With beta = 0 the block gives what the dense `fc2` gives on the same input. With beta = 1 it also
makes up for all of the error that the earlier blocks have left in the stream, as far as the kept
units can explain it: more than is good, since part of it is noise of the calibration images.

Source: layer-wise reconstruction on the pruned network's own inputs as in SparseGPT (Frantar and
Alistarh, 2023) and He et al. (ICCV 2017), who regress on the dense network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from npprune.core.compensation import Compensated, Cross, compensate
from npprune.core.elimination import SHRINKAGE
from npprune.core.harm import Replacement, layers_replaced, replaced
from npprune.core.statistics import Moments
from npprune.core.view import VitView

BETA = 0.5
"""Share of the earlier blocks' error in the target; between the two ends is best."""

Choose = Callable[[int, Moments], Sequence[int]]
"""The neurons of block l that stay, given its moments on the network pruned so far."""


@torch.no_grad()
def compensate_in_sequence(
    view: VitView,
    batches: Sequence[Tensor],
    keep: Sequence[Sequence[int]] | Choose,
    *,
    beta: float = BETA,
    weights: Sequence[Tensor] | None = None,
    shrinkage: float = SHRINKAGE,
    attention: Sequence[Mapping[nn.Linear, Replacement]] | None = None,
    on_block: Callable[[int, Compensated], None] | None = None,
) -> list[Replacement]:
    """Refit every block on the network whose earlier blocks are pruned already.

    Args:
        view: the dense network.
        batches: calibration images, held in memory (their streams too: images x tokens x width).
        keep: the neurons that stay, per block, or a function that chooses them.
        beta: share of the earlier blocks' error that each block tries to make up for.
        weights: per block, a positive weight for each token position [t]; None: even.
        shrinkage: lambda over the mean diagonal of the covariance.
        attention: per block, layers that stand in for those of its attention, in the pruned
            network alone: what they lose is an error of the stream like that of earlier blocks.

    Returns: the second layer of every block.
    """
    pruned = [view.embed(images) for images in batches]
    dense = [x.clone() for x in pruned] if beta else []
    out = []
    for l in range(len(view.widths)):
        fc2 = view.fc2(l)
        with layers_replaced(attention[l] if attention is not None else {}):
            attended = [view.attention_output(l, x) for x in pruned]
        if beta:
            dense = [view.block(l, x) for x in dense]
        sums = _Sums(view.widths[l], fc2.out_features, bool(beta))
        for i, (x, a) in enumerate(zip(pruned, attended, strict=True)):
            with _input_of(fc2) as seen:
                after = view.tail(l, x, a)
            sums.add(
                seen[0],
                dense[i] - after if beta else None,
                None if weights is None else weights[l],
            )
        moments, cross = sums.finish(beta)
        kept = keep(l, moments) if callable(keep) else keep[l]
        found = compensate(moments, fc2.weight, fc2.bias, kept, shrinkage=shrinkage, cross=cross)
        out.append(Replacement(list(kept), found.weight, found.bias))
        if on_block is not None:
            on_block(l, found)
        with replaced(view, {l: out[-1]}):
            pruned = [view.tail(l, x, a) for x, a in zip(pruned, attended, strict=True)]
    return out


class _Sums:
    """Weighted sums of h h^T, h, |h|, e h^T and e over tokens, kept in float64."""

    def __init__(self, h: int, d: int, with_error: bool) -> None:
        self.weight = 0.0
        self.hidden = torch.zeros(h, dtype=torch.float64)
        self.absolute = torch.zeros(h, dtype=torch.float64)
        self.gram = torch.zeros(h, h, dtype=torch.float64)
        self.error = torch.zeros(d, dtype=torch.float64) if with_error else None
        self.cross = torch.zeros(d, h, dtype=torch.float64) if with_error else None

    def add(self, h: Tensor, error: Tensor | None, weights: Tensor | None) -> None:
        """Add h [b, t, h] and the error [b, t, d], tokens weighted by position [t]."""
        w = torch.ones(h.shape[1]) if weights is None else weights
        w = w.to(h)[None, :, None]
        rows, scaled = h.flatten(0, 1), (w * h).flatten(0, 1)
        self.weight += float(w.sum()) * len(h)
        self.hidden += _sum(scaled)
        self.absolute += _sum(scaled.abs())
        # products of one batch in the model's precision, sums in float64: half the time, and the
        # ridge is a thousand times the difference
        self.gram += (rows.T @ scaled).cpu().to(torch.float64)
        if error is not None and self.error is not None and self.cross is not None:
            self.error += _sum((w * error).flatten(0, 1))
            self.cross += (error.flatten(0, 1).T @ scaled).cpu().to(torch.float64)

    def finish(self, beta: float) -> tuple[Moments, Cross | None]:
        n = self.weight
        mean = self.hidden / n
        covariance = self.gram / n - torch.outer(mean, mean)
        covariance = (covariance + covariance.T) / 2
        moments = Moments(mean, covariance, self.absolute / n, n)
        if self.error is None or self.cross is None:
            return moments, None
        offset = self.error / n
        return moments, Cross(beta * offset, beta * (self.cross / n - torch.outer(offset, mean)))


def _sum(x: Tensor) -> Tensor:
    """Column sums [n, k] -> [k], float64 on the CPU."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.sum(0, dtype=torch.float64).cpu()


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()

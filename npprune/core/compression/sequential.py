"""Compensation in sequence: each block refitted on the network pruned so far.

Block by block, the calibration images run through what is already pruned. The block's full hidden
layer is recollected there (h, its moments), and `fc2` is refitted on the inputs that it will really
see. The target of the regression is

    y = W h + b + beta (x - x')        x  the dense network's stream after the block
                                       x' the pruned network's, with this block unpruned

With beta = 0 the block gives what the dense `fc2` gives on the same input. With beta = 1 it also
makes up for all of the error that the earlier blocks have left in the stream, as far as the kept
units can explain it: more than is good, since part of it is noise of the calibration images.

Two more layers are there to make up for errors with beta > 0, though nothing is taken from them:
the attention's `proj`, before `fc2` and by the same regression (x and x' after the attention), and
the classifier at the end, whose target is the dense network's logits. The classifier sees one row
an image, so its ridge is a prior worth `PRIOR_IMAGES` of them.

Source: layer-wise reconstruction on the pruned network's own inputs as in SparseGPT (Frantar and
Alistarh, 2023) and He et al. (ICCV 2017), who regress on the dense network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npprune.core.compression.compensation import Compensated, Cross, choose_shrinkage, compensate
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import Replacement, layers_replaced, replaced
from npprune.core.compression.statistics import Moments, Sums
from npprune.core.recording import recorded
from npprune.core.view import VitView
from npprune.errors import ModelError

BETA = 0.5
"""Share of the earlier blocks' error in the target; between the two ends is best."""
PRIOR_IMAGES = 1000.0
"""As many images, of a mean feature's variance, say that the classifier stays as it was."""


@dataclass
class Refitted:
    """The layers that stand in for the dense ones.

    `second` are the blocks' second layers. `projections` maps a block to its attention's `proj`,
    `classifiers` are those of the view, in its order; both are empty with beta = 0, or where the
    network has no such layer with a bias.
    """

    second: list[Replacement]
    projections: dict[int, Replacement]
    classifiers: list[Replacement]


@dataclass
class Fit:
    """How the layers are fitted.

    Args:
        beta: share of the earlier blocks' error that each block tries to make up for.
        weights: per block, a positive weight for each token position [t]; None: even.
        shrinkage: lambda over the mean diagonal of the covariance.
        held_out: images that nothing is fitted on; where given, each layer's shrinkage is the one
            that loses least on them.
    """

    beta: float = BETA
    weights: Sequence[Tensor] | None = None
    shrinkage: float = SHRINKAGE
    held_out: Sequence[Tensor] = ()


@torch.no_grad()
def compensate_in_sequence(
    view: VitView,
    batches: Sequence[Tensor],
    keep: Sequence[Sequence[int]],
    *,
    fit: Fit | None = None,
    changed: Sequence[Mapping[nn.Linear, Replacement]] | None = None,
    on_block: Callable[[int, Compensated], None] | None = None,
) -> Refitted:
    """Refit every block on the network whose earlier blocks are pruned already.

    Args:
        view: the dense network.
        batches: calibration images, held in memory (their streams too: images x tokens x width).
        keep: the neurons that stay, per block.
        changed: per block, layers that stand in for those of its attention, in the pruned
            network alone: what they lose is an error of the stream like that of earlier blocks.
            A `proj` among them says which of its inputs stay; it is refitted.
        on_block: called with each block's number and how its second layer was found.
    """
    fit = fit or Fit()
    beta, shrinkage = fit.beta, fit.shrinkage
    fitted = len(batches)  # the streams after these are held out
    pruned = [view.embed(images) for images in (*batches, *fit.held_out)]
    dense = [x.clone() for x in pruned] if beta else []
    out = Refitted([], {}, [])
    for l in range(len(view.widths)):
        fc2 = view.fc2(l)
        weight = None if fit.weights is None else fit.weights[l]
        layers = dict(changed[l]) if changed is not None else {}
        proj = _projection(view, l) if beta else None
        goals = _advanced(view, l, dense)
        if proj is None:
            with layers_replaced(layers):
                attended = [view.attention_output(l, x) for x in pruned]
            for _ in goals:  # the dense streams go on all the same
                pass
        else:
            sums = _Sums(fitted)
            stays, inputs = _projected(view, l, proj, pruned, goals, layers, weight, sums)
            found = sums.refit(proj, stays, beta, shrinkage, diagnose=False)
            w, b = found.weight.to(proj.weight), found.bias.to(proj.weight)
            out.projections[l] = Replacement(stays, w, b)
            attended = [nn.functional.linear(a, w, b) for a in inputs]
        sums = _Sums(fitted)
        for i, (x, a) in enumerate(zip(pruned, attended, strict=True)):
            with recorded([fc2]) as seen:
                after = view.tail(l, x, a)
            sums.add(seen[fc2][0], dense[i] - after if beta else None, weight)
        found = sums.refit(fc2, keep[l], beta, shrinkage)
        out.second.append(Replacement(list(keep[l]), found.weight, found.bias))
        if on_block is not None:
            on_block(l, found)
        with replaced(view, {l: out.second[-1]}):
            pruned = [view.tail(l, x, a) for x, a in zip(pruned, attended, strict=True)]
    if beta:
        out.classifiers = _refit_classifiers(view, dense[:fitted], pruned[:fitted])
    return out


def _projection(view: VitView, l: int) -> nn.Linear | None:
    """The last layer of block l's attention; None where it is another kind, or has no bias."""
    try:
        proj = view.attention(l).proj
    except ModelError:
        return None
    return proj if proj.bias is not None else None


def _advanced(view: VitView, l: int, dense: list[Tensor]) -> Iterator[Tensor]:
    """Take the dense streams through block l, in place; gives each as it is after the attention."""
    for i, x in enumerate(dense):
        dense[i], attention = view.block_and_attention(l, x)
        yield _attended(view, l, x, attention)


def _attended(view: VitView, l: int, x: Tensor, attention: Tensor) -> Tensor:
    """The stream between block l's attention and its MLP."""
    nothing = x.new_zeros(1, 1, 1).expand(*x.shape)
    return view.tail(l, x, attention, given=(slice(None), nothing))


def _projected(
    view: VitView,
    l: int,
    proj: nn.Linear,
    streams: Sequence[Tensor],
    goals: Iterable[Tensor],
    changed: dict[nn.Linear, Replacement],
    weight: Tensor | None,
    sums: _Sums,
) -> tuple[list[int], list[Tensor]]:
    """Which inputs of `proj` stay, and those of the streams; all of them go into the sums.

    goals: the dense network's streams after the attention.
    """
    stays = list(changed[proj].keep) if proj in changed else list(range(proj.in_features))
    others = {layer: r for layer, r in changed.items() if layer is not proj}
    inputs = []
    for x, goal in zip(streams, goals, strict=True):
        with layers_replaced(others), recorded([proj]) as seen:
            attention = view.attention_output(l, x)
        h, _ = seen[proj]
        sums.add(h, goal - _attended(view, l, x, attention), weight)
        inputs.append(h[..., stays])
    return stays, inputs


def _refit_classifiers(
    view: VitView, dense: Sequence[Tensor], pruned: Sequence[Tensor]
) -> list[Replacement]:
    """The classifiers that come closest to the dense network's logits on the pruned streams."""
    layers = view.classifiers()
    if any(layer.bias is None for layer in layers):
        return []
    sums = [_Sums(len(dense)) for _ in layers]
    for x, y in zip(dense, pruned, strict=True):
        with recorded(layers) as goal:
            view.head(x)
        with recorded(layers) as seen:
            view.head(y)
        for layer, total in zip(layers, sums, strict=True):
            h, output = seen[layer]
            total.add(h[:, None], (goal[layer][1] - output)[:, None], None)
    out = []
    for layer, total in zip(layers, sums, strict=True):
        every = list(range(layer.in_features))
        prior = PRIOR_IMAGES / total.fit.weight
        found = total.refit(layer, every, 1.0, prior, diagnose=False)
        out.append(Replacement(every, found.weight, found.bias))
    return out


class _Part(Sums):
    """Sums over the tokens of some images, of the inputs h of a layer and of an error e."""

    def add_batch(self, h: Tensor, error: Tensor | None, weights: Tensor | None) -> None:
        """Add h [b, t, h] and the error [b, t, d], tokens weighted by position [t]."""
        w = torch.ones(h.shape[1]) if weights is None else weights
        w = w.to(h)[None, :, None]
        rows, scaled = h.flatten(0, 1), (w * h).flatten(0, 1)
        # products of one batch in the model's precision, sums in float64: half the time, and the
        # ridge is a thousand times the difference
        self.add(
            float(w.sum()) * len(h),
            hidden=_sum(scaled),
            absolute=_sum(scaled.abs()),
            gram=(rows.T @ scaled).cpu().to(torch.float64),
        )
        if error is not None:
            cross = (error.flatten(0, 1).T @ scaled).cpu().to(torch.float64)
            self.add(error=_sum((w * error).flatten(0, 1)), cross=cross)

    def finish(self, beta: float) -> tuple[Moments, Cross | None]:
        """Moments of h; and beta times what e says of it, if there were errors."""
        moments = self.moments()
        if "error" not in self.parts:
            return moments, None
        offset, cross = self.parts["error"] / self.weight, self.parts["cross"] / self.weight
        return moments, Cross(beta * offset, beta * (cross - torch.outer(offset, moments.mean)))


class _Sums:
    """What a layer is refitted from: the first `fitted` batches, and those held out after them."""

    def __init__(self, fitted: int) -> None:
        self.left = fitted
        self.fit, self.held = _Part(), _Part()

    def add(self, h: Tensor, error: Tensor | None, weights: Tensor | None) -> None:
        """Add the next batch: h [b, t, h] and the error [b, t, d], tokens weighted [t]."""
        part = self.fit if self.left > 0 else self.held
        part.add_batch(h, error, weights)
        self.left -= 1

    def refit(
        self,
        layer: nn.Linear,
        keep: Sequence[int],
        beta: float,
        shrinkage: float,
        *,
        diagnose: bool = True,
    ) -> Compensated:
        """The layer for the kept inputs; the shrinkage from the held-out part, if there is one."""
        moments, cross = self.fit.finish(beta)
        if self.held.weight:
            held_out, held_cross = self.held.finish(beta)
            shrinkage, _ = choose_shrinkage(
                moments, held_out, layer.weight, keep, cross=cross, held_out_cross=held_cross
            )
        return compensate(
            moments, layer.weight, layer.bias, keep,
            shrinkage=shrinkage, cross=cross, diagnose=diagnose,
        )  # fmt: skip


def _sum(x: Tensor) -> Tensor:
    """Column sums [n, k] -> [k], float64 on the CPU."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.sum(0, dtype=torch.float64).cpu()

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

Where a block norms what its layers give before it is added to the stream, an error of the stream
says nothing of theirs: there beta is 0.

Where a norm stands before `fc2` (EVA02, BEiT3), it is one over the kept units: h_K is what that
gives, the removed ones are as the whole norm has them, and what W_K loses of the kept ones between
the two norms is added to the error.

Where tokens merge, those of the dense network's stream merge with the pruned one's, the same ones:
what is refitted is what was taken away, on the tokens that are left. (Means of tokens that never
merged as a target do harm: merging moves the stream in ways that no layer should follow.) A token
counts as much as those that it holds.

Source: layer-wise reconstruction on the pruned network's own inputs as in SparseGPT (Frantar and
Alistarh, 2023) and He et al. (ICCV 2017), who regress on the dense network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.compression.compensation import (
    SHRINKAGES,
    Compensated,
    Cross,
    choose_shrinkage,
    compensate,
)
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import (
    Replacement,
    SmallerNorm,
    layers_replaced,
    replaced,
)
from npprune.core.compression.statistics import Moments, Sums, Total
from npprune.core.recording import recorded
from npprune.core.tokens import Merge, Tokens, followed, gathered
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
    `classifiers` are those of the view, in its order; the last two are empty with beta = 0, or
    where the network has no such layer with a bias.
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
        own_shrinkages: those tried for the layers of the tokens that are read alone; without
            held-out images the middle one is taken.
    """

    beta: float = BETA
    weights: Sequence[Tensor] | None = None
    shrinkage: float = SHRINKAGE
    held_out: Sequence[Tensor] = ()
    own_shrinkages: Sequence[float] = SHRINKAGES


@torch.no_grad()
def compensate_in_sequence(
    view: VitView,
    batches: Sequence[Tensor],
    keep: Sequence[Sequence[int]],
    *,
    fit: Fit | None = None,
    changed: Sequence[Mapping[nn.Linear, Replacement]] | None = None,
    merged: Sequence[int] | None = None,
    own: Sequence[Sequence[int]] | None = None,
    on_block: Callable[[int, Compensated], None] | None = None,
    total: Total | None = None,
) -> Refitted:
    """Refit every block on the network whose earlier blocks are pruned already.

    Args:
        view: the dense network.
        batches: calibration images, held in memory (their streams too: images x tokens x width).
        keep: the neurons that stay, per block.
        changed: per block, layers that stand in for those of its attention, in the pruned
            network alone: what they lose is an error of the stream like that of earlier blocks.
            A `proj` among them says which of its inputs stay; it is refitted.
        merged: per block, tokens that the pruned network merges; None: none.
        own: per block, the neurons of the tokens that are read, where they have some to
            themselves and `keep` is of the others; empty: all tokens share.
        on_block: called with each block's number and how its second layer was found.
        total: adds the sums of other processes, which have other batches, and others held out.
    """
    fit = fit or Fit()
    beta, shrinkage = fit.beta, fit.shrinkage
    fitted = len(batches)  # the streams after these are held out
    embedded = [view.embed(images) for images in (*batches, *fit.held_out)]
    pruned: list[Any] = embedded if merged is None else [followed(x) for x in embedded]
    dense: list[Any] = list(pruned) if beta else []
    out = Refitted([], {}, [])
    for l in range(len(view.widths)):
        fc2, norm = view.fc2(l), view.norm(l)
        weight = None if fit.weights is None else fit.weights[l]
        layers = dict(changed[l]) if changed is not None else {}
        proj = _projection(view, l, layers) if beta else None
        dense, pruned = ([view.entered(l, x) for x in streams] for streams in (dense, pruned))
        given = [view.attention_output(l, x) for x in dense]
        if proj is None:
            with layers_replaced(layers):
                attended = [view.attention_output(l, x) for x in pruned]
        else:
            sums = _Sums(fitted, total)
            goals = (_attended(view, l, x, a) for x, a in zip(dense, given, strict=True))
            stays, inputs = _projected(view, l, proj, pruned, goals, layers, weight, sums)
            whole = layers[proj].whole if proj in layers else None
            found = sums.refit(proj, stays, beta, shrinkage, whole=whole, diagnose=False)
            w, b = found.weight.to(proj.weight), found.bias.to(proj.weight)
            out.projections[l] = Replacement(stays, w, b)
            attended = [nn.functional.linear(a, w, b) for a in inputs]
        pairs: list[Merge | None] = [None] * len(pruned)
        if merged is not None and merged[l]:
            both = zip(pruned, attended, strict=True)
            pairs = [view.pairs(l, x, a, merged[l]) for x, a in both]
        for i, a in enumerate(given):
            dense[i] = view.tail(l, dense[i], a, merge=pairs[i])
        sums, of_own = _Sums(fitted, total), _Sums(fitted, total)
        split = own is not None and bool(own[l])
        for i, (x, a, join) in enumerate(zip(pruned, attended, pairs, strict=True)):
            with recorded([fc2] if norm is None else [fc2, norm]) as seen:
                after = view.tail(l, x, a, merge=join)
            h, error = seen[fc2][0], None
            if beta and view.adds(l):
                error = _values(dense[i]) - _values(after)
            if norm is not None:
                h, error = _behind(SmallerNorm(norm, keep[l]), fc2, seen[norm], error, beta)
            aside = (view.tokens_read or 0) if split else 0
            if split:
                of_own.add(h[:, :aside], None if error is None else error[:, :aside], None)
            first = aside + _values(after).shape[1] - h.shape[1]  # others have units already
            sums.add(
                h[:, aside:],
                None if error is None else error[:, first:],
                _after(_weights(weight, after), first),
            )
        found = sums.refit(fc2, keep[l], beta if norm is None else 1.0, shrinkage)
        second = Replacement(list(keep[l]), found.weight, found.bias)
        if split and own is not None:
            tried = fit.own_shrinkages
            middle = tried[len(tried) // 2]
            theirs = of_own.refit(fc2, own[l], beta, middle, tried=tried, diagnose=False)
            second.first = (
                view.tokens_read or 0,
                Replacement(list(own[l]), theirs.weight, theirs.bias),
            )
        out.second.append(second)
        if on_block is not None:
            on_block(l, found)
        with replaced(view, {l: out.second[-1]}):
            pruned = [
                view.tail(l, x, a, merge=join)
                for x, a, join in zip(pruned, attended, pairs, strict=True)
            ]
    if beta:
        out.classifiers = _refit_classifiers(view, dense[:fitted], pruned[:fitted], total)
    return out


def _values(x: Tensor | Tokens) -> Tensor:
    """The stream [b, t, d]."""
    return x.x if isinstance(x, Tokens) else x


def _weights(weight: Tensor | None, at: Tensor | Tokens) -> Tensor | None:
    """The weights [t] of positions as those of tokens [b, t]: a token has those of all it holds."""
    if not isinstance(at, Tokens) or at.where is None:
        return weight
    each = torch.ones(at.where.shape[1]) if weight is None else weight
    each = each.to(at.x)[None, :, None].expand(len(at.x), -1, -1)
    return gathered(each, at.where, at.x.shape[1])[..., 0]


def _after(weights: Tensor | None, first: int) -> Tensor | None:
    """The weights [t] or [b, t] of the tokens after the first ones."""
    return weights if weights is None else weights[..., first:]


def _behind(
    smaller: SmallerNorm,
    fc2: nn.Linear,
    norm: tuple[Tensor, Tensor],
    error: Tensor | None,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Where a norm stands before fc2: its inputs with the kept units as the smaller norm gives
    them, and what fc2 of these lacks of the dense output, beta times the error included.

    norm: its input and output.
    """
    before, whole = norm
    index = torch.as_tensor(list(smaller.keep), device=whole.device)
    h = whole.index_copy(-1, index, smaller(before).index_select(-1, index))
    lacks = nn.functional.linear(whole - h, fc2.weight)
    return h, lacks if error is None else lacks + beta * error


def _projection(view: VitView, l: int, changed: Mapping[nn.Linear, Any]) -> nn.Linear | None:
    """The last layer of block l's attention; None where it is another kind, or has no bias.
    Where heads alone can go, only if some do."""
    try:
        found = view.attention(l)
    except ModelError:
        return None
    proj = found.proj
    if found.qkv is None and proj not in changed:
        return None
    return proj if proj.bias is not None else None


def _attended(view: VitView, l: int, x: Any, attention: Tensor) -> Any:
    """The stream between block l's attention and its MLP."""
    nothing = attention.new_zeros(1, 1, 1).expand(*attention.shape)
    return view.tail(l, x, attention, given=(slice(None), nothing), merge=0)


def _projected(
    view: VitView,
    l: int,
    proj: nn.Linear,
    streams: Sequence[Any],
    goals: Iterable[Any],
    changed: dict[nn.Linear, Replacement],
    weight: Tensor | None,
    sums: _Sums,
) -> tuple[list[int], list[Tensor]]:
    """Which inputs of `proj` stay, and those of the streams; all of them go into the sums.

    goals: the dense network's streams after the attention.
    """
    stays = list(changed[proj].keep) if proj in changed else list(range(proj.in_features))
    others = {layer: r for layer, r in changed.items() if layer is not proj}
    whole = changed[proj].whole if proj in changed else None
    if whole is not None:
        others[proj] = Replacement(range(proj.in_features), whole, proj.bias)
    inputs = []
    for x, goal in zip(streams, goals, strict=True):
        with layers_replaced(others), recorded([proj]) as seen:
            attention = view.attention_output(l, x)
        h, _ = seen[proj]
        error = None
        if view.adds(l):
            error = _values(goal) - _values(_attended(view, l, x, attention))
        sums.add(h, error, _weights(weight, x))
        inputs.append(h[..., stays])
    return stays, inputs


def _refit_classifiers(
    view: VitView, dense: Sequence[Any], pruned: Sequence[Any], total: Total | None
) -> list[Replacement]:
    """The classifiers that come closest to the dense network's logits on the pruned streams."""
    layers = view.classifiers()
    if any(layer.bias is None for layer in layers):
        return []
    sums = [_Sums(len(dense), total) for _ in layers]
    for x, y in zip(dense, pruned, strict=True):
        with recorded(layers) as goal:
            view.head(x)
        with recorded(layers) as seen:
            view.head(y)
        for layer, s in zip(layers, sums, strict=True):
            h, output = seen[layer]
            s.add(h[:, None], (goal[layer][1] - output)[:, None], None)
    out = []
    for layer, s in zip(layers, sums, strict=True):
        every = list(range(layer.in_features))
        s.share()
        found = s.refit(layer, every, 1.0, PRIOR_IMAGES / s.fit.weight, diagnose=False)
        out.append(Replacement(every, found.weight, found.bias))
    return out


class _Part(Sums):
    """Sums over the tokens of some images, of the inputs h of a layer and of an error e."""

    def add_batch(self, h: Tensor, error: Tensor | None, weights: Tensor | None) -> None:
        """Add h [b, t, h] and the error [b, t, d], tokens weighted [t], or [b, t] one by one."""
        w = torch.ones(h.shape[1]) if weights is None else weights
        w = w.to(h).expand(len(w) if w.dim() > 1 else 1, -1)[..., None]
        rows, scaled = h.flatten(0, 1), (w * h).flatten(0, 1)
        # products of one batch in the model's precision, sums in float64: half the time, and the
        # ridge is a thousand times the difference
        self.add(
            float(w.sum()) * (len(h) // len(w)),
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

    def __init__(self, fitted: int, total: Total | None) -> None:
        self.left, self.total = fitted, total
        self.fit, self.held = _Part(), _Part()

    def add(self, h: Tensor, error: Tensor | None, weights: Tensor | None) -> None:
        """Add the next batch: h [b, t, h] and the error [b, t, d], tokens weighted [t] or
        [b, t]."""
        part = self.fit if self.left > 0 else self.held
        part.add_batch(h, error, weights)
        self.left -= 1

    def share(self) -> None:
        """Add the sums of other processes, once."""
        if self.total is not None:
            self.fit.share(self.total)
            self.held.share(self.total)
            self.total = None

    def refit(
        self,
        layer: nn.Linear,
        keep: Sequence[int],
        beta: float,
        shrinkage: float,
        *,
        whole: Tensor | None = None,
        tried: Sequence[float] = SHRINKAGES,
        diagnose: bool = True,
    ) -> Compensated:
        """The layer for the kept inputs; the shrinkage from the held-out part, if there is one.

        whole: its weight, where it is not the layer's own (see `Replacement`).
        """
        self.share()
        weight = layer.weight if whole is None else whole
        moments, cross = self.fit.finish(beta)
        if self.held.weight:
            held_out, held_cross = self.held.finish(beta)
            shrinkage, _ = choose_shrinkage(
                moments, held_out, weight, keep,
                cross=cross, held_out_cross=held_cross, candidates=tried,
            )  # fmt: skip
        return compensate(
            moments, weight, layer.bias, keep,
            shrinkage=shrinkage, cross=cross, diagnose=diagnose,
        )  # fmt: skip


def _sum(x: Tensor) -> Tensor:
    """Column sums [n, k] -> [k], float64 on the CPU."""
    if x.device.type == "mps":
        x = x.cpu()
    return x.sum(0, dtype=torch.float64).cpu()

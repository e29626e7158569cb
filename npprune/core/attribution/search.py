"""Influential neuron paths by joint attribution, chosen block by block.

"Discovering Influential Neuron Path in Vision Transformers" (ICLR 2025). A path P takes K hidden
units of every block's MLP. With w a unit's activation in the clean run and p the softmax
probability of the image's label, its joint attribution score is

    JAS(P) = (sum of w over P) * integral over alpha in [0, 1] of
             (sum over P of dp/dw, where every unit of P stands at alpha * w).

The search goes through the blocks in order. In block l all units are scaled by alpha together
with the path so far, and unit i is scored as if it joined the path:

    score_i = (W + w_i) * integral of (G + g_i)          per token of the scope, then summed

with W the path's activations, G the sum of its gradients, g_i the unit's own. The K best join;
from then on they alone are scaled in block l, the block's other units standing at the clean run's
values on the scope's tokens.

Four facts keep this exact and cheap:

- Up to block l everything is settled once its units are chosen, so the stream X before the next
  block is kept for every alpha, and no block is run twice.
- Only the *sum* G of the path's gradients is needed: a directional derivative. With `cls` scope
  dX, the change of the stream when all of the path's units rise at unit rate, is carried along in
  forward mode, and G = <dp/dX, dX>: the backward pass ends at block l. With `patch` and `all`
  scope G is needed for each token, and one backward pass through the kept graph gives it.
- In block 0 there is no path, and nothing that stays depends on the alphas. Its integral, at the
  patches the hardest of all (a choice that goes wrong there changes all later ones), may take more
  points than the others.
- At alpha = 1 nothing is scaled, whatever was chosen, so dp/dX is the clean run's: one backward
  pass has it for all blocks. The last point of the Radau rules costs almost nothing.

Where patches merge between two stages of a network (Swin), a token stands for those that merged
into it, and W and G are sums over them: the products are those of the place, at the grid of the
block that is searched, and JAS(P) is taken at the last grid. (Sums over all tokens would multiply a
unit's activation at one end of the image with a gradient at the other; where all blocks have the
same tokens, this is the score above.) The search then needs one nudge of the path for each grid.

Unit i acts through its column of fc2 alone, so with o the MLP's output, g_i = <W2[:, i], dp/do>,
and the gradient can be integrated over alpha before it is multiplied by W2.

Letters: b images, m points, s tokens of the scope, t tokens, d width, h units, k chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import linear

from npprune.core.attribution.quadrature import END_AT_ONE, Integral, quadrature
from npprune.core.attribution.tangent import load_rules, value_and_tangent
from npprune.core.finite import check_outputs, check_scores
from npprune.core.view import VitView, frozen
from npprune.errors import ModelError
from npprune.words import Scope

PIECE = 8 * 2**20
"""Bytes of hidden activations a thread at which a CPU is fastest: beyond some tens of MiB every
tensor is memory that the system has to hand out anew."""


@dataclass
class PathBatch:
    """The paths of a batch of images.

    neurons: int64 [images, blocks, topk], best first in each block.
    scores: float [images], the joint attribution score of the whole path.
    """

    neurons: Tensor
    scores: Tensor


def clean_hidden(view: VitView, images: Tensor, scope: Scope) -> tuple[list[Tensor], Tensor]:
    """The clean run: hidden activations [b, s, h] of every block at the scope's tokens, and the
    logits [b, c]."""
    tokens = view.tokens(scope)
    hidden: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        hidden.append(_part(h, tokens, images.dtype))
        return h

    with torch.no_grad():
        x = view.embed(images)
        for l in range(len(view.widths)):
            x = view.block(l, x, edit=keep)
        logits = view.head(x)
    _check_outputs(view, images, logits)
    return hidden, logits


def clean_gradients(
    view: VitView, images: Tensor, labels: Tensor, scope: Scope
) -> tuple[list[Tensor], list[Tensor]]:
    """The clean run: hidden activations [b, s, h] of every block at the scope's tokens, and dp/dX
    [b, t, d] of the stream before every block and after the last."""
    tokens = view.tokens(scope)
    hidden: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        hidden.append(_part(h, tokens, images.dtype))
        return h

    streams = [view.embed(images).detach().requires_grad_()]
    for l in range(len(view.widths)):
        streams.append(view.block(l, streams[-1], edit=keep))
    logits = view.head(streams[-1])
    _check_outputs(view, images, logits)
    p = logits.softmax(-1).gather(1, labels[:, None])
    return hidden, list(torch.autograd.grad(p.sum(), streams))


def _check_outputs(view: VitView, images: Tensor, logits: Tensor) -> None:
    """ModelError, DataError where the predictions say nothing of the neurons."""
    if logits.shape[1] < 2:
        raise ModelError(
            "paths need a network of at least two outputs, got one: its probability is 1 whatever "
            "the neurons do"
        )
    check_outputs(view, images, logits)


def joint_attribution(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    integral: Integral,
    *,
    topk: int = 1,
    neurons: Tensor | None = None,
) -> PathBatch:
    """The layer-progressive search, or the score of a given path.

    Args:
        images: [b, 3, H, W], preprocessed; labels: int64 [b], one each, in any mixture.
        topk: units per block.
        neurons: a path [b, L, k] to score instead of searching for one.

    Returns:
        The paths and their scores, detached, on the images' device.

    Raises:
        DataError, ModelError: an image, the weights, the network's answers or the scores are not
            finite, or there is one output.
    """
    walk = _TangentWalk if integral.scope == "cls" else _GraphWalk
    with frozen(view.model):
        state = walk(view, images, labels, integral, searching=neurons is None)
        w = state.w
        path_w = torch.zeros_like(w[0][..., 0])  # W [b, s]
        path: list[Tensor] = []
        highest = [path_w.new_zeros(len(images))]  # of each block; NaN is above every number
        for l in range(len(view.widths)):
            path_w = view.gathered(l, path_w)
            if neurons is None:
                path_g, g = state.candidates(l, w[l])  # G [b, s], g [b, s, h]
                unit_scores = ((path_w[..., None] + w[l]) * (path_g[..., None] + g)).sum(1)
                highest.append(unit_scores.amax(dim=1))
                chosen = unit_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
            else:
                chosen = neurons[:, l].to(images.device)
            joins = chosen if integral.accumulation == "sum" else chosen[:, -1:]
            path_w = path_w + _take(w[l], joins).sum(-1)
            state.settle(l, w[l], chosen, joins)
            path.append(chosen)
        score = (path_w * state.path_gradient()).sum(1)
    found = torch.stack([*highest, score.detach()], 1)
    check_scores(found, what="attribution scores", dtype=images.dtype)
    return PathBatch(torch.stack(path, 1), score.detach())


def own_attribution(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    integral: Integral,
) -> list[Tensor]:
    """Each unit's own part, no path: w_i * integral of g_i, [b, h] per block.

    One block's units are scaled together on the clean run's stream; the sum over a block is the
    change of p when its hidden activations at the scope's tokens go from 0 to their values.
    """
    with frozen(view.model):
        walk, own = _Walk(view, images, labels, integral), []
        for l, w in enumerate(walk.w):
            g = walk.first_gradient() if l == 0 else walk.own_gradient(l, w)
            own.append((w * g).sum(1))
            with torch.no_grad():
                walk.x = view.block(l, walk.x)
    return own


class _Walk:
    """What both searches share: m * b streams, alpha-major, that advance one block a step."""

    def __init__(
        self,
        view: VitView,
        images: Tensor,
        labels: Tensor,
        integral: Integral,
        *,
        searching: bool = True,
    ) -> None:
        """searching: gradients will be asked for after every block, not after the last alone."""
        self.view, self.image_labels, self.integral = view, labels, integral
        self.tokens = view.tokens(integral.scope)
        self.last = len(view.widths) - 1
        self.clean: list[Tensor] = []  # dp/dX at alpha = 1
        if searching and integral.rule in END_AT_ONE:
            self.w, self.clean = clean_gradients(view, images, labels, integral.scope)
        else:
            self.w, _ = clean_hidden(view, images, integral.scope)
        with torch.no_grad():
            self.x = view.embed(images)  # the same for all alphas until a neuron is scaled
        self.step = _rows_at_a_time(self.x, max(view.widths))
        self.place(integral.points)

    def place(self, m: int) -> None:
        """The alphas, and the pieces of rows that go through the blocks together: those at
        alpha = 1 by themselves where their gradient is known."""
        alphas, self.weights = (v.to(self.x) for v in quadrature(self.integral.rule, m))
        b = len(self.image_labels)
        self.m, self.labels = m, self.image_labels.repeat(m)
        self.alphas = alphas.repeat_interleave(b)[:, None, None]  # [mb, 1, 1]
        self.fresh = (m - 1 if self.clean else m) * b  # rows whose gradient is not known yet
        self.pieces = _slices(0, self.fresh, self.step) + _slices(self.fresh, m * b, self.step)

    def first_gradient(self) -> Tensor:
        """The integral of g_i [b, s, h] in block 0, where there is no path yet: nothing that
        stays depends on the alphas, and there may be more of them."""
        walk = copy(self)
        walk.step = max(1, min(self.step, self.fresh))  # no more memory than the other blocks
        walk.place(self.integral.first_points)
        return walk.own_gradient(0, self.w[0])

    def repeat(self, value: Tensor) -> Tensor:
        """[b, ...] -> [mb, ...]."""
        return value.repeat(self.m, *[1] * (value.dim() - 1))

    def integrated(self, value: Tensor) -> Tensor:
        """[mb, ...] -> [b, ...], the weighted sum over the points."""
        return torch.einsum("m,mb...->b...", self.weights, value.unflatten(0, (self.m, -1)))

    def gradient(self, x: Tensor, l: int) -> Tensor:
        """dp/dx [mb, t, d] of each row's own label, x being the streams before block l."""
        return torch.cat([self.piece_gradient(x[rows], l, rows) for rows in self.pieces])

    def piece_gradient(self, x: Tensor, l: int, rows: slice) -> Tensor:
        """The same for one of the pieces, whose streams x are."""
        if rows.start >= self.fresh:
            return self.clean[l][rows.start - self.fresh : rows.stop - self.fresh]
        y = x = x.detach().requires_grad_()
        for block in range(l, self.last + 1):
            y = self.view.block(block, y, cls_only=self.cls_only(block))
        p = self.view.head(y).softmax(-1).gather(1, self.labels[rows, None])
        return torch.autograd.grad(p.sum(), x)[0]

    def own_gradient(self, l: int, w: Tensor) -> Tensor:
        """The integral of g_i [b, s, h] without a path: block l's units are scaled, and the
        stream before it, `x` [b, t, d], is the clean run's."""
        with torch.no_grad():
            entered = self.view.entered(l, self.x)
            attention = self.repeat(self.view.attention_output(l, entered))
        x, o_all = self.repeat(entered), self.scaled(l, w)
        dp_do: list[Tensor] = []
        for rows in self.pieces:
            o = o_all[rows].detach().requires_grad_()
            y = self.view.tail(l, x[rows], attention[rows], given=(self.tokens, o))
            dp_do += torch.autograd.grad(y, o, self.piece_gradient(y, l + 1, rows))
        return self.integrated(torch.cat(dp_do)) @ self.view.fc2(l).weight

    def cls_only(self, l: int) -> bool:
        """In the last block under class-token pooling, no one reads the other tokens."""
        return l == self.last and self.view.scope == "cls"

    def settled(self, l: int, w: Tensor, chosen: Tensor) -> Tensor:
        """The MLP's output [mb, s, d] with the chosen units at alpha * w, the others at w."""
        fc2 = self.view.fc2(l)
        clean = fc2(w)  # [b, s, d]
        chosen_part = torch.einsum("bsk,bkd->bsd", _take(w, chosen), fc2.weight.t()[chosen])
        return self.repeat(clean) - (1 - self.alphas) * self.repeat(chosen_part)

    def scaled(self, l: int, w: Tensor) -> Tensor:
        """The MLP's output [mb, s, d] with all units at alpha * w."""
        fc2 = self.view.fc2(l)
        products = self.alphas * self.repeat(linear(w, fc2.weight))
        return products if fc2.bias is None else products + fc2.bias

    def direction(self, l: int, joins: Tensor) -> Tensor:
        """The change of the MLP's output [mb, 1, d] when the joining units rise at unit rate."""
        return self.repeat(self.view.fc2(l).weight.t()[joins].sum(1, keepdim=True))


class _TangentWalk(_Walk):
    """Class-token scope: the stream and its tangent along the path, both in forward mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        load_rules()
        self.dx: Tensor | None = None  # zero until a neuron is chosen
        self.at = -1  # the block that _advance has run

    def candidates(self, l: int, w: Tensor) -> tuple[Tensor, Tensor]:
        self._advance(l)
        o = self.scaled(l, w).detach().requires_grad_()
        cls, dcls = self._cls_tail(l, o, torch.zeros_like(o))
        dp_dy = self.gradient(_put(self.y, self.tokens, cls), l + 1)
        (dp_do,) = torch.autograd.grad(cls, o, dp_dy[:, self.tokens])
        g = self.integrated(dp_do) @ self.view.fc2(l).weight
        if self.dy is None:
            return g.new_zeros(g.shape[:2]), g
        path_g = (dp_dy * _put(self.dy, self.tokens, dcls)).sum((1, 2))
        return self.integrated(path_g)[:, None], g

    def settle(self, l: int, w: Tensor, chosen: Tensor, joins: Tensor) -> None:
        self._advance(l)
        with torch.no_grad():
            cls, dcls = self._cls_tail(l, self.settled(l, w, chosen), self.direction(l, joins))
            dy = torch.zeros_like(self.y) if self.dy is None else self.dy
            self.x, self.dx = _put(self.y, self.tokens, cls), _put(dy, self.tokens, dcls)

    def path_gradient(self) -> Tensor:
        assert self.dx is not None
        dp_dx = self.gradient(self.x, self.last + 1)
        return self.integrated((dp_dx * self.dx).sum((1, 2)))[:, None]

    def _advance(self, l: int) -> None:
        """Block l on the stream and its tangent, once: attention, and all tokens but the class
        token. What the class token's MLP gives is decided in `_cls_tail`."""
        if self.at == l:
            return
        self.at = l

        def block(x: Tensor) -> tuple[Tensor, Tensor]:
            y, attention = self.view.block_and_attention(l, x, cls_only=self.cls_only(l))
            return y, attention[:, self.tokens]

        if self.dx is None:
            with torch.no_grad():
                self.y, attention = (self.repeat(v) for v in block(self.x))
            self.x, self.dy, dattention = self.repeat(self.x), None, torch.zeros_like(attention)
        else:
            steps = zip(self.x.split(self.step), self.dx.split(self.step), strict=True)
            done = [value_and_tangent(block, *step) for step in steps]
            self.y, attention, self.dy, dattention = (
                torch.cat([pieces[i][j] for pieces in done]) for i in (0, 1) for j in (0, 1)
            )
        dx = torch.zeros_like(self.x) if self.dx is None else self.dx
        self.cls = [self.x[:, self.tokens], attention]
        self.dcls = [dx[:, self.tokens], dattention]

    def _cls_tail(self, l: int, o: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
        """The class token after block l, and its tangent, when its MLP gives o (changing by do)."""

        def tail(x: Tensor, attention: Tensor, o: Tensor) -> Tensor:
            return self.view.tail(l, x, attention, given=(slice(None), o))

        return jvp(tail, (*self.cls, o), (*self.dcls, do))  # type: ignore[return-value]


class _GraphWalk(_Walk):
    """Any scope: the path's units carry a nudge eps, one for each token, and the graph is kept.

    p's gradient in eps is the path's summed gradient at each token.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        x = self.repeat(self.x)
        self.streams = [x[rows] for rows in self.pieces]
        self.attentions: list[Tensor] = []
        self.eps: list[tuple[int, list[Tensor]]] = []  # from which block on, and by piece
        self.path_g: Tensor | None = None  # where the last block's choice cannot change it

    def candidates(self, l: int, w: Tensor) -> tuple[Tensor, Tensor]:
        if l == 0:
            return w.new_zeros(w.shape[:2]), self.first_gradient()
        o_all, gradients = self.scaled(l, w), []
        for i, (x, rows) in enumerate(zip(self.streams, self.pieces, strict=True)):
            o = o_all[rows].detach().requires_grad_()
            y, attention = self.view.block_and_attention(l, x, given=(self.tokens, o))
            self.attentions.append(attention)
            dp_dy = self.piece_gradient(y, l + 1, rows)
            dp_do, *of_path = torch.autograd.grad(y, (o, *self.nudges(i)), dp_dy, retain_graph=True)
            gradients.append((dp_do, self.added(l, of_path)))
        dp_do, dp_deps = (torch.cat(pieces) for pieces in zip(*gradients, strict=True))
        g, path_g = self.integrated(dp_do) @ self.view.fc2(l).weight, self.integrated(dp_deps)
        if self.cls_only(l) and self.integral.scope == "patch":
            self.path_g = path_g  # no one reads what block l does to the patches
        return path_g, g

    def settle(self, l: int, w: Tensor, chosen: Tensor, joins: Tensor) -> None:
        o_all, do = self.settled(l, w, chosen), self.direction(l, joins)
        if not self.eps or self.eps[-1][1][0].shape[1] != o_all.shape[1]:
            eps = w.new_zeros(o_all.shape[:2])
            self.eps.append((l, [eps[rows].requires_grad_() for rows in self.pieces]))
        for i, rows in enumerate(self.pieces):
            given = self.tokens, o_all[rows] + self.nudges(i)[-1][..., None] * do[rows]
            if self.attentions:
                x, attention = self.view.entered(l, self.streams[i]), self.attentions[i]
                self.streams[i] = self.view.tail(l, x, attention, given=given)
            else:  # the first block, or a given path: not run for candidates
                self.streams[i] = self.view.block(l, self.streams[i], given=given)
        self.attentions = []

    def path_gradient(self) -> Tensor:
        if self.path_g is not None:
            return self.path_g
        dp_deps: list[Tensor] = []
        for i, (x, rows) in enumerate(zip(self.streams, self.pieces, strict=True)):
            dp_dx = self.piece_gradient(x, self.last + 1, rows)
            found = torch.autograd.grad(x, self.nudges(i), dp_dx)
            dp_deps.append(self.added(self.last, found))
        return self.integrated(torch.cat(dp_deps))

    def nudges(self, i: int) -> list[Tensor]:
        """Those of a piece: one where all blocks have the same tokens."""
        return [eps[i] for _, eps in self.eps]

    def added(self, l: int, gradients: Sequence[Tensor]) -> Tensor:
        """p's gradients in the nudges of a piece, added up at the tokens of block l."""
        total: Tensor | None = None
        for (first, _), found in zip(self.eps, gradients, strict=True):
            for block in range(first + 1, l + 1):
                found = self.view.gathered(block, found)
            total = found if total is None else total + found
        assert total is not None
        return total


def _rows_at_a_time(x: Tensor, width: int) -> int:
    """Streams [b, t, d] that go through the blocks together; a GPU takes them all."""
    if x.device.type != "cpu":
        return sys.maxsize
    row = x.shape[1] * width * x.element_size()
    return max(1, PIECE * torch.get_num_threads() // row)


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _part(h: Tensor, tokens: slice, dtype: torch.dtype) -> Tensor:
    """A copy of h at the tokens: the whole of h need not stay for it."""
    return h[:, tokens].detach().to(dtype, copy=True)


def _take(w: Tensor, units: Tensor) -> Tensor:
    """The units [b, k] of w [b, s, h]: [b, s, k]."""
    return w.gather(2, units[:, None].expand(-1, w.shape[1], -1))


def _put(x: Tensor, tokens: slice, value: Tensor) -> Tensor:
    """x with `value` at the tokens, as a new tensor."""
    x = x.clone()
    x[:, tokens] = value
    return x

"""Smaller attention: fewer heads, and fewer query/key dimensions that keep the logits.

Heads. `proj` reads the outputs of all heads side by side, so a head is a group of its inputs as a
neuron is one of `fc2`'s: the order in which heads go is `elimination.eliminate_groups`, weighted by
the curvature of the loss at `proj`'s output, and `compensation.compensate` refits `proj`.

Queries and keys. A head sees q and k [d] only in its logits q_i . k_j, and the softmax over j does
not see what is the same for all j: keys count from the mean of their image. With C_q the second
moment of the queries and C_k the covariance of the keys within images, the form q^T M k of rank r
with the least mean squared error over pairs of a query and a key is

    C_q^(1/2) C_k^(1/2) = U S V^T
    A = S_r^(1/2) U_r^T C_q^(-1/2)      B = S_r^(1/2) V_r^T C_k^(-1/2)      M = A^T B

so the new queries are A q and the new keys B k, folded into the rows of `qkv`. The scale of the
logits stays d^(-1/2): attention divides by r^(1/2) instead, so A and B are multiplied by
(r/d)^(1/4) each.

Source: Eckart and Young (1936) in the metric of the activations, as in data-aware low-rank
compression (DRONE, Chen et al., NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npprune.core.compression.compensation import Mode, compensate
from npprune.core.compression.harm import Replacement
from npprune.core.compression.statistics import Moments, Sums, cotangent, double, logits_of
from npprune.core.finite import check_logits
from npprune.core.linear import check_finite
from npprune.core.recording import recorded
from npprune.core.view import Projections, VitView
from npprune.errors import UsageError

SALIENCE = 0.5
"""Share of the token weighting by the squared loss gradient at `proj`'s output."""
FLOOR = 1e-6
"""Least eigenvalue of a second moment, over the mean one;"""
LEAST = 1e-20
"""which is held at this where nothing varies."""

Factors = tuple[Tensor, Tensor]
"""A and B of every head, [n, r, q] each."""


@dataclass
class AttentionMoments:
    """What calibration says of one block's attention, float64.

    `inputs` are the moments of `proj`'s input, `curvature` [d, d] the mean of g g^T with g the
    loss gradient at its output; `queries` and `keys` [n, q, q] the heads' second moments, keys
    counted from their image's mean. Inputs and queries are weighted by their token's share of
    |g|^2: in the last block under class-token pooling, only that token's answer counts.
    """

    inputs: Moments
    curvature: Tensor
    queries: Tensor
    keys: Tensor


@dataclass
class SmallerAttention:
    """What stays of one block's attention.

    `heads` are the kept ones, ascending; `factors` None where queries and keys keep their
    dimensions; `proj` None where all heads stay.
    """

    heads: list[int]
    query_dims: int
    factors: Factors | None = None
    proj: Replacement | None = None


def collect_attention(
    view: VitView,
    batches: Iterable[Tensor],
    *,
    generator: torch.Generator,
    on_batch: Callable[[int], None] | None = None,
) -> list[AttentionMoments]:
    """The moments of every block's attention: one forward and one backward pass a batch.

    Args:
        batches: images [b, 3, H, W] on the model's device.
        generator: source of the random signs in the loss gradient (see `statistics`).
        on_batch: called with the number of images so far.
    """
    layers = [view.attention(l) for l in range(len(view.widths))]
    sums = [_Sums() for _ in layers]
    count = 0
    for images in batches:
        with recorded(m for p in layers for m in (p.qkv, p.proj)) as seen, torch.enable_grad():
            logits = logits_of(view, images, True)
        check_logits(view, images, logits, first=count)
        v = cotangent(logits.detach(), generator)
        grads = torch.autograd.grad(logits, [seen[p.proj][1] for p in layers], v)
        for p, total, g in zip(layers, sums, grads, strict=True):
            total.add_batch(p, seen[p.qkv][1].detach(), seen[p.proj][0].detach(), g)
        count += len(images)
        if on_batch is not None:
            on_batch(count)
    return [total.finish() for total in sums]


class _Sums(Sums):
    """Sums over tokens, weighted as `AttentionMoments` says."""

    tokens = 0.0

    def add_batch(self, p: Projections, qkv: Tensor, x: Tensor, g: Tensor) -> None:
        """Add qkv's output [b, t, n (2 q + v)], proj's input [b, t, n v] and gradient [b, t, d]."""
        g, x = double(g.flatten(0, 1)), double(x.flatten(0, 1))
        size = g.square().sum(1)
        share = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        w = (1 - SALIENCE) + SALIENCE * share
        q, k, _ = p.split(qkv.movedim(-1, 0))  # [n, q, b, t]
        q, k = double(q).flatten(2), double(k - k.mean(-1, keepdim=True)).flatten(2)
        self.tokens += float(len(w))
        self.add(
            float(w.sum()),
            hidden=w @ x,
            absolute=w @ x.abs(),
            gram=(w[:, None] * x).T @ x,
            curvature=g.T @ g,
            queries=(q * w) @ q.mT,
            keys=k @ k.mT,
        )

    def finish(self) -> AttentionMoments:
        return AttentionMoments(
            self.moments(),
            self.parts["curvature"] / self.tokens,
            self.parts["queries"] / self.weight,
            self.parts["keys"] / self.tokens,
        )


def query_factors(queries: Tensor, keys: Tensor, r: int) -> Factors:
    """A and B [n, r, q] of rank r for heads with these second moments [n, q, q].

    Without the factor for the scale: A^T B is the best M itself, and the identity at full rank.

    Raises:
        UsageError: r is not in 1..q.
    """
    if not 1 <= r <= queries.shape[-1]:
        raise UsageError(f"query dimensions must be in 1..{queries.shape[-1]}, got {r}")
    (root_q, inverse_q), (root_k, inverse_k) = _roots(queries), _roots(keys)
    u, s, vh = torch.linalg.svd(root_q @ root_k)
    half = s[:, :r, None].sqrt()
    return half * (u.mT[:, :r] @ inverse_q), half * (vh[:, :r] @ inverse_k)


def weight_factors(p: Projections, r: int) -> Factors:
    """`query_factors` from the weights alone, as if the inputs were white: no calibration."""
    q, k, _ = p.split(double(p.qkv.weight.detach()))
    second = q @ q.mT
    if p.qkv.bias is not None:
        b, _, _ = p.split(double(p.qkv.bias.detach()))
        second = second + b[:, :, None] * b[:, None, :]
    return query_factors(second, k @ k.mT, r)


def shrink(
    p: Projections,
    moments: AttentionMoments,
    heads: Sequence[int],
    query_dims: int,
    *,
    mode: Mode = "least-squares",
) -> SmallerAttention:
    """The attention with these heads and so many query/key dimensions, `proj` refitted."""
    out = SmallerAttention(list(heads), query_dims)
    if query_dims < p.query_dims:
        out.factors = query_factors(moments.queries, moments.keys, query_dims)
    if len(heads) < p.heads:
        columns = [h * p.value_dims + i for h in heads for i in range(p.value_dims)]
        found = compensate(
            moments.inputs, p.proj.weight, p.proj.bias, columns, mode=mode, diagnose=False
        )
        out.proj = Replacement(
            columns, found.weight.to(p.proj.weight), found.bias.to(p.proj.weight)
        )
    return out


def stand_ins(p: Projections, smaller: SmallerAttention) -> dict[nn.Linear, Replacement]:
    """Layers of the dense sizes that give what the smaller attention gives: keys M k, and `proj`
    without the columns of the heads that go."""
    out: dict[nn.Linear, Replacement] = {}
    if smaller.factors is not None:
        a, b = smaller.factors
        weight, bias = p.qkv.weight, p.qkv.bias
        out[p.qkv] = Replacement(
            range(p.qkv.in_features),
            _mixed(p, weight, None, a.mT @ b),
            weight.new_zeros(len(weight)) if bias is None else _mixed(p, bias, None, a.mT @ b),
        )
    if smaller.proj is not None:
        out[p.proj] = smaller.proj
    return out


def smaller_qkv(p: Projections, smaller: SmallerAttention) -> tuple[Tensor, Tensor | None]:
    """Weight [m (2 r + v), d] and bias of `qkv` for the m heads that stay, the scale folded in."""
    a, b = None, None
    if smaller.factors is not None:
        fold = (smaller.query_dims / p.query_dims) ** 0.25
        a, b = fold * smaller.factors[0], fold * smaller.factors[1]
    weight = _mixed(p, p.qkv.weight, a, b, smaller.heads)
    bias = None if p.qkv.bias is None else _mixed(p, p.qkv.bias, a, b, smaller.heads)
    return weight, bias


def _mixed(
    p: Projections,
    rows: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Rows of `qkv` (weight or bias) with A on the queries and B on the keys; of some heads."""
    parts = []
    for part, f in zip(p.split(rows.detach()), (a, b, None), strict=True):
        if f is not None:
            wide = part.to(f.device, f.dtype)
            part = torch.einsum("nrq,nq...->nr...", f, wide).to(rows)
        parts.append((part if heads is None else part[list(heads)]).flatten(0, 1))
    return torch.cat(parts)


def _roots(c: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of [n, q, q] and of its inverse, eigenvalues held off zero."""
    check_finite(c)
    values, vectors = torch.linalg.eigh(double(c))
    least = FLOOR * values.mean(-1, keepdim=True).clamp_min(LEAST)
    root = values.clamp_min(least).sqrt()[:, None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT

"""Smaller attention: fewer heads, fewer query/key dimensions that keep the logits, and fewer value
dimensions that keep the output.

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

Values. What a head adds to the stream is P o, with o the mean of its values that attention takes
and P its columns of `proj`. With C the covariance of o, the r combinations of values that lose
least of it (least squared error, `proj` refitted) are the first r rows of

    C^(1/2) P^T P C^(1/2) = V diag(s) V^T, s falling
    T = V^T C^(-1/2), rows scaled to length 1

The weights of attention add up to 1, so T o is the same mean of T v: T is folded into the rows of
`qkv` and P T^(-1) into `proj`, and of both the first r dimensions stay, as heads do.

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
from npprune.core.compression.statistics import Moments, Sums, Total, double, outputs_of
from npprune.core.finite import check_outputs
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
    |g|^2: in the last block under class-token pooling, only that token's answer counts. `queries`
    and `keys` are None where they cannot be narrowed.
    """

    inputs: Moments
    curvature: Tensor
    queries: Tensor | None
    keys: Tensor | None


@dataclass
class SmallerAttention:
    """What stays of one block's attention.

    `heads` are the kept ones, ascending; `factors` None where queries and keys keep their
    dimensions; `basis` T [n, v, v] of every head's values, of which the first `query_dims` stay,
    None where all do; `proj` None where all heads and values stay.
    """

    heads: list[int]
    query_dims: int
    factors: Factors | None = None
    proj: Replacement | None = None
    basis: Tensor | None = None


def collect_attention(
    view: VitView,
    batches: Iterable[Tensor],
    *,
    generator: torch.Generator,
    on_batch: Callable[[int], None] | None = None,
    total: Total | None = None,
) -> list[AttentionMoments]:
    """The moments of every block's attention: one forward and one backward pass a batch.

    Args:
        batches: images [b, 3, H, W] on the model's device.
        generator: source of the random signs in the loss gradient (see `statistics`).
        on_batch: called with the number of images so far.
        total: adds the sums of other processes, which have other batches.
    """
    layers = [view.attention(l) for l in range(len(view.widths))]
    sums = [_Sums() for _ in layers]
    count = 0
    for images in batches:
        read = [m for p in layers for m in (p.qkv, p.proj) if m is not None]
        with recorded(read) as seen, torch.enable_grad():
            outputs = outputs_of(view, images, True)
        check_outputs(view, images, outputs, first=count)
        v = view.objective.cotangent(outputs.detach(), generator)
        grads = torch.autograd.grad(outputs, [seen[p.proj][1] for p in layers], v)
        for p, s, g in zip(layers, sums, grads, strict=True):
            qkv = None if p.qkv is None else seen[p.qkv][1].detach()
            s.add_batch(p, qkv, seen[p.proj][0].detach(), g)
        count += len(images)
        if on_batch is not None:
            on_batch(count)
    where = double(layers[0].proj.weight[:0]).device  # of sums, had this process any images or not
    return [s.finish(total, where) for s in sums]


class _Sums(Sums):
    """Sums over tokens, weighted as `AttentionMoments` says."""

    tokens = 0.0

    def add_batch(self, p: Projections, qkv: Tensor | None, x: Tensor, g: Tensor) -> None:
        """Add qkv's output [b, t, n (2 q + v)], proj's input [b, t, n v] and gradient [b, t, d]."""
        g, x = double(g.flatten(0, 1)), double(x.flatten(0, 1))
        size = g.square().sum(1)
        share = size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)
        w = (1 - SALIENCE) + SALIENCE * share
        self.tokens += float(len(w))
        self.add(
            float(w.sum()),
            hidden=w @ x,
            absolute=w @ x.abs(),
            gram=(w[:, None] * x).T @ x,
            curvature=g.T @ g,
        )
        if qkv is not None:
            q, k, _ = p.split(qkv.movedim(-1, 0))  # [n, q, b, t]
            q, k = double(q).flatten(2), double(k - k.mean(-1, keepdim=True)).flatten(2)
            self.add(queries=(q * w) @ q.mT, keys=k @ k.mT)

    def finish(self, total: Total | None, where: torch.device) -> AttentionMoments:
        if total is not None:
            self.parts["tokens"] = torch.tensor(self.tokens, dtype=torch.float64)
            self.share(total)
            self.tokens = float(self.parts.pop("tokens"))
            self.parts = {name: part.to(where) for name, part in self.parts.items()}
        return AttentionMoments(
            self.moments(),
            self.parts["curvature"] / self.tokens,
            self.parts["queries"] / self.weight if "queries" in self.parts else None,
            self.parts["keys"] / self.tokens if "keys" in self.parts else None,
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


def value_basis(covariance: Tensor, weight: Tensor, heads: int) -> Tensor:
    """T of every head [n, v, v]: combinations of its values, the one that matters most first.

    Args:
        covariance: of `proj`'s inputs [n v, n v]; what heads have in common is left out.
        weight: `proj`'s [d, n v].
    """
    columns = double(weight.detach()).to(covariance.device).unflatten(1, (heads, -1))
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    root, inverse = _roots(blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0))
    form = root @ torch.einsum("dnu,dnv->nuv", columns, columns) @ root
    basis = torch.linalg.eigh((form + form.mT) / 2).eigenvectors.flip(-1).mT @ inverse
    return basis / basis.norm(dim=-1, keepdim=True)


def shrink(
    p: Projections,
    moments: AttentionMoments,
    heads: Sequence[int],
    query_dims: int,
    *,
    values: bool = False,
    mode: Mode = "least-squares",
) -> SmallerAttention:
    """The attention with these heads and so many query/key dimensions, `proj` refitted.

    values: they are narrowed to as many dimensions.
    """
    out = SmallerAttention(list(heads), query_dims)
    if query_dims < p.query_dims:
        assert moments.queries is not None
        assert moments.keys is not None
        out.factors = query_factors(moments.queries, moments.keys, query_dims)
    if values and query_dims < p.value_dims:
        out.basis = value_basis(moments.inputs.covariance, p.proj.weight, p.heads)
    if len(heads) < p.heads or out.basis is not None:
        out.proj = _smaller_proj(p, moments.inputs, out, mode)
    return out


def shrink_by_weights(p: Projections, query_dims: int, *, values: bool = False) -> SmallerAttention:
    """The same with all heads from the weights alone, as if the inputs were white."""
    out = SmallerAttention(list(range(p.heads)), query_dims, weight_factors(p, query_dims))
    if values:
        rows = p.split(double(p.joint.weight.detach()))[2]
        covariance = torch.block_diag(*(rows @ rows.mT))
        mean = covariance.new_zeros(len(covariance))
        if p.joint.bias is not None:
            mean = p.split(double(p.joint.bias.detach()))[2].flatten()
        out.basis = value_basis(covariance, p.proj.weight, p.heads)
        out.proj = _smaller_proj(p, Moments(mean, covariance, mean.abs(), 1.0), out, "mean")
    return out


def weight_factors(p: Projections, r: int) -> Factors:
    """`query_factors` from the weights alone, as if the inputs were white: no calibration."""
    q, k, _ = p.split(double(p.joint.weight.detach()))
    second = q @ q.mT
    if p.joint.bias is not None:
        b, _, _ = p.split(double(p.joint.bias.detach()))
        second = second + b[:, :, None] * b[:, None, :]
    return query_factors(second, k @ k.mT, r)


def _smaller_proj(
    p: Projections, inputs: Moments, smaller: SmallerAttention, mode: Mode
) -> Replacement:
    """`proj` for the heads and value dimensions that stay."""
    weight, whole, stay = p.proj.weight, None, p.value_dims
    if smaller.basis is not None:
        stay = smaller.query_dims
        turn = torch.block_diag(*smaller.basis).to(inputs.covariance)
        back = torch.block_diag(*torch.linalg.inv(smaller.basis)).to(turn)
        weight = double(weight.detach()).to(turn) @ back
        whole = weight.to(p.proj.weight)
        inputs = Moments(
            turn @ inputs.mean, turn @ inputs.covariance @ turn.T, inputs.mean_absolute,
            inputs.tokens,
        )  # fmt: skip
    columns = [h * p.value_dims + i for h in smaller.heads for i in range(stay)]
    found = compensate(inputs, weight, p.proj.bias, columns, mode=mode, diagnose=False)
    like = p.proj.weight
    return Replacement(columns, found.weight.to(like), found.bias.to(like), whole)


def stand_ins(p: Projections, smaller: SmallerAttention) -> dict[nn.Linear, Replacement]:
    """Layers of the dense sizes that give what the smaller attention gives: keys M k, values T v,
    and `proj` without the columns of what goes."""
    out: dict[nn.Linear, Replacement] = {}
    if smaller.factors is not None:
        a, b = smaller.factors
        weight, bias, mixed = p.joint.weight, p.joint.bias, (None, a.mT @ b, smaller.basis)
        out[p.joint] = Replacement(
            range(p.joint.in_features),
            _mixed(p, weight, mixed),
            weight.new_zeros(len(weight)) if bias is None else _mixed(p, bias, mixed),
        )
    if smaller.proj is not None:
        out[p.proj] = smaller.proj
    return out


def smaller_qkv(p: Projections, smaller: SmallerAttention) -> tuple[Tensor, Tensor | None]:
    """Weight [m (2 r + v), d] and bias of `qkv` for the m heads that stay, the scale folded in."""
    a, b, t = None, None, None
    if smaller.factors is not None:
        fold = (smaller.query_dims / p.query_dims) ** 0.25
        a, b = fold * smaller.factors[0], fold * smaller.factors[1]
    if smaller.basis is not None:
        t = smaller.basis[:, : smaller.query_dims]
    weight = _mixed(p, p.joint.weight, (a, b, t), smaller.heads)
    bias = None if p.joint.bias is None else _mixed(p, p.joint.bias, (a, b, t), smaller.heads)
    return weight, bias


def _mixed(
    p: Projections,
    rows: Tensor,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None],
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Rows of `qkv` (weight or bias), queries, keys and values multiplied by their factors
    [n, r, q or v]; of some heads."""
    parts = []
    for part, f in zip(p.split(rows.detach()), factors, strict=True):
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

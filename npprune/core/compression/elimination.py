"""Greedy elimination of neurons by what their removal costs after the best repair.

For one block, with S the covariance of the hidden units, W = fc2.weight [d, h] and G the curvature
of the loss at the block's output, A = (S + lambda I)^-1. Removing neuron j and refitting the rest
changes the output's weighted squared error by exactly

    cost_j = (W^T G W)_jj / A_jj

so the cheapest neuron goes, and both are brought up to date:

    W <- W - W_:j A_j: / A_jj          A <- A - A_:j A_j: / A_jj

Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), applied to whole columns as in SparseGPT
(Frantar and Alistarh, 2023) and ZipLM (Kurtic et al., 2023); the curvature at the output as in
K-FAC (Martens and Grosse, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npprune.core.linear import check_finite, factor, inverted, regularised, solved
from npprune.errors import UsageError

SHRINKAGE = 1e-3
"""lambda over the covariance's mean diagonal."""

_TINY = 1e-300


@dataclass
class Elimination:
    """The order in which neurons go, and what each step cost.

    `order` int64 [h]: first to go first; the neurons that stay at width k are `order[h - k:]`.
    `costs` float64 [h]: the rise of the weighted squared error by each removal (without prior),
    inf for protected neurons, which stand at the end of the order.
    """

    order: Tensor
    costs: Tensor

    def keep(self, k: int) -> list[int]:
        """The k neurons that stay, ascending."""
        return sorted(self.order[len(self.order) - k :].tolist())

    def scores(self) -> Tensor:
        """A score [h], higher = keep: the cost at which a neuron went, never falling along the
        order, so that ranking by it gives the order back; the protected ones come last."""
        scores = torch.empty(len(self.order), dtype=torch.float64)
        level = 0.0
        for j, cost in zip(self.order.tolist(), self.costs.tolist(), strict=True):
            level = max(cost if math.isfinite(cost) else 0.0, level * (1 + 1e-12), _TINY)
            scores[j] = level
            level = math.nextafter(level, math.inf)
        return scores


def eliminate(
    covariance: Tensor,
    weight: Tensor,
    curvature: Tensor | None = None,
    *,
    shrinkage: float = SHRINKAGE,
    damping: float = 0.0,
    protected: Sequence[int] = (),
    prior: Tensor | None = None,
) -> Elimination:
    """Greedy elimination of one block's neurons.

    Args:
        covariance: S [h, h] of the hidden activations.
        weight: fc2.weight [d, h].
        curvature: G [d, d]; None: the identity (plain reconstruction error).
        shrinkage: lambda over S's mean diagonal.
        damping: identity added to the curvature, over G's mean diagonal. A little guards against
            directions that looked harmless only to first order.
        protected: neurons that never go.
        prior: positive factors [h] on the costs: above 1 goes later.

    Raises:
        UsageError: shapes that do not fit, or a prior that is not positive.
    """
    h = weight.shape[1]
    _check(covariance, weight, curvature, prior)
    a = inverse(covariance, shrinkage)
    u = weight.detach().to(a, copy=True)
    if curvature is not None:
        u = square_root(damped(curvature.to(a), damping)) @ u
    factor = torch.ones(h, dtype=a.dtype, device=a.device) if prior is None else prior.to(a)
    fixed = torch.zeros(h, dtype=torch.bool, device=a.device)
    fixed[list(protected)] = True
    names = torch.arange(h, device=a.device)
    gone = torch.zeros(h, dtype=torch.bool, device=a.device)
    order: list[int] = []
    costs: list[float] = []
    floor = torch.finfo(a.dtype).tiny
    removable = h - int(fixed.sum())
    left = h
    while len(order) < removable:
        cost = u.square().sum(dim=0) / a.diagonal().clamp_min(floor)
        j = int((cost * factor).masked_fill(gone | fixed, torch.inf).argmin())
        order.append(int(names[j]))
        costs.append(float(cost[j]))
        row = a[j] / a[j, j]
        u.addr_(u[:, j].clone(), row, alpha=-1)
        a.addr_(a[:, j].clone(), row, alpha=-1)
        gone[j] = True
        left -= 1
        if left < 0.8 * len(gone):  # drop what is gone, so that later steps cost less
            stay = (~gone).nonzero()[:, 0]
            a, u = a[stay][:, stay].contiguous(), u[:, stay].contiguous()
            factor, fixed, names, gone = factor[stay], fixed[stay], names[stay], gone[stay]
    kept = sorted(set(range(h)) - set(order))
    return Elimination(
        torch.tensor(order + kept),
        torch.tensor(costs + [torch.inf] * len(kept), dtype=torch.float64),
    )


def eliminate_groups(
    covariance: Tensor,
    weight: Tensor,
    groups: int,
    curvature: Tensor | None = None,
    *,
    shrinkage: float = SHRINKAGE,
) -> Elimination:
    """The same with whole groups of columns: attention heads at the input of `proj`.

    Removing the columns J and refitting the rest costs tr(W_J^T G W_J (A_JJ)^-1).

    Args:
        covariance: S [a, a] of the layer's inputs.
        weight: its weight [d, a].
        groups: into how many equal runs of neighbouring columns the inputs fall.
        curvature: G [d, d] at the layer's output; None: the identity.
        shrinkage: lambda over S's mean diagonal.

    Returns: order and costs of the groups.
    """
    _check(covariance, weight, curvature, None)
    a = inverse(covariance, shrinkage)
    u = weight.detach().to(a, copy=True)
    if curvature is not None:
        u = square_root(curvature.to(a)) @ u
    columns = list(torch.arange(len(a), device=a.device).chunk(groups))
    left, order, costs = list(range(groups)), [], []
    while left:
        found = []
        for g in left:
            j = columns[g]
            found.append(float((u[:, j].T @ u[:, j]).mul(inverted(a[j][:, j])).sum()))
        cheapest = min(range(len(left)), key=lambda i: found[i])
        g = left.pop(cheapest)
        order.append(g)
        costs.append(found[cheapest])
        j = columns[g]
        rows = solved(a[j][:, j], a[j])
        u, a = u - u[:, j] @ rows, a - a[:, j] @ rows
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64))


def inverse(covariance: Tensor, shrinkage: float) -> Tensor:
    """(S + lambda I)^-1 in float64, lambda = shrinkage x the mean diagonal of S [h, h].

    A covariance of zeros (a dead block) gets lambda = 1, so that the inverse exists.
    """
    return torch.cholesky_inverse(factor(regularised(covariance.to(torch.float64), shrinkage)))


def damped(matrix: Tensor, damping: float) -> Tensor:
    """matrix + damping x its mean diagonal x I, [d, d]."""
    if not damping:
        return matrix
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + damping * matrix.diagonal().mean() * eye


def square_root(matrix: Tensor) -> Tensor:
    """R with R^T R = matrix, for a positive semidefinite [d, d]."""
    check_finite(matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def _check(
    covariance: Tensor, weight: Tensor, curvature: Tensor | None, prior: Tensor | None
) -> None:
    d, h = weight.shape
    if covariance.shape != (h, h):
        raise UsageError(f"covariance must be [{h}, {h}], got {list(covariance.shape)}")
    if curvature is not None and curvature.shape != (d, d):
        raise UsageError(f"curvature must be [{d}, {d}], got {list(curvature.shape)}")
    if prior is not None and (prior.shape != (h,) or not bool((prior > 0).all())):
        raise UsageError(f"prior must be {h} positive factors, got {list(prior.shape)}")

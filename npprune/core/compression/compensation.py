"""The closed-form change to `fc2` that keeps a block's output close when neurons go.

For the kept set K and the removed R, mu and S the mean and covariance of the hidden units:

    none            W_K = W_:K                                      b' = b
    mean            W_K = W_:K                                      b' = b + W_:R mu_R
    least-squares   W_K = W_:K + W_:R S_RK (S_KK + lambda I)^-1     b' = b + W mu - W_K mu_K

The last is the ridge regression of the dense output on the kept units, shrunk towards the original
columns: with lambda = 0 it equals W S_:K S_KK^-1, and as lambda grows it becomes `mean`. The
curvature of the loss does not enter: weighting the outputs by a matrix of full rank leaves the
minimiser of a linear least-squares problem where it is.

`sequential` solves the same problem from moments collected on the network whose earlier
blocks are pruned already, where the error e they left may be regressed on too: W_:R S_RK gains
Cov(e, h_K), and b' gains mean e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.statistics import Moments
from npprune.core.linear import check_finite, factor, ridge
from npprune.errors import UsageError
from npprune.words import check_word

Mode = Literal["none", "mean", "least-squares"]
SHRINKAGES: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


@dataclass
class Cross:
    """What the output should gain beyond W h + b: e, by its mean [d] and covariance with h [d, h].

    Collected on a network whose earlier blocks are pruned (see `sequential`).
    """

    mean: Tensor
    covariance: Tensor


@dataclass
class Compensated:
    """The new second layer: weight [d, k] and bias [d], float64; how it was found.

    `error` is the share of the dense output's variance that is lost on the calibration tokens;
    `condition` the condition number of the system solved (1 where none was).
    """

    weight: Tensor
    bias: Tensor
    shrinkage: float
    condition: float
    error: float


def compensate(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    keep: Sequence[int],
    *,
    mode: Mode = "least-squares",
    shrinkage: float = SHRINKAGE,
    cross: Cross | None = None,
    diagnose: bool = True,
) -> Compensated:
    """The second layer for the kept neurons.

    Args:
        moments: mean and covariance of the block's hidden units.
        weight: fc2.weight [d, h].
        bias: fc2.bias [d], None where there is none (the result has one).
        keep: the neurons that stay, ascending.
        shrinkage: lambda over the mean diagonal of S (`least-squares` only).
        cross: an error to make up for as well (`least-squares` only).
        diagnose: compute `condition` and `error` (NaN otherwise); takes longer than the refit.

    Raises:
        UsageError: an unknown mode, or a keep set that does not fit.
    """
    check_word("compensation", mode, get_args(Mode))
    w, kept, removed, b = _prepare(moments, weight, bias, keep)
    condition, w_k = 1.0, w[:, kept]
    if mode == "least-squares" and (len(removed) or cross is not None):
        w_k, condition = _refit(
            moments.covariance.to(w), w, kept, removed, shrinkage, cross, diagnose
        )
    if mode != "none":
        mu = moments.mean.to(w)
        # exact where nothing changes: only differences enter
        b = b + w[:, removed] @ mu[removed] - (w_k - w[:, kept]) @ mu[kept]
    if mode == "least-squares" and cross is not None:
        b = b + cross.mean.to(b)
    lost = math.nan
    if diagnose:
        lost = error(moments, w, w_k, keep, shift=None if mode != "none" else removed)
    return Compensated(w_k, b, shrinkage if mode == "least-squares" else 0.0, condition, lost)


def error(
    moments: Moments,
    weight: Tensor,
    weight_kept: Tensor,
    keep: Sequence[int],
    *,
    curvature: Tensor | None = None,
    shift: Tensor | None = None,
) -> float:
    """Share of the output's variance lost: tr(G E S E^T) / tr(G W S W^T), E = W - [W_K, 0].

    `shift` names removed neurons whose mean is not folded into the bias; it counts as error.
    """
    s = moments.covariance.to(torch.float64)
    w = weight.detach().to(s)
    change = w.clone()
    change[:, list(keep)] -= weight_kept.to(s)
    lost, whole = change @ s @ change.T, w @ s @ w.T
    if shift is not None:
        mean = w[:, shift] @ moments.mean.to(s)[shift]
        lost = lost + torch.outer(mean, mean)
    if curvature is not None:
        lost, whole = curvature.to(s) @ lost, curvature.to(s) @ whole
    total = float(whole.trace())
    return float(lost.trace()) / total if total > 0 else 0.0


def choose_shrinkage(
    fit: Moments,
    held_out: Moments,
    weight: Tensor,
    keep: Sequence[int],
    *,
    cross: Cross | None = None,
    held_out_cross: Cross | None = None,
    candidates: Sequence[float] = SHRINKAGES,
) -> tuple[float, dict[float, float]]:
    """The shrinkage whose refit on `fit` loses least on `held_out`, and every candidate's loss.

    `fit` and `held_out` are moments of disjoint images, with the errors to make up for next to
    them where there are any. The loss is the mean squared error of W h + e, less the spread of e,
    which no candidate changes.
    """
    s = held_out.covariance.to(torch.float64)
    scores = {}
    for c in candidates:
        found = compensate(fit, weight, None, keep, shrinkage=c, cross=cross, diagnose=False)
        change = weight.detach().to(s, copy=True)  # what is lost: change h + e - bias
        change[:, list(keep)] -= found.weight
        offset = change @ held_out.mean.to(s) - found.bias
        lost = ((change @ s) * change).sum()
        if held_out_cross is not None:
            offset = offset + held_out_cross.mean.to(s)
            lost = lost + 2 * (change * held_out_cross.covariance.to(s)).sum()
        scores[c] = float(lost + offset.square().sum())
    check_finite(torch.tensor(list(scores.values())))
    return min(scores, key=lambda c: scores[c]), scores


def _prepare(
    moments: Moments, weight: Tensor, bias: Tensor | None, keep: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d, h = weight.shape
    if moments.covariance.shape != (h, h):
        raise UsageError(f"moments must be of {h} units, got {list(moments.covariance.shape)}")
    kept = torch.as_tensor(list(keep), dtype=torch.long)
    if (
        not len(kept)
        or int(kept.min()) < 0
        or int(kept.max()) >= h
        or bool((kept.diff() <= 0).any())
    ):
        raise UsageError(f"keep must be ascending neurons of 0..{h - 1}, got {list(keep)[:8]}")
    device = moments.covariance.device
    w = weight.detach().to(device, torch.float64)
    stays = torch.zeros(h, dtype=torch.bool)
    stays[kept] = True
    removed = (~stays).nonzero()[:, 0].to(device)
    b = torch.zeros(d, dtype=w.dtype, device=device) if bias is None else bias.detach().to(w)
    return w, kept.to(device), removed, b


def _refit(
    s: Tensor,
    w: Tensor,
    kept: Tensor,
    removed: Tensor,
    shrinkage: float,
    cross: Cross | None,
    diagnose: bool,
) -> tuple[Tensor, float]:
    """W_:K + (W_:R S_RK + Cov(e, h_K)) (S_KK + lambda I)^-1, and the condition of the bracket."""
    eye = torch.eye(len(kept), dtype=s.dtype, device=s.device)
    system = s[kept][:, kept] + ridge(s, shrinkage) * eye
    right = s[kept][:, removed] @ w[:, removed].T
    if cross is not None:
        right = right + cross.covariance.to(s)[:, kept].T
    solved = torch.cholesky_solve(right, factor(system))
    if not diagnose:
        return w[:, kept] + solved.T, math.nan
    eigen = torch.linalg.eigvalsh(system)
    least = eigen[0].clamp_min(float(eigen[-1]) * torch.finfo(eigen.dtype).eps)
    return w[:, kept] + solved.T, float(eigen[-1] / least)

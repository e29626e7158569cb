"""Symmetric systems made of calibration statistics, solved whatever the images were.

Few images, or images that do not differ, leave covariances without full rank, and rounding then
makes them indefinite. Where the factorization goes through as it is, nothing is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npprune.errors import ModelError

JITTER = 1e-12
"""The first one tried, over a bound of the matrix's eigenvalues; each next one is ten times it."""


def ridge(covariance: Tensor, shrinkage: float) -> float:
    """lambda = shrinkage x the mean diagonal of a covariance [h, h]; 1 for one of zeros, where
    nothing is left to shrink towards and the system must only have a solution."""
    scale = float(covariance.diagonal().mean())
    return shrinkage * scale if scale > 0 else 1.0


def regularised(covariance: Tensor, shrinkage: float) -> Tensor:
    """S + lambda I, lambda as `ridge` says."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return covariance + ridge(covariance, shrinkage) * eye


def factor(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric [h, h].

    Where rounding has left it indefinite: that of the matrix with the least multiple of the
    identity added, in steps of ten, that makes it positive definite.

    Raises:
        ModelError: a value is not finite.
    """
    check_finite(matrix)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    jitter = JITTER
    bound = float(matrix.abs().sum(dim=1).max())  # Gershgorin: no eigenvalue is beyond it
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while bool(failed):
        added = jitter * max(bound, torch.finfo(matrix.dtype).tiny / jitter)
        lower, failed = torch.linalg.cholesky_ex(matrix + added * eye)
        jitter *= 10
    return lower


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """M^-1 B for a symmetric positive semidefinite M [h, h] and B [h, n]; where M is singular, that
    of the nearest multiple of the identity added, as in `factor`."""
    found, failed = torch.linalg.solve_ex(matrix, right)
    if bool(failed) or not math.isfinite(float(found.sum())):
        found = torch.cholesky_solve(right, factor((matrix + matrix.T) / 2))
    return found


def inverted(matrix: Tensor) -> Tensor:
    """M^-1, likewise."""
    found, failed = torch.linalg.inv_ex(matrix)
    if bool(failed) or not math.isfinite(float(found.sum())):
        found = torch.cholesky_inverse(factor((matrix + matrix.T) / 2))
    return found


def check_finite(matrix: Tensor) -> None:
    """ModelError where a matrix of statistics holds a value that is not finite."""
    if not math.isfinite(float(matrix.sum())):
        raise ModelError(
            "the calibration statistics must be finite, got NaN or infinity",
            hint="an image or the weights hold such values, or the network overflows in its "
            "precision: try float32",
        )

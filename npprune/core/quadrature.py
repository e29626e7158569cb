"""Rules for the integral over alpha in [0, 1] along which activations are scaled."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

Rule = Literal["gauss-radau", "gauss-legendre", "left-riemann"]

DEFAULT_POINTS: dict[str, int] = {"gauss-radau": 5, "gauss-legendre": 5, "left-riemann": 20}
"""Gauss-Radau with 5 points is the default: as good as converged at the class token, and cheaper
than it looks, since its last point is the clean run. At the patches, where p is steeper in alpha,
8 points are as good. Left-Riemann with 20 is the paper's setting."""


def quadrature(rule: Rule, points: int | None = None) -> tuple[Tensor, Tensor]:
    """Nodes and weights [m] of a rule on [0, 1], in float64; the weights add up to 1.

    Exact for polynomials of degree 2m - 1 (Gauss-Legendre), 2m - 2 (Gauss-Radau, whose last node
    is 1 exactly; Abramowitz & Stegun 25.4.31, mirrored) or 0.

    Raises:
        ValueError: unknown rule, or fewer than one point.
    """
    if rule not in DEFAULT_POINTS:
        raise ValueError(f"`quadrature` must be one of {', '.join(DEFAULT_POINTS)}, got {rule!r}")
    m = DEFAULT_POINTS[rule] if points is None else points
    if m < 1:
        raise ValueError(f"`points` must be at least 1, got {m}")
    if rule == "left-riemann":
        return torch.arange(m, dtype=torch.float64) / m, torch.full((m,), 1 / m).double()
    if rule == "gauss-legendre":
        nodes, weights = legendre.leggauss(m)  # on [-1, 1]
    else:
        before, after = np.eye(m + 1)[m - 1 :]  # the Legendre polynomials of degree m - 1 and m
        nodes = legendre.legroots(before - after)
        nodes[-1] = 1.0  # where both are 1
        weights = (1 + nodes) / (m * legendre.legval(nodes, before)) ** 2
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)

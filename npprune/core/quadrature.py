"""Rules for the integral over alpha in [0, 1] along which activations are scaled."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Rule = Literal["gauss-legendre", "left-riemann"]

DEFAULT_POINTS: dict[str, int] = {"gauss-legendre": 5, "left-riemann": 20}
"""Gauss-Legendre with 5 points is the default, and as good as converged at the class token; at the
patches, where p is steeper in alpha, 8 points are. Left-Riemann with 20 is the paper's setting."""


def quadrature(rule: Rule, points: int | None = None) -> tuple[Tensor, Tensor]:
    """Nodes and weights [m] of a rule on [0, 1], in float64; the weights add up to 1.

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
    nodes, weights = np.polynomial.legendre.leggauss(m)  # on [-1, 1]
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)

"""Rules for the integral over alpha in [0, 1] along which activations are scaled."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

Rule = Literal["gauss-radau", "gauss-legendre", "left-riemann"]

RULES: tuple[str, ...] = get_args(Rule)
"""Gauss-Radau is the default: its last point is the clean run, which costs almost nothing.
Left-Riemann is the paper's."""


IMAGE_POINTS = 20
"""The default where the input image itself is scaled, from black: 98 to 100 % of the neurons that
64 points choose, by any rule; 4 of Gauss-Radau give 76 %."""


def default_points(rule: str, scope: str) -> int:
    """Measured against 64 points: 4 of Gauss-Radau (5 of Legendre) at the class token, 7 (8) at
    the patches, where p is steeper in alpha. 20 for left-Riemann, as in the paper."""
    if rule == "left-riemann":
        return 20
    if rule == "gauss-radau":
        return 4 if scope == "cls" else 7
    return 5 if scope == "cls" else 8


def first_block_points(rule: str, scope: str) -> int:
    """The default in block 0: the patches need more points there, and it can have its own."""
    return 12 if rule == "gauss-radau" and scope != "cls" else default_points(rule, scope)


def quadrature(rule: Rule, points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [m] of a rule on [0, 1], in float64; the weights add up to 1.

    Exact for polynomials of degree 2m - 1 (Gauss-Legendre), 2m - 2 (Gauss-Radau, whose last node
    is 1 exactly; Abramowitz & Stegun 25.4.31, mirrored) or 0.

    Raises:
        ValueError: unknown rule, or fewer than one point.
    """
    if rule not in RULES:
        raise ValueError(f"`quadrature` must be one of {', '.join(RULES)}, got {rule!r}")
    if points < 1:
        raise ValueError(f"`points` must be at least 1, got {points}")
    m = points
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

"""Rules for the integral over alpha in [0, 1] along which activations are scaled."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

Rule = Literal["gauss-radau", "mapped-radau", "gauss-legendre", "left-riemann"]
RuleOrAuto = Rule | Literal["auto"]

RULES: tuple[str, ...] = get_args(Rule)
"""Left-Riemann is the paper's."""

END_AT_ONE: tuple[Rule, ...] = ("gauss-radau", "mapped-radau")
"""Their last point is the clean run, where one backward pass serves all blocks."""

IMAGE_POINTS = 20
"""The default where the input image itself is scaled, from black: 98 to 100 % of the neurons that
64 points choose, by any rule; 4 of Gauss-Radau give 76 %."""


def rule_for(rule: RuleOrAuto, scope: str) -> Rule:
    """What `auto` stands for: Gauss-Radau at the class token, mapped at the patches, where p rises
    steeply from alpha = 0. Each needs the fewest points there."""
    if rule != "auto":
        return rule
    return "gauss-radau" if scope == "cls" else "mapped-radau"


def default_points(rule: RuleOrAuto, scope: str) -> int:
    """Measured against many points: 4 of Gauss-Radau, 5 mapped or of Legendre at the class token;
    6 mapped, 7 of Gauss-Radau, 8 of Legendre at the patches. 20 for left-Riemann, as in the
    paper."""
    rule = rule_for(rule, scope)
    if rule == "left-riemann":
        return 20
    if scope == "cls":
        return 4 if rule == "gauss-radau" else 5
    return {"mapped-radau": 6, "gauss-radau": 7}.get(rule, 8)


def first_block_points(rule: RuleOrAuto, scope: str) -> int:
    """The default in block 0: the patches need more points there, and it can have its own."""
    radau = rule_for(rule, scope) in END_AT_ONE
    return 12 if radau and scope != "cls" else default_points(rule, scope)


def quadrature(rule: Rule, points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [m] of a rule on [0, 1], in float64; the weights add up to 1.

    Exact for polynomials of degree 2m - 1 (Gauss-Legendre), 2m - 2 (Gauss-Radau, whose last node
    is 1 exactly; Abramowitz & Stegun 25.4.31, mirrored) or 0. Mapped Gauss-Radau is that rule in
    t, with alpha = t / (2 - t) and dalpha = 2 / (2 - t)^2 dt: its nodes are denser towards 0,
    where p is steepest.

    Raises:
        ValueError: unknown rule, or fewer than one point.
    """
    if rule not in RULES:
        raise ValueError(f"`quadrature` must be one of auto, {', '.join(RULES)}, got {rule!r}")
    if points < 1:
        raise ValueError(f"`points` must be at least 1, got {points}")
    m = points
    if rule == "mapped-radau":
        t, dt = quadrature("gauss-radau", m)
        dalpha = 2 * dt / (2 - t) ** 2
        return t / (2 - t), dalpha / dalpha.sum()
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

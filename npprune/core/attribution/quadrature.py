"""Rules for the integral over alpha in [0, 1] along which activations are scaled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import legendre
from torch import Tensor

from npprune.errors import UsageError
from npprune.words import (
    ACCUMULATIONS,
    RULES,
    SCOPES,
    Accumulation,
    Rule,
    RuleOrAuto,
    Scope,
    ScopeOrAuto,
    check_word,
)

END_AT_ONE: tuple[Rule, ...] = ("gauss-radau", "mapped-radau")
"""Their last point is the clean run, where one backward pass serves all blocks."""

POINTS: dict[Rule, tuple[int, int]] = {
    "gauss-radau": (4, 7),
    "mapped-radau": (5, 6),
    "gauss-legendre": (5, 8),
    "left-riemann": (20, 20),
}
"""The defaults, at the class token and elsewhere: measured against many points. Left-Riemann's are
the paper's."""

FIRST_POINTS = 12
"""The default of the Radau rules in block 0 at other tokens than the class token: they need more
there, and nothing that stays depends on them."""

IMAGE_POINTS = 20
"""The default where the input image itself is scaled, from black: 98 to 100 % of the neurons that
64 points choose, by any rule; 4 of Gauss-Radau give 76 %."""


@dataclass(frozen=True)
class Integral:
    """Which activations a search scales, along which points, and whose gradients it sums.

    scope: the tokens at which neurons are read and scaled. rule: the quadrature over alpha.
    points: of the integral; first_points: in block 0, where there is no path yet; image_points:
    where the input image is scaled instead of neurons. accumulation: `sum` lets all K units of a
    block contribute to the joint sums (the formula); `last` only the K-th, as the paper's released
    program does.
    """

    scope: Scope
    rule: Rule
    points: int
    first_points: int
    image_points: int
    accumulation: Accumulation = "sum"

    @classmethod
    def of(
        cls,
        pooled: Scope,
        scope: ScopeOrAuto = "auto",
        rule: RuleOrAuto = "auto",
        points: int | None = None,
        accumulation: Accumulation = "sum",
    ) -> Integral:
        """From the words that a user may type.

        pooled: the tokens that the classifier reads, which `auto` follows. The rule's `auto` is
        Gauss-Radau at the class token, mapped at the patches, where p rises steeply from
        alpha = 0: each needs the fewest points there. points: None takes the rule's own.

        Raises:
            UsageError: an unknown word.
        """
        check_word("scope", scope, ("auto", *SCOPES))
        check_word("quadrature", rule, ("auto", *RULES))
        check_word("accumulation", accumulation, ACCUMULATIONS)
        tokens = pooled if scope == "auto" else scope
        at_class = tokens == "cls"
        if rule == "auto":
            rule = "gauss-radau" if at_class else "mapped-radau"
        if points is not None:
            return cls(tokens, rule, points, points, points, accumulation)
        usual = POINTS[rule][0 if at_class else 1]
        first = FIRST_POINTS if rule in END_AT_ONE and not at_class else usual
        return cls(tokens, rule, usual, first, IMAGE_POINTS, accumulation)

    def points_by(self, method: str) -> tuple[int, int]:
        """Points by which a method chooses neurons, and in block 0."""
        if method == "influence-pattern":
            return self.image_points, self.image_points
        by_block = method in ("neuron-path", "knowledge-neuron")
        return self.points, self.first_points if by_block else self.points


def quadrature(rule: Rule, points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [m] of a rule on [0, 1], in float64; the weights add up to 1.

    Exact for polynomials of degree 2m - 1 (Gauss-Legendre), 2m - 2 (Gauss-Radau, whose last node
    is 1 exactly; Abramowitz & Stegun 25.4.31, mirrored) or 0. Mapped Gauss-Radau is that rule in
    t, with alpha = t / (2 - t) and dalpha = 2 / (2 - t)^2 dt: its nodes are denser towards 0,
    where p is steepest.

    Raises:
        UsageError: unknown rule, or fewer than one point.
    """
    check_word("quadrature", rule, RULES)
    if points < 1:
        raise UsageError(f"`points` must be at least 1, got {points}")
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

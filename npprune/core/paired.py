"""Tests of two networks on the same images, from counts alone; without torch, for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence

from npprune.errors import UsageError
from npprune.records import Mean

Z95 = 1.959963984540054
"""The standard normal's 97.5 % quantile."""


def change(lost: int, gained: int, images: int) -> Mean:
    """Mean of the paired differences (right now) - (right before), with its 95 % interval.

    `lost` images were right before and are wrong now, `gained` ones the other way round.

    Raises:
        UsageError: no images, or fewer than changed.
    """
    if lost < 0 or gained < 0 or images < max(1, lost + gained):
        raise UsageError(f"of {images} images {lost} cannot be lost and {gained} gained")
    value = (gained - lost) / images
    spread = max(0.0, lost + gained - images * value * value)
    error = math.sqrt(spread / (images - 1) / images) if images > 1 else 0.0
    return Mean(value, error, value - Z95 * error, value + Z95 * error, images)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of the exact McNemar test: were images lost and gained equally likely,
    how often would their numbers differ at least as much?

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
    or percentages" (1947); the exact binomial form.
    """
    changed = lost + gained
    tail = term = 1
    for i in range(min(lost, gained)):
        term = term * (changed - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**changed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one wrong rejection among all of them has the
    probability of one test's (Holm, 1979)."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted

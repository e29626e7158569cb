"""Elimination on statistics of any rank and scale: an order of all units, and finite costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npprune.core.compression.elimination import eliminate, eliminate_groups
from npprune.core.compression.selection import smooth
from npprune.core.linear import inverted, solved

H, D = 24, 8
G = torch.Generator().manual_seed(0)
X = torch.randn(40, H, generator=G, dtype=torch.float64)
W = torch.randn(D, H, generator=G, dtype=torch.float64)


def covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.T @ x / len(x)


CASES = {
    "zeros": torch.zeros(H, H, dtype=torch.float64),
    "rank one": covariance(X[:, :1].repeat(1, H)),
    "copies": covariance(X[:, :4].repeat(1, H // 4)),
    "two images": covariance(X[:2]),
    "tiny": covariance(X) * 1e-300,
    "huge": covariance(X) * 1e300,
    "scales": covariance(X * torch.logspace(-150, 150, H, dtype=torch.float64)),
    "not positive": covariance(X) - 0.3 * torch.eye(H, dtype=torch.float64),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("curvature", [None, 0.0, 1.0])
def test_every_unit_has_a_place_and_a_cost(case: str, curvature: float | None) -> None:
    g = None if curvature is None else torch.full((D, D), curvature, dtype=torch.float64)
    for shrinkage in (1e-4, 1e-12, 0.0):
        for found in (
            eliminate(CASES[case], W, g, shrinkage=shrinkage),
            eliminate_groups(CASES[case], W, 4, g, shrinkage=shrinkage),
        ):
            assert sorted(found.order.tolist()) == list(range(len(found.order)))
            assert torch.isfinite(found.costs).all()
            assert (found.costs >= -1e-9 * found.costs.abs().max()).all()


def test_singular_systems_have_a_solution_and_others_their_own() -> None:
    regular = covariance(X) + torch.eye(H, dtype=torch.float64)
    right = W.T.contiguous()
    torch.testing.assert_close(solved(regular, right), torch.linalg.solve(regular, right))
    torch.testing.assert_close(inverted(regular), torch.linalg.inv(regular))
    for singular in (CASES["zeros"], torch.ones(H, H, dtype=torch.float64)):
        assert torch.isfinite(solved(singular, right)).all()
        assert torch.isfinite(inverted(singular)).all()


def test_harm_of_any_size_is_smoothed() -> None:
    row = {8: 1e300, 16: 1e-300, 24: 1e300, 32: 1e-300, 40: 0.0}
    assert all(v >= 0 and v < float("inf") for v in smooth(row, range(1, 41)).values())

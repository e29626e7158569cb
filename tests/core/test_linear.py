"""Systems of calibration statistics have a solution, whatever the images were."""

from __future__ import annotations

import pytest
import torch

from npprune.core.compression.compensation import compensate
from npprune.core.compression.statistics import Moments
from npprune.core.linear import factor, regularised, ridge
from npprune.errors import ModelError


def test_a_sound_system_is_left_alone() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    s = regularised(x.T @ x, 1e-3)
    assert torch.equal(factor(s), torch.linalg.cholesky(s))
    assert ridge(torch.zeros(3, 3), 1e-3) == 1.0


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-20, 1.0, 1e20])
def test_what_rounding_made_indefinite_gets_a_factor(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 8, generator=g, dtype=torch.float64)
    lower = factor(scale * (noise + noise.T))
    assert torch.isfinite(lower).all()
    assert (lower.diagonal() > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_no_numbers_are_an_error(bad: float) -> None:
    s = torch.eye(4, dtype=torch.float64)
    s[1, 2] = s[2, 1] = bad
    with pytest.raises(ModelError, match="statistics must be finite"):
        factor(s)


def test_units_that_do_not_vary_are_a_part_of_the_bias() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.rand(6, generator=g, dtype=torch.float64) + 1
    noise = 1e-7 * torch.randn(6, 6, generator=g, dtype=torch.float64)
    moments = Moments(mean, noise + noise.T, mean, 100.0)
    w = torch.randn(3, 6, generator=g, dtype=torch.float64)
    found = compensate(moments, w, None, [0, 2, 3], shrinkage=1e-4)
    torch.testing.assert_close(found.weight, w[:, [0, 2, 3]])
    torch.testing.assert_close(found.bias, w[:, [1, 4, 5]] @ mean[[1, 4, 5]])
    assert found.error == 0.0

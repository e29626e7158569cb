"""Compensation against a direct regression on activations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from npprune.core.compression.compensation import Cross, choose_shrinkage, compensate, error
from npprune.core.compression.statistics import Moments
from npprune.errors import UsageError

KEEP = [0, 2, 3, 7]


def sample(n: int = 400, h: int = 9, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(h, h, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.randn(n, h, generator=g, dtype=torch.float64) @ mix + 0.7


def moments(x: Tensor) -> Moments:
    return Moments(x.mean(0), torch.cov(x.T, correction=0), x.abs().mean(0), float(len(x)))


def layer(h: int = 9, d: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return (
        torch.randn(d, h, generator=g, dtype=torch.float64),
        torch.randn(d, generator=g, dtype=torch.float64),
    )


def test_least_squares_is_the_regression_with_intercept() -> None:
    x, (w, b) = sample(), layer()
    got = compensate(moments(x), w, b, KEEP, shrinkage=0.0)
    rows = torch.cat([x[:, KEEP], torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(rows, x @ w.T + b).solution
    torch.testing.assert_close(got.weight, solution[:-1].T)
    torch.testing.assert_close(got.bias, solution[-1])
    residual = x @ w.T + b - rows @ solution
    total = (x - x.mean(0)) @ w.T
    assert got.error == pytest.approx(float(residual.square().sum() / total.square().sum()))
    quick = compensate(moments(x), w, b, KEEP, shrinkage=0.0, diagnose=False)
    assert torch.equal(quick.weight, got.weight)
    assert math.isnan(quick.error)
    system = torch.cov(x[:, KEEP].T, correction=0)
    assert got.condition == pytest.approx(float(torch.linalg.cond(system)))


def test_a_curvature_of_full_rank_leaves_the_solution_where_it_is() -> None:
    x, (w, b) = sample(), layer()
    m, got = moments(x), compensate(moments(x), w, b, KEEP, shrinkage=0.0)
    g = torch.randn(20, 5, dtype=torch.float64)
    curvature = g.T @ g
    best = error(m, w, got.weight, KEEP, curvature=curvature)
    for _ in range(20):
        other = got.weight + 0.01 * torch.randn_like(got.weight)
        assert error(m, w, other, KEEP, curvature=curvature) > best


def test_mean_and_none() -> None:
    x, (w, b) = sample(), layer()
    m = moments(x)
    removed = [i for i in range(9) if i not in KEEP]
    mean, none = compensate(m, w, b, KEEP, mode="mean"), compensate(m, w, b, KEEP, mode="none")
    assert torch.equal(mean.weight, w[:, KEEP])
    torch.testing.assert_close(mean.bias, b + w[:, removed] @ x.mean(0)[removed])
    assert torch.equal(none.weight, w[:, KEEP])
    assert torch.equal(none.bias, b)
    wrong = (x @ w.T) - (x[:, KEEP] @ w[:, KEEP].T)
    total = ((x - x.mean(0)) @ w.T).square().sum()
    assert none.error == pytest.approx(float(wrong.square().sum() / total))
    refit = compensate(m, w, b, KEEP)
    assert refit.error < mean.error < none.error


def test_shrinkage_leads_from_the_refit_to_the_mean() -> None:
    x, (w, b) = sample(), layer()
    m = moments(x)
    far = compensate(m, w, b, KEEP, shrinkage=1e12)
    mean = compensate(m, w, b, KEEP, mode="mean")
    torch.testing.assert_close(far.weight, mean.weight)
    torch.testing.assert_close(far.bias, mean.bias)


def test_keeping_all_changes_nothing_and_a_missing_bias_is_made() -> None:
    x, (w, b) = sample(), layer()
    whole = compensate(moments(x), w, b, range(9))
    assert torch.equal(whole.weight, w)
    assert torch.equal(whole.bias, b)
    assert whole.error == 0.0
    without = compensate(moments(x), w, None, KEEP)
    torch.testing.assert_close(without.bias + b, compensate(moments(x), w, b, KEEP).bias)


@pytest.mark.parametrize("with_error", [False, True])
def test_shrinkage_is_chosen_on_held_out_data(with_error: bool) -> None:
    few, many = sample(8, seed=3), sample(4000, seed=4)
    w, b = layer()

    def beside(x: Tensor) -> tuple[Tensor, Cross | None]:
        """An error that depends on the units, and its moments."""
        if not with_error:
            return torch.zeros(len(x), len(w)).double(), None
        e = (x[:, : len(w)] - 1).tanh() + 0.3
        h = x - x.mean(0)
        return e, Cross(e.mean(0), (e - e.mean(0)).T @ h / len(x))

    (_, cross), (e, held) = beside(few), beside(many)
    best, scores = choose_shrinkage(
        moments(few), moments(many), w, KEEP, cross=cross, held_out_cross=held
    )
    assert scores[best] == min(scores.values())
    lost = {}
    for c in scores:
        got = compensate(moments(few), w, b, KEEP, shrinkage=c, cross=cross)
        residual = many @ w.T + b + e - many[:, KEEP] @ got.weight.T - got.bias
        lost[c] = float(residual.square().sum(1).mean())
    spread = float((e - e.mean(0)).square().sum(1).mean())
    assert scores == pytest.approx({c: v - spread for c, v in lost.items()}, rel=1e-6, abs=1e-9)
    if not with_error:
        same, _ = choose_shrinkage(moments(many), moments(many), w, KEEP)
        assert same == 1e-4  # nothing to guard against: the least shrinkage wins


def test_a_dead_block_is_solved() -> None:
    w, b = layer()
    zero = Moments(torch.zeros(9).double(), torch.zeros(9, 9).double(), torch.zeros(9).double(), 5)
    got = compensate(zero, w, b, KEEP)
    assert torch.equal(got.weight, w[:, KEEP])
    assert torch.equal(got.bias, b)
    assert got.error == 0.0


def test_refusals() -> None:
    x, (w, b) = sample(), layer()
    with pytest.raises(UsageError, match="got 'magic'"):
        compensate(moments(x), w, b, KEEP, mode="magic")  # type: ignore[arg-type]
    for bad in ([], [2, 1], [1, 1], [9], [-1, 2]):
        with pytest.raises(UsageError, match=r"ascending neurons of 0\.\.8"):
            compensate(moments(x), w, b, bad)
    with pytest.raises(UsageError, match=r"9 units, got \[8, 8\]"):
        compensate(moments(x[:, :8]), w, b, KEEP)

"""The elimination against exhaustive search and against the refit it predicts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from npprune.core.compression.elimination import eliminate, inverse, square_root
from npprune.errors import UsageError


def layer(seed: int, d: int = 4, h: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(50, h, generator=g, dtype=torch.float64)
    x = x @ torch.randn(h, h, generator=g, dtype=torch.float64)
    y = torch.randn(20, d, generator=g, dtype=torch.float64)
    return x.T @ x / 50, torch.randn(d, h, generator=g, dtype=torch.float64), y.T @ y / 20


def refit_error(s: Tensor, w: Tensor, g: Tensor, keep: list[int]) -> float:
    """The least weighted error of W h by the kept units alone, solved from scratch."""
    w_k = w @ s[:, keep] @ torch.linalg.inv(s[keep][:, keep])
    change = w.clone()
    change[:, keep] -= w_k
    return float((g @ change @ s @ change.T).trace())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighted", [False, True])
def test_every_step_takes_the_neuron_an_exhaustive_search_takes(seed: int, weighted: bool) -> None:
    s, w, g = layer(seed)
    s = s + 1e-3 * s.diagonal().mean() * torch.eye(7)  # the ridge, so that both see one problem
    curvature = g if weighted else torch.eye(4, dtype=torch.float64)
    found = eliminate(s, w, g if weighted else None, shrinkage=0.0)
    left, spent = list(range(7)), 0.0
    for step in range(6):
        error = {j: refit_error(s, w, curvature, [i for i in left if i != j]) for j in left}
        best = min(left, key=lambda j, e=error: e[j])  # type: ignore[misc]
        assert int(found.order[step]) == best
        assert float(found.costs[step]) == pytest.approx(error[best] - spent, rel=1e-6, abs=1e-9)
        spent = error[best]
        left.remove(best)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_close_to_the_best_of_all_subsets(seed: int) -> None:
    s, w, g = layer(seed, h=8)
    found = eliminate(s, w, g, shrinkage=1e-9)
    errors = sorted(refit_error(s, w, g, list(k)) for k in itertools.combinations(range(8), 4))
    greedy = refit_error(s, w, g, found.keep(4))
    assert errors[0] <= greedy * (1 + 1e-9)
    assert greedy <= errors[len(errors) // 10]  # among the best tenth of the 70 subsets


def test_scores_give_the_order_back_and_widths_are_nested() -> None:
    s, w, g = layer(1, h=40)
    found = eliminate(s, w, g)
    assert found.scores().argsort().tolist() == found.order.tolist()
    assert len(found.scores().unique()) == 40
    assert set(found.keep(10)) < set(found.keep(11))
    assert sorted(found.order.tolist()) == list(range(40))


def test_compaction_changes_nothing() -> None:
    # 40 neurons go through several compactions; the plain algorithm holds all of A throughout
    s, w, g = layer(2, d=6, h=40)
    found = eliminate(s, w, g)
    a, u, order = inverse(s, 1e-3), square_root(g) @ w, []
    for _ in range(40):
        cost = u.square().sum(0) / a.diagonal()
        cost[order] = torch.inf
        j = int(cost.argmin())
        order.append(j)
        u, a = u - torch.outer(u[:, j], a[j] / a[j, j]), a - torch.outer(a[:, j], a[j] / a[j, j])
        a[j, j] = 1.0
    assert found.order[:39].tolist() == order[:39]


def test_protected_neurons_never_go_and_a_prior_delays() -> None:
    s, w, _ = layer(3, h=20)
    plain = eliminate(s, w)
    first = plain.order[:3].tolist()
    guarded = eliminate(s, w, protected=first)
    assert guarded.order[-3:].tolist() == sorted(first)
    assert torch.isinf(guarded.costs[-3:]).all()
    assert torch.isfinite(guarded.costs[:-3]).all()
    assert set(first) <= set(guarded.keep(5))
    assert guarded.scores().argsort().tolist() == guarded.order.tolist()
    prior = torch.ones(20)
    prior[first[0]] = 1e9
    assert int(eliminate(s, w, prior=prior).order[-1]) == first[0]


def test_damping_leads_from_the_curvature_to_plain_reconstruction() -> None:
    s, w, g = layer(4, d=3, h=12)
    g = torch.outer(g[0], g[0])  # sees one direction only
    none, plain = eliminate(s, w, g), eliminate(s, w)
    assert eliminate(s, w, g, damping=1e9).order.tolist() == plain.order.tolist()
    assert none.order.tolist() != plain.order.tolist()
    by_hand = g + 0.1 * g.trace() / 3 * torch.eye(3)
    torch.testing.assert_close(
        eliminate(s, w, g, damping=0.1).costs, eliminate(s, w, by_hand).costs
    )


def test_a_dead_block_and_twin_neurons_do_not_break_it() -> None:
    w = torch.randn(3, 5, dtype=torch.float64)
    assert len(eliminate(torch.zeros(5, 5), w).order) == 5
    x = torch.randn(100, 3, dtype=torch.float64)
    x = torch.cat([x, x[:, :1]], 1)  # neuron 3 repeats neuron 0
    twins = eliminate(x.T @ x / 100, torch.ones(3, 4, dtype=torch.float64), shrinkage=1e-8)
    assert int(twins.order[0]) in (0, 3)
    assert float(twins.costs[0]) < 1e-6


def test_refusals() -> None:
    s, w, g = layer(0)
    with pytest.raises(UsageError, match=r"covariance must be \[7, 7\], got \[6, 6\]"):
        eliminate(s[:6, :6], w)
    with pytest.raises(UsageError, match=r"curvature must be \[4, 4\], got \[3, 3\]"):
        eliminate(s, w, g[:3, :3])
    with pytest.raises(UsageError, match="positive factors"):
        eliminate(s, w, prior=torch.zeros(7))

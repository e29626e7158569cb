"""The programme over items is exact."""

from __future__ import annotations

import itertools

import pytest
import torch

from npprune.core.compression.solver import SLACK, Item, _likely, fill_up, solve
from npprune.errors import GateError


def items(seed: int, depth: int = 5) -> list[Item]:
    g = torch.Generator().manual_seed(seed)
    harm, prices = torch.rand(2, depth, 4, generator=g).tolist()
    return [Item(dict(enumerate(h)), dict(enumerate(p))) for h, p in zip(harm, prices, strict=True)]


def totals(some: list[Item], options: tuple[int, ...] | list[int]) -> tuple[float, float]:
    pairs = list(zip(some, options, strict=True))
    return sum(i.prices[o] for i, o in pairs), sum(i.harm[o] for i, o in pairs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1.2, 1.8, 3.0])
def test_it_is_the_best_of_all_choices(seed: int, budget: float) -> None:
    some = items(seed)
    every = [totals(some, o) for o in itertools.product(range(4), repeat=5)]
    least = min(price for price, _ in every)
    if least > budget:
        with pytest.raises(GateError, match=f"cost {least:.6g}, and the budget is {budget:.6g}"):
            solve(some, budget)
        return
    price, harm = totals(some, solve(some, budget))
    assert price <= budget * (1 + 1e-9)
    assert harm == pytest.approx(min(h for p, h in every if p <= budget), abs=1e-12)


def test_what_is_left_is_spent_where_it_does_no_harm() -> None:
    some = [Item({1: 0.0, 2: 0.0}, {1: 1.0, 2: 2.0}), Item({1: 0.0, 2: 0.5}, {1: 1.0, 2: 2.0})]
    assert fill_up([1, 1], some, 4.0) == [2, 1]
    assert fill_up([1, 1], some, 2.5) == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_options_are_ruled_out_only_where_no_best_choice_has_them(seed: int) -> None:
    some = items(seed, depth=6)
    least = sum(min(i.prices.values()) for i in some)
    whole = sum(max(i.prices.values()) for i in some)
    for share in (1e-9, 0.1, 0.4, 0.7, 1.0):
        budget = least + share * (whole - least)
        found = totals(some, solve(some, budget))[1]
        fit = [totals(some, o) for o in itertools.product(range(4), repeat=6)]
        assert found == pytest.approx(min(h for p, h in fit if p <= budget * SLACK), abs=1e-12)
        assert sum(len(i.harm) for i in _likely(some, budget)) < 4 * 6

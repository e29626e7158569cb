"""The programme over blocks with a state: exact, and the same choices as without one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from npprune.core.compression.selection import Ranking, select
from npprune.core.compression.solver import Item, along, fill_up, fixed, solve
from npprune.errors import GateError

TOKENS = 12


def numbers(g: torch.Generator, n: int) -> list[float]:
    return torch.rand(n, generator=g).tolist()


def network(seed: int, depth: int = 3) -> list[Item]:
    """Per block: how many tokens are merged, then a width whose price is per token."""
    g = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(depth):
        merged = dict(zip((0, 2, 5), [0.0, *numbers(g, 2)], strict=True))
        widths = dict(zip((1, 2, 3), numbers(g, 3), strict=True))
        items += [
            Item(
                merged,
                lambda t, m=merged: {r: 0.1 * t * t for r in m if r < t - 1},  # type: ignore[misc]
                lambda t, r: t - r,
            ),
            Item(widths, lambda t, w=widths: {k: 2.0 * t * k for k in w}),  # type: ignore[misc]
        ]
    return items


def cost(items: Sequence[Item], options: Sequence[Any], start: Any) -> float | None:
    total, state = 0.0, start
    for item, option in zip(items, options, strict=True):
        prices = item.prices(state)
        if option not in prices:
            return None
        total, state = total + prices[option], item.after(state, option)
    return total


def harm(items: Sequence[Item], options: Sequence[Any]) -> float:
    return sum(item.harm[o] for item, o in zip(items, options, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [90.0, 130.0, 200.0])
def test_with_a_state_it_is_the_best_of_all_choices(seed: int, budget: float) -> None:
    items = network(seed)
    every = itertools.product(*(item.harm for item in items))
    within = [o for o in every if (c := cost(items, o, TOKENS)) is not None and c <= budget]
    found = solve(items, budget, TOKENS)
    spent = cost(items, found, TOKENS)
    assert spent is not None
    assert spent <= budget * (1 + 1e-9)
    assert harm(items, found) == pytest.approx(min(harm(items, o) for o in within), abs=1e-12)
    assert sum(row[o] for row, o in zip(along(items, found, TOKENS), found, strict=True)) == (
        pytest.approx(spent)
    )


def test_what_no_choice_can_reach_is_refused_with_the_least_there_is() -> None:
    items = network(0)
    every = itertools.product(*(item.harm for item in items))
    least = min(c for o in every if (c := cost(items, o, TOKENS)) is not None)
    with pytest.raises(GateError, match=f"cost {least:.6g}, and the budget is {least - 1:.6g}"):
        solve(items, least - 1, TOKENS)
    assert cost(items, solve(items, least, TOKENS), TOKENS) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(4))
def test_a_state_that_changes_nothing_changes_no_choice(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = [dict(enumerate(numbers(g, 4))) for _ in range(5)]
    prices = [dict(enumerate(numbers(g, 4))) for _ in range(5)]
    plain = [fixed(h, p) for h, p in zip(rows, prices, strict=True)]
    split = [Item(i.harm, i.prices, lambda s, o: (s + o) % 2) for i in plain]
    assert solve(plain, 1.5) == solve(split, 1.5, 0)


def test_what_is_left_is_spent_without_changing_a_state() -> None:
    flat = {1: 0.0, 2: 0.0}
    merge = Item({0: 0.0, 4: 0.0}, lambda t: {0: 1.0, 4: 1.0}, lambda t, r: t - r)
    items = [merge, Item(flat, lambda t: {1: float(t), 2: 2.0 * t})]
    assert fill_up([4, 1], items, 17.0, 12) == [4, 2]  # 8 tokens after merging 4
    assert fill_up([4, 1], items, 16.0, 12) == [4, 1]


def test_selection_shares_a_budget_with_an_axis_that_makes_later_blocks_cheaper() -> None:
    scores = [torch.arange(3.0)] * 2
    table = [{1: 2.0, 2: 1.0, 3: 0.0}] * 2
    merging = [Item({0: 0.0, 6: 0.5}, lambda t: {0: 0.0, 6: 0.0}, lambda t, r: t - r)] * 2
    rows = [lambda t: {w: float(t * w) for w in (1, 2, 3)}] * 2
    found = select(
        Ranking(scores, round_to=1, min_keep=1), 36.0, method="measured", prices=rows,
        harm=table, others=[merging], start=12,
    )  # fmt: skip
    assert (found.widths, found.others) == ([3, 3], [[6, 0]])  # 6 tokens in both blocks
    assert (found.achieved, found.total, found.harm) == (36.0, 72.0, 0.5)

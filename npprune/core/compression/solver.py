"""One option for each of many items, with the least harm whose prices fit a budget: exact.

Harms add up, and so do prices. Dynamic programme over items: of all partial choices only those stay
that no other beats in both price and harm.

Most options are ruled out before. With a price of harm, lambda, the least sum of harm + lambda x
price, less lambda x budget, is a bound that no choice goes below (the Lagrangian dual); an option
that would lift it above the harm of a choice already found is in no better one (reduced costs:
Martello and Toth, "Knapsack Problems", 1990).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npprune.errors import GateError, setting

STATES = 200_000
"""Partial choices that `solve` holds before it rounds prices."""
SLACK = 1 + 1e-12
"""What sums of prices may gain in floating point."""
HALVINGS = 80
"""Of the interval in which lambda lies."""

Option = Any


@dataclass(frozen=True)
class Item:
    """One choice: the harm and the price of each option."""

    harm: Mapping[Any, float]
    prices: Mapping[Any, float]


def solve(items: Sequence[Item], budget: float) -> list[Option]:
    """One option per item, with the least total harm whose total price is within the budget.

    Exact; only where more than 200,000 partial choices stay (prices without a common unit, many
    items) prices are rounded up to a millionth of the budget. Equal harm: the cheaper.

    Raises:
        GateError: even the cheapest options exceed the budget.
    """
    least = sum(min(item.prices[o] for o in item.harm) for item in items)
    if least > budget * SLACK:
        raise too_small(least, budget)
    every, items = items, _likely(items, budget * SLACK)
    price = torch.zeros(1, dtype=torch.float64)
    total = torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[list[Option], Tensor]] = []
    unit = 0.0
    for item in items:
        options = sorted(item.harm)
        add = torch.tensor([float(item.prices[o]) for o in options], dtype=torch.float64)
        harm = torch.tensor([item.harm[o] for o in options], dtype=torch.float64)
        if unit:
            add = torch.ceil(add / unit) * unit
        new_price, new_total = (price[:, None] + add).flatten(), (total[:, None] + harm).flatten()
        front = _front(new_price, new_total, budget * SLACK)
        if len(front) > STATES and not unit:
            unit = budget * 1e-6
        price, total = new_price[front], new_total[front]
        if len(front) > STATES:
            price = torch.ceil(price / unit) * unit
        steps.append((options, front))
    if not len(price):  # only by rounding: the cheapest choice fits exactly
        return [min(item.harm, key=lambda o, p=item.prices: p[o]) for item in every]  # type: ignore[misc]
    at = int(total.argmin())
    chosen = []
    for options, front in reversed(steps):
        at, pick = divmod(int(front[at]), len(options))
        chosen.append(options[pick])
    return chosen[::-1]


def _likely(items: Sequence[Item], budget: float) -> list[Item]:
    """The items with those options that may be in a best choice; the cheapest ones fit."""
    if not items:
        return []
    options = [list(item.harm) for item in items]
    most = max(map(len, options))
    harm = torch.full((len(items), most), torch.inf, dtype=torch.float64)
    price = torch.zeros(len(items), most, dtype=torch.float64)
    for i, item in enumerate(items):
        row = options[i]
        harm[i, : len(row)] = torch.tensor([item.harm[o] for o in row], dtype=torch.float64)
        price[i, : len(row)] = torch.tensor([item.prices[o] for o in row], dtype=torch.float64)

    def taken(rate: float) -> Tensor:
        """The best option of each item [i, 1] at a price of harm."""
        return (harm + rate * price).argmin(1, keepdim=True)

    def spent(at: Tensor) -> float:
        return float(price.gather(1, at).sum())

    low, high = 0.0, 1e-12
    while spent(taken(high)) > budget and math.isfinite(high):
        low, high = high, 4 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(taken(middle)) <= budget else (middle, high)
    at = taken(high)
    if spent(at) > budget:  # rates beyond all numbers: leave it to the programme
        return list(items)
    while True:  # a choice already found: what is left goes where it helps most
        gain = harm.gather(1, at) - harm
        fits = price - price.gather(1, at) <= budget - spent(at)
        helps = gain.masked_fill(~fits, 0.0).flatten()
        best = int(helps.argmax())
        if helps[best] <= 0:
            break
        at[best // most] = best % most
    found = float(harm.gather(1, at).sum())
    reduced = harm + high * price
    least = reduced.min(1, keepdim=True).values
    bound = float(least.sum()) - high * budget
    rounding = 1e-9 * abs(found) + 1e-12 * (1 + high * budget)
    stay = bound + (reduced - least) <= found + rounding
    return [
        Item({o: item.harm[o] for o in kept}, {o: item.prices[o] for o in kept})
        for item, kept in zip(
            items,
            (
                [o for o, s in zip(row, keep.tolist(), strict=False) if s]
                for row, keep in zip(options, stay, strict=True)
            ),
            strict=True,
        )
    ]


def _front(price: Tensor, total: Tensor, budget: float) -> Tensor:
    """Indices of the choices within budget that none beats in price and harm, by price."""
    inside = (price <= budget).nonzero()[:, 0]
    by_harm = inside[total[inside].argsort(stable=True)]
    order = by_harm[price[by_harm].argsort(stable=True)]
    if not len(order):
        return order
    best = total[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = total[order][1:] < best[:-1]
    return order[better]


def fill_up(chosen: Sequence[Option], items: Sequence[Item], budget: float) -> list[Option]:
    """What `solve` left of the budget, spent where the next dearer option does no more harm: the
    item with the least share of its own goes first.

    Harm that does not tell options apart would else have the cheapest of each, whatever was asked.
    """
    out = list(chosen)
    spent = sum(item.prices[o] for item, o in zip(items, out, strict=True))
    free = [
        sorted(
            (p, o) for o, p in item.prices.items()
            if o in item.harm and item.harm[o] <= item.harm[now] and p > item.prices[now]
        )
        for item, now in zip(items, out, strict=True)
    ]  # fmt: skip
    dearest = [max(item.prices[o] for o in item.harm) for item in items]
    while any(free):
        i = min(
            (i for i, options in enumerate(free) if options),
            key=lambda i: items[i].prices[out[i]] / dearest[i],
        )
        cost, option = free[i].pop(0)
        rise = cost - items[i].prices[out[i]]
        if spent + rise > budget * SLACK:
            free[i] = []
        elif rise > 0:
            spent, out[i] = spent + rise, option
    return out


def too_small(least: float, budget: float) -> GateError:
    """What is refused where even the cheapest options exceed a budget."""
    return GateError(
        f"the smallest widths allowed cost {least:.6g}, and the budget is {budget:.6g}",
        hint=f"raise the budget, or lower {setting('prune.min_keep')}",
    )

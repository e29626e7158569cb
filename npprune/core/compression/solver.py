"""One option for each of many items, with the least harm whose prices fit a budget: exact.

Items are taken in order, and may share a state: what an option leaves to the items after it. The
tokens that reach a block are such a state: merging some makes all later blocks cheaper. Harms and
prices add up along the way; the price of an option depends on the state that it is taken in. Most
items have nothing to do with states: then there is one, None.

Dynamic programme: of all partial choices that lead to a state only those stay that no other beats
in both price and harm.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npprune.errors import GateError, setting

STATES = 200_000
"""Partial solutions that `solve` holds before it rounds prices."""
SLACK = 1 + 1e-12
"""What sums of prices may gain in floating point."""

Option = Any
State = Hashable


def stays(state: State, option: Option) -> State:
    """The state after an option that changes nothing for later items."""
    return state


@dataclass(frozen=True)
class Item:
    """One choice: the harm of each option, its price in a state, and the state it leads to.

    `prices(state)` may leave out options that the state does not allow.
    """

    harm: Mapping[Any, float]
    prices: Callable[[Any], Mapping[Any, float]]
    after: Callable[[Any, Any], Any] = stays


def fixed(harm: Mapping[Any, float], prices: Mapping[Any, float]) -> Item:
    """An item whose prices do not depend on any state."""
    return Item(harm, lambda state: prices)


@dataclass
class _Front:
    """Partial choices that lead to one state: price and harm [n], by price."""

    price: Tensor
    harm: Tensor


@dataclass
class _Step:
    """Where the partial choices of an item come from: (state before, index, option) of each."""

    before: list[tuple[State, list[Option], int]]  # (state, its options, candidates up to here)
    front: Tensor  # indices of the candidates that stayed

    def back(self, at: int) -> tuple[State, int, Option]:
        """The state and index before partial choice `at`, and its option."""
        flat, first = int(self.front[at]), 0
        for state, options, end in self.before:
            if flat < end:
                index, pick = divmod(flat - first, len(options))
                return state, index, options[pick]
            first = end
        raise IndexError(at)


def solve(items: Sequence[Item], budget: float, start: State = None) -> list[Option]:
    """One option per item, with the least total harm whose total price is within the budget.

    Exact; only where more than 200,000 partial choices stay (prices without a common unit, many
    items) prices are rounded up to a millionth of the budget. Equal harm: the cheaper.

    Raises:
        GateError: even the cheapest options exceed the budget.
    """
    least, cheapest = _cheapest(items, start)
    if least > budget * SLACK:
        raise too_small(least, budget)
    zero = torch.zeros(1, dtype=torch.float64)
    fronts: dict[State, _Front] = {start: _Front(zero, zero)}
    steps: list[dict[State, _Step]] = []
    unit = 0.0
    for item in items:
        grown, step = _grown(item, fronts, budget, unit)
        size = sum(len(front.price) for front in grown.values())
        if size > STATES and not unit:
            unit = budget * 1e-6
        if size > STATES:
            for front in grown.values():
                front.price = torch.ceil(front.price / unit) * unit
        fronts = grown
        steps.append(step)
    ends = [(float(f.harm.min()), s) for s, f in fronts.items() if len(f.price)]
    if not ends:  # only by rounding: the cheapest choice fits exactly
        return cheapest
    state = min(ends, key=lambda end: end[0])[1]
    at = int(fronts[state].harm.argmin())
    chosen = []
    for step in reversed(steps):
        state, at, option = step[state].back(at)
        chosen.append(option)
    return chosen[::-1]


def _grown(
    item: Item, fronts: Mapping[State, _Front], budget: float, unit: float
) -> tuple[dict[State, _Front], dict[State, _Step]]:
    """The partial choices one item on, by the state that they lead to."""
    parts: dict[State, list[tuple[State, list[Option], Tensor, Tensor]]] = {}
    for state, front in fronts.items():
        cost = item.prices(state)
        groups: dict[State, list[Option]] = {}
        for option in sorted(o for o in item.harm if o in cost):
            groups.setdefault(item.after(state, option), []).append(option)
        for then, options in groups.items():
            add = torch.tensor([float(cost[o]) for o in options], dtype=torch.float64)
            harm = torch.tensor([item.harm[o] for o in options], dtype=torch.float64)
            if unit:
                add = torch.ceil(add / unit) * unit
            price = (front.price[:, None] + add).flatten()
            total = (front.harm[:, None] + harm).flatten()
            parts.setdefault(then, []).append((state, options, price, total))
    grown, step = {}, {}
    for then, some in parts.items():
        price, total = torch.cat([p for *_, p, _ in some]), torch.cat([h for *_, h in some])
        front_of = _front(price, total, budget * SLACK)
        before, end = [], 0
        for state, options, added, _ in some:
            end += len(added)
            before.append((state, options, end))
        grown[then] = _Front(price[front_of], total[front_of])
        step[then] = _Step(before, front_of)
    return grown, step


def _cheapest(items: Sequence[Item], start: State) -> tuple[float, list[Option]]:
    """The least total price, and the options that have it."""
    best: dict[State, tuple[float, list[Option]]] = {start: (0.0, [])}
    for item in items:
        new: dict[State, tuple[float, list[Option]]] = {}
        for state, (spent, chosen) in best.items():
            cost = item.prices(state)
            for option in (o for o in item.harm if o in cost):
                then, price = item.after(state, option), spent + cost[option]
                if then not in new or price < new[then][0]:
                    new[then] = price, [*chosen, option]
        best = new
    return min(best.values(), key=lambda found: found[0])


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


def fill_up(
    chosen: Sequence[Option], items: Sequence[Item], budget: float, start: State = None
) -> list[Option]:
    """What `solve` left of the budget, spent where the next dearer option does no more harm: the
    item with the least share of its own goes first. No state changes.

    Harm that does not tell options apart would else have the cheapest of each, whatever was asked.
    """
    out = list(chosen)
    prices = along(items, chosen, start)
    harm = [item.harm for item in items]
    spent = sum(p[o] for p, o in zip(prices, out, strict=True))
    free = [
        sorted((p[o], o) for o in row if o in p and row[o] <= row[now] and p[o] > p[now])
        for row, p, now in zip(harm, prices, out, strict=True)
    ]
    dearest = [max(p[o] for o in row if o in p) for row, p in zip(harm, prices, strict=True)]
    while any(free):
        i = min(
            (i for i, options in enumerate(free) if options),
            key=lambda i: prices[i][out[i]] / dearest[i],
        )
        cost, option = free[i].pop(0)
        rise = cost - prices[i][out[i]]
        if spent + rise > budget * SLACK:
            free[i] = []
        elif rise > 0:
            spent, out[i] = spent + rise, option
    return out


def along(
    items: Sequence[Item], chosen: Sequence[Option], start: State = None
) -> list[dict[Option, float]]:
    """Each item's prices in the state that the chosen options lead to; those of its options only
    that lead on to the same state as the chosen one."""
    rows, state = [], start
    for item, option in zip(items, chosen, strict=True):
        then = item.after(state, option)
        row = item.prices(state)
        rows.append({o: p for o, p in row.items() if item.after(state, o) == then})
        state = then
    return rows


def too_small(least: float, budget: float) -> GateError:
    """What is refused where even the cheapest options exceed a budget."""
    return GateError(
        f"the smallest widths allowed cost {least:.6g}, and the budget is {budget:.6g}",
        hint=f"raise the budget, or lower {setting('prune.min_keep')}",
    )

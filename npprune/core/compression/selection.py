"""Which neurons stay, under a budget.

A block's own scores say in which order its neurons go; a budget says how many stay in each block:

    uniform     the same share of every block
    global      the shares that remove the least total score
    measured    the shares that do the least measured harm, in nats (see `harm`)

The last two are one problem: each block takes one of a few widths, every width has a harm and a
price, harms and prices add up. `solver` finds the exact optimum. The price is one-dimensional and
may be anything: neurons, parameters, MACs, measured latency.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npprune import words
from npprune.core.compression.solver import Item, fill_up, solve, too_small
from npprune.errors import UsageError

Table = Sequence[Mapping[Any, float]]
"""Per block: width -> harm, or width -> price."""

Prices = Mapping[int, float] | float
"""Of one block: a table of its widths' prices, or the price of one hidden unit."""


@dataclass
class Ranking:
    """Which hidden units of each block go first, and how many may stay.

    Args:
        scores: [h] per block, higher = keep.
        protected: units that stay whatever their score. Where they exceed a block's width, the
            ones with the fewest `votes` go, and a warning says how many.
        round_to: widths are multiples of this, or the block's full width.
        min_keep: the least width of a block.
    """

    scores: Sequence[Tensor]
    protected: Sequence[Sequence[int]] | None = None
    votes: Sequence[Tensor] | None = None
    round_to: int = 16
    min_keep: int = 16

    @property
    def widths(self) -> list[list[int]]:
        """The widths that each block may take, ascending."""
        return [widths_for(len(s), self.round_to, self.min_keep) for s in self.scores]


@dataclass
class Split:
    """What a block may do in place of sharing: hidden units for the tokens that the classifier
    reads alone, and others for the rest. A unit may serve both sides, and is then paid for twice.

    Args:
        rest: which units of the others go first, and how many may stay.
        own: the same of the tokens that are read.
        own_widths: per block, how many of these may stay; all of them may.
        harm: nats per block and width of the rest, and of the own.
        prices: per block, of the rest and of the own.
        blocks: where it may be done.
    """

    rest: Ranking
    own: Ranking
    own_widths: Sequence[Sequence[int]]
    harm: tuple[Table, Table]
    prices: tuple[Sequence[Prices], Sequence[Prices]]
    blocks: Collection[int]

    def options(self, l: int) -> Item:
        """Block l's, (width of the rest, of the own); those that another beats are left out."""
        if l not in self.blocks:
            return Item({}, {})
        widths = self.rest.widths[l], list(self.own_widths[l])
        rest, own = (smooth(t[l], ws) for t, ws in zip(self.harm, widths, strict=True))
        rest_price, own_price = (
            _price_row(p[l], l, ws) for p, ws in zip(self.prices, widths, strict=True)
        )
        harm, prices, least = {}, {}, math.inf
        pairs = [(w, c) for w in widths[0] for c in widths[1]]
        for w, c in sorted(pairs, key=lambda o: (rest_price[o[0]] + own_price[o[1]], o)):
            nats = rest[w] + own[c]
            if nats < least:
                least = nats
                harm[w, c], prices[w, c] = nats, rest_price[w] + own_price[c]
        return Item(harm, prices)


@dataclass
class Selection:
    """The kept neurons, ascending, per block; the budget asked for and what they cost.

    `own`: those of the tokens that are read, in blocks where they have some to themselves; there
    `keep` is of the others. `achieved` and `budget` are in units of the price; `total` is the dense
    network's.
    """

    keep: list[list[int]]
    budget: float
    achieved: float
    total: float
    harm: float | None = None  # sum of the table's entries at the chosen widths
    warnings: list[str] = field(default_factory=list)
    others: list[list[Any]] = field(default_factory=list)  # options taken, [axis][block]
    shares: list[float] = field(default_factory=list)  # of the harm: hidden units', then others'
    own: list[list[int]] | None = None

    @property
    def widths(self) -> list[int]:
        """Neurons that stay in each block."""
        return [len(kept) for kept in self.keep]

    @property
    def either(self) -> list[list[int]]:
        """Those that stay for some of the tokens."""
        own = self.own or [[]] * len(self.keep)
        return [sorted({*kept, *theirs}) for kept, theirs in zip(self.keep, own, strict=True)]


def select(
    ranking: Ranking,
    budget: float,
    *,
    method: words.Selection = "uniform",
    prices: Sequence[Prices] | None = None,
    harm: Table | None = None,
    others: Sequence[Sequence[Item]] = (),
    split: Split | None = None,
    tolerance: float = 0.01,
) -> Selection:
    """Keep sets from a ranking of hidden units, within a budget.

    Args:
        budget: what the kept units may cost, in units of the price.
        prices: per block; None: units count 1.
        harm: nats per block and width (`measured` only), read at other widths by `smooth`.
        others: further axes that the budget is for as well (`measured` only): one item for each
            block, of which one option is taken.
        split: what blocks may do in place of sharing their units (`measured` only).
        tolerance: share of the budget that may be missed without a warning.

    Raises:
        UsageError: arguments that do not fit.
        GateError: the floors alone exceed the budget.
    """
    dense = [len(s) for s in ranking.scores]
    words.check_word("selection", method, words.SELECTIONS)
    if (harm is None) == (method == "measured"):
        raise UsageError("a harm table is needed by `measured` selection, and by that alone")
    if others and harm is None:
        raise UsageError("other items than hidden units need a harm table")
    sets = [sorted(set(p)) for p in ranking.protected or [()] * len(dense)]
    _check_protected(sets, dense)
    choices = ranking.widths
    price = _price_rows(prices, choices)
    more = [item for axis in others for item in axis]
    total = sum(row[h] for row, h in zip(price, dense, strict=True))
    total += sum(max(item.prices.values()) for item in more)
    floors = _floors(choices, sets, price, budget - sum(min(item.prices.values()) for item in more))
    chosen: list[list[Any]] = []
    lost: list[float] = []
    own = [0] * len(dense)
    if method == "uniform":
        widths = _uniform(choices, price, budget, total)
        achieved = sum(row[w] for row, w in zip(price, widths, strict=True))
    else:
        table = removed_score(ranking.scores, sets) if harm is None else harm
        open_ = [[w for w in row if w >= f] for row, f in zip(choices, floors, strict=True)]
        fill = interpolate if harm is None else smooth
        filled = [fill(row, ws) for row, ws in zip(table, open_, strict=True)]
        hidden = [_shared(h, row) for h, row in zip(filled, price, strict=True)]
        if split is not None:
            hidden = [_either(item, split.options(l)) for l, item in enumerate(hidden)]
        (pairs, *chosen), achieved, lost = _solved([hidden, *others], budget)
        widths, own = [w for w, _ in pairs], [c for _, c in pairs]
    fixed = [() if c else s for s, c in zip(sets, own, strict=True)]
    keep, warnings = keep_sets(ranking.scores, widths, fixed, ranking.votes)
    if split is not None:
        of_rest = keep_sets(split.rest.scores, widths, [()] * len(dense))[0]
        keep = [r if c else k for r, k, c in zip(of_rest, keep, own, strict=True)]
    if abs(achieved - budget) > tolerance * budget:
        what = "what is kept costs" if others else "the kept neurons cost"
        warnings.append(
            f"{what} {achieved:.6g} of a budget of {budget:.6g} "
            f"({achieved / budget - 1:+.1%}): widths are multiples of {ranking.round_to} "
            f"and at least {ranking.min_keep}"
        )
    cost = None if harm is None else sum(lost)
    return Selection(
        keep, float(budget), float(achieved), float(total), cost, warnings, chosen, lost,
        kept_own(split.own, own) if split is not None and any(own) else None,
    )  # fmt: skip


def kept_own(ranking: Ranking, widths: Sequence[int]) -> list[list[int]]:
    """The best own units of each block; none where its width is 0."""
    fixed = ranking.protected or [()] * len(widths)
    return keep_sets(ranking.scores, widths, fixed, ranking.votes)[0]


def _shared(harm: Mapping[int, float], prices: Mapping[int, float]) -> Item:
    """Widths as options of a block that may be split, too: own units, 0 of them, come second."""
    return Item({(w, 0): n for w, n in harm.items()}, {(w, 0): p for w, p in prices.items()})


def _either(one: Item, other: Item) -> Item:
    return Item({**one.harm, **other.harm}, {**one.prices, **other.prices})


def _solved(
    axes: Sequence[Sequence[Item]], budget: float
) -> tuple[list[list[Any]], float, list[float]]:
    """The options taken, [axis][block], what they cost, and the harm of each axis."""
    items = [item for axis in axes for item in axis]
    taken = iter(fill_up(solve(items, budget), items, budget))
    options = [[next(taken) for _ in axis] for axis in axes]
    pairs = [
        list(zip(axis, chosen, strict=True)) for axis, chosen in zip(axes, options, strict=True)
    ]
    spent = sum(sum(item.prices[o] for item, o in row) for row in pairs)
    return options, spent, [sum(item.harm[o] for item, o in row) for row in pairs]


def widths_for(width: int, round_to: int = 16, min_keep: int = 16) -> list[int]:
    """The widths a block of `width` may take, ascending: multiples of `round_to` from the floor
    (rounded up) to the full width, which always is one of them."""
    if round_to < 1 or min_keep < 1:
        raise UsageError(f"round_to and min_keep must be >= 1, got {round_to} and {min_keep}")
    floor = round_up(min(min_keep, width), round_to, width)
    return sorted({*range(floor, width, round_to), width})


def nearest(allowed: Sequence[int], width: float) -> int:
    """The width closest to one wanted; of two the lesser."""
    return min(allowed, key=lambda w: (abs(w - width), w))


def round_up(count: float, round_to: int, width: int) -> int:
    """`count` rounded up to a multiple of `round_to`, at most `width`."""
    # the small number forgives what 0.7 * 768 / 16 gains in floating point
    return min(width, max(1, math.ceil(count / round_to - 1e-9)) * round_to)


def keep_sets(
    scores: Sequence[Tensor],
    widths: Sequence[int],
    protected: Sequence[Sequence[int]],
    votes: Sequence[Tensor] | None = None,
) -> tuple[list[list[int]], list[str]]:
    """The protected neurons and the best-scored others, per block; and warnings.

    Equal scores: the lower index stays.
    """
    keep, warnings = [], []
    for l, (score, width, fixed) in enumerate(zip(scores, widths, protected, strict=True)):
        rank = score.detach().to("cpu", torch.float64).clone()
        if bool(torch.isnan(rank).any()):
            raise UsageError(f"scores of block {l} must be numbers, got NaN")
        if len(fixed) > width:
            over = len(fixed) - width
            warnings.append(
                f"block {l}: {len(fixed)} protected neurons exceed its width of {width}; "
                f"the {over} with the fewest votes go"
            )
            inside = torch.tensor(list(fixed))
            rank = (rank if votes is None else votes[l].detach().to("cpu", torch.float64))[inside]
            keep.append(sorted(inside[_best(rank, width)].tolist()))
            continue
        rank[list(fixed)] = torch.inf
        keep.append(sorted(_best(rank, width).tolist()))
    return keep, warnings


def interpolate(row: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Harm at any width from harm at a few: linear in its logarithm, never rising with the width.

    Below the least width measured the first line is continued; above the largest the value stays.
    """
    known = sorted(row)
    if all(w in row for w in widths):
        return {w: row[w] for w in widths}
    level, worst = {}, 0.0
    for w in reversed(known):  # wider is never worse: what says otherwise is noise
        worst = max(worst, row[w])
        level[w] = worst
    out = {}
    for w in widths:
        right = min((k for k in known if k >= w), default=known[-1])
        left = max((k for k in known if k < w), default=known[0])
        if left >= w and len(known) > 1:  # below all that was measured: continue the first line
            left, right = known[0], known[1]
        a, b = level[left], level[right]
        share = (w - left) / (right - left) if right > left else 0.0
        if share > 1 or right in (left, w):
            out[w] = b
        elif a > 0 and b > 0:
            out[w] = math.exp((1 - share) * math.log(a) + share * math.log(b))
        else:
            out[w] = (1 - share) * a + share * b
    return out


_LARGEST_POWER = 700.0  # of e, that float64 holds


def smooth(row: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Harm at any width from noisy harm at a few: a parabola through its logarithm.

    Harm measured on a hundred images carries noise, and an exact solver exploits it. The least
    squares fit of log harm by a quadratic in the width takes most of it out; where it would rise
    with the width it is held level. Towards a width of no harm (the full one) a straight line
    leads on from the widest other one measured: a step there would reward leaving whole blocks
    alone. With fewer than four positive entries: `interpolate`.
    """
    known = [w for w in sorted(row) if row[w] > 0]
    if len(known) < 4:
        return interpolate(row, widths)
    span = max(row)
    zero = [w for w in row if row[w] == 0 and w > known[-1]]
    x = torch.tensor([[1.0, w / span, (w / span) ** 2] for w in known], dtype=torch.float64)
    y = torch.tensor([[math.log(row[w])] for w in known], dtype=torch.float64)
    fit = torch.linalg.lstsq(x, y).solution[:, 0].tolist()

    def parabola(w: int) -> float:
        power = fit[0] + fit[1] * w / span + fit[2] * (w / span) ** 2
        return math.exp(min(power, _LARGEST_POWER))

    last, level = known[-1], parabola(known[-1])
    out, worst = {}, 0.0
    for w in sorted(widths, reverse=True):
        value = parabola(w)
        if w > last and zero:
            value = level * max(0.0, min(zero) - w) / (min(zero) - last)
        worst = max(worst, value)
        out[w] = worst
    return out


def removed_score(
    scores: Sequence[Tensor], protected: Sequence[Sequence[int]]
) -> list[dict[int, float]]:
    """For every width of every block, the total score of the neurons that go (protected last)."""
    table = []
    for score, fixed in zip(scores, protected, strict=True):
        s = score.detach().to("cpu", torch.float64)
        rank = s.clone()
        rank[list(fixed)] = torch.inf
        order = _best(rank, len(s))
        gone = [*s[order].flip(0).cumsum(0).flip(0).tolist(), 0.0]
        table.append({w: gone[w] for w in range(1, len(s) + 1)})
    return table


def _best(rank: Tensor, count: int) -> Tensor:
    return rank.argsort(descending=True, stable=True)[:count]


def _price_rows(
    prices: Sequence[Prices] | None, choices: Sequence[Sequence[int]]
) -> list[Mapping[int, float]]:
    """Each block's prices of the widths that it may take."""
    if prices is None:
        prices = [1.0] * len(choices)
    if len(prices) != len(choices):
        raise UsageError(f"prices must be given for {len(choices)} blocks, got {len(prices)}")
    return [
        _price_row(p, l, widths) for l, (p, widths) in enumerate(zip(prices, choices, strict=True))
    ]


def _price_row(prices: Prices, l: int, widths: Sequence[int]) -> dict[int, float]:
    if not isinstance(prices, Mapping):
        return {w: float(prices) * w for w in widths}
    missing = [w for w in widths if w not in prices]
    if missing:
        raise UsageError(f"prices of block {l} lack width {missing[0]}")
    return {w: float(prices[w]) for w in widths}


def _floors(
    choices: Sequence[Sequence[int]],
    protected: Sequence[Sequence[int]],
    price: Table,
    budget: float,
) -> list[int]:
    """The least width of each block: its protected neurons fit, if they fit the budget at all."""
    least = [row[0] for row in choices]
    wanted = [min(w for w in row if w >= len(p)) for row, p in zip(choices, protected, strict=True)]
    return wanted if sum(p[w] for p, w in zip(price, wanted, strict=True)) <= budget else least


def _uniform(
    choices: Sequence[Sequence[int]], price: Table, budget: float, total: float
) -> list[int]:
    """Every block at the same share of its width, rounded up to the widths allowed.

    Where a table's prices do not grow evenly with the width, the largest share within the budget.
    """
    share = budget / total
    if not 0 < share <= 1 + 1e-12:
        raise UsageError(f"the budget must be in (0, {total:.6g}], got {budget:.6g}")
    if all(_even(p) for p in price):
        return [_at_share(row, share) for row in choices]
    for each in sorted({w / row[-1] for row in choices for w in row}, reverse=True):
        widths = [_at_share(row, each) for row in choices]
        cost = sum(p[w] for p, w in zip(price, widths, strict=True))
        if cost <= budget * (1 + 1e-12):
            return widths
    raise too_small(cost, budget)


def _at_share(row: Sequence[int], share: float) -> int:
    count = share * row[-1] - 1e-6
    return next((w for w in row if w >= count), row[-1])


def _even(price: Mapping[int, float]) -> bool:
    """Whether a width's price is the same for each of its neurons."""
    each = [p / w for w, p in price.items()]
    return max(each) - min(each) <= 1e-9 * max(each)


def _check_protected(sets: Sequence[Sequence[int]], dense: Sequence[int]) -> None:
    if len(sets) != len(dense):
        raise UsageError(f"protected sets must be {len(dense)}, one per block, got {len(sets)}")
    for l, (fixed, h) in enumerate(zip(sets, dense, strict=True)):
        if fixed and (fixed[0] < 0 or fixed[-1] >= h):
            raise UsageError(f"protected neurons of block {l} must lie in 0..{h - 1}, got {fixed}")

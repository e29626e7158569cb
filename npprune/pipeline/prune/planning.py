"""Under a budget: which options are taken, and what remains refitted.

measured -> choose -> `Selection` -> refit -> `Chosen`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from npprune.budget import Budget
from npprune.core.compression.compensation import Compensated, choose_shrinkage, compensate
from npprune.core.compression.cost import Price, Sizes, hidden_budget
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import Replacement
from npprune.core.compression.selection import Selection, select
from npprune.core.compression.sequential import Fit, Refitted, compensate_in_sequence
from npprune.core.compression.solver import Item
from npprune.errors import plural
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.axes import Axis, Kept, Option
from npprune.pipeline.prune.axes.hidden import HiddenUnits
from npprune.pipeline.prune.latency import LATENCY_TOLERANCE, LatencyTable
from npprune.pipeline.prune.measuring import Measured, PlanSettings, needs_held_out, tell, timed

Further = list[tuple[Axis, list[Kept]]]
"""What stays of each block, by axis."""


@dataclass
class Chosen:
    """What stays in each block, and the values of the layers that were refitted."""

    keep: list[list[int]]
    refitted: Refitted
    protected: list[int] = field(default_factory=list)  # path neurons among the kept
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    further: Further = field(default_factory=list)


# ---------------------------------------------------------------- choose


def price_of(measured: Measured, settings: PlanSettings) -> Price:
    """What the budget counts, where it is not milliseconds."""
    unit = settings.budget.unit if settings.budget is not None else None
    if unit == "params" or unit == "macs":
        return unit
    return "macs" if measured.further else "neurons"


def amount(
    measured: Measured, settings: PlanSettings, latency: LatencyTable | None = None
) -> float | None:
    """What the hidden units (with further axes: all that they share) may cost, in units of the
    price; None where the budget is to be searched for.

    latency: the prices that a budget in milliseconds needs.
    """
    budget, paths, widths = settings.budget, measured.subject.paths, measured.subject.view.widths
    if budget is None:
        if paths is None or not paths.alone or settings.max_drop is not None:
            return None
        return float(sum(len(u) for u in paths.union))
    if budget.unit == "neurons":
        return budget.absolute(sum(widths))
    if budget.unit == "latency":
        assert latency is not None
        return latency.budget(budget)
    return hidden_budget(measured.subject.sizes(), budget, attention=bool(measured.further))


def bounds(measured: Measured) -> tuple[float, float]:
    """The least amount there is a choice for, and the one at which all stays, where no budget was
    asked for: in hidden units, or in MACs where further axes share it."""
    if not measured.further:
        return 0.0, float(sum(measured.subject.view.widths))
    sizes = measured.subject.sizes()
    axes: list[HiddenUnits | Axis] = [measured.hidden, *measured.further]
    blocks = range(len(measured.subject.view.widths))
    least = sum(min(axis.prices(l, sizes, "macs").values()) for axis in axes for l in blocks)
    return least, hidden_budget(sizes, Budget("macs", 1.0), attention=True)


def choose(
    measured: Measured, settings: PlanSettings, amount: float, latency: LatencyTable | None = None
) -> Selection:
    """The kept hidden units of every block, and the options of further axes, within the budget.

    measured: `prepared` for these settings.
    """
    blocks = range(len(measured.subject.view.widths))
    harm = measured.harm if settings.selection == "measured" else None
    price = price_of(measured, settings)
    by_latency = settings.budget is not None and settings.budget.unit == "latency"
    start = None
    further: list[list[Item]] = []
    if by_latency:
        assert latency is not None
        prices: list[Any] = list(latency.prices)
    elif price == "neurons":
        prices = [1.0 for _ in blocks]
    else:
        sizes = measured.subject.sizes()
        if any(axis.changes_tokens for axis in measured.further):
            start = sizes.tokens
        prices = [_priced(measured.hidden, l, sizes, price) for l in blocks]
        if harm is not None:
            further = [
                [Item(table[l], _priced(axis, l, sizes, price), _after(axis, l)) for l in blocks]
                for axis, table in zip(measured.further, harm.further, strict=True)
            ]
    return select(
        measured.hidden.ranking,
        amount,
        method=settings.selection,
        prices=prices,
        harm=harm.hidden if harm is not None else None,
        others=further,
        start=start,
        tolerance=LATENCY_TOLERANCE if by_latency else 0.01,
    )


def _priced(
    axis: HiddenUnits | Axis, l: int, sizes: Sizes, price: Price
) -> Callable[[int | None], dict[Any, float]]:
    """Prices of block l's options by the tokens that reach it; None: all of them."""

    @cache
    def rows(tokens: int | None) -> dict[Any, float]:
        here = sizes if tokens is None else replace(sizes, tokens=tokens)
        return axis.prices(l, here, price)

    return rows


def _after(axis: Axis, l: int) -> Callable[[int | None, Option], int | None]:
    """The tokens that block l leaves; None where no axis changes them."""
    return lambda tokens, option: None if tokens is None else axis.tokens_after(l, option, tokens)


# ---------------------------------------------------------------- refit


def refit(measured: Measured, settings: PlanSettings, selection: Selection, work: Work) -> Chosen:
    """What a selection keeps, with the compensation of what goes."""
    seconds: dict[str, float] = {}
    with timed(seconds, "compensation"):
        mode = settings.compensation
        alone = "least-squares" if mode == "sequential" else mode  # `proj` is refitted once more
        further = [
            (axis, [axis.kept(l, option, alone) for l, option in enumerate(options)])
            for axis, options in zip(measured.further, selection.others, strict=True)
        ]
        compensated = _in_sequence if mode == "sequential" else _block_by_block
        refitted, found = compensated(measured, settings, selection.keep, further, work)
    protected = measured.hidden.ranking.protected
    details: dict[str, Any] = {
        "shrinkage": [c.shrinkage for c in found],
        "condition_number": [c.condition for c in found],
        "lost_variance": [c.error for c in found],
    }
    if selection.harm is not None:
        details["harm_nats"] = selection.harm
    details |= {axis.name: axis.described(kept) for axis, kept in further}
    details["seconds"] = {**measured.spent(settings), **seconds}
    return Chosen(
        selection.keep,
        refitted,
        [
            len(set(kept) & set(union))
            for kept, union in zip(
                selection.keep, protected or [[]] * len(selection.keep), strict=True
            )
        ],
        [*measured.notes, *selection.warnings, *_crowded(measured, selection)],
        details,
        further,
    )


def _in_sequence(
    measured: Measured,
    settings: PlanSettings,
    keep: Sequence[Sequence[int]],
    further: Further,
    work: Work,
) -> tuple[Refitted, list[Compensated]]:
    """Each block refitted on the network pruned so far."""
    subject, salience = measured.subject, measured.hidden.salience
    found: list[Compensated] = []
    told = tell(work, "compensation", len(keep), "blocks")

    def on_block(l: int, block: Compensated) -> None:
        found.append(block)
        told(l + 1)

    weights = None
    if salience:
        statistics = measured.collected.statistics
        weights = [statistics.position_weights(l, salience) for l in range(len(keep))]
    changed: list[dict[Any, Replacement]] = [{} for _ in keep]
    for axis, kept in further:
        for row, layers in zip(changed, axis.stand_ins(kept), strict=True):
            row.update(layers)
    refitted = compensate_in_sequence(
        subject.view,
        subject.placed(subject.fit),
        keep,
        fit=Fit(
            weights=weights,
            shrinkage=SHRINKAGE if settings.shrinkage is None else settings.shrinkage,
            held_out=subject.placed(subject.held_out if settings.shrinkage is None else []),
        ),
        changed=changed if further else None,
        on_block=on_block,
    )
    return refitted, found


def _block_by_block(
    measured: Measured,
    settings: PlanSettings,
    keep: Sequence[Sequence[int]],
    further: Further,
    work: Work,
) -> tuple[Refitted, list[Compensated]]:
    """Each block from the dense network's statistics alone."""
    assert settings.compensation != "sequential"
    hidden, view = measured.hidden, measured.subject.view
    shrinkage = SHRINKAGE if settings.shrinkage is None else settings.shrinkage
    held_out = measured.held_out if needs_held_out(measured, settings) else None
    layers, found = [], []
    for l, kept in enumerate(keep):
        fc2, moments = view.fc2(l), hidden.moments(l)
        if held_out is not None:
            others = held_out.moments(l, hidden.salience)
            shrinkage, _ = choose_shrinkage(moments, others, fc2.weight, kept)
        block = compensate(
            moments, fc2.weight, fc2.bias, kept, mode=settings.compensation, shrinkage=shrinkage
        )
        layers.append(Replacement(list(kept), block.weight, block.bias))
        found.append(block)
    projections: dict[int, Replacement] = {}
    for axis, kept_by in further:
        projections |= axis.projections(kept_by)
    return Refitted(layers, projections, []), found


def _crowded(measured: Measured, selection: Selection) -> list[str]:
    """Where paths fill the budget, the criterion has nothing left to choose."""
    protected = measured.hidden.ranking.protected
    if protected is None:
        return []
    full = [
        l for l, (union, kept) in enumerate(zip(protected, selection.keep, strict=True))
        if len(union) >= len(kept) < measured.subject.view.widths[l]
    ]  # fmt: skip
    if not full:
        return []
    return [
        f"the paths' neurons fill the budget of {len(full)} of "
        f"{plural(len(selection.keep), 'block')}: "
        "there the paths alone decide (`--no-protect-paths` lets the criterion decide)"
    ]

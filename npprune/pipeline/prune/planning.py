"""Under a budget: which options are taken, and what remains refitted.

measured -> choose -> `Selection` -> refit -> `Chosen`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from npprune.core.compression.compensation import Compensated, Mode, choose_shrinkage, compensate
from npprune.core.compression.cost import Price, Sizes, hidden_budget, macs, params
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import Replacement
from npprune.core.compression.selection import Selection, select
from npprune.core.compression.sequential import Fit, Refitted, compensate_in_sequence
from npprune.core.compression.solver import Item
from npprune.errors import GateError, UsageError, plural, setting
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.axes import Axis, Kept
from npprune.pipeline.prune.axes.cls import OWN_SHRINKAGE, OWN_SHRINKAGES
from npprune.pipeline.prune.axes.cls import WORD as CLS
from npprune.pipeline.prune.axes.hidden import HiddenUnits
from npprune.pipeline.prune.axes.tokens import WORD, Schedule, between, own
from npprune.pipeline.prune.latency import LATENCY_TOLERANCE, LatencyTable
from npprune.pipeline.prune.measuring import (
    Measured,
    PlanSettings,
    Subject,
    needs_held_out,
    tell,
    timed,
)
from npprune.pipeline.prune.path_neurons import staying, with_path_neurons
from npprune.records import Plan

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
    merged: list[int] | None = None  # tokens, per block
    last_for_read: bool = False  # the last block computes only what the classifier reads
    own: list[list[int]] | None = None  # hidden units of the tokens that are read, per block

    def fields(self) -> dict[str, Any]:
        """What further axes and tokens put into the plan."""
        return _fields(self.further, self.merged, self.last_for_read, self.own)


def _fields(
    further: Further,
    merged: list[int] | None,
    last_for_read: bool,
    own: list[list[int]] | None,
) -> dict[str, Any]:
    """Of a plan, beside the hidden units that all tokens share."""
    found: dict[str, Any] = {"merged": merged, "last_for_read": last_for_read, "cls_keep": own}
    for axis, kept in further:
        found |= axis.plan(kept)
    return found


def _kept_of(measured: Measured, selection: Selection, mode: Mode) -> Further:
    """What stays of each block by further axes, refitted by itself."""
    return [
        (axis, [axis.kept(l, option, mode) for l, option in enumerate(options)])
        for axis, options in zip(measured.further, selection.others, strict=True)
    ]


@dataclass(frozen=True)
class Choice:
    """Options within a budget: hidden units and further axes, and how tokens merge."""

    selection: Selection
    schedule: Schedule

    @property
    def widths(self) -> list[int]:
        """Hidden units that stay in each block."""
        return self.selection.widths

    @property
    def nats(self) -> float:
        """Predicted harm of all of it."""
        return self.schedule.nats + (self.selection.harm or 0.0)


# ---------------------------------------------------------------- choose


def amount(
    measured: Measured, settings: PlanSettings, latency: LatencyTable | None = None
) -> float | None:
    """What the network may cost: hidden units or milliseconds of them, parameters or MACs of all;
    None where the budget is to be searched for, by predicted drop or by measured time.

    latency: the prices that a budget in milliseconds needs.
    """
    budget, paths = settings.budget, measured.subject.paths
    if budget is None:
        if paths is None or not paths.alone or settings.max_drop is not None:
            return None
        return float(sum(len(u) for u in paths.union))
    if budget.unit == "latency":
        return latency.budget(budget) if latency is not None else None
    return budget.absolute(_whole(measured, settings.price))


def bounds(measured: Measured, settings: PlanSettings) -> tuple[float, float]:
    """The least amount that there is a choice for, and the one at which all stays."""
    whole = _whole(measured, settings.price)
    if settings.price == "neurons":
        return 0.0, whole
    least = min(_least(measured, settings, schedule) for schedule in _schedules(measured))
    return least, whole


def _whole(measured: Measured, price: Price) -> float:
    """What the dense network costs."""
    if price == "neurons":
        return float(sum(measured.subject.view.widths))
    sizes = measured.subject.sizes()
    return float(macs(sizes) if price == "macs" else params(sizes))


def _least(measured: Measured, settings: PlanSettings, schedule: Schedule) -> float:
    """What is left of a network with the smallest options allowed."""
    sizes = schedule.sizes(measured.subject.sizes(), measured.read)
    axes: list[HiddenUnits | Axis] = [measured.hidden, *measured.further]
    blocks = range(len(measured.subject.view.widths))
    least = sum(
        min(axis.prices(l, sizes, settings.price).values()) for axis in axes for l in blocks
    )
    whole = macs(sizes) if settings.price == "macs" else params(sizes)
    return (
        whole
        - hidden_budget(sizes, whole, settings.price, attention=bool(measured.further))
        + least
    )


def _schedules(measured: Measured) -> list[Schedule]:
    """The ways to merge tokens, the least harmful first, each cheaper than those before it."""
    if measured.harm is None or len(measured.harm.schedules) == 1:
        return [own(measured.subject.view)]
    sizes, least, found = measured.subject.sizes(), math.inf, []
    for schedule in measured.harm.schedules:
        cost = macs(schedule.sizes(sizes, measured.read))
        if cost < least:
            least = cost
            found.append(schedule)
    return found


def choose(
    measured: Measured, settings: PlanSettings, amount: float, latency: LatencyTable | None = None
) -> Choice:
    """The options with the least predicted harm within the budget: the best for each way of merging
    tokens, and of these the best.

    measured: `prepared` for these settings.
    """
    tried = _schedules(measured)
    best, refused = _best(measured, settings, amount, tried, latency)
    if best is None:
        assert refused is not None
        raise refused
    if len(tried) > 1:
        assert measured.harm is not None
        finer = between(measured.subject.view, measured.harm.schedules, best.schedule)
        better, _ = _best(measured, settings, amount, finer, latency, best)
        best = better or best
    return best


def _best(
    measured: Measured,
    settings: PlanSettings,
    amount: float,
    schedules: Sequence[Schedule],
    latency: LatencyTable | None,
    best: Choice | None = None,
) -> tuple[Choice | None, GateError | None]:
    """The choice of least harm, `best` or one with these schedules, the least harmful first; and
    why the first of them that is too dear was refused."""
    refused = None
    for schedule in schedules:
        if best is not None and schedule.nats >= best.nats:
            break  # nor can any that follow
        try:
            found = _selected(measured, settings, amount, schedule, latency)
        except GateError as err:  # what this schedule leaves is too dear
            refused = refused or err
            continue
        choice = Choice(found, schedule)
        if best is None or choice.nats < best.nats:
            best = choice
    return best, refused


def skeleton(measured: Measured, choice: Choice) -> Plan:
    """A plan of the sizes that a choice leads to, for timing; the values are not refitted."""
    further = _kept_of(measured, choice.selection, "none")
    fields = _fields(
        further, choice.schedule.counts, measured.read is not None, choice.selection.own
    )
    return Plan(choice.selection.keep, list(measured.subject.view.widths), **fields)


def _selected(
    measured: Measured,
    settings: PlanSettings,
    amount: float,
    schedule: Schedule,
    latency: LatencyTable | None,
) -> Selection:
    """The best options of all axes but tokens."""
    blocks = range(len(measured.subject.view.widths))
    harm = measured.harm if settings.selection == "measured" else None
    price = settings.price
    further: list[list[Item]] = []
    split = None
    if latency is not None:
        prices: list[Any] = list(latency.prices)
    elif price == "neurons":
        prices = [1.0 for _ in blocks]
    else:
        sizes = schedule.sizes(measured.subject.sizes(), measured.read)
        amount = hidden_budget(sizes, amount, price, attention=bool(measured.further))
        prices = [measured.hidden.prices(l, sizes, price) for l in blocks]
        if harm is not None:
            further = [
                [Item(table[l], axis.prices(l, sizes, price)) for l in blocks]
                for axis, table in zip(measured.further, harm.further, strict=True)
            ]
            if measured.own is not None and harm.own is not None:
                split = measured.own.split(harm.own, sizes, price)
        whole = [max(row.values()) for row in prices]
        whole += [max(item.prices.values()) for axis in further for item in axis]
        amount = min(amount, sum(whole))  # merging tokens may have met the budget already
    return select(
        measured.hidden.ranking,
        amount,
        method=settings.selection,
        prices=prices,
        harm=harm.hidden if harm is not None else None,
        others=further,
        split=split,
        tolerance=LATENCY_TOLERANCE if latency is not None else 0.01,
    )


# ---------------------------------------------------------------- refit


def refit(measured: Measured, settings: PlanSettings, choice: Choice, work: Work) -> Chosen:
    """What a choice keeps, with the compensation of what goes."""
    schedule = choice.schedule
    seconds: dict[str, float] = {}
    with timed(seconds, "paths"):
        selection, paths = work.team.on_first(
            lambda: with_path_neurons(measured, settings, choice.selection)
        )
    choice = replace(choice, selection=selection)
    with timed(seconds, "compensation"):
        mode = settings.compensation
        alone = "least-squares" if mode == "sequential" else mode  # `proj` is refitted once more
        further = _kept_of(measured, selection, alone)
        if mode == "sequential":
            refitted, found = _in_sequence(measured, settings, choice, further, work)
        else:
            refitted, found = _block_by_block(measured, settings, selection, further)
    details: dict[str, Any] = {
        "shrinkage": [c.shrinkage for c in found],
        "condition_number": [c.condition for c in found],
        "lost_variance": [c.error for c in found],
    }
    if selection.harm is not None:
        details["harm_nats"] = selection.harm
    if (unit := measured.subject.view.objective.unit) != "nats":
        details["harm_unit"] = unit
    if paths:
        details["paths"] = paths
    details |= {axis.name: axis.described(kept) for axis, kept in further}
    if selection.own is not None:
        details[CLS] = [len(own) for own in selection.own]
    if measured.harm is not None and settings.price == "macs":
        details["axes"] = _by_axis(measured, choice, further)
    details["seconds"] = {**measured.spent(settings), **seconds}
    device = measured.subject.device
    told = [text for axis, kept in further for text in axis.warnings(kept, device)]
    return Chosen(
        selection.keep,
        refitted,
        _path_neurons(measured, settings, selection.either),
        [*measured.notes, *selection.warnings, *_crowded(measured, selection), *told],
        details,
        further,
        schedule.counts,
        measured.read is not None,
        selection.own,
    )


def _path_neurons(
    measured: Measured, settings: PlanSettings, keep: Sequence[Sequence[int]]
) -> list[int]:
    """How many neurons of paths stay in each block; 0 where paths have no say."""
    paths = measured.subject.paths
    if paths is None or settings.paths == "off":
        return [0] * len(keep)
    return [len(neurons) for neurons in staying(paths, keep)]


def _by_axis(measured: Measured, choice: Choice, further: Further) -> list[dict[str, Any]]:
    """What each axis takes of the dense network's MACs, and its predicted harm: one after the
    other, as the list has them."""
    dense = measured.subject.sizes()
    whole, selection = macs(dense), choice.selection
    steps: list[tuple[str, Sizes, float]] = []
    sizes = dense.with_tokens(None, measured.read)
    if measured.read is not None:
        steps.append(("last block", sizes, 0.0))
    sizes = choice.schedule.sizes(dense, measured.read)
    steps.append((WORD, sizes, choice.schedule.nats))
    for (axis, kept), nats in zip(further, selection.shares[1:], strict=True):
        sizes = axis.resized(sizes, kept)
        steps.append((axis.name, sizes, nats))
    if selection.own is not None and measured.own is not None:
        sizes = replace(sizes, own_tokens=measured.own.tokens)
    own = None if selection.own is None else [len(kept) for kept in selection.own]
    steps.append(("mlp", sizes.with_hidden(selection.widths, own), selection.shares[0]))
    rows, before = [], whole
    for name, after, nats in steps:
        rows.append({"axis": name, "macs": (before - macs(after)) / whole, "nats": nats})
        before = macs(after)
    return rows


def _in_sequence(
    measured: Measured,
    settings: PlanSettings,
    choice: Choice,
    further: Further,
    work: Work,
) -> tuple[Refitted, list[Compensated]]:
    """Each block refitted on the network pruned so far."""
    subject, salience = measured.subject, measured.hidden.salience
    keep = choice.selection.keep
    found: list[Compensated] = []
    told = tell(work, "compensation", len(keep), "blocks")

    def on_block(l: int, block: Compensated) -> None:
        found.append(block)
        told(l + 1)

    weights = None
    if salience:
        statistics = measured.collected.statistics
        weights = [
            _at_patches(subject, l, statistics.position_weights(l, salience))
            for l in range(len(keep))
        ]
    changed: list[dict[Any, Replacement]] = [{} for _ in keep]
    for axis, kept in further:
        for row, layers in zip(changed, axis.stand_ins(kept), strict=True):
            row.update(layers)
    team = work.team

    def mine(batches: list[Tensor]) -> list[Tensor]:
        part = team.stretch(len(batches))
        return subject.placed(batches[part.start : part.stop])

    refitted = compensate_in_sequence(
        subject.view,
        mine(subject.fit),
        keep,
        fit=Fit(
            weights=weights,
            shrinkage=SHRINKAGE if settings.shrinkage is None else settings.shrinkage,
            held_out=mine(subject.held_out if settings.shrinkage is None else []),
            own_shrinkages=OWN_SHRINKAGES,
        ),
        changed=changed if further else None,
        merged=choice.schedule.counts,
        own=choice.selection.own,
        on_block=on_block,
        total=team.total,
    )
    return refitted, found


def _at_patches(subject: Subject, l: int, weights: Tensor) -> Tensor:
    """The weights [t] of a block's tokens as weights of the image's patches, where some merged."""
    sizes, view = subject.sizes(), subject.view
    aside = sizes.own_tokens if sizes.own is not None and sizes.own[l] else 0
    weights = torch.cat([weights.new_ones(aside), weights])  # these have units of their own
    missing = sizes.tokens - len(weights) if own(view).counts else 0
    return torch.cat([weights, weights[view.num_prefix_tokens :].mean().expand(missing)])


def _block_by_block(
    measured: Measured,
    settings: PlanSettings,
    selection: Selection,
    further: Further,
) -> tuple[Refitted, list[Compensated]]:
    """Each block from the dense network's statistics alone."""
    assert settings.compensation != "sequential"
    hidden, view = measured.hidden, measured.subject.view
    if settings.compensation != "none" and any(view.norm(l) for l in range(len(view.widths))):
        raise UsageError(
            f"{setting('prune.compensation', settings.compensation)} refits from what the whole "
            "network's hidden units are, and this one norms them: without some, the others change",
            hint=f"{setting('prune.compensation', 'sequential')} refits on the smaller norm",
        )
    shrinkage = SHRINKAGE if settings.shrinkage is None else settings.shrinkage
    held_out = measured.held_out if needs_held_out(measured, settings) else None
    layers, found = [], []
    for l, kept in enumerate(selection.keep):
        own = [] if selection.own is None else selection.own[l]
        split = measured.own if own else None
        fc2, moments = view.fc2(l), (hidden if split is None else split.rest).moments(l)
        if held_out is not None:
            sums = held_out if split is None else held_out.side("others")
            others = sums.moments(l, hidden.salience)
            shrinkage, _ = choose_shrinkage(moments, others, fc2.weight, kept)
        block = compensate(
            moments, fc2.weight, fc2.bias, kept, mode=settings.compensation, shrinkage=shrinkage
        )
        layers.append(Replacement(list(kept), block.weight, block.bias))
        if split is not None:
            theirs = compensate(
                split.own.moments(l), fc2.weight, fc2.bias, own,
                mode=settings.compensation, shrinkage=OWN_SHRINKAGE, diagnose=False,
            )  # fmt: skip
            layers[-1].first = split.tokens, Replacement(own, theirs.weight, theirs.bias)
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
        "there the paths alone decide (`--paths auto` keeps as many as cost nothing)"
    ]

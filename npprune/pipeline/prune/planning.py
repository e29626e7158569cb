"""From calibration images to what stays: statistics and harm once, then any budget.

    statistics -> scores -> [harm of each block and width] -> widths under a budget
    -> compensation -> the second layers of the pruned network

`Planner` does the first three once; `at(budget)` the rest, so that a budget can be searched for.
"""

from __future__ import annotations

import copy
import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from npprune.core.compression.attention import SmallerAttention
from npprune.core.compression.compensation import Compensated, choose_shrinkage, compensate
from npprune.core.compression.cost import Sizes, hidden_budget, neuron_price
from npprune.core.compression.criteria import CRITERIA, Context, score
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import Replacement, candidates_for, measure_harm
from npprune.core.compression.selection import Others, Selection, select, widths_for
from npprune.core.compression.sequential import Refitted, compensate_in_sequence
from npprune.core.compression.statistics import Moments, Need, Statistics, collect_statistics
from npprune.core.view import VitView
from npprune.errors import UsageError
from npprune.pipeline.common.events import Emit, Event
from npprune.pipeline.prune.axes import AttentionAxes, Pair, beyond_mlp
from npprune.pipeline.prune.latency import LATENCY_TOLERANCE, LatencyTable
from npprune.pipeline.prune.statistics import Batches, Collected, Shelf, collect
from npprune.recipe import PruneSection

HARM_IMAGES = 100
HARM_STEPS = 8  # widths measured in a block: multiples of an eighth
SALIENCE = 0.5  # share of the token weighting by the squared loss gradient


@dataclass
class Paths:
    """What the paths of the chosen classes say.

    union: per block, the neurons of every class's K most frequent, ascending.
    votes: per block [h], votes by rank, every class counting the same.
    attribution: per block [h], summed scores of the paths through a neuron, likewise.
    """

    union: list[list[int]]
    votes: list[Tensor]
    classes: int
    topk: int
    attribution: list[Tensor] = field(default_factory=list)


@dataclass
class Chosen:
    """What stays in each block, and the values of the layers that were refitted."""

    keep: list[list[int]]
    refitted: Refitted
    protected: list[int] = field(default_factory=list)  # path neurons among the kept
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    attention: list[SmallerAttention] = field(default_factory=list)  # per block; empty: as it was


@dataclass
class _Harm:
    """The table of measured harm, once it is there; planners of one criterion share it."""

    table: list[dict[int, float]] | None = None
    attention: list[dict[Pair, float]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _HeldOut:
    """Statistics of the held-out images, once they are there; shared as `_Harm` is."""

    statistics: Statistics | None = None
    seconds: float = 0.0


class Planner:
    """Everything about a network and its calibration images that does not depend on the budget.

    `held_out`: images that nothing is fitted on; unless the settings name a shrinkage, each refit
    takes the one that loses least on them. `latency`: the prices that `target_latency` needs.
    `like`: another planner of the same network, images and seed; its statistics are taken over
    where they hold what this one needs.
    `shelf`: where statistics are kept and found again; None: nowhere.
    """

    collected: Collected

    def __init__(
        self,
        view: VitView,
        batches: Batches,
        paths: Paths | None,
        settings: PruneSection,
        sizes: Callable[[], Sizes],
        generator: torch.Generator,
        emit: Emit,
        *,
        held_out: Batches | None = None,
        latency: LatencyTable | None = None,
        like: Planner | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.view, self.batches, self.settings, self.emit = view, batches, settings, emit
        self.paths, self.sizes, self.latency = paths, sizes, latency
        self.held_out: Batches = held_out or []
        self._held = _HeldOut()
        self.protected = paths.union if paths is not None and settings.protect_paths else None
        self.seconds: dict[str, float] = {}
        criterion = CRITERIA[settings.criterion]
        needs = needs_of(criterion.name)
        self.salience = SALIENCE if "salience" in needs else 0.0
        if like is not None and set(like.stats.needs) == needs:
            self.collected = like.collected
        else:
            self.collected = collect(view, batches, needs, generator, shelf or Shelf(), emit)
        self.stats: Statistics = self.collected.statistics
        self.seconds["statistics"] = self.collected.seconds
        with self._timed("scores"):
            self.scores = score(
                criterion.name,
                Context(
                    second=[view.fc2(l) for l in range(len(view.widths))],
                    statistics=self.stats,
                    votes=paths.votes if paths is not None else None,
                    attribution=paths.attribution if paths is not None else None,
                    protected=self.protected,
                    salience=self.salience,
                    generator=generator,
                ),
            )
        self.attention: AttentionAxes | None = None
        if beyond_mlp(settings):
            with self._timed("attention"):
                self.attention = AttentionAxes(
                    view,
                    settings.axes,
                    (x.to(self._device()) for x, _ in batches),
                    generator,
                    self._tell("attention", sum(len(y) for _, y in batches), "images"),
                )
        self._harm = _Harm()
        self._shared = dict(self.seconds)

    def retuned(self, settings: PruneSection) -> Planner:
        """The same scores for another selection, compensation or budget.

        Its `seconds` begin with those of the shared parts, as if it had done them itself.
        """
        other = copy.copy(self)
        other.settings, other.seconds = settings, dict(self._shared)
        return other

    def budget(self) -> float | None:
        """What the hidden units may cost, in units of `prices`; None where nothing was asked."""
        s = self.settings
        if s.keep is not None:
            return s.keep * sum(self.view.widths)
        attention = self.attention is not None
        if s.target_params is not None:
            return hidden_budget(self.sizes(), s.target_params, "params", attention=attention)
        if s.target_macs is not None:
            return hidden_budget(self.sizes(), s.target_macs, "macs", attention=attention)
        if s.target_latency is not None and self.latency is not None:
            return self.latency.budget(s.target_latency)
        if s.topk is not None and self.paths is not None and s.max_drop is None:
            return float(sum(len(u) for u in self.paths.union))
        return None

    def prices(self) -> Sequence[dict[int, float] | float] | None:
        """What one neuron (or each width) costs in each block; None: neurons count 1."""
        if self.settings.target_latency is not None and self.latency is not None:
            return self.latency.prices
        kind = self._price()
        if kind is None:
            return None
        sizes = self.sizes()
        return [float(neuron_price(sizes, l, kind)) for l in range(len(self.view.widths))]

    def bounds(self) -> tuple[float, float]:
        """The least budget there is a choice for, and the one at which all stays, where none was
        asked for: in hidden units, or in MACs where attention shares it."""
        if self.attention is None:
            return 0.0, float(sum(self.view.widths))
        sizes = self.sizes()
        pairs = self.attention.prices(sizes, "macs")
        least = sum(row[0] * neuron_price(sizes, l, "macs") for l, row in enumerate(self._widths()))
        return (
            least + sum(min(row.values()) for row in pairs),
            hidden_budget(sizes, 1.0, "macs", attention=True),
        )

    def _price(self) -> Literal["params", "macs"] | None:
        if self.settings.target_params is not None:
            return "params"
        if self.settings.target_macs is not None or self.attention is not None:
            return "macs"
        return None

    def select(self, budget: float) -> Selection:
        """The kept neurons of every block within the budget."""
        if self.settings.selection == "measured":
            return self._measured(budget)
        return self._select(budget, None)

    def at(self, budget: float) -> Chosen:
        """The kept neurons of every block within the budget, and their compensation."""
        selection, held_out = self.select(budget), self._held_out()
        with self._timed("compensation"):
            attention = self._shrunk(selection.others)
            refitted, found = self._compensate(selection.keep, attention, held_out)
        kept_paths = [
            len(set(kept) & set(union))
            for kept, union in zip(
                selection.keep, self.protected or [[]] * len(selection.keep), strict=True
            )
        ]
        details: dict[str, Any] = {
            "shrinkage": [c.shrinkage for c in found],
            "condition_number": [c.condition for c in found],
            "lost_variance": [c.error for c in found],
        }
        if selection.harm is not None:
            details["harm_nats"] = selection.harm
        if self.attention is not None:
            details["attention"] = self.attention.described(attention)
        return Chosen(
            selection.keep,
            refitted,
            kept_paths,
            [*selection.warnings, *self._crowded(selection)],
            {**details, "seconds": dict(self.seconds)},
            attention,
        )

    # ------------------------------------------------------------ parts

    def moments(self, l: int) -> Moments:
        """Mean and covariance of block l's hidden units."""
        return self.stats.moments(l, self.salience)

    def _select(self, budget: float, harm: Sequence[dict[int, float]] | None) -> Selection:
        return select(
            self.scores,
            budget,
            method=self.settings.selection,  # type: ignore[arg-type]
            prices=self.prices(),
            harm=harm,
            protected=self.protected,
            votes=self.paths.votes if self.paths is not None else None,
            others=self._others(),
            round_to=self.settings.round_to,
            min_keep=self._min_keep(),
            tolerance=0.01 if self.settings.target_latency is None else LATENCY_TOLERANCE,
        )

    def _measured(self, budget: float) -> Selection:
        """Widths by the measured harm of each block and width."""
        if self._harm.table is None:
            start = time.perf_counter()
            self._harm.table = self._measure_harm()
            self._harm.seconds = round(time.perf_counter() - start, 3)
        self.seconds["harm"] = self._harm.seconds
        return self._select(budget, self._harm.table)

    def _measure_harm(self) -> list[dict[int, float]]:
        if self.attention is not None:
            self._harm.attention = self.attention.measure(
                self._few(HARM_IMAGES), self._tell("attention", len(self.view.widths), "blocks")
            )
        if "mlp" not in self.settings.axes:
            return [{h: 0.0} for h in self.view.widths]
        grid = []
        for h, allowed in zip(self.view.widths, self._widths(), strict=True):
            steps = {_nearest(allowed, h * i / HARM_STEPS) for i in range(1, HARM_STEPS)}
            grid.append(sorted(steps))
        candidates = candidates_for(
            self.view, self.moments, self.scores, grid, protected=self.protected
        )

        def tell(l: int, row: dict[int, float]) -> None:
            self.emit(
                Event("harm", level="progress", done=l + 1, total=len(candidates), unit="blocks")
            )

        return measure_harm(self.view, self._few(HARM_IMAGES), candidates, on_block=tell)

    def _widths(self) -> list[list[int]]:
        """The widths that each block may take."""
        s = self.settings
        return [widths_for(h, s.round_to, self._min_keep()) for h in self.view.widths]

    def _min_keep(self) -> int:
        return self.settings.min_keep if "mlp" in self.settings.axes else max(self.view.widths)

    def _others(self) -> Others | None:
        if self.attention is None:
            return None
        prices = self.attention.prices(self.sizes(), self._price() or "macs")
        return Others(self._harm.attention, prices)

    def _shrunk(self, pairs: Sequence[Pair]) -> list[SmallerAttention]:
        """What stays of each block's attention; in sequence, `proj` is refitted once more."""
        if self.attention is None:
            return []
        mode = self.settings.compensation
        return [
            self.attention.shrunk(l, pair, "least-squares" if mode == "sequential" else mode)
            for l, pair in enumerate(pairs)
        ]

    def _tell(self, stage: str, total: int, unit: str) -> Callable[[int], None]:
        def tell(done: int) -> None:
            self.emit(Event(stage, level="progress", done=done, total=total, unit=unit))

        return tell

    def _compensate(
        self,
        keep: Sequence[Sequence[int]],
        attention: Sequence[SmallerAttention],
        held_out: Statistics | None,
    ) -> tuple[Refitted, list[Compensated]]:
        """The refitted layers, and how each block's second layer was found."""
        s = self.settings
        shrinkage = SHRINKAGE if s.shrinkage is None else s.shrinkage
        found: list[Compensated] = []
        if s.compensation == "sequential":

            def tell(l: int, block: Compensated) -> None:
                found.append(block)
                self._tell("compensation", len(keep), "blocks")(l + 1)

            held = self.held_out if s.shrinkage is None else []
            weights = None
            if self.salience:
                weights = [self.stats.position_weights(l, self.salience) for l in range(len(keep))]
            changed = None if self.attention is None else self.attention.stand_ins(attention)
            refitted = compensate_in_sequence(
                self.view,
                [x for x, _ in self._on_device(self.batches)],
                keep,
                weights=weights,
                shrinkage=shrinkage,
                held_out=[x for x, _ in self._on_device(held)],
                attention=changed,
                on_block=tell,
            )
            return refitted, found
        layers = []
        for l, kept in enumerate(keep):
            fc2, moments = self.view.fc2(l), self.moments(l)
            if held_out is not None:
                beside = held_out.moments(l, self.salience)
                shrinkage, _ = choose_shrinkage(moments, beside, fc2.weight, kept)
            block = compensate(
                moments, fc2.weight, fc2.bias, kept, mode=s.compensation, shrinkage=shrinkage
            )
            layers.append(Replacement(list(kept), block.weight, block.bias))
            found.append(block)
        projections = {l: a.proj for l, a in enumerate(attention) if a.proj is not None}
        return Refitted(layers, projections, []), found

    def _held_out(self) -> Statistics | None:
        """The held-out images' moments, weighted as the others' are; None where the refit's
        shrinkage is not chosen on them."""
        s = self.settings
        if s.compensation != "least-squares" or s.shrinkage is not None or not self.held_out:
            return None
        if self._held.statistics is None:
            start = time.perf_counter()
            needs: set[Need] = {"moments", "salience"} if self.salience else {"moments"}
            self._held.statistics = collect_statistics(
                self.view,
                self._on_device(self.held_out),
                needs=needs,
                generator=torch.Generator().manual_seed(0),
            )
            self._held.seconds = round(time.perf_counter() - start, 3)
        self.seconds["held-out"] = self._held.seconds
        return self._held.statistics

    def _crowded(self, selection: Selection) -> list[str]:
        """Where paths fill the budget, the criterion has nothing left to choose."""
        if self.protected is None:
            return []
        full = [
            l for l, (union, kept) in enumerate(zip(self.protected, selection.keep, strict=True))
            if len(union) >= len(kept) < self.view.widths[l]
        ]  # fmt: skip
        if not full:
            return []
        return [
            f"the paths' neurons fill the budget of {len(full)} of {len(selection.keep)} blocks: "
            "there the paths alone decide (`--no-protect-paths` lets the criterion decide)"
        ]

    def _few(self, count: int) -> list[Tensor]:
        """About `count` images, evenly over the calibration set, in batches."""
        everything = torch.cat([x for x, _ in self.batches])
        step = max(1, len(everything) // count)
        return [x.to(self._device()) for x in everything[::step][:count].split(50)]

    def _device(self) -> torch.device:
        return next(self.view.model.parameters()).device

    def _on_device(self, batches: Batches) -> Batches:
        return [(x.to(self._device()), y.to(self._device())) for x, y in batches]

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)


class _Timer:
    """Adds the seconds of a block to an entry."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *unused: object) -> None:
        spent = time.perf_counter() - self.start
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + spent, 3)


def needs_of(criterion: str) -> set[Need]:
    """The statistics that planning by a criterion reads."""
    needs: set[Need] = {*CRITERIA[criterion].needs, "moments"}
    return needs | {"salience"} if "curvature" in needs else needs


def draws(criterion: str) -> bool:
    """Whether the seed matters: a random order, or gradients in random directions."""
    return criterion == "random" or needs_of(criterion) != {"moments"}


def check_criterion(name: str, paths: bool) -> None:
    """UsageError for an unknown criterion, or one that reads paths where there are none."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=1)
        raise UsageError(
            f"`--criterion` must be one of {', '.join(CRITERIA)}, got `{name}`",
            hint=f"did you mean `{near[0]}`?" if near else None,
        )
    if CRITERIA[name].paths and not paths:
        raise UsageError(
            f"criterion `{name}` reads paths, and no run folder was given",
            hint="give the run folder of `npprune discover` in place of the model's name",
        )


def _nearest(allowed: Sequence[int], width: float) -> int:
    return min(allowed, key=lambda w: (abs(w - width), w))

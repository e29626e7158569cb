"""Milliseconds as a budget: what each width of a block costs on the runtime that will serve it.

One block's MLP is timed alone at several widths: that gives the shape of the price list. Timed
alone its weights stay in the cache, so the level comes from whole networks: the dense one and one
of narrower blocks, exported and timed in turn. What is left of the dense time is not prunable.
Then the widths that the budget leads to are timed as a network too, and the level corrected.

Where attention and tokens share the budget, it is met in MACs: `LatencySearch` times the networks
that a few budgets in MACs lead to, until one takes the time asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from npprune.budget import Budget, budget_of
from npprune.core.compression.selection import nearest, widths_for
from npprune.errors import GateError, setting
from npprune.export.bench import Runner, bench_pair, noise_warning, runner
from npprune.export.onnx import export_onnx, frozen_copy
from npprune.export.runtimes import RUNTIMES, Served
from npprune.export.widths import WidthLatency, measure_width_latency
from npprune.files import scratch
from npprune.models.info import model_sizes
from npprune.models.surgery import apply_plan
from npprune.pipeline.common.device import place_of
from npprune.pipeline.common.work import Work
from npprune.recipe import PruneSection
from npprune.records import Latency, Plan, Preprocessing, to_dict

STAGE = "latency"
LATENCY_TOLERANCE = 0.05  # of the latency asked for
FIRST_SHARE = 0.4  # of all widths, in the network that gives the level first
CORRECTIONS = 2  # of the level, at most
CLOSE = 0.02  # predicted and measured latency need no correction
SEARCHED = 5  # networks timed at most, where MACs stand for milliseconds
WIDTHS = 8  # timed between the least and the full one
WIDTH_SECONDS = 0.5  # for each of them, at least
PAIR_SECONDS = 3.0  # for two whole networks, at least
STEPS = 10_000  # prices are multiples of this part of the dense latency: the solver stays exact


class DenseTimer:
    """The dense network in a runtime, to time others against. A context: it holds a file."""

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        *,
        batch: int = 1,
        threads: int | None = None,
        provider: str = "auto",
        runtime: str = "onnxruntime",
    ) -> None:
        self.preprocessing, self.batch, self.provider = preprocessing, batch, provider
        self.runtime = RUNTIMES[runtime]
        self.threads = threads or torch.get_num_threads()
        self._held = ExitStack()
        self._folder = self._held.enter_context(scratch())
        try:
            self._dense = self._runner(model, "dense")
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> DenseTimer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def against(self, model: nn.Module) -> Latency:
        """Both in turn, milliseconds per batch."""
        other = self._runner(model, "other")
        return bench_pair(self._dense, other, min_seconds=PAIR_SECONDS)

    def _runner(self, model: nn.Module, name: str) -> Runner:
        path = self._folder / f"{name}.onnx"
        if self.runtime.takes_files:
            export_onnx(model, self.preprocessing, [], path)
        images = np.random.default_rng(0).standard_normal(
            (self.batch, *self.preprocessing.input_size), np.float32
        )
        # A copy: the network that is pruned stays where it is, in the mode it is in.
        served = Served(None if self.runtime.takes_files else frozen_copy(model), lambda _: path)
        opened = self.runtime.open(
            served,
            images,
            place=place_of(self.runtime.name, self.provider),
            threads=self.threads,
        )
        return runner(self.runtime.name, opened, images)


@dataclass
class LatencyTable:
    """Milliseconds of each block's MLP at each width it may take.

    `prices`: per block, inside the whole network, which is what a budget buys.
    """

    alone: list[dict[int, float]]  # per block, timed alone
    dense_ms: float  # the whole dense network, one batch
    dense_widths: list[int]
    batch: int = 1
    threads: int = 0
    provider: str = ""
    level: float = 1.0  # milliseconds inside the network over those alone
    alone_ms: dict[int, float] = field(default_factory=dict)  # as timed, width -> milliseconds
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._price()

    def _price(self) -> None:
        unit = self.dense_ms / STEPS
        self.prices = [
            {w: max(1, round(self.level * ms / unit)) * unit for w, ms in row.items()}
            for row in self.alone
        ]

    def set_level(self, widths: Sequence[int], pair: Latency) -> None:
        """the level at which the table predicts what `pair` measured at these widths."""
        dense = sum(row[w] for row, w in zip(self.alone, self.dense_widths, strict=True))
        narrow = sum(row[w] for row, w in zip(self.alone, widths, strict=True))
        saved = self.dense_ms * (1 - pair.ratio)
        if saved > 0 and dense > narrow:
            self.level = saved / (dense - narrow)
            self._price()
            return
        self.warnings.append(
            f"a network of widths {min(widths)} to {max(widths)} took {pair.ratio:.2f} x the "
            "dense latency: on this machine, at this batch size, narrower blocks are not faster"
        )

    def predicted_ms(self, widths: Sequence[int]) -> float:
        """The whole network at these widths."""
        return self.fixed_ms + self.hidden_ms(widths)

    @property
    def fixed_ms(self) -> float:
        """What no width changes."""
        return self.dense_ms - self.hidden_ms(self.dense_widths)

    def hidden_ms(self, widths: Sequence[int]) -> float:
        """All blocks' MLPs at these widths."""
        return sum(row[w] for row, w in zip(self.prices, widths, strict=True))

    def budget(self, target: Budget) -> float:
        """Milliseconds that the hidden units may take.

        Raises:
            GateError: what is not pruned, or the least widths allowed, take longer already.
        """
        goal = target.absolute(self.dense_ms)
        least = self.fixed_ms + self.hidden_ms([min(row) for row in self.prices])
        if goal < least:
            raise GateError(
                f"a latency of {goal:.4g} ms is below the {least:.4g} ms that the network takes "
                f"with every block at its least width (dense {self.dense_ms:.4g} ms, batch "
                f"{self.batch}, {self.provider})",
                hint=f"raise the target, or lower {setting('prune.min_keep')}: only MLP neurons "
                "are removed",
            )
        return min(goal - self.fixed_ms, self.hidden_ms(self.dense_widths))


class LatencyGoal(ABC):
    """A latency asked for, and the runtime it is timed on; its `timer` is to be closed."""

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, settings: PruneSection, work: Work
    ) -> None:
        target = budget_of(settings)
        assert target is not None
        self.target, self.work = target, work.on(STAGE)
        self.timer = DenseTimer(
            model,
            preprocessing,
            batch=settings.latency_batch,
            threads=settings.latency_threads,
            runtime=settings.latency_runtime,
        )

    def check(self, model: nn.Module, widths: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
        """Time what was made, of these hidden widths: what was asked for and measured; and why they
        differ, if they do."""
        measured = self.timer.against(model)
        record, warnings = self.outcome(widths, measured)
        self.work.say(
            f"{measured.pruned_ms:.4g} ms, {record['achieved_share']:.1%} of the dense "
            f"network's (asked: {record['asked_share']:.1%}), batch {measured.batch}, "
            f"{measured.provider}"
        )
        return record, warnings

    @abstractmethod
    def outcome(self, widths: Sequence[int], latency: Latency) -> tuple[dict[str, Any], list[str]]:
        """The record of what was asked for and measured, and warnings."""


class LatencyTarget(LatencyGoal):
    """A latency met by a price list of the widths."""

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        widths: Sequence[int],
        settings: PruneSection,
        work: Work,
    ) -> None:
        """Time one MLP at several widths, and two whole networks to know the level."""
        super().__init__(model, preprocessing, settings, work)
        self.model, self.dense_widths = model, list(widths)
        try:
            sizes = model_sizes(model)
            allowed = [widths_for(h, settings.round_to, settings.min_keep) for h in widths]
            self.work.say(f"timing a block's MLP at several widths, batch {self.timer.batch}")
            blocks = sizes.stages or ((sizes.tokens, sizes.width),) * len(allowed)
            timed: dict[tuple[int, int], WidthLatency] = {}
            for stage in dict.fromkeys(blocks):
                own = [row for row, of in zip(allowed, blocks, strict=True) if of == stage]
                timed[stage] = measure_width_latency(
                    stage[1],
                    _grid(sorted({w for row in own for w in row})),
                    tokens=stage[0],
                    batch=self.timer.batch,
                    threads=self.timer.threads,
                    provider=place_of(self.timer.runtime.name, self.timer.provider),
                    min_seconds=WIDTH_SECONDS,
                    runtime=self.timer.runtime,
                )
            alone = [timed[stage] for stage in blocks]
            self.table = build_table(alone, allowed, widths, self._at)
        except BaseException:
            self.timer.__exit__(None, None, None)
            raise

    def correct(self, widths_at: Callable[[float], list[int]]) -> None:
        """See `correct`."""
        correct(self.table, self.target, widths_at, self._at)

    def outcome(self, widths: Sequence[int], latency: Latency) -> tuple[dict[str, Any], list[str]]:
        """See `outcome`."""
        return outcome(self.table, self.target, widths, latency)

    def _at(self, widths: Sequence[int]) -> Latency:
        """The network with its blocks at other widths; which neurons stay does not matter."""
        least, most = min(widths), max(widths)
        self.work.say(f"timing a network of widths {least} to {most} against the dense one")
        plan = Plan(keep=[list(range(w)) for w in widths], widths=self.dense_widths)
        return self.timer.against(apply_plan(self.model, plan))


class LatencySearch(LatencyGoal):
    """A latency met by way of MACs."""

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, settings: PruneSection, work: Work
    ) -> None:
        super().__init__(model, preprocessing, settings, work)
        self.tried: list[tuple[float, float]] = []

    def asked(self, pair: Latency) -> float:
        """The share of the dense latency that was asked for."""
        return self.target.amount if self.target.amount <= 1 else self.target.amount / pair.dense_ms

    def macs(self, whole: float, least: float, network: Callable[[float], nn.Module]) -> float:
        """MACs of the largest network found that takes no longer than asked.

        Args:
            whole: the dense network's MACs; `least`: those that a network has to have.
            network: of the sizes that so many MACs lead to.

        Raises:
            GateError: even the least takes longer; it is timed as soon as another does.
        """
        low, high = (least / whole, 0.0), (1.0, 1.0)  # shares of MACs and of milliseconds
        best, share = None, min(1.0, max(self.target.amount, low[0]))
        if self.target.amount > 1:
            share = max(0.5, low[0])
        for _ in range(SEARCHED):
            pair = self._timed(share, network(share * whole))
            asked = self.asked(pair)
            if pair.ratio <= asked * (1 + CLOSE):
                best, low = share, (share, pair.ratio)
            else:
                high = share, pair.ratio
            if abs(pair.ratio / asked - 1) <= CLOSE:
                break
            if best is None:  # is there any that is fast enough?
                if share > low[0]:
                    pair = self._timed(low[0], network(least))
                if pair.ratio > asked * (1 + CLOSE):
                    raise self._too_slow(asked, pair)
                best, low = low[0], (low[0], pair.ratio)
            slope = (high[1] - low[1]) / max(high[0] - low[0], 1e-9)
            step = max(0.0, asked - low[1]) / max(slope, 1e-9)
            span = high[0] - low[0]
            share = low[0] + min(max(step, 0.05 * span), 0.95 * span if high[0] < 1 else span)
        assert best is not None
        return best * whole

    def _timed(self, share: float, network: nn.Module) -> Latency:
        """A network of so many of the MACs against the dense one."""
        pair = self.timer.against(network)
        self.tried.append((share, pair.ratio))
        self.work.say(
            f"{share:.1%} of the MACs take {pair.ratio:.1%} of the dense latency "
            f"(asked: {self.asked(pair):.1%})"
        )
        return pair

    def _too_slow(self, asked: float, least: Latency) -> GateError:
        """Even the smallest network takes longer: how far it got."""
        share, ratio = min(self.tried, key=lambda tried: tried[1])
        hint = f"raise the target, or lower {setting('prune.min_keep')}"
        if ratio > 0.9:
            hint = (
                f"at batch {least.batch} the time goes into other things than MACs: try a larger "
                f"{setting('prune.latency_batch')}, or {setting('prune.axes', 'mlp,heads,qk')}, "
                "as merging tokens adds operations of its own"
            )
        faster = f" and the {ratio:.1%} with {share:.1%} of the MACs" if ratio < least.ratio else ""
        return GateError(
            f"a latency of {asked:.1%} of the dense one is below the {least.ratio:.1%} that the "
            f"smallest network allowed takes{faster} (dense {least.dense_ms:.4g} ms, batch "
            f"{least.batch}, {least.provider})",
            hint=hint,
        )

    def outcome(self, widths: Sequence[int], latency: Latency) -> tuple[dict[str, Any], list[str]]:
        """What was asked for and measured; and why it took longer, if it did."""
        asked = self.asked(latency)
        record = {
            "target": self.target.amount,
            "asked_share": asked,
            "achieved_share": latency.ratio,
            "tried": [{"macs": m, "latency": r} for m, r in self.tried],
            "measured": to_dict(latency),
        }
        warnings = []
        if (off := latency.ratio / asked - 1) > LATENCY_TOLERANCE:
            warnings.append(
                f"latency is {latency.ratio:.1%} of the dense network's, and {asked:.1%} was asked "
                f"for ({off:+.1%}): "
                + (noise_warning(latency) or "the load of the machine has changed")
            )
        return record, warnings


def build_table(
    alone: WidthLatency | Sequence[WidthLatency],
    allowed: Sequence[Sequence[int]],
    widths: Sequence[int],
    whole: Callable[[Sequence[int]], Latency],
) -> LatencyTable:
    """Prices from the MLP timed alone (each block's, where they differ), at the level of the whole
    network.

    `whole(widths)` times the dense network and one of other widths in turn.
    """
    each = [alone] * len(allowed) if isinstance(alone, WidthLatency) else list(alone)
    rows = [_rising({w: of.at(w) for w in row}) for of, row in zip(each, allowed, strict=True)]
    narrow = [nearest(row, FIRST_SHARE * h) for row, h in zip(allowed, widths, strict=True)]
    pair = whole(narrow)
    table = LatencyTable(
        rows, pair.dense_ms, list(widths), each[0].batch, each[0].threads, each[0].provider
    )
    for of in reversed(each):  # of two with the same width, the first
        table.alone_ms |= dict(zip(of.widths, of.ms, strict=True))
    table.set_level(narrow, pair)
    if (noisy := noise_warning(pair)) is not None:
        table.warnings.append(noisy)
    return table


def correct(
    table: LatencyTable,
    target: Budget,
    widths_at: Callable[[float], list[int]],
    whole: Callable[[Sequence[int]], Latency],
) -> None:
    """Set the level anew from the widths that the budget leads to, until measured as predicted.

    `widths_at(budget)`: the widths that selection takes.

    Raises:
        GateError: the target cannot be reached.
    """
    for _ in range(CORRECTIONS):
        widths = widths_at(table.budget(target))
        if list(widths) == table.dense_widths:
            return
        pair = whole(widths)
        predicted = table.predicted_ms(widths) / table.dense_ms
        if abs(pair.ratio / predicted - 1) <= CLOSE:
            return
        table.set_level(widths, pair)


def outcome(
    table: LatencyTable, target: Budget, widths: Sequence[int], latency: Latency
) -> tuple[dict[str, Any], list[str]]:
    """What was asked for, predicted and measured; and why the last is not the first, if it is not.

    `latency`: the pruned network against the dense one.
    """
    predicted = table.predicted_ms(widths)
    share = target.amount <= 1
    asked = target.amount if share else target.amount / latency.dense_ms
    measured = latency.ratio if share else latency.pruned_ms / latency.dense_ms
    record = {
        "target": target.amount,
        "asked_share": asked,
        "achieved_share": measured,
        "foreseen_ms": predicted,
        "fixed_ms": table.fixed_ms,
        "level": table.level,
        "alone_ms": table.alone_ms,
        "measured": to_dict(latency),
    }
    warnings = list(table.warnings)
    if latency.ratio >= 1:
        warnings.insert(
            0,
            f"the pruned network is not faster than the dense one on this machine: "
            f"{latency.pruned_ms:.4g} ms against {latency.dense_ms:.4g} ms at batch "
            f"{latency.batch} ({latency.provider})",
        )
    off = measured / asked - 1
    if abs(off) > LATENCY_TOLERANCE:
        planned = predicted / target.absolute(table.dense_ms) - 1
        if abs(planned) > LATENCY_TOLERANCE:
            why = f"the widths allowed come no nearer than {planned:+.1%}"
        else:
            why = noise_warning(latency) or (
                f"the table predicted {predicted / table.dense_ms:.1%}; the times of single blocks "
                "do not add up here, or the load of the machine has changed"
            )
        warnings.append(
            f"latency is {measured:.1%} of the dense network's, and {asked:.1%} was asked for "
            f"({off:+.1%}): {why}"
        )
    return record, warnings


def _grid(widths: Sequence[int]) -> list[int]:
    """The least and the full width, and those nearest to equal steps between them."""
    least, full = widths[0], widths[-1]
    steps = range(WIDTHS + 1)
    return sorted({nearest(widths, least + (full - least) * i / WIDTHS) for i in steps})


def _rising(row: dict[int, float]) -> dict[int, float]:
    """Wider is never cheaper: what says otherwise is noise, which an exact solver would exploit."""
    out, most = {}, 0.0
    for w in sorted(row):
        most = max(most, row[w])
        out[w] = most
    return out

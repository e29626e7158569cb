"""What a budget may take from, one file per axis: hidden units, attention, ...

An axis offers options in every block, measures what each does to the predictions, and says what it
costs. The planner takes one option per block and axis within the budget; the axis then says how
the rest of the network sees the choice, what goes into the plan, and carries it out.

Hidden units are the base of every plan (`HiddenUnits`); `Axis` is what further axes implement. A
new one is its file, a line in `further_axes`, a field of `records.Plan` and its surgery. Tokens
(`tokens`) are chosen for the network as a whole, and change what all others cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from npprune import words
from npprune.budget import budget_of
from npprune.core.compression.compensation import Mode
from npprune.core.compression.cost import Sizes
from npprune.core.compression.harm import Replacement
from npprune.core.compression.statistics import Total
from npprune.core.view import VitView
from npprune.errors import ModelError
from npprune.models.surgery import check_axes
from npprune.models.view import outputs_count
from npprune.pipeline.common.processes import ALONE, Processes
from npprune.recipe import PruneSection

Option = Any
Kept = Any
"""What stays of one block, refitted: each axis has its own type."""
Tell = Callable[[int], None]
"""Called with how much is done."""


class Axis(ABC):
    """One way to make blocks cheaper, measured on calibration images.

    `name` is the entry of the summary's details and of its seconds; `words` are what a user may
    write in `axes`.
    """

    name: ClassVar[str]
    words: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def measured(
        cls,
        view: VitView,
        words: Collection[str],
        batches: Sequence[Tensor],
        generator: torch.Generator,
        tell: Tell,
        *,
        total: Total | None = None,
    ) -> Axis:
        """What the calibration images say. `tell` gets the number of images done; `total` adds the
        sums of other processes, which have other batches."""

    @abstractmethod
    def options(self, l: int) -> list[Option]:
        """What may stay of block l, ascending; the last one: all of it."""

    @abstractmethod
    def harm(
        self, images: Sequence[Tensor], tell: Tell, team: Processes = ALONE
    ) -> list[dict[Option, float]]:
        """Nats of each block's options, that block alone changed; the processes share the options
        out. `tell` gets blocks done."""

    @abstractmethod
    def prices(self, l: int, sizes: Sizes, unit: str) -> dict[Option, float]:
        """What block l's options cost in params or MACs, exactly, in a network of these sizes."""

    @abstractmethod
    def kept(self, l: int, option: Option, mode: Mode) -> Kept:
        """What stays of block l, refitted by itself."""

    @abstractmethod
    def stand_ins(self, kept: Sequence[Kept]) -> list[dict[nn.Linear, Replacement]]:
        """Per block, layers of the dense sizes by which the rest of the network sees the choice."""

    def projections(self, kept: Sequence[Kept]) -> dict[int, Replacement]:
        """Block -> the attention's last layer, where the axis refits it."""
        return {}

    @abstractmethod
    def plan(self, kept: Sequence[Kept]) -> dict[str, Any]:
        """Its fields of `records.Plan`."""

    @abstractmethod
    def resized(self, sizes: Sizes, kept: Sequence[Kept]) -> Sizes:
        """The sizes of a network with what stays."""

    @abstractmethod
    def carry_out(self, model: nn.Module, dense: VitView, kept: Sequence[Kept]) -> None:
        """Give the pruned network the values that calibration found; the plan is applied."""

    def warnings(self, kept: Sequence[Kept], device: torch.device) -> list[str]:
        """What to know of the choice; `device`: where the network is."""
        return []

    @abstractmethod
    def described(self, kept: Sequence[Kept]) -> Mapping[str, Any]:
        """What stays and what there was, per block, for summary and report."""


def further_axes() -> list[type[Axis]]:
    """The axes besides hidden units, in the order in which a block runs them."""
    from npprune.pipeline.prune.axes.attention import Attention

    return [Attention]


def beyond_hidden(named: Collection[str]) -> list[type[Axis]]:
    """The further axes that `axes` names."""
    return [axis for axis in further_axes() if set(axis.words) & set(named)]


def axes_for(settings: PruneSection, model: nn.Module) -> list[words.Axis]:
    """The axes asked for, else those that suit the budget: hidden units where it counts them or
    parameters; all that the network has where it asks for fewer MACs, less time, or the smallest
    network within a drop.

    Raises:
        ModelError: an axis asked for, and there is nothing of it to take from.
    """
    if settings.axes is not None:
        check_axes(model, settings.axes)
        return settings.axes
    budget = budget_of(settings)
    fast = budget.unit in ("macs", "latency") if budget else settings.max_drop is not None
    one_output = outputs_count(model) == 1  # no axis but the first can be measured
    if not fast or settings.selection != "measured" or one_output:
        return ["mlp"]
    found: list[words.Axis] = []
    for axis in words.ALL_AXES:
        try:
            check_axes(model, [axis])
        except ModelError:
            continue
        found.append(axis)
    return found

"""Patch tokens: how many merge in each block, and whether the last one computes what is read alone.

Merging early changes what merging late does, so the harm of single blocks does not add up. Whole
schedules are measured instead, and the other axes share what each of them leaves of the budget:
every block that follows is cheaper for the tokens that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product

from torch import Tensor

from npprune.core.compression.cost import Sizes
from npprune.core.compression.harm import predict
from npprune.core.compression.token_harm import schedule_divergence
from npprune.core.tokens import most
from npprune.core.view import VitView
from npprune.errors import ModelError
from npprune.models.merging import check_tokens
from npprune.models.tokens import patch_tokens, tokens_of
from npprune.pipeline.common.processes import ALONE, Processes
from npprune.pipeline.prune.axes import Tell

WORD = "tokens"
SHARES = (0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""Of the patch tokens, merged in all blocks together."""
SHAPES = (
    (2 / 12, 11 / 12, 0.0),
    (2 / 12, 9 / 12, 0.0),
    (1 / 12, 11 / 12, 0.5),
    (2 / 12, 11 / 12, 0.5),
    (3 / 12, 11 / 12, 0.5),
)
"""From and up to which share of the blocks, and how many more than the mean merge in the first of
them, and fewer in the last. Merging in the first blocks saves most and harms most."""


FINER = 4
"""Steps between two shares, where nats are read between those measured."""


@dataclass(frozen=True)
class Schedule:
    """How many tokens each block merges, and what that does to the predictions, in nats.

    `shape` and `share`: where it came from; None for a network's own.
    """

    merged: tuple[int, ...]
    nats: float = 0.0
    shape: tuple[float, float, float] | None = None
    share: float = 0.0

    @property
    def counts(self) -> list[int] | None:
        """Per block; None: no block merges any."""
        return list(self.merged) if any(self.merged) else None

    def sizes(self, dense: Sizes, read: int | None) -> Sizes:
        """The network's, with this schedule, and only `read` tokens of the last block computed."""
        return dense.with_tokens(self.counts, read)


def merging(
    patches: int, depth: int, share: float, shape: tuple[float, float, float]
) -> tuple[int, ...] | None:
    """So many of the patch tokens, merged by a shape; None where a block has too few of them.

    The last block merges none: only its MLP would be cheaper.
    """
    start, end, slope = shape
    first = min(round(start * depth), depth - 2)
    n = max(1, min(round(end * depth), depth - 1) - first)
    parts = [1 + slope * (1 - 2 * i / max(1, n - 1)) for i in range(n)]
    ends = [0, *(round(share * patches * s / n) for s in accumulate(parts))]
    merged = [b - a for a, b in pairwise(ends)]
    if any(r > most(patches - e) for r, e in zip(merged, ends, strict=False)):
        return None
    return (*[0] * first, *merged, *[0] * (depth - first - n))


def schedules(patches: int, depth: int) -> list[Schedule]:
    """What is tried: so many tokens in all, by each of the shapes; nothing is measured yet."""
    found: dict[tuple[int, ...], Schedule] = {}
    for shape, share in product(SHAPES, SHARES):
        merged = merging(patches, depth, share, shape)
        if merged is not None and any(merged):
            found.setdefault(merged, Schedule(merged, 0.0, shape, share))
    return sorted(found.values(), key=lambda s: s.merged)


def measured_schedules(
    view: VitView, images: Sequence[Tensor], tell: Tell, team: Processes = ALONE
) -> list[Schedule]:
    """Each schedule's nats, the network's own first; the processes share them out. `tell` gets
    schedules done."""
    reference = predict(view, images)
    tried = schedules(patch_tokens(view.model), len(view.widths))

    def measure(rows: list[list[Schedule]]) -> list[dict[Schedule, float]]:
        found = {}
        for i, s in enumerate(rows[0], start=1):
            found[s] = schedule_divergence(view, images, s.merged, reference=reference)
            tell(min(i * team.count, len(tried)))
        return [found]

    (nats,) = team.shared_out([tried], measure)
    return sorted([own(view), *(replace(s, nats=nats[s]) for s in tried)], key=lambda s: s.nats)


def between(view: VitView, measured: Sequence[Schedule], one: Schedule) -> list[Schedule]:
    """Schedules of one's shape between it and its neighbours, with nats on the line through the
    logarithms of those measured; from nothing merged, on the line through the nats."""
    if one.shape is None:
        first = min((s.share for s in measured if s.share), default=0.0)
        same = [s for s in measured if s.share == first]
    else:
        same = [s for s in measured if s.shape == one.shape]
    out: dict[tuple[int, ...], Schedule] = {}
    for shape in {s.shape for s in same if s.shape is not None}:
        line = [Schedule((0,) * len(one.merged))]
        line += sorted((s for s in same if s.shape == shape), key=lambda s: s.share)
        for a, b in pairwise(line):
            if one.share not in (a.share, b.share):
                continue
            for i in range(1, FINER):
                t = i / FINER
                share = a.share + t * (b.share - a.share)
                merged = merging(patch_tokens(view.model), len(one.merged), share, shape)
                if a.nats > 0 and b.nats > 0:
                    nats = a.nats ** (1 - t) * b.nats**t
                else:
                    nats = (1 - t) * a.nats + t * b.nats
                if merged is not None:
                    out.setdefault(merged, Schedule(merged, nats, shape, share))
    return sorted(out.values(), key=lambda s: s.nats)


def own(view: VitView) -> Schedule:
    """What the network merges itself; most merge nothing."""
    return Schedule(tuple(tokens_of(view.model)[0]))


def count(view: VitView) -> int:
    """How many schedules are measured."""
    return len(schedules(patch_tokens(view.model), len(view.widths)))


def read_alone(view: VitView) -> int | None:
    """How many tokens the last block has to compute; None: all, or there is no telling."""
    if view.tokens_read is not None:
        try:
            check_tokens(view.model, len(view.widths) - 1)
        except ModelError:
            return None
    return view.tokens_read

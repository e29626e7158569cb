"""Attention heads, and the dimensions of a head: of queries and keys (`qk`), or of queries, keys
and values alike (`head-dim`).

The attention of a block is one item of the budget, since heads and their dimensions multiply in its
price; its options are pairs of both. Each is measured alone, in nats, on the network with that one
change; the harm of a pair is the sum of its two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.compression.attention import (
    AttentionMoments,
    SmallerAttention,
    collect_attention,
    shrink,
    smaller_qkv,
    stand_ins,
)
from npprune.core.compression.compensation import Mode
from npprune.core.compression.cost import Sizes, attention_price
from npprune.core.compression.elimination import Elimination, eliminate_groups
from npprune.core.compression.harm import Replacement, measure_harm
from npprune.core.compression.statistics import Total
from npprune.core.view import Projections, VitView
from npprune.errors import plural, setting
from npprune.models.surgery import set_qkv
from npprune.pipeline.common.processes import ALONE, Processes
from npprune.pipeline.prune.axes import Axis, Tell
from npprune.words import ALL_AXES

Pair = tuple[int, int]
"""Heads that stay, and query/key dimensions of each; under `head-dim`, value dimensions as well."""

HEAD_STEPS = 6  # numbers of heads tried: about every sixth of them
QUERY_SHARES = (0.75, 0.5, 0.375, 0.25)  # of the query/key dimensions
QUERY_MULTIPLE = 8


@dataclass
class Attention(Axis):
    """Every block's attention: its layers, what calibration says of it, which heads go first."""

    name = "attention"
    words = ("heads", "qk", "head-dim")

    view: VitView
    asked: Collection[str]  # of `words`
    parts: list[Projections]
    moments: list[AttentionMoments]
    orders: list[Elimination]

    @classmethod
    def measured(
        cls,
        view: VitView,
        words: Collection[str],
        batches: Sequence[Tensor],
        generator: torch.Generator,
        tell: Tell,
        *,
        total: Total | None = None,
    ) -> Attention:
        parts = [view.attention(l) for l in range(len(view.widths))]
        moments = collect_attention(view, batches, generator=generator, on_batch=tell, total=total)
        orders = [
            eliminate_groups(m.inputs.covariance, p.proj.weight, p.heads, m.curvature)
            for p, m in zip(parts, moments, strict=True)
        ]
        return cls(view, words, parts, moments, orders)

    def heads(self, l: int) -> list[int]:
        """How many heads may stay in block l, ascending."""
        n = self.parts[l].heads
        steps = range(1, HEAD_STEPS + 1) if "heads" in self.asked else [HEAD_STEPS]
        return sorted({max(1, round(n * i / HEAD_STEPS)) for i in steps})

    def query_dims(self, l: int) -> list[int]:
        """How many query/key dimensions a head of block l may keep, ascending."""
        full = self.parts[l].query_dims
        shares = QUERY_SHARES if {"qk", "head-dim"} & set(self.asked) else ()
        steps = {-(-round(full * s) // QUERY_MULTIPLE) * QUERY_MULTIPLE for s in shares}
        return sorted({s for s in steps if s < full} | {full})

    def value_dims(self, l: int, query_dims: int) -> int:
        """How many value dimensions a head of block l keeps beside so many of its queries."""
        return query_dims if self.with_values else self.parts[l].value_dims

    @property
    def with_values(self) -> bool:
        """Whether values are narrowed with queries and keys."""
        return "head-dim" in self.asked

    def options(self, l: int) -> list[Pair]:
        return [(n, r) for n in self.heads(l) for r in self.query_dims(l)]

    def harm(
        self, images: Sequence[Tensor], tell: Tell, team: Processes = ALONE
    ) -> list[dict[Pair, float]]:
        """Less left is never less harm: what says otherwise is noise."""
        singles: list[list[Pair]] = []
        for l, p in enumerate(self.parts):
            options = [(n, p.query_dims) for n in self.heads(l)[:-1]]
            singles.append(options + [(p.heads, r) for r in self.query_dims(l)[:-1]])

        def measure(rows: list[list[Pair]]) -> list[dict[Pair, float]]:
            made = (
                {o: stand_ins(p, self.kept(l, o, "least-squares")) for o in row}
                for l, (p, row) in enumerate(zip(self.parts, rows, strict=True))
            )
            return measure_harm(self.view, images, made, on_block=tell)

        table: list[dict[Pair, float]] = []
        measured = team.shared_out(singles, measure)
        for l, (p, row) in enumerate(zip(self.parts, measured, strict=True)):
            by_heads = _never_rising({n: row.get((n, p.query_dims), 0.0) for n in self.heads(l)})
            by_dims = _never_rising({r: row.get((p.heads, r), 0.0) for r in self.query_dims(l)})
            table.append({(n, r): by_heads[n] + by_dims[r] for n, r in self.options(l)})
        return table

    def prices(self, l: int, sizes: Sizes, unit: str) -> dict[Pair, float]:
        return {
            (n, r): float(
                attention_price(sizes, n * r, n * self.value_dims(l, r), unit, l)  # type: ignore[arg-type]
            )
            for n, r in self.options(l)
        }

    def kept(self, l: int, option: Pair, mode: Mode) -> SmallerAttention:
        heads, query_dims = option
        keep = self.orders[l].keep(heads)
        return shrink(
            self.parts[l], self.moments[l], keep, query_dims, values=self.with_values, mode=mode
        )

    def stand_ins(self, kept: Sequence[SmallerAttention]) -> list[dict[nn.Linear, Replacement]]:
        return [stand_ins(p, s) for p, s in zip(self.parts, kept, strict=True)]

    def projections(self, kept: Sequence[SmallerAttention]) -> dict[int, Replacement]:
        return {l: s.proj for l, s in enumerate(kept) if s.proj is not None}

    def plan(self, kept: Sequence[SmallerAttention]) -> dict[str, Any]:
        return {
            "heads": [s.heads for s in kept] if "heads" in self.asked else None,
            "query_dims": [s.query_dims for s in kept] if "qk" in self.asked else None,
            "head_dims": [s.query_dims for s in kept] if self.with_values else None,
        }

    def resized(self, sizes: Sizes, kept: Sequence[SmallerAttention]) -> Sizes:
        each = [(len(s.heads), s) for s in kept]
        return replace(
            sizes,
            queries=tuple(n * s.query_dims for n, s in each),
            values=tuple(n * self.value_dims(l, s.query_dims) for l, (n, s) in enumerate(each)),
        )

    def carry_out(self, model: nn.Module, dense: VitView, kept: Sequence[SmallerAttention]) -> None:
        for l, smaller in enumerate(kept):
            if dense.attention(l).qkv is None:
                continue  # the rows that stay are as they were
            set_qkv(model, l, *smaller_qkv(dense.attention(l), smaller))

    def warnings(self, kept: Sequence[SmallerAttention], device: torch.device) -> list[str]:
        narrow = sum(s.query_dims < self.value_dims(l, s.query_dims) for l, s in enumerate(kept))
        if device.type != "cuda" or not narrow:
            return []
        axes = ",".join("head-dim" if axis == "qk" else axis for axis in ALL_AXES)
        return [
            f"queries and keys are narrower than values in {narrow} of "
            f"{plural(len(kept), 'block')}: PyTorch's flash attention takes one head dimension "
            f"alone ({setting('prune.axes', axes)} keeps it)"
        ]

    def described(self, kept: Sequence[SmallerAttention]) -> dict[str, list[int]]:
        """Heads, and query/key dimensions of a head; where values are narrowed, theirs."""
        found = {
            "heads": [len(s.heads) for s in kept],
            "dense_heads": [p.heads for p in self.parts],
            "query_dims": [s.query_dims for s in kept],
            "dense_query_dims": [p.query_dims for p in self.parts],
        }
        if self.with_values:
            found["value_dims"] = found["query_dims"]
        return found


def _never_rising(row: dict[int, float]) -> dict[int, float]:
    worst, out = 0.0, {}
    for size in sorted(row, reverse=True):
        worst = max(worst, row[size])
        out[size] = worst
    return out

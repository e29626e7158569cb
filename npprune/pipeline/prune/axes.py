"""What a budget may take from beside hidden units: attention heads, query/key dimensions.

The attention of a block is one item of the budget, since heads and query/key dimensions multiply
in its price; its options are pairs of both. Each axis is measured alone, in nats, on the network
with that one change; the harm of a pair is the sum of its two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from npprune.core.compression.attention import (
    SmallerAttention,
    collect_attention,
    shrink,
    stand_ins,
)
from npprune.core.compression.compensation import Mode
from npprune.core.compression.cost import Sizes, attention_price
from npprune.core.compression.elimination import eliminate_groups
from npprune.core.compression.harm import Replacement, measure_attention_harm
from npprune.core.view import VitView
from npprune.errors import UsageError
from npprune.recipe import PruneSection

Pair = tuple[int, int]
"""Heads that stay, and query/key dimensions of each."""

HEAD_STEPS = 6  # numbers of heads tried: about every sixth of them
QUERY_SHARES = (0.75, 0.5, 0.375, 0.25)  # of the query/key dimensions
QUERY_MULTIPLE = 8


def beyond_mlp(settings: PruneSection) -> bool:
    """Whether attention shares the budget."""
    return set(settings.axes) != {"mlp"}


def check_settings(settings: PruneSection) -> None:
    """UsageError where other axes than hidden units do not go with the rest of the settings."""
    if not beyond_mlp(settings):
        return
    axes = f"`--axes {','.join(settings.axes)}`"
    hint = "use `--target-macs X` or `--target-params X`, or `--max-drop POINTS` alone"
    if settings.keep is not None:
        raise UsageError(
            f"`--keep` is a share of the hidden units, and {axes} shares a budget among more",
            hint=hint,
        )
    if settings.target_latency is not None:
        raise UsageError(
            f"`--target-latency` knows what hidden units cost, not attention: it does not go with "
            f"{axes}",
            hint=hint,
        )
    if settings.target_params is settings.target_macs is settings.max_drop is None:
        raise UsageError(
            f"`--topk` alone keeps the paths' hidden units, and {axes} needs a budget that "
            "attention can share",
            hint=hint,
        )
    if settings.selection != "measured":
        raise UsageError(
            f"{axes} needs `--selection measured`, got `{settings.selection}`: only measured harm "
            "compares hidden units with heads",
            hint="leave `--selection` out",
        )


class AttentionAxes:
    """Every block's attention: what may stay of it, at what harm and price."""

    def __init__(
        self,
        view: VitView,
        axes: Sequence[str],
        batches: Iterable[Tensor],
        generator: torch.Generator,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.axes = axes
        self.parts = [view.attention(l) for l in range(len(view.widths))]
        self.moments = collect_attention(view, batches, generator=generator, on_batch=on_batch)
        self.orders = [
            eliminate_groups(m.inputs.covariance, p.proj.weight, p.heads, m.curvature)
            for p, m in zip(self.parts, self.moments, strict=True)
        ]
        self.view = view

    def heads(self, l: int) -> list[int]:
        """How many heads may stay in block l, ascending."""
        n = self.parts[l].heads
        steps = range(1, HEAD_STEPS + 1) if "heads" in self.axes else [HEAD_STEPS]
        return sorted({max(1, round(n * i / HEAD_STEPS)) for i in steps})

    def query_dims(self, l: int) -> list[int]:
        """How many query/key dimensions a head of block l may keep, ascending."""
        full = self.parts[l].query_dims
        shares = QUERY_SHARES if "qk" in self.axes else ()
        steps = {-(-round(full * s) // QUERY_MULTIPLE) * QUERY_MULTIPLE for s in shares}
        return sorted({s for s in steps if s < full} | {full})

    def shrunk(self, l: int, pair: Pair, mode: Mode = "least-squares") -> SmallerAttention:
        """Block l's attention with so many heads and query/key dimensions."""
        heads, query_dims = pair
        return shrink(
            self.parts[l], self.moments[l], self.orders[l].keep(heads), query_dims, mode=mode
        )

    def stand_ins(self, chosen: Sequence[SmallerAttention]) -> list[dict[nn.Linear, Replacement]]:
        """Layers that stand in for the attention's own, per block."""
        return [stand_ins(p, s) for p, s in zip(self.parts, chosen, strict=True)]

    def described(self, chosen: Sequence[SmallerAttention]) -> dict[str, list[int]]:
        """What stays and what there was, per block: heads, and query/key dimensions of a head."""
        return {
            "heads": [len(s.heads) for s in chosen],
            "dense_heads": [p.heads for p in self.parts],
            "query_dims": [s.query_dims for s in chosen],
            "dense_query_dims": [p.query_dims for p in self.parts],
        }

    def measure(
        self, images: Sequence[Tensor], on_block: Callable[[int], None] | None = None
    ) -> list[dict[Pair, float]]:
        """Nats of each block's pairs. Less left is never less harm: what says otherwise is
        noise."""
        singles: list[dict[Pair, dict[nn.Linear, Replacement]]] = []
        for l, p in enumerate(self.parts):
            options = [(n, p.query_dims) for n in self.heads(l)[:-1]]
            options += [(p.heads, r) for r in self.query_dims(l)[:-1]]
            singles.append({o: stand_ins(p, self.shrunk(l, o)) for o in options})

        def tell(l: int, row: dict[Pair, float]) -> None:
            if on_block is not None:
                on_block(l + 1)

        found = measure_attention_harm(self.view, images, singles, on_block=tell)
        table: list[dict[Pair, float]] = []
        for l, (p, row) in enumerate(zip(self.parts, found, strict=True)):
            by_heads = _never_rising({n: row.get((n, p.query_dims), 0.0) for n in self.heads(l)})
            by_dims = _never_rising({r: row.get((p.heads, r), 0.0) for r in self.query_dims(l)})
            table.append({(n, r): a + b for n, a in by_heads.items()
                               for r, b in by_dims.items()})  # fmt: skip
        return table

    def prices(self, sizes: Sizes, price: str) -> list[dict[Pair, float]]:
        """What each block's pairs cost, exactly."""
        return [
            {
                (n, r): float(attention_price(sizes, n * r, n * p.value_dims, price))  # type: ignore[arg-type]
                for n in self.heads(l)
                for r in self.query_dims(l)
            }
            for l, p in enumerate(self.parts)
        ]


def _never_rising(row: dict[int, float]) -> dict[int, float]:
    worst, out = 0.0, {}
    for size in sorted(row, reverse=True):
        worst = max(worst, row[size])
        out[size] = worst
    return out

"""timm's Swin transformers, v1 and v2, as a `VitView`: one row of blocks over a flat stream.

A stage's first block gets the stream of the stage before, four times as many tokens of half the
width: what merges them stands in front of it (`entered`). Between the blocks the stream is
[b, t, d]; the windows are the block's own affair, and its attention's output is what it adds to
the stream, the windows put together again.

Sources: "Swin Transformer" (ICCV 2021), "Swin Transformer V2" (CVPR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from npprune.core.tokens import Merge, Tokens
from npprune.core.view import Given, Stream
from npprune.errors import ModelError
from npprune.models.blocks import entrances
from npprune.models.merging import check_tokens
from npprune.models.view import TimmView, replaced

Grid = tuple[int, int]
"""Tokens down and across."""


class StagedView(TimmView):
    """The view of a network in stages. `grids`: each block's tokens, known from the first
    `embed` on."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.entrances = entrances(model)
        self.grids: list[Grid] = []

    def _flat(self, streams: list[Tensor]) -> Tensor:
        self.grids = [(x.shape[1], x.shape[2]) for x in streams]
        return streams[0].flatten(1, 2).to(self.blocks[0].norm1.weight.dtype)

    def _check_plain(self, streams: list[Tensor], features: Any) -> None:
        """With blocks that do nothing, patches merge between the stages, and that is all."""
        same = len(streams) == len(self.blocks)
        with torch.no_grad(), self._products(streams[0]):
            for l in range(1, len(streams) if same else 0):
                expected = self.entered(l, streams[l - 1].flatten(1, 2))
                found = streams[l].flatten(1, 2).to(expected.dtype)
                same &= torch.allclose(found, expected, equal_nan=True)
            expected = self.model.norm(streams[-1])
        if not same or not torch.allclose(features, expected, atol=1e-5, equal_nan=True):
            raise ModelError(
                f"{type(self.model).__name__} does more than its blocks, the merging between its "
                "stages and a final norm",
                hint="npprune supports Swin transformers as timm has them",
            )

    def entered(self, l: int, x: Stream) -> Stream:
        merging = self.entrances.get(l)
        if merging is None:
            return x
        assert isinstance(x, Tensor)
        with self._products(x):
            merged = merging(x.unflatten(1, self.grids[l - 1]))
        return merged.flatten(1, 2).to(x.dtype)  # type: ignore[no-any-return]

    def gathered(self, l: int, values: Tensor) -> Tensor:
        if l not in self.entrances:
            return values
        (h, w), cells = self.grids[l - 1], self.grids[l]
        whole = pad(values.unflatten(1, (h, w)), (0, w % 2, 0, h % 2))
        return whole.unflatten(2, (cells[1], 2)).unflatten(1, (cells[0], 2)).sum((2, 4)).flatten(1)

    def block(self, l: int, x: Stream, **options: Any) -> Stream:
        return super().block(l, self.entered(l, x), **options)

    def block_and_attention(self, l: int, x: Stream, **options: Any) -> tuple[Stream, Tensor]:
        return self._and_attention(l, self.entered(l, x), **options)

    def attention_output(self, l: int, x: Tensor | Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        nothing = x.new_zeros(1, 1, 1).expand(*x.shape)
        return self._and_attention(l, x, given=(slice(None), nothing))[1]

    def tail(
        self,
        l: int,
        x: Stream,
        attention: Tensor,
        *,
        given: Given | None = None,
        merge: int | Merge | None = None,
    ) -> Stream:
        if merge:
            check_tokens(self.model, l)
        block, flat = self.blocks[l], attention[:, :, None]
        assert isinstance(x, Tensor)
        with replaced(block, "_attn", lambda z: flat), self._products(x), self._given(l, given):
            return block(x[:, :, None]).flatten(1, 2)  # type: ignore[no-any-return]

    def _and_attention(
        self, l: int, x: Any, *, given: Given | None = None, **options: Any
    ) -> tuple[Any, Tensor]:
        """Block l on the stream as it enters, and the output of its attention."""
        seen: list[Tensor] = []
        attend = self.blocks[l]._attn

        def keep(z: Tensor) -> Tensor:
            seen.append(attend(z))
            return seen[0]

        with replaced(self.blocks[l], "_attn", keep):
            y = self._run(l, x, edit=None, given=given, cls_only=False)
        return y, seen[0].flatten(1, 2)

    def _through(self, l: int, block: Any, x: Tensor) -> Any:
        return block(x.unflatten(1, self.grids[l])).flatten(1, 2)

    def head(self, x: Tensor | Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        return super().head(x.unflatten(1, self.grids[-1]))

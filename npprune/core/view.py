"""What the mathematics needs to know of a vision transformer, and nothing more.

Tensor letters used in all of `core`: b images, t tokens, d width, h hidden units (neurons),
k kept, m quadrature points, c classes, l block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from npprune.core.objective import Objective
from npprune.core.tokens import Merge, Tokens
from npprune.words import Scope

HiddenEdit = Callable[[Tensor], Tensor]
"""Maps the hidden activations [b, t, h] of one block (all tokens) to edited ones, same shape."""


Given = tuple[slice, Tensor]
"""Token positions, and the MLP's output [b, s, d] at them."""


Stream = TypeVar("Stream", Tensor, Tokens)
"""What goes from block to block: [b, t, d], or tokens that merge. Who gives one kind gets it back;
of a network that merges tokens itself, a plain stream becomes `Tokens` with the first merge."""


@dataclass(frozen=True)
class Projections:
    """The two linear layers of one block's attention, and how many heads they hold.

    `qkv` gives all heads' queries, then all keys, then all values; `proj` reads the heads' outputs
    side by side. Queries and keys of a head may be narrower than its values. None for `qkv`: it is
    another layer, or its output goes through more (rotation) than products; heads can go, and their
    dimensions cannot.
    """

    heads: int
    qkv: nn.Linear | None
    proj: nn.Linear

    @property
    def value_dims(self) -> int:
        """Value dimensions of a head."""
        return self.proj.in_features // self.heads

    @property
    def query_dims(self) -> int:
        """Query (and key) dimensions of a head."""
        if self.qkv is None:
            return self.value_dims
        return (self.qkv.out_features // self.heads - self.value_dims) // 2

    @property
    def joint(self) -> nn.Linear:
        """`qkv`, which must be there."""
        if self.qkv is None:
            raise ValueError("this attention has no layer of plain queries, keys and values")
        return self.qkv

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n (2 q + v), ...] of `qkv` as queries and keys [n, q, ...], values [n, v, ...]."""
        q, v = self.heads * self.query_dims, self.heads * self.value_dims
        parts = rows.split([q, q, v])
        return tuple(part.unflatten(0, (self.heads, -1)) for part in parts)  # type: ignore[return-value]


class VitView(Protocol):
    """A vision transformer seen as embed -> blocks -> head.

    `head(block(L-1, ... block(0, embed(images))))` equals the model's own forward. A *neuron* is
    one channel at the input of a block's `fc2` (after the activation; after the gate in gated
    MLPs).
    """

    model: nn.Module
    objective: Objective
    """How its outputs are compared."""
    widths: tuple[int, ...]
    """Hidden units per block, in forward order."""
    num_prefix_tokens: int
    """Class and register tokens before the patch tokens."""
    scope: Scope
    """The tokens that the classifier pools: "cls", "patch", or "all"."""
    tokens_read: int | None
    """How many tokens, the first ones, the classifier reads: 1 under class-token pooling, 2 in
    distilled networks; None: it pools more, or there is none and every token is a feature."""
    merges: bool
    """Whether the network itself merges tokens."""
    own_units: bool
    """Whether the tokens that are read have hidden units of their own, so that a neuron is no
    longer one thing for all tokens."""

    def tokens(self, scope: Scope) -> slice:
        """The positions of `scope` on the token axis; ModelError if the model has none."""
        ...

    def embed(self, images: Tensor) -> Tensor:
        """The stream before block 0: images [b, 3, H, W] -> [b, t, d]."""
        ...

    def entered(self, l: int, x: Stream) -> Stream:
        """The stream as it enters block l: x itself, but where patches merge in front of the
        block between two stages of a network. `block` does it by itself."""
        ...

    def gathered(self, l: int, values: Tensor) -> Tensor:
        """Values of block l - 1's tokens [b, t] as those of block l's: sums over the tokens that
        merge in front of it; as they are where none do."""
        ...

    def block(
        self,
        l: int,
        x: Stream,
        *,
        edit: HiddenEdit | None = None,
        given: Given | None = None,
        cls_only: bool = False,
        merge: int | Merge | None = None,
    ) -> Stream:
        """Block l on the stream [b, t, d].

        `edit` maps the hidden activations before `fc2` sees them. `given` is (tokens, output
        [b, s, d]): the MLP's output at those tokens, which is then not computed there. With
        `cls_only` just the class token of the result counts, and only its query and MLP are
        computed: right for the last block under class-token pooling. `merge` says how many tokens
        merge in it, or which; None leaves it to the network.
        """
        ...

    def block_and_attention(
        self,
        l: int,
        x: Stream,
        *,
        given: Given | None = None,
        cls_only: bool = False,
        merge: int | Merge | None = None,
    ) -> tuple[Stream, Tensor]:
        """As `block`, and the output of the block's attention module [b, t, d] beside it."""
        ...

    def attention_output(self, l: int, x: Tensor | Tokens) -> Tensor:
        """The output of block l's attention module alone, [b, t, d]; its MLP is not computed.

        x: as it enters the block, here and in `tail`.
        """
        ...

    def tail(
        self,
        l: int,
        x: Stream,
        attention: Tensor,
        *,
        given: Given | None = None,
        merge: int | Merge | None = None,
    ) -> Stream:
        """Block l with its attention's output given: what remains acts on each token alone,
        so x and attention may hold any subset [b, t', d] of the tokens where none merge."""
        ...

    def pairs(self, l: int, x: Tokens, attention: Tensor, merged: int) -> Merge:
        """Which tokens would merge in block l, given its attention's output."""
        ...

    def head(self, x: Tensor | Tokens) -> Tensor:
        """Final norm, pooling and classifier: [b, t, d] -> logits [b, c]; without a classifier the
        features [b, s, d], the pooled vector and the patch tokens."""
        ...

    def adds(self, l: int) -> bool:
        """Whether what block l's attention and MLP give is added to the stream, scaled at most;
        False: a norm stands between, and errors of the stream are not in their units."""
        ...

    def fc2(self, l: int) -> nn.Linear:
        """The second linear layer of block l's MLP: weight [d, h]."""
        ...

    def norm(self, l: int) -> nn.Module | None:
        """What norms block l's hidden units before `fc2` sees them, each token over its units;
        None where nothing does."""
        ...

    def first(self, l: int) -> list[nn.Linear]:
        """The linear layers that give block l's neurons: one (weight [h, d], or [2h, d] with a
        gate), or gate and value apart."""
        ...

    def attention(self, l: int) -> Projections:
        """The layers of block l's attention; ModelError where it is not the plain kind."""
        ...

    def classifiers(self) -> list[nn.Linear]:
        """The layers that give the logits, in the order in which `head` runs them: one, two in
        distilled models, none in a network without a classifier."""
        ...


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, gradients on, but none for parameters; all restored on exit."""
    training = model.training
    wanted = [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.enable_grad():
            yield model
    finally:
        model.train(training)
        for p, want in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(want)

"""What the mathematics needs to know of a vision transformer, and nothing more.

Tensor letters used in all of `core`: b images, t tokens, d width, h hidden units (neurons),
k kept, m quadrature points, c classes, l block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor, nn

Scope = Literal["cls", "patch", "all"]
"""The tokens a neuron is read and scaled at: class token, patch tokens, or all of them."""

HiddenEdit = Callable[[Tensor], Tensor]
"""Maps the hidden activations [b, t, h] of one block (all tokens) to edited ones, same shape."""


class VitView(Protocol):
    """A plain vision transformer seen as embed -> blocks -> head.

    `head(block(L-1, ... block(0, embed(images))))` equals the model's own forward. A *neuron* is
    one channel at the input of a block's `fc2` (after the activation; after the gate in gated
    MLPs).
    """

    model: nn.Module
    widths: tuple[int, ...]
    """Hidden units per block, in forward order."""
    num_prefix_tokens: int
    """Class and register tokens before the patch tokens."""
    scope: Scope
    """The tokens that the classifier pools: "cls", "patch", or "all"."""

    def tokens(self, scope: Scope) -> slice:
        """The positions of `scope` on the token axis; ModelError if the model has none."""
        ...

    def embed(self, images: Tensor) -> Tensor:
        """The stream before block 0: images [b, 3, H, W] -> [b, t, d]."""
        ...

    def block(self, l: int, x: Tensor, edit: HiddenEdit | None = None) -> Tensor:
        """Block l on the stream [b, t, d], its hidden activations passed through `edit`."""
        ...

    def block_and_attention(
        self, l: int, x: Tensor, edit: HiddenEdit | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `block`, and the output of the block's attention module [b, t, d] beside it."""
        ...

    def tail(self, l: int, x: Tensor, attention: Tensor, edit: HiddenEdit | None = None) -> Tensor:
        """Block l with its attention's output given: what remains acts on each token alone,
        so x and attention may hold any subset [b, t', d] of the tokens."""
        ...

    def head(self, x: Tensor) -> Tensor:
        """Final norm, pooling and classifier: [b, t, d] -> logits [b, c]."""
        ...

    def fc2(self, l: int) -> nn.Linear:
        """The second linear layer of block l's MLP: weight [d, h]."""
        ...

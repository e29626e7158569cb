"""MLPs in which the tokens that the classifier reads have hidden units of their own.

Two narrow MLPs in one block: the layers of timm's own module serve the patches, and a second one,
`mlp.cls`, the class token (and the distillation token, where there is one). What the first tokens
need and what the patches need are different units, and at one token of two hundred they cost
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from npprune.errors import ModelError
from npprune.models.blocks import blocks_of


class OwnUnits(nn.Module):
    """What MLPs with own units for the first tokens have in common."""

    cls: nn.Module
    own_tokens: int

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.own_tokens], x[:, self.own_tokens :]
        return torch.cat([self.cls(first), super().forward(rest)], 1)


class OwnMlp(OwnUnits, Mlp):  # type: ignore[misc]
    """timm's `Mlp` with another for the first tokens."""


class OwnGluMlp(OwnUnits, GluMlp):  # type: ignore[misc]
    """timm's `GluMlp` with another for the first tokens."""


class OwnSwiGLU(OwnUnits, SwiGLU):  # type: ignore[misc]
    """timm's `SwiGLU` with another for the first tokens."""


KINDS: dict[type[nn.Module], type[OwnUnits]] = {
    Mlp: OwnMlp,
    GluMlp: OwnGluMlp,
    SwiGLU: OwnSwiGLU,
}


def give_own(mlp: nn.Module, cls: nn.Module, tokens: int) -> None:
    """From now on, in place, the first tokens of an image go through `cls`, an MLP by itself."""
    mlp.own_tokens = tokens  # type: ignore[assignment]
    mlp.cls = cls
    mlp.__class__ = KINDS[type(mlp)]


def own_mlp(block: Any) -> nn.Module | None:
    """The MLP of a block's first tokens; None where all tokens share one."""
    return block.mlp.cls if isinstance(block.mlp, OwnUnits) else None


def kind_of(mlp: nn.Module) -> type[nn.Module]:
    """timm's class of an MLP, whether the first tokens have another or not."""
    return next((kind for kind, own in KINDS.items() if type(mlp) is own), type(mlp))


def own_widths(model: Any) -> list[int] | None:
    """Per block, the hidden units of the tokens that are read, 0 where all share; None: all
    blocks do."""
    found: list[Any] = [own_mlp(block) for block in blocks_of(model)]
    widths = [0 if mlp is None else int(mlp.fc2.in_features) for mlp in found]
    return widths if any(widths) else None


def check_own(mlp: nn.Module, l: int, tokens_read: int | None) -> None:
    """ModelError, by name and with the reason, where block l cannot have own units for what the
    classifier reads."""
    hint = "leave `cls` out of the axes"
    if tokens_read is None:
        raise ModelError(
            "the classifier reads every token, so there is none that could have hidden units of "
            "its own",
            hint=hint,
        )
    if isinstance(mlp, OwnUnits):
        raise ModelError(
            f"block {l}: the class token has hidden units of its own already",
            hint="prune the network that it was made from",
        )
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise ModelError(
            f"block {l}: the MLP norms its hidden units, which have to be the same for all tokens",
            hint=hint,
        )
    if type(mlp) not in KINDS:
        raise ModelError(
            f"block {l}: {type(mlp).__module__}.{type(mlp).__name__} is not an MLP that can be "
            "had twice in a block",
            hint=hint,
        )

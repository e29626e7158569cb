"""What a network without a classifier puts out: the pooled vector, the class token, or patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from npprune.errors import ModelError, setting
from npprune.models.view import has_class_token, has_classifier
from npprune.words import FeatureOutput


class Features(nn.Module):
    """The tokens after the last norm: the class token [b, d], or the patches as a map [b, d, h, w]
    for a grid of h rows and w columns."""

    def __init__(self, network: nn.Module, grid: tuple[int, int] | None) -> None:
        """grid: None for the class token."""
        super().__init__()
        self.network, self.grid = network, grid
        self.prefix = int(getattr(network, "num_prefix_tokens", 1))  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        if self.grid is None:
            return tokens[:, 0]
        return tokens[:, self.prefix :].mT.unflatten(2, self.grid)


def giving(model: nn.Module, what: FeatureOutput) -> nn.Module:
    """The network that gives these features; the pooled vector is what it gives by itself.

    Raises:
        ModelError: it has a classifier, no class token, or no grid of patches.
    """
    name = setting("export.features", what)
    if has_classifier(model):
        raise ModelError(
            f"{name} is for networks without a classifier, and {type(model).__name__} has one",
            hint=f"{setting('model.num_classes', 0)} prunes and exports a network without it",
        )
    if what == "pooled":
        return model
    if what == "cls":
        if not has_class_token(model):
            raise ModelError(
                f"{name} needs a class token, and {type(model).__name__} has none",
                hint=f"use {setting('export.features', 'pooled')} or "
                f"{setting('export.features', 'patches')}",
            )
        return Features(model, None).eval()
    patch: Any = getattr(model, "patch_embed", None)
    grid = getattr(patch, "grid_size", None)
    if grid is None:
        raise ModelError(
            f"{name} needs a fixed grid of patches, and {type(model).__name__} has none",
            hint=f"use {setting('export.features', 'pooled')}",
        )
    return Features(model, (int(grid[0]), int(grid[1]))).eval()

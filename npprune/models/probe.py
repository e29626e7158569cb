"""A linear classifier on a backbone's pooled features: its head, until it gets another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from npprune.errors import ModelError
from npprune.models.view import has_classifier
from npprune.models.weights import read_all


def with_probe(model: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """A copy that ends in this classifier: weight [c, d], bias [c].

    Raises:
        ModelError: it has a classifier, or features of another width.
    """
    probed: Any = copy.deepcopy(model)
    width = int(getattr(probed, "num_features", 0))
    if has_classifier(model):
        raise ModelError(
            f"a probe is for networks without a classifier, and {type(model).__name__} has one",
            hint="leave it out",
        )
    if weight.dim() != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ModelError(
            f"a probe of features of width {width} must have a weight [classes, {width}] and a "
            f"bias [classes], got {list(weight.shape)} and {list(bias.shape)}"
        )
    head = nn.Linear(width, len(weight)).to(next(model.parameters()))
    head.weight.data.copy_(weight)
    head.bias.data.copy_(bias)
    probed.head, probed.num_classes = head.eval(), len(weight)
    return probed  # type: ignore[no-any-return]


def read_probe(path: Path) -> tuple[Tensor, Tensor]:
    """The weight and the bias in a file.

    Raises:
        ModelError: it cannot be read, or holds others.
    """
    tensors = read_all(path)
    if set(tensors) != {"weight", "bias"}:
        raise ModelError(
            f"a probe must hold `weight` and `bias`, got {', '.join(list(tensors)[:4]) or 'none'} "
            f"in `{path}`"
        )
    return tensors["weight"], tensors["bias"]

"""What the paper's released program computes differently from the networks' own papers."""

from __future__ import annotations

import copy

from torch import nn

from npprune.errors import ModelError


def released_head(model: nn.Module) -> nn.Module:
    """A copy of an average-pooled network (MAE) whose pooled tokens are normalised twice.

    The released program builds MAE's fine-tuned network on a timm whose head applies `fc_norm`,
    after features that have been through it already: head(fc_norm(fc_norm(mean of the patch
    tokens))). MAE itself, and `load_model`, normalise once. Paths and scores of the released
    program's MAE files are reproduced with the second norm only.

    Raises:
        ModelError: the network has no `fc_norm`.
    """
    norm = getattr(model, "fc_norm", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        raise ModelError(
            f"{type(model).__name__} has no `fc_norm`: the released program's second norm is "
            "for average-pooled networks such as MAE"
        )
    twice = copy.deepcopy(model)
    twice.fc_norm = nn.Sequential(twice.fc_norm, twice.fc_norm)  # type: ignore[arg-type]
    return twice

"""A tiny network in memory, images for it, and what pruning made of it."""

from __future__ import annotations

import copy

import pytest
from torch import Tensor, nn

import npprune
from tests.helpers.tiny import tiny_batch, tiny_vit

SMALL = {"round_to": 4, "min_keep": 4}


@pytest.fixture(scope="session")
def model() -> nn.Module:
    """Float32, in training mode, as a training script holds it."""
    return tiny_vit().float().train()


@pytest.fixture(scope="session")
def data() -> tuple[Tensor, Tensor]:
    """80 images [3, 16, 16] and their labels."""
    images, labels = tiny_batch(80)
    return images.float(), labels


@pytest.fixture(scope="session")
def _pruned(model: nn.Module, data: tuple[Tensor, Tensor]) -> npprune.Pruned:
    return npprune.prune(model, data, target_macs=0.6, **SMALL)


@pytest.fixture
def pruned(_pruned: npprune.Pruned) -> npprune.Pruned:
    """At 60 % of the MACs, by all axes; a copy, to change at will."""
    return copy.deepcopy(_pruned)

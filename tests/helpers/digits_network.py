"""Checkpoint folders of untrained networks for the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from npprune.models.info import model_info, state
from npprune.models.load import create
from npprune.pipeline.demo.training import ARCHITECTURE, MODEL_ARGS, PREPROCESSING
from npprune.records import CheckpointConfig, ClassInfo, ModelSource
from npprune.store.checkpoints import write_checkpoint

SMALL = {**MODEL_ARGS, "depth": 2, "embed_dim": 32, "num_heads": 2}


def random_digits_network(folder: Path) -> Path:
    """The demo's architecture, two blocks deep, with weights that make classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create(ARCHITECTURE, SMALL)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return write_digits_network(folder, model, SMALL)


def write_digits_network(folder: Path, model: nn.Module, args: dict[str, Any]) -> Path:
    info = model_info(model, ModelSource(ARCHITECTURE, args))
    config = CheckpointConfig(
        source=info.source, widths=info.widths, heads=info.heads, num_classes=10,
        preprocessing=PREPROCESSING, classes=[ClassInfo(i, str(i)) for i in range(10)],
        weights_sha256="",
    )  # fmt: skip
    write_checkpoint(folder, config, state(model))
    return folder

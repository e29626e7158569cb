"""Small networks and images for the tests of export and deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from npprune.models.info import model_info, state
from npprune.models.load import create, weights_sha256
from npprune.models.surgery import apply_plan
from npprune.models.view import make_view
from npprune.records import (
    CheckpointConfig,
    ClassInfo,
    ModelSource,
    Plan,
    Preprocessing,
    PruneSummary,
)
from npprune.store.checkpoints import write_checkpoint

PREPROCESSING = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 1.0)
ARGS: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 6,
}  # fmt: skip
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30), (30, 220, 220), (90,) * 3]


def network(architecture: str = "vit_tiny_patch16_224", **more: Any) -> torch.nn.Module:
    """A network of two blocks whose logits differ between images."""
    model = create(architecture, {**ARGS, **more}).float()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return model.eval()


def plan_of(model: torch.nn.Module, widths: tuple[int, ...] | None = None, **fields: Any) -> Plan:
    """Every second unit of the first block and every third of the second, or the first `widths`."""
    full = list(make_view(model).widths)
    if widths is None:
        keep = [list(range(0, w, 2 + l)) for l, w in enumerate(full)]
    else:
        keep = [list(range(w)) for w in widths]
    return Plan(keep=keep, widths=full, source_sha256=weights_sha256(model), **fields)


def write_dense(
    folder: Path, architecture: str = "vit_tiny_patch16_224", **more: Any
) -> torch.nn.Module:
    """A dense network as a checkpoint folder, which is also how its pruned ones find it."""
    model = network(architecture, **more)
    source = ModelSource(architecture, {**ARGS, **more}, sha256=weights_sha256(model))
    info = model_info(model, source)
    config = CheckpointConfig(
        source=source, widths=info.widths, heads=info.heads, num_classes=6,
        preprocessing=PREPROCESSING, classes=[ClassInfo(i, f"c{i}") for i in range(6)],
        weights_sha256="",
    )  # fmt: skip
    write_checkpoint(folder, config, state(model))
    return model


def write_pruned(
    folder: Path,
    dense: Path,
    model: torch.nn.Module,
    plan: Plan,
    data: str | None = None,
    run: str | None = None,
) -> torch.nn.Module:
    """What `npprune prune` leaves: a checkpoint that remembers its dense network and images."""
    from npprune.store.checkpoints import read_config

    pruned = apply_plan(model, plan).eval()
    origin = read_config(dense)
    info = model_info(pruned, origin.source)
    summary = PruneSummary(
        "variance", "uniform", "none", 0.5, None, 1, info.widths, plan.widths, [], None, 0.0, "p"
    )
    details: dict[str, Any] = {"dense": {"name": str(dense)}}
    if data is not None:
        details["data"] = {"calibration": data}
    if plan.classes is not None:
        details["outputs"] = plan.classes
    kept = plan.classes if plan.classes is not None else range(6)
    config = CheckpointConfig(
        source=origin.source, widths=info.widths, heads=info.heads, num_classes=len(kept),
        preprocessing=PREPROCESSING,
        classes=[ClassInfo(i, f"c{c}") for i, c in enumerate(kept)],
        weights_sha256="", prune=summary, details=details, run=run,
    )  # fmt: skip
    write_checkpoint(folder, config, state(pruned), plan)
    return pruned


def write_images(folder: Path, per_class: int = 12, label: Any = None) -> str:
    """Coloured noise, a folder for each of six classes; returns the source's name."""
    rng = np.random.default_rng(0)
    for c, colour in enumerate(COLOURS):
        place = folder / (f"c{c}" if label is None else str(label(c)))
        place.mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(-60, 60, (40, 36, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i:02d}.png")
    return f"folder:{folder}"

"""The demo's network: a small vision transformer trained on scikit-learn's digits.

Half a minute on one CPU core; the command makes the network it then prunes, so nothing has to
be downloaded or trusted.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from npprune.data.loading import batches
from npprune.data.opening import open_source
from npprune.data.transforms import make_transform
from npprune.models.load import create
from npprune.pipeline.common.threads import one_thread
from npprune.pipeline.common.work import Work
from npprune.records import Preprocessing

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 10,
}
"""For timm: 17 tokens, 6 blocks of 256 neurons, 0.3 M parameters."""

PREPROCESSING = Preprocessing(
    input_size=(3, 8, 8), mean=(0.305,) * 3, std=(0.376,) * 3, crop_pct=1.0
)
"""No resizing at 8x8; mean and standard deviation of the training images."""

EPOCHS = 30
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the steps
SMOOTHING = 0.1  # of labels; keeps probabilities away from 1, where gradients vanish
SHIFTED = 0.25  # share of the training images moved by up to one pixel each way
POSITION_STD = 0.2  # timm's 0.02 is meant for ImageNet's long schedules


def train_demo_model(work: Work | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Train on `digits:train`, measure on `digits:test`.

    Returns the network (evaluation mode, CPU, its `pretrained_cfg` telling the preprocessing)
    and a dict: `accuracy` in [0, 1], `correct`, `total`, `seconds`, `seed`, `architecture` and
    `model_args` (enough for timm to build it again).

    The same seed gives the same weights on the same machine. It runs on one thread: the
    matrices are so small that a second gains little, and costs much where cores are shared. The
    number of threads and the global random state are left as they were.
    """
    work = (work or Work()).on("train")
    seed = work.seed
    started = time.perf_counter()
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not manual_seed, which would reseed GPUs too
        model = create(ARCHITECTURE, MODEL_ARGS)
        _initialise(model)
        images, labels = _load("digits:train")
        _fit(model, images, labels, work)
    model.eval().requires_grad_(True)
    model.pretrained_cfg = _pretrained_cfg(model)  # type: ignore[assignment]
    images, labels = _load("digits:test")
    with torch.inference_mode():
        correct = int((model(images).argmax(dim=1) == labels).sum())
    info = {
        "accuracy": correct / len(labels),
        "correct": correct,
        "total": len(labels),
        "seconds": time.perf_counter() - started,
        "seed": seed,
        "architecture": ARCHITECTURE,
        "model_args": dict(MODEL_ARGS),
    }
    return model, info


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):  # the patch embedding is linear in a flat patch
            nn.init.xavier_uniform_(module.weight.data.view(module.out_channels, -1))
    nn.init.normal_(model.pos_embed, std=POSITION_STD)  # type: ignore[arg-type]
    nn.init.normal_(model.cls_token, std=POSITION_STD)  # type: ignore[arg-type]


def _fit(model: nn.Module, images: Tensor, labels: Tensor, work: Work) -> None:
    generator = work.generator()
    steps_per_epoch = len(images) // BATCH
    steps = EPOCHS * steps_per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(BATCH)[:steps_per_epoch]:
            logits = model(_shifted(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        work.progress(epoch + 1, EPOCHS, "epochs")


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Some images [b, c, h, w] moved by a pixel, black filling in."""
    b, c, h, w = images.shape
    black = -PREPROCESSING.mean[0] / PREPROCESSING.std[0]
    padded = functional.pad(images, (1, 1, 1, 1), value=black)
    offset = torch.randint(0, 3, (2, b), generator=generator)
    still = torch.rand(b, generator=generator) >= SHIFTED
    top, left = offset.masked_fill(still, 1)
    rows = (top[:, None] + torch.arange(h))[:, None, :, None]
    columns = (left[:, None] + torch.arange(w))[:, None, None, :]
    image, channel = torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None]
    return padded[image, channel, rows, columns]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warm = WARM_UP * steps
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def _load(spec: str) -> tuple[Tensor, Tensor]:
    source = open_source(spec, num_classes=MODEL_ARGS["num_classes"])
    read = list(batches(source, make_transform(PREPROCESSING), 512))
    return torch.cat([b.images for b in read]), torch.cat([b.labels for b in read])


def _pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's own description, with this network's sizes and no weights to download."""
    kept = ("architecture", "first_conv", "classifier")
    published: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return {k: v for k, v in published.items() if k in kept} | {
        "num_classes": MODEL_ARGS["num_classes"],
        "input_size": PREPROCESSING.input_size,
        "pool_size": None,
        "mean": PREPROCESSING.mean,
        "std": PREPROCESSING.std,
        "interpolation": PREPROCESSING.interpolation,
        "crop_pct": PREPROCESSING.crop_pct,
        "crop_mode": PREPROCESSING.crop_mode,
        "fixed_input_size": True,
    }

"""The cheap way to heal: each block's MLP regressed on the dense block, one after another.

Nothing is propagated back through the network, and the dense network runs over the images once.
The state is the student after the blocks trained so far.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from npprune.core.compression.healing import Reconstructed, reconstruct_blocks
from npprune.errors import DataError, GateError, ModelError, setting
from npprune.models.tokens import tokens_of
from npprune.models.view import make_view
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.image_cache import MEMORY_SHARE, ImagesInMemory
from npprune.pipeline.heal.teacher import (
    Outcome,
    Saved,
    Teacher,
    TrainingSet,
    measure,
    weights,
    without_numbers,
)
from npprune.recipe import HealSection
from npprune.records import HealPoint

TOKENS = 64  # of each image
COPIES = 3  # of the stream that are held: before a block, its attention, its target


def reconstruct(
    student: nn.Module,
    teacher: Teacher,
    data: TrainingSet,
    settings: HealSection,
    *,
    saved: Saved,
    work: Work,
    started: float,
) -> Outcome:
    """Train block by block; the best weights by held-out divergence are left in `student`.

    started: the clock when healing began.

    Raises:
        GateError: the network's predictions are no numbers any more.
        DataError: the images are not in memory.
    """
    memory, held, folder = data.images, data.held, saved.folder
    if not isinstance(memory, ImagesInMemory):
        raise DataError(
            f"{setting('heal.layerwise')} holds its images in memory, and {memory.count} do not "
            "fit",
            hint=f"{setting('data.images_per_class', 'N')} takes fewer",
        )
    if make_view(student).own_units:
        raise ModelError(
            f"{setting('heal.layerwise')} fits one second layer per block, and the class token of "
            "this network has hidden units of its own",
            hint=f"leave {setting('heal.layerwise')} out",
        )
    if tokens_of(student) != ([0] * len(tokens_of(student)[0]), False):
        raise ModelError(
            f"{setting('heal.layerwise')} compares every token block by block, and the network "
            "merges some or leaves some out",
            hint=f"leave {setting('heal.layerwise')} out",
        )
    student.eval().requires_grad_(True)
    view = make_view(student)
    history: list[HealPoint] = []
    best: dict[str, Tensor] = {}
    begun = time.perf_counter()

    def watch(block: int, loss: float | None) -> None:
        nonlocal best
        point = measure(
            student, teacher, held, work,
            step=block, seconds=time.perf_counter() - started, loss=loss,
        )  # fmt: skip
        if not point.divergence_nats < float("inf"):
            if block == 0:
                raise without_numbers(held)
            raise GateError(
                f"block {block - 1} was trained to give no numbers any more",
                hint=f"a smaller {setting('heal.lr')} than {settings.lr:g}",
            )
        if all(point.divergence_nats < p.divergence_nats for p in history):
            best = weights(student)
        history.append(point)
        about = {
            "settings": saved.identity,
            "step": block,
            "history": [asdict(p) for p in history],
            "seconds": time.perf_counter() - started,
        }
        tensors = {f"student/{k}": v for k, v in weights(student).items()}
        folder.save(about, tensors | {f"best/{k}": v for k, v in best.items()})
        work.progress(block, len(view.widths), "blocks", note=teacher.said(point))

    found = folder.load(saved.identity)
    if found is None:
        first = 0
        watch(0, None)
    else:
        about, tensors = found
        first, started = about["step"], started - about["seconds"]
        history = [HealPoint(**p) for p in about["history"]]
        student.load_state_dict(_part(tensors, "student/"))
        best = _part(tensors, "best/")
        work.say(f"resumes at block {first} of {folder.path}")

    def after(block: Reconstructed) -> None:
        watch(block.block + 1, block.after)

    rows = torch.arange(_fit(memory, student, view.embed))
    assert settings.epochs is not None
    reconstruct_blocks(
        view,
        teacher.view,
        [memory.images(part).to(work.where) for part in rows.split(settings.batch_size)],
        epochs=settings.epochs,
        learning_rate=settings.lr,
        seed=work.seed,
        tokens=TOKENS,
        first=first,
        on_block=after,
    )
    seconds = time.perf_counter() - begun
    student.load_state_dict(best)
    chosen = min(history, key=lambda p: p.divergence_nats)
    epochs = float(settings.epochs)
    return Outcome(
        history, chosen, len(view.widths), epochs, "the last block", len(rows) * epochs / seconds
    )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def _fit(memory: ImagesInMemory, student: nn.Module, embed: Any) -> int:
    """How many images' streams fit into memory."""
    x = memory.images(slice(0, 1)).to(next(student.parameters()).device)
    size = embed(x).numel() * 4 * COPIES + x.numel() * 4
    room = psutil.virtual_memory().available // MEMORY_SHARE
    return min(memory.count, max(1, int(room // size)))

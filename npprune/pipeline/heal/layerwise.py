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
from npprune.errors import GateError
from npprune.models.view import make_view
from npprune.pipeline.common.events import Emit, Event
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.heal.image_cache import MEMORY_SHARE, Memory
from npprune.pipeline.heal.teacher import Held, Outcome, Teacher, measure, weights
from npprune.recipe import HealSection
from npprune.records import HealPoint
from npprune.store.training import TrainingFolder

STAGE = "heal"
TOKENS = 64  # of each image
COPIES = 3  # of the stream that are held: before a block, its attention, its target


def reconstruct(
    student: nn.Module,
    teacher: Teacher,
    memory: Memory,
    held: Held,
    settings: HealSection,
    *,
    folder: TrainingFolder,
    identity: dict[str, Any],
    device: torch.device,
    seed: int,
    emit: Emit,
    started: float,
) -> Outcome:
    """Train block by block; the best weights by held-out divergence are left in `student`.

    Raises:
        GateError: the network's predictions are no numbers any more.
    """
    student.eval().requires_grad_(True)
    view = make_view(student)
    history: list[HealPoint] = []
    best: dict[str, Tensor] = {}
    begun = time.perf_counter()

    def watch(block: int, loss: float | None) -> None:
        nonlocal best
        point = measure(
            student, teacher, held, Processes(), device,
            step=block, seconds=time.perf_counter() - started, loss=loss,
        )  # fmt: skip
        if not point.divergence_nats < float("inf"):
            raise GateError(
                f"block {block - 1} was trained to give no numbers any more",
                hint=f"a smaller `--lr` than {settings.lr:g}",
            )
        if all(point.divergence_nats < p.divergence_nats for p in history):
            best = weights(student)
        history.append(point)
        about = {
            "settings": identity,
            "step": block,
            "history": [asdict(p) for p in history],
            "seconds": time.perf_counter() - started,
        }
        tensors = {f"student/{k}": v for k, v in weights(student).items()}
        folder.save(about, tensors | {f"best/{k}": v for k, v in best.items()})
        emit(
            Event(
                STAGE,
                level="progress",
                done=block,
                total=len(view.widths),
                unit="blocks",
                data={"note": f"held-out agreement {100 * point.agreement:.1f} %"},
            )
        )

    found = folder.load(identity)
    if found is None:
        first = 0
        watch(0, None)
    else:
        about, tensors = found
        first, started = about["step"], started - about["seconds"]
        history = [HealPoint(**p) for p in about["history"]]
        student.load_state_dict(_part(tensors, "student/"))
        best = _part(tensors, "best/")
        emit(Event(STAGE, f"goes on at block {first} of {folder.path}"))

    def after(block: Reconstructed) -> None:
        watch(block.block + 1, block.after)

    rows = torch.arange(_fit(memory, student, view.embed))
    assert settings.epochs is not None
    reconstruct_blocks(
        view,
        teacher.view,
        [memory.images(part).to(device) for part in rows.split(settings.batch_size)],
        epochs=settings.epochs,
        learning_rate=settings.lr,
        seed=seed,
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
def _fit(memory: Memory, student: nn.Module, embed: Any) -> int:
    """How many images' streams fit into memory."""
    x = memory.images(slice(0, 1)).to(next(student.parameters()).device)
    size = embed(x).numel() * 4 * COPIES + x.numel() * 4
    room = psutil.virtual_memory().available // MEMORY_SHARE
    return min(memory.count, max(1, int(room // size)))

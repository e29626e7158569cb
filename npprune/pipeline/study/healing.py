"""The rows of a study, healed: a short distillation of each on the calibration images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.models.info import weights_sha256
from npprune.pipeline.common.events import Emit
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.distillation import Distillation
from npprune.pipeline.heal.image_cache import ImagesInMemory, to_bytes
from npprune.pipeline.heal.images import every_tenth, to_outputs
from npprune.pipeline.heal.teacher import HeldOut, Saved, Teacher, TrainingSet, logits_of
from npprune.recipe import HealSection
from npprune.records import Preprocessing
from npprune.store.training import TrainingFolder


class Healer:
    """Heals one pruned network after the other, all on the same images.

    It trains on the images that the rows were fitted on, and is measured on those held out of
    them, as `npprune prune --heal` is. An interrupted row resumes where it stopped.
    """

    def __init__(
        self,
        dense: nn.Module,
        fit: Sequence[tuple[Tensor, Tensor]],
        held: Sequence[tuple[Tensor, Tensor]],
        preprocessing: Preprocessing,
        epochs: int,
        *,
        classes: list[int] | None,
        spec: str,
        device: torch.device,
        emit: Emit,
    ) -> None:
        """fit, held: decoded images [b, c, h, w] with labels [b]; spec: what they are called."""
        self.settings = HealSection(epochs=epochs)
        self.device, self.emit = device, emit
        self.teacher = Teacher(dense, columns=classes)
        images = [x for part in (fit, held) for x, _ in part]
        pixels = torch.cat([to_bytes(x.cpu(), preprocessing) for x in images])
        labels = to_outputs(torch.cat([y for part in (fit, held) for _, y in part]), classes)
        n, first = len(labels), sum(len(y) for _, y in fit)
        train, other = list(range(first)), list(range(first, n))
        if not other:
            train, other = every_tenth(n, n, spec)
        self.parts = [
            ImagesInMemory(pixels[rows], labels[rows], preprocessing, flips=flips, seed=0)
            for rows, flips in ((train, True), (other, False))
        ]
        self.held = HeldOut(self.parts[1], logits_of(self.teacher, self.parts[1], device))

    def heal(self, student: nn.Module, row: Path, seed: int) -> float:
        """Train in place; the state is beside the row's file. Returns seconds."""
        started = time.perf_counter()
        pool, _ = self.parts
        identity: dict[str, Any] = {
            **self.settings.model_dump(),
            "seed": seed,
            "student": weights_sha256(student),
        }
        folder = TrainingFolder(row)
        pool.seed = seed
        with folder.lock():
            Distillation(
                student, self.teacher, TrainingSet(pool, self.held), self.settings, mixing=True,
                saved=Saved(folder, identity), started=started,
                work=Work(str(self.device), seed, self.emit),
            ).run()  # fmt: skip
            folder.remove()
        return time.perf_counter() - started

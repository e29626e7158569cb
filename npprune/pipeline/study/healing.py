"""The rows of a study, healed: a short distillation of each on the calibration images."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npprune.models.info import weights_sha256
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.distillation import Distillation
from npprune.pipeline.heal.image_cache import ImagesInMemory, to_bytes
from npprune.pipeline.heal.images import every_tenth, to_outputs
from npprune.pipeline.heal.teacher import HeldOut, Saved, Teacher, TrainingSet, logits_of
from npprune.pipeline.prune.opening import DecodedImages, Opened
from npprune.recipe import HealSection
from npprune.store.training import TrainingFolder


class Healer:
    """Heals one pruned network after the other, all on the same images.

    It trains on the images that the rows were fitted on, and is measured on those held out of
    them, as `npprune prune --heal` is. An interrupted row resumes where it stopped.
    """

    def __init__(
        self, opened: Opened, fit: DecodedImages, held: DecodedImages, epochs: int, work: Work
    ) -> None:
        """fit, held: the calibration images that rows are fitted on, and the others."""
        classes, preprocessing = opened.classes, opened.images.preprocessing
        self.settings = HealSection(epochs=epochs)
        self.work = work
        self.teacher = Teacher(opened.network.model, columns=classes)
        pixels = torch.cat([to_bytes(x.cpu(), preprocessing) for x in fit.images + held.images])
        labels = to_outputs(torch.cat(fit.labels + held.labels), classes)
        n, first = len(labels), len(fit)
        train, other = list(range(first)), list(range(first, n))
        if not other:
            train, other = every_tenth(n, n, opened.images.source.spec)
        self.parts = [
            ImagesInMemory(pixels[rows], labels[rows], preprocessing, flips=flips, seed=0)
            for rows, flips in ((train, True), (other, False))
        ]
        self.held = HeldOut(self.parts[1], logits_of(self.teacher, self.parts[1], work.where))

    def heal(self, student: nn.Module, row: Path, seed: int) -> float:
        """Train in place; the state lies next to the row's file. Returns seconds."""
        started = time.perf_counter()
        pool, _ = self.parts
        identity: dict[str, Any] = {
            **self.settings.model_dump(),
            "seed": seed,
            "student": weights_sha256(student),
        }
        folder = TrainingFolder(row, warn=self.work.warn)
        pool.seed = seed
        with folder.lock():
            Distillation(
                student, self.teacher, TrainingSet(pool, self.held), self.settings, mixing=True,
                saved=Saved(folder, identity), started=started, work=replace(self.work, seed=seed),
            ).run()  # fmt: skip
            folder.remove()
        return time.perf_counter() - started

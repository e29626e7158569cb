"""The dense network as a teacher, and the pruned one measured against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.compression import healing
from npprune.core.metrics import feature_distances
from npprune.core.view import VitView
from npprune.errors import ModelError
from npprune.models.view import has_classifier, make_view, outputs_of
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.image_cache import ImagesInMemory, TrainingImages
from npprune.recipe import HealSection
from npprune.records import HealPoint
from npprune.store.training import TrainingFolder

MEASURE_BATCH = 64
FEATURES = 20.0  # weight of the streams beside the predictions, unless asked otherwise


class Teacher:
    """The dense network, limited to the student's classes.

    columns: the outputs that a cut head has kept; allowed: the classes of a specialised network
    that kept its whole head, where the others get a logit of -inf.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        columns: list[int] | None = None,
        allowed: list[int] | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.view = make_view(model)
        self.objective = self.view.objective
        self.classifies = has_classifier(model)
        if not self.classifies:  # features are of no class
            columns = allowed = None
        self.chosen = columns if columns is not None else allowed
        self.expands = columns is None and allowed is not None
        self.precision = precision

    def said(self, point: HealPoint) -> str:
        """How near the student is, in a few words."""
        if self.classifies:
            return f"held-out agreement {100 * point.agreement:.1f} %"
        return f"held-out cosine {point.agreement:.4f}"

    @torch.no_grad()
    def chosen_logits(self, images: Tensor) -> Tensor:
        """Logits [b, k] of the student's classes alone; or features [b, s, d]."""
        with autocast(images.device, self.precision):
            return self._choose(outputs_of(self.model, images))

    def expanded(self, chosen: Tensor, classes: int) -> Tensor:
        """Logits [b, k] as the student's outputs [b, classes] are arranged."""
        if not self.expands:
            return chosen
        logits = torch.full((len(chosen), classes), -math.inf, device=chosen.device)
        logits[:, self.chosen] = chosen
        return logits

    @torch.no_grad()
    def streams_and_outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The stream after each block [b, t, d], and `chosen_logits`."""
        with autocast(images.device, self.precision):
            streams, logits = healing.streams_and_outputs(self.view, images)
        return streams, self._choose(logits)

    def _choose(self, logits: Tensor) -> Tensor:
        return logits.float() if self.chosen is None else logits.float()[:, self.chosen]


def blocks_match(student: VitView, teacher: Teacher) -> bool:
    """Whether the streams after the blocks can be compared: as many, and as wide."""
    ours, theirs = student, teacher.view
    return (len(ours.widths), ours.fc2(0).out_features) == (
        len(theirs.widths),
        theirs.fc2(0).out_features,
    )


def feature_weight(settings: HealSection, student: VitView, teacher: Teacher) -> float:
    """As asked; else 20 for a teacher of the same blocks, and 0 for another one."""
    if settings.feature_weight is not None:
        return settings.feature_weight
    return FEATURES if blocks_match(student, teacher) else 0.0


def logits_of(teacher: Teacher, memory: ImagesInMemory, device: torch.device) -> Tensor:
    """The teacher's logits [n, k] (or features) of all images, on the CPU."""
    parts = torch.arange(memory.count).split(MEASURE_BATCH)
    return torch.cat([teacher.chosen_logits(memory.images(p).to(device)).cpu() for p in parts])


@dataclass
class HeldOut:
    """Images that are never trained on, with the teacher's logits [n, k] of its classes, or its
    features."""

    memory: ImagesInMemory
    chosen: Tensor


@dataclass
class TrainingSet:
    """What is trained on, and what the training is watched on."""

    images: TrainingImages
    held: HeldOut


@dataclass(frozen=True)
class Saved:
    """Where the state of a training is kept, and what decides its result: a state of another
    identity is refused."""

    folder: TrainingFolder
    identity: dict[str, Any]


@dataclass
class Outcome:
    """What a training came to. The best weights are in the student."""

    history: list[HealPoint]
    best: HealPoint
    steps: int
    epochs: float
    stopped: str
    images_per_second: float


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 for matrix products where asked for; weights and sums stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def measure(
    model: nn.Module,
    teacher: Teacher,
    held: HeldOut,
    work: Work,
    *,
    step: int,
    seconds: float,
    loss: float | None,
) -> HealPoint:
    """Divergence from the dense network, agreement (of features their cosine) and top-1 on the
    held-out images."""
    n, team, device = held.memory.count, work.team, work.where
    sums = [0.0, 0.0, 0.0, 0.0]  # divergence, agreement, right, labelled
    for part in torch.arange(n)[team.rank :: team.count].split(MEASURE_BATCH):
        with autocast(device, teacher.precision):
            logits = outputs_of(model, held.memory.images(part).to(device))
        logits = logits.float().cpu()
        target = teacher.expanded(held.chosen[part], logits.shape[1])
        sums[0] += float(teacher.objective.loss(logits, target).double().sum())
        if not teacher.classifies:
            sums[1] += float(feature_distances(target, logits)[:, 0].sum())
            continue
        labels, top = held.memory.labels[part], logits.argmax(dim=1)
        sums[1] += float((top == target.argmax(dim=1)).sum())
        sums[2] += float((top == labels).sum())
        sums[3] += float((labels >= 0).sum())
    divergence, agreement, right, labelled = team.sums(sums)
    top1 = right / labelled if labelled else None
    return HealPoint(step, seconds, divergence / n, agreement / n, loss, top1)


def without_numbers(held: HeldOut) -> ModelError:
    """Why the divergence is not a number before anything was trained."""
    dense = bool(torch.isfinite(held.chosen.flatten(1).logsumexp(dim=1)).all())
    return ModelError(
        f"the {'pruned' if dense else 'dense'} network gives NaN or infinity on the held-out "
        "images, before the first step: there is nothing to train from",
        hint="its weights are damaged, or it overflows: `npprune eval` measures it",
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state on the CPU."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}

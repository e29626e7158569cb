"""The training loop of healing: one process or many, resumable, watched on held-out images.

Everything random follows from seed, epoch and step, so the state is the weights, the optimiser's
moments and a position; on one process an interrupted training resumes with the same bits. With
several processes each takes its share of every batch, and torch's DistributedDataParallel brings
the gradients together (NCCL between GPUs, gloo between CPUs).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from npprune.core.compression import healing
from npprune.core.view import VitView
from npprune.errors import GateError, NpPruneError, setting
from npprune.models.view import make_view
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.image_cache import Chunk, ImagesInMemory
from npprune.pipeline.heal.teacher import (
    MEASURE_BATCH,
    Outcome,
    Saved,
    Teacher,
    TrainingSet,
    autocast,
    feature_weight,
    measure,
    weights,
    without_numbers,
)
from npprune.recipe import HealSection
from npprune.records import HealPoint

STAGE = "heal"
CLIP = 1.0  # of the gradient's norm
MAY_RISE = 0.25  # of the training, in which the divergence may rise
MEASURED_AT_LEAST = 4  # times in a training
MEASURED_EVERY = 1000  # steps, at most
TABLE_BYTES = 512 * 2**20  # the teacher's predictions are kept up to this size
TABLE_EPOCHS = 3  # and from this length on: each image has two of them


@dataclass
class Course:
    """What was settled before the first step; kept in the state, for a clock never repeats."""

    steps: int | None  # None: until the time is over
    expected_steps: int
    interval: int  # steps between measurements
    decay: float  # of the weights' running mean
    table: bool  # the teacher's predictions are computed once
    begun: float = 0.0  # seconds that had gone by at the first step


@dataclass
class Progress:
    """Where a training is."""

    step: int = 0
    history: list[HealPoint] = field(default_factory=list)
    best: HealPoint | None = None
    rises: int = 0  # measurements in a row that rose
    losses: list[float] = field(default_factory=list)  # since the last measurement
    seen: int = 0  # images since this process began
    stopped: str = ""


class _Trained(nn.Module):
    """The student as it is trained: images -> the streams after its blocks, and the logits."""

    def __init__(self, student: nn.Module, view: VitView) -> None:
        super().__init__()
        self.student = student
        self.view = view

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return healing.streams_and_outputs(self.view, images)


class Distillation:
    """One training. `run` leaves the best weights in `student`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        data: TrainingSet,
        settings: HealSection,
        *,
        mixing: bool,
        saved: Saved,
        work: Work,
        started: float,
    ) -> None:
        """mixing: images are mixed in pairs. started: the clock when healing began, for
        `minutes`."""
        self.student = student.eval().requires_grad_(True)  # no dropout: the teacher has none
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.best_weights = weights(student)
        self.teacher, self.images, self.held, self.settings = (
            teacher,
            data.images,
            data.held,
            settings,
        )
        self.mixing, self.folder, self.identity = mixing, saved.folder, saved.identity
        self.work = work.on(STAGE)
        self.processes = self.work.team
        view = make_view(student)
        self.feature_weight = feature_weight(settings, view, teacher)
        self.trained = self.processes.shared(_Trained(student, view))
        self.started = started
        self.progress = Progress()
        self.table: Tensor | None = None
        self.batch = min(settings.batch_size, self.images.count)
        self.steps_per_epoch = (
            self.images.count // self.batch
        )  # what is left over comes another time
        groups = healing.parameter_groups(student, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)  # type: ignore[arg-type]
        self.course = Course(None, 1, 1, 0.0, False)

    # ------------------------------------------------------------ the line

    def run(self) -> Outcome:
        """Train from the state in the folder, or from the beginning, to the end."""
        if self._resume():
            self._prepare_table(self.folder.load_table())
        else:
            self.course = self._settle()
            self._prepare_table()
            self.course.begun = self._clock()
            self._measure()
        began = time.perf_counter()
        over = self._over()
        while not over:
            for chunk in self._rest_of_epoch():
                self._step(chunk)
                over = self._over()
                if over or self.progress.step % self.course.interval == 0:
                    self._measure()
                    over = over or bool(self.progress.stopped)
                if over:
                    break
        seconds = time.perf_counter() - began
        with torch.no_grad():
            for name, value in self.student.state_dict().items():
                value.copy_(self.best_weights[name])
        now = self.progress
        assert now.best is not None
        return Outcome(
            now.history,
            now.best,
            now.step,
            now.step / self.steps_per_epoch,
            now.stopped,
            now.seen / seconds,
        )

    def _clock(self) -> float:
        """Seconds since healing began, the same on every rank."""
        return self.processes.on_first(lambda: time.perf_counter() - self.started)

    def _over(self) -> bool:
        if self.progress.stopped:
            return True
        if self.course.steps is not None:
            done = self.progress.step >= self.course.steps
        else:
            assert self.settings.minutes is not None
            done = self.progress.step > 0 and self._clock() >= 60 * self.settings.minutes
        if done:
            self.progress.stopped = "the end of the schedule"
        return done

    def _share(self) -> float:
        """How much of the training is over, in [0, 1]."""
        if self.course.steps is not None:
            return (self.progress.step + 0.5) / self.course.steps
        assert self.settings.minutes is not None
        begun, end = self.course.begun, 60 * self.settings.minutes
        gone = (self._clock() - begun) / max(end - begun, 1e-6)
        least = 0.5 / max(self.course.expected_steps, 1)
        return min(1.0, gone + least)

    def _settle(self) -> Course:
        """Length, measurements and what is kept, from the settings and, for minutes, the speed."""
        if self.settings.epochs is not None:
            expected = steps = self.settings.epochs * self.steps_per_epoch
        else:
            assert self.settings.minutes is not None
            left = 60 * self.settings.minutes - self._clock()
            expected, steps = max(1, int(left / self.processes.on_first(self._step_seconds))), None
        interval = min(self.steps_per_epoch, -(-expected // MEASURED_AT_LEAST), MEASURED_EVERY)
        size = 2 * 4 * self.images.count * self.held.chosen[0].numel()
        table = (
            isinstance(self.images, ImagesInMemory)
            and not self.feature_weight
            and not self.mixing
            and expected >= TABLE_EPOCHS * self.steps_per_epoch
            and size <= TABLE_BYTES
        )
        return Course(steps, expected, interval, healing.averaging_decay(expected), table)

    def _step_seconds(self) -> float:
        """Seconds of one step, tried on a copy."""
        trial = copy.deepcopy(self.student)
        x = self.held.memory.images(slice(0, self.batch)).to(self.work.where)
        spent = 0.0
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            with autocast(self.work.where, self.settings.precision):
                loss = trial(x).float().square().mean()
            loss.backward()
            self.teacher.chosen_logits(x)
            spent = float(time.perf_counter() - began) * self.batch / len(x)
        return spent / self.processes.count

    def _prepare_table(self, kept: Mapping[str, Tensor] | None = None) -> None:
        """The teacher's outputs of every image, as it is and mirrored: [n, 2, c]."""
        if not self.course.table:
            return
        assert isinstance(self.images, ImagesInMemory)
        if kept is not None:
            self.table = kept["logits"]
            return
        n = self.images.count
        table = torch.zeros(n, 2, *self.held.chosen.shape[1:])
        for turn, start in enumerate(range(0, n, MEASURE_BATCH)):
            if turn % self.processes.count != self.processes.rank:
                continue
            rows = slice(start, start + MEASURE_BATCH)
            x = self.images.images(rows).to(self.work.where)
            table[rows, 0] = self.teacher.chosen_logits(x).cpu()
            table[rows, 1] = self.teacher.chosen_logits(x.flip(-1)).cpu()
            done = min(n, start + MEASURE_BATCH)
            self.work.progress(done, n, message="the dense network's predictions")
        self.processes.add_up(table)
        self.table = table
        self.processes.on_first(lambda: self.folder.save_table({"logits": table}))

    # ------------------------------------------------------------ a step

    def _rest_of_epoch(self) -> Iterator[Chunk]:
        """This rank's part of each batch that is left of the epoch."""
        epoch, gone = divmod(self.progress.step, self.steps_per_epoch)
        order = healing.epoch_order(self.work.seed, epoch, self.images.count)
        parts = order.split(self.batch)[gone : self.steps_per_epoch]
        mine = [part.tensor_split(self.processes.count)[self.processes.rank] for part in parts]
        return self.images.epoch(epoch, mine)

    def _step(self, chunk: Chunk) -> None:
        factor = healing.rate(self._share())
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        total = self._losses(chunk).sum()
        summed, images = self.processes.sums([float(total.detach()), float(len(chunk.rows))])
        count = int(images)
        # DistributedDataParallel takes the mean over processes; what counts is that over images
        self.processes.backward(total * (self.processes.count / max(count, 1)))
        loss_value = summed / max(count, 1)
        self.progress.step += 1
        self.progress.seen += count
        if count == 0:  # not one image of this batch could be read
            return
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        if not math.isfinite(loss_value) or not bool(torch.isfinite(norm)):
            raise self._not_finite(loss_value)
        self.optimizer.step()
        healing.update_average(self.average, self.student, self._decay())
        self.progress.losses.append(loss_value)
        self._tell_step()

    def _decay(self) -> float:
        """The running mean begins with the first steps, not with the pruned weights."""
        return min(self.course.decay, self.progress.step / (self.progress.step + 4))

    def _losses(self, chunk: Chunk) -> Tensor:
        """The loss of each image: [b]."""
        images, labels = chunk.images.to(self.work.where), chunk.labels.to(self.work.where)
        share = 1.0
        if self.mixing:
            g = healing.generator_at(self.work.seed, "mix", self.progress.step)
            share = float(torch.rand(1, generator=g))
            images = healing.mix(images, share)
        with_features = self.feature_weight > 0
        with autocast(self.work.where, self.settings.precision):
            streams, logits = self.trained(images)
        if self.table is not None:
            chosen = self.table[chunk.rows, chunk.flipped.long()].to(self.work.where)
        elif with_features:
            theirs, chosen = self.teacher.streams_and_outputs(images)
        else:
            chosen = self.teacher.chosen_logits(images)
        target = self.teacher.expanded(chosen, logits.shape[1])
        loss = self.teacher.objective.loss(logits, target, self.settings.temperature)
        if with_features:
            gap = healing.feature_distance(streams, theirs)
            loss = loss + self.feature_weight * gap
        if self.settings.label_weight > 0:
            right = share * healing.label_loss(logits, labels)
            if share < 1:
                other = labels[healing.partners(len(labels))]
                right = right + (1 - share) * healing.label_loss(logits, other)
            loss = loss + self.settings.label_weight * right
        return loss

    def _not_finite(self, loss: float) -> NpPruneError:
        self.processes.on_first(self.folder.remove)
        if self.progress.step == 0:
            return without_numbers(self.held)
        return GateError(
            f"the loss became {loss} at step {self.progress.step} of "
            f"{self.course.expected_steps}: training diverged, and nothing was written",
            hint=f"a smaller {setting('heal.lr')} than {self.settings.lr:g}"
            + (
                f", or {setting('heal.precision', 'fp32')}"
                if self.settings.precision != "fp32"
                else ""
            ),
        )

    # ------------------------------------------------------------ measurements and the state

    def _measure(self) -> None:
        """The running mean on the held-out images; keep it if it is the best, save the state."""
        now = self.progress
        losses = now.losses
        point = measure(
            self.average, self.teacher, self.held, self.work,
            step=now.step, seconds=self._clock(),
            loss=sum(losses) / len(losses) if losses else None,
        )  # fmt: skip
        if not math.isfinite(point.divergence_nats):
            raise self._not_finite(point.divergence_nats)
        last = now.history[-1] if now.history else point
        rose = point.divergence_nats > last.divergence_nats
        # a high learning rate may cost something at first; the cosine brings it back
        counts = now.step >= MAY_RISE * self.course.expected_steps
        now.rises = now.rises + 1 if rose and counts else 0
        now.history.append(point)
        now.losses = []
        if now.best is None or point.divergence_nats < now.best.divergence_nats:
            now.best, self.best_weights = point, weights(self.average)
        if now.rises >= self.settings.patience and not now.stopped:
            times = "once" if now.rises == 1 else f"{now.rises} times in a row"
            now.stopped = f"held-out divergence that rose {times}"
        self.processes.on_first(self._save)

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for kind, values in (
            ("student", weights(self.student)),
            ("average", weights(self.average)),
            ("best", self.best_weights),
        ):
            tensors |= {f"{kind}/{name}": value for name, value in values.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": v.detach().cpu().clone() for k, v in moments.items()}
        now = self.progress
        about = {
            "settings": self.identity,
            "course": asdict(self.course),
            "step": now.step,
            "history": [asdict(p) for p in now.history],
            "best": asdict(now.best) if now.best else None,
            "rises": now.rises,
            "stopped": now.stopped,
            "seconds": time.perf_counter() - self.started,
        }
        self.folder.save(about, tensors)

    def _resume(self) -> bool:
        """Go on from the folder's state; False where there is none."""
        found = self.folder.load(self.identity)
        if found is None:
            return False
        about, tensors = found
        self.course = Course(**about["course"])
        now = self.progress
        now.step, now.rises, now.stopped = about["step"], about["rises"], about["stopped"]
        now.history = [HealPoint(**p) for p in about["history"]]
        now.best = HealPoint(**about["best"]) if about["best"] else None
        self.started -= about["seconds"]
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            parts.setdefault(kind, {})[rest] = value
        self.student.load_state_dict(parts["student"])
        self.average.load_state_dict(parts["average"])
        self.best_weights = parts["best"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts.get("optimizer", {}).items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.work.say(f"resumes at step {now.step} of {self.folder.path}")
        return True

    # ------------------------------------------------------------ talk

    def _tell_step(self) -> None:
        now = self.progress
        note = f"loss {sum(now.losses) / len(now.losses):.3f}"
        if now.history:
            note += f", {self.teacher.said(now.history[-1])}"
        if self.course.steps is not None:
            done, total, unit = now.step, self.course.steps, "steps"
        else:
            assert self.settings.minutes is not None
            total, unit = int(60 * self.settings.minutes), "seconds"
            done = min(total, int(time.perf_counter() - self.started))
        self.work.progress(done, total, unit, note=note, loss=now.losses[-1], step=now.step)

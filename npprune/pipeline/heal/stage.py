"""Heal: train a pruned network, shortly, to predict what its dense network predicts."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from npprune.data.unlabelled import Joined
from npprune.errors import ModelError, UsageError, plural, setting
from npprune.files import keeping
from npprune.models.info import state, weights_sha256
from npprune.models.view import make_view
from npprune.pipeline.common.inputs import (
    Images,
    Network,
    class_names,
    label_doubt,
    open_checkpoint,
    remembered,
)
from npprune.pipeline.common.outputs import check_checkpoint, reads_of, recordable
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.common.results import add_command, run_of
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import (
    check_outputs,
    dense_reference,
    dense_section,
    open_dense,
)
from npprune.pipeline.heal.distillation import Distillation
from npprune.pipeline.heal.images import (
    most_held,
    open_training_images,
    read_training_images,
    split,
)
from npprune.pipeline.heal.layerwise import reconstruct
from npprune.pipeline.heal.teacher import Outcome, Saved, Teacher, TrainingSet, feature_weight
from npprune.recipe import DataSection, HealSection, check
from npprune.records import (
    Analysis,
    CheckpointConfig,
    HealSummary,
    Plan,
    Result,
    Variant,
    digest,
    to_dict,
)
from npprune.report import text
from npprune.report.analyses import learning_curve
from npprune.store.checkpoints import plan_of, read_config, write_checkpoint
from npprune.store.runs import RunFolder, images_in_words
from npprune.store.training import TrainingFolder

STAGE = "heal"
LONG_EPOCHS = 30  # from here on images are seen often enough to be augmented
MIXING = ("mixed", "strong")  # the dense network sees the same mixture
AUGMENTATIONS = {
    "none": "none",
    "mixed": "every image as it is and mirrored, in turn, and images mixed in pairs",
    "flips": "every image as it is and mirrored, in turn",
    "strong": "timm's random crops and RandAugment, and images mixed in pairs",
}


def heal(
    checkpoint: Path,
    data: DataSection,
    settings: HealSection,
    out: Path,
    *,
    dense_checkpoint: str | None = None,
    any_teacher: bool = False,
    work: Work | None = None,
    dry_run: bool = False,
) -> Variant:
    """Train the pruned network of `checkpoint` and write it as the checkpoint folder `out`.

    An interrupted training is kept in `<out>.partial`; the same call resumes from there.

    Args:
        data: `train` (else `calibration`) names the images; their labels are needed only for
            `label_weight` and for choosing classes.
        dense_checkpoint: where the dense weights are, if they have moved.
        any_teacher: accept other weights than those that were pruned.

    Raises:
        GateError: the loss is not a number any more; nothing is written.
        NpPruneError: what is wrong with checkpoint, teacher, images, settings or folder.
    """
    started = time.perf_counter()
    work = (work or Work()).on(STAGE)
    peers, where = work.team, work.where
    _check(settings, peers)
    reads = [*reads_of(checkpoint), *([dense_checkpoint] if dense_checkpoint else [])]
    peers.on_first(lambda: check_checkpoint(out, reads, write=not dry_run))
    student = open_checkpoint(checkpoint, work)
    config = student.config
    assert config is not None
    recorded = run_of(checkpoint, config, work) is None or peers.on_first(
        lambda: recordable(run_of(checkpoint, config), work)
    )
    if config.prune is None:
        raise ModelError(
            f"`{checkpoint}` was not pruned: there is nothing to heal",
            hint="`npprune prune` writes a checkpoint that can be healed",
        )
    plan = None if student.held else plan_of(checkpoint, config)
    dense = open_dense(config, checkpoint, dense_checkpoint, work, any_weights=any_teacher)
    check_outputs(config, dense)
    teacher = _teacher(student, dense, settings, work)
    if not settings.layerwise:
        weight = feature_weight(settings, make_view(student.model), teacher)
        settings = settings.model_copy(update={"feature_weight": weight})
    images, extra = open_training_images(config, dense.info, data, settings, work)
    train, held_out = split(images, most_held(teacher))
    course = _augmentation(settings, len(train) if train is not None else 0, images)
    work.say(f"{checkpoint.name} on {where} ({work.reason}), {_length(settings)}")
    if settings.feature_weight:
        work.say(f"every block's output is learnt, at weight {settings.feature_weight:g}")
    work.say(f"augmentation: {AUGMENTATIONS[course]}")
    variant = _variant(config, student, images, out)
    if dry_run:
        return variant
    sha256 = weights_sha256(teacher.model)
    healing = _Healing(checkpoint, config, student, teacher, sha256, images, extra, course, plan)
    identity = _identity(healing, settings, work)
    folder = TrainingFolder(out.resolve(), _said(checkpoint, dense, images, identity), work.warn)
    with ExitStack() as stack:
        peers.on_first(lambda: stack.enter_context(folder.lock()) and None)
        training_set = read_training_images(images, train, held_out, course, teacher, work)
        outcome = _train(
            healing, training_set, settings, Saved(folder, identity), work, started=started
        )
        seconds = time.perf_counter() - started
        variant.heal = _summary(healing, training_set, outcome, settings, work, seconds)

        def write() -> None:
            moved = None if any_teacher else dense_checkpoint
            with keeping(variant):
                _write(healing, out, variant, moved, work, recorded=recorded)

        peers.on_first(write)
        peers.on_first(folder.remove)
    work.say(f"wrote {out}")
    return variant


def heal_pruned(
    checkpoint: Path,
    settings: HealSection,
    *,
    data: DataSection | None = None,
    work: Work | None = None,
) -> tuple[Path, Variant]:
    """Heal right after pruning: into `<checkpoint>_healed`, on the images of `data`, or else
    those that the checkpoint was calibrated on."""
    if data is None:
        details = read_config(checkpoint).details.get("data", {})
        said = {**details, "train": details.get("calibration")}
        data = remembered(DataSection, said, checkpoint)
    out = healed_folder(checkpoint)
    return out, heal(checkpoint, data, settings, out, work=work)


def healed_folder(checkpoint: Path) -> Path:
    """Where the healed network goes that belongs to a pruned one."""
    return checkpoint.with_name(f"{checkpoint.name}_healed")


# ---------------------------------------------------------------- before


def _check(settings: HealSection, peers: Processes) -> None:
    check(settings)
    if settings.batch_size % peers.count:
        raise UsageError(
            f"{setting('heal.batch_size')} must be a multiple of the {peers.count} processes that "
            f"share it, got {settings.batch_size}"
        )
    if settings.layerwise and peers.count > 1:
        raise UsageError(f"{setting('heal.layerwise')} runs in one process, got {peers.count}")


def _teacher(student: Network, dense: Network, settings: HealSection, work: Work) -> Teacher:
    """The dense network as the student's teacher; ModelError where the two do not match."""
    config = student.config
    assert config is not None
    outputs, classes = config.details.get("outputs"), config.details.get("classes")
    offered = dense.info.num_classes
    wanted = config.num_classes if outputs is None else max(outputs) + 1
    if offered < wanted or (outputs is None and offered != wanted):
        raise ModelError(
            f"the teacher has {plural(offered, 'output')}, and the student needs {wanted}"
        )
    predicts = [name for name in ("label_weight", "temperature") if _asked(settings, name)]
    if offered == 0 and predicts:
        raise UsageError(
            f"{setting(f'heal.{predicts[0]}')} is about predictions, and the network has no "
            "classifier: its features are learnt",
            hint="leave it out",
        )
    same = (dense.info.embed_dim, len(dense.info.widths)) == (
        student.info.embed_dim,
        len(student.info.widths),
    )
    if (settings.feature_weight or settings.layerwise) and not same:
        raise ModelError(
            f"blocks can only be matched with a teacher of the same {len(student.info.widths)} "
            f"blocks of width {student.info.embed_dim}, got {len(dense.info.widths)} of "
            f"{dense.info.embed_dim}",
            hint=f"leave {setting('heal.feature_weight')} and {setting('heal.layerwise')} out",
        )
    limit = outputs or classes
    if limit:
        count = plural(len(limit), "class", "classes")
        work.say(f"the dense network is limited to the student's {count}")
    return Teacher(dense.model, columns=outputs, allowed=classes, precision=settings.precision)


def _asked(settings: HealSection, name: str) -> bool:
    """Whether a setting is another than it is unasked."""
    return bool(getattr(settings, name) != HealSection.model_fields[name].default)


def _augmentation(settings: HealSection, images: int, source: Images) -> str:
    if settings.layerwise:
        return "none"
    of_files = source.source.items is not None and source.source.content is None
    if settings.augment != "auto":
        if settings.augment == "strong" and not of_files:
            why = "reads images again and again, and a stream has no positions"
            if source.source.content is not None:
                why = "crops image files, and these images are in memory, prepared"
            raise UsageError(
                f"{setting('heal.augment', 'strong')} {why}",
                hint=f"use {setting('heal.augment', 'flips')}",
            )
        return settings.augment
    long = settings.epochs is not None and settings.epochs >= LONG_EPOCHS
    return "strong" if long and of_files and images else "mixed"


def _length(settings: HealSection) -> str:
    how = "block by block" if settings.layerwise else f"distillation, lr {settings.lr:g}"
    if settings.epochs is not None:
        return f"{how}, {plural(settings.epochs, 'epoch')}"
    return f"{how}, {settings.minutes:g} minutes"


@dataclass
class _Healing:
    """A pruned network, its teacher and the images."""

    checkpoint: Path
    config: CheckpointConfig
    student: Network
    teacher: Teacher
    teacher_sha256: str
    images: Images
    extra: Images | None  # the unlabelled ones among them
    course: str  # of augmentation
    plan: Plan | None  # that the network was pruned by


def _identity(healing: _Healing, settings: HealSection, work: Work) -> dict[str, Any]:
    """All that decides the weights: a state of anything else is refused."""
    source, items = healing.images.source, healing.images.source.items
    content = {} if source.content is None else {"content": source.content()}
    return {
        **content,
        **settings.model_dump(),
        "augment": healing.course,
        "seed": work.seed,
        "student": healing.config.weights_sha256,
        "teacher": healing.teacher_sha256,
        "images": None if items is None else digest([[i.id, i.label] for i in items]),
        "spec": source.spec,
        "preprocessing": asdict(healing.images.preprocessing),
        "processes": work.team.count,
    }


def _said(
    checkpoint: Path, dense: Network, images: Images, identity: dict[str, Any]
) -> dict[str, str]:
    """What the hashes of the identity are of."""
    return {
        "student": f"{checkpoint} (weights {identity['student'][:12]})",
        "teacher": f"{dense.info.source.architecture} (weights {identity['teacher'][:12]})",
        "images": images_in_words(images.source.info()),
    }


# ---------------------------------------------------------------- after


def _train(
    healing: _Healing,
    data: TrainingSet,
    settings: HealSection,
    saved: Saved,
    work: Work,
    *,
    started: float,
) -> Outcome:
    """Block by block, or the whole network at once; the best weights are left in the student."""
    student, teacher = healing.student.model, healing.teacher
    if settings.layerwise:
        return reconstruct(
            student, teacher, data, settings, saved=saved, work=work, started=started
        )
    mixing = healing.course in MIXING
    return Distillation(
        student, teacher, data, settings, mixing=mixing, saved=saved, work=work, started=started
    ).run()


def _variant(config: CheckpointConfig, student: Network, images: Images, out: Path) -> Variant:
    assert config.prune is not None
    info = replace(student.info, preprocessing=images.preprocessing)
    return Variant(name=out.resolve().name, checkpoint="", model=info, prune=config.prune)


def _summary(
    healing: _Healing,
    data: TrainingSet,
    outcome: Outcome,
    settings: HealSection,
    work: Work,
    seconds: float,
) -> HealSummary:
    held, images, classes = data.held, healing.images, healing.student.info.num_classes
    labels = held.memory.labels
    known = labels >= 0
    dense_top1, doubt = None, ""
    if healing.teacher.classifies:
        top = healing.teacher.expanded(held.chosen, classes).argmax(dim=1)
        dense_top1 = float((top == labels)[known].double().mean()) if bool(known.any()) else None
        doubt = label_doubt(top[known], labels[known], held.chosen.shape[1], images.source)
    info = images.info()
    if isinstance(images.source, Joined):
        first = images.source.first
        assert first.items is not None
        ids = {i.id for i in first.items}
        info = first.info([name for name in info.skipped if name in ids])
    warnings = [doubt] if doubt else []
    if outcome.best.step == 0:
        warnings.append("healing did not lower the held-out divergence: the weights are as before")
    return HealSummary(
        source=healing.checkpoint.resolve().name,
        method="layer-wise" if settings.layerwise else "distillation",
        teacher_sha256=healing.teacher_sha256,
        settings=settings.model_dump(exclude_none=True),
        data=info,
        unlabelled=healing.extra.source.info() if healing.extra is not None else None,
        images=data.images.count,
        held_out=held.memory.count,
        augmentation=healing.course,
        steps=outcome.steps,
        epochs=outcome.epochs,
        processes=work.team.count,
        before=outcome.history[0],
        after=outcome.best,
        dense_top1=dense_top1,
        stopped=outcome.stopped,
        seconds=seconds,
        images_per_second=outcome.images_per_second,
        curve=outcome.history,
        warnings=warnings,
        unit=healing.teacher.objective.unit,
    )


def _write(
    healing: _Healing,
    out: Path,
    variant: Variant,
    dense_checkpoint: str | None,
    work: Work,
    *,
    recorded: bool,
) -> None:
    """The checkpoint and, where it can be recorded, what the run's result says of it."""
    checkpoint, config, student = healing.checkpoint, healing.config, healing.student
    variant.model.source = replace(variant.model.source, sha256=weights_sha256(student.model))
    run = run_of(checkpoint, config)
    home = run or RunFolder(out)
    assert variant.heal is not None
    healed = replace(
        config,
        preprocessing=healing.images.preprocessing,
        run=os.path.relpath(home.path, out),
        details={
            **config.details,
            "dense": _dense_details(config, checkpoint, out, dense_checkpoint),
            "healing": {k: v for k, v in to_dict(variant.heal).items() if k != "curve"},
        },
        versions=work.environment().versions,
    )
    write_checkpoint(out, healed, state(student.model), healing.plan)
    if not recorded:
        return

    def begin() -> Result:
        return Result(
            name=variant.name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=work.environment(),
            model=variant.model,
            classes=class_names(healing.images, student.info.num_classes),
        )

    with home.updating(begin if run is None else None) as result:
        variant.checkpoint = os.path.relpath(out, home.path)
        result.variants = [v for v in result.variants if v.name != variant.name] + [variant]
        result.analyses[f"heal {variant.name}"] = _analysis(variant.name, variant.heal)
        add_command(result, work.command)


def _dense_details(
    config: CheckpointConfig, checkpoint: Path, out: Path, dense_checkpoint: str | None
) -> dict[str, Any]:
    """Where the dense network is, as seen from `out`."""
    if dense_checkpoint is not None:
        return dense_reference(dense_section(config, checkpoint, dense_checkpoint), out)
    details = dict(config.details.get("dense", {}))
    for key in ("name_relative", "checkpoint_relative"):
        if key in details:
            details[key] = os.path.relpath(checkpoint / details[key], out)
    return details


def _analysis(name: str, summary: HealSummary) -> Analysis:
    """The learning curve, and a table of before and after on the held-out images."""
    before, after = summary.before, summary.after
    rows: list[list[str | int | float | None]] = [
        [text.divergence(summary), 0.0, before.divergence_nats, after.divergence_nats],
    ]
    if summary.unit == "nats":
        agree = 100 * before.agreement, 100 * after.agreement
        rows.append(["same top-1 as dense, %", 100.0, *agree])
    else:
        rows.append(["cosine to dense", 1.0, before.agreement, after.agreement])
    if summary.dense_top1 is not None and before.top1 is not None and after.top1 is not None:
        rows.append(["top-1, %", 100 * summary.dense_top1, 100 * before.top1, 100 * after.top1])
    minutes, seconds = divmod(round(summary.seconds), 60)
    spent = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    said = (
        f"{summary.source} was trained to {_learnt(summary)} ({summary.method}): "
        f"{text.plural(summary.images, 'image')}, {summary.epochs:.3g} "
        f"epoch{'s' * (summary.epochs != 1)}, {text.plural(summary.steps, 'step')}, {spent}, "
        f"{summary.images_per_second:.3g} images per second; augmentation: "
        f"{AUGMENTATIONS[summary.augmentation]}. Measured on "
        f"{plural(summary.held_out, 'held-out image')}, "
        f"not trained on; the weights of step {after.step} are kept. Ended by {summary.stopped}."
        f"{_losses(summary)}"
    )
    return learning_curve(
        f"Healing of {name}",
        [p.step for p in summary.curve],
        {"held-out divergence": [p.divergence_nats for p in summary.curve]},
        x_label="block" if summary.method == "layer-wise" else "step",
        y_label=f"held-out divergence, {summary.unit}",
        columns=["held-out images", "dense", "pruned", "healed"],
        rows=rows,
        text=said,
    )


def _losses(summary: HealSummary) -> str:
    """Of training: all terms together, so on another scale than the divergence. Layer-wise, each
    block has a loss of its own."""
    known = [p.loss for p in summary.curve if p.loss is not None]
    if not known or summary.method == "layer-wise":
        return ""
    return f" The training loss, all of its terms, went from {known[0]:.3g} to {known[-1]:.3g}."


def _learnt(summary: HealSummary) -> str:
    if summary.unit == "nats":
        return "predict as the dense network does"
    return "give the dense network's features"

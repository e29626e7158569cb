"""Heal: train a pruned network, shortly, to predict what its dense network predicts."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from npprune.data.unlabelled import Joined
from npprune.errors import DataError, ModelError, StoreError, UsageError
from npprune.models.info import state
from npprune.models.view import make_view
from npprune.pipeline.common.device import environment, resolve_device
from npprune.pipeline.common.events import Emit, Event, ignore
from npprune.pipeline.common.inputs import Images, Network, class_names, open_checkpoint
from npprune.pipeline.common.processes import Processes, processes
from npprune.pipeline.common.results import add_command, run_of
from npprune.pipeline.evaluate.stage import dense_reference, dense_section, open_dense
from npprune.pipeline.heal.distillation import Distillation
from npprune.pipeline.heal.image_cache import Memory, Pool
from npprune.pipeline.heal.images import open_training_images, read_training_images, split
from npprune.pipeline.heal.layerwise import reconstruct
from npprune.pipeline.heal.teacher import Held, Outcome, Teacher, feature_weight
from npprune.recipe import DataSection, HealSection
from npprune.records import (
    Analysis,
    CheckpointConfig,
    HealSummary,
    Result,
    Variant,
    digest,
    to_dict,
)
from npprune.report import text
from npprune.report.analyses import learning_curve
from npprune.store.checkpoints import is_checkpoint, read_config, write_checkpoint
from npprune.store.runs import RunFolder, read_plan
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
    device: str = "auto",
    seed: int = 0,
    emit: Emit = ignore,
    dry_run: bool = False,
    command: str = "",
) -> Variant:
    """Train the pruned network of `checkpoint` and write it as the checkpoint folder `out`.

    An interrupted training is kept in `<out>.partial`; the same call goes on from there.

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
    peers = processes()
    where, reason = resolve_device(peers.device(device))
    _check(settings, checkpoint, out, peers)
    student = open_checkpoint(checkpoint, where)
    config = student.config
    assert config is not None
    if config.prune is None:
        raise ModelError(
            f"`{checkpoint}` was not pruned: there is nothing to heal",
            hint="`npprune prune` writes a checkpoint that can be healed",
        )
    dense = open_dense(config, checkpoint, where, dense_checkpoint, emit, any_weights=any_teacher)
    teacher = _teacher(student, dense, settings, emit)
    if not settings.layerwise:
        weight = feature_weight(settings, make_view(student.model), teacher)
        settings = settings.model_copy(update={"feature_weight": weight})
    images, extra = open_training_images(config, dense.info, data, settings, emit)
    train, held_out = split(images)
    course = _augmentation(settings, len(train) if train is not None else 0, images)
    emit(Event(STAGE, f"{checkpoint.name} on {where} ({reason}), {_length(settings)}"))
    if settings.feature_weight:
        emit(Event(STAGE, f"every block's output is learnt, at weight {settings.feature_weight:g}"))
    emit(Event(STAGE, f"augmentation: {AUGMENTATIONS[course]}"))
    variant = _variant(config, student, images, out)
    if dry_run:
        return variant
    identity = _identity(settings, config, teacher, images, course, seed, peers)
    folder = TrainingFolder(out.resolve())
    with ExitStack() as stack:
        peers.on_first(lambda: stack.enter_context(folder.lock()) and None)
        pool, held = read_training_images(
            images, train, held_out, course, teacher, where, peers, seed
        )
        if settings.layerwise:
            if not isinstance(pool, Memory):
                raise DataError(
                    f"`--layerwise` holds its images in memory, and {pool.count} do not fit",
                    hint="`--images-per-class N` takes fewer",
                )
            outcome = reconstruct(
                student.model, teacher, pool, held, settings, folder=folder, identity=identity,
                device=where, seed=seed, emit=emit, started=started,
            )  # fmt: skip
        else:
            outcome = Distillation(
                student.model, teacher, pool, held, settings, mixing=course in MIXING,
                folder=folder, identity=identity, device=where, processes=peers, seed=seed,
                emit=emit, started=started,
            ).run()  # fmt: skip
        found = _Found(images, extra, pool, held, course, outcome, identity)
        summary = _summary(found, checkpoint, settings, teacher, student, peers, started, where)
        variant.heal = summary
        peers.on_first(
            lambda: _write(
                checkpoint, out, config, student, variant, found, command,
                None if any_teacher else dense_checkpoint, environment(where, reason, seed),
            )
        )  # fmt: skip
        peers.on_first(folder.remove)
    emit(Event(STAGE, f"wrote {out}"))
    return variant


def heal_pruned(
    checkpoint: Path,
    settings: HealSection,
    *,
    data: DataSection | None = None,
    device: str = "auto",
    seed: int = 0,
    emit: Emit = ignore,
    command: str = "",
) -> tuple[Path, Variant]:
    """Heal right after pruning: into `<checkpoint>_healed`, on the images of `data`, or else
    those that the checkpoint was calibrated on."""
    if data is None:
        details = read_config(checkpoint).details["data"]
        data = DataSection(**{**details, "train": details["calibration"]})
    out = healed_folder(checkpoint)
    return out, heal(
        checkpoint, data, settings, out, device=device, seed=seed, emit=emit, command=command
    )


def healed_folder(checkpoint: Path) -> Path:
    """Where the healed network goes that belongs to a pruned one."""
    return checkpoint.with_name(f"{checkpoint.name}_healed")


# ---------------------------------------------------------------- before


def _check(settings: HealSection, checkpoint: Path, out: Path, peers: Processes) -> None:
    if (settings.epochs is None) == (settings.minutes is None):
        both = settings.epochs is not None
        raise UsageError(
            "one of `--epochs` and `--minutes` says how long, got " + ("both" if both else "none"),
            hint="`--epochs 8` goes through the images eight times",
        )
    if out.resolve() == checkpoint.resolve():
        raise UsageError(
            f"`--out` must be another folder than the checkpoint that is healed, got `{out}`",
            hint=f"for example `--out {out}_healed`",
        )
    if out.is_dir() and any(out.iterdir()) and not is_checkpoint(out):
        raise StoreError(
            f"`--out` must be new, empty or a checkpoint that may be replaced, got `{out}`",
            hint="choose another --out",
        )
    if settings.batch_size % peers.count:
        raise UsageError(
            f"`--batch-size` must be a multiple of the {peers.count} processes that share it, "
            f"got {settings.batch_size}"
        )
    if not settings.layerwise:
        return
    if settings.epochs is None:
        raise UsageError("`--layerwise` goes by `--epochs`, got `--minutes`")
    if peers.count > 1:
        raise UsageError(f"`--layerwise` runs in one process, got {peers.count}")
    other = {
        "--label-weight": settings.label_weight,
        "--feature-weight": settings.feature_weight,
    }
    for flag, value in other.items():
        if value:
            raise UsageError(
                f"`{flag}` is for training the whole network, and `--layerwise` is given",
                hint="leave one of the two out",
            )
    if settings.augment not in ("auto", "none"):
        raise UsageError(
            f"`--layerwise` takes images as they are, got `--augment {settings.augment}`"
        )


def _teacher(student: Network, dense: Network, settings: HealSection, emit: Emit) -> Teacher:
    """The dense network as the student's teacher; ModelError where the two do not match."""
    config = student.config
    assert config is not None
    outputs, classes = config.details.get("outputs"), config.details.get("classes")
    offered = dense.info.num_classes
    wanted = config.num_classes if outputs is None else max(outputs) + 1
    if offered < wanted or (outputs is None and offered != wanted):
        raise ModelError(f"the teacher has {offered} outputs, and the student needs {wanted}")
    same = (dense.info.embed_dim, len(dense.info.widths)) == (
        student.info.embed_dim,
        len(student.info.widths),
    )
    if (settings.feature_weight or settings.layerwise) and not same:
        raise ModelError(
            f"blocks can only be matched with a teacher of the same {len(student.info.widths)} "
            f"blocks of width {student.info.embed_dim}, got {len(dense.info.widths)} of "
            f"{dense.info.embed_dim}",
            hint="leave `--feature-weight` and `--layerwise` out",
        )
    limit = outputs or classes
    if limit:
        emit(Event(STAGE, f"the dense network is limited to the student's {len(limit)} classes"))
    return Teacher(dense.model, columns=outputs, allowed=classes, precision=settings.precision)


def _augmentation(settings: HealSection, images: int, source: Images) -> str:
    if settings.layerwise:
        return "none"
    if settings.augment != "auto":
        if settings.augment == "strong" and source.source.items is None:
            raise UsageError("`--augment strong` reads images again and again, and a stream has "
                             "no positions", hint="use `--augment flips`")  # fmt: skip
        return settings.augment
    long = settings.epochs is not None and settings.epochs >= LONG_EPOCHS
    return "strong" if long and source.source.items is not None and images else "mixed"


def _length(settings: HealSection) -> str:
    how = "block by block" if settings.layerwise else f"distillation, lr {settings.lr:g}"
    if settings.epochs is not None:
        return f"{how}, {settings.epochs} epochs"
    return f"{how}, {settings.minutes:g} minutes"


def _identity(
    settings: HealSection,
    config: CheckpointConfig,
    teacher: Teacher,
    images: Images,
    course: str,
    seed: int,
    peers: Processes,
) -> dict[str, Any]:
    """All that decides the weights: a state of anything else is refused."""
    from npprune.models.info import weights_sha256

    items = images.source.items
    return {
        **settings.model_dump(),
        "augment": course,
        "seed": seed,
        "student": config.weights_sha256,
        "teacher": weights_sha256(teacher.model),
        "images": None if items is None else digest([[i.id, i.label] for i in items]),
        "spec": images.source.spec,
        "preprocessing": asdict(images.preprocessing),
        "processes": peers.count,
    }


# ---------------------------------------------------------------- after


@dataclass
class _Found:
    """What was read, and what training came to."""

    images: Images
    extra: Images | None
    pool: Pool
    held: Held
    course: str
    outcome: Outcome
    identity: dict[str, Any]


def _variant(config: CheckpointConfig, student: Network, images: Images, out: Path) -> Variant:
    assert config.prune is not None
    info = replace(student.info, preprocessing=images.preprocessing)
    return Variant(name=out.resolve().name, checkpoint="", model=info, prune=config.prune)


def _summary(
    found: _Found,
    checkpoint: Path,
    settings: HealSection,
    teacher: Teacher,
    student: Network,
    peers: Processes,
    started: float,
    device: torch.device,
) -> HealSummary:
    outcome, held = found.outcome, found.held
    labels = held.memory.labels
    known = labels >= 0
    top = teacher.expanded(held.chosen, student.info.num_classes).argmax(dim=1)
    dense_top1 = float((top == labels)[known].double().mean()) if bool(known.any()) else None
    extra = found.extra
    info = found.images.info()
    if isinstance(found.images.source, Joined):
        first = found.images.source.first
        assert first.items is not None
        ids = {i.id for i in first.items}
        info = first.info([name for name in info.skipped if name in ids])
    warnings = []
    if outcome.best.step == 0:
        warnings.append("healing did not lower the held-out divergence: the weights are as before")
    return HealSummary(
        source=checkpoint.resolve().name,
        method="layer-wise" if settings.layerwise else "distillation",
        teacher_sha256=found.identity["teacher"],
        settings=settings.model_dump(exclude_none=True),
        data=info,
        unlabelled=extra.source.info() if extra is not None else None,
        images=found.pool.count,
        held_out=held.memory.count,
        augmentation=found.course,
        steps=outcome.steps,
        epochs=outcome.epochs,
        processes=peers.count,
        before=outcome.history[0],
        after=outcome.best,
        dense_top1=dense_top1,
        stopped=outcome.stopped,
        seconds=time.perf_counter() - started,
        images_per_second=outcome.images_per_second,
        curve=outcome.history,
        warnings=warnings,
    )


def _write(
    checkpoint: Path,
    out: Path,
    config: CheckpointConfig,
    student: Network,
    variant: Variant,
    found: _Found,
    command: str,
    dense_checkpoint: str | None,
    about: Any,
) -> None:
    """The checkpoint, and what the run's result says of it."""
    from npprune.models.info import weights_sha256

    variant.model.source = replace(variant.model.source, sha256=weights_sha256(student.model))
    run = run_of(checkpoint, config)
    home = run or RunFolder(out)
    assert variant.heal is not None
    healed = replace(
        config,
        preprocessing=found.images.preprocessing,
        run=os.path.relpath(home.path, out),
        details={
            **config.details,
            "dense": _dense_details(config, checkpoint, out, dense_checkpoint),
            "healing": {k: v for k, v in to_dict(variant.heal).items() if k != "curve"},
        },
        versions=about.versions,
    )
    plan = read_plan(checkpoint) if (checkpoint / "plan.json").is_file() else None
    write_checkpoint(out, healed, state(student.model), plan)
    if run is not None:
        result = run.read_result()
    else:
        result = Result(
            name=variant.name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=about,
            model=variant.model,
            classes=class_names(found.images, student.info.num_classes),
        )
    variant.checkpoint = os.path.relpath(out, home.path)
    result.variants = [v for v in result.variants if v.name != variant.name] + [variant]
    result.analyses[f"heal {variant.name}"] = _analysis(variant.name, variant.heal)
    add_command(result, command)
    home.write_result(result)


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
        ["divergence from dense, nats", 0.0, before.divergence_nats, after.divergence_nats],
        ["same top-1 as dense, %", 100.0, 100 * before.agreement, 100 * after.agreement],
    ]
    if summary.dense_top1 is not None and before.top1 is not None and after.top1 is not None:
        rows.append(["top-1, %", 100 * summary.dense_top1, 100 * before.top1, 100 * after.top1])
    minutes, seconds = divmod(round(summary.seconds), 60)
    spent = f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
    said = (
        f"{summary.source} was trained to predict as the dense network does ({summary.method}): "
        f"{text.plural(summary.images, 'image')}, {summary.epochs:.3g} "
        f"epoch{'s' * (summary.epochs != 1)}, {text.plural(summary.steps, 'step')}, {spent}, "
        f"{summary.images_per_second:.3g} images a second; augmentation: "
        f"{AUGMENTATIONS[summary.augmentation]}. Measured on {summary.held_out} images that were "
        f"not trained on; the weights of step {after.step} are kept. Ended by {summary.stopped}."
    )
    return learning_curve(
        f"Healing of {name}",
        [p.step for p in summary.curve],
        {
            "held-out divergence": [p.divergence_nats for p in summary.curve],
            "training loss": [p.loss for p in summary.curve],
        },
        x_label="block" if summary.method == "layer-wise" else "step",
        y_label="nats" if summary.method != "layer-wise" else "nats; relative error of a block",
        columns=["held-out images", "dense", "pruned", "healed"],
        rows=rows,
        text=said,
    )

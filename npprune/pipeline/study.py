"""Study: criteria x selection x compensation x budgets x seeds, on one network and one data set.

Every row is pruned from the same calibration images and measured on the same evaluation images,
which are decoded once, as `npprune prune` and `npprune eval` would. A finished row is a file of
its own, written at once; running again computes only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npprune.core import metrics
from npprune.core.view import VitView
from npprune.data.labels import RANKED, KnownNames
from npprune.errors import DataError, GateError, StoreError, UsageError
from npprune.models.info import count_macs, model_sizes
from npprune.models.surgery import check_prunable, cut_head
from npprune.models.view import make_view
from npprune.pipeline.device import environment, resolve_device
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.inputs import (
    Images,
    Network,
    class_names,
    label_doubt,
    network_names,
    open_images,
    open_network,
    run_names,
)
from npprune.pipeline.latency import DenseTimer
from npprune.pipeline.planning import Batches, Paths, Planner, needs_of
from npprune.pipeline.prepare import CALIBRATION_IMAGES, calibration_images, origin, read_paths
from npprune.pipeline.prune import carried_out
from npprune.pipeline.results import add_command, render_report
from npprune.pipeline.statistics import Shelf, identity, statistics_home
from npprune.pipeline.study_healing import Healer
from npprune.pipeline.study_rows import (
    Setting,
    StudyDense,
    StudyRow,
    bits,
    dense_path,
    grouped,
    read_dense,
    read_rows,
    row_path,
    settings_of,
)
from npprune.pipeline.study_tables import analyses
from npprune.recipe import DataSection, ModelSection, PruneSection, StudySection
from npprune.records import Manifest, Plan, Result, digest, to_dict
from npprune.store import atomic
from npprune.store.runs import RunFolder, settings_changes

STAGE = "study"
MEMORY_SHARE = 0.7  # of the free memory that decoded images may take


def study(
    source: Path | ModelSection,
    data: DataSection,
    settings: StudySection,
    out: Path,
    *,
    device: str = "auto",
    emit: Emit = ignore,
    dry_run: bool = False,
    command: str = "",
) -> Result:
    """Compare ways to prune, row by row, in the folder `out`.

    Args:
        source: a run folder with paths, or a network; only the first has path criteria.
        data: `calibration` (else `train`) and `val`; `classes` limits both, and the accuracy is
            then the one among these classes.
        dry_run: open everything, list the rows, compute and write nothing.

    Rows of other lists may be added to a folder later; other images, another network or other
    settings that all rows share are refused.

    Raises:
        NpPruneError: what is wrong with source, data, settings or folder.
    """
    where, reason = resolve_device(device)
    model, data, run = origin(source, data)
    rows = settings_of(settings, run is not None)
    network = open_network(model, where, emit, STAGE)
    check_prunable(network.model)
    view = make_view(network.model)
    if settings.topk is not None and settings.topk > min(view.widths):
        raise UsageError(
            f"`--topk` must be at most {min(view.widths)}, the hidden units of the narrowest "
            f"block, got {settings.topk}"
        )
    names = network_names(network, run_names(run.read_result()) if run is not None else None)
    calibration = open_images(
        data.calibration or data.train, data, network.info, flag="--calibration",
        on_bad="skip", stage=STAGE, emit=emit, names=names,
    )  # fmt: skip
    if names is None and calibration.source.label_rule == RANKED:
        names = KnownNames(calibration.source.classes, ranked=True)
    val = open_images(
        data.val, data, network.info, flag="--val", on_bad="error", stage=STAGE, emit=emit,
        names=names,
    )  # fmt: skip
    classes = calibration.source.selected if data.classes is not None else None
    if classes is not None:  # as `prune` does: planned on the head that the network will have
        view = make_view(cut_head(network.model, classes))
    paths = read_paths(run, network, classes, view, settings.topk)
    emit(Event(STAGE, f"{network.info.source.architecture} on {where} ({reason})"))
    manifest = _manifest(out.name, network, calibration, val, settings, classes, run, where, reason)
    world = _World(network, view, calibration, val, paths, settings, classes, where, emit)
    folder = RunFolder(out)
    world.shelf = Shelf(statistics_home(run or folder, out), identity(network, classes))

    def result() -> Result:
        earlier = folder.read_result().commands if folder.result_path.is_file() else []
        return _result(
            manifest, world, read_dense(folder), read_rows(folder), rows, [*earlier, command]
        )

    if dry_run:
        _refuse_other_settings(folder, manifest)
        return result()
    with folder.lock():
        folder.create_or_resume(manifest)
        manifest = folder.read_manifest()
        with ExitStack() as held:
            _compute(world, folder, rows, held, lambda: folder.write_result(result()))
        found = result()
        folder.write_result(found)
        render_report(out)
    return found


# ---------------------------------------------------------------- the work


@dataclass
class _World:
    """What all rows share. Images are decoded when the first row needs them."""

    network: Network
    view: VitView
    calibration: Images
    val: Images
    paths: Paths | None
    settings: StudySection
    classes: list[int] | None
    device: torch.device
    emit: Emit
    shelf: Shelf = field(default_factory=Shelf)
    fit: Batches = field(default_factory=list)
    held: Batches = field(default_factory=list)  # calibration images that no row is fitted on
    images: list[Tensor] = field(default_factory=list)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    dense: Tensor | None = None  # logits [n, c]

    def load(self) -> None:
        """Decode both sets, and predict with the dense network."""
        limit = self.settings.calibration_images or CALIBRATION_IMAGES
        self._refuse_too_many(limit)
        parts = calibration_images(self.calibration, limit, self.emit)
        self.fit, self.held = (list(part) for part in parts)
        labels, total = [], self.val.source.length
        for batch in self.val.batches():
            self.images.append(batch.images)
            labels.append(batch.labels)
            done = sum(len(y) for y in labels)
            self.emit(Event("decoding", level="progress", done=done, total=total))
        if not labels:
            raise DataError(f"no image of `{self.val.source.spec}` could be read")
        self.labels = torch.cat(labels)
        self.dense = self.predict(self.network.model)

    @torch.no_grad()
    def predict(self, model: torch.nn.Module) -> Tensor:
        """Logits [n, c] of the evaluation images, on the CPU."""
        return torch.cat([model(x.to(self.device)).float().cpu() for x in self.images])

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels among the chosen classes: [n, c'], [n]."""
        if self.classes is None:
            return logits, self.labels
        index = torch.tensor(self.classes)
        return logits[:, index], torch.searchsorted(index, self.labels)

    def _refuse_too_many(self, limit: int) -> None:
        import psutil

        counts = [self.calibration.source.length, self.val.source.length]
        total = min(counts[0] or limit, limit) + (counts[1] or 0)
        channels, height, width = self.val.preprocessing.input_size
        needed, free = total * channels * height * width * 4, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            raise UsageError(
                f"a study holds its images decoded: {total} need {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB of memory are free",
                hint="take fewer with `--images-per-class` or `--calibration-images`",
            )


def _compute(
    world: _World,
    folder: RunFolder,
    rows: Sequence[Setting],
    held: ExitStack,
    on_row: Callable[[], None],
) -> None:
    """Every row that is not there yet, each written as soon as it is done."""
    emit = world.emit
    finished = {row.setting for row in read_rows(folder)}
    missing = [row for row in grouped(rows) if row not in finished]
    done = len(rows) - len(missing)
    if done:
        emit(Event(STAGE, f"{done} of {len(rows)} rows were there already"))
    if not missing:
        return
    world.load()
    dense = _dense_row(world)
    if dense.label_doubt:
        emit(Event(STAGE, dense.label_doubt, level="warning"))
    atomic.write_json(dense_path(folder), dense)
    timer, healer = _timer(world, held), _healer(world)
    last: tuple[Setting, Planner] | None = None
    for row in missing:
        emit(Event(STAGE, level="progress", done=done, total=len(rows), unit="rows"))
        planner = _planner(world, row, last)
        last = row, planner
        made = _row(world, row, planner, timer, healer, row_path(folder, row))
        atomic.write_json(row_path(folder, row), made)
        on_row()
        done += 1
        top1 = f"top-1 {made.top1.value:.1%}" if made.top1 is not None else made.refused
        if made.healed is not None:
            top1 += f", healed {made.healed.value:.1%}"
        emit(Event(STAGE, f"{row.name}: {top1} ({made.seconds:.1f} s)"))
    emit(Event(STAGE, level="progress", done=done, total=len(rows), unit="rows"))


def _planner(world: _World, row: Setting, last: tuple[Setting, Planner] | None) -> Planner:
    """Statistics and scores of a row; from the last row's planner what it shares with this one.

    Its seconds are those of a run of its own, whatever was shared.
    """
    settings, like = _prune_settings(world.settings, row), None
    if last is not None:
        before, planner = last
        if before.scores == row.scores:
            return planner.retuned(settings)
        if before.seed == row.seed or needs_of(row.criterion) == {"moments"}:
            like = planner
    return Planner(
        world.view, world.fit, world.paths, settings, lambda: model_sizes(world.network.model),
        torch.Generator().manual_seed(row.seed), world.emit, held_out=world.held, like=like,
        shelf=world.shelf,
    )  # fmt: skip


def _prune_settings(study: StudySection, row: Setting) -> PruneSection:
    return PruneSection(
        keep=row.keep,
        topk=study.topk,
        criterion=row.criterion,
        selection=row.selection,
        compensation=row.compensation,  # type: ignore[arg-type]
        protect_paths=row.protect,
        round_to=study.round_to,
        min_keep=study.min_keep,
        calibration_images=study.calibration_images,
    )


def _row(
    world: _World,
    row: Setting,
    planner: Planner,
    timer: DenseTimer | None,
    healer: Healer | None,
    path: Path,
) -> StudyRow:
    """Prune as the row says, and measure; then heal, and measure again."""
    budget = planner.budget()
    assert budget is not None
    try:
        chosen = planner.at(budget)
    except GateError as err:
        return StudyRow(setting=row, refused=err.message, seconds=sum(planner.seconds.values()))
    start = time.perf_counter()
    plan = Plan(keep=chosen.keep, widths=world.network.info.widths, classes=world.classes)
    smaller = carried_out(world.network, plan, chosen)
    parts = {**planner.seconds, "surgery": round(time.perf_counter() - start, 3)}
    assert world.dense is not None
    after = world.predict(smaller)
    before, labels = world.scored(world.dense)
    accuracy = metrics.accuracy(after, labels)
    made = StudyRow(
        setting=row,
        top1=accuracy.top1,
        top5=accuracy.top5,
        change=metrics.top1_change(before, after, labels),
        divergence=metrics.mean_interval(metrics.divergence(before, after)),
        agreement=metrics.agreement(before, after),
        correct=bits(after.argmax(1) == labels),
        params=sum(p.numel() for p in smaller.parameters()),
        macs=count_macs(smaller, world.val.preprocessing.input_size),
        widths=plan.kept_widths,
        protected=chosen.protected,
        seconds=sum(parts.values()),
        parts=parts,
        latency=timer.beside(smaller) if timer is not None else None,
        warnings=chosen.warnings,
    )
    if healer is not None:
        made.healing_seconds = healer.heal(smaller, path.with_suffix(""), row.seed)
        healed = world.predict(smaller)
        made.healed = metrics.accuracy(healed, labels).top1
        made.healed_correct = bits(healed.argmax(1) == labels)
        made.healed_divergence = metrics.mean_interval(metrics.divergence(before, healed))
    return made


def _dense_row(world: _World) -> StudyDense:
    assert world.dense is not None
    logits, labels = world.scored(world.dense)
    found = metrics.accuracy(logits, labels)
    return StudyDense(
        top1=found.top1,
        top1_all=metrics.accuracy(world.dense, world.labels).top1,
        correct=bits(logits.argmax(1) == labels),
        params=world.network.info.params,
        macs=world.network.info.macs,
        calibration=sum(len(y) for _, y in world.fit),
        label_doubt=label_doubt(
            world.dense.argmax(1), world.labels, world.dense.shape[1], world.val.source
        ),
    )


def _healer(world: _World) -> Healer | None:
    if world.settings.heal is None:
        return None
    return Healer(
        world.network.model, world.fit, world.held, world.calibration.preprocessing,
        world.settings.heal, classes=world.classes, spec=world.calibration.source.spec,
        device=world.device, emit=world.emit,
    )  # fmt: skip


def _timer(world: _World, held: ExitStack) -> DenseTimer | None:
    if not world.settings.latency:
        return None
    return held.enter_context(
        DenseTimer(
            world.network.model, world.val.preprocessing,
            batch=world.settings.latency_batch, threads=world.settings.latency_threads,
        )
    )  # fmt: skip


# ---------------------------------------------------------------- the folder


def _refuse_other_settings(folder: RunFolder, manifest: Manifest) -> None:
    """What a real start would refuse."""
    folder.refuse_foreign()
    if not folder.exists:
        return
    changes = settings_changes(folder.read_manifest().settings, manifest.settings)
    if changes:
        raise StoreError(
            f"`{folder.path}` belongs to a run of other settings: {'; '.join(changes[:3])}",
            hint="choose another --out, or repeat the settings of the first run",
        )


def _manifest(
    name: str,
    network: Network,
    calibration: Images,
    val: Images,
    settings: StudySection,
    classes: list[int] | None,
    run: RunFolder | None,
    where: torch.device,
    reason: str,
) -> Manifest:
    """The manifest; its settings are what all rows share, and so must never change."""
    shared: dict[str, Any] = settings.model_dump(include={"topk", "round_to", "min_keep"})
    shared |= {
        "what": STAGE,
        "model": network.info.source.sha256,
        "calibration": _identity(calibration),
        "calibration_images": settings.calibration_images or CALIBRATION_IMAGES,
        "val": _identity(val),
        "preprocessing": to_dict(val.preprocessing),
        "classes": classes,
        "paths": run.read_manifest().settings_sha256 if run is not None else None,
        "device": where.type,
        "latency": None,
    }
    if settings.heal is not None:
        shared["heal"] = settings.heal
    if settings.latency:
        threads = settings.latency_threads or torch.get_num_threads()
        shared["latency"] = {"batch": settings.latency_batch, "threads": threads}
    return Manifest(
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(where, reason, settings.seeds[0]),
        model=network.info,
        data=val.source.info(),
        settings=shared,
        settings_sha256=digest(shared),
    )


def _identity(images: Images) -> dict[str, Any]:
    """Which images these are: by their ids and labels, or by name where they are a stream."""
    fields = {"class_map", "images_per_class"}
    named = images.section.model_dump(include=fields) if not images.source.info().sha256 else {}
    skipping = {"on_bad_image": images.on_bad}
    return {"sha256": images.source.info().sha256 or images.source.spec, **named, **skipping}


def _result(
    manifest: Manifest,
    world: _World,
    dense: StudyDense | None,
    found: Sequence[StudyRow],
    asked: Sequence[Setting],
    commands: Sequence[str],
) -> Result:
    """The result of all rows in the folder, those asked for now first."""
    order = {row: i for i, row in enumerate(asked)}
    ordered = sorted(found, key=lambda row: order.get(row.setting, len(order)))
    result = Result(
        name=manifest.name,
        created=manifest.created,
        environment=manifest.environment,
        model=world.network.info,
        classes=class_names(world.val, world.network.info.num_classes),
        analyses=analyses(
            ordered, [row for row in asked if row not in {r.setting for r in found}], dense,
            calibration=world.calibration.source.spec, val=world.val.source.spec,
            classes=world.classes, paths=world.paths is not None,
        ),
    )  # fmt: skip
    for command in commands:
        add_command(result, command)
    return result

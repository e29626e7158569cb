"""Study: criteria x selection x compensation x budgets x seeds, on one network and one data set.

Every row is pruned from the same calibration images and measured on the same evaluation images,
which are decoded once, as `npprune prune` and `npprune eval` would. A finished row is a file of
its own, written at once; running again computes only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune import words
from npprune.budget import Budget
from npprune.core import metrics
from npprune.data.content import fingerprint
from npprune.data.labels import RANKED, KnownNames
from npprune.errors import DataError, GateError, UsageError, plural, setting
from npprune.files import keeping
from npprune.models.info import count_macs, model_sizes
from npprune.models.surgery import check_axes
from npprune.pipeline.common.inputs import (
    Images,
    class_names,
    label_doubt,
    open_images,
    require_classifier,
)
from npprune.pipeline.common.outputs import check_run, reads_of, recordable
from npprune.pipeline.common.results import add_command, render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.axes import axes_for
from npprune.pipeline.prune.latency import DenseTimer
from npprune.pipeline.prune.measuring import (
    Measured,
    Paths,
    PlanSettings,
    Subject,
    measure,
    needs_of,
    prepared,
)
from npprune.pipeline.prune.opening import (
    CALIBRATION_IMAGES,
    DecodedImages,
    Opened,
    calibration_images,
    open_source,
    origin,
    read_paths,
)
from npprune.pipeline.prune.planning import amount, choose, refit
from npprune.pipeline.prune.stage import carried_out
from npprune.pipeline.prune.statistics_cache import StatisticsCache, identity, statistics_home
from npprune.pipeline.study.healing import Healer
from npprune.pipeline.study.rows import (
    Setting,
    StudyDense,
    StudyRow,
    bits,
    dense_path,
    grouped,
    read_dense,
    read_rows,
    row_path,
    set_damaged_aside,
    settings_of,
)
from npprune.pipeline.study.tables import analyses
from npprune.recipe import DataSection, ModelSection, PruneSection, StudySection
from npprune.records import Manifest, Plan, Result, digest, to_dict
from npprune.store import atomic
from npprune.store.runs import RunFolder, images_in_words

STAGE = "study"
MEMORY_SHARE = 0.7  # of the free memory that decoded images may take


def study(
    source: Path | ModelSection,
    data: DataSection,
    settings: StudySection,
    out: Path,
    *,
    work: Work = Work(),
    dry_run: bool = False,
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
    work = work.on(STAGE)
    work.seed = settings.seeds[0]
    if work.team.count > 1:
        error = UsageError(
            f"a study runs in one process, and here are {work.team.count}",
            hint="start it without `torchrun`",
        )
        raise work.team.first_says(error)
    _ = work.where  # a missing device is refused before all else
    check_run(out, reads_of(source), write=not dry_run)
    model, data, run = origin(source, data)
    rows = settings_of(settings, run is not None)
    opened = open_source(model, data, run, work, topk=settings.topk)
    require_classifier(opened.network, "a study compares ways to prune by")
    rows = available(rows, opened.view.model)
    val = _evaluation_images(opened, data, work)
    paths = read_paths(opened, settings.topk)
    network = opened.network
    work.say(f"{network.info.source.architecture} on {work.where} ({work.reason})")
    manifest = _manifest(out.name, opened, val, settings, work)
    folder = RunFolder(out)
    cache = StatisticsCache(
        statistics_home(run or folder, out), identity(network, opened.outputs),
        write=run is None or recordable(run, work),
    )  # fmt: skip
    world = _World(opened, val, paths, settings, cache, work)

    def store() -> Result:
        found = _result(manifest, world, folder, rows)
        with keeping(found), folder.updating(lambda: found, work.warn) as earlier:
            found.commands = earlier.commands
            vars(earlier).update(vars(found))
            add_command(earlier, work.command)
        return found

    if dry_run:
        if folder.exists:  # what a real start would refuse
            folder.refuse_other_settings(manifest)
        return _result(manifest, world, folder, rows)
    with folder.lock():
        folder.create_or_resume(manifest, warn=work.warn)
        manifest = folder.read_manifest()
        set_damaged_aside(folder, work.warn)
        with ExitStack() as held:
            _compute(world, folder, rows, held, store, manifest.settings_sha256)
        found = store()
        with keeping(found):
            render_report(out)
    return found


def available(rows: Sequence[Setting], model: nn.Module) -> list[Setting]:
    """The rows, `all` axes being those that the network has.

    Raises:
        ModelError: an axis is named that it has not.
    """
    every = "+".join(words.ALL_AXES)
    there = "+".join(axes_for(PruneSection(target_macs=0.5), model))
    for row in rows:
        if row.axes != every:
            check_axes(model, row.axes.split("+"))
    return list(dict.fromkeys(replace(r, axes=there) if r.axes == every else r for r in rows))


def _evaluation_images(opened: Opened, data: DataSection, work: Work) -> Images:
    """What all rows are measured on, its classes named as the calibration images' are."""
    names, source = opened.names, opened.images.source
    if names is None and source.label_rule == RANKED:
        names = KnownNames(source.classes, ranked=True)
    return open_images(
        data.val, data, opened.network.info, work, asked="data.val", on_bad="error", names=names,
    )  # fmt: skip


# ---------------------------------------------------------------- the work


@dataclass
class _World:
    """What all rows share. Images are decoded when the first row needs them."""

    opened: Opened
    val: Images
    paths: Paths | None
    settings: StudySection
    cache: StatisticsCache
    work: Work
    fit: DecodedImages = field(default_factory=lambda: DecodedImages([], []))
    held: DecodedImages = field(default_factory=lambda: DecodedImages([], []))  # no row's
    seen: DecodedImages = field(default_factory=lambda: DecodedImages([], []))  # evaluation
    dense: Tensor | None = None  # logits [n, c]

    @property
    def labels(self) -> Tensor:
        """Of the evaluation images, [n]."""
        return torch.cat(self.seen.labels)

    def load(self) -> None:
        """Decode both sets, and predict with the dense network."""
        limit = self.settings.calibration_images or CALIBRATION_IMAGES
        self._refuse_too_many(limit)
        self.fit, self.held = calibration_images(self.opened.images, limit, self.work)
        for batch in self.val.batches():
            self.seen.images.append(batch.images)
            self.seen.labels.append(batch.labels)
            self.work.progress(len(self.seen), self.val.source.length, stage="decoding")
        if not len(self.seen):
            raise DataError(f"no image of `{self.val.source.spec}` could be read")
        self.dense = self.predict(self.opened.network.model)

    def subject(self) -> Subject:
        """What every row is planned for."""
        model = self.opened.network.model
        return Subject(
            self.opened.view, self.fit.images, lambda: model_sizes(model), self.held.images,
            self.paths, self.opened.network.info.last_for_read,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, model: torch.nn.Module) -> Tensor:
        """Logits [n, c] of the evaluation images, on the CPU."""
        return torch.cat([model(x.to(self.work.where)).float().cpu() for x in self.seen.images])

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels among the chosen classes: [n, c'], [n]."""
        if self.opened.classes is None:
            return logits, self.labels
        index = torch.tensor(self.opened.classes)
        return logits[:, index], torch.searchsorted(index, self.labels)

    def _refuse_too_many(self, limit: int) -> None:
        import psutil

        counts = [self.opened.images.source.length, self.val.source.length]
        total = min(counts[0] or limit, limit) + (counts[1] or 0)
        channels, height, width = self.val.preprocessing.input_size
        needed, free = total * channels * height * width * 4, psutil.virtual_memory().available
        if needed > MEMORY_SHARE * free:
            raise UsageError(
                f"a study holds its images decoded: {total} need {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB of memory are free",
                hint=f"take fewer with {setting('data.images_per_class')} or "
                f"{setting('study.calibration_images')}",
            )


def _compute(
    world: _World,
    folder: RunFolder,
    rows: Sequence[Setting],
    held: ExitStack,
    on_row: Callable[[], object],
    shared: str,
) -> None:
    """Every row that is not there yet, each written as soon as it is done.

    shared: the sha256 of the settings that all rows have in common.
    """
    work = world.work
    finished = {row.setting for row in read_rows(folder)}
    missing = [row for row in grouped(rows) if row not in finished]
    done = len(rows) - len(missing)
    if done:
        work.say(f"{done} of {plural(len(rows), 'row')} found, computed before")
    if not missing and read_dense(folder) is not None:
        return
    world.load()
    dense = _dense_row(world)
    if dense.label_doubt:
        work.warn(dense.label_doubt)
    atomic.write_json(dense_path(folder), dense)
    maker = _Maker(world, _timer(world, held), _healer(world))
    for row in missing:
        work.progress(done, len(rows), "rows")
        made = maker.row(row, row_path(folder, row))
        made.settings_sha256 = shared
        atomic.write_json(row_path(folder, row), made)
        on_row()
        done += 1
        top1 = f"top-1 {made.top1.value:.1%}" if made.top1 is not None else made.refused
        if made.healed is not None:
            top1 += f", healed {made.healed.value:.1%}"
        work.say(f"{row.name}: {top1} ({made.seconds:.1f} s)")
    work.progress(done, len(rows), "rows")


@dataclass
class _Maker:
    """Makes one row after the other; what neighbours share is measured once."""

    world: _World
    timer: DenseTimer | None
    healer: Healer | None
    last: tuple[Setting, Measured] | None = None

    def measured(self, row: Setting, settings: PlanSettings, work: Work) -> Measured:
        """What calibration says for a row. Its seconds are those of a run of its own."""
        like = None
        if self.last is not None:
            before, found = self.last
            if before.scores == row.scores:
                return prepared(found, settings, work)
            if before.seed == row.seed or needs_of(row.criterion) == {"moments"}:
                like = found.collected
        found = measure(self.world.subject(), settings, work, cache=self.world.cache, like=like)
        return prepared(found, settings, work)

    def row(self, row: Setting, path: Path) -> StudyRow:
        """Prune as the row says, and measure; then heal, and measure again."""
        world, network = self.world, self.world.opened.network
        work = world.work.on(STAGE)
        work.seed = row.seed
        settings = _plan_settings(world.settings, row)
        measured = self.measured(row, settings, work)
        self.last = row, measured
        budget = amount(measured, settings)
        assert budget is not None
        try:
            chosen = refit(measured, settings, choose(measured, settings, budget), work)
        except GateError as err:
            spent = sum(measured.spent(settings).values())
            return StudyRow(setting=row, refused=err.message, seconds=spent)
        start = time.perf_counter()
        plan = Plan(
            chosen.keep, network.info.widths, classes=world.opened.classes, **chosen.fields()
        )
        smaller = carried_out(network, plan, chosen)
        surgery = round(time.perf_counter() - start, 3)
        made = _measured_row(world, row, smaller)
        made.widths, made.protected = plan.kept_widths, chosen.protected
        made.parts = {**chosen.details["seconds"], "surgery": surgery}
        made.seconds, made.warnings = sum(made.parts.values()), chosen.warnings
        if self.timer is not None:
            made.latency = self.timer.against(smaller)
        if self.healer is not None:
            made.healing_seconds = self.healer.heal(smaller, path.with_suffix(""), row.seed)
            _measure_healed(world, made, smaller)
        return made


def _plan_settings(study: StudySection, row: Setting) -> PlanSettings:
    return PlanSettings(
        Budget(row.unit, row.keep),
        tuple(row.axes.split("+")),  # type: ignore[arg-type]
        criterion=row.criterion,
        selection=row.selection,  # type: ignore[arg-type]
        compensation=row.compensation,  # type: ignore[arg-type]
        paths="protect" if row.protect else "off",
        round_to=study.round_to,
        min_keep=study.min_keep,
    )


def _measured_row(world: _World, row: Setting, smaller: torch.nn.Module) -> StudyRow:
    """What the evaluation images say of a pruned network."""
    assert world.dense is not None
    after = world.predict(smaller)
    before, labels = world.scored(world.dense)
    accuracy = metrics.accuracy(after, labels)
    return StudyRow(
        setting=row,
        top1=accuracy.top1,
        top5=accuracy.top5,
        change=metrics.top1_change(before, after, labels),
        divergence=metrics.mean_interval(metrics.divergence(before, after)),
        agreement=metrics.agreement(before, after),
        correct=bits(after.argmax(1) == labels),
        params=sum(p.numel() for p in smaller.parameters()),
        macs=count_macs(smaller, world.val.preprocessing.input_size),
    )


def _measure_healed(world: _World, made: StudyRow, healed: torch.nn.Module) -> None:
    """The same of the healed network, into its row."""
    assert world.dense is not None
    before, labels = world.scored(world.dense)
    after = world.predict(healed)
    made.healed = metrics.accuracy(after, labels).top1
    made.healed_correct = bits(after.argmax(1) == labels)
    made.healed_divergence = metrics.mean_interval(metrics.divergence(before, after))


def _dense_row(world: _World) -> StudyDense:
    assert world.dense is not None
    logits, labels = world.scored(world.dense)
    found = metrics.accuracy(logits, labels)
    return StudyDense(
        top1=found.top1,
        top1_all=metrics.accuracy(world.dense, world.labels).top1,
        correct=bits(logits.argmax(1) == labels),
        params=world.opened.network.info.params,
        macs=world.opened.network.info.macs,
        calibration=len(world.fit),
        label_doubt=label_doubt(
            world.dense.argmax(1), world.labels, world.dense.shape[1], world.val.source
        ),
    )


def _healer(world: _World) -> Healer | None:
    if world.settings.heal is None:
        return None
    return Healer(world.opened, world.fit, world.held, world.settings.heal, world.work)


def _timer(world: _World, held: ExitStack) -> DenseTimer | None:
    if not world.settings.latency:
        return None
    return held.enter_context(
        DenseTimer(
            world.opened.network.model, world.val.preprocessing,
            batch=world.settings.latency_batch, threads=world.settings.latency_threads,
        )
    )  # fmt: skip


# ---------------------------------------------------------------- the folder


def _manifest(
    name: str, opened: Opened, val: Images, settings: StudySection, work: Work
) -> Manifest:
    """The manifest; its settings are what all rows share, and so must never change."""
    run, info = opened.run, opened.network.info
    shared: dict[str, Any] = settings.model_dump(include={"topk", "round_to", "min_keep"})
    shared |= {
        "what": STAGE,
        "model": info.source.sha256,
        "calibration": _identity(opened.images),
        "calibration_images": settings.calibration_images or CALIBRATION_IMAGES,
        "val": _identity(val),
        "preprocessing": to_dict(val.preprocessing),
        "classes": opened.classes,
        "paths": run.read_manifest().settings_sha256 if run is not None else None,
        "device": work.where.type,
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
        environment=work.environment(),
        model=info,
        data=val.source.info(),
        settings=shared,
        settings_sha256=digest(shared),
        said={
            "calibration.sha256": images_in_words(opened.images.source.info()),
            "paths": "no run" if run is None else f"run {run.path}",
        },
        content={
            "calibration": fingerprint(opened.images.source),
            "val": fingerprint(val.source),
        },
        command=work.command,
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
    folder: RunFolder,
    asked: Sequence[Setting],
) -> Result:
    """The result of all rows in the folder, those asked for now first."""
    found, dense, opened = read_rows(folder), read_dense(folder), world.opened
    order = {row: i for i, row in enumerate(asked)}
    ordered = sorted(found, key=lambda row: order.get(row.setting, len(order)))
    result = Result(
        name=manifest.name,
        created=manifest.created,
        environment=manifest.environment,
        model=opened.network.info,
        classes=class_names(world.val, opened.network.info.num_classes),
        analyses=analyses(
            ordered, [row for row in asked if row not in {r.setting for r in found}], dense,
            calibration=opened.images.source.spec, val=world.val.source.spec,
            classes=opened.classes, paths=world.paths is not None,
        ),
    )  # fmt: skip
    return result

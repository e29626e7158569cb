"""Prune: choose what stays, remove the rest, adjust what remains, and say what it will cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core import metrics
from npprune.core.compression.harm import Replacement
from npprune.errors import GateError, UsageError, setting
from npprune.files import keeping
from npprune.models.info import model_info, model_sizes, state
from npprune.models.surgery import apply_plan, set_classifiers, set_fc2, set_own_fc2, set_proj
from npprune.models.view import make_view, outputs_of
from npprune.pipeline.common.inputs import Images, Network, class_names, is_cut, label_doubt
from npprune.pipeline.common.outputs import check_checkpoint, reads_of, recordable
from npprune.pipeline.common.results import add_command
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import dense_reference
from npprune.pipeline.prune.axes import axes_for
from npprune.pipeline.prune.latency import LatencyGoal, LatencySearch, LatencyTarget
from npprune.pipeline.prune.measuring import (
    Measured,
    PlanSettings,
    Subject,
    check_budget,
    check_criterion,
    measure,
    prepared,
)
from npprune.pipeline.prune.opening import (
    HELD_OUT,
    DecodedImages,
    Opened,
    calibration_images,
    open_source,
    origin,
    read_paths,
)
from npprune.pipeline.prune.planning import (
    Choice,
    Chosen,
    amount,
    bounds,
    choose,
    refit,
    skeleton,
)
from npprune.pipeline.prune.statistics_cache import StatisticsCache, identity, statistics_home
from npprune.recipe import DataSection, ModelSection, PruneSection, check
from npprune.records import (
    CheckpointConfig,
    ClassInfo,
    Plan,
    PruneSummary,
    Result,
    Variant,
    digest,
)
from npprune.store.checkpoints import write_checkpoint
from npprune.store.runs import RunFolder

STAGE = "prune"
SEARCH_STEPS = 64
DOUBT_IMAGES = 64  # of those to fit on: enough to see labels that are not the network's


def prune(
    source: Path | ModelSection,
    data: DataSection,
    settings: PruneSection,
    out: Path,
    *,
    work: Work = Work(),
    dry_run: bool = False,
    network: ModelSection | None = None,
    keep: bool = True,
) -> Variant:
    """Make a smaller network and write it as the checkpoint folder `out`.

    Under torchrun the processes share the calibration images and the options whose harm is
    measured; the first one decides and writes.

    Args:
        source: a run folder with paths, or a network: then the criterion alone decides.
        data: `calibration` (else `train`) names the images for statistics; `classes` limits
            paths and statistics to those classes.
        network: where the network of the run is now; None: where the run says.
        keep: whether the run's result says of it, and the images' statistics are kept for other
            budgets.

    Raises:
        GateError: the predicted drop exceeds `max_drop`; nothing is written.
        NpPruneError: what is wrong with source, data, settings or folder.
    """
    started = time.perf_counter()
    work = work.on(STAGE)
    _ = work.where  # a missing device is refused before all else
    team = work.team
    team.on_first(lambda: check_checkpoint(out, reads_of(source), write=not dry_run))

    def open_all() -> tuple[ModelSection, DataSection, RunFolder | None, Opened, PruneSection]:
        model, images, run = origin(source, data)
        model = network or model
        _check(settings, run)
        opened = open_source(
            model, images, run, work, topk=settings.topk, keep_head=settings.keep_head
        )
        axes = axes_for(settings, opened.view.model)
        return model, images, run, opened, settings.model_copy(update={"axes": axes})

    model, data, run, opened, settings = team.together(open_all)
    writable = team.on_first(lambda: dry_run or run is None or recordable(run, work))
    cache = StatisticsCache(
        statistics_home(run, out) if keep else None,
        identity(opened.network, opened.outputs),
        settings.memory, write=writable and not dry_run,
    )  # fmt: skip
    done = _planned(opened, settings, cache, work, dry_run=dry_run)
    info = model_info(done.model, replace(opened.network.info.source, sha256=""))
    info.preprocessing = opened.images.preprocessing
    summary = _summary(settings, done, opened.images, time.perf_counter() - started)
    variant = Variant(name=out.resolve().name, checkpoint="", model=info, prune=summary)
    if dry_run:
        return variant
    config = _config(opened, model, data, done, variant, out)
    config.versions = work.environment().versions

    def write() -> Variant:
        with keeping(variant):
            write_checkpoint(out, config, state(done.model), done.plan)
            if writable and keep:
                _record(opened, out, variant, done.plan, work)
        work.say(f"wrote {out}")
        return variant

    return team.on_first(write)


def _check(settings: PruneSection, run: RunFolder | None) -> None:
    """What settings must keep to, before anything is opened."""
    check_budget(settings)
    if run is None and settings.topk is not None:
        raise UsageError(
            f"{setting('prune.topk')} keeps path neurons, and no run folder was given",
            hint="`npprune discover` makes one; give it in place of the model's name",
        )
    check(settings)
    check_criterion(settings.criterion, run is not None)


@dataclass
class Attempt:
    """A plan carried out, and what it is predicted to do."""

    plan: Plan
    chosen: Chosen
    model: nn.Module
    predicted: dict[str, float]
    images: int = 0  # calibration images, held out or not
    doubt: str = ""  # why their labels are probably wrong

    @property
    def drop(self) -> float:
        """Predicted loss of top-1, in points."""
        return 100 * self.predicted["drop"]


def _planned(
    opened: Opened,
    settings: PruneSection,
    cache: StatisticsCache,
    work: Work,
    *,
    dry_run: bool,
) -> Attempt:
    """Measure, then choose, refit and carry out: once, or until the drop is within `max_drop`."""
    network, team = opened.network, work.team
    paths = team.together(lambda: read_paths(opened, settings.topk))
    work.say(f"{network.info.source.architecture} on {work.where} ({work.reason})")
    fit, held_out = team.together(
        lambda: calibration_images(opened.images, settings.calibration_images, work)
    )
    doubt = team.on_first(lambda: _label_doubt(opened, fit, held_out, work))
    asked = PlanSettings.of(settings)
    subject = Subject(
        opened.view, fit.images, lambda: model_sizes(network.model), held_out.images, paths,
        network.info.last_for_read,
    )  # fmt: skip
    with ExitStack() as held:
        latency: LatencyGoal | None = None  # the first process alone looks at the clock
        if settings.target_latency is not None and team.rank == 0:
            latency = _latency(opened, settings, work)
            held.enter_context(latency.timer)
        table = latency.table if isinstance(latency, LatencyTarget) else None
        measured = prepared(measure(subject, asked, work, cache=cache), asked, work)
        settings = settings.model_copy(update={"criterion": measured.criterion})
        refits = 0.0  # seconds, over all attempts

        def attempt(choice: Choice) -> Attempt:
            nonlocal refits
            chosen = refit(measured, asked, choice, work)
            seconds = chosen.details["seconds"]
            refits = seconds["compensation"] = round(refits + seconds["compensation"], 3)
            plan = _plan(opened, chosen, settings, work.seed)
            smaller = carried_out(network, plan, chosen)
            predicted = team.on_first(lambda: _predict(network, smaller, held_out, plan, work))
            return Attempt(plan, chosen, smaller, predicted)

        def sized(budget: float) -> nn.Module:
            choice = choose(measured, asked, budget)
            return apply_plan(network.model, skeleton(measured, choice))

        def within_budget() -> Choice | None:
            if isinstance(latency, LatencyTarget):
                latency.correct(lambda budget: choose(measured, asked, budget, table).widths)
            budget = amount(measured, asked, table)
            if isinstance(latency, LatencySearch):
                least, whole = bounds(measured, asked)
                budget = latency.macs(whole, least, sized)
            return None if budget is None else choose(measured, asked, budget, table)

        choice = team.on_first(within_budget)
        if choice is not None:
            done = attempt(choice)
            _gate(done, settings, work)
        else:

            def tried(budget: float) -> Attempt | None:
                choice = team.on_first(lambda: _affordable(measured, asked, budget))
                return None if choice is None else attempt(choice)

            done = _smallest(tried, bounds(measured, asked), settings, work)
        done.images, done.doubt = len(fit) + len(held_out), doubt
        done.chosen.details["statistics"] = measured.collected.record
        if latency is not None and not dry_run:
            record, warnings = latency.check(done.model, done.plan.kept_widths)
            done.chosen.details["latency"] = record
            done.chosen.warnings[:0] = warnings
    return done


def _affordable(measured: Measured, settings: PlanSettings, budget: float) -> Choice | None:
    """The choice within a budget; None where it is less than the smallest options cost."""
    try:
        return choose(measured, settings, budget)
    except GateError:
        return None


def _latency(opened: Opened, settings: PruneSection, work: Work) -> LatencyGoal:
    """How a latency is met: by a price list of the widths, or by way of MACs."""
    model, preprocessing = opened.network.model, opened.images.preprocessing
    if settings.axes == ["mlp"]:
        return LatencyTarget(model, preprocessing, opened.view.widths, settings, work)
    return LatencySearch(model, preprocessing, settings, work)


def _smallest(
    attempt: Callable[[float], Attempt | None],
    bounds: tuple[float, float],
    settings: PruneSection,
    work: Work,
) -> Attempt:
    """The smallest attempt whose predicted drop is within `max_drop`.

    Bisection over the share of hidden units (with other axes: of the MACs) that stays, to 1/64.
    """
    least, whole = bounds
    # the drop at `low` is too large; at `high` all stays
    low, high = int(SEARCH_STEPS * least / whole), SEARCH_STEPS
    best: Attempt | None = None
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(whole * middle / SEARCH_STEPS)
        if tried is None:  # less than the smallest widths allowed
            low = middle
            continue
        _require_prediction(tried.predicted, work)
        share = tried.plan.kept_fraction if least == 0 else middle / SEARCH_STEPS
        work.say(f"{share:.1%} kept: predicted drop {tried.drop:.2f} points")
        if tried.drop <= (settings.max_drop or 0):
            best, high = tried, middle
        else:
            low = middle
    if best is None:
        error = GateError(
            f"no smaller network is predicted to stay within {setting('prune.max_drop')} "
            f"{settings.max_drop:g} points of top-1",
            hint="allow a larger drop; nothing was written",
        )
        raise work.team.first_says(error)
    return best


def _gate(done: Attempt, settings: PruneSection, work: Work) -> None:
    if settings.max_drop is None:
        return
    _require_prediction(done.predicted, work)
    if done.drop > settings.max_drop:
        error = GateError(
            f"top-1 is predicted to fall by {done.drop:.1f} points "
            f"(from {done.predicted['images']:.0f} held-out calibration images), more than "
            f"{setting('prune.max_drop')} {settings.max_drop:g} allows",
            hint="keep more, or leave the budget out: then the smallest network within "
            "the drop is searched for; nothing was written",
        )
        raise work.team.first_says(error)


def _require_prediction(predicted: dict[str, float], work: Work) -> None:
    if not predicted:
        error = UsageError(
            f"{setting('prune.max_drop')} needs at least {HELD_OUT} calibration images: one in "
            f"{HELD_OUT} is held out to predict the drop",
            hint=f"give more images with {setting('data.calibration')}",
        )
        raise work.team.first_says(error)


def _plan(opened: Opened, chosen: Chosen, settings: PruneSection, seed: int) -> Plan:
    """The plan as a file: what stays, of which weights, and how it was chosen."""
    source, classes = opened.network.info.source, opened.classes
    how: dict[str, Any] = settings.model_dump(exclude_none=True, exclude={"memory"})
    how["seed"] = seed
    if classes is not None:
        how["classes"] = classes
    if opened.run is not None:
        how["paths"] = opened.run.read_manifest().settings_sha256
    return Plan(
        keep=chosen.keep,
        widths=opened.network.info.widths,
        source_sha256=source.sha256,
        architecture=source.architecture,
        how=how,
        classes=opened.outputs,
        notes=chosen.warnings,
        **chosen.fields(),
    )


def carried_out(network: Network, plan: Plan, chosen: Chosen) -> nn.Module:
    """The surgery, then the values that compensation found for the layers that remain."""
    smaller = apply_plan(network.model, plan)
    like = next(smaller.parameters())

    def values(layer: Replacement) -> tuple[Tensor, Tensor]:
        return layer.weight.to(like), layer.bias.to(like)

    refitted = chosen.refitted
    for l, layer in enumerate(refitted.second):
        set_fc2(smaller, l, *values(layer))
        if layer.first is not None:
            set_own_fc2(smaller, l, *values(layer.first[1]))
    for axis, kept in chosen.further:
        axis.carry_out(smaller, make_view(network.model), kept)
    for l, layer in refitted.projections.items():
        set_proj(smaller, l, *values(layer))
    if refitted.classifiers:
        set_classifiers(smaller, [values(layer) for layer in refitted.classifiers])
    return smaller.eval()


@torch.no_grad()
def _label_doubt(opened: Opened, fit: DecodedImages, held_out: DecodedImages, work: Work) -> str:
    """Whether the labels fit what the dense network predicts, on some of the images."""
    model, outputs = opened.network.model, opened.network.info.num_classes
    if outputs == 0:
        return ""
    step = max(1, len(fit) // DOUBT_IMAGES)
    some = [(x[::step], y[::step]) for x, y in fit]
    some += list(held_out)[:: max(1, len(held_out) // DOUBT_IMAGES)]
    predicted = torch.cat([model(x.to(work.where)).argmax(1).cpu() for x, _ in some])
    labels = torch.cat([y for _, y in some])
    return label_doubt(predicted, labels, outputs, opened.images.source)


@torch.no_grad()
def _predict(
    network: Network, smaller: nn.Module, held_out: DecodedImages, plan: Plan, work: Work
) -> dict[str, float]:
    """The loss of top-1 to expect, from held-out images: all they have decided is how much each
    refit was shrunk."""
    if len(held_out) == 0:
        return {}
    if network.info.num_classes == 0:
        return _predict_features(network, smaller, held_out, work)
    dense = torch.cat([network.model(x.to(work.where)).float().cpu() for x, _ in held_out])
    pruned = torch.cat([smaller(x.to(work.where)).float().cpu() for x, _ in held_out])
    labels = torch.cat([y for _, y in held_out])
    if plan.classes is not None:
        dense = dense[:, plan.classes]
        labels = torch.searchsorted(torch.tensor(plan.classes), labels)
    before = metrics.accuracy(dense, labels).top1
    after = metrics.accuracy(pruned, labels).top1
    drop = metrics.mean_interval(metrics.expected_drop(dense, pruned))
    return {
        "images": float(len(held_out)),
        "drop": drop.value,
        "drop_low": drop.low,
        "drop_high": drop.high,
        "dense_top1": before.value,
        "pruned_top1": after.value,
        "pruned_low": after.low,
        "pruned_high": after.high,
        "divergence_nats": float(metrics.divergence(dense, pruned).mean()),
    }


def _predict_features(
    network: Network, smaller: nn.Module, held_out: DecodedImages, work: Work
) -> dict[str, float]:
    """How near the features stay, from held-out images."""
    found = []
    for x, _ in held_out:
        dense, pruned = (outputs_of(m, x.to(work.where)).cpu() for m in (network.model, smaller))
        found.append(metrics.feature_distances(dense, pruned))
    near = metrics.feature_agreement(torch.cat(found))
    said = {"images": float(len(held_out))}
    for name, mean in vars(near).items():
        if mean is not None:
            said |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return said


def _summary(settings: PruneSection, done: Attempt, images: Images, seconds: float) -> PruneSummary:
    return PruneSummary(
        criterion=done.plan.how["criterion"],
        selection=settings.selection,
        compensation=settings.compensation,
        keep=settings.keep,
        topk=settings.topk,
        round_to=settings.round_to,
        widths=done.plan.kept_widths,
        dense_widths=done.plan.widths,
        protected=done.chosen.protected,
        calibration=replace(images.info(), images=done.images),
        seconds=seconds,
        plan_sha256=digest(done.plan),
        warnings=done.chosen.warnings,
        predicted=done.predicted,
        details=done.chosen.details,
        label_doubt=done.doubt,
    )


def _config(
    opened: Opened,
    model: ModelSection,
    data: DataSection,
    done: Attempt,
    variant: Variant,
    out: Path,
) -> CheckpointConfig:
    """What the checkpoint says of itself."""
    network, images, outputs = opened.network, opened.images, done.plan.classes
    details: dict[str, Any] = {
        "dense": dense_reference(model, out),
        "data": {
            **data.model_dump(exclude_none=True, exclude={"val", "train"}),
            "calibration": images.source.spec,
        },
    }
    if opened.classes is not None:
        details["classes"] = opened.classes
    if outputs is not None:
        details["outputs"] = outputs
    elif network.config is not None and is_cut(network.config):
        details["cut"] = True
    return CheckpointConfig(
        source=network.info.source,
        widths=variant.model.widths,
        heads=variant.model.heads,
        num_classes=variant.model.num_classes,
        preprocessing=images.preprocessing,
        classes=_labels(class_names(images, network.info.num_classes), outputs),
        weights_sha256="",
        run=os.path.relpath(opened.run.path if opened.run is not None else out, out),
        prune=variant.prune,
        details=details,
        merged=variant.model.merged,
        last_for_read=variant.model.last_for_read,
    )


def _labels(names: list[ClassInfo], cut: list[int] | None) -> list[ClassInfo]:
    """The names of the outputs; a cut head's are numbered anew."""
    if cut is None:
        return names
    return [replace(names[c], index=i) for i, c in enumerate(cut)]


def _record(opened: Opened, out: Path, variant: Variant, plan: Plan, work: Work) -> None:
    """Put the variant into the run's result, or into one inside the checkpoint."""
    run, info = opened.run, opened.network.info
    folder = run or RunFolder(out)

    def begin() -> Result:
        return Result(
            name=variant.name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=work.environment(),
            model=info,
            classes=class_names(opened.images, info.num_classes),
        )

    with folder.updating(begin if run is None else None) as result:
        if run is not None:
            run.write_plan(plan)
        variant.checkpoint = os.path.relpath(out, folder.path)
        result.variants = [v for v in result.variants if v.name != variant.name] + [variant]
        add_command(result, work.command)

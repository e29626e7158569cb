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
from torch import Tensor

from npprune.core import metrics
from npprune.core.attention import smaller_qkv
from npprune.core.harm import Replacement
from npprune.errors import GateError, UsageError
from npprune.models.info import model_info, model_sizes, state
from npprune.models.surgery import (
    apply_plan,
    check_axes,
    check_prunable,
    cut_head,
    set_classifiers,
    set_fc2,
    set_proj,
    set_qkv,
)
from npprune.models.view import make_view
from npprune.pipeline.axes import check_settings
from npprune.pipeline.device import environment, resolve_device
from npprune.pipeline.evaluate import dense_reference
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.inputs import (
    Images,
    Network,
    class_names,
    is_cut,
    label_doubt,
    network_names,
    open_images,
    open_network,
    run_names,
)
from npprune.pipeline.latency import LatencyTarget
from npprune.pipeline.planning import Chosen, Planner, check_criterion
from npprune.pipeline.prepare import HELD_OUT, Held, calibration_images, origin, read_paths
from npprune.pipeline.results import add_command
from npprune.pipeline.statistics import Shelf, identity, statistics_home
from npprune.recipe import DataSection, ModelSection, PruneSection
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
    device: str = "auto",
    seed: int = 0,
    emit: Emit = ignore,
    dry_run: bool = False,
    command: str = "",
) -> Variant:
    """Make a smaller network and write it as the checkpoint folder `out`.

    Args:
        source: a run folder with paths, or a network: then the criterion alone decides.
        data: `calibration` (else `train`) names the images for statistics; `classes` limits
            paths and statistics to those classes.

    Raises:
        GateError: the predicted drop exceeds `max_drop`; nothing is written.
        NpPruneError: what is wrong with source, data, settings or folder.
    """
    started = time.perf_counter()
    where, reason = resolve_device(device)
    model, data, run = origin(source, data)
    if settings.topk is None and settings.max_drop is None and not _has_budget(settings):
        raise UsageError(
            "a budget is needed: how much of the network stays",
            hint="`--keep 0.5` keeps half of the hidden units; `--topk K` alone keeps the paths'",
        )
    if run is None and settings.topk is not None:
        raise UsageError(
            "`--topk` keeps path neurons, and no run folder was given",
            hint="`npprune discover` makes one; give it in place of the model's name",
        )
    check_settings(settings)
    check_criterion(settings.criterion, run is not None)
    network = open_network(model, where, emit, STAGE)
    check_prunable(network.model)
    check_axes(network.model, settings.axes)
    view = make_view(network.model)
    if settings.topk is not None and settings.topk > min(view.widths):
        raise UsageError(
            f"`--topk` must be at most {min(view.widths)}, the hidden units of the narrowest "
            f"block, got {settings.topk}"
        )
    names = network_names(network, run_names(run.read_result()) if run is not None else None)
    images = open_images(
        data.calibration or data.train, data, network.info, flag="--calibration",
        on_bad="skip", stage=STAGE, emit=emit, names=names,
    )  # fmt: skip
    classes = images.source.selected if data.classes is not None else None
    outputs = classes if not settings.keep_head else None
    if outputs is not None:  # what is measured is the network with the head that it will have
        view = make_view(cut_head(network.model, outputs))
    paths = read_paths(run, network, classes, view, settings.topk)
    emit(Event(STAGE, f"{network.info.source.architecture} on {where} ({reason})"))
    calibration, held_out = calibration_images(images, settings.calibration_images, emit)
    generator = torch.Generator().manual_seed(seed)
    doubt = _label_doubt(network, calibration, held_out, images, where)
    batches = list(calibration)
    shelf = Shelf(
        statistics_home(run, out), identity(network, outputs), settings.memory, write=not dry_run
    )
    with ExitStack() as held:
        latency = None
        if settings.target_latency is not None:
            latency = held.enter_context(
                LatencyTarget(network.model, images.preprocessing, view.widths, settings, emit)
            )
        planner = Planner(
            view, batches, paths, settings, lambda: model_sizes(network.model), generator, emit,
            held_out=list(held_out), shelf=shelf,
            latency=latency.table if latency is not None else None,
        )  # fmt: skip
        if latency is not None:
            latency.correct(lambda budget: planner.select(budget).widths)

        def attempt(budget: float) -> Attempt:
            chosen = planner.at(budget)
            plan = _plan(network, chosen, settings, classes, run, seed)
            smaller = carried_out(network, plan, chosen)
            return Attempt(plan, chosen, smaller, _predict(network, smaller, held_out, plan, where))

        done = _within(attempt, planner, settings, emit)
        done.chosen.details["statistics"] = planner.collected.record
        if latency is not None and not dry_run:
            record, warnings = latency.check(done.model, done.plan.kept_widths)
            done.chosen.details["latency"] = record
            done.chosen.warnings[:0] = warnings
    plan, smaller = done.plan, done.model
    used = len(calibration) + len(held_out)
    summary = _summary(settings, done, images, used, time.perf_counter() - started)
    summary.label_doubt = doubt
    info = model_info(smaller, replace(network.info.source, sha256=""))
    info.preprocessing = images.preprocessing
    variant = Variant(name=out.resolve().name, checkpoint="", model=info, prune=summary)
    cut = network.config is not None and is_cut(network.config)
    if dry_run:
        return variant
    home = run.path if run is not None else out
    config = CheckpointConfig(
        source=network.info.source,
        widths=info.widths,
        heads=info.heads,
        num_classes=info.num_classes,
        preprocessing=images.preprocessing,
        classes=_labels(class_names(images, network.info.num_classes), plan.classes),
        weights_sha256="",
        run=os.path.relpath(home, out),
        prune=summary,
        details=_details(model, out, data, images, classes, plan, cut),
        versions=environment(where, reason, seed).versions,
    )
    write_checkpoint(out, config, state(smaller), plan)
    _record(run, out, variant, plan, network, images, where, reason, seed, command)
    emit(Event(STAGE, f"wrote {out}"))
    return variant


def _has_budget(settings: PruneSection) -> bool:
    s = settings
    budgets = (s.keep, s.target_params, s.target_macs, s.target_latency)
    return any(v is not None for v in budgets)


@dataclass
class Attempt:
    """A plan carried out, and what it is predicted to do."""

    plan: Plan
    chosen: Chosen
    model: torch.nn.Module
    predicted: dict[str, float]

    @property
    def drop(self) -> float:
        """Predicted loss of top-1, in points."""
        return 100 * self.predicted["drop"]


def _within(
    attempt: Callable[[float], Attempt], planner: Planner, settings: PruneSection, emit: Emit
) -> Attempt:
    """The attempt at the budget, or the smallest one whose predicted drop is within `max_drop`.

    Bisection over the share of hidden units (with other axes: of all they cost) that stays, to
    1/64.
    """
    budget = planner.budget()
    if budget is not None:
        done = attempt(budget)
        _gate(done, settings)
        return done
    least, whole = planner.bounds()
    # the drop at `low` is too large; at `high` all stays
    low, high = int(SEARCH_STEPS * least / whole), SEARCH_STEPS
    best: Attempt | None = None
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(whole * middle / SEARCH_STEPS)
        _require_prediction(tried.predicted)
        share = tried.plan.kept_fraction if least == 0 else middle / SEARCH_STEPS
        emit(Event(STAGE, f"{share:.1%} kept: predicted drop {tried.drop:.2f} points"))
        if tried.drop <= (settings.max_drop or 0):
            best, high = tried, middle
        else:
            low = middle
    if best is None:
        raise GateError(
            f"no smaller network is predicted to stay within `--max-drop` {settings.max_drop:g} "
            "points of top-1",
            hint="allow a larger drop; nothing was written",
        )
    return best


def _gate(done: Attempt, settings: PruneSection) -> None:
    if settings.max_drop is None:
        return
    _require_prediction(done.predicted)
    if done.drop > settings.max_drop:
        raise GateError(
            f"top-1 is predicted to fall by {done.drop:.1f} points "
            f"(from {done.predicted['images']:.0f} held-out calibration images), more than "
            f"`--max-drop` {settings.max_drop:g} allows",
            hint="keep more, or leave the budget out: then the smallest network within "
            "the drop is searched for; nothing was written",
        )


def _require_prediction(predicted: dict[str, float]) -> None:
    if not predicted:
        raise UsageError(
            f"`--max-drop` needs at least {HELD_OUT} calibration images: one in {HELD_OUT} is held "
            "out to predict the drop",
            hint="give more images with `--calibration`",
        )


def _plan(
    network: Network,
    chosen: Chosen,
    settings: PruneSection,
    classes: list[int] | None,
    run: RunFolder | None,
    seed: int,
) -> Plan:
    return Plan(
        keep=chosen.keep,
        widths=network.info.widths,
        source_sha256=network.info.source.sha256,
        architecture=network.info.source.architecture,
        how=_how(settings, classes, run, seed),
        classes=classes if classes is not None and not settings.keep_head else None,
        notes=chosen.warnings,
        heads=[a.heads for a in chosen.attention] if "heads" in settings.axes else None,
        query_dims=[a.query_dims for a in chosen.attention] if "qk" in settings.axes else None,
    )


def carried_out(network: Network, plan: Plan, chosen: Chosen) -> torch.nn.Module:
    """The surgery, then the values that compensation found for the layers that remain."""
    smaller = apply_plan(network.model, plan)
    like = next(smaller.parameters())

    def values(layer: Replacement) -> tuple[Tensor, Tensor]:
        return layer.weight.to(like), layer.bias.to(like)

    found = chosen.refitted
    for l, layer in enumerate(found.second):
        set_fc2(smaller, l, *values(layer))
    dense = make_view(network.model)
    for l, attention in enumerate(chosen.attention):
        set_qkv(smaller, l, *smaller_qkv(dense.attention(l), attention))
    for l, layer in found.projections.items():
        set_proj(smaller, l, *values(layer))
    if found.classifiers:
        set_classifiers(smaller, [values(layer) for layer in found.classifiers])
    return smaller.eval()


@torch.no_grad()
def _label_doubt(
    network: Network, calibration: Held, held_out: Held, images: Images, device: torch.device
) -> str:
    """Whether the labels fit what the dense network predicts, on some of the images."""
    step = max(1, len(calibration) // DOUBT_IMAGES)
    some = [(x[::step], y[::step]) for x, y in calibration]
    some += list(held_out)[:: max(1, len(held_out) // DOUBT_IMAGES)]
    predicted = torch.cat([network.model(x.to(device)).argmax(1).cpu() for x, _ in some])
    labels = torch.cat([y for _, y in some])
    return label_doubt(predicted, labels, network.info.num_classes, images.source)


@torch.no_grad()
def _predict(
    network: Network,
    smaller: torch.nn.Module,
    held_out: Held,
    plan: Plan,
    device: torch.device,
) -> dict[str, float]:
    """The loss of top-1 to expect, from held-out images: all they have decided is how much each
    refit was shrunk."""
    if len(held_out) == 0:
        return {}
    dense = torch.cat([network.model(x.to(device)).float().cpu() for x, _ in held_out])
    pruned = torch.cat([smaller(x.to(device)).float().cpu() for x, _ in held_out])
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


def _summary(
    settings: PruneSection, done: Attempt, images: Images, used: int, seconds: float
) -> PruneSummary:
    return PruneSummary(
        criterion=settings.criterion,
        selection=settings.selection,
        compensation=settings.compensation,
        keep=settings.keep,
        topk=settings.topk,
        round_to=settings.round_to,
        widths=done.plan.kept_widths,
        dense_widths=done.plan.widths,
        protected=done.chosen.protected,
        calibration=replace(images.info(), images=used),
        seconds=seconds,
        plan_sha256=digest(done.plan),
        warnings=done.chosen.warnings,
        predicted=done.predicted,
        details=done.chosen.details,
    )


def _how(
    settings: PruneSection, classes: list[int] | None, run: RunFolder | None, seed: int
) -> dict[str, Any]:
    how: dict[str, Any] = settings.model_dump(exclude_none=True, exclude={"memory"})
    how["seed"] = seed
    if classes is not None:
        how["classes"] = classes
    if run is not None:
        how["paths"] = run.read_manifest().settings_sha256
    return how


def _labels(names: list[ClassInfo], cut: list[int] | None) -> list[ClassInfo]:
    """The names of the outputs; a cut head's are numbered anew."""
    if cut is None:
        return names
    return [replace(names[c], index=i) for i, c in enumerate(cut)]


def _details(
    model: ModelSection,
    out: Path,
    data: DataSection,
    images: Images,
    classes: list[int] | None,
    plan: Plan,
    cut: bool,
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "dense": dense_reference(model, out),
        "data": {
            **data.model_dump(exclude_none=True, exclude={"val", "train"}),
            "calibration": images.source.spec,
        },
    }
    if classes is not None:
        details["classes"] = classes
    if plan.classes is not None:
        details["outputs"] = plan.classes
    elif cut:
        details["cut"] = True
    return details


def _record(
    run: RunFolder | None,
    out: Path,
    variant: Variant,
    plan: Plan,
    network: Network,
    images: Images,
    device: torch.device,
    reason: str,
    seed: int,
    command: str,
) -> None:
    """Put the variant into the run's result, or into one beside the checkpoint."""
    folder = run or RunFolder(out)
    if run is not None:
        result = run.read_result()
        run.write_plan(plan)
    else:
        result = Result(
            name=variant.name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=environment(device, reason, seed),
            model=network.info,
            classes=class_names(images, network.info.num_classes),
        )
    variant.checkpoint = os.path.relpath(out, folder.path)
    result.variants = [v for v in result.variants if v.name != variant.name] + [variant]
    add_command(result, command)
    folder.write_result(result)

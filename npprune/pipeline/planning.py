"""From statistics to a plan: score, select under the budget, compensate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npprune.core.compensation import compensate
from npprune.core.criteria import CRITERIA, Context, score
from npprune.core.selection import select
from npprune.core.statistics import Statistics, collect_statistics
from npprune.core.view import VitView
from npprune.errors import UsageError
from npprune.pipeline.events import Emit, Event
from npprune.recipe import PruneSection
from npprune.records import ModelInfo

Layer = tuple[Tensor, Tensor]


@dataclass
class Paths:
    """What the paths of the chosen classes say.

    union: per block, the neurons of every class's K most frequent, ascending.
    votes: per block [h], votes by rank, every class counting the same.
    """

    union: list[list[int]]
    votes: list[Tensor]
    classes: int
    topk: int


@dataclass
class Chosen:
    """What stays in each block, and the second layers (weight, bias) that go with it."""

    keep: list[list[int]]
    layers: list[Layer | None]
    criterion: str
    protected: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def choose(
    view: VitView,
    calibration: Iterable[tuple[Tensor, Tensor]],
    paths: Paths | None,
    settings: PruneSection,
    network: ModelInfo,
    device: torch.device,
    generator: torch.Generator,
    emit: Emit,
) -> Chosen:
    """The kept neurons of every block and their compensation."""
    criterion = CRITERIA[settings.criterion]
    stats = _statistics(view, calibration, settings, device, generator, emit)
    protected = paths.union if paths is not None and settings.protect_paths else None
    context = Context(
        second=[view.fc2(l) for l in range(len(view.widths))],
        statistics=stats,
        votes=paths.votes if paths is not None else None,
        protected=protected,
        generator=generator,
    )
    scores = score(criterion.name, context)
    selection = select(
        scores,
        _budget(view, settings, protected),
        method=settings.selection,  # type: ignore[arg-type]
        protected=protected,
        votes=paths.votes if paths is not None else None,
        round_to=settings.round_to,
        min_keep=settings.min_keep,
    )
    layers: list[Layer | None] = []
    lost: list[float] = []
    conditions: list[float] = []
    for l, kept in enumerate(selection.keep):
        fc2 = view.fc2(l)
        new = compensate(
            stats.moments(l), fc2.weight, fc2.bias, kept,
            mode=settings.compensation,  # type: ignore[arg-type]
        )  # fmt: skip
        layers.append((new.weight, new.bias))
        lost.append(new.error)
        conditions.append(new.condition)
    shown = [
        len(set(kept) & set(union))
        for kept, union in zip(selection.keep, protected or [[]] * len(lost), strict=True)
    ]
    return Chosen(
        selection.keep,
        layers,
        criterion.name,
        shown,
        selection.warnings,
        {"lost_variance": lost, "condition_number": conditions, "images": stats.images},
    )


def check_criterion(name: str, paths: bool) -> None:
    """UsageError for an unknown criterion, or one that reads paths where there are none."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=1)
        raise UsageError(
            f"`--criterion` must be one of {', '.join(CRITERIA)}, got `{name}`",
            hint=f"did you mean `{near[0]}`?" if near else None,
        )
    if CRITERIA[name].paths and not paths:
        raise UsageError(
            f"criterion `{name}` reads paths, and no run folder was given",
            hint="give the run folder of `npprune discover` in place of the model's name",
        )


def _statistics(
    view: VitView,
    calibration: Iterable[tuple[Tensor, Tensor]],
    settings: PruneSection,
    device: torch.device,
    generator: torch.Generator,
    emit: Emit,
) -> Statistics:
    batches = list(calibration)
    total = sum(len(y) for _, y in batches)

    def tell(stats: Statistics) -> None:
        emit(Event("statistics", level="progress", done=stats.images, total=total))

    needs = {*CRITERIA[settings.criterion].needs, "moments"}
    return collect_statistics(
        view,
        ((x.to(device), y.to(device)) for x, y in batches),
        needs=needs,  # type: ignore[arg-type]
        generator=generator,
        on_batch=tell,
    )


def _budget(view: VitView, settings: PruneSection, protected: list[list[int]] | None) -> float:
    """Neurons that may stay; without a budget, the paths' alone."""
    if settings.keep is not None:
        return settings.keep * sum(view.widths)
    return float(sum(len(p) for p in protected or []))

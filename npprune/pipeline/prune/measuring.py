"""What calibration images say of a network, once for any budget.

measure   statistics -> scores of hidden units; what further axes need -> `Measured`
prepared  the same with what settings need besides: measured harm, held-out statistics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from npprune import words
from npprune.budget import Budget, budget_of
from npprune.core.compression.cost import Price, Sizes
from npprune.core.compression.scores import Context, score
from npprune.core.compression.selection import Ranking, Table
from npprune.core.compression.statistics import Statistics, collect_statistics
from npprune.core.view import VitView
from npprune.criteria import CRITERIA, Need
from npprune.errors import UsageError, plural, setting
from npprune.pipeline.common.memory import SHARE, allowed_bytes, images_that_fit
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.axes import Axis, Option, beyond_hidden
from npprune.pipeline.prune.axes.cls import WORD as CLS
from npprune.pipeline.prune.axes.cls import OwnUnits
from npprune.pipeline.prune.axes.hidden import HiddenUnits
from npprune.pipeline.prune.axes.tokens import (
    WORD,
    Schedule,
    count,
    measured_schedules,
    own,
    read_alone,
)
from npprune.pipeline.prune.statistics_cache import (
    Collected,
    StatisticsCache,
    collect,
    own_batches,
)
from npprune.recipe import PruneSection

HARM_IMAGES = 100
RECONSTRUCTION = "obs"  # stands in where predictions cannot tell neurons apart
SALIENCE = 0.5  # share of the token weighting by the squared loss gradient


@dataclass(frozen=True)
class PlanSettings:
    """What planning is asked for; fields as in `PruneSection`.

    `budget` None: the paths' hidden units, or what `max_drop` allows.
    """

    budget: Budget | None = None
    axes: tuple[words.Axis, ...] = ("mlp",)
    criterion: str = "curvature-obs"
    selection: words.Selection = "measured"
    compensation: words.Compensation = "sequential"
    shrinkage: float | None = None
    paths: words.PathUse = "auto"
    round_to: int = 16
    min_keep: int = 16
    max_drop: float | None = None

    @property
    def price(self) -> Price:
        """What the budget counts; milliseconds are bought with MACs."""
        unit = self.budget.unit if self.budget is not None else None
        if unit == "params":
            return unit
        return "macs" if unit == "macs" or self.axes != ("mlp",) else "neurons"

    def by_paths(self, paths: Paths | None) -> bool:
        """Whether the paths' neurons are the budget."""
        budget = self.budget is not None or self.max_drop is not None
        return paths is not None and paths.alone and not budget and self.paths != "off"

    @classmethod
    def of(cls, s: PruneSection) -> PlanSettings:
        """Those of a recipe's section."""
        paths = s.paths if s.protect_paths is None else "protect" if s.protect_paths else "off"
        return cls(
            budget_of(s), tuple(s.axes or ("mlp",)), s.criterion, s.selection, s.compensation,
            s.shrinkage, paths, s.round_to, s.min_keep, s.max_drop,
        )  # fmt: skip


@dataclass
class Paths:
    """What the paths of the chosen classes say.

    union: per block, the neurons of every class's K most frequent, ascending.
    votes: per block [h], votes by rank, every class counting the same.
    attribution: per block [h], summed scores of the paths through a neuron, likewise.
    alone: they are the budget, where nothing else is.
    """

    union: list[list[int]]
    votes: list[Tensor]
    attribution: list[Tensor] = field(default_factory=list)
    alone: bool = False


@dataclass(frozen=True)
class Subject:
    """What is planned for: a network, its calibration images [b, 3, H, W], a run's paths.

    `held_out`: images that nothing is fitted on; unless the settings name a shrinkage, each refit
    takes the one that loses least on them. `last_for_read`: the network's last block computes only
    what is read, where the view computes all of it.
    """

    view: VitView
    fit: list[Tensor]
    sizes: Callable[[], Sizes]
    held_out: list[Tensor] = field(default_factory=list)
    paths: Paths | None = None
    last_for_read: bool = False

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.view.model.parameters()).device

    def placed(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images on the network's device."""
        return [x.to(self.device) for x in images]

    def few(self, count: int) -> list[Tensor]:
        """About `count` images, evenly over the calibration set, in batches."""
        everything = torch.cat(self.fit)
        step = max(1, len(everything) // count)
        return self.placed(everything[::step][:count].split(50))


@dataclass(frozen=True)
class Harm:
    """Nats per block and option: of the hidden units, and of each further axis; and of ways to
    merge tokens, the least harmful first."""

    hidden: list[dict[int, float]]
    further: list[list[dict[Option, float]]]
    schedules: list[Schedule]
    own: tuple[Table, Table] | None = None  # of hidden units for patches, and for what is read


@dataclass(frozen=True)
class Measured:
    """All that calibration says and no budget changes. `seconds`: what each part took.

    `read`: the tokens that the last block computes, where others change nothing; None: all.
    """

    subject: Subject
    criterion: str
    collected: Collected
    hidden: HiddenUnits
    further: list[Axis]
    notes: list[str]
    seconds: dict[str, float]
    harm: Harm | None = None
    held_out: Statistics | None = None
    read: int | None = None
    own: OwnUnits | None = None

    def spent(self, settings: PlanSettings) -> dict[str, float]:
        """Seconds of the parts that a run of these settings alone would have had."""
        parts = dict(self.seconds)
        if settings.selection != "measured":
            parts.pop("harm", None)
        if not needs_held_out(self, settings):
            parts.pop("held-out", None)
        return parts


# ---------------------------------------------------------------- measure


def measure(
    subject: Subject,
    settings: PlanSettings,
    work: Work,
    *,
    cache: StatisticsCache | None = None,
    like: Collected | None = None,
) -> Measured:
    """Statistics, scores, and what further axes need.

    Args:
        cache: where statistics are kept and found again; None: nowhere.
        like: statistics of the same network, images and seed, taken where they hold what is
            needed.
    """
    subject, team = _in_pieces(subject, work), work.team
    view, paths = subject.view, subject.paths
    criterion, notes = team.together(lambda: told_apart(settings, view))
    notes += scarce(subject)
    generator, seconds = work.generator(), {}
    needs = needs_of(criterion)
    if CLS in settings.axes:
        needs |= {"read"}
    salience = SALIENCE if "salience" in needs else 0.0
    if like is not None and set(like.statistics.needs) == needs:
        collected = like
    else:
        collected = collect(view, subject.fit, needs, generator, cache or StatisticsCache(), work)
    seconds["statistics"] = collected.seconds
    first = settings.paths == "protect" or settings.by_paths(paths)
    protected = paths.union if paths is not None and first else None
    blocks = range(len(view.widths))
    with timed(seconds, "scores"):
        context = Context(
            first=[view.first(l) for l in blocks],
            second=[view.fc2(l) for l in blocks],
            sums=collected.statistics,
            path_votes=paths.votes if paths is not None else None,
            path_scores=paths.attribution if paths is not None else None,
            protected=protected,
            salience=salience,
            generator=generator,
        )
        scores = _scored(criterion, context, team)
    read = read_alone(view) if settings.price == "macs" or subject.last_for_read else None
    ranking = Ranking(
        scores,
        protected,
        paths.votes if paths is not None else None,
        settings.round_to,
        settings.min_keep if "mlp" in settings.axes else max(view.widths),
    )
    further: list[Axis] = []
    for axis in beyond_hidden(settings.axes):
        with (
            timed(seconds, axis.name),
            own_batches(view, subject.fit, generator, team) as mine,
        ):
            told = tell(work, axis.name, sum(map(len, mine)), "images")
            batches = subject.placed(mine)
            further.append(
                axis.measured(view, settings.axes, batches, generator, told, total=team.total)
            )
    hidden = HiddenUnits(view, collected.statistics, ranking, salience)
    own = None
    if CLS in settings.axes:

        def of_side(sums: Statistics, shrinkage: float) -> list[Tensor]:
            side = replace(context, sums=sums, shrinkage=shrinkage, eliminated=set())
            return _scored(criterion, side, team)

        with timed(seconds, CLS):
            own = OwnUnits.measured(hidden, of_side, last_for_read=read is not None)
    return Measured(
        subject, criterion, collected, hidden, further, notes, seconds, read=read, own=own
    )


def prepared(measured: Measured, settings: PlanSettings, work: Work) -> Measured:
    """The same with the harm of options and the held-out statistics, where settings read them."""
    seconds, team = dict(measured.seconds), work.team
    subject, blocks = measured.subject, len(measured.subject.view.widths)
    if settings.selection == "measured" and measured.harm is None:
        with timed(seconds, "harm"):
            few = subject.few(HARM_IMAGES)
            further = [
                axis.harm(few, tell(work, axis.name, blocks, "blocks"), team)
                for axis in measured.further
            ]
            hidden = measured.hidden.harm(few, tell(work, "harm", blocks, "blocks"), team)
        merging = [own(subject.view)]
        if WORD in settings.axes:
            view = subject.view
            with timed(seconds, WORD):
                told = tell(work, WORD, count(view), "schedules")
                merging = measured_schedules(view, few, told, team)
        sides = None
        if measured.own is not None:
            with timed(seconds, CLS):
                sides = measured.own.harm(few, tell(work, CLS, blocks, "blocks"), team)
        measured = replace(measured, harm=Harm(hidden, further, merging, sides), seconds=seconds)
    if needs_held_out(measured, settings) and measured.held_out is None:
        with timed(seconds, "held-out"):
            statistics = collect_statistics(
                subject.view,
                subject.placed(subject.held_out),
                needs=_held_out_needs(measured),
                generator=torch.Generator().manual_seed(0),
            )
        measured = replace(measured, held_out=statistics, seconds=seconds)
    return measured


def _in_pieces(subject: Subject, work: Work) -> Subject:
    """The same with smaller batches, where the activations of one that gradients go through would
    take more than all of the device's memory."""
    share = allowed_bytes(None, subject.device, processes=work.team.local_count)
    whole = share / SHARE / 2**30
    limit = images_that_fit(subject.view, subject.fit[0][:1], 1, whole, subject.device)
    if limit >= max(map(len, subject.fit)):
        return subject
    work.warn(f"memory: {plural(limit, 'image')} at a time")
    return replace(subject, fit=[piece for x in subject.fit for piece in x.split(limit)])


def _scored(criterion: str, context: Context, team: Processes) -> list[Tensor]:
    """The scores of every block, each block by one process."""
    if team.count == 1 or CRITERIA[criterion].draws:  # in the order of the blocks
        return score(criterion, context)
    blocks = [[l] for l in range(len(context.second))]

    def some(rows: list[list[int]]) -> list[dict[int, Tensor]]:
        return [dict(zip(row, score(criterion, context, row), strict=True)) for row in rows]

    return [row[l] for l, row in enumerate(team.shared_out(blocks, some))]


def _held_out_needs(measured: Measured) -> set[Need]:
    needs: set[Need] = {"moments", "salience"} if measured.hidden.salience else {"moments"}
    return needs | {"read"} if measured.own is not None else needs


def needs_held_out(measured: Measured, settings: PlanSettings) -> bool:
    """Whether the shrinkage of a refit in one go is chosen on the held-out images' moments."""
    chosen = settings.compensation == "least-squares" and settings.shrinkage is None
    return chosen and bool(measured.subject.held_out)


# ---------------------------------------------------------------- settings


def check_budget(settings: PruneSection) -> None:
    """UsageError where nothing says how much of the network stays."""
    if budget_of(settings) is None and settings.topk is None and settings.max_drop is None:
        raise UsageError(
            "a budget is needed: how much of the network stays",
            hint=f"{setting('prune.keep', 0.5)} keeps half of the hidden units; "
            f"{setting('prune.topk')} alone keeps the paths'",
        )


def check_criterion(name: str, paths: bool) -> None:
    """UsageError for a criterion that reads paths where there are none."""
    words.check_word("criterion", name, CRITERIA)
    if CRITERIA[name].paths and not paths:
        raise UsageError(
            f"criterion `{name}` reads paths, and no run folder was given",
            hint="give the run folder of `npprune discover` in place of the model's name",
        )


def needs_of(criterion: str) -> set[Need]:
    """The statistics that planning by a criterion reads."""
    needs: set[Need] = {*CRITERIA[criterion].needs, "moments"}
    return needs | {"salience"} if "curvature" in needs else needs


def draws(criterion: str) -> bool:
    """Whether the seed matters: a random order, or gradients in random directions."""
    return CRITERIA[criterion].draws or needs_of(criterion) != {"moments"}


def told_apart(settings: PlanSettings, view: VitView) -> tuple[str, list[str]]:
    """The criterion, and warnings. Where a network has one output, its predictions never change:
    another criterion stands in for one that asks how they do.

    Raises:
        UsageError: what is asked for is measured on the predictions alone.
    """
    criterion, heads = settings.criterion, view.classifiers()
    if not heads and settings.max_drop is not None:
        raise UsageError(
            f"{setting('prune.max_drop')} is in points of top-1, and the network has no classifier",
            hint=f"say how much stays, e.g. {setting('prune.target_macs', 0.5)}; `npprune eval` "
            "says what became of the features",
        )
    if not heads or heads[0].out_features > 1:
        return criterion, []
    hint = (
        f"keep more outputs ({setting('prune.keep_head')} or more {setting('data.classes')}), "
        "or leave it out"
    )
    if settings.max_drop is not None:
        raise UsageError(
            f"{setting('prune.max_drop')} is predicted from how predictions change, and those of "
            "one output never do",
            hint=hint,
        )
    if set(settings.axes) != {"mlp"}:
        raise UsageError(
            f"{setting('prune.axes', ','.join(settings.axes))} compares harm to the predictions, "
            "and those of one output never change",
            hint=hint,
        )
    notes = [
        "the network has one output: its predictions never change, so accuracy and divergence say "
        "nothing of what was lost"
    ]
    if {"gates", "curvature"} & set(CRITERIA[criterion].needs):
        notes.append(
            f"criterion `{criterion}` reads the gradient of the predictions, which is 0: "
            f"`{RECONSTRUCTION}` decides, by the error of each block's output"
        )
        criterion = RECONSTRUCTION
    return criterion, notes


def scarce(subject: Subject) -> list[str]:
    """Warnings where calibration images say too little: too few of them, or all the same."""
    view, images, first = subject.view, sum(map(len, subject.fit)), subject.fit[0][0]
    if images > 1 and all(bool((x == first).all()) for x in subject.fit):
        return [
            f"the {images} calibration images are all the same: what stays is chosen and refitted "
            "for that one image (others: `--calibration`)"
        ]
    short = []
    with torch.no_grad():
        x = view.embed(first[None].to(subject.device))
        for l, width in enumerate(view.widths):
            x = view.entered(l, x)
            tokens = images * x.shape[1]
            if tokens < width:
                short.append((tokens / width, tokens, width))
    if not short:
        return []
    _, tokens, width = min(short)
    return [
        f"too few calibration images: {images} of {tokens} tokens in all, for up to "
        f"{width} hidden units per block (more: `--calibration`)"
    ]


def tell(work: Work, stage: str, total: int, unit: str) -> Callable[[int], None]:
    return lambda done: work.progress(done, total, unit, stage)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a block to an entry."""
    start = time.perf_counter()
    yield
    spent = time.perf_counter() - start
    seconds[name] = round(seconds.get(name, 0.0) + spent, 3)

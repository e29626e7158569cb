"""The paper's editing experiments on the paths of a run: measured against the un-edited network.

Where neurons are those of a class, the images that voted for them are never evaluated on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npprune.core import metrics
from npprune.core.attribution.editing import (
    Factors,
    edited_logits,
    keep_factors,
    members,
    path_factors,
    stack,
)
from npprune.core.attribution.votes import class_top
from npprune.core.view import VitView
from npprune.data.labels import KnownNames
from npprune.data.loading import Batch
from npprune.errors import DataError, UsageError, plural, setting
from npprune.images.decoding import UnreadableImage
from npprune.models.info import model_sizes
from npprune.models.view import make_view
from npprune.pipeline.analyze.editing_tables import Cell, Measured, analysis
from npprune.pipeline.analyze.forgetting import forgetting_analysis, measure_forgetting
from npprune.pipeline.common.inputs import (
    PREPROCESSING,
    Images,
    Network,
    check_weights,
    label_doubt,
    network_names,
    open_images,
    open_network,
    run_names,
)
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import FinishedRun, divide, open_finished, paths_of, record
from npprune.recipe import DataSection
from npprune.recipe.sections import EditSection
from npprune.records import Analysis
from npprune.store.path_store import PathTable

STAGE = "edit"
CACHED = 512  # classes' factors kept at a time


def edit_neurons(
    run: Path,
    settings: EditSection,
    data: DataSection | None = None,
    *,
    name: str | None = None,
    work: Work | None = None,
) -> dict[str, Analysis]:
    """Scale the neurons of a run's paths and measure what that does to its network.

    Args:
        run: a run folder of discovery.
        settings: what is edited, where, and by whose paths; all lists are combined.
        data: `val` names the images to evaluate on. None: the run's own, and where neurons are a
            class's, one half of them, the other half having chosen the neurons.
        name: the key in the result; None: one made from edit, paths and scope.

    Returns:
        The analyses that were added to the run's `result.json`, by key.

    Raises:
        NpPruneError: what is wrong with run, settings or images.
    """
    started = time.perf_counter()
    work = (work or Work()).on(STAGE)
    where = work.where
    found = open_finished(run, work)
    network = open_network(found.recipe.model, work)
    check_weights(network, found.manifest.model.source.sha256, run)
    view = make_view(network.model)
    cells = _cells(settings, found, view)
    work.say(f"{network.info.source.architecture} on {where} ({work.reason})")
    material = _material(found, settings, data, network, work)
    measured, predicted = _measure(view, material, cells, settings, work)
    doubt = label_doubt(
        predicted, measured.labels, network.info.num_classes, material.images.source
    )
    if doubt:
        work.warn(doubt)
    measured.sizes = model_sizes(network.model)
    key = name or "-".join(["edit", settings.edit, *settings.paths, *_scopes(settings, view)])
    about = f"{doubt}. {material.text(found)}" if doubt else material.text(found)
    result = {key: analysis(measured, settings, about)}
    if settings.others:
        result[f"{key}-others"] = _forgetting(view, material, cells, settings, about, work)
    record(found, result, work)
    work.say(f"{plural(measured.images, 'image')} in {time.perf_counter() - started:.0f} s")
    return result


def _forgetting(
    view: VitView,
    material: _Material,
    cells: Sequence[Cell],
    settings: EditSection,
    about: str,
    work: Work,
) -> Analysis:
    neurons = _Neurons(view, material, settings)
    found = measure_forgetting(
        view,
        (
            (batch.images[rows].to(work.where), batch.labels[rows])
            for batch, rows in material.batches()
        ),
        [c for c in cells if c.paths == "class"],
        lambda cell, label: neurons.of_class(cell.method, label, cell.topk, cell.fraction, 0),
        material.classes,
        lambda done: work.progress(done, None),
    )
    return forgetting_analysis(found, settings, about)


def _scopes(settings: EditSection, view: VitView) -> list[str]:
    return list(dict.fromkeys(view.scope if s == "auto" else s for s in settings.scope))


def _cells(settings: EditSection, found: FinishedRun, view: VitView) -> list[Cell]:
    """Every combination that was asked for, checked against the network and the run."""
    blocks, stored = len(view.widths), found.table.neurons.shape[2]
    for scope in _scopes(settings, view):
        view.tokens(scope)  # type: ignore[arg-type]  # refuses a scope the model does not have
    if settings.edit != "keep" and settings.fraction != [1.0]:
        raise UsageError(
            f"{setting('edit.fraction')} is the share of the other neurons that goes, which only "
            f"{setting('edit.edit', 'keep')} removes, got {setting('edit.edit', settings.edit)}"
        )
    if settings.others and "class" not in settings.paths:
        raise UsageError(
            f"{setting('edit.others')} edits the neurons of one class for images of others, and "
            f"{setting('edit.paths', ','.join(settings.paths))} names none of a class",
            hint=f"add {setting('edit.paths', 'class')}",
        )
    if settings.others and len(found.table.classes) < 2:
        raise UsageError(
            f"{setting('edit.others')} needs a run of several classes, got one",
            hint=f"discover with more {setting('data.classes')}",
        )
    topk = settings.topk or [found.settings.topk]
    if "image" in settings.paths and max(topk) > stored:
        raise UsageError(
            f"{setting('edit.topk')} must be at most {stored}, the neurons per block in this run's "
            f"paths, got {max(topk)}",
            hint=f"discover with a larger {setting('discover.topk')}, or take classes' neurons: "
            f"{setting('edit.paths', 'class')}",
        )
    if max(topk) > min(view.widths):
        raise UsageError(
            f"{setting('edit.topk')} must be at most {min(view.widths)}, the hidden units of the "
            f"narrowest block, got {max(topk)}"
        )
    depths = settings.depth or [blocks]
    if max(depths) > blocks:
        raise UsageError(
            f"{setting('edit.depth')} must be at most {blocks}, the blocks, got {max(depths)}"
        )
    methods = settings.methods or [found.settings.method]
    axes: tuple[list[Any], ...] = (
        list(methods), list(settings.paths), topk, settings.fraction, depths,
        _scopes(settings, view),
    )  # fmt: skip
    return [Cell(*values) for values in product(*(list(dict.fromkeys(axis)) for axis in axes))]


# ---------------------------------------------------------------- images and their neurons


@dataclass
class _Material:
    """The images to evaluate on, and where neurons come from."""

    images: Images
    positions: list[int] | None  # of the images to evaluate on; None: those that `accepts`
    of_images: dict[str, PathTable]  # per method, the paths of the evaluated images
    of_classes: dict[str, PathTable]  # per method, the paths that classes' neurons come from
    own: set[str] = field(default_factory=set)  # ids that are the run's own, left out
    notes: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def classes(self) -> list[int]:
        """The classes with paths."""
        return next(iter(self.of_classes.values())).classes

    def batches(self) -> Iterator[tuple[Batch, list[int]]]:
        """Batches, and which of their images are evaluated on."""
        labels, wanted = set(self.classes), set(self.positions or ())
        for batch in self.images.batches(
            indices=self.positions if self.images.source.items is not None else None
        ):
            rows = [
                i
                for i, (id, position) in enumerate(zip(batch.ids, batch.positions, strict=True))
                if int(batch.labels[i]) in labels
                and id not in self.own
                and (self.positions is None or position in wanted)
            ]
            if self.positions is None:
                self.left_out += len(batch) - len(rows)
            if rows:
                yield batch, rows

    def text(self, found: FinishedRun) -> str:
        """Which images these are."""
        notes = list(self.notes)
        if self.left_out:
            notes.append(
                f"{plural(self.left_out, 'image')} left out: the run's own, or of a class "
                "without paths."
            )
        return " ".join(notes)


def _material(
    found: FinishedRun,
    settings: EditSection,
    data: DataSection | None,
    network: Network,
    work: Work,
) -> _Material:
    methods: list[str] = list(dict.fromkeys(settings.methods or [found.settings.method]))
    of_classes = {m: paths_of(found, m, work) for m in methods}
    per_class = any(p != "image" for p in settings.paths)
    if data is None:
        images = _open(found.recipe.data, found.recipe.data.train, network, network.names, work)
        if not per_class:
            table = found.table
            note = f"All of the run: {plural(len(table), 'image')}."
            return _Material(images, table.positions.tolist(), of_classes, of_classes, notes=[note])
        take, hold, alone = divide(found.table)
        if not len(hold):
            raise DataError(
                "every class of the run has one image: none is left to evaluate on",
                hint=f"name others with {setting('data.val', 'SOURCE')}",
            )
        notes = [
            f"The neurons of a class come from one half of its images in the run ({len(take)} in "
            f"all), the numbers from the other half ({len(hold)}); the halves are disjoint."
        ]
        if alone:
            names = ", ".join(found.name(c) for c in alone[:8]) + (", ..." if alone[8:] else "")
            notes.append(f"Classes with one image have none to evaluate on: {names}.")
        voting = {m: _rows(table, take) for m, table in of_classes.items()}
        positions = found.table.positions[hold].tolist()
        return _Material(images, positions, of_classes, voting, notes=notes)
    given = data.model_dump(exclude_unset=True, exclude_none=True)
    same = {k: getattr(found.recipe.data, k) for k in ("class_map", *PREPROCESSING)}
    data = DataSection(**{**same, **given})  # prepared as the run's images were
    known = network_names(network, run_names(found.result))
    images = _open(data, data.val, network, known, work)
    of_images: dict[str, PathTable] = {}
    if "image" in settings.paths:
        section = data.model_copy(update={"train": data.val})
        of_images = {m: paths_of(found, m, work, data=section) for m in methods}
    own = _same_images(found, images, network, work) if per_class else set()
    note = f"The neurons come from the run's images, the numbers from {data.val}."
    return _Material(images, None, of_images, of_classes, own, [note])


def _open(
    section: DataSection,
    spec: str | None,
    network: Network,
    names: KnownNames | None,
    work: Work,
) -> Images:
    return open_images(
        spec, section, network.info, work, asked="data.val", on_bad="skip", names=names
    )


def _rows(table: PathTable, rows: np.ndarray) -> PathTable:
    return PathTable(
        table.neurons[rows],
        table.scores[rows],
        table.labels[rows],
        table.ids[rows],
        table.positions[rows],
    )


def _same_images(found: FinishedRun, images: Images, network: Network, work: Work) -> set[str]:
    """Ids in both sources whose images are the same, pixel for pixel."""
    if images.source.items is None:
        return set(found.table.ids.tolist())  # a stream's ids are those of its records
    place = {item.id: i for i, item in enumerate(images.source.items)}
    both = [id for id in found.table.ids.tolist() if id in place]
    if not both:
        return set()
    spec = found.recipe.data.train
    if spec == images.source.spec:
        return set(both)
    own = _open(found.recipe.data, spec, network, network.names, work).source
    if own.items is None:
        return set(both)
    there = {item.id: i for i, item in enumerate(own.items)}

    def same(id: str) -> bool:
        try:
            ours, theirs = own.load(there[id]), images.source.load(place[id])
        except UnreadableImage:
            return True  # it is skipped when it is read
        return np.array_equal(np.asarray(ours), np.asarray(theirs))

    return {id for id in both if same(id)}


# ---------------------------------------------------------------- measuring


def _measure(
    view: VitView,
    material: _Material,
    cells: Sequence[Cell],
    settings: EditSection,
    work: Work,
) -> tuple[Measured, Tensor]:
    """Probabilities of the true class and hits of every image, un-edited and in every cell; and
    the un-edited network's top-1."""
    neurons = _Neurons(view, material, settings)
    known = torch.tensor(material.classes)
    labels: list[Tensor] = []
    base: list[Tensor] = []
    predicted: list[Tensor] = []
    edited: list[list[Tensor]] = [[] for _ in cells]
    outside = done = 0
    total = None if material.positions is None else len(material.positions)
    for batch, rows in material.batches():
        x, y = batch.images[rows].to(work.where), batch.labels[rows]
        with torch.no_grad():
            logits = view.model(x).float().cpu()
        predicted.append(logits.argmax(1))
        outside += int((~torch.isin(predicted[-1], known)).sum())
        guess = known[logits[:, known].argmax(1)]
        labels.append(y)
        base.append(_numbers(logits, y))
        positions = [batch.positions[i] for i in rows]
        for values, cell in zip(edited, cells, strict=True):
            draws = []
            for seed in range(settings.seeds if cell.fraction < 1 else 1):
                factors = neurons.factors(cell, seed, y, guess, positions)
                out = edited_logits(view, x, factors, scope=cell.scope, depth=cell.depth)
                draws.append(_numbers(out.float().cpu(), y))
            values.append(torch.stack(draws).mean(0))
        done += len(rows)
        work.progress(done, total)
    if not labels:
        raise DataError(
            "no image is left to evaluate on",
            hint="give images that are not the run's, of classes that it has paths of",
        )
    measured = Measured(
        labels=torch.cat(labels),
        base=torch.cat(base),
        cells={cell: torch.cat(values) for cell, values in zip(cells, edited, strict=True)},
        kept={cell: neurons.kept(cell) for cell in cells if cell.paths != "image"},
        outside=outside,
    )
    return measured, torch.cat(predicted)


def _numbers(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, 2]: the true class's probability, and 1 where it is the prediction."""
    right = (logits.argmax(1) == labels).to(torch.float64)
    return torch.stack([metrics.true_probability(logits, labels), right], 1)


class _Neurons:
    """The factors of images: their own path's, their class's, their predicted class's, or the
    union of all classes'."""

    def __init__(self, view: VitView, material: _Material, settings: EditSection) -> None:
        self.widths = view.widths
        self.material, self.settings = material, settings
        self.place = {
            m: {int(p): i for i, p in enumerate(table.positions)}
            for m, table in material.of_images.items()
        }
        self.of_class = lru_cache(maxsize=CACHED)(self._of_class)

    def factors(
        self, cell: Cell, seed: int, labels: Tensor, guess: Tensor, positions: Sequence[int]
    ) -> Factors:
        if cell.paths == "image":
            return stack([self._of_image(cell, seed, p) for p in positions])
        if cell.paths == "union":
            return self.of_class(cell.method, -1, cell.topk, cell.fraction, seed)
        chosen = labels if cell.paths == "class" else guess
        rows = [
            self.of_class(cell.method, c, cell.topk, cell.fraction, seed) for c in chosen.tolist()
        ]
        return stack(rows)

    def kept(self, cell: Cell) -> list[list[int]]:
        """How many neurons of each block each class's path holds; of the union for `union`."""
        labels = [-1] if cell.paths == "union" else self.material.classes
        return [[int(m.sum()) for m in self._masks(cell.method, c, cell.topk)] for c in labels]

    def _of_image(self, cell: Cell, seed: int, position: int) -> Factors:
        row = self.place[cell.method][position]
        path = self.material.of_images[cell.method].neurons[row, :, : cell.topk]
        return self._scaled(members(path.tolist(), self.widths), cell.fraction, seed, position)

    def _of_class(self, method: str, label: int, topk: int, fraction: float, seed: int) -> Factors:
        return self._scaled(self._masks(method, label, topk), fraction, seed, label + 1)

    def _masks(self, method: str, label: int, topk: int) -> list[Tensor]:
        table = self.material.of_classes[method]
        if label >= 0:
            return members(class_top(table.neurons, table.labels, label, topk), self.widths)
        every = [self._masks(method, c, topk) for c in table.classes]
        return [torch.stack(block).any(0) for block in zip(*every, strict=True)]

    def _scaled(self, masks: list[Tensor], fraction: float, seed: int, who: int) -> Factors:
        if self.settings.edit == "keep":
            g = torch.Generator().manual_seed(seed * 1_000_003 + who)
            return keep_factors(masks, fraction, g)
        return path_factors(masks, self.settings.edit, self.settings.factor)

"""What pruning begins with: the network, a run's paths, and the calibration images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from npprune.core.attribution.votes import attribution, class_top, class_votes
from npprune.core.view import VitView
from npprune.data.labels import KnownNames
from npprune.errors import StoreError, UsageError, setting
from npprune.models.surgery import check_prunable, cut_head
from npprune.models.tokens import apply_tokens, tokens_of
from npprune.models.view import make_view
from npprune.pipeline.common.inputs import (
    PREPROCESSING,
    Images,
    Network,
    check_weights,
    network_names,
    open_images,
    open_network,
    run_names,
)
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.measuring import Paths
from npprune.recipe import DataSection, ModelSection
from npprune.records import UNKNOWN_WEIGHTS
from npprune.store.path_store import PathTable, run_table
from npprune.store.runs import RunFolder

CALIBRATION_IMAGES = 1000
HELD_OUT = 10  # one image of so many is not used for fitting, but for the prediction


def origin(
    source: Path | ModelSection, data: DataSection
) -> tuple[ModelSection, DataSection, RunFolder | None]:
    """The network, the images (a run's own where none were named) and the run."""
    if isinstance(source, ModelSection):
        return source, data, None
    run = RunFolder(source)
    if run.read_manifest().model.source.sha256 == UNKNOWN_WEIGHTS:
        raise StoreError(
            f"`{source}` was imported, and nothing says of which weights its paths are",
            hint="`npprune paths import ... --checkpoint FILE --out FOLDER` names them",
        )
    recipe = run.read_recipe()
    given = data.model_dump(exclude_unset=True, exclude_none=True)
    if "calibration" in given or "train" in given:
        base = {k: getattr(recipe.data, k) for k in ("class_map", *PREPROCESSING)}
    else:
        base = recipe.data.model_dump()
    # paths may be those of the released program's head or of a probe; what is pruned is the network
    model = recipe.model.model_copy(update={"released_head": False, "probe": None})
    return model, DataSection(**{**base, **given}), run


@dataclass
class Opened:
    """What pruning and studying begin with.

    `view` is of the network with the head that it will have; `classes` are those chosen, None: all.
    """

    network: Network
    view: VitView
    images: Images  # to calibrate on
    names: KnownNames | None  # of the classes, as far as known
    classes: list[int] | None
    run: RunFolder | None
    outputs: list[int] | None  # that `view` has; None: all


def open_source(
    model: ModelSection,
    data: DataSection,
    run: RunFolder | None,
    work: Work,
    *,
    topk: int | None = None,
    keep_head: bool = False,
) -> Opened:
    """The network, checked to be prunable, and the calibration images.

    Args:
        topk: path neurons per block of each class; must fit the blocks.
        keep_head: all outputs stay, although classes were chosen.
    """
    network = open_network(model, work)
    check_prunable(network.model)
    view = _measurable(network.model)
    if topk is not None and topk > min(view.widths):
        raise UsageError(
            f"{setting(f'{work.stage}.topk')} must be at most {min(view.widths)}, the hidden units "
            f"of the narrowest block, got {topk}"
        )
    names = network_names(network, run_names(run.read_result()) if run is not None else None)
    images = open_images(
        data.calibration or data.train, data, network.info, work,
        asked="data.calibration", on_bad="skip", names=names,
    )  # fmt: skip
    classes = images.source.selected if data.classes is not None else None
    outputs = classes if network.info.num_classes and not keep_head else None
    if outputs is not None:  # what is measured is the network with the head that it will have
        view = _measurable(cut_head(network.model, outputs))
    return Opened(network, view, images, names, classes, run, outputs)


def _measurable(model: nn.Module) -> VitView:
    """The network with every token of its last block computed, which changes no logit."""
    merged, last = tokens_of(model)
    return make_view(apply_tokens(copy.deepcopy(model), merged) if last else model)


def read_paths(opened: Opened, topk: int | None) -> Paths | None:
    """What the classes' paths say of every neuron; None without a run.

    Raises:
        StoreError: the paths are of other weights.
        UsageError: a class has no paths.
    """
    run, network, classes = opened.run, opened.network, opened.classes
    if run is None:
        return None
    check_weights(network, run.read_manifest().model.source.sha256, run.path)
    table = run_table(run)
    wanted = table.classes if classes is None else [c for c in classes if c in table.classes]
    missing = [] if classes is None else [c for c in classes if c not in table.classes]
    if not wanted or missing:
        raise UsageError(
            f"`{run.path}` has no paths of class {(missing or [0])[0]}",
            hint="discover them first, or choose among the classes it holds",
        )
    return _vote(table, wanted, opened.view, topk)


def _vote(table: PathTable, wanted: Sequence[int], view: VitView, topk: int | None) -> Paths:
    """Every class counts the same, however many images it has."""
    count = topk or table.neurons.shape[2]
    union: list[set[int]] = [set() for _ in view.widths]
    votes = [torch.zeros(h, dtype=torch.float64) for h in view.widths]
    scores = [torch.zeros(h, dtype=torch.float64) for h in view.widths]
    for c in wanted:
        images = int((table.labels == c).sum())
        for l, best in enumerate(class_top(table.neurons, table.labels, c, count)):
            union[l].update(best)
        for l, v in enumerate(class_votes(table.neurons, table.labels, c, view.widths)):
            votes[l] += torch.from_numpy(v) / images
        own = table.where(c)
        for l, v in enumerate(attribution(own.neurons, own.scores, view.widths)):
            scores[l] += torch.from_numpy(v) / images
    return Paths([sorted(u) for u in union], votes, scores, alone=topk is not None)


@dataclass
class DecodedImages:
    """Images [b, 3, H, W] and labels [b], decoded, in batches."""

    images: list[Tensor]
    labels: list[Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.images, self.labels, strict=True))

    def __len__(self) -> int:
        return sum(len(y) for y in self.labels)


def calibration_images(
    images: Images, limit: int | None, work: Work
) -> tuple[DecodedImages, DecodedImages]:
    """The calibration images and those held out of them, evenly over the source's order."""
    limit = limit or CALIBRATION_IMAGES
    fit, held = DecodedImages([], []), DecodedImages([], [])
    positions = images.evenly(limit)
    total = limit if positions is None else len(positions)
    seen = 0
    for batch in images.batches(indices=positions):
        x, y = batch.images[: limit - seen], batch.labels[: limit - seen]
        out = torch.arange(seen, seen + len(y)) % HELD_OUT == HELD_OUT - 1
        for part, mask in ((held, out), (fit, ~out)):
            if bool(mask.any()):
                part.images.append(x[mask])
                part.labels.append(y[mask])
        seen += len(y)
        work.progress(seen, total, stage="calibration")
        if seen >= limit:
            break
    if len(fit) == 0:
        raise UsageError(
            f"no image of `{images.source.spec}` could be read", hint="give others to calibrate on"
        )
    return fit, held

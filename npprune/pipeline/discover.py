"""Discover: one path for each image, gathered into the shards of a path store.

The images stand in a fixed order and form a fixed grid of batches; a shard is a run of whole
batches. So the paths do not depend on the size of the shards, on where a run was interrupted, or
on how many processes shared the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npprune.core.methods import find_paths
from npprune.core.metrics import mean_interval
from npprune.core.paths import PathBatch
from npprune.core.quadrature import DEFAULT_POINTS
from npprune.core.view import VitView
from npprune.core.votes import class_top, frequency
from npprune.data.loading import Batch
from npprune.errors import DataError, UsageError
from npprune.models.view import make_view
from npprune.pipeline.device import environment, resolve_device
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.inputs import Images, Network, class_names, open_images, open_network
from npprune.pipeline.memory import halving, images_that_fit
from npprune.pipeline.processes import Processes, processes
from npprune.recipe import DataSection, DiscoverSection, ModelSection, Recipe, recipe_yaml
from npprune.records import DiscoverySummary, Manifest, Result, digest, to_dict
from npprune.store.paths import PathStore, PathTable, ShardData
from npprune.store.runs import RunFolder

STAGE = "discover"
SHOWN = 12  # most frequent neurons of a block that the result holds


def discover(
    model: ModelSection,
    data: DataSection,
    settings: DiscoverSection,
    out: Path,
    *,
    device: str = "auto",
    seed: int = 0,
    emit: Emit = ignore,
    dry_run: bool = False,
) -> Result:
    """Find the paths of all images and store them in the run folder `out`.

    Run again to resume: finished shards are never computed twice. Under torchrun the processes
    share the shards. A dry run opens everything and computes nothing.

    Raises:
        NpPruneError: what is wrong with model, data, settings or folder.
    """
    team = processes()
    where, reason = resolve_device(team.device(device))
    network = open_network(model, where, emit, STAGE)
    images = open_images(
        data.train, data, network.info, flag="--data", on_bad="skip", stage=STAGE, emit=emit
    )
    view = make_view(network.model)
    scope = view.scope if settings.scope == "auto" else settings.scope
    view.tokens(scope)  # refuses a scope that the model does not have
    if settings.topk > min(view.widths):
        raise UsageError(
            f"`--topk` must be at most {min(view.widths)}, the hidden units of the narrowest "
            f"block, got {settings.topk}"
        )
    manifest = _manifest(out.name, network, images, settings, scope, where, reason, seed)
    emit(Event(STAGE, f"{network.info.source.architecture} on {where} ({reason})"))
    if dry_run:
        return _result(manifest, network, images, None)
    recipe = Recipe(name=out.name, model=model, data=data, discover=settings, seed=seed)
    folder, started = RunFolder(out), time.perf_counter()
    with team.first(folder.lock()):
        team.on_first(lambda: folder.create_or_resume(manifest, recipe_yaml(recipe)))
        store = PathStore(folder.paths_folder, manifest.settings_sha256)
        search = _Search(view, settings, scope, seed, where, emit)
        count = _compute(store, images, search, settings, team, emit)
        team.wait()
        table = store.read_all(count)
        images.skipped = table.skipped
        if len(table) == 0:
            raise DataError("no image could be read", hint="the paths of all of them are above")
        summary = _summary(table, settings, scope, images, time.perf_counter() - started)
        result = _result(manifest, network, images, summary)
        if folder.result_path.is_file():
            earlier = folder.read_result()
            result.variants, result.analyses = earlier.variants, earlier.analyses
            if earlier.discovery is not None and not search.computed:
                summary.seconds = earlier.discovery.seconds
        team.on_first(lambda: folder.write_result(result))
        team.on_first(
            lambda: folder.append_event({"stage": STAGE, "images": len(table), "shards": count})
        )
    return result


@dataclass
class _Search:
    """Finds the paths of one batch, on the device, within its memory."""

    view: VitView
    settings: DiscoverSection
    scope: Any
    seed: int
    device: torch.device
    emit: Emit
    limit: int | None = None
    computed: int = 0

    def __call__(self, images: Tensor, labels: Tensor, position: int) -> PathBatch:
        s = self.settings
        if self.limit is None:
            points = s.points or DEFAULT_POINTS[s.quadrature]
            self.limit = images_that_fit(self.view, images[:1], points, s.memory, self.device)
            if self.limit < s.batch_size:
                self._say(self.limit, "memory")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)

        def paths(lo: int, hi: int) -> PathBatch:
            return find_paths(
                self.view,
                images[lo:hi].to(self.device),
                labels[lo:hi].to(self.device),
                topk=s.topk,
                method=s.method,
                scope=self.scope,
                rule=s.quadrature,
                points=s.points,
                accumulation=s.accumulation,
                generator=generator,
            )

        parts, limit = halving(paths, len(images), self.limit)
        if limit < self.limit:
            self._say(limit, "out of memory")
        self.limit = limit
        self.computed += len(images)
        return PathBatch(
            torch.cat([p.neurons.cpu() for p in parts]), torch.cat([p.scores.cpu() for p in parts])
        )

    def _say(self, limit: int, why: str) -> None:
        self.emit(Event(STAGE, f"{why}: {limit} images at a time", level="warning"))


def _compute(
    store: PathStore,
    images: Images,
    search: _Search,
    settings: DiscoverSection,
    team: Processes,
    emit: Emit,
) -> int:
    """Compute the missing shards of this process; returns how many shards there are in all."""
    done, count = 0, 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        emit(Event(STAGE, level="progress", done=done, total=images.source.length))

    for i, batches in _shards(images, settings):
        for missing in range(count, i):  # a stretch of a stream that could not be read at all
            store.write_shard(missing, _shard([], images, search, advance))
        count = i + 1
        if store.done(i):
            advance(len(store.read_shard(i).ids))
        elif i % team.count == team.rank:
            if (state := store.state(i)) != "absent":
                emit(Event(STAGE, f"shard {i} is {state}: computed again", level="warning"))
            store.write_shard(i, _shard(batches, images, search, advance))
    return count


def _shards(images: Images, settings: DiscoverSection) -> Iterator[tuple[int, Iterable[Batch]]]:
    """Shard numbers with their batches, read only when they are iterated."""
    size = settings.batch_size
    per_shard = max(1, settings.shard_size // size) * size
    if images.source.items is None:
        yield from groupby(images.batches(size), lambda batch: batch.positions[0] // per_shard)
        return
    total = len(images.source.items)
    for i, start in enumerate(range(0, total, per_shard)):
        yield i, images.batches(size, range(start, min(start + per_shard, total)))


def _shard(
    batches: Iterable[Batch], images: Images, search: _Search, advance: Callable[[int], None]
) -> ShardData:
    """The paths of one shard."""
    blocks, topk = len(search.view.widths), search.settings.topk
    before = len(images.skipped)
    neurons, scores, labels = [np.zeros((0, blocks, topk), np.int64)], [np.zeros(0)], [_NONE]
    ids: list[str] = []
    positions: list[int] = []
    for batch in batches:
        found = search(batch.images, batch.labels, batch.positions[0])
        neurons.append(found.neurons.numpy())
        scores.append(found.scores.double().numpy())
        labels.append(batch.labels.numpy())
        ids += batch.ids
        positions += batch.positions
        advance(len(batch))
    return ShardData(
        np.concatenate(neurons),
        np.concatenate(scores),
        np.concatenate(labels),
        ids,
        positions,
        images.skipped[before:],
    )


_NONE = np.zeros(0, np.int64)


def _manifest(
    name: str,
    network: Network,
    images: Images,
    settings: DiscoverSection,
    scope: str,
    where: torch.device,
    reason: str,
    seed: int,
) -> Manifest:
    """The manifest of this run; its settings are what decides the bits of the paths."""
    deciding: dict[str, Any] = settings.model_dump(exclude={"shard_size", "memory"})
    deciding |= {
        "scope": scope,
        "points": settings.points or DEFAULT_POINTS[settings.quadrature],
        "shard_images": max(1, settings.shard_size // settings.batch_size) * settings.batch_size,
        "model": network.info.source.sha256,
        "data": images.source.info().sha256 or images.source.spec,
        "preprocessing": to_dict(images.preprocessing),
        "on_bad_image": images.on_bad,
        "device": where.type,
    }
    if settings.method == "random":
        deciding["seed"] = seed
    return Manifest(
        name=name,
        created=_now(),
        environment=environment(where, reason, seed),
        model=network.info,
        data=images.source.info(),
        settings=deciding,
        settings_sha256=digest(deciding),
    )


def _summary(
    table: PathTable, settings: DiscoverSection, scope: str, images: Images, seconds: float
) -> DiscoverySummary:
    return DiscoverySummary(
        method=settings.method,
        scope=scope,
        quadrature=settings.quadrature,
        points=settings.points or DEFAULT_POINTS[settings.quadrature],
        topk=settings.topk,
        accumulation=settings.accumulation,
        data=images.info(),
        images=len(table),
        classes=len(table.classes),
        seconds=seconds,
        mean_score=mean_interval(torch.from_numpy(table.scores)),
        frequency=frequency(table.neurons, SHOWN),
        class_paths={
            c: class_top(table.neurons, table.labels, c, settings.topk) for c in table.classes
        },
    )


def _result(
    manifest: Manifest, network: Network, images: Images, summary: DiscoverySummary | None
) -> Result:
    return Result(
        name=manifest.name,
        created=manifest.created,
        environment=manifest.environment,
        model=network.info,
        classes=class_names(images, network.info.num_classes),
        discovery=summary,
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

"""Discover: one path for each image, gathered into the shards of a path store.

The images stand in a fixed order and form a fixed grid of batches; a shard is a run of whole
batches. So the paths do not depend on the size of the shards, on where a run was interrupted, or
on how many processes shared the work.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from npprune.core.methods import find_paths, points_of
from npprune.core.metrics import mean_interval
from npprune.core.paths import PathBatch
from npprune.core.quadrature import default_points, rule_for
from npprune.core.view import VitView
from npprune.core.votes import class_top, frequency
from npprune.data.labels import KnownNames
from npprune.data.loading import Batch
from npprune.errors import DataError, UsageError
from npprune.models.view import make_view
from npprune.pipeline.device import check_shortcuts, environment, products, resolve_device
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.inputs import (
    Images,
    Network,
    class_names,
    network_names,
    open_images,
    open_network,
)
from npprune.pipeline.memory import halving, images_that_fit
from npprune.pipeline.processes import processes
from npprune.pipeline.results import add_command
from npprune.pipeline.shards import PARTS, Share
from npprune.pipeline.steady import steady
from npprune.recipe import DataSection, DiscoverSection, ModelSection, Recipe, recipe_yaml
from npprune.records import DiscoverySummary, Manifest, Result, digest, to_dict
from npprune.store.paths import PathStore, PathTable
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
    command: str = "",
    names: KnownNames | None = None,
) -> Result:
    """Find the paths of all images and store them in the run folder `out`.

    Run again to resume: finished shards are never computed twice. Under torchrun the processes
    share the shards. A dry run opens everything and computes nothing. `names`: what the classes
    are called, where the network itself does not say.

    Raises:
        NpPruneError: what is wrong with model, data, settings or folder.
    """
    team = processes()
    where, reason = resolve_device(team.device(device))

    def open_all() -> tuple[Network, Images, _Search, Manifest]:
        network = open_network(model, where, emit, STAGE)
        images = open_images(
            data.train, data, network.info, flag="--data", on_bad="skip", stage=STAGE, emit=emit,
            names=network_names(network, names),
        )  # fmt: skip
        search = _search(network, settings, seed, where, team.local_count, emit)
        manifest = _manifest(out.name, network, images, search, where, reason)
        return network, images, search, manifest

    network, images, search, manifest = team.together(open_all)
    emit(Event(STAGE, f"{network.info.source.architecture} on {where} ({reason})"))
    if dry_run:
        return _result(manifest, network, images, None)
    recipe = Recipe(name=out.name, model=model, data=data, discover=settings, seed=seed)
    folder = RunFolder(out)
    with contextlib.ExitStack() as held:
        team.on_first(lambda: held.enter_context(folder.lock()))
        team.on_first(lambda: folder.create_or_resume(manifest, recipe_yaml(recipe)))
        team.together(folder.read_manifest)  # on another machine: is the folder shared?
        store = PathStore(folder.paths_folder, manifest.settings_sha256)
        share = Share(store, images, search, _per_shard(settings), team, emit)
        count = share.compute()
        timing = share.timing()

        def finish() -> Result:
            table = store.read_all(count)
            images.skipped = table.skipped
            if len(table) == 0:
                raise DataError("no image could be read", hint="the warnings above name them")
            summary = _summary(table, search.settings, images, timing)
            result = _result(manifest, network, images, summary)
            _keep_earlier(folder, result)
            add_command(result, command)
            folder.write_result(result)
            folder.append_event({"stage": STAGE, "images": len(table), **timing})
            _say_timing(timing, len(table), table.skipped, emit)
            return result

        return team.on_first(finish)


@dataclass
class _Search:
    """Finds the paths of one batch, on the device, within its memory."""

    view: VitView
    settings: DiscoverSection  # nothing in it is `auto`
    seed: int
    device: torch.device
    processes: int  # that share this machine
    emit: Emit
    limit: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and neurons per block of a path."""
        return len(self.view.widths), self.settings.topk

    def __call__(self, batch: Batch) -> PathBatch:
        s, images, labels = self.settings, batch.images, batch.labels
        if self.limit is None:
            points = s.points or default_points(s.quadrature, s.scope)
            self.limit = images_that_fit(
                self.view, images[:1], points, s.memory, self.device, processes=self.processes
            )
            if self.limit < s.batch_size:
                self._say("memory", self.limit)
        # `random` draws by the place in the source: it does not matter who draws, or when.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch.positions[0])

        def paths(lo: int, hi: int) -> PathBatch:
            return find_paths(
                self.view,
                images[lo:hi].to(self.device),
                labels[lo:hi].to(self.device),
                topk=s.topk,
                method=s.method,
                scope=s.scope,
                rule=s.quadrature,
                points=s.points,
                accumulation=s.accumulation,
                generator=generator,
            )

        with steady(self.device), products(s.precision, self.device):
            parts, limit = halving(paths, len(images), self.limit)
        if limit < self.limit:
            self._say("out of memory", limit)
        self.limit = limit
        return PathBatch(
            torch.cat([p.neurons.cpu() for p in parts]), torch.cat([p.scores.cpu() for p in parts])
        )

    def _say(self, why: str, limit: int) -> None:
        images = "1 image" if limit == 1 else f"{limit} images"
        self.emit(Event(STAGE, f"{why}: {images} at a time", level="warning"))


def _search(
    network: Network,
    settings: DiscoverSection,
    seed: int,
    device: torch.device,
    processes: int,
    emit: Emit,
) -> _Search:
    check_shortcuts(settings.precision, settings.compile, device)
    view = make_view(network.model, precision=settings.precision, compiled=settings.compile)
    scope = view.scope if settings.scope == "auto" else settings.scope
    view.tokens(scope)  # refuses a scope that the model does not have
    if settings.topk > min(view.widths):
        raise UsageError(
            f"`--topk` must be at most {min(view.widths)}, the hidden units of the narrowest "
            f"block, got {settings.topk}"
        )
    found = {"scope": scope, "quadrature": rule_for(settings.quadrature, scope)}
    settings = settings.model_copy(update=found)
    return _Search(view, settings, seed, device, processes, emit)


def _per_shard(settings: DiscoverSection) -> int:
    """Images of a shard: whole batches."""
    return max(1, settings.shard_size // settings.batch_size) * settings.batch_size


def _manifest(
    name: str,
    network: Network,
    images: Images,
    search: _Search,
    where: torch.device,
    reason: str,
) -> Manifest:
    """The manifest of this run; its settings are what decides the bits of the paths.

    `memory` is not among them: a run that was too large may go on with less.
    """
    settings, seed = search.settings, search.seed
    deciding: dict[str, Any] = settings.model_dump(exclude={"shard_size", "memory"})
    deciding |= {
        **_points(settings),
        "shard_images": _per_shard(settings),
        "model": network.info.source.sha256,
        "data": images.source.info().sha256 or _stream_settings(images),
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


def _stream_settings(images: Images) -> dict[str, Any]:
    """What decides the images of a stream, which are not known before it was read."""
    fields = {"class_map", "classes", "images_per_class"}
    return {"spec": images.source.spec, **images.section.model_dump(include=fields)}


def _keep_earlier(folder: RunFolder, result: Result) -> None:
    """Take over what later stages wrote, and the times where nothing was left to compute."""
    if not folder.result_path.is_file():
        return
    earlier = folder.read_result()
    result.variants, result.analyses = earlier.variants, earlier.analyses
    result.commands = earlier.commands
    if earlier.discovery and result.discovery and not result.discovery.timing["images"]:
        result.discovery.seconds = earlier.discovery.seconds
        result.discovery.timing = earlier.discovery.timing


def _say_timing(timing: dict[str, float], stored: int, skipped: list[str], emit: Emit) -> None:
    """Where the time went, in one line."""
    images, seconds = int(timing["images"]), timing["seconds"]
    if images == 0:
        words = f"{stored} images were found before: nothing to compute"
    else:
        whole = seconds * timing["processes"]
        parts = ", ".join(f"{part} {timing[part] / whole:.0%}" for part in PARTS)
        words = f"{images} images in {seconds:.1f} s ({images / seconds:.1f} images/s): {parts}"
    if skipped:
        words += f"; {len(skipped)} skipped"
    emit(Event(STAGE, words))


def _points(settings: DiscoverSection) -> dict[str, int]:
    """Points of the integral, and of the first block's where those are more."""
    s = settings
    points, first = points_of(s.method, s.quadrature, s.scope, s.points)
    return {"points": points} | ({"first_points": first} if first != points else {})


def _summary(
    table: PathTable,
    settings: DiscoverSection,
    images: Images,
    timing: dict[str, float],
) -> DiscoverySummary:
    return DiscoverySummary(
        method=settings.method,
        scope=settings.scope,
        quadrature=settings.quadrature,
        **_points(settings),
        topk=settings.topk,
        accumulation=settings.accumulation,
        data=images.info(),
        images=len(table),
        classes=len(table.classes),
        seconds=timing["seconds"],
        timing=timing,
        mean_score=mean_interval(torch.from_numpy(table.scores)),
        frequency=frequency(table.neurons, SHOWN),
        class_paths={
            c: class_top(table.neurons, table.labels, c, settings.topk) for c in table.classes
        },
        precision=settings.precision,
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

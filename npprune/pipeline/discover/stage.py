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

from npprune.core.attribution.methods import find_paths
from npprune.core.attribution.quadrature import Integral
from npprune.core.attribution.search import PathBatch
from npprune.core.attribution.votes import class_top, frequency
from npprune.core.metrics import mean_interval
from npprune.core.view import VitView
from npprune.data.labels import KnownNames
from npprune.data.loading import Batch
from npprune.errors import DataError, UsageError, plural, setting
from npprune.files import keeping
from npprune.models.view import make_view
from npprune.pipeline.common.device import check_shortcuts, products
from npprune.pipeline.common.inputs import (
    Images,
    Network,
    class_names,
    network_names,
    open_images,
    open_network,
)
from npprune.pipeline.common.memory import halving, images_that_fit
from npprune.pipeline.common.outputs import check_run, reads_of
from npprune.pipeline.common.results import add_command
from npprune.pipeline.common.threads import same_on_any_threads
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.probing import probe_arrays, probe_sha256, probed
from npprune.pipeline.discover.shards import PARTS, Share, shards_of
from npprune.recipe import DataSection, DiscoverSection, ModelSection, Recipe, recipe_yaml
from npprune.records import DiscoverySummary, Manifest, Result, digest, to_dict
from npprune.store import atomic
from npprune.store.path_store import PathStore, PathTable
from npprune.store.runs import RunFolder

STAGE = "discover"
SHOWN = 12  # most frequent neurons of a block that the result holds


def discover(
    model: ModelSection,
    data: DataSection,
    settings: DiscoverSection,
    out: Path,
    *,
    work: Work | None = None,
    dry_run: bool = False,
    names: KnownNames | None = None,
) -> Result:
    """Find the paths of all images and store them in the run folder `out`.

    Run again to resume: finished shards are never computed twice. Under torchrun the processes
    share the shards. A dry run opens everything and computes nothing. `names`: what the classes
    are called, where the network itself does not say.

    Raises:
        NpPruneError: what is wrong with model, data, settings or folder.
    """
    work = (work or Work()).on(STAGE)
    team = work.team
    where = work.where
    team.on_first(lambda: check_run(out, reads_of(model), write=not dry_run))

    def open_all() -> tuple[Network, Images, _Search, Manifest]:
        network = open_network(model, work)
        images = open_images(
            data.train, data, network.info, work, asked="data.train", on_bad="skip",
            names=network_names(network, names),
        )  # fmt: skip
        if network.info.num_classes == 0:
            network = probed(network, images, RunFolder(out).probe_path, work)
        search = _search(network, settings, work)
        manifest = _manifest(out.name, network, images, search)
        return network, images, search, manifest

    network, images, search, manifest = team.together(open_all)
    work.say(f"{network.info.source.architecture} on {where} ({work.reason})")
    if dry_run:
        return _result(manifest, network, images, None)
    folder = RunFolder(out)
    probe = probe_arrays(network) if network.probed else None
    if probe is not None:
        model = model.model_copy(update={"probe": str(folder.probe_path)})
    recipe = Recipe(name=out.name, model=model, data=data, discover=settings, seed=work.seed)
    with contextlib.ExitStack() as held:
        team.on_first(lambda: held.enter_context(folder.lock()))
        team.on_first(
            lambda: folder.create_or_resume(manifest, recipe_yaml(recipe), warn=work.warn)
        )
        if probe is not None:
            team.on_first(lambda: atomic.write_safetensors(folder.probe_path, probe))
        kept = team.together(folder.read_manifest)  # on another machine: is the folder shared?
        store = PathStore(folder.paths_folder, kept.settings_sha256)
        share = Share(store, images, search, _per_shard(settings), work)
        count = share.compute()
        timing = share.timing()

        def finish() -> Result:
            table = store.read_all(count)
            images.skipped = table.skipped
            if len(table) == 0:
                raise DataError("no image could be read", hint="the warnings above name them")
            summary = _summary(table, search, images, timing, count)
            result = _result(kept, network, images, summary)
            with keeping(result), folder.updating(lambda: result, work.warn) as earlier:
                _keep(earlier, result)
                add_command(earlier, work.command)
            _say_timing(timing, len(table), table.skipped, work)
            return result

        return team.on_first(finish)


@dataclass
class _Search:
    """Finds the paths of one batch, on the device, within its memory."""

    view: VitView
    settings: DiscoverSection  # nothing in it is `auto`
    integral: Integral
    work: Work
    limit: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and neurons per block of a path."""
        return len(self.view.widths), self.settings.topk

    def __call__(self, batch: Batch) -> PathBatch:
        s, images, labels = self.settings, batch.images, batch.labels
        device = self.work.where
        if self.limit is None:
            self.limit = images_that_fit(
                self.view, images[:1], self.integral.points, s.memory, device,
                processes=self.work.team.local_count,
            )  # fmt: skip
            if self.limit < s.batch_size:
                self._say("memory", self.limit)
        # `random` draws by the place in the source: it does not matter who draws, or when.
        generator = torch.Generator().manual_seed(self.work.seed * 1_000_003 + batch.positions[0])

        def paths(lo: int, hi: int) -> PathBatch:
            return find_paths(
                self.view,
                images[lo:hi].to(device),
                labels[lo:hi].to(device),
                topk=s.topk,
                method=s.method,
                integral=self.integral,
                generator=generator,
            )

        with same_on_any_threads(device), products(s.precision, device):
            parts, limit = halving(paths, len(images), self.limit)
        if limit < self.limit:
            self._say("out of memory", limit)
        self.limit = limit
        return PathBatch(
            torch.cat([p.neurons.cpu() for p in parts]), torch.cat([p.scores.cpu() for p in parts])
        )

    def _say(self, why: str, limit: int) -> None:
        self.work.warn(f"{why}: {plural(limit, 'image')} at a time")


def _search(network: Network, settings: DiscoverSection, work: Work) -> _Search:
    check_shortcuts(settings.precision, settings.compile, work.where)
    view = make_view(network.model, precision=settings.precision, compiled=settings.compile)
    s = settings
    integral = Integral.of(view.scope, s.scope, s.quadrature, s.points, s.accumulation)
    view.tokens(integral.scope)  # refuses a scope that the model does not have
    if settings.topk > min(view.widths):
        raise UsageError(
            f"{setting('discover.topk')} must be at most {min(view.widths)}, the hidden units of "
            f"the narrowest block, got {settings.topk}"
        )
    resolved = {"scope": integral.scope, "quadrature": integral.rule}
    return _Search(view, settings.model_copy(update=resolved), integral, work)


def _per_shard(settings: DiscoverSection) -> int:
    """Images of a shard: whole batches."""
    return max(1, settings.shard_size // settings.batch_size) * settings.batch_size


def _manifest(name: str, network: Network, images: Images, search: _Search) -> Manifest:
    """The manifest of this run; its settings are what decides the bits of the paths.

    `memory` is not among them: a run that was too large may resume with less.
    """
    settings, work = search.settings, search.work
    deciding: dict[str, Any] = settings.model_dump(exclude={"shard_size", "memory"})
    deciding |= {
        **_points(search),
        "shard_images": _per_shard(settings),
        "model": network.info.source.sha256,
        "data": images.source.info().sha256 or _stream_settings(images),
        "preprocessing": to_dict(images.preprocessing),
        "on_bad_image": images.on_bad,
        "device": work.where.type,
    }
    if settings.method == "random":
        deciding["seed"] = work.seed
    if network.probed:
        deciding["probe"] = probe_sha256(probe_arrays(network))
    if network.held:
        deciding["arguments"] = to_dict(network.info.source)["model_args"]
    if images.source.content is not None:
        deciding["content"] = images.source.content()
    return Manifest(
        name=name,
        created=_now(),
        environment=work.environment(),
        model=network.info,
        data=images.source.info(),
        settings=deciding,
        settings_sha256=digest(deciding),
        shards=shards_of(images.source, _per_shard(settings)),
        command=work.command,
    )


def _stream_settings(images: Images) -> dict[str, Any]:
    """What decides the images of a stream, which are not known before it was read."""
    fields = {"class_map", "classes", "images_per_class"}
    return {"spec": images.source.spec, **images.section.model_dump(include=fields)}


def _keep(earlier: Result, result: Result) -> None:
    """Put the result in the place of an earlier one, with what later stages wrote there, and its
    times where nothing was left to compute."""
    result.variants, result.analyses = earlier.variants, earlier.analyses
    result.commands = earlier.commands
    if earlier.discovery and result.discovery and not result.discovery.timing["images"]:
        result.discovery.seconds = earlier.discovery.seconds
        result.discovery.timing = earlier.discovery.timing
    vars(earlier).update(vars(result))


def _say_timing(timing: dict[str, float], stored: int, skipped: list[str], work: Work) -> None:
    """Where the time went, in one line."""
    images, seconds = int(timing["images"]), timing["seconds"]
    if images == 0:
        words = f"{plural(stored, 'image')} found before: nothing to compute"
    else:
        whole = seconds * timing["processes"]
        parts = ", ".join(f"{part} {timing[part] / whole:.0%}" for part in PARTS)
        words = (
            f"{plural(images, 'image')} in {seconds:.1f} s ({images / seconds:.1f} "
            f"images/s): {parts}"
        )
    if skipped:
        words += f"; {len(skipped)} skipped"
    work.say(words)


def _points(search: _Search) -> dict[str, int]:
    """Points of the integral, and of the first block's where those are more."""
    points, first = search.integral.points_by(search.settings.method)
    return {"points": points} | ({"first_points": first} if first != points else {})


def _summary(
    table: PathTable,
    search: _Search,
    images: Images,
    timing: dict[str, float],
    shards: int,
) -> DiscoverySummary:
    settings = search.settings
    return DiscoverySummary(
        method=settings.method,
        scope=settings.scope,
        quadrature=settings.quadrature,
        **_points(search),
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
        shards=shards,
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

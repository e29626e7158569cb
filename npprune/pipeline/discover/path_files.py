"""The paper's files from a run folder, and a run folder from the paper's files."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from npprune.core.attribution.votes import class_top, frequency
from npprune.core.metrics import mean_interval
from npprune.errors import ModelError, StoreError, UsageError, plural
from npprune.files import check_folder, keeping, refuse_overwriting
from npprune.models.info import model_info
from npprune.models.load import create
from npprune.pipeline.common.device import environment
from npprune.pipeline.common.inputs import open_network
from npprune.pipeline.common.outputs import check_run, reads_of
from npprune.pipeline.common.results import add_command
from npprune.pipeline.common.work import Work
from npprune.recipe import DataSection, DiscoverSection, ModelSection, Recipe, recipe_yaml
from npprune.records import (
    UNKNOWN_WEIGHTS,
    ClassInfo,
    DataInfo,
    DiscoverySummary,
    Manifest,
    ModelInfo,
    ModelSource,
    Result,
    digest,
)
from npprune.store import atomic
from npprune.store.paper_files import (
    ReleasedImage,
    read_released,
    released_files,
    released_from_table,
    released_name,
    shard_from_released,
    write_released,
)
from npprune.store.path_store import PathStore, PathTable, run_table
from npprune.store.runs import RunFolder

Layout = Literal["batch", "image"]
ORIGIN = "the paper's released program"
SHOWN = 12  # most frequent neurons of a block that the result holds


# ---------------------------------------------------------------- export


def export_released(
    run: Path, out: Path, *, baseline: Path | None = None, layout: Layout | None = None
) -> list[Path]:
    """Write a run's paths as `imgnet_all-{label}.rlt.jsonl`, one file a class, into `out`.

    Args:
        baseline: a run of method activation on the same images: its paths and scores go beside,
            as `base` and `base_score`.
        layout: "batch" writes a class as one line, "image" a line for each image; None: as the
            released program does for such paths.

    Raises:
        StoreError: a run that has not ended, or files of other results in `out`.
        UsageError: the baseline is of another method or of other images.
    """
    for read in [run] if baseline is None else [run, baseline]:
        refuse_overwriting(out, [read, RunFolder(read).paths_folder])
    check_folder(out)
    manifest, table = _finished(run)
    pattern = manifest.settings["method"] == "influence-pattern"
    images = released_from_table(table, influence_pattern=pattern)
    if baseline is not None:
        if pattern:
            raise UsageError("`--baseline` goes with scores, and Influence Pattern's have none")
        for label, others in _baseline(baseline, table).items():
            for image, other in zip(images[label], others, strict=True):
                image.baseline, image.baseline_score = other.neurons, other.score
    plain = table.neurons.shape[2] == 1 and not pattern
    written = {out / released_name(label): rows for label, rows in images.items()}
    stale = sorted(set(out.glob("imgnet_all-*.rlt.jsonl")) - set(written))
    if stale:
        raise StoreError(
            f"`{out}` holds files of other results, such as `{stale[0].name}`",
            hint="choose another --out",
        )
    for path, rows in written.items():
        write_released(path, rows, layout=layout or ("batch" if plain else "image"))
    return list(written)


def _finished(run: Path) -> tuple[Manifest, PathTable]:
    folder = RunFolder(run)
    return folder.read_manifest(), run_table(folder)


def _baseline(run: Path, table: PathTable) -> dict[int, list[ReleasedImage]]:
    manifest, base = _finished(run)
    method = manifest.settings["method"]
    if method != "activation":
        raise UsageError(
            f"`--baseline` must be a run of method activation, got `{run}` of method {method}",
            hint="`npprune discover ... --method activation --out FOLDER` makes one",
        )
    if base.ids.tolist() != table.ids.tolist() or base.labels.tolist() != table.labels.tolist():
        raise UsageError(f"`--baseline` must be of the same images, and `{run}` is of others")
    return released_from_table(base)


# ---------------------------------------------------------------- import


def import_released(
    files: Path,
    model: ModelSection,
    out: Path,
    *,
    baseline: bool = False,
    work: Work | None = None,
) -> Result:
    """Make a run folder of the released program's results.

    The files say neither which images they are about nor which weights: images are numbered in
    their order, and the weights' hash is known only where `model` names them. Scores are as in the
    files (for average-pooled networks divided by 196).

    Args:
        files: the folder with `imgnet_all-{label}.rlt.jsonl`.
        model: the network; without its checkpoint, the architecture alone.
        baseline: take the Activation baseline's paths, which stand beside the others.

    Raises:
        StoreError: not such files, files of edits, or paths that do not fit the network.
    """
    work = (work or Work()).on("paths").on_cpu()
    check_run(out, [files, *reads_of(model)])
    paths = released_files(files)
    found = {label: rows for label, path in paths.items() if (rows := read_released(path))}
    if not found:
        raise StoreError(f"the files in `{files}` hold no images")
    method = _method(found, files, baseline)
    if baseline:
        found = {label: [_base(image, files) for image in rows] for label, rows in found.items()}
    info = _model(model, work)
    settings = DiscoverSection(
        topk=_check(found, info, files),
        method=method,
        scope=info.scope,
        quadrature="left-riemann",
        points=20,
        accumulation="last",
    )
    inputs = {path.name: atomic.sha256_file(path) for path in paths.values()}
    manifest = _manifest(out.name, files, info, settings, found, inputs)
    manifest.command = work.command
    recipe = Recipe(name=out.name, model=model, data=DataSection(), discover=settings)
    folder = RunFolder(out)
    with folder.lock():
        store, position = PathStore(folder.paths_folder, manifest.settings_sha256), 0
        folder.create_or_resume(manifest, recipe_yaml(recipe), warn=work.warn)
        for i, (label, images) in enumerate(found.items()):
            if store.state(i) != "done":
                store.write_shard(i, shard_from_released(images, label, position))
            position += len(images)
        result = _result(manifest, settings, store.read_all(len(found)))
        # imported before: later stages may have added to it
        with keeping(result), folder.updating(lambda: result, work.warn) as kept:
            add_command(kept, work.command)
    return kept


def _base(image: ReleasedImage, files: Path) -> ReleasedImage:
    if image.baseline is None:
        raise StoreError(f"the files in `{files}` hold no baseline", hint="leave --baseline out")
    return ReleasedImage(image.baseline, image.baseline_score)


def _method(
    found: dict[int, list[ReleasedImage]], files: Path, baseline: bool
) -> Literal["neuron-path", "activation", "influence-pattern"]:
    """What the files hold. StoreError where that is no paths, or a mixture."""
    images = [image for rows in found.values() for image in rows]
    if any(image.edit is not None for image in images):
        raise StoreError(
            f"the files in `{files}` hold what editing neurons did to the predictions, not scores "
            "of paths",
            hint="import the folder whose files have `ja_score`, or `path`",
        )
    patterns = {image.influence_pattern for image in images}
    if len(patterns) > 1:
        raise StoreError(f"the files in `{files}` mix neuron paths and Influence Pattern")
    if patterns.pop():
        return "influence-pattern"
    return "activation" if baseline else "neuron-path"


def _model(section: ModelSection, work: Work) -> ModelInfo:
    on_disk = section.name == "auto" or Path(section.name).is_dir()
    if section.checkpoint is not None or on_disk or "/" in section.name:
        return open_network(section, work).info
    wishes = ("num_classes", "img_size", "num_heads")
    args = {name: value for name in wishes if (value := getattr(section, name)) is not None}
    return model_info(
        create(section.name, args), ModelSource(section.name, args, sha256=UNKNOWN_WEIGHTS)
    )


def _check(found: dict[int, list[ReleasedImage]], info: ModelInfo, files: Path) -> int:
    """Neurons per block of all paths. ModelError where they cannot be of this network."""
    name = info.source.architecture
    hint = "give the network that the results are of"
    if max(found) >= info.num_classes:
        raise ModelError(
            f"`{files}` has results of class {max(found)}, and {name} has {info.num_classes} "
            "outputs",
            hint=hint,
        )
    counts = set()
    for label, images in found.items():
        neurons = shard_from_released(images, label).neurons  # [n, L, K]
        counts.add(neurons.shape[2])
        if neurons.shape[1] != len(info.widths):
            raise ModelError(
                f"the paths in `{released_name(label)}` have "
                f"{plural(neurons.shape[1], 'block')}, and "
                f"{name} has {len(info.widths)}",
                hint=hint,
            )
        for block, (neuron, width) in enumerate(
            zip(neurons.max(axis=(0, 2)), info.widths, strict=True)
        ):
            if neuron >= width:
                raise ModelError(
                    f"`{released_name(label)}` names neuron {neuron} of block {block}, and {name} "
                    f"has {width} there",
                    hint=hint,
                )
    if len(counts) > 1:
        raise StoreError(f"the files in `{files}` differ in neurons per block: {sorted(counts)}")
    return int(counts.pop())


def _manifest(
    name: str,
    files: Path,
    info: ModelInfo,
    settings: DiscoverSection,
    found: dict[int, list[ReleasedImage]],
    inputs: dict[str, str],
) -> Manifest:
    deciding = {
        "origin": ORIGIN,
        **settings.model_dump(include={"method", "topk", "quadrature", "points", "accumulation"}),
        "scope": info.scope,
        "files": digest(inputs),
        "architecture": info.source.architecture,
        "model": info.source.sha256,
    }
    return Manifest(
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(torch.device("cpu"), "paths were imported, not computed", 0),
        model=info,
        data=DataInfo(
            spec=f"results of {ORIGIN} in {files.name}",
            label_rule="file names",
            images=sum(map(len, found.values())),
            classes=len(found),
        ),
        settings=deciding,
        settings_sha256=digest(deciding),
        inputs=inputs,
        said={"files": f"{plural(len(inputs), 'file')} in {files}"},
        shards=len(found),
    )


def _result(manifest: Manifest, settings: DiscoverSection, table: PathTable) -> Result:
    scores = torch.from_numpy(table.scores)
    summary = DiscoverySummary(
        method=settings.method,
        scope=settings.scope,
        quadrature=settings.quadrature,
        points=settings.points or 0,
        topk=settings.topk,
        accumulation=settings.accumulation,
        data=manifest.data,
        images=len(table),
        classes=len(table.classes),
        seconds=0.0,
        mean_score=None if np.isnan(table.scores).any() else mean_interval(scores),
        frequency=frequency(table.neurons, SHOWN),
        class_paths={
            c: class_top(table.neurons, table.labels, c, settings.topk) for c in table.classes
        },
        shards=manifest.shards,
    )
    return Result(
        name=manifest.name,
        created=manifest.created,
        environment=manifest.environment,
        model=manifest.model,
        classes=[ClassInfo(i, str(i)) for i in range(manifest.model.num_classes)],
        discovery=summary,
    )

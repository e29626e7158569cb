"""Evaluate: dense and pruned on the same images in one run."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from npprune.core import metrics
from npprune.data.loading import Batch
from npprune.errors import ModelError, plural
from npprune.export.bench import bench_pair, torch_runner
from npprune.files import keeping
from npprune.models.hub import is_fetched
from npprune.models.where import foreign_repo
from npprune.pipeline.common.inputs import (
    Images,
    Network,
    dense_names,
    label_doubt,
    open_checkpoint,
    open_images,
    open_network,
    remembered,
)
from npprune.pipeline.common.outputs import recordable
from npprune.pipeline.common.results import run_of, update_variant
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.features import compared_features, see_features
from npprune.pipeline.evaluate.merging import merged_images
from npprune.pipeline.evaluate.seen import Seen, see_all
from npprune.recipe import DataSection, EvaluateSection, ModelSection
from npprune.records import (
    CheckpointConfig,
    ClassRow,
    Evaluation,
    FeatureEvaluation,
    Outcomes,
    Variant,
)
from npprune.store.checkpoints import PLAN, is_checkpoint
from npprune.store.runs import read_plan

STAGE = "evaluate"


def evaluate(
    checkpoint: Path,
    data: DataSection,
    settings: EvaluateSection,
    *,
    dense_checkpoint: str | None = None,
    work: Work | None = None,
) -> Evaluation | FeatureEvaluation:
    """Measure a pruned checkpoint against the dense network it came from: predictions, or features
    where there is no classifier.

    Both see the same images in the same order in one run. The result goes into the run folder
    that the checkpoint belongs to; where that cannot be written, a warning says so beforehand.
    Under torchrun the processes share the images, and the first one measures latency and records.

    Raises:
        UnstoredError: the result could not be written in the end; it carries the evaluation.
        NpPruneError: what is wrong with checkpoint, dense weights or images.
    """
    work = (work or Work()).on(STAGE)
    team = work.team

    def open_all() -> tuple[Network, CheckpointConfig, Network, Images]:
        pruned = open_checkpoint(checkpoint, work)
        config = pruned.config
        assert config is not None
        dense = open_dense(config, checkpoint, dense_checkpoint, work)
        check_outputs(config, dense)
        work.say(f"{checkpoint.name} and its dense network on {work.where} ({work.reason})")
        outputs = config.details.get("outputs")  # a head cut to some classes
        if outputs is not None and data.classes is None:
            work.say(f"images of the checkpoint's {plural(len(outputs), 'class', 'classes')}")
        images = open_images(
            data.val, data, dense.info, work, asked="data.val", on_bad="error",
            preprocessing=config.preprocessing, names=dense_names(config),
        )  # fmt: skip
        return pruned, config, dense, images

    pruned, config, dense, images = team.together(open_all)
    recorded = team.on_first(lambda: recordable(run_of(checkpoint, config, work), work))
    started = time.perf_counter()
    headless = dense.info.num_classes == 0
    if headless:
        seen = see_features(dense, pruned, images, work)
    else:
        seen = _predict(dense, pruned, images, config, work)

    def finish() -> Evaluation | FeatureEvaluation:
        evaluation: Evaluation | FeatureEvaluation
        found, labels, sample = seen.joined(images)
        if headless:
            evaluation = compared_features(found, labels, images)
        else:
            everything, after = found
            logits = _fair(everything, config), after
            evaluation = _compare(*logits, labels, images, config, data)
            if config.details.get("outputs") is not None:
                evaluation.dense_all = metrics.accuracy(everything, labels)
            evaluation.outcomes = _outcomes(*logits, labels, seen.ids)
            if settings.thumbnails:
                namer = _namer(config, images)
                evaluation.flipped = seen.flipped.shown(images.preprocessing, namer)
            evaluation.label_doubt = label_doubt(
                everything.argmax(1), labels, dense.info.num_classes, images.source
            )
            _path_shares(evaluation, checkpoint, config)
        evaluation.device = str(work.where)
        evaluation.dense_model, evaluation.pruned_model = dense.info, pruned.info
        if settings.thumbnails:
            evaluation.merged = merged_images(pruned, sample, labels, images)
        evaluation.seconds = time.perf_counter() - started
        if settings.latency:
            evaluation.latency = [
                bench_pair(
                    torch_runner(dense.model, b, images=sample, device=str(work.where)),
                    torch_runner(pruned.model, b, images=sample, device=str(work.where)),
                )
                for b in settings.batches
            ]

        def update(variant: Variant) -> None:
            variant.model = pruned.info
            if isinstance(evaluation, FeatureEvaluation):
                variant.features = evaluation
            else:
                variant.evaluation = evaluation

        if recorded:
            with keeping(evaluation):
                update_variant(
                    checkpoint, config, pruned.info, dense.info, update, command=work.command
                )
        return evaluation

    return team.on_first(finish)


def _path_shares(evaluation: Evaluation, checkpoint: Path, config: CheckpointConfig) -> None:
    """How much of each class's path stays, and whether that spares the class."""
    run = run_of(checkpoint, config)
    found = run.read_result() if run is not None else None
    if found is None or found.discovery is None or not (checkpoint / PLAN).is_file():
        return
    plan = read_plan(checkpoint)
    if plan.widths != found.model.widths:  # of a network that was pruned before
        return
    stays = [{*kept, *plan.own(l)} for l, kept in enumerate(plan.keep)]
    for row in evaluation.classes:
        path = found.discovery.class_paths.get(row.label)
        if path is not None:
            kept = sum(len(stays[l] & set(neurons)) for l, neurons in enumerate(path))
            row.path_kept = kept / max(1, sum(len(set(neurons)) for neurons in path))
    pairs = [(r.path_kept, r.deviation) for r in evaluation.classes if r.path_kept is not None]
    if pairs:
        evaluation.spared = metrics.rank_correlation(*map(list, zip(*pairs, strict=True)))


def open_dense(
    config: CheckpointConfig,
    folder: Path,
    override: str | None,
    work: Work,
    *,
    any_weights: bool = False,
) -> Network:
    """The dense network that a checkpoint came from, its weights checked by hash.

    Raises:
        ModelError: its weights are not where they were, or are others.
    """
    section = dense_section(config, folder, override)
    dense = open_network(section, work.on(STAGE))
    if dense.info.source.sha256 != config.source.sha256 and not any_weights:
        raise ModelError(
            f"`{folder}` was pruned from weights {config.source.sha256[:12]}..., and "
            f"`{section.checkpoint or section.name}` has {dense.info.source.sha256[:12]}...",
            hint="give the weights it came from with `--dense FILE`",
        )
    return dense


def check_outputs(config: CheckpointConfig, dense: Network) -> None:
    """ModelError where the two networks' outputs do not stand for the same."""
    cut = config.details.get("outputs")  # a head cut to some classes
    there = dense.info.num_classes
    if config.num_classes != (there if cut is None else len(cut)):
        raise ModelError(
            f"the pruned network has {plural(config.num_classes, 'output')} and the dense one "
            f"{there}: its classifier was replaced, so that they cannot be compared",
            hint="measure and train it in a loop of your own, as any network",
        )


def dense_section(config: CheckpointConfig, folder: Path, override: str | None) -> ModelSection:
    """Where the dense network of a checkpoint is.

    Raises:
        ModelError: its weights are not there.
    """
    asked = dict(config.details.get("dense", {})) or {"name": config.source.architecture}
    if override is not None:
        key = "name" if Path(override).is_dir() else "checkpoint"
        asked[key] = override
        if key == "name":
            asked = {"name": override}
    for key in ("name", "checkpoint"):
        if asked.get(f"{key}_relative") and not Path(asked.get(key) or "").exists():
            moved = folder / asked[f"{key}_relative"]
            if moved.exists():
                asked[key] = str(moved)
    if override is not None and not Path(override).is_dir() and is_checkpoint(asked["name"]):
        if not is_checkpoint(Path(override).parent):
            raise ModelError(
                f"the dense network of `{folder}` is a checkpoint folder, and `--dense` names a "
                f"file: `{override}`",
                hint="give the folder that has its weights and its `config.json`",
            )
        asked = {"name": str(Path(override).parent)}
    section = remembered(
        ModelSection, {k: v for k, v in asked.items() if not k.endswith("_relative")}, folder
    )
    repo = foreign_repo(section.name) if override is None else None
    if repo is not None and not is_fetched(repo):
        raise ModelError(
            f"the dense network of `{folder}` is {repo} on the hub, which is not on this machine; "
            "what a checkpoint names is not downloaded",
            hint=f"if you trust it, `hf download {repo}` fetches it",
        )
    if section.checkpoint is not None and not Path(section.checkpoint).exists():
        raise ModelError(
            f"the dense weights of `{folder}` are not at `{section.checkpoint}`",
            hint="say where they are with `--dense FILE`",
        )
    return section


def dense_reference(section: ModelSection, folder: Path) -> dict[str, object]:
    """How to find the dense network again from a checkpoint folder that may be moved with it."""
    found: dict[str, object] = section.model_dump(exclude_none=True)
    for key in ("name", "checkpoint"):
        value = found.get(key)
        if isinstance(value, str) and Path(value).exists():
            found[f"{key}_relative"] = os.path.relpath(value, folder)
    return found


def _predict(
    dense: Network, pruned: Network, images: Images, config: CheckpointConfig, work: Work
) -> Seen:
    """Logits [b, c] of both, and the images that flipped."""
    seen = Seen()
    outputs = config.details.get("outputs")  # a head cut to some classes

    def look(batch: Batch) -> tuple[Tensor, ...]:
        x = batch.images.to(work.where)
        before = dense.model(x).float().cpu()
        after = _full(pruned.model(x).float().cpu(), outputs, before)
        seen.flipped.see(batch, _fair(before, config), after)
        return before, after

    return see_all(seen, look, images, work)


def _fair(dense: Tensor, config: CheckpointConfig) -> Tensor:
    """The dense logits among the classes that the pruned network has: choosing among fewer is
    easier for any network."""
    outputs = config.details.get("outputs")  # a head cut to some classes
    return dense if outputs is None else metrics.restrict(dense, outputs)


def _full(logits: Tensor, outputs: list[int] | None, dense: Tensor) -> Tensor:
    """Logits of a head cut to some classes among all of the dense network's, -inf elsewhere."""
    if outputs is None:
        return logits
    full = torch.full_like(dense, float("-inf"))
    full[:, outputs] = logits
    return full


def _namer(config: CheckpointConfig, images: Images) -> Callable[[int], str]:
    """What a class of the dense network is called: by the images, else by the checkpoint."""
    known = {} if config.details.get("outputs") else {c.index: c.name for c in config.classes}
    known |= {c.index: c.name for c in images.source.classes}
    return lambda label: known.get(label, str(label))


def _outcomes(dense: Tensor, pruned: Tensor, labels: Tensor, ids: list[str]) -> Outcomes:
    digest = hashlib.sha256()
    for id, label in zip(ids, labels.tolist(), strict=True):
        digest.update(f"{id}\t{label}\n".encode("utf-8", "backslashreplace"))

    def bits(logits: Tensor) -> str:
        right = (logits.argmax(1) == labels).numpy()
        return base64.b64encode(np.packbits(right).tobytes()).decode()

    return Outcomes(len(labels), digest.hexdigest(), bits(dense), bits(pruned))


def _compare(
    dense: Tensor,
    pruned: Tensor,
    labels: Tensor,
    images: Images,
    config: CheckpointConfig,
    data: DataSection,
) -> Evaluation:
    chosen = config.details.get("outputs") or config.details.get("classes")
    if chosen is None and data.classes is not None:
        chosen = images.source.selected
    p_dense = metrics.true_probability(dense, labels)
    p_pruned = metrics.true_probability(pruned, labels)
    deviation = metrics.probability_deviation(p_dense, p_pruned)
    a, b = metrics.accuracy(dense, labels), metrics.accuracy(pruned, labels)
    evaluation = Evaluation(
        data=images.info(),
        preprocessing=images.preprocessing,
        device="",
        dense=a,
        pruned=b,
        probability_deviation=metrics.mean_interval(deviation),
        deviation_by_class=metrics.deviation_by_class(p_dense, p_pruned, labels),
        accuracy_deviation=(b.top1.value - a.top1.value) / a.top1.value if a.top1.value else 0.0,
        top1_change=metrics.top1_change(dense, pruned, labels),
        agreement=metrics.agreement(dense, pruned),
        classes=_rows(dense, pruned, labels, deviation, images),
        dense_reliability=metrics.reliability(dense, labels),
        pruned_reliability=metrics.reliability(pruned, labels),
        deviations=metrics.histogram(deviation, metrics.DEVIATIONS),
    )
    if chosen:
        inside = torch.isin(labels, torch.tensor(chosen))
        if bool(inside.any()):
            evaluation.restricted_to = list(chosen)
            evaluation.dense_restricted = metrics.accuracy(
                metrics.restrict(dense, chosen)[inside], labels[inside]
            )
            evaluation.pruned_restricted = metrics.accuracy(
                metrics.restrict(pruned, chosen)[inside], labels[inside]
            )
    return evaluation


def _rows(
    dense: Tensor, pruned: Tensor, labels: Tensor, deviation: Tensor, images: Images
) -> list[ClassRow]:
    right_before = (dense.argmax(1) == labels).double()
    right_after = (pruned.argmax(1) == labels).double()
    rows = []
    for label in labels.unique().tolist():
        mask = labels == label
        rows.append(
            ClassRow(
                label=label,
                name=images.source.name(label),
                images=int(mask.sum()),
                dense_top1=float(right_before[mask].mean()),
                pruned_top1=float(right_after[mask].mean()),
                deviation=float(deviation[mask].mean()),
            )
        )
    return rows

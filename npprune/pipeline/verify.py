"""Verify: every hash in a run, a checkpoint or an export, and what does not fit it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npprune.errors import NpPruneError, StoreError
from npprune.export.beside import changed_files
from npprune.pipeline.study.rows import StudyDense, StudyRow
from npprune.records import (
    Benchmark,
    CheckpointConfig,
    Document,
    ExportRecord,
    Manifest,
    Plan,
    Result,
    digest,
)
from npprune.store import atomic
from npprune.store.checkpoints import PLAN, WEIGHTS, plan_of
from npprune.store.path_store import PathStore, ShardInfo
from npprune.store.runs import RunFolder
from npprune.store.statistics_store import StatisticsInfo
from npprune.store.training import STATE, TrainingFolder

Found = tuple[Path, str]
"""A file, and what is wrong with it; empty where it is as it was written."""


@dataclass
class Verified:
    """What was checked in a folder, and what is damaged."""

    folder: Path
    files: list[str] = field(default_factory=list)  # checked, relative to the folder
    damaged: dict[str, str] = field(default_factory=dict)  # file -> what is wrong


def verify(folder: Path, *, progress: Callable[[int], None] = lambda _: None) -> Verified:
    """Check every document below a folder against its checksum, and every file that one names
    against its hash.

    Raises:
        StoreError: there is no such folder, or npprune wrote nothing in it.
    """
    if not folder.is_dir():
        raise StoreError(
            f"`{folder}` is not a folder",
            hint="give a run, a checkpoint or the folder of an export",
        )
    found = Verified(folder)
    for path in sorted(folder.rglob("*.json")):
        for file, problem in _checked(path):
            name = file.relative_to(folder).as_posix()
            if name not in found.files:
                found.files.append(name)
            if problem:
                found.damaged.setdefault(name, problem)
            progress(len(found.files))
    if not found.files:
        raise StoreError(
            f"`{folder}` holds nothing that npprune wrote",
            hint="give a run, a checkpoint or the folder of an export",
        )
    return found


def _checked(path: Path) -> Iterator[Found]:
    """A JSON file, and the files that it vouches for."""
    if path.name == STATE and path.parent.suffix == ".partial":
        yield from _training(path)
        return
    try:
        data = json.loads(atomic.read_text(path))
    except (ValueError, NpPruneError, RecursionError) as err:
        if path.name not in _FOREIGN:
            yield path, str(getattr(err, "message", "")) or "it is not valid JSON"
        return
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in _KINDS:  # someone else's, unless its place or its checksum says otherwise
        if isinstance(data, dict) and ("checksum" in data or path.name in _OURS):
            yield path, f"it is of the unknown kind {kind!r}"
        return
    cls, others = _KINDS[kind]
    try:
        record = atomic.read_json(cls, path)
    except StoreError as err:
        yield path, err.message
        return
    yield path, ""
    yield from others(path, record)


# ---------------------------------------------------------------- what each kind vouches for


def _alone(path: Path, record: Any) -> Iterator[Found]:
    yield from ()


def _manifest(path: Path, manifest: Manifest) -> Iterator[Found]:
    if digest(manifest.settings) != manifest.settings_sha256:
        yield path, "its settings are not those of its `settings_sha256`"
    run = RunFolder(path.parent)
    if run.recipe_path.is_file():
        yield run.recipe_path, _problem(run.read_recipe)
    if run.result_path.is_file() and manifest.shards is not None:
        store = PathStore(run.paths_folder, manifest.settings_sha256)
        for i in range(manifest.shards):
            if (state := store.state(i)) != "done":
                yield store.sidecar_path(i), f"shard {i} is {state}"


def _shard(path: Path, info: ShardInfo) -> Iterator[Found]:
    store = PathStore(path.parent, info.settings_sha256)
    tensors = store.tensors_path(info.index)
    if path != store.sidecar_path(info.index):
        yield path, f"it is the sidecar of shard {info.index}"
    else:
        yield _named(tensors, info.sha256)


def _statistics(path: Path, info: StatisticsInfo) -> Iterator[Found]:
    for part in info.blocks.values():
        yield _named(path.with_name(part.file), part.sha256)


def _checkpoint(path: Path, config: CheckpointConfig) -> Iterator[Found]:
    yield _named(path.with_name(WEIGHTS), config.weights_sha256)
    if config.plan_sha256:
        yield path.with_name(PLAN), _problem(lambda: plan_of(path.parent, config))


def _export(path: Path, record: ExportRecord) -> Iterator[Found]:
    bad = dict(changed_files(record, path.parent))
    for name in record.hashes or [record.file]:
        yield path.with_name(name), bad.get(path.with_name(name), "")


def _row(path: Path, row: StudyRow) -> Iterator[Found]:
    if row.setting.file_name != path.stem:
        yield path, f"it holds the row {row.setting.name}"


def _training(path: Path) -> Iterator[Found]:
    """The state of an interrupted training."""
    folder = TrainingFolder(path.parent.with_name(path.parent.name.removesuffix(".partial")))
    yield from folder.damaged()


def _named(path: Path, sha256: str) -> Found:
    if not path.is_file():
        return path, "it is not there"
    same = atomic.sha256_file(path) == sha256
    return path, "" if same else "it was changed or damaged since it was written"


def _problem(read: Callable[[], object]) -> str:
    try:
        read()
    except NpPruneError as err:
        return err.message
    return ""


Others = Callable[[Path, Any], Iterator[Found]]
_KINDS: dict[str, tuple[type[Document], Others]] = {
    cls.kind: (cls, others)
    for cls, others in (
        (Manifest, _manifest),
        (Result, _alone),
        (Plan, _alone),
        (CheckpointConfig, _checkpoint),
        (ExportRecord, _export),
        (Benchmark, _alone),
        (ShardInfo, _shard),
        (StatisticsInfo, _statistics),
        (StudyRow, _row),
        (StudyDense, _alone),
    )
}
_OURS = ("manifest.json", "result.json", "plan.json", "export.json", "statistics.json")
_FOREIGN = ("preprocessor_config.json", "model.safetensors.index.json")

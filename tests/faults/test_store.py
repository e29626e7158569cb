"""Everything that is written, killed or out of room before each of its file operations.

What is read afterwards is what was there before, or what was to be written, and nothing else; the
same writing again then leaves the new state, and no temporary file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npprune import files
from npprune.errors import NpPruneError
from npprune.records import (
    CheckpointConfig,
    ClassInfo,
    Environment,
    ModelInfo,
    ModelSource,
    Preprocessing,
    Result,
)
from npprune.store import atomic
from npprune.store.checkpoints import read_checkpoint, write_checkpoint
from npprune.store.path_store import PathStore, ShardData
from npprune.store.runs import RunFolder
from npprune.store.statistics_store import StatisticsStore
from npprune.store.training import TrainingFolder
from tests.faults.shim import FULL, READ_ONLY, Killed, operations

MODEL = ModelInfo(ModelSource("vit"), 24, 16, [48], [3], 8, 2, "cls", Preprocessing())
CONFIG = CheckpointConfig(
    MODEL.source, [48], [3], 2, Preprocessing(), [ClassInfo(0, "a"), ClassInfo(1, "b")], ""
)


@dataclass
class Writing:
    """write(root, version) leaves a state; read(root) names the version that is there."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]


def _file(root: Path, v: int) -> None:
    files.write_bytes(root / "a.json", bytes([v]) * 100)


def _checkpoint(root: Path, v: int) -> None:
    write_checkpoint(root / "c", CONFIG, {"w": torch.full((3,), float(v))})


def _read_checkpoint(root: Path) -> int:
    return int(read_checkpoint(root / "c")[1]["w"][0])


def _shard(root: Path, v: int) -> None:
    data = ShardData(np.full((1, 2, 1), v), np.ones(1), np.zeros(1), [f"{v}"], [0])
    PathStore(root, "s").write_shard(0, data)


def _read_shard(root: Path) -> int | None:
    store = PathStore(root, "s")
    state = store.state(0)
    assert state in ("done", "absent", "damaged")
    return int(store.read_shard(0).neurons[0, 0, 0]) if state == "done" else None


def _result(root: Path, v: int) -> None:
    with RunFolder(root).updating(lambda: Result("r", "t", Environment(), MODEL, [])) as result:
        result.commands = [str(v)]


def _read_result(root: Path) -> int:
    return int(RunFolder(root).read_result().commands[0])


def _training(root: Path, v: int) -> None:
    folder = TrainingFolder(root / "t")
    with folder.lock():
        folder.save({"settings": {}, "step": v}, {"w": torch.full((3,), float(v))})


def _read_training(root: Path) -> int | None:
    found = TrainingFolder(root / "t").load({})
    return None if found is None else int(found[1]["w"][0])


def _removed(root: Path, v: int) -> None:
    _training(root, v) if v == 1 else TrainingFolder(root / "t").remove()


def _read_removed(root: Path) -> int | None:
    return _read_training(root) or 2


def _statistics(root: Path, v: int) -> None:
    store = StatisticsStore(root / "s", {}, images=2, batches=2)
    with store.lock(lambda: None):
        store.open()
        store.save([(l, {"x": torch.full((2,), float(v))}) for l in range(2)], v, v)


def _read_statistics(root: Path) -> int:
    store = StatisticsStore(root / "s", {}, images=2, batches=2)
    assert store.open() == []
    values = {int(store.file(l).get_tensor("x")[0]) for l in range(2)}
    assert {part.batches for part in store.info.blocks.values()} == values
    (value,) = values
    return value


def _export(root: Path, v: int) -> None:
    with files.staging(root / "m.onnx") as folder:
        (folder / "m.onnx").write_text(f"graph {v}")
        files.publish(folder, root / "m.onnx")


def _read_export(root: Path) -> int:
    return int((root / "m.onnx").read_text().removeprefix("graph "))


WRITINGS = {
    "file": Writing(_file, lambda root: (root / "a.json").read_bytes()[0]),
    "checkpoint": Writing(_checkpoint, _read_checkpoint),
    "shard": Writing(_shard, _read_shard),
    "result": Writing(_result, _read_result),
    "training": Writing(_training, _read_training),
    "training, removed": Writing(_removed, _read_removed),
    "statistics": Writing(_statistics, _read_statistics),
    "export": Writing(_export, _read_export),
}
LOST = {"shard": {None}, "training, removed": {None}}  # computed again; never other bits
FAULTS = {"kill": "kill", "full disk": FULL, "read-only": READ_ONLY}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WRITINGS)
def test_before_every_operation(name: str, fault: str, tmp_path: Path) -> None:
    writing, met = WRITINGS[name], 0
    for n in range(1, 200):
        root = tmp_path / str(n)
        root.mkdir()
        writing.write(root, 1)
        with operations(root, n, FAULTS[fault]) as seen:
            try:
                writing.write(root, 2)
            except Killed:
                assert fault == "kill"
            except NpPruneError as err:
                said = f"{err.message} | {err.hint}"
                assert fault != "kill" and said.startswith("cannot") and err.hint, said  # noqa: PT017, PT018
            else:
                if len(seen.names) < n:
                    break
        met += 1
        found = writing.read(root)
        assert found in {1, 2} | LOST.get(name, set()), (n, seen.names)
        if fault != "kill":
            assert not [p for p in root.rglob("*") if files.is_leftover(p)], (n, seen.names)
        if name != "training, removed" or found == 1:
            writing.write(root, 2)
        assert writing.read(root) == 2
        atomic.remove_leftovers(root)  # as the next run does
        assert not [p for p in root.rglob("*") if files.is_leftover(p)], (n, seen.names)
    assert met >= 4


def test_a_checkpoint_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames a kill leaves no folder: the next writing brings it back first."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    absent = 0
    for n in range(1, 40):
        root = tmp_path / str(n)
        root.mkdir()
        _checkpoint(root, 1)
        with operations(root, n) as seen, contextlib.suppress(Killed):
            _checkpoint(root, 2)
        if len(seen.names) < n:
            break
        if (root / "c").is_dir():
            assert _read_checkpoint(root) in (1, 2)
        else:
            absent += 1
            with pytest.raises(ValueError, match="no"), files.replacing(root / "c"):  # noqa: PT012
                assert _read_checkpoint(root) == 1
                raise ValueError("no")
        _checkpoint(root, 2)
        assert _read_checkpoint(root) == 2
        assert [p.name for p in root.iterdir()] == ["c"]
    assert absent == 1


def test_every_bit_of_a_document_counts(tmp_path: Path) -> None:
    """No flipped bit of a checkpoint's configuration is read as another configuration."""
    _checkpoint(tmp_path, 1)
    path = tmp_path / "c" / "config.json"
    good, kept = path.read_bytes(), read_checkpoint(tmp_path / "c")[0]
    refused = 0
    for place in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 7)
        path.write_bytes(flipped)
        try:
            assert read_checkpoint(tmp_path / "c")[0] == replace(kept)
        except NpPruneError:
            refused += 1
    assert refused > 0.7 * len(good) / 3  # the others are blanks between entries

"""Everything that is written, as small as it can be, and which version of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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


def checkpoint(root: Path, v: int) -> None:
    write_checkpoint(root / "c", CONFIG, {"w": torch.full((3,), float(v))})


def version(root: Path) -> int:
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
    "checkpoint": Writing(checkpoint, version),
    "shard": Writing(_shard, _read_shard),
    "result": Writing(_result, _read_result),
    "training": Writing(_training, _read_training),
    "training, removed": Writing(_removed, _read_removed),
    "statistics": Writing(_statistics, _read_statistics),
    "export": Writing(_export, _read_export),
}
LOST = {"shard": {None}, "training, removed": {None}}  # computed again; never other bits
FAULTS: dict[str, str | int] = {"kill": "kill", "full disk": FULL, "read-only": READ_ONLY}


def met(name: str, fault: str, n: int, root: Path) -> bool:
    """Meet the n-th operation of the second version's writing; False: there are fewer.

    What is read then is the version before or this one, or nothing where that is computed again;
    written again it is this one, and no temporary file is left.
    """
    writing = WRITINGS[name]
    root.mkdir()
    writing.write(root, 1)
    refused: NpPruneError | None = None
    with operations(root, n, FAULTS[fault]) as seen:
        try:
            writing.write(root, 2)
        except Killed:
            assert fault == "kill"
        except NpPruneError as err:
            refused = err
        else:
            if len(seen.names) < n:
                return False
    if refused is not None:
        assert fault != "kill"
        assert refused.message.startswith("cannot"), refused.message
        assert refused.hint, refused.message
    found = writing.read(root)
    assert found in {1, 2} | LOST.get(name, set()), seen.names
    if fault != "kill":
        assert not _leftovers(root), seen.names
    if name != "training, removed" or found == 1:
        writing.write(root, 2)
    assert writing.read(root) == 2, seen.names
    atomic.remove_leftovers(root)  # as the next run does
    assert not _leftovers(root), seen.names
    return True


def _leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if files.is_leftover(path)]

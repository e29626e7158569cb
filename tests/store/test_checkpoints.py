"""Checkpoints: safetensors and JSON, as a whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from npprune import files, records
from npprune.errors import StoreError
from npprune.records import CheckpointConfig, ClassInfo, ModelSource, Plan, Preprocessing
from npprune.store import atomic
from npprune.store.checkpoints import (
    is_checkpoint,
    read_checkpoint,
    read_config,
    write_checkpoint,
)
from npprune.store.runs import read_plan

CONFIG = CheckpointConfig(
    ModelSource("vit"), [2, 3], [1, 1], 2, Preprocessing(), [ClassInfo(0, "a")], ""
)
PLAN = Plan([[0, 2], [1, 2, 3]], [4, 4])


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=g)
    return {
        "b.weight": weight.t(),  # not contiguous
        "a.bias": weight[0],  # shares memory
        "half": torch.randn(3, generator=g).to(torch.bfloat16),
        "count": torch.tensor(7),
        "grad": torch.nn.Parameter(torch.ones(2)),
    }


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt" / "x"
    config = write_checkpoint(folder, CONFIG, _tensors(), PLAN)
    assert _names(folder) == ["config.json", "model.safetensors", "plan.json"]
    assert _names(folder.parent) == ["x"]
    assert is_checkpoint(folder)
    back, tensors = read_checkpoint(folder)
    assert back == config == read_config(folder)
    assert back.plan_sha256 == records.digest(PLAN) == records.digest(read_plan(folder))
    assert back.weights_sha256 == atomic.sha256_file(folder / "model.safetensors")
    assert tensors.keys() == _tensors().keys()
    for name, tensor in _tensors().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    write_checkpoint(tmp_path / "b", CONFIG, dict(reversed(_tensors().items())))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_older_checkpoint_is_replaced_with_all_that_belonged_to_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors(), PLAN)
    (tmp_path / "a" / "model.onnx").write_text("old")
    (tmp_path / "a" / "export.json").write_text("{}")
    (tmp_path / "a" / "result.json").write_text("{}")  # of a network pruned without a run
    write_checkpoint(tmp_path / "a", CONFIG, _tensors(1))
    assert _names(tmp_path / "a") == ["config.json", "model.safetensors"]
    assert torch.equal(read_checkpoint(tmp_path / "a")[1]["a.bias"], _tensors(1)["a.bias"])


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="not a checkpoint of npprune") as caught:
        write_checkpoint(tmp_path, CONFIG, _tensors())
    assert caught.value.hint == "choose another `out`"
    assert _names(tmp_path) == ["thesis.tex"]

    write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match=r"it also holds `notes.txt`, which npprune did not write"):
        write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    assert "notes.txt" in _names(tmp_path / "a")


def test_no_space_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors())

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_synced", full)
    with pytest.raises(StoreError, match="no space left on the device"):
        write_checkpoint(tmp_path / "a", CONFIG, _tensors(1))
    assert _names(tmp_path) == ["a"]
    assert torch.equal(read_checkpoint(tmp_path / "a")[1]["a.bias"], _tensors()["a.bias"])


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(StoreError, match=r"checkpoint `.*a` does not exist"):
        read_checkpoint(folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file, not a checkpoint folder"):
        read_checkpoint(tmp_path / "file")
    for name in ("model.safetensors", "config.json"):
        write_checkpoint(folder, CONFIG, _tensors())
        (folder / name).unlink()
        assert not is_checkpoint(folder)
        with pytest.raises(StoreError, match=f"is not a checkpoint: it has no `{name}`"):
            read_checkpoint(folder)
        for path in folder.iterdir():
            path.unlink()


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    path = tmp_path / "a" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StoreError, match=r"does not match its `config.json`: expected sha256"):
        read_checkpoint(tmp_path / "a")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(b"not tensors at all")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["weights_sha256"] = atomic.sha256_file(path)
    del config["checksum"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="is not a safetensors file"):
        read_checkpoint(tmp_path / "a")


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", CONFIG, _tensors())
    atomic.write_json(tmp_path / "a" / "config.json", PLAN)
    with pytest.raises(StoreError, match="expected a checkpoint document, got kind 'plan'"):
        read_checkpoint(tmp_path / "a")

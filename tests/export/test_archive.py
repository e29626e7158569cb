"""The other formats: run without npprune, and without timm where timm is not the format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from npprune.errors import ExportError, GateError, ModelError
from npprune.export import archive
from npprune.export.archive import to_timm, to_torch_archive
from npprune.export.hugging import bring
from npprune.models.info import model_info
from npprune.models.load import load, timm_code
from npprune.models.surgery import apply_plan
from npprune.records import ClassInfo, ModelInfo, ModelSource, Plan, Preprocessing

CLASSES = [ClassInfo(i, f"kind {i}") for i in range(5)]
PREPROCESSING = Preprocessing((3, 32, 32))
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(widths: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS).eval()
    for block, width in zip(model.blocks, widths, strict=True):
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(48, width), nn.Linear(width, 48)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def info(widths: tuple[int, int]) -> ModelInfo:
    source = ModelSource("vit_tiny_patch16_224.augreg_in21k_ft_in1k", dict(ARGS))
    return ModelInfo(source, 0, 0, list(widths), [3, 3], 48, 5, "cls", PREPROCESSING)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(19, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_a_torch_archive_runs_alone(images, tmp_path):
    model, path = tiny((31, 64)), tmp_path / "m.pt2"
    record = to_torch_archive(model, PREPROCESSING, CLASSES, images, path)
    assert [r.batch for r in record.parity] == [1, 3, 17]
    assert record.passed
    assert record.format == "torch"
    assert record.bytes == path.stat().st_size
    torch.save(images[:4], tmp_path / "x.pt")
    code = (
        "import sys, json, torch\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}, weights_only=True)\n"
        "extra = {'labels': ''}\n"
        f"program = torch.export.load({str(path)!r}, extra_files=extra)\n"
        "assert not {'timm', 'npprune'} & set(sys.modules)\n"
        "print(json.dumps([program.module()(x).tolist(), json.loads(extra['labels'])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, labels = json.loads(done.stdout)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(images[:4]))
    assert [c["name"] for c in labels] == [c.name for c in CLASSES]


def test_an_archive_holds_no_paths(images, tmp_path):
    to_torch_archive(tiny((16, 16)), PREPROCESSING, CLASSES, images, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as file:
        data = b"".join(file.read(name) for name in file.namelist())
    strangers = ["site-packages", sys.prefix, str(Path(__file__).resolve().parents[2])]
    assert [s for s in strangers if s.encode() in data] == []


def test_an_archive_that_does_not_agree_is_not_kept(images, tmp_path, monkeypatch):
    write = archive._write_archive

    def spoiled(*args):
        network = write(*args)
        return lambda x: network(x) + 1

    monkeypatch.setattr(archive, "_write_archive", spoiled)
    with pytest.raises(GateError, match=r"m\.pt2 does not agree"):
        to_torch_archive(tiny((16, 16)), PREPROCESSING, CLASSES, images, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [29, 96, 192])
def test_timm_reads_it(width, images, tmp_path):
    model = tiny((width, width))
    assert not to_timm(model, info((width, width)), CLASSES, tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert loaded.blocks[0].mlp.fc1.out_features == width


def smaller(**plan: Any) -> nn.Module:
    return apply_plan(tiny((64, 64)), Plan(widths=[64, 64], **plan))


ALL = [list(range(64)), list(range(64))]
UNEVEN: dict[str, Callable[[], nn.Module]] = {
    "hidden units": lambda: tiny((31, 64)),
    "heads, queries": lambda: smaller(keep=ALL, heads=[[0, 2], [0, 1, 2]], query_dims=[5, 16]),
    "tokens": lambda: smaller(keep=ALL, merged=[3, 2]),
    "own units, last block for what is read": lambda: smaller(
        keep=[ALL[0][:40], ALL[1][:33]], cls_keep=[ALL[0][30:], []], merged=[4, 0],
        last_for_read=True,
    ),
}  # fmt: skip


def test_timm_is_taught_uneven_networks(images, tmp_path):
    source = ModelSource("vit_tiny_patch16_224.augreg_in21k_ft_in1k", dict(ARGS))
    made = {name: make() for name, make in UNEVEN.items()}
    for name, model in made.items():
        assert to_timm(model, model_info(model, source), CLASSES, tmp_path / name)
        bring(tmp_path / name, timm_code())
    torch.save(images, tmp_path / "x.pt")
    code = (
        "import sys, json, torch\n"
        f"sys.path.insert(0, {str(tmp_path / next(iter(made)))!r})\n"
        "import npprune_timm, timm\n"
        "x, found = torch.load('x.pt', weights_only=True), []\n"
        f"for name in {list(made)!r}:\n"
        "    model = timm.create_model(f'local-dir:{name}', pretrained=True).eval()\n"
        "    found.append(model(x).tolist())\n"
        "ten = timm.create_model(f'local-dir:{name}', pretrained=True, num_classes=10)\n"
        "assert ten.head.out_features == 10\n"
        "assert 'npprune' not in sys.modules\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with pytest.raises(ModelError, match="a folder that npprune wrote for timm"):
        load(str(tmp_path / "tokens"))
    for model, found in zip(made.values(), json.loads(done.stdout), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), model(images))


def test_what_timm_cannot_be_taught(tmp_path):
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=5, img_size=28, depth=2)
    info = model_info(model, ModelSource("eva02_tiny_patch14_224"))
    info.merged = [2, 0]
    with pytest.raises(ExportError, match="the block is a EvaBlock"):
        to_timm(model, info, CLASSES, tmp_path / "out")
    assert not (tmp_path / "out").exists()

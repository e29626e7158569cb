"""Every runtime opens the same network and gives the same logits; what is missing says so."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from npprune import words
from npprune.errors import DeviceError, ExportError
from npprune.export import bench
from npprune.export.onnx import OnnxForm, export_onnx
from npprune.export.parity import torch_logits
from npprune.export.runtimes import RUNTIMES, Served
from npprune.export.widths import measure_width_latency
from tests.export.test_onnx import PREPROCESSING, SIZE, tiny

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)
IMAGES = np.random.default_rng(0).standard_normal((4, 3, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(depth=2, widths=(48, 17))


@pytest.fixture(scope="module")
def served(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")

    def file(precision: str) -> Path:
        path = folder / f"{precision}.onnx"
        if not path.exists():
            export_onnx(model, PREPROCESSING, [], path, OnnxForm(precision=precision))
        return path

    return Served(model, file)


def test_every_word_has_a_runtime() -> None:
    assert set(RUNTIMES) == set(words.RUNTIMES)
    assert {p for r in RUNTIMES.values() for p in r.precisions} == set(words.SERVED_PRECISIONS)


@pytest.mark.parametrize(
    "name",
    [
        "onnxruntime",
        "torch",
        pytest.param("torch-compile", marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("openvino", marks=needs_openvino),
    ],
)
def test_the_same_logits_everywhere(name: str, served: Served, model: nn.Module) -> None:
    opened = RUNTIMES[name].open(served, IMAGES, place="cpu", threads=1)
    expected = torch_logits(model, torch.from_numpy(IMAGES))
    for images in (IMAGES, IMAGES[::-1].copy()):  # it reads what it is given
        found = opened.run(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found[:: 1 if images is IMAGES else -1], expected, atol=1e-4)
    assert opened.threads == 1


@pytest.mark.parametrize(("name", "precision"), [("torch", "bf16"), ("onnxruntime", "fp16")])
def test_half_precision_is_near_and_not_the_same(
    name: str, precision: str, served: Served, model: nn.Module
) -> None:
    opened = RUNTIMES[name].open(served, IMAGES, precision=precision, place="cpu", threads=1)
    expected = torch_logits(model, torch.from_numpy(IMAGES))
    off = np.abs(opened.run(IMAGES) - expected).max() / np.abs(expected).max()
    assert 0 < off < 0.1
    assert next(model.parameters()).dtype == torch.float32  # a copy was made


def test_openvino_that_is_not_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match="OpenVINO is not installed") as caught:
        RUNTIMES["openvino"].open(served, IMAGES)
    assert caught.value.hint == "pip install openvino"


@needs_openvino
def test_what_openvino_cannot_do(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    with pytest.raises(DeviceError, match="`cuda` was asked for"):
        RUNTIMES["openvino"].open(served, IMAGES, place="cuda")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    with pytest.raises(ExportError, match=r"broken\.onnx cannot be opened"):
        RUNTIMES["openvino"].open(Served(file=lambda _: broken), IMAGES)
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(DeviceError, match="does not compute in bf16 on this processor"):
        RUNTIMES["openvino"].open(served, IMAGES, precision="bf16")


@pytest.mark.parametrize("name", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_widths_are_timed_in_any_runtime(name: str) -> None:
    before = torch.random.get_rng_state()
    table = measure_width_latency(8, [4, 16], tokens=5, threads=1, runs=2, runtime=RUNTIMES[name])
    assert table.widths == [4, 16]
    assert min(table.ms) > 0
    assert table.threads == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_row_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = iter([[[10.0, 10.0], [5.0, 5.0]], [[10.0, 10.0], [6.0, 6.0]]])
    monkeypatch.setattr(bench, "interleave", lambda *_: next(passes))
    a, b = (bench.Runner(lambda: None, "torch", "cpu", 2, 1, "bf16") for _ in range(2))
    latency, off = bench.bench_twice(a, b, 1.0)
    assert off == pytest.approx(0.2)  # 5 ms, then 6
    assert (latency.runs, latency.dense_ms, latency.pruned_ms) == (4, 10.0, 5.5)
    assert (latency.batch, latency.precision) == (2, "bf16")


@pytest.mark.parametrize(
    ("ms", "other_ms", "share"), [(1.0, 16.0, 0.0), (3.0, 3.0, 1.0), (2.0, 17.0, 0.5)]
)
def test_the_share_that_does_not_grow(ms: float, other_ms: float, share: float) -> None:
    assert bench.fixed_share(ms, 1, other_ms, 16) == pytest.approx(share)
    of_the_larger = share * ms / other_ms  # the same milliseconds
    assert bench.fixed_share(other_ms, 16, ms, 1) == pytest.approx(of_the_larger)

"""Half precision and eight-bit integers: still the same network, within what they can hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

from npprune.errors import GateError, UsageError
from npprune.export.checked import Comparison, export_checked
from npprune.export.onnx import Int8Needs, OnnxForm, export_onnx
from npprune.export.parity import GATES, Gate, check_parity, logits_of, top1_score
from npprune.export.session import Session, open_session
from npprune.records import ClassInfo, Preprocessing

CLASSES = [ClassInfo(i, f"kind {i}") for i in range(5)]
PREPROCESSING = Preprocessing((3, 32, 32))
INT8 = OnnxForm(precision="int8")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2,
        num_classes=5,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    pixels = torch.randint(0, 256, (24, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    return (pixels.float() / 255 - 0.5) / 0.5


def agreement(model: torch.nn.Module, images: torch.Tensor):
    """A score: minus the mean squared error of the logits."""
    with torch.no_grad():
        expected = model(images).numpy()

    def score(session: Session) -> float:
        return -float(((logits_of(session, images, PREPROCESSING) - expected) ** 2).mean())

    return score


@pytest.mark.parametrize("with_preprocessing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_half_precision(model, images, tmp_path, with_preprocessing):
    full, half = tmp_path / "full.onnx", tmp_path / "half.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, full)
    record = export_checked(
        model, PREPROCESSING, CLASSES, half,
        Comparison(images, gate=Gate(tolerance=1e-2, min_agreement=0.9)),
        OnnxForm(precision="fp16", with_preprocessing=with_preprocessing),
    )  # fmt: skip
    assert record.precision == "fp16"
    assert record.bytes < 0.65 * full.stat().st_size
    assert 1e-6 < max(r.max_relative_error for r in record.parity) < 1e-2
    proto = onnx.load(half)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert kinds["blocks.0.mlp.fc1.weight_t"] == onnx.TensorProto.FLOAT16
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    said = open_session(half, "cpu").metadata
    assert said["precision"] == "fp16"
    assert len(json.loads(said["labels"])) == 5


def test_the_best_of_the_integers_is_kept(model, images, tmp_path):
    path, full = tmp_path / "int8.onnx", tmp_path / "full.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, full)
    score = agreement(model, images[12:])
    made = export_onnx(
        model, PREPROCESSING, CLASSES, path, INT8, int8=Int8Needs(images[:12], score)
    )  # fmt: skip
    assert [c.name for c in made] == ["int8-static", "int8-static-mixed", "int8-dynamic"]
    assert {p.name for p in tmp_path.iterdir()} == {"int8.onnx", "full.onnx"}
    chosen = next(c for c in made if c.chosen)
    assert chosen.score == max(c.score for c in made)
    assert path.stat().st_size == chosen.bytes < full.stat().st_size
    session = open_session(path, "cpu")
    assert session.metadata["precision"] == chosen.name
    assert score(session) == pytest.approx(chosen.score)
    assert onnx.load(path).producer_name == "npprune"
    parity = check_parity(model, path, images, gate=Gate(tolerance=None, min_agreement=0.5))
    assert parity.passed
    assert parity.rows[0].max_relative_error < 0.2


def dot_products() -> bool:
    """Whether the processor multiplies integers without saturating (VNNI)."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.is_file() or "vnni" in cpuinfo.read_text()


@pytest.mark.skipif(not dot_products(), reason="without VNNI dynamic integers saturate, too")
def test_a_corrupted_calibration_set_is_not_chosen_or_refused(model, images, tmp_path):
    """Calibrated on images a thousand times too bright, static ranges are useless: the dynamic
    candidate wins."""
    made = export_onnx(
        model, PREPROCESSING, CLASSES, tmp_path / "m.onnx", INT8,
        int8=Int8Needs(images[:8] * 1000, agreement(model, images)),
    )  # fmt: skip
    static, _, dynamic = made
    assert dynamic.chosen
    assert dynamic.score > static.score


def test_too_large_a_loss_is_refused(model, images, tmp_path):
    with torch.no_grad():
        labels = model(images).argmax(1)
    with pytest.raises(GateError, match=r"int8\.onnx does not agree .*top-1 falls by") as err:
        export_checked(
            model, PREPROCESSING, CLASSES, tmp_path / "int8.onnx", Comparison(images, labels), INT8,
            int8=Int8Needs(
                torch.zeros(2, 3, 32, 32),
                lambda session: float(session.metadata["precision"] == "int8-static"),
            ),
        )  # fmt: skip
    assert err.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_candidates_are_recorded(model, images, tmp_path):
    record = export_checked(
        model, PREPROCESSING, CLASSES, tmp_path / "m.onnx",
        Comparison(images, gate=Gate(None, 0.3)),
        OnnxForm(precision="int8", with_preprocessing=True),
        int8=Int8Needs(images[:8], agreement(model, images)),
    )  # fmt: skip
    assert len(record.details["candidates"]) == 3
    assert record.tolerance == -1.0
    assert open_session(tmp_path / "m.onnx", "cpu").input_name == "pixels"


def test_integers_need_images_and_a_score(model, images, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(UsageError, match="images to calibrate with, and a score"):
        export_onnx(model, PREPROCESSING, CLASSES, path, INT8)
    with pytest.raises(UsageError, match="images to calibrate with, and a score"):
        export_onnx(
            model, PREPROCESSING, CLASSES, path, INT8, int8=Int8Needs(images[:0], lambda s: 0.0)
        )


def test_top1_score(model, images, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, path, OnnxForm(batch=5))
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:6] = (labels[:6] + 1) % 5
    session = open_session(path, "cpu")
    assert top1_score(images, labels, PREPROCESSING)(session) == pytest.approx(18 / 24)


def test_gates_loosen_with_precision():
    assert GATES["fp32"].min_agreement == 1.0 > GATES["fp16"].min_agreement
    assert GATES["int8"].max_drop == 1.0
    assert np.isfinite(GATES["fp16"].tolerance)

"""The page of networks says what the program says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from npprune.errors import ModelError
from npprune.export.onnx import export_onnx
from npprune.models.info import model_preprocessing
from npprune.models.surgery import apply_plan
from npprune.models.view import make_view
from npprune.records import Plan

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("networks", DOCS / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


networks = _script()


def test_the_page_names_every_family_and_some_lines_are_true() -> None:
    text = networks.PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert [line.split(" | ")[0][2:] for line in rows] == list(networks.FAMILIES)
    for family in ("ViT, DeiT", "Swin", "EVA-02 B, L", "Parallel blocks"):
        assert networks.row(family) in text


@pytest.mark.slow
def test_the_page_is_what_the_script_writes() -> None:
    assert networks.PAGE.read_text(encoding="utf-8") == networks.page()


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", networks.FAMILIES)
def test_every_family_that_is_pruned_is_exported(family: str, tmp_path: Path) -> None:
    import onnxruntime

    model = networks.tiny(family)
    try:
        widths = list(make_view(model).widths)
    except ModelError:
        return  # the page says why
    torch.manual_seed(0)
    keep = [list(range(0, w, 2)) for w in widths]
    pruned = apply_plan(model, Plan(keep=keep, widths=widths))
    preprocessing = model_preprocessing(pruned)
    export_onnx(pruned, preprocessing, [], tmp_path / "m.onnx")
    images = torch.randn(2, *preprocessing.input_size)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = pruned(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)

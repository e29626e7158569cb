"""The paper's released program's own output: every neuron equal, scores within 1e-4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import npprune
from npprune.models.released_head import released_head

pytestmark = pytest.mark.golden
CLASSES = ["airplane", "cat"]
RELEASED = {"quadrature": "left-riemann", "points": 20}


def images(golden: Path, label: int) -> Tensor:
    steps = transforms.Compose([
        transforms.Resize((96, 96)),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    files = sorted((golden / "images" / CLASSES[label]).iterdir())
    return torch.stack([steps(Image.open(f).convert("RGB")) for f in files])


def lines(golden: Path, folder: str, label: int) -> list[dict[str, list[list[float]]]]:
    """One entry an image, whether the file holds one or several on a line."""
    text = (golden / folder / f"imgnet_all-{label}.rlt.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [image for row in rows for image in (row if isinstance(row, list) else [row])]


@pytest.fixture(scope="module")
def vit(shared_golden: Path) -> nn.Module:
    return npprune.load_model("auto", checkpoint=shared_golden / "vit" / "weights.npz")


@pytest.fixture(scope="module")
def mae(shared_golden: Path) -> nn.Module:
    """With the released program's head: it normalises the pooled tokens twice."""
    weights = shared_golden / "mae" / "weights.pth"
    return released_head(npprune.load_model("auto", checkpoint=weights, num_heads=3))


def check(model: nn.Module, x: Tensor, label: int, rows: list, *, factor: float, **how) -> None:
    labels = torch.full((len(x),), label)
    found = npprune.discover_paths(model, x, labels, **RELEASED, **how)
    paths = [row["ja"] if how.get("topk", 1) > 1 else [[n] for n in row["ja"][0]] for row in rows]
    assert found.neurons.tolist() == paths
    scores = torch.tensor([float(torch.tensor(row["ja_score"]).flatten()[0]) for row in rows])
    torch.testing.assert_close(found.scores * factor, scores, rtol=1e-4, atol=0)


def check_baseline(model: nn.Module, x: Tensor, label: int, rows: list, factor: float) -> None:
    labels = torch.full((len(x),), label)
    found = npprune.discover_paths(model, x, labels, method="activation", **RELEASED)
    assert found.neurons[..., 0].tolist() == [row["base"][0] for row in rows]
    scores = torch.tensor([row["base_score"][0][0] for row in rows])
    # one path's terms cancel to 1e-4 of their size, where float32 keeps three digits
    torch.testing.assert_close(found.scores * factor, scores, rtol=1e-4, atol=5e-12)


@pytest.mark.parametrize("label", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_vit_neuron_paths(vit: nn.Module, shared_golden: Path, label: int) -> None:
    rows, x = lines(shared_golden, "vit/neuron_path", label), images(shared_golden, label)
    check(vit, x, label, rows, factor=1)
    check_baseline(vit, x, label, rows, 1)


@pytest.mark.slow
@pytest.mark.parametrize("label", [0, 1])
def test_vit_five_neurons_a_block(vit: nn.Module, shared_golden: Path, label: int) -> None:
    rows, x = lines(shared_golden, "vit/topk5", label), images(shared_golden, label)
    check(vit, x, label, rows, factor=1, topk=5, accumulation="last")


@pytest.mark.parametrize("label", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_vit_influence_pattern(vit: nn.Module, shared_golden: Path, label: int) -> None:
    rows, x = lines(shared_golden, "vit/influence_pattern", label), images(shared_golden, label)
    labels = torch.full((len(x),), label)
    found = npprune.discover_paths(vit, x, labels, method="influence-pattern", **RELEASED)
    assert found.neurons[..., 0].tolist() == [[int(n) for n in row["path"][0]] for row in rows]


@pytest.mark.parametrize("label", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_mae_neuron_paths(mae: nn.Module, shared_golden: Path, label: int) -> None:
    rows, x = lines(shared_golden, "mae/neuron_path", label), images(shared_golden, label)
    assert len(rows) == 10
    check(mae, x, label, rows, factor=1 / 196)
    check_baseline(mae, x, label, rows, 1 / 196)


def test_mixed_classes_in_one_batch_change_nothing(vit: nn.Module, shared_golden: Path) -> None:
    both = torch.cat([images(shared_golden, 0)[:3], images(shared_golden, 1)[:3]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = npprune.discover_paths(vit, both, labels, **RELEASED)
    for label, part in ((0, slice(0, 3)), (1, slice(3, 6))):
        rows = lines(shared_golden, "vit/neuron_path", label)[:3]
        assert found.neurons[part, :, 0].tolist() == [row["ja"][0] for row in rows]

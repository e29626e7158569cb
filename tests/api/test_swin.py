"""The line on a network in stages: paths, pruning, healing, export, and all of it once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npprune
from npprune.models.info import count_macs
from npprune.models.surgery import mask_plan, set_classifiers, set_fc2
from npprune.models.view import classifiers, make_view
from npprune.pipeline.common.results import render_report
from tests.api.conftest import SMALL
from tests.helpers.tiny import tiny_batch, tiny_swin

Data = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"latency": False}


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    return tiny_swin(mlp_ratio=4, depths=(1, 1)).float()


@pytest.fixture(scope="module")
def data() -> Data:
    images, labels = tiny_batch(32, size=32)
    return images.float(), labels


@pytest.fixture(scope="module")
def found(swin: nn.Module, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("swin") / "run"
    return npprune.discover(swin, data, topk=2, points=2, out=run)


@pytest.fixture(scope="module")
def pruned(swin: nn.Module, data: Data, found: Any) -> npprune.Pruned:
    out = found.folder.parent / "half"
    return npprune.prune(swin, data, paths=found, target_macs=0.7, out=out, **SMALL)


def test_pruning_by_macs(swin: nn.Module, pruned: npprune.Pruned, data: Data) -> None:
    cost = pruned.cost
    assert cost.dense_macs == count_macs(swin, (3, 32, 32))
    assert cost.macs == count_macs(pruned.model, (3, 32, 32))
    assert 0.6 * cost.dense_macs < cost.macs <= 0.7 * cost.dense_macs
    assert len(set(pruned.plan.kept_widths)) > 1
    # refitted, it is the masked network with the same second layers
    masked = mask_plan(swin, pruned.plan)
    small, wide = make_view(pruned.model), make_view(masked)
    for l, kept in enumerate(pruned.plan.keep):
        weight = torch.zeros_like(wide.fc2(l).weight)
        weight[:, kept] = small.fc2(l).weight.detach()
        set_fc2(masked, l, weight, small.fc2(l).bias)
    heads = classifiers(pruned.model)
    set_classifiers(masked, [(head.weight, head.bias) for head in heads])
    with torch.no_grad():
        expected = masked(data[0])
        torch.testing.assert_close(pruned.model(data[0]), expected, rtol=1e-4, atol=1e-5)


def test_refitting_helps(swin: nn.Module, pruned: npprune.Pruned, data: Data) -> None:
    images, _ = tiny_batch(64, size=32, seed=9)

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            p, q = swin(images.float()).log_softmax(1), model(images.float()).log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert divergence(pruned.model) < 0.5 * divergence(mask_plan(swin, pruned.plan))


@pytest.mark.slow
def test_what_comes_after(
    swin: nn.Module, pruned: npprune.Pruned, data: Data, found: Any, tmp_path: Path
) -> None:
    evaluation = npprune.evaluate(pruned, data, **QUICK)
    assert evaluation.agreement.correct > 16
    loaded = npprune.load(found.folder.parent / "half")
    assert torch.equal(loaded.model(data[0]), pruned.model(data[0]))
    record = npprune.export(loaded, tmp_path / "m.onnx", data[0], **QUICK)
    assert record.passed
    assert max(row.max_relative_error for row in record.parity) < 1e-4
    again = npprune.prune(loaded, data, target_macs=0.9, **SMALL)
    assert again.cost.macs <= 0.9 * pruned.cost.macs
    healed = npprune.heal(loaded, data, dense=swin, epochs=4, lr=3e-3)
    assert healed.after.divergence_nats <= healed.before.divergence_nats
    render_report(found.folder)
    assert "swin" in (found.folder / "report.md").read_text()

"""A pruned network is an ordinary one: whatever is done with networks can be done with it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import npprune
from npprune.models.tokens import tokens_of
from tests.api.conftest import SMALL

Data = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def by_tokens(model: nn.Module, data: Data) -> npprune.Pruned:
    """Tokens merge, too, and the heads' queries are narrower than their values."""
    axes = ["mlp", "heads", "qk", "tokens"]
    return npprune.prune(model, data, target_macs=0.5, axes=axes, **SMALL)


@pytest.fixture(scope="module")
def by_units(model: nn.Module, data: Data) -> npprune.Pruned:
    return npprune.prune(model, data, keep=0.5, **SMALL)


@pytest.fixture(params=["plain", "tokens"])
def network(
    request: pytest.FixtureRequest, by_units: npprune.Pruned, by_tokens: npprune.Pruned
) -> npprune.Pruned:
    """A copy, to change at will."""
    return copy.deepcopy(by_units if request.param == "plain" else by_tokens)


def test_the_second_network_merges_tokens_and_has_uneven_heads(by_tokens: npprune.Pruned) -> None:
    plan = by_tokens.plan
    assert any(tokens_of(by_tokens.model)[0])
    assert plan.heads is not None or plan.query_dims is not None


def test_pickle_and_deepcopy(network: npprune.Pruned, data: Data) -> None:
    expected = network.model(data[0])
    buffer = io.BytesIO()
    torch.save(network.model, buffer)
    buffer.seek(0)
    for again in (
        pickle.loads(pickle.dumps(network.model)),
        pickle.loads(pickle.dumps(network)).model,
        copy.deepcopy(network.model),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(again(data[0]), expected)


def test_units_of_the_class_tokens_own_survive_too(
    model: nn.Module, data: Data, tmp_path: Path
) -> None:
    wish = {"axes": ["mlp", "cls"], "target_macs": 0.6, "compensation": "least-squares"}
    pruned = npprune.prune(model, data, **wish, **SMALL)
    expected = pruned.model(data[0])
    assert torch.equal(pickle.loads(pickle.dumps(pruned.model))(data[0]), expected)
    npprune.save(pruned, tmp_path / "x")
    assert torch.equal(npprune.load(tmp_path / "x").model(data[0]), expected)
    assert pruned.plan.cls_keep is not None


def test_state_dicts_go_round(network: npprune.Pruned, data: Data, tmp_path: Path) -> None:
    expected = network.model(data[0])
    torch.save(network.model.state_dict(), tmp_path / "x.pt")
    other = copy.deepcopy(network.model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True), strict=True)
    assert torch.equal(other(data[0]), expected)


def test_compiled(network: npprune.Pruned, data: Data) -> None:
    """Traced by torch.compile; what the generated code is made by is not ours."""
    torch._dynamo.reset()
    compiled = torch.compile(network.model, backend="eager")
    assert torch.allclose(compiled(data[0]), network.model(data[0]), atol=1e-5)
    network.model = compiled  # type: ignore[assignment]
    assert npprune.evaluate(network, data, latency=False).agreement.total == 80


def train(
    network: nn.Module, data: Data, steps: int = 3, dtype: torch.dtype | None = None
) -> list[float]:
    """An ordinary loop; the losses."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            loss = cross_entropy(network(data[0]).float(), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_an_ordinary_loop_trains_every_weight(network: npprune.Pruned, data: Data) -> None:
    before = {k: v.clone() for k, v in network.model.named_parameters()}
    losses = train(network.model.train(), data)
    assert losses[-1] < losses[0]
    still = [k for k, v in network.model.named_parameters() if torch.equal(v, before[k])]
    assert still == []


def test_amp_and_moving_averages_and_a_second_pruning(network: npprune.Pruned, data: Data) -> None:
    ema = ModelEmaV3(network.model, decay=0.5)
    losses = train(network.model.train(), data, dtype=torch.bfloat16)
    ema.update(network.model)
    assert losses[-1] < losses[0]
    assert not torch.equal(ema.module.eval()(data[0]), network.model.eval()(data[0]))
    again = npprune.prune(ema, data, target_macs=0.8, **SMALL)
    assert again.cost.macs < network.cost.macs
    assert again.cost.dense_macs == network.cost.macs
    healed = npprune.heal(again, data, epochs=1)
    assert healed.steps > 0


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """One process, by gloo."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_distributed(network: npprune.Pruned, data: Data) -> None:
    alone = copy.deepcopy(network.model).train()
    shared = DistributedDataParallel(network.model.train())
    assert train(shared, data) == pytest.approx(train(alone, data), rel=1e-4)
    network.model = shared
    assert npprune.heal(network, data, epochs=1).steps > 0
    again = npprune.prune(shared, data, keep=0.5, **SMALL)
    assert again.cost.dense_macs == network.cost.macs


def test_into_timms_own_training_tools(network: npprune.Pruned, data: Data) -> None:
    """What timm's `train.py` does to a network before its loop."""
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler, dispatch_clip_grad

    model = network.model.train()
    assert model.get_classifier() is model.head  # type: ignore[operator]
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.75)
    loss = cross_entropy(model(data[0]), data[1])
    loss.backward()
    dispatch_clip_grad(model.parameters(), 1.0, mode="norm")
    optimizer.step()
    assert float(cross_entropy(model(data[0]), data[1])) < float(loss)
    assert NativeScaler is not None
    assert timm.data.resolve_model_data_config(model)["input_size"]

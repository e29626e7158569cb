"""Hidden units of the class token's own: masked and removed agree, and the cost is counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from npprune.core.attribution.methods import find_paths
from npprune.core.compression import cost
from npprune.errors import ModelError, StoreError
from npprune.models.info import count_macs, model_info, model_sizes, state
from npprune.models.load import build, create
from npprune.models.own_units import own_widths
from npprune.models.surgery import apply_plan, check_axes, mask_plan, set_own_fc2
from npprune.models.view import make_view
from npprune.records import CheckpointConfig, ModelSource, Plan
from tests.helpers.tiny import tiny_batch
from tests.models.test_surgery import TINY

READ: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {}),
    "registers": ("vit_base_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "distilled": ("deit_base_distilled_patch16_224", {}),
    "LayerScale": ("deit3_base_patch16_224", {}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}),
}


def network(name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    architecture, more = READ[name]
    args = {**TINY, **more}
    model = create(architecture, args).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model, architecture, args


def plan_for(model: nn.Module, **more: Any) -> Plan:
    widths = list(make_view(model).widths)
    keep = [list(range(0, h, 2)) for h in widths]
    return Plan(keep, widths, cls_keep=[list(range(1, h, 4)) for h in widths], **more)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("merged", [None, [4, 0]])
def test_masked_equals_removed_and_the_cost_is_exact(name: str, merged: list[int] | None) -> None:
    model, architecture, args = network(name)
    plan = plan_for(model, merged=merged)
    x = tiny_batch(3, size=32)[0].float()
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        assert torch.allclose(pruned(x), masked(x), atol=1e-4)
        assert not torch.allclose(pruned(x), model(x), atol=1e-2)
        assert torch.equal(pruned(x), copy.deepcopy(pruned)(x))
        assert torch.allclose(pruned(x[:1]), pruned(x)[:1], atol=1e-4)
    sizes = model_sizes(pruned)
    assert sizes.own == tuple(len(k) for k in plan.cls_keep or [])
    saved = cost.macs(model_sizes(model)) - cost.macs(sizes)
    assert saved == count_macs(model, (3, 32, 32)) - count_macs(pruned, (3, 32, 32)) > 0
    assert cost.params(sizes) == sum(p.numel() for p in pruned.parameters())
    info = model_info(pruned, ModelSource(architecture, args))
    assert info.cls_widths == list(sizes.own or ())
    config = CheckpointConfig(
        info.source, info.widths, info.heads, info.num_classes, info.preprocessing, [], "", "",
        merged=info.merged,
    )  # fmt: skip
    again = build(config, load_tensors(save_tensors(state(pruned))))
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))


def test_one_block_alone_may_have_own_units() -> None:
    model, *_ = network("vit")
    plan = plan_for(model)
    plan.keep[1], plan.cls_keep = list(range(plan.widths[1])), [[3, 5], []]
    pruned = apply_plan(model, plan)
    assert own_widths(pruned) == [2, 0]
    x = tiny_batch(2, size=32)[0].float()
    with torch.no_grad():
        assert torch.allclose(pruned(x), mask_plan(model, plan)(x), atol=1e-4)
    pruned.train()
    pruned(x).sum().backward()
    cls: Any = pruned.blocks[0].mlp.cls  # type: ignore[union-attr,index]
    assert float(cls.fc1.weight.grad.abs().sum()) > 0


def test_other_values_for_the_own_second_layer() -> None:
    pruned = apply_plan(network("vit")[0], plan_for(network("vit")[0]))
    mlp: Any = pruned.blocks[0].mlp  # type: ignore[union-attr,index]
    weight = torch.randn_like(mlp.cls.fc2.weight)
    before = mlp.fc2.weight.clone()
    set_own_fc2(pruned, 0, weight)
    assert torch.equal(mlp.cls.fc2.weight, weight)
    assert torch.equal(mlp.fc2.weight, before)
    with pytest.raises(ModelError, match=r"mlp\.cls\.fc2"):
        set_own_fc2(pruned, 0, weight[:, :3])
    with pytest.raises(ModelError, match="share one MLP"):
        set_own_fc2(network("vit")[0], 0, weight)


def test_what_cannot_have_own_units_is_refused() -> None:
    average = create("vit_base_patch16_224", {**TINY, "global_pool": "avg"})
    with pytest.raises(ModelError, match="reads every token"):
        check_axes(average, ["cls"])
    with pytest.raises(ModelError, match="reads every token"):
        apply_plan(average, plan_for(average))
    pruned = apply_plan(network("vit")[0], plan_for(network("vit")[0]))
    with pytest.raises(ModelError, match="of its own already"):
        check_axes(pruned, ["cls"])
    x, y = tiny_batch(2, size=32)
    x = x.float()
    with pytest.raises(ModelError, match="no longer one thing"):
        find_paths(make_view(pruned), x, y % 5, topk=1)


def test_a_plan_says_what_is_wrong_with_own_units() -> None:
    with pytest.raises(StoreError, match="one list a block"):
        Plan([[0]], [4], cls_keep=[[0], [1]])
    with pytest.raises(StoreError, match=r"cls_keep\[0\]` must lie in 0..3, got 4"):
        Plan([[0]], [4], cls_keep=[[1, 4]])

"""Closed-form cost against PyTorch's own counters on timm models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from npprune.core.compression import cost
from npprune.errors import GateError, UsageError


def sizes_of(model: Any, **over: Any) -> cost.Sizes:
    """Read off a timm model."""
    block, patch = model.blocks[0], model.patch_embed
    explained = [patch.proj, model.head]
    inside = [block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2]

    def count(modules: list[nn.Module]) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    fields: dict[str, Any] = {
        "tokens": patch.num_patches + model.num_prefix_tokens,
        "width": model.embed_dim,
        "hidden": tuple(b.mlp.fc2.in_features for b in model.blocks),
        "classes": model.num_classes,
        "patches": patch.num_patches,
        "patch_inputs": patch.proj.weight[0].numel(),
        "gated": block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features,
        "fixed_params": count([model]) - count(list(model.blocks)) - count(explained),
        "block_params": count([block]) - count(inside),
    }
    return cost.Sizes(**(fields | over))


def counted(model: nn.Module, size: int) -> int:
    # the counter does not know every fused kernel; the plain one is made of products
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"],
)
def test_params_and_macs_match_the_counters(name: str) -> None:
    model = timm.create_model(name, img_size=112, num_classes=10, depth=3)
    sizes = sizes_of(model)
    assert cost.params(sizes) == sum(p.numel() for p in model.parameters())
    assert cost.macs(sizes) == counted(model, 112)


def test_gated_mlp_and_uneven_widths_match() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        num_classes=7,
        depth=2,
        mlp_layer=timm.layers.GluMlp,
    )
    sizes = sizes_of(model)
    assert sizes.gated
    assert cost.params(sizes) == sum(p.numel() for p in model.parameters())
    assert cost.macs(sizes) == counted(model, 64)

    plain: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=2)
    mlp = plain.blocks[1].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(192, 48), nn.Linear(48, 192)
    uneven = sizes_of(plain)
    assert uneven.hidden == (768, 48)
    assert cost.params(uneven) == sum(p.numel() for p in plain.parameters())
    assert cost.macs(uneven) == counted(plain, 64)


def test_neuron_price_is_the_difference_one_neuron_makes() -> None:
    sizes = cost.Sizes(
        tokens=17, width=24, hidden=(40, 50), classes=5, patches=16, patch_inputs=12, gated=True
    )
    for l in (0, 1):
        less = sizes.with_hidden([h - (i == l) for i, h in enumerate(sizes.hidden)])
        assert cost.params(sizes) - cost.params(less) == cost.neuron_price(sizes, l, "params")
        assert cost.macs(sizes) - cost.macs(less) == cost.neuron_price(sizes, l, "macs")
    assert cost.neuron_price(sizes, 0, "neurons") == 1


def test_fewer_heads_and_narrower_queries() -> None:
    wide = cost.Sizes(
        tokens=5, width=8, hidden=(16,), classes=3, patches=4, patch_inputs=12,
        queries=(8,), values=(8,),
    )  # fmt: skip
    narrow = cost.Sizes(
        tokens=5, width=8, hidden=(16,), classes=3, patches=4, patch_inputs=12,
        queries=(4,), values=(6,),
    )  # fmt: skip
    # by hand: q and k lose 4 columns each, v loses 2; scores 5x5x4, mixing 5x5x2, projection 2 rows
    assert cost.macs(wide) - cost.macs(narrow) == 5 * 8 * (8 + 2) + 25 * (4 + 2) + 5 * 2 * 8
    assert cost.params(wide) - cost.params(narrow) == 9 * (8 + 2) + 2 * 8


def test_refusals() -> None:
    sizes = cost.Sizes(tokens=5, width=8, hidden=(16, 16), classes=3, patches=4, patch_inputs=12)
    with pytest.raises(UsageError, match="must have 2 entries, got 1"):
        sizes.with_hidden([4])
    with pytest.raises(UsageError, match="got 'time'"):
        cost.neuron_price(sizes, 0, "time")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`queries`"):
        cost.Sizes(
            tokens=5, width=8, hidden=(16, 16), classes=3, patches=4, patch_inputs=12, queries=(8,)
        )


@pytest.mark.parametrize("price", ["params", "macs"])
def test_hidden_budget_leaves_what_a_target_allows(price: Any) -> None:
    sizes = cost.Sizes(tokens=17, width=24, hidden=(40, 50), classes=5, patches=16, patch_inputs=12)
    count = {"params": cost.params, "macs": cost.macs}[price]
    each = cost.neuron_price(sizes, 0, price)
    smaller = count(sizes.with_hidden((20, 30)))
    assert cost.hidden_budget(sizes, smaller, price) == 50 * each
    assert cost.hidden_budget(sizes, count(sizes), price) == 90 * each
    with pytest.raises(GateError, match="without any MLP neuron"):
        cost.hidden_budget(sizes, 0.05 * count(sizes), price)
    with pytest.raises(UsageError, match="got 'neurons'"):
        cost.hidden_budget(sizes, 0.5, "neurons")

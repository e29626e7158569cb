"""Removal: what is pruned equals what is masked, and the plan belongs to the network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from npprune.core.compression import cost
from npprune.errors import ModelError
from npprune.models.info import count_macs, model_sizes, state
from npprune.models.load import build, create, load, model_info, weights_sha256
from npprune.models.surgery import apply_plan, check_prunable, cut_head, mask_plan, set_fc2
from npprune.models.view import make_view
from npprune.records import CheckpointConfig, ModelSource, Plan

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
TINY |= {"num_heads": 3, "num_classes": 5}

PRUNABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {}),
    "vit, average": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "vit, registers": ("vit_base_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "vit, QK norm": ("vit_base_patch16_224", {"qk_norm": True}),
    "vit, no biases": ("vit_base_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "deit distilled": ("deit_base_distilled_patch16_224", {}),
    "deit3, LayerScale": ("deit3_base_patch16_224", {}),
    "dinov2, packed SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3, SwiGLU": ("vit_small_plus_patch16_dinov3", {}),
    "aimv2, SwiGLU without biases": ("aimv2_large_patch14_224", {}),
    "clip, pre-norm": ("vit_base_patch16_clip_224", {}),
    "siglip, attention pool": ("vit_base_patch16_siglip_224", {}),
    "differential attention": ("vit_dlittle_patch16_reg1_gap_256", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva02, packed SwiGLU": ("eva02_tiny_patch14_224", {}),
    "relative positions": ("vit_relpos_base_patch16_224", {}),
}


def family(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    timm_name, changes = PRUNABLE[name]
    model = create(timm_name, {**TINY, **changes}).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * 0.2 + 0.05)
    return model, torch.randn(3, 3, 32, 32, generator=generator, dtype=dtype)


def some_plan(model: nn.Module, **fields: Any) -> Plan:
    """Other widths in every block, neither a prefix nor evenly spaced."""
    widths = list(make_view(model).widths)
    keep = [[i for i in range(w) if (i * 7 + l) % 5 < 2 + l % 3] for l, w in enumerate(widths)]
    return Plan(keep=keep, widths=widths, source_sha256=weights_sha256(model), **fields)


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_equals_masked(name: str) -> None:
    model, images = family(name)
    before = weights_sha256(model)
    plan = some_plan(model, classes=[4, 0, 2])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
        dense = model(images)
        assert expected.shape == (3, 3)
        assert (dense[:, [4, 0, 2]] - expected).abs().max() > 1e-4  # something was removed
    assert make_view(pruned).widths == tuple(plan.kept_widths)
    assert weights_sha256(model) == before
    removed = sum(plan.widths) - sum(plan.kept_widths)
    gate = 2 if "SwiGLU" in name else 1
    bias = 0 if ("no biases" in name or "without biases" in name) else gate
    heads = 2 if "distilled" in name else 1
    d = TINY["embed_dim"]
    count = {m: sum(p.numel() for p in m.parameters()) for m in (model, pruned)}
    assert count[model] - count[pruned] == removed * ((gate + 1) * d + bias) + heads * 2 * (d + 1)


@pytest.mark.parametrize("name", [n for n in PRUNABLE if not n.startswith("differential")])
def test_the_closed_form_cost_follows_the_pruning(name: str) -> None:
    model, _ = family(name)
    pruned = apply_plan(model, some_plan(model))
    dense, small = model_sizes(model), model_sizes(pruned)
    assert cost.params(small) == sum(p.numel() for p in pruned.parameters())
    assert cost.params(dense.with_hidden(small.hidden)) == cost.params(small)
    counted = [count_macs(m, (3, 32, 32)) for m in (model, pruned)]
    closed = [cost.macs(s) for s in (dense, small)]
    assert counted[0] - counted[1] == closed[0] - closed[1]
    if name.startswith(("vit", "clip", "dinov2", "deit3", "aimv2")):
        assert counted == closed


def test_the_closed_form_cost_follows_the_heads() -> None:
    model, _ = family("vit")
    pruned = apply_plan(model, some_plan(model, heads=[[0, 2], [1]]))
    sizes = model_sizes(pruned)
    assert sizes.queries == (16, 8)
    assert cost.params(sizes) == sum(p.numel() for p in pruned.parameters())
    assert cost.macs(sizes) == count_macs(pruned, (3, 32, 32))


def config_of(name: str, model: nn.Module) -> CheckpointConfig:
    timm_name, changes = PRUNABLE[name]
    info = model_info(model, ModelSource(timm_name, {**TINY, **changes}))
    return CheckpointConfig(
        source=info.source,
        widths=info.widths,
        heads=info.heads,
        num_classes=info.num_classes,
        preprocessing=info.preprocessing,
        classes=[],
        weights_sha256=info.source.sha256,
    )


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_networks_are_rebuilt_from_their_tensors(name: str) -> None:
    model, images = family(name, torch.float32)
    pruned = apply_plan(model, some_plan(model, classes=[1, 3]))
    for l in range(2):
        fc2 = make_view(pruned).fc2(l)
        set_fc2(pruned, l, fc2.weight * 2, torch.ones(fc2.out_features))
    rebuilt = build(config_of(name, pruned), load_tensors(save_tensors(state(pruned))))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), pruned(images), rtol=0, atol=0)
    assert weights_sha256(rebuilt) == weights_sha256(pruned)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit", "vit, QK norm", "vit, no biases", "deit3, LayerScale"])
def test_heads_are_removed_as_masked(name: str, fused: bool) -> None:
    model, images = family(name)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    plan = some_plan(model, heads=[[0, 2], [1]])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), masked(images), rtol=0, atol=1e-12)
    sizes = [(b.attn.num_heads, b.attn.head_dim, b.attn.attn_dim) for b in pruned.blocks]  # type: ignore[union-attr]
    assert sizes == [(2, 8, 16), (1, 8, 8)]
    rebuilt = build(config_of(name, pruned), state(pruned)).double()
    for block in rebuilt.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    rebuilt.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), pruned(images), rtol=0, atol=1e-12)


def test_heads_of_other_attentions_are_refused() -> None:
    model, _ = family("beit")
    with pytest.raises(ModelError, match=r"heads cannot be removed from timm.models.beit"):
        apply_plan(model, some_plan(model, heads=[[0], [0, 1, 2]]))
    apply_plan(model, some_plan(model, heads=[[0, 1, 2], [0, 1, 2]]))  # nothing to remove
    model, _ = family("vit")
    for heads, match in (
        ([[0], [3]], r"`heads\[1\]` must be ascending within 0..2, at least one, got \[3\]"),
        ([[], [0]], r"`heads\[0\]` must be"),
        ([[1, 0], [0]], r"got \[1, 0\]"),
        ([[0]], "names heads for 1 blocks, the network has 2"),
    ):
        with pytest.raises(ModelError, match=match):
            apply_plan(model, some_plan(model, heads=heads))


def test_a_plan_that_keeps_all_changes_nothing() -> None:
    model, images = family("vit")
    plan = Plan(keep=[list(range(96))] * 2, widths=[96, 96])
    pruned = apply_plan(model, plan)
    assert weights_sha256(pruned) == weights_sha256(model)
    assert pruned is not model
    torch.testing.assert_close(pruned(images), model(images), rtol=0, atol=0)


def test_one_neuron_can_stay() -> None:
    model, images = family("dinov2, packed SwiGLU")
    plan = Plan(keep=[[47], [0]], widths=[48, 48])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    torch.testing.assert_close(pruned(images), masked(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_surgery_works_with_gradients_switched_off(mode: Any) -> None:
    model, images = family("vit")
    plan = some_plan(model)
    with mode():
        pruned = apply_plan(model, plan)
        torch.testing.assert_close(
            pruned(images), mask_plan(model, plan)(images), rtol=0, atol=1e-12
        )
    pruned(images).sum().backward()
    assert make_view(pruned).fc2(0).weight.grad is not None


def test_gradients_are_wanted_as_before() -> None:
    model, _ = family("vit")
    assert all(p.requires_grad for p in apply_plan(model, some_plan(model)).parameters())
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in apply_plan(model, some_plan(model)).parameters())


def test_a_plan_belongs_to_its_weights() -> None:
    model, _ = family("vit")
    plan = some_plan(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cls_token.add_(1)  # type: ignore[union-attr,operator]
    for change in (apply_plan, mask_plan):
        with pytest.raises(ModelError, match=r"plan was made for weights .*, the network's are"):
            change(other, plan)
        change(other, plan, force=True)
        change(other, Plan(keep=plan.keep, widths=plan.widths))
    narrow, _ = family("dinov2, packed SwiGLU")
    with pytest.raises(ModelError, match="2 blocks of 96 hidden units, the network has 2 of 48"):
        apply_plan(narrow, plan)


def test_other_norms_inside_the_mlp_are_refused() -> None:
    model: Any = create("beit3_base_patch16_224", TINY)
    model.blocks[1].mlp.norm = nn.GroupNorm(1, 96)
    with pytest.raises(ModelError, match=r"block 1.* GroupNorm between its activation and `fc2`"):
        check_prunable(model)


def test_unknown_mlps_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(24, 8), nn.Linear(8, 24)

    model, _ = family("vit")
    model.blocks[1].mlp = Odd()  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match=r"block 1: .*Odd is not a two-layer MLP"):
        check_prunable(model)


def test_set_fc2() -> None:
    model, _ = family("vit, no biases")
    weight, bias = torch.randn(24, 96).double(), torch.randn(24).double()
    set_fc2(model, 1, weight, bias)
    fc2 = make_view(model).fc2(1)
    assert fc2.bias is not None
    torch.testing.assert_close(fc2(torch.ones(96).double()), weight.sum(1) + bias)
    assert isinstance(fc2.bias, nn.Parameter)
    set_fc2(model, 1, weight)  # leaves the bias
    torch.testing.assert_close(fc2.bias.detach(), bias)
    with pytest.raises(ModelError, match=r"block 0: `fc2` needs a weight of \[24, 96\], got"):
        set_fc2(model, 0, weight[:, :9])
    with pytest.raises(ModelError, match=r"needs a bias of \[24\], got \[3\]"):
        set_fc2(model, 0, weight, bias[:3])


@pytest.mark.parametrize("name", ["vit", "deit distilled", "siglip, attention pool"])
def test_cut_head(name: str) -> None:
    model, images = family(name)
    cut = cut_head(model, [3, 1])
    torch.testing.assert_close(cut(images), model(images)[:, [3, 1]], rtol=0, atol=1e-12)
    assert cut.num_classes == 2
    for classes, match in (
        ([], "at least one class"),
        ([5], r"must lie in 0..4, got 5"),
        ([-1], r"must lie in 0..4, got -1"),
        ([2, 2], "must not repeat, got 2 twice"),
    ):
        with pytest.raises(ModelError, match=match):
            cut_head(model, classes)


@pytest.mark.testbed
def test_pruned_equals_masked_on_a_real_network(shared_testbed: Path) -> None:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor, resize

    file = shared_testbed / "vit_tiny/vit_tiny_patch16_224.safetensors"
    model = load("vit_tiny_patch16_224", checkpoint=file).model
    paths = sorted((shared_testbed / "imagenet/val").glob("*/*.JPEG"))[:8]
    images = torch.stack(
        [resize(pil_to_tensor(Image.open(p).convert("RGB")), [224, 224]) for p in paths]
    )
    images = images.float() / 127.5 - 1
    heads = [[0, 2] if l % 3 else [0, 1, 2] for l in range(12)]
    for plan in (some_plan(model), some_plan(model, heads=heads)):
        with torch.no_grad():
            expected = mask_plan(model, plan)(images)
            pruned = apply_plan(model, plan)(images)
        # Float32 sums in another order: relative to the largest logit, as parity is measured.
        assert (pruned - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["vit", "dinov3, SwiGLU", "dinov2, packed SwiGLU"])
def test_surgery_leaves_every_parameter_as_trainable_as_it_was(name: str) -> None:
    model, _ = family(name, torch.float32)
    for i, (part, p) in enumerate(model.named_parameters()):
        p.requires_grad_(part.endswith("bias") if "mlp" in part else i % 2 == 0)
    before = {part: (p.requires_grad, p.dtype, p.device) for part, p in model.named_parameters()}
    pruned = apply_plan(model.train(), some_plan(model, classes=[0, 3]))
    after = {part: (p.requires_grad, p.dtype, p.device) for part, p in pruned.named_parameters()}
    assert after == before
    assert pruned.training

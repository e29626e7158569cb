"""Narrower queries and keys in timm's networks: kernels, masks, rebuilding, cost, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from npprune.core.compression import cost
from npprune.core.compression.attention import collect_attention, shrink, smaller_qkv, stand_ins
from npprune.core.compression.harm import layers_replaced
from npprune.errors import ModelError
from npprune.export.onnx import export_onnx
from npprune.export.parity import check_parity
from npprune.models.attention import NarrowAttention, answer_first_query
from npprune.models.info import count_macs, model_info, model_sizes, state, weights_sha256
from npprune.models.load import build, create
from npprune.models.surgery import apply_plan, check_axes, mask_plan, set_proj, set_qkv
from npprune.models.view import make_view
from npprune.records import CheckpointConfig, ClassInfo, ModelSource, Plan, from_json, to_json
from tests.models.test_surgery import TINY, some_plan

ARGS: dict[str, Any] = {**TINY, "embed_dim": 32, "num_heads": 2}


def network(
    name: str = "vit_base_patch16_224", dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[nn.Module, Tensor]:
    """Two blocks of two heads of 16 dimensions, and six images."""
    model = create(name, {**ARGS, **changes}).to(dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype) * 0.2 + 0.05)
    return model, torch.randn(6, 3, 32, 32, generator=g, dtype=dtype)


def fused(model: nn.Module, on: bool) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = on  # type: ignore[union-attr]
    return model


def calibrated(
    model: nn.Module,
    images: Tensor,
    heads: list[list[int]],
    dims: list[int],
    values: bool = False,
) -> tuple[nn.Module, Tensor]:
    """The network with the calibrated smaller attention, and what it should answer."""
    view = make_view(model)
    found = collect_attention(view, [images], generator=torch.Generator().manual_seed(0))
    widths = list(view.widths)
    plan = Plan(keep=[list(range(w)) for w in widths], widths=widths, heads=heads)
    setattr(plan, "head_dims" if values else "query_dims", dims)
    small, layers = apply_plan(model, plan), {}
    for l, m in enumerate(found):
        p = view.attention(l)
        s = shrink(p, m, heads[l], dims[l], values=values)
        layers.update(stand_ins(p, s))
        set_qkv(small, l, *smaller_qkv(p, s))
        if s.proj is not None:
            set_proj(small, l, s.proj.weight, s.proj.bias)
    with torch.no_grad(), layers_replaced(layers):
        return small, model(images)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"global_pool": "avg"}])
def test_narrowed_equals_masked(changes: dict[str, Any], kernel: bool) -> None:
    model, images = network(**changes)
    fused(model, kernel)
    before = weights_sha256(model)
    plan = some_plan(model, heads=[[0, 1], [1]], query_dims=[8, 5])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
        other_kernel = fused(pruned, not kernel)(images)
        torch.testing.assert_close(other_kernel, expected, rtol=0, atol=1e-12)
    attn: Any = [b.attn for b in pruned.blocks]  # type: ignore[union-attr]
    assert [type(a) for a in attn] == [NarrowAttention] * 2
    assert [(a.num_heads, a.query_dim, a.head_dim, a.scale) for a in attn] == [
        (2, 8, 16, 8**-0.5),
        (1, 5, 16, 5**-0.5),
    ]
    assert weights_sha256(model) == before
    pruned(images).sum().backward()
    assert attn[0].qkv.weight.grad is not None


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "proj_bias": False}, {"global_pool": "avg"}]
)
@pytest.mark.parametrize("heads", [None, [[0, 1], [1]]])
def test_one_head_dimension_removed_equals_masked(
    heads: Any, changes: dict[str, Any], kernel: bool
) -> None:
    model, images = network(**changes)
    fused(model, kernel)
    before = weights_sha256(model)
    plan = some_plan(model, heads=heads, head_dims=[8, 5])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        expected = masked(images)
        assert (expected - model(images)).abs().max() > 1e-2
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
        other_kernel = fused(pruned, not kernel)(images)
        torch.testing.assert_close(other_kernel, expected, rtol=0, atol=1e-12)
    attn: Any = [b.attn for b in pruned.blocks]  # type: ignore[union-attr]
    assert [type(a) for a in attn] == [Attention] * 2  # timm's own
    assert [(a.head_dim, a.scale) for a in attn] == [(8, 8**-0.5), (5, 5**-0.5)]
    for a, count in zip(attn, (2, len(heads[1]) if heads else 2), strict=True):
        assert a.qkv.out_features == 3 * a.proj.in_features == 3 * a.attn_dim
        assert a.attn_dim == count * a.head_dim
    assert weights_sha256(model) == before
    pruned(images).sum().backward()
    assert attn[0].proj.weight.grad is not None


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("values", [False, True])
def test_calibrated_values_are_set_and_keep_the_scale(kernel: bool, values: bool) -> None:
    model, images = network()
    small, expected = calibrated(fused(model, kernel), images, [[1], [0, 1]], [8, 8], values)
    with torch.no_grad():
        for on in (True, False):
            torch.testing.assert_close(fused(small, on)(images), expected, rtol=0, atol=1e-10)
        assert (expected - model(images)).abs().max() > 1e-6
        dims = {"head_dims" if values else "query_dims": [8, 8]}
        by_weights = apply_plan(model, some_plan(model, heads=[[1], [0, 1]], **dims))
        assert (by_weights(images) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("values", [False, True])
def test_nearly_full_rank_is_nearly_the_same(values: bool) -> None:
    model, images = network()
    wide, narrow = (calibrated(model, images, [[0, 1]] * 2, [r] * 2, values)[1] for r in (15, 4))
    with torch.no_grad():
        dense = model(images)
    assert (wide - dense).abs().max() < 0.2 * (narrow - dense).abs().max()


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True}])
def test_the_first_query_is_answered_without_keys_and_values(options: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        attn = Attention(24, 3, norm_layer=nn.LayerNorm, **{"qkv_bias": True, **options}).double()
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).double()
    x.requires_grad_()
    if "qk_norm" in options:
        assert answer_first_query(attn.eval(), x) is None
        return
    assert answer_first_query(attn.train(), x) is None  # dropout may be on
    attn.eval()
    for fused in (True, False):
        attn.fused_attn = fused
        first, whole = answer_first_query(attn, x), attn(x)[:, :1]
        assert first is not None
        torch.testing.assert_close(first, whole, rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad(v.square().sum(), x)[0] for v in (first, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_masks_work_as_in_timm() -> None:
    model, images = network()
    attn: Any = model.blocks[0].attn  # type: ignore[index,union-attr]
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1)).double()
    same = NarrowAttention(attn, attn.head_dim)
    keep = torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    keep |= torch.eye(17, dtype=torch.bool)
    for kernel in (True, False):
        attn.fused_attn = same.fused_attn = kernel
        for options in ({}, {"attn_mask": keep}, {"attn_mask": keep.double()}, {"is_causal": True}):
            torch.testing.assert_close(same(x, **options), attn(x, **options))
    view = make_view(apply_plan(model, some_plan(model, query_dims=[8, 8])))
    stream = view.block(0, view.embed(images))
    whole = view.head(view.block(1, stream))
    torch.testing.assert_close(view.head(view.block(1, stream, cls_only=True)), whole)


def config_of(model: nn.Module) -> CheckpointConfig:
    info = model_info(model, ModelSource("vit_base_patch16_224", ARGS))
    return CheckpointConfig(
        source=info.source, widths=info.widths, heads=info.heads, num_classes=info.num_classes,
        preprocessing=info.preprocessing, classes=[], weights_sha256="",
    )  # fmt: skip


def test_checkpoints_are_rebuilt_and_counted_right() -> None:
    model, images = network(dtype=torch.float32)
    pruned = apply_plan(model, some_plan(model, heads=[[0], [0, 1]], query_dims=[8, 16]))
    rebuilt = build(config_of(pruned), state(pruned))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), pruned(images), rtol=0, atol=0)
    assert not rebuilt.training
    assert not any(m.training for m in rebuilt.modules())
    info = model_info(rebuilt, ModelSource("vit_base_patch16_224", ARGS))
    assert (info.heads, info.query_dims) == ([1, 2], [8, 16])
    assert model_info(model, ModelSource("vit_base_patch16_224", ARGS)).query_dims is None
    sizes = model_sizes(rebuilt)
    assert (sizes.queries, sizes.values) == ((8, 32), (16, 32))
    assert cost.params(sizes) == sum(p.numel() for p in rebuilt.parameters())
    assert cost.macs(sizes) == count_macs(rebuilt, (3, 32, 32))
    again = apply_plan(rebuilt, some_plan(rebuilt, query_dims=[4, 16]))  # pruned further
    assert model_info(again, ModelSource("", {})).query_dims == [4, 16]
    assert model_sizes(again).queries == (4, 32)


def test_one_head_dimension_is_rebuilt_and_counted_right() -> None:
    model, images = network(dtype=torch.float32)
    pruned = apply_plan(model, some_plan(model, heads=[[0], [0, 1]], head_dims=[8, 16]))
    rebuilt = build(config_of(pruned), state(pruned))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images), pruned(images), rtol=0, atol=0)
    info = model_info(rebuilt, ModelSource("vit_base_patch16_224", ARGS))
    assert (info.heads, info.query_dims) == ([1, 2], None)
    sizes = model_sizes(rebuilt)
    assert (sizes.queries, sizes.values) == ((8, 32), (8, 32))
    assert cost.params(sizes) == sum(p.numel() for p in rebuilt.parameters())
    assert cost.macs(sizes) == count_macs(rebuilt, (3, 32, 32))
    for fields, widths in (({"head_dims": [4, 8]}, (4, 16)), ({"query_dims": [4, 8]}, (8, 32))):
        again = apply_plan(rebuilt, some_plan(rebuilt, **fields))  # pruned further
        assert (model_sizes(again).queries, model_sizes(again).values) == ((4, 16), widths)
        copy = build(config_of(again), state(again))
        with torch.no_grad():
            torch.testing.assert_close(copy(images), again(images), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"queries and keys have 4 dimensions a head, its values"):
        apply_plan(again, some_plan(again, head_dims=[2, 8]))


def test_a_block_costs_what_its_sizes_say() -> None:
    model, _ = network()
    dense = model_sizes(model)
    small = model_sizes(apply_plan(model, some_plan(model, heads=[[0], [0, 1]], query_dims=[8, 8])))
    for kind, count in (("params", cost.params), ("macs", cost.macs)):
        saved = 2 * cost.attention_price(dense, 32, 32, kind) - sum(  # type: ignore[arg-type]
            cost.attention_price(dense, q, v, kind)  # type: ignore[arg-type]
            for q, v in ((8, 16), (16, 32))
        )
        assert count(dense) - count(small) - saved == (
            count(dense) - count(dense.with_hidden(small.hidden))
        )


@pytest.mark.parametrize("dims", [pytest.param("query_dims", marks=pytest.mark.slow), "head_dims"])
def test_onnx_gives_the_same_answers(dims: str, tmp_path: Path) -> None:
    model, _ = network(dtype=torch.float32)
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    small = apply_plan(model, some_plan(model, heads=[[0], [0, 1]], **{dims: [8, 8]}))
    info = config_of(small)
    classes = [ClassInfo(i, str(i)) for i in range(5)]
    export_onnx(small, info.preprocessing, classes, tmp_path / "small.onnx")
    parity = check_parity(small, tmp_path / "small.onnx", images, batch_sizes=(1, 3, 12))
    assert parity.passed, parity.failures
    assert all(row.max_relative_error < 1e-5 for row in parity.rows)


def test_plans_say_it_and_older_plans_load() -> None:
    for dims in ({"query_dims": [8, 16]}, {"head_dims": [8, 16]}):
        plan = Plan(keep=[[0], [1]], widths=[4, 8], **dims)
        text = to_json(plan)
        assert from_json(Plan, text) == plan
    older = text.replace('"query_dims"', '"notes_"').split(',\n  "notes_"')[0] + "\n}\n"
    assert from_json(Plan, older).query_dims is None


@pytest.mark.parametrize(
    ("name", "changes", "axis", "match"),
    [
        ("vit_base_patch16_224", {"qk_norm": True}, "qk",
         r"block 0: `qk` cannot be narrowed in timm\S+Attention: its queries and keys pass a "
         r"LayerNorm between the projection and the product"),
        ("vit_base_patch16_224", {"qk_norm": True}, "head-dim", "pass a LayerNorm between"),
        ("vit_small_patch16_dinov3", {}, "head-dim",
         r"block 0: `head-dim` cannot be narrowed in \S+: its queries and keys pass rotary pos"),
        ("vit_base_patch16_224", {"scale_attn_norm": True}, "head-dim", "or with a norm or gate"),
        ("beit_base_patch16_224", {}, "head-dim", r"cannot be narrowed in timm.models.beit"),
        ("vit_small_patch16_dinov3", {}, "qk", "pass rotary position embeddings between"),
        ("beit_base_patch16_224", {}, "qk", r"cannot be narrowed in timm.models.beit.Attention"),
        ("beit_base_patch16_224", {}, "heads", r"heads cannot be removed from timm.models.beit"),
    ],
)  # fmt: skip
def test_what_cannot_be_narrowed_is_refused(
    name: str, changes: dict[str, Any], axis: str, match: str
) -> None:
    model, _ = network(name, **changes)
    with pytest.raises(ModelError, match=match):
        check_axes(model, ["mlp", axis])
    check_axes(model, ["mlp"])
    if axis != "heads":
        name = {"qk": "query_dims", "head-dim": "head_dims"}[axis]
        with pytest.raises(ModelError, match=match):
            apply_plan(model, some_plan(model, **{name: [8, 8]}))
        apply_plan(model, some_plan(model, **{name: [16, 16]}))  # nothing to narrow


def test_wrong_query_dims_are_named() -> None:
    model, _ = network()
    for dims, match in (
        ([8], "names query dimensions for 1 blocks, the network has 2"),
        ([8, 17], r"`query_dims\[1\]` must be in 1..16, got 17"),
        ([0, 8], r"`query_dims\[0\]` must be in 1..16, got 0"),
    ):
        for name in ("query", "head"):
            said = match.replace("query", name)
            with pytest.raises(ModelError, match=said):
                apply_plan(model, some_plan(model, **{f"{name}_dims": dims}))
    with pytest.raises(ModelError, match="the plan has `query_dims` and `head_dims`"):
        apply_plan(model, some_plan(model, query_dims=[8, 8], head_dims=[8, 8]))
    with pytest.raises(ModelError, match=r"block 1: `qkv` needs a weight of \[96, 32\], got \[3"):
        set_qkv(model, 1, torch.zeros(3, 32), None)


def test_the_view_names_attention_that_is_not_plain() -> None:
    model, _ = network("beit_base_patch16_224")
    with pytest.raises(ModelError, match=r"block 1: timm.models.beit.Attention is another"):
        make_view(model).attention(1)
    attention = make_view(network()[0]).attention(1)
    assert (attention.heads, attention.query_dims, attention.value_dims) == (2, 16, 16)

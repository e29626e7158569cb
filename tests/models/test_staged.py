"""Swin, v1 and v2: one row of blocks over a flat stream; what is pruned equals what is masked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from npprune.core.compression import cost
from npprune.core.compression.healing import reconstruct_blocks
from npprune.core.compression.sequential import compensate_in_sequence
from npprune.errors import ModelError
from npprune.models.blocks import blocks_of
from npprune.models.describe import describe
from npprune.models.info import count_macs, model_info, model_sizes
from npprune.models.load import build
from npprune.models.surgery import apply_plan, check_axes, mask_plan
from npprune.models.view import make_view
from npprune.models.writing import written
from tests.helpers.tiny import tiny_batch, tiny_swin
from tests.models.test_load import config_of
from tests.models.test_surgery import some_plan
from tests.models.test_view import _check_edit, _check_given, _check_tangent

V2 = "swinv2_tiny_window8_256"
KINDS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1, padded windows and grids": {"img_size": (36, 44), "window_size": 3},
    "v2": {"name": V2},
    "v2, three stages": {"name": V2, "depths": (1, 2, 1), "num_heads": (2, 2, 4)},
}


def images_for(model: Any, n: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, *model.patch_embed.img_size, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str) -> None:
    model = tiny_swin(**KINDS[kind])
    images = images_for(model)
    view = make_view(model)
    assert (view.scope, view.num_prefix_tokens, view.tokens_read) == ("patch", 0, None)
    assert view.widths == tuple(b.mlp.fc2.in_features for b in blocks_of(model))
    with torch.no_grad():
        logits = model(images)
        x = view.embed(images)
        for l in range(len(view.widths)):
            y, attention = view.block_and_attention(l, x)
            z = view.entered(l, x)
            assert y.shape == z.shape == attention.shape
            torch.testing.assert_close(view.attention_output(l, z), attention, rtol=0, atol=0)
            torch.testing.assert_close(view.tail(l, z, attention), y, rtol=0, atol=1e-12)
            some = slice(1, 3)
            part = view.tail(l, z[:, some], attention[:, some])
            torch.testing.assert_close(part, y[:, some], rtol=0, atol=1e-12)
            _check_given(view, l, x, y)
            _check_tangent(view, l, x)
            if x.shape == y.shape:  # the edit's check counts tokens
                _check_edit(view, l, x, y)
            x = view.block(l, x)
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        torch.testing.assert_close(view.head(x), logits, rtol=0, atol=0)
        torch.testing.assert_close(model(images), logits, rtol=0, atol=0)


def test_what_merges_in_front_of_a_stage() -> None:
    view = make_view(tiny_swin(img_size=(36, 44), window_size=3))
    x = view.embed(images_for(view.model))
    values = torch.arange(99.0)[None]  # 9 x 11 tokens
    assert [view.entered(l, x).shape[1] for l in (0, 1)] == [99, 99]
    found = view.gathered(2, values)
    assert found.shape == (1, 30)  # 5 x 6
    assert float(found[0, 7]) == sum(11 * r + c for r in (2, 3) for c in (2, 3))
    assert float(found[0, -1]) == 98
    assert view.gathered(1, values) is values
    # the same places as the network's own merging
    changed = x.clone()
    changed[:, 11 * 3 + 3] += 1
    with torch.no_grad():
        moved = (view.block(2, x) - view.block(2, changed)).abs().amax((0, 2)) > 0
    assert moved[7]


def test_bfloat16_keeps_the_stream() -> None:
    model = tiny_swin().float()
    images = images_for(model).float()
    exact, rough = make_view(model), make_view(model, precision="bf16")
    with torch.no_grad():
        x, y = exact.embed(images), rough.embed(images)
        for l in range(4):
            x, y = exact.block(l, x), rough.block(l, y)
            assert y.dtype == torch.float32
    assert not torch.equal(x, y)
    torch.testing.assert_close(y, x, rtol=0.1, atol=0.2)


def test_a_network_that_does_more_between_its_stages_is_noticed() -> None:
    model: Any = tiny_swin()
    inner = model.layers[1].forward
    model.layers[1].forward = lambda x: inner(x.square())
    with pytest.raises(ModelError, match="does more than its blocks"):
        make_view(model).embed(images_for(model))


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_equals_masked(kind: str) -> None:
    model = tiny_swin(**KINDS[kind])
    images = images_for(model, 3)
    plan = some_plan(model, classes=[4, 0, 2])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
        assert (model(images)[:, [4, 0, 2]] - expected).abs().max() > 1e-4
    assert make_view(pruned).widths == tuple(plan.kept_widths)


@pytest.mark.parametrize("kind", ["v1, padded windows and grids", "v2"])
def test_the_cost_is_that_of_the_counter(kind: str) -> None:
    model = tiny_swin(**KINDS[kind])
    pruned = apply_plan(model, some_plan(model))
    size = (3, *model.patch_embed.img_size)
    dense, small = model_sizes(model), model_sizes(pruned)
    for sizes, network in ((dense, model), (dense.with_hidden(small.hidden), pruned)):
        assert cost.params(sizes) == sum(p.numel() for p in network.parameters())
        assert cost.macs(sizes) == count_macs(network, size)  # type: ignore[arg-type]


def test_macs_by_hand() -> None:
    """64 and 16 tokens of width 16 and 32, windows of 16 tokens, one after the other."""
    pruned = apply_plan(tiny_swin(), plan := some_plan(tiny_swin()))
    total = 64 * 48 * 16 + 16 * 64 * 32 + 32 * 7  # patches, merging, classifier
    for l, (t, d) in enumerate([(64, 16), (64, 16), (16, 32), (16, 32)]):
        total += t * d * 3 * d + 2 * t * 16 * d + t * d * d + 2 * t * d * plan.kept_widths[l]
    assert count_macs(pruned, (3, 32, 32)) == total


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_pruned_network_comes_back_from_its_checkpoint(kind: str) -> None:
    model = tiny_swin(**KINDS[kind]).float()
    pruned = apply_plan(model, some_plan(model))
    source = replace(describe(model), sha256="")
    assert source.model_args["depths"] == [2, 2]
    info = model_info(pruned, source)
    config = config_of(pruned, source=info.source, widths=info.widths, heads=info.heads)
    rebuilt = build(config, pruned.state_dict())
    images = images_for(model).float()
    with torch.no_grad():
        assert torch.equal(rebuilt(images), pruned(images))
    config.widths = [1, *info.widths[1:]]
    with pytest.raises(ModelError, match=r"config\.json says hidden widths"):
        build(config, pruned.state_dict())


def test_what_cannot_be_taken_is_refused_by_name() -> None:
    model = tiny_swin()
    for axis, why in (
        ("heads", "heads cannot be removed from timm.models.swin_transformer.WindowAttention"),
        ("qk", "`qk` cannot be narrowed in .*WindowAttention"),
        ("tokens", "SwinTransformerBlock is another block"),
        ("cls", "reads every token"),
    ):
        with pytest.raises(ModelError, match=why):
            check_axes(model, [axis])
    with pytest.raises(ModelError, match="needs a class token"):
        make_view(model).tokens("cls")


def test_units_write_to_what_the_classifier_reads() -> None:
    view = make_view(tiny_swin())
    assert [written(view, l) is None for l in range(4)] == [True, True, False, False]
    assert all(written(make_view(tiny_swin(name=V2)), l) is None for l in range(4))


def test_a_refit_behind_a_norm_does_not_see_the_scale_of_its_layer() -> None:
    """v2 norms what its MLP gives: ten times the second layer is the same network."""
    model, scaled = tiny_swin(name=V2), tiny_swin(name=V2)
    for block in blocks_of(scaled):
        block.norm2.eps *= 1e-4
        with torch.no_grad():
            block.mlp.fc2.weight.mul_(0.01), block.mlp.fc2.bias.mul_(0.01)
    images, _ = tiny_batch(12, size=32)
    keep = [[i for i in range(w) if i % 3] for w in make_view(model).widths]
    found = [compensate_in_sequence(make_view(m), [images], keep) for m in (model, scaled)]
    for ours, theirs in zip(*(f.second for f in found), strict=True):
        torch.testing.assert_close(theirs.weight * 100, ours.weight, rtol=1e-6, atol=1e-9)


def test_block_by_block_a_pruned_network_is_taught_the_dense_one() -> None:
    model = tiny_swin()
    pruned = apply_plan(model, some_plan(model))
    images, _ = tiny_batch(8, size=32)
    found = reconstruct_blocks(
        make_view(pruned), make_view(model), [images], epochs=4, learning_rate=3e-3, tokens=8
    )
    assert [row.block for row in found] == [0, 1, 2, 3]
    assert all(row.after < row.before for row in found)

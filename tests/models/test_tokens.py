"""Networks that merge tokens, over timm's families at tiny sizes with random weights."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npprune.api import discover_paths
from npprune.core.compression import cost
from npprune.core.compression.token_harm import (
    measure_token_harm,
    predict_merged,
    schedule_divergence,
    token_maps,
)
from npprune.core.metrics import divergence
from npprune.core.tokens import Merge, Tokens, match, merge
from npprune.errors import ModelError, StoreError, UsageError
from npprune.models.info import count_macs, model_info, model_sizes
from npprune.models.load import build, create
from npprune.models.surgery import apply_plan, mask_plan
from npprune.models.tokens import apply_tokens, remove_tokens, tokens_of
from npprune.models.view import make_view
from npprune.records import CHECKSUM, CheckpointConfig, ModelSource, Plan, from_json, to_json
from tests.helpers.tiny import tiny_batch, tiny_vit
from tests.models.test_view import family

READ_ALONE = ["vit", "vit, registers", "vit, QK norm", "deit distilled", "deit3, LayerScale",
              "dinov2, registers", "dinov2, packed SwiGLU", "clip, pre-norm"]  # fmt: skip
POOLED = ["vit, average", "registers, no class token", "siglip, attention pool", "dinov3",
          "dinov3, SwiGLU", "eva", "eva02, rotary", "eva02, MLP norm", "perception encoder",
          "aimv2"]  # fmt: skip
REFUSED = {
    "beit": "beit.Block is another block",
    "vit, post norm": "ResPostBlock is another block",
    "differential attention": "is another",
    "relative positions": "RelPosBlock is another block",
    "rotary, mixed": "differ from block to block",
}


@pytest.mark.parametrize("name", READ_ALONE)
def test_the_last_block_computes_what_is_read(name: str) -> None:
    model, images = family(name)
    dense = model(images)
    for fused in (True, False):
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn.fused_attn = fused  # type: ignore[union-attr]
        apply_tokens(model, None, last=True)
        torch.testing.assert_close(model(images), dense, rtol=0, atol=1e-10)
    assert tokens_of(model) == ([0, 0], True)
    view = make_view(model)
    x = view.block(0, view.embed(images))
    assert isinstance(x, Tensor)
    assert view.block(1, x).shape[1] == view.tokens_read


@pytest.mark.parametrize("name", POOLED)
def test_the_last_block_of_pooled_networks_is_left_alone(name: str) -> None:
    model, _ = family(name)
    with pytest.raises(ModelError, match="its classifier reads every token"):
        apply_tokens(model, None, last=True)


@pytest.mark.parametrize("name", [*READ_ALONE, *POOLED])
def test_merging_equals_timms_block_in_two_halves(name: str) -> None:
    """The view's own halves of timm's block, with masks and means written here."""
    model, images = family(name)
    view = make_view(model)
    dense = model(images)
    with torch.no_grad():
        x = view.embed(images)
        attention = view.attention_output(0, x)
        nothing = x.new_zeros(1, 1, 1).expand(*x.shape)
        y = view.tail(0, x, attention, given=(slice(None), nothing))
        pairs = match(view.blocks[0].norm2(y), None, 3, view.num_prefix_tokens)
        after = merge(Tokens(y), pairs)
        expected = after.x + view.tail(0, after.x, torch.zeros_like(after.x)) - after.x
    apply_tokens(model, [3, 0])
    assert tokens_of(model) == ([3, 0], False)
    with torch.no_grad():
        seen: list[Any] = []
        model.blocks[0].register_forward_hook(lambda *a: seen.append(a[-1]))  # type: ignore[union-attr,index]
        logits = model(images)
    torch.testing.assert_close(seen[0].x, expected, rtol=0, atol=1e-10)
    assert seen[0].x.shape[1] == x.shape[1] - 3
    assert logits.shape == dense.shape
    assert torch.isfinite(logits).all()
    remove_tokens(model)
    torch.testing.assert_close(model(images), dense, rtol=0, atol=0)


def test_equal_tokens_merge_without_a_trace() -> None:
    """Two patches that are the same in everything, positions included, may become one."""
    for pool in ("token", "avg"):
        model: Any = tiny_vit(global_pool=pool, class_token=pool == "token")
        prefix = model.num_prefix_tokens
        with torch.no_grad():  # patches 0 and 1, of A and B, have one position and one content
            model.pos_embed[:, prefix] = model.pos_embed[:, prefix + 1]
        images, _ = tiny_batch(2)
        images[..., :4, 4:8] = images[..., :4, 0:4]
        dense = model(images)
        apply_tokens(model, [1, 0, 0])
        torch.testing.assert_close(model(images), dense, rtol=0, atol=1e-10)


def test_rotary_positions_are_averaged() -> None:
    model, images = family("eva02, rotary")
    dense_view = make_view(model)
    x = Tokens(dense_view.embed(images))
    y = dense_view.block(0, x, merge=2)
    rope = dense_view._calls[0][1]["rope"]
    assert y.rotary is not None
    assert y.rotary.shape == (2, x.x.shape[1] - 2, rope.shape[-1])
    assert y.sizes is not None
    moved = (y.rotary * y.sizes[..., None])[:, 1:].sum(1)
    torch.testing.assert_close(moved, rope.sum(0).expand(2, -1).to(moved))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_merge_is_refused_by_name(name: str) -> None:
    model, _ = family(name)
    with pytest.raises(ModelError, match=REFUSED[name]):
        apply_tokens(model, [1, 0])


@pytest.mark.parametrize(
    ("merged", "last", "message"),
    [
        ([1, 1], False, r"one entry a block \(3\), got 2"),
        ([9, 0, 0], False, r"`merged\[0\]` must be in 0..8, got 9"),
        ([6, 6, 0], False, r"`merged\[1\]` must be in 0..5, got 6"),
        ([-1, 0, 0], False, r"must be in 0..8, got -1"),
        ([1, 1, 1], True, r"`merged\[2\]` must be 0"),
    ],
)
def test_impossible_numbers(merged: list[int], last: bool, message: str) -> None:
    model = tiny_vit()
    with pytest.raises(ModelError, match=message):
        apply_tokens(model, merged, last)
    assert tokens_of(model) == ([0, 0, 0], False)


def test_it_is_a_plain_module() -> None:
    model: Any = tiny_vit().float()
    names = list(model.state_dict())
    images = tiny_batch(3)[0].float()
    apply_tokens(model, [3, 2, 0], last=True)
    assert list(model.state_dict()) == names
    logits = model(images)
    assert torch.equal(copy.deepcopy(model)(images), logits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(images)).all()
    model.train()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_every_image_is_merged_on_its_own() -> None:
    model, (images, _) = tiny_vit(), tiny_batch(5)
    apply_tokens(model, [4, 3, 0])
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}])
def test_macs_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    model = tiny_vit(**options)
    last = options.get("global_pool") != "avg"
    dense = model_sizes(model)
    apply_tokens(model, [5, 3, 0], last)
    sizes = model_sizes(model)
    assert sizes == dense.with_tokens([5, 3, 0], 1 if last else None)
    assert cost.macs(sizes) == count_macs(model, (3, 16, 16))
    assert cost.macs(sizes) < cost.macs(dense)
    assert cost.params(sizes) == cost.params(dense)
    assert [sizes.mlp_tokens(l) for l in range(3)][:2] == [sizes.tokens - 5, sizes.tokens - 8]
    assert sizes.mlp_tokens(2) == (1 if last else sizes.tokens - 8)


@pytest.mark.parametrize("name", ["eva02, rotary", "dinov3", "dinov3, SwiGLU"])
def test_macs_with_rotary_positions(name: str) -> None:
    model, images = family(name)
    apply_tokens(model, [3, 2])
    assert cost.macs(model_sizes(model)) == count_macs(model, tuple(images.shape[1:]))  # type: ignore[arg-type]


def test_masks_and_removal_agree() -> None:
    model, (images, _) = tiny_vit(), tiny_batch(4)
    plan = Plan(
        keep=[list(range(0, 48, 2))] * 3, widths=[48] * 3, heads=[[0, 2], [0, 1, 2], [1]],
        query_dims=[8, 5, 8], merged=[4, 2, 0], last_for_read=True,
    )  # fmt: skip
    removed = apply_plan(model, plan)
    assert tokens_of(removed) == ([4, 2, 0], True)
    assert tokens_of(model) == ([0, 0, 0], False)
    torch.testing.assert_close(mask_plan(model, plan)(images), removed(images))


def test_a_checkpoint_brings_it_back() -> None:
    model, (images, _) = tiny_vit().float(), tiny_batch(4)
    apply_tokens(model, [4, 2, 0], last=True)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3,
            "mlp_ratio": 2}  # fmt: skip
    info = model_info(model, ModelSource("vit_tiny_patch16_224", args))
    assert (info.merged, info.last_for_read) == ([4, 2, 0], True)
    config = CheckpointConfig(
        info.source, info.widths, info.heads, 7, info.preprocessing, [], "",
        merged=info.merged, last_for_read=info.last_for_read,
    )  # fmt: skip
    again = build(from_json(CheckpointConfig, to_json(config)), model.state_dict())
    assert tokens_of(again) == ([4, 2, 0], True)
    assert torch.equal(again(images.float()), model(images.float()))


def test_older_records_merge_nothing() -> None:
    plan = Plan(keep=[[0]], widths=[2])
    older = json.loads(to_json(plan))
    for name in (CHECKSUM, "merged", "last_for_read", "cls_keep"):
        del older[name]
    plan = from_json(Plan, json.dumps(older))
    assert (plan.merged, plan.last_for_read) == (None, False)
    with pytest.raises(StoreError, match="one entry a block"):
        Plan(keep=[[0]], widths=[2], merged=[1, 1])
    with pytest.raises(StoreError, match="negative"):
        Plan(keep=[[0]], widths=[2], merged=[-1])


# ---------------------------------------------------------------- the view


@pytest.mark.parametrize("name", ["vit", "vit, average", "deit distilled", "dinov3"])
def test_the_view_merges_as_the_network_does(name: str) -> None:
    model, images = family(name)
    view = make_view(model)
    seen = predict_merged(view, [images], [3, 2])
    once = view.block(0, Tokens(view.embed(images)), merge=3)
    pairs = view.pairs(1, once, view.attention_output(1, once), 2)
    assert isinstance(pairs, Merge)
    again = view.head(view.block(1, once, merge=pairs))
    torch.testing.assert_close(again, seen)
    last = view.tokens_read is not None
    apply_tokens(model, [3, 2])
    torch.testing.assert_close(model(images), seen)
    merging = make_view(model)
    x: Any = merging.embed(images)
    assert isinstance(x, Tensor)
    for l in range(2):
        y, attention = merging.block_and_attention(l, x)
        torch.testing.assert_close(merging.tail(l, x, attention)[0], y[0])
        x = merging.block(l, x)
        torch.testing.assert_close(x.x, y.x)
    torch.testing.assert_close(merging.head(x), seen)
    if last:
        apply_tokens(model, [3, 0], last=True)
        x = make_view(model).embed(images)
        for l in range(2):
            view = make_view(model)
            view.embed(images)
            x = view.block(l, x)
        torch.testing.assert_close(view.head(x), model(images))


def test_given_outputs_and_edits_reach_merged_tokens() -> None:
    model, (images, _) = tiny_vit(), tiny_batch(2)
    view = make_view(model)
    x = Tokens(view.embed(images))
    hidden: list[Tensor] = []
    y = view.block(0, x, edit=lambda h: hidden.append(h) or h, merge=4)  # type: ignore[func-returns-value]
    assert hidden[0].shape == (2, 13, 48)
    output = view.fc2(0)(hidden[0])
    torch.testing.assert_close(view.block(0, x, given=(slice(None), output), merge=4).x, y.x)


def test_harm_of_single_blocks_and_of_schedules() -> None:
    model, (images, _) = tiny_vit(), tiny_batch(6)
    view, batches = make_view(model.requires_grad_(False)), list(images.split(3))
    rows: list[int] = []
    table = measure_token_harm(
        view, batches, [[2, 4], [3], []], on_block=lambda l, row: rows.append(l)
    )
    assert rows == [0, 1, 2]
    assert [sorted(row) for row in table] == [[0, 2, 4], [0, 3], [0]]
    dense = model(images).detach()
    for l, r in ((0, 2), (0, 4), (1, 3)):
        merged = [r if i == l else 0 for i in range(3)]
        harm = divergence(dense, apply_tokens(copy.deepcopy(model), merged)(images)).mean()
        assert table[l][r] == pytest.approx(float(harm))
        assert schedule_divergence(view, batches, merged) == pytest.approx(float(harm))
    both = divergence(dense, apply_tokens(copy.deepcopy(model), [2, 3, 0])(images)).mean()
    assert schedule_divergence(view, batches, [2, 3, 0]) == pytest.approx(float(both))
    with pytest.raises(UsageError, match="3 blocks, got 2"):
        measure_token_harm(view, batches, [[1], [1]])


def test_maps_say_which_patches_became_one() -> None:
    model, (images, _) = tiny_vit(), tiny_batch(2)
    maps = token_maps(make_view(model), images, [4, 2, 0])
    assert [m.shape for m in maps] == [(2, 17)] * 3
    for m, count in zip(maps, (13, 11, 11), strict=True):
        assert [len(set(row)) for row in m.tolist()] == [count] * 2
    apply_tokens(model, [4, 2, 0], last=True)
    own = token_maps(make_view(model), images)
    assert [torch.equal(a, b) for a, b in zip(own, maps, strict=False)] == [True, True]


def test_paths_are_found_where_no_tokens_merge() -> None:
    model, (images, labels) = tiny_vit(), tiny_batch(2)
    dense = discover_paths(model, images, labels)
    apply_tokens(model, None, last=True)
    assert torch.equal(discover_paths(model, images, labels).neurons, dense.neurons)
    apply_tokens(model, [1, 0, 0])
    with pytest.raises(ModelError, match="a network that merges tokens"):
        discover_paths(model, images, labels)


def test_a_mask_is_refused() -> None:
    model = apply_tokens(tiny_vit(), [1, 0, 0])
    with pytest.raises(ModelError, match="no attention mask"):
        model(tiny_batch(1)[0], attn_mask=torch.zeros(17, 17))


def test_a_network_that_does_not_count_its_patches() -> None:
    model: Any = create("naflexvit_base_patch16_gap", {"num_classes": 5, "depth": 2})
    assert isinstance(model, nn.Module)
    with pytest.raises(ModelError):
        apply_tokens(model, [1, 0])

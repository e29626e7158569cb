"""Heads of EVA's attention and its kin: the rotation of positions is the same for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import npprune
from npprune.core.compression import cost
from npprune.errors import ModelError
from npprune.models.info import count_macs, model_sizes
from npprune.models.load import build
from npprune.models.surgery import apply_plan, check_axes, mask_plan
from npprune.models.tokens import apply_tokens
from npprune.records import ModelSource
from tests.models.test_load import config_of
from tests.models.test_surgery import some_plan
from tests.models.test_view import FAMILIES, TINY, family

ROTARY = ("dinov3", "eva", "eva02, rotary", "eva02, MLP norm", "perception encoder")
"""Projections together and apart, with and without biases and rotation, in two classes."""


@pytest.mark.parametrize("name", ROTARY)
def test_removed_heads_are_masked_heads(name: str) -> None:
    model, images = family(name)
    plan = some_plan(model, heads=[[0, 2], [1]])
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    with torch.no_grad():
        expected = masked(images)
        assert (expected - model(images)).abs().max() > 1e-3
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
    sizes = model_sizes(pruned)
    assert sizes.values == (16, 8)
    assert cost.params(sizes) == sum(p.numel() for p in pruned.parameters())
    saved = count_macs(model, (3, 32, 32)) - count_macs(pruned, (3, 32, 32))
    assert cost.macs(model_sizes(model)) - cost.macs(sizes) == saved
    timm_name, changes, *_ = FAMILIES[name]
    source = ModelSource(timm_name, {**TINY, **changes})
    config = config_of(pruned, source=source, widths=plan.kept_widths, heads=[2, 1])
    rebuilt = build(config, {k: v.float() for k, v in pruned.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images.float()), expected.float(), rtol=1e-4, atol=1e-5)
        both = [apply_tokens(m, [4, 2])(images) for m in (pruned, masked)]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)


def test_what_else_cannot_go() -> None:
    with pytest.raises(ModelError, match="each of its heads has rotary positions of its own"):
        check_axes(family("rotary, mixed")[0], ["heads"])
    with pytest.raises(ModelError, match="rotary position embeddings between the projection"):
        check_axes(family("dinov3")[0], ["qk"])


@pytest.mark.slow
def test_the_line(tmp_path: Any) -> None:
    model = family("dinov3")[0].float()
    g = torch.Generator().manual_seed(4)
    images = torch.randn(40, 3, 32, 32, generator=g)
    pruned = npprune.prune(
        model, images, target_macs=0.55, axes=["mlp", "heads"], round_to=8, min_keep=8
    )
    assert pruned.plan.heads is not None
    assert sum(map(len, pruned.plan.heads)) < 6
    assert pruned.cost.macs == count_macs(pruned.model, (3, 32, 32))
    fresh = torch.randn(60, 3, 32, 32, generator=g)
    with torch.no_grad():
        networks = (model.eval(), pruned.model, mask_plan(model, pruned.plan))
        p, q, r = (m(fresh).log_softmax(1) for m in networks)
    harm, before = ((p.exp() * (p - x)).sum(1).mean() for x in (q, r))
    assert harm < before
    assert npprune.export(pruned, tmp_path / "m.onnx", images, latency=False).passed

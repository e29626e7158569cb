"""MLPs that norm their hidden units (EVA02, BEiT3): the norm of what stays is of those alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npprune
from npprune.core.compression import cost
from npprune.core.compression.sequential import Fit, compensate_in_sequence
from npprune.errors import ModelError, UsageError
from npprune.models.info import model_sizes
from npprune.models.load import build
from npprune.models.surgery import apply_plan, check_axes, mask_plan
from npprune.models.view import make_view
from npprune.records import ModelSource
from tests.models.test_load import config_of
from tests.models.test_surgery import some_plan
from tests.models.test_view import FAMILIES, TINY, family

NORMED = ("beit3, MLP norm", "eva02, MLP norm")


def normed(h: Tensor, norm: Any, keep: list[int]) -> Tensor:
    """LayerNorm of the kept units by the formula."""
    kept = h[..., keep]
    mean, variance = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, unbiased=False)
    return (kept - mean) / (variance + norm.eps).sqrt() * norm.weight[keep] + norm.bias[keep]


@pytest.mark.parametrize("name", NORMED)
def test_pruned_is_the_network_whose_norm_sees_the_kept_units(name: str) -> None:
    model, images = family(name)
    plan = some_plan(model)
    pruned, masked = apply_plan(model, plan), mask_plan(model, plan)
    reference, _ = family(name)
    for block, keep in zip(reference.blocks, plan.keep, strict=True):  # type: ignore[arg-type,union-attr]

        def forward(h: Tensor, norm: Any = block.mlp.norm, keep: list[int] = keep) -> Tensor:
            return torch.zeros_like(h).index_copy(-1, torch.tensor(keep), normed(h, norm, keep))

        block.mlp.norm.forward = forward
    with torch.no_grad():
        expected = reference(images)
        assert (expected - model(images)).abs().max() > 1e-3
        torch.testing.assert_close(pruned(images), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(masked(images), expected, rtol=0, atol=1e-12)
    sizes = model_sizes(model).with_hidden(plan.kept_widths)
    assert cost.params(sizes) == sum(p.numel() for p in pruned.parameters())
    timm_name, changes, *_ = FAMILIES[name]
    source = ModelSource(timm_name, {**TINY, **changes})
    heads = [3] * len(plan.keep)
    config = config_of(pruned, source=source, widths=plan.kept_widths, heads=heads)
    rebuilt = build(config, {k: v.float() for k, v in pruned.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_refit_is_least_squares_on_what_the_smaller_norm_gives() -> None:
    model, _ = family("beit3, MLP norm")
    g = torch.Generator().manual_seed(4)
    images = torch.randn(24, 3, 32, 32, generator=g, dtype=torch.float64)
    view = make_view(model)
    keep = [[i for i in range(w) if i % 3] for w in view.widths]
    found = compensate_in_sequence(view, [images], keep, fit=Fit(beta=0.0, shrinkage=1e-12))
    seen: list[Tensor] = []
    mlp: Any = view.blocks[0].mlp
    handles = [
        mlp.norm.register_forward_hook(lambda m, a, out: seen.append(a[0].flatten(0, 1))),
        mlp.fc2.register_forward_hook(lambda m, a, out: seen.append(out.flatten(0, 1))),
    ]
    with torch.no_grad():
        model(images)
        h = normed(seen[0], mlp.norm, keep[0])
        rows = torch.cat([h, torch.ones_like(h[:, :1])], 1)
        expected = torch.linalg.lstsq(rows, seen[1], driver="gelsd").solution.T
    for handle in handles:
        handle.remove()
    fit = rows @ expected.T
    ours = h @ found.second[0].weight.T + found.second[0].bias
    torch.testing.assert_close(ours, fit, rtol=1e-5, atol=1e-6)


def test_the_line() -> None:
    model: nn.Module = family("beit3, MLP norm")[0].float()
    g = torch.Generator().manual_seed(4)
    images = torch.randn(40, 3, 32, 32, generator=g)
    settings: dict[str, Any] = {"round_to": 4, "min_keep": 4, "selection": "uniform"}
    pruned = npprune.prune(model, images, keep=0.5, **settings)
    rough = npprune.prune(model, images, keep=0.5, compensation="none", **settings)
    fresh = torch.randn(60, 3, 32, 32, generator=g)
    with torch.no_grad():
        p, q, r = (m(fresh).log_softmax(1) for m in (model.eval(), pruned.model, rough.model))
    harm, before = ((p.exp() * (p - x)).sum(1).mean() for x in (q, r))
    assert harm < 0.7 * before
    with pytest.raises(UsageError, match="this one norms them") as err:
        npprune.prune(model, images, keep=0.5, compensation="mean", **settings)
    assert "sequential" in str(err.value.hint)
    with pytest.raises(ModelError, match="reads every token"):
        check_axes(model, ["cls"])

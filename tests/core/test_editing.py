"""Editing against a forward pass written out with hooks, and against removal for real."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from npprune.core.attribution.editing import (
    edited_logits,
    keep_factors,
    members,
    path_factors,
    stack,
)
from npprune.errors import UsageError
from npprune.models.surgery import apply_plan
from npprune.models.view import make_view
from npprune.records import Plan
from tests.helpers.tiny import tiny_batch, tiny_vit

PATH = [[3, 7], [0, 11], [40, 41]]


def hooked(
    model: nn.Module, image: Tensor, path: list[list[int]], factor: float, tokens: slice, depth: int
) -> Tensor:
    """One image, one unit at a time."""
    handles = []
    for l in range(depth):

        def scale(module: nn.Module, args: tuple[Tensor], l: int = l) -> tuple[Tensor]:
            h = args[0].clone()
            for j in path[l]:
                h[:, tokens, j] *= factor
            return (h,)

        handles.append(model.blocks[l].mlp.fc2.register_forward_pre_hook(scale))
    with torch.no_grad():
        out = model(image[None])[0]
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("scope", ["cls", "patch", "all"])
@pytest.mark.parametrize(("edit", "factor"), [("remove", 0.0), ("enhance", 2.0), ("enhance", 3.5)])
@pytest.mark.parametrize("depth", [1, 3])
def test_each_image_with_its_own_path(scope: str, edit: str, factor: float, depth: int) -> None:
    model = tiny_vit()
    view = make_view(model)
    images, _ = tiny_batch(3)
    paths = [PATH, [[1, 2], [3, 4], [5, 6]], [[47], [46], []]]
    factors = stack([path_factors(members(p, view.widths), edit, factor) for p in paths])
    found = edited_logits(view, images, factors, scope=scope, depth=depth)
    tokens = view.tokens(scope)
    for image, path, logits in zip(images, paths, found, strict=True):
        expected = hooked(model, image, path, factor, tokens, depth)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert not torch.allclose(found[0], model(images[:1])[0])  # the edit does something


def test_a_factor_of_one_changes_nothing() -> None:
    model = tiny_vit()
    view = make_view(model)
    images, _ = tiny_batch(2)
    same = path_factors(members(PATH, view.widths), "enhance", 1.0)
    with torch.no_grad():
        torch.testing.assert_close(
            edited_logits(view, images, same, scope="cls"), model(images), rtol=1e-10, atol=1e-10
        )


def test_keeping_at_all_tokens_is_removal_for_real() -> None:
    model = tiny_vit()
    view = make_view(model)
    images, _ = tiny_batch(3)
    factors = path_factors(members(PATH, view.widths), "keep")
    smaller = apply_plan(model, Plan(keep=PATH, widths=list(view.widths)))
    with torch.no_grad():
        expected = smaller(images)
    found = edited_logits(view, images, factors, scope="all")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    at_cls = edited_logits(view, images, factors, scope="cls")
    assert not torch.allclose(found, at_cls)


def test_average_pooling_edits_patch_tokens() -> None:
    model = tiny_vit(global_pool="avg", class_token=True)
    view = make_view(model)
    images, _ = tiny_batch(2)
    assert view.scope == "patch"
    factors = path_factors(members(PATH, view.widths), "remove")
    found = edited_logits(view, images, factors, scope=view.scope)
    for image, logits in zip(images, found, strict=True):
        torch.testing.assert_close(
            logits, hooked(model, image, PATH, 0.0, slice(1, None), 3), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_others_goes_and_the_path_stays(fraction: float) -> None:
    widths = [48, 20, 33]
    masks = members([[3, 7], [], [0, 32, 5]], widths)
    found = keep_factors(masks, fraction, torch.Generator().manual_seed(4))
    for f, mask in zip(found, masks, strict=True):
        assert f.shape == (1, len(mask))
        assert set(f.unique().tolist()) <= {0.0, 1.0}
        assert bool((f[0, mask] == 1).all())
        assert int((f == 0).sum()) == round(fraction * int((~mask).sum()))


def test_seeds_draw_other_units_and_repeat_themselves() -> None:
    masks = members([[3]], [200])
    draws = [keep_factors(masks, 0.5, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_what_does_not_fit_is_refused() -> None:
    view = make_view(tiny_vit())
    images, _ = tiny_batch(2)
    with pytest.raises(ValueError, match=r"block 1: neurons must lie in 0\.\.47, got 48"):
        members([[0], [48], [0]], view.widths)
    three = [torch.ones(3, h) for h in view.widths]
    with pytest.raises(ValueError, match=r"block 0: factors must be \[2, 48\], got \[3, 48\]"):
        edited_logits(view, images, three, scope="cls")
    with pytest.raises(ValueError, match=r"`fraction` must be in 0\.\.1, got 1\.5"):
        keep_factors(members(PATH, view.widths), 1.5)
    with pytest.raises(UsageError, match="`edit` must be one of `remove`, `enhance`, `keep`"):
        path_factors(members(PATH, view.widths), "double")  # type: ignore[arg-type]

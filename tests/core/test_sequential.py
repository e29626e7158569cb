"""Sequential compensation against statistics of networks really pruned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from npprune.core.compression.compensation import choose_shrinkage, compensate
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import Replacement, layers_replaced, replaced
from npprune.core.compression.sequential import PRIOR_IMAGES, Fit, compensate_in_sequence
from npprune.core.compression.statistics import collect_statistics
from npprune.models.view import TimmView
from tests.core.test_harm import changed
from tests.core.test_statistics import data, in_batches, tiny_view

KEEP = [[0, 3, 4, 9, 20], [1, 2, 5, 11, 12, 13], [0, 7, 8, 9, 23]]


def test_each_block_is_fitted_on_the_network_pruned_so_far() -> None:
    view, (images, _) = tiny_view(), data(30)
    all_of_it = compensate_in_sequence(view, images.split(7), KEEP, fit=Fit(beta=0.0))
    assert (all_of_it.projections, all_of_it.classifiers) == ({}, [])
    got = all_of_it.second
    assert [r.keep for r in got] == KEEP
    so_far: dict[int, Replacement] = {}
    for l in range(3):
        pruned = changed(view, so_far)
        stats = collect_statistics(pruned, in_batches(images, 10), needs=["moments"])
        fc2 = view.fc2(l)
        expected = compensate(stats.moments(l), fc2.weight, fc2.bias, KEEP[l])
        torch.testing.assert_close(got[l].weight, expected.weight)
        torch.testing.assert_close(got[l].bias, expected.bias)
        so_far[l] = got[l]


def recorded(view: TimmView, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer of the view's model, and what comes out."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    view.model(images)
    handle.remove()
    return seen[0]


def fitted(rows: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares with an intercept, over all rows [n, t, ...]."""
    root = weight.repeat(len(rows)).sqrt()[:, None]
    x = torch.cat([rows, torch.ones(*rows.shape[:2], 1).double()], -1).flatten(0, 1)
    solution = torch.linalg.lstsq(root * x, root * target.flatten(0, 1)).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_regresses_on_the_dense_stream(beta: float) -> None:
    view, (images, _) = tiny_view(), data(60)
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    found = compensate_in_sequence(
        view, images.split(7), KEEP, fit=Fit(beta, [weight] * 3, shrinkage=0.0)
    )
    first = view.attention(0).proj
    torch.testing.assert_close(found.projections[0].weight, first.weight)  # no error yet
    dense, pruned = view.model.blocks[1], changed(view, {0: found.second[0]})
    block = pruned.model.blocks[1]

    # the attention's projection makes up for the error of the stream before the MLP
    goal, _ = recorded(view, dense.norm2, images)
    before, _ = recorded(pruned, block.norm2, images)
    a, given = recorded(pruned, block.attn.proj, images)
    w, b = fitted(a, given + beta * (goal - before), weight)
    torch.testing.assert_close(found.projections[1].weight, w)
    torch.testing.assert_close(found.projections[1].bias, b)

    # then the second layer for what is left after it
    block.attn.proj.weight.data, block.attn.proj.bias.data = w, b
    goal, _ = recorded(view, view.model.blocks[2].norm1, images)
    before, _ = recorded(pruned, pruned.model.blocks[2].norm1, images)
    h, given = recorded(pruned, block.mlp.fc2, images)
    w, b = fitted(h[..., KEEP[1]], given + beta * (goal - before), weight)
    torch.testing.assert_close(found.second[1].weight, w)
    torch.testing.assert_close(found.second[1].bias, b)


def test_the_classifier_comes_back_to_the_dense_logits_with_a_prior() -> None:
    view, (images, _) = tiny_view(), data(60)
    found = compensate_in_sequence(view, images.split(7), KEEP)
    pruned = changed(view, dict(enumerate(found.second)))
    for l, r in found.projections.items():
        proj = pruned.model.blocks[l].attn.proj
        proj.weight.data, proj.bias.data = r.weight, r.bias
    features, logits = recorded(pruned, pruned.model.head, images)
    error, centred = view.model(images) - logits, features - features.mean(0)
    spread = centred.square().mean()  # of a mean feature
    prior = (PRIOR_IMAGES * spread).sqrt() * torch.eye(features.shape[1]).double()
    rows = torch.cat([centred, prior])
    target = torch.cat([error - error.mean(0), error.new_zeros(len(prior), error.shape[1])])
    change = torch.linalg.lstsq(rows, target).solution.T
    (got,) = found.classifiers
    torch.testing.assert_close(got.weight, view.model.head.weight + change)
    bias = view.model.head.bias + error.mean(0) - change @ features.mean(0)
    torch.testing.assert_close(got.bias, bias)
    pruned.model.head.weight.data, pruned.model.head.bias.data = got.weight, got.bias
    after = view.model(images) - pruned.model(images)
    assert after.square().mean() < error.square().mean()


def test_heads_that_went_are_made_up_for_by_those_that_stay() -> None:
    view, (images, _) = tiny_view(), data(60)
    proj = view.attention(0).proj
    columns = list(range(proj.in_features // 2))
    gone = Replacement(columns, proj.weight[:, columns].detach(), proj.bias.detach())
    found = compensate_in_sequence(
        view,
        [images],
        [list(range(24))] * 3,
        changed=[{proj: gone}, {}, {}],
        fit=Fit(shrinkage=0.0),
    )
    assert found.projections[0].keep == columns
    a, given = recorded(view, proj, images)
    w, b = fitted(a[..., columns], given, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(found.projections[0].weight, w)
    torch.testing.assert_close(found.projections[0].bias, b)


def test_nothing_is_refitted_where_nothing_was_lost() -> None:
    view, (images, _) = tiny_view(), data(12)
    found = compensate_in_sequence(view, images.split(5), [list(range(24))] * 3)
    for l, r in enumerate(found.second):
        torch.testing.assert_close(r.weight, view.fc2(l).weight.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(
            found.projections[l].weight, view.attention(l).proj.weight.detach(), rtol=0, atol=1e-9
        )
    torch.testing.assert_close(
        found.classifiers[0].weight, view.model.head.weight.detach(), rtol=0, atol=1e-9
    )


def test_held_out_images_choose_the_shrinkage_and_nothing_else() -> None:
    view, (images, _) = tiny_view(), data(80)
    fit, held = images[:10], images[10:]
    chosen: list[float] = []
    found = compensate_in_sequence(
        view, fit.split(4), KEEP, fit=Fit(held_out=held.split(9)),
        on_block=lambda l, c: chosen.append(c.shrinkage),
    )  # fmt: skip
    dense, other = (
        collect_statistics(view, in_batches(x, 10), needs=["moments"]).moments(0)
        for x in (fit, held)
    )
    fc2 = view.fc2(0)
    best, _ = choose_shrinkage(dense, other, fc2.weight, KEEP[0])
    assert chosen[0] == best != SHRINKAGE
    expected = compensate(dense, fc2.weight, fc2.bias, KEEP[0], shrinkage=best)
    torch.testing.assert_close(found.second[0].weight, expected.weight)
    torch.testing.assert_close(found.second[0].bias, expected.bias)
    without = compensate_in_sequence(view, fit.split(4), KEEP)
    torch.testing.assert_close(
        without.second[0].weight,
        compensate(dense, fc2.weight, fc2.bias, KEEP[0], shrinkage=SHRINKAGE).weight,
    )


def test_own_units_of_the_class_token_are_fitted_on_class_tokens_alone() -> None:
    view, (images, _) = tiny_view(), data(60)
    own = [[1, 2, 3], [], [4, 5]]
    fit = Fit(0.5, shrinkage=0.0, own_shrinkages=(0.0,))
    found = compensate_in_sequence(view, images.split(7), KEEP, fit=fit, own=own)
    shared = compensate_in_sequence(view, images.split(7), KEEP, fit=fit)
    assert [r.first is None for r in found.second] == [False, True, False]
    first = found.second[0]
    assert first.first is not None
    tokens, theirs = first.first
    assert (tokens, theirs.keep) == (1, own[0])
    # nothing is lost before block 0 but at its attention's projection, which is the same twice
    proj = view.attention(0).proj
    with layers_replaced({proj: found.projections[0]}):
        h, _ = recorded(view, view.fc2(0), images)
        x = view.tail(0, view.embed(images), view.attention_output(0, view.embed(images)))
    y = view.block(0, view.embed(images))
    goal = view.fc2(0)(h) + 0.5 * (y - x)
    for layer, tokens_of in ((first, slice(1, None)), (theirs, slice(0, 1))):
        rows = h[:, tokens_of]
        weight, bias = fitted(
            rows[..., list(layer.keep)], goal[:, tokens_of], torch.ones(rows.shape[1]).double()
        )
        torch.testing.assert_close(layer.weight, weight)
        torch.testing.assert_close(layer.bias, bias)
    assert not torch.allclose(shared.second[0].weight, first.weight)
    with replaced(view, {0: first}):
        out = recorded(view, view.fc2(0), images)[1]
    kept = h[..., list(theirs.keep)]
    torch.testing.assert_close(out[:, 0], (kept @ theirs.weight.T + theirs.bias)[:, 0])

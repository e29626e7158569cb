"""Measured harm against networks really changed, block by block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from npprune.core.compression.compensation import compensate
from npprune.core.compression.harm import (
    Replacement,
    candidates_for,
    measure_harm,
    predict,
    replaced,
)
from npprune.core.compression.statistics import collect_statistics
from npprune.core.metrics import divergence
from npprune.errors import UsageError
from npprune.models.view import TimmView, make_view
from tests.core.test_statistics import data, tiny_view


def replacement(l: int, width: int) -> Replacement:
    g = torch.Generator().manual_seed(10 * l + width)
    keep = sorted(torch.randperm(24, generator=g)[:width].tolist())
    return Replacement(
        keep,
        torch.randn(12, width, generator=g, dtype=torch.float64) * 0.3,
        torch.randn(12, generator=g, dtype=torch.float64) * 0.3,
    )


def changed(view: TimmView, replacements: dict[int, Replacement]) -> TimmView:
    """A copy with the neurons removed for real."""
    model = copy.deepcopy(view.model)
    for l, r in replacements.items():
        mlp = model.blocks[l].mlp  # type: ignore[union-attr,index]
        first, second = nn.Linear(12, len(r.keep)), nn.Linear(len(r.keep), 12)
        first.weight.data, first.bias.data = mlp.fc1.weight[r.keep], mlp.fc1.bias[r.keep]
        second.weight.data, second.bias.data = r.weight, r.bias
        mlp.fc1, mlp.fc2 = first, second
    return make_view(model)


def test_replaced_equals_removed_and_is_undone() -> None:
    view, (images, _) = tiny_view(), data()
    dense = predict(view, [images])
    torch.testing.assert_close(dense, view.model(images))
    both = {0: replacement(0, 8), 2: replacement(2, 16)}
    got = predict(view, images.split(3), both)
    torch.testing.assert_close(got, changed(view, both).model(images), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="stop"), replaced(view, both):
        raise RuntimeError("stop")
    assert torch.equal(predict(view, [images]), dense)


def test_harm_is_the_divergence_of_the_network_really_changed() -> None:
    view, (images, _) = tiny_view(), data()
    dense = predict(view, [images])
    made = [{w: replacement(l, w) for w in (8, 16)} for l in range(3)]
    candidates = [{w: {view.fc2(l): r} for w, r in row.items()} for l, row in enumerate(made)]
    done: list[int] = []
    table = measure_harm(view, images.split(4), candidates, on_block=done.append)
    assert done == [1, 2, 3]
    for l in range(3):
        for w in (8, 16):
            logits = changed(view, {l: made[l][w]}).model(images).detach()
            assert table[l][w] == pytest.approx(float(divergence(dense, logits).mean()), rel=1e-9)


def test_candidates_are_the_best_scored_refitted() -> None:
    view, (images, _) = tiny_view(), data()
    stats = collect_statistics(view, [images], needs=["moments"])
    scores = [torch.arange(24.0)] * 3
    widths, fixed = [[4, 8]] * 3, [[0], [], []]
    made = list(candidates_for(view, stats.moments, scores, widths, protected=fixed))
    assert made[0][4][view.fc2(0)].keep == [0, 21, 22, 23]
    fc2 = view.fc2(2)
    found = made[2][8][fc2]
    assert found.keep == list(range(16, 24))
    refit = compensate(stats.moments(2), fc2.weight, fc2.bias, range(16, 24))
    torch.testing.assert_close(found.weight, refit.weight)
    torch.testing.assert_close(found.bias, refit.bias)


def test_refusal() -> None:
    with pytest.raises(UsageError, match="3 blocks, got 1"):
        measure_harm(tiny_view(), [data()[0]], [{}])

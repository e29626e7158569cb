"""Sequential compensation against statistics of networks really pruned."""

from __future__ import annotations

import pytest
import torch
from test_core_harm import changed
from test_core_statistics import data, in_batches, tiny_view
from torch import Tensor

from npprune.core.compensation import compensate
from npprune.core.harm import Replacement
from npprune.core.sequential import compensate_in_sequence
from npprune.core.statistics import Moments, collect_statistics

KEEP = [[0, 3, 4, 9, 20], [1, 2, 5, 11, 12, 13], [0, 7, 8, 9, 23]]


def test_each_block_is_fitted_on_the_network_pruned_so_far() -> None:
    view, (images, _) = tiny_view(), data(30)
    got = compensate_in_sequence(view, images.split(7), KEEP, beta=0.0)
    assert [r.keep for r in got] == KEEP
    so_far: dict[int, Replacement] = {}
    for l in range(3):
        pruned = changed(view, so_far)
        stats = collect_statistics(pruned, in_batches(images, None, 10), needs=["moments"])
        fc2 = view.fc2(l)
        expected = compensate(stats.moments(l), fc2.weight, fc2.bias, KEEP[l])
        torch.testing.assert_close(got[l].weight, expected.weight)
        torch.testing.assert_close(got[l].bias, expected.bias)
        so_far[l] = got[l]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_regresses_on_the_dense_stream(beta: float) -> None:
    view, (images, _) = tiny_view(), data(30)
    weights = [torch.linspace(0.5, 2, 5, dtype=torch.float64)] * 3
    got = compensate_in_sequence(
        view, images.split(7), KEEP, beta=beta, shrinkage=0.0, weights=weights
    )
    pruned = changed(view, {0: got[0]})

    def at_block_1(v: object) -> tuple[Tensor, Tensor]:
        """The stream after block 1 and fc2's input there."""
        seen: list[Tensor] = []
        x = v.block(0, v.embed(images))  # type: ignore[attr-defined]
        y = v.block(1, x, edit=lambda h: seen.append(h) or h)  # type: ignore[attr-defined,func-returns-value]
        return y, seen[0]

    (x, _), (before, h) = at_block_1(view), at_block_1(pruned)
    fc2 = view.fc2(1)
    target = (fc2(h) + beta * (x - before)).flatten(0, 1)
    rows = torch.cat([h[..., KEEP[1]], torch.ones(*h.shape[:2], 1).double()], -1).flatten(0, 1)
    root = weights[0].repeat(30).sqrt()[:, None]
    solution = torch.linalg.lstsq(root * rows, root * target).solution
    torch.testing.assert_close(got[1].weight, solution[:-1].T)
    torch.testing.assert_close(got[1].bias, solution[-1])


def test_neurons_may_be_chosen_on_the_way() -> None:
    view, (images, _) = tiny_view(), data(12)
    asked: list[int] = []

    def choose(l: int, moments: Moments) -> list[int]:
        asked.append(l)
        return sorted(moments.variance.topk(6).indices.tolist())

    got = compensate_in_sequence(view, [images], choose)
    assert asked == [0, 1, 2]
    stats = collect_statistics(
        changed(view, {0: got[0]}), in_batches(images, None, 12), needs=["moments"]
    )
    assert got[1].keep == choose(1, stats.moments(1))

"""Which of the images that flipped are kept to be shown."""

from __future__ import annotations

import pytest
import torch

from npprune.pipeline.evaluate.flipped import Flipped
from npprune.records import Preprocessing

GREY = Preprocessing((1, 2, 2), (0.0,), (1.0,))


def shown(flips: int, batch: int, *, preprocessing: Preprocessing = GREY) -> list[int]:
    """The running numbers of the lost images that are shown, of so many in batches."""
    seen = Flipped()
    order = torch.arange(flips)
    for part in order.split(batch):
        labels = part
        dense = torch.nn.functional.one_hot(part, flips + 1).float()
        pruned = torch.zeros_like(dense)
        pruned[:, flips] = 1.0
        channels = preprocessing.input_size[0]
        seen.see(torch.rand(len(part), channels, 2, 2), labels, dense, pruned)
    return [int(image.name) for image in seen.shown(preprocessing, str)]


@pytest.mark.parametrize("flips", [3, 8, 9, 16, 17, 100, 1000])
def test_they_are_spread_over_all_of_them(flips: int) -> None:
    found = shown(flips, 7)
    assert found == shown(flips, 64)
    assert len(found) == min(flips, 8)
    assert found[0] == 0
    gaps = [b - a for a, b in zip(found, [*found[1:], flips], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) <= 2 * flips / len(found) + 1


def test_no_picture_is_made_of_other_channels() -> None:
    five = Preprocessing((5, 2, 2), (0.0,) * 5, (1.0,) * 5)
    assert shown(4, 4, preprocessing=five) == []

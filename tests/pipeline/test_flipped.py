"""Which of the images that flipped are kept to be shown."""

from __future__ import annotations

import pytest
import torch

from npprune.data.loading import Batch
from npprune.pipeline.evaluate.flipped import Flipped
from npprune.records import Preprocessing

GREY = Preprocessing((1, 2, 2), (0.0,), (1.0,))


def shown(
    flips: int, batch: int, *, preprocessing: Preprocessing = GREY, processes: int = 1
) -> list[int]:
    """The running numbers of the lost images that are shown, of so many in batches."""
    parts = [Flipped() for _ in range(processes)]
    order = torch.arange(flips)
    for i, part in enumerate(order.split(batch)):
        labels = part
        dense = torch.nn.functional.one_hot(part, flips + 1).float()
        pruned = torch.zeros_like(dense)
        pruned[:, flips] = 1.0
        channels = preprocessing.input_size[0]
        seen_part = Batch(torch.rand(len(part), channels, 2, 2), labels, [], part.tolist())
        parts[i % processes].see(seen_part, dense, pruned)
    seen = parts[0] if processes == 1 else Flipped.of_all(parts)
    return [int(image.name) for image in seen.shown(preprocessing, str)]


@pytest.mark.parametrize("flips", [3, 8, 9, 16, 17, 100, 1000])
def test_they_are_spread_over_all_of_them(flips: int) -> None:
    found = shown(flips, 7)
    assert found == shown(flips, 64)
    if flips <= 16:  # all of them are kept until the end
        assert found == shown(flips, 2, processes=3)
    together = shown(flips, 7, processes=3)
    assert len(together) == len(found)
    assert together == sorted(together)
    assert len(found) == min(flips, 8)
    assert found[0] == 0
    gaps = [b - a for a, b in zip(found, [*found[1:], flips], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) <= 2 * flips / len(found) + 1


def test_no_picture_is_made_of_other_channels() -> None:
    five = Preprocessing((5, 2, 2), (0.0,) * 5, (1.0,) * 5)
    assert shown(4, 4, preprocessing=five) == []

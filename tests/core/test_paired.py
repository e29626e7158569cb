"""Paired tests from counts, against the same from whole data and from SciPy."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from npprune.core import metrics, paired
from npprune.errors import UsageError


def test_the_change_is_that_of_the_images_themselves() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (50,), generator=g)
    dense, pruned = torch.randn(2, 50, 3, generator=g)
    before, after = dense.argmax(1) == labels, pruned.argmax(1) == labels
    found = paired.change(int((before & ~after).sum()), int((after & ~before).sum()), 50)
    expected = metrics.top1_change(dense, pruned, labels)
    assert vars(found) == pytest.approx(vars(expected), rel=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (10, 25), (900, 1100)])
def test_mcnemar_is_the_binomial_test_of_those_that_changed(lost: int, gained: int) -> None:
    total = lost + gained
    expected = binomtest(lost, total).pvalue if total else 1.0
    assert paired.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_holm() -> None:
    assert paired.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert paired.holm([0.9, 0.8]) == [1.0, 1.0]


def test_more_changed_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError, match="of 3 images 2 cannot be lost and 2 gained"):
        paired.change(2, 2, 3)

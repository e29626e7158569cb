"""Metrics against hand-worked numbers and independent formulas."""

from __future__ import annotations

import math

import pytest
import torch

from npprune.core import metrics
from npprune.errors import UsageError


def test_wilson_matches_a_published_value_and_solves_its_own_equation() -> None:
    rate = metrics.wilson(81, 263)  # Newcombe (1998), table I: 0.2553 to 0.3662
    assert rate.value == 81 / 263
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)
    for bound in (rate.low, rate.high):
        residual = (rate.value - bound) ** 2 - metrics.Z95**2 * bound * (1 - bound) / 263
        assert abs(residual) < 1e-12


@pytest.mark.parametrize(("correct", "low", "high"), [(0, 0.0, None), (10, None, 1.0)])
def test_wilson_at_the_ends(correct: int, low: float | None, high: float | None) -> None:
    rate = metrics.wilson(correct, 10)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.high - rate.low > 0.2
    assert low is None or rate.low == low
    assert high is None or rate.high == high


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses(correct: int, total: int) -> None:
    with pytest.raises(UsageError, match=f"got {correct}/{total}"):
        metrics.wilson(correct, total)


def test_mean_interval() -> None:
    mean = metrics.mean_interval([1.0, 2.0, 4.0])
    deviation = math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    assert mean.value == pytest.approx(7 / 3)
    assert mean.standard_error == pytest.approx(deviation / math.sqrt(3))
    assert mean.high - mean.value == pytest.approx(1.959964 * mean.standard_error)
    assert metrics.mean_interval([5.0]).standard_error == 0.0
    with pytest.raises(UsageError, match="got none"):
        metrics.mean_interval([])
    with pytest.raises(UsageError, match="1 of 2"):
        metrics.mean_interval([1.0, math.nan])


def test_accuracy_counts_and_probability() -> None:
    logits = torch.tensor(
        [[5.0, 0, 0, 0, 0, -1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0.0, 9, -2, -3, -4, -5]]
    )
    labels = torch.tensor([0, 5, 0, 2])
    result = metrics.accuracy(logits, labels)
    assert (result.top1.correct, result.top1.total) == (2, 4)
    assert result.top5.correct == 3
    p = torch.softmax(logits.double(), 1)[range(4), labels]
    assert result.true_probability.value == pytest.approx(float(p.mean()))
    few = metrics.accuracy(logits[:, :3], torch.tensor([0, 2, 0, 2]))
    assert few.top5.value == 1.0


def test_accuracy_refuses_nan_shapes_and_labels() -> None:
    with pytest.raises(UsageError, match="NaN or infinity for 1 of 2 images, number"):
        metrics.accuracy(torch.tensor([[0.0, math.nan], [0, 1]]), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match=r"\(2, 3\) and \(3,\)"):
        metrics.accuracy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UsageError, match=r"0\.\.2, got 0\.\.3"):
        metrics.accuracy(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_restrict_is_the_smaller_classifier() -> None:
    g = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(40, 9, generator=g), [7, 1, 4]
    labels = torch.tensor(classes)[torch.randint(3, (40,), generator=g)]
    limited = metrics.accuracy(metrics.restrict(logits, classes), labels)
    place = {c: i for i, c in enumerate(sorted(classes))}
    cut = metrics.accuracy(
        logits[:, sorted(classes)], torch.tensor([place[int(c)] for c in labels])
    )
    assert limited.top1 == cut.top1
    assert limited.true_probability.value == pytest.approx(cut.true_probability.value, rel=1e-12)
    with pytest.raises(UsageError, match=r"0\.\.8"):
        metrics.restrict(logits, [9])


def test_probability_deviation_per_image_and_by_class() -> None:
    dense = torch.tensor([0.5, 0.2, 0.8, 0.4])
    pruned = torch.tensor([0.25, 0.3, 0.8, 0.1])
    labels = torch.tensor([3, 1, 3, 3])
    per_image = metrics.probability_deviation(dense, pruned)
    assert torch.allclose(per_image, torch.tensor([-0.5, 0.5, 0.0, -0.75], dtype=torch.float64))
    assert metrics.by_class(per_image, labels) == pytest.approx({1: 0.5, 3: -1.25 / 3})
    mean = metrics.deviation_by_class(dense, pruned, labels)
    assert mean.n == 2
    assert mean.value == pytest.approx((0.5 - 1.25 / 3) / 2)
    assert torch.isfinite(metrics.probability_deviation(torch.zeros(1), torch.ones(1))).all()


def test_paired_change_and_agreement() -> None:
    dense = torch.eye(4)[[0, 1, 2, 3]]
    pruned = torch.eye(4)[[0, 1, 3, 2]]
    labels = torch.tensor([0, 1, 2, 2])
    change = metrics.top1_change(dense, pruned, labels)
    assert change.value == 0.0  # one lost, one won
    assert change.standard_error == pytest.approx(math.sqrt(2 / 3) / 2)
    assert metrics.agreement(dense, pruned).correct == 2


def test_the_expected_drop_is_that_of_labels_drawn_from_the_dense_network() -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 5, generator=g, dtype=torch.float64)
    pruned = dense + torch.randn(6, 5, generator=g, dtype=torch.float64)
    drop = metrics.expected_drop(dense, pruned)
    labels = torch.multinomial(dense.softmax(1), 40_000, replacement=True, generator=g)
    right = [(labels == x.argmax(1, keepdim=True)).double().mean(1) for x in (dense, pruned)]
    assert torch.allclose(drop, right[0] - right[1], atol=0.015)
    same = dense.argmax(1) == pruned.argmax(1)
    assert 0 < int(same.sum()) < 6
    assert torch.equal(drop == 0, same)
    assert bool((drop >= 0).all())


def test_divergence_matches_torch() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 7, generator=g), torch.randn(5, 7, generator=g)
    expected = torch.nn.functional.kl_div(
        b.double().log_softmax(1), a.double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert torch.allclose(metrics.divergence(a, b), expected, atol=1e-12)


def test_rank_correlation_has_an_interval_that_covers() -> None:
    x = list(range(30))
    assert metrics.rank_correlation(x[:4], x[:4]) is None
    assert metrics.rank_correlation(x, [1.0] * 30) is None
    whole = metrics.rank_correlation(x, [v**3 for v in x])
    assert whole is not None
    assert whole.value == pytest.approx(1)
    inside = 0
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(40, generator=g, dtype=torch.float64)
        b = 0.5 * a + torch.randn(40, generator=g, dtype=torch.float64)
        found = metrics.rank_correlation(a.tolist(), b.tolist())
        assert found is not None
        inside += found.low <= 0.430 <= found.high  # 6/pi asin(r/2) of r = 0.5 / sqrt(1.25)
    assert 180 <= inside <= 199


def test_reliability_is_the_mean_gap_of_confidence_and_accuracy() -> None:
    p = torch.tensor([[0.9, 0.1], [0.91, 0.09], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    found = metrics.reliability(p.log(), torch.tensor([0, 1, 1, 0]))
    assert [b.accuracy.total for b in found.bins] == [1, 1, 2]  # of 15: (0.467, 0.533], ...
    assert [b.confidence for b in found.bins] == pytest.approx([0.5, 0.6, 0.905])
    assert found.error == pytest.approx((0.5 + 0.4 + 2 * 0.405) / 4)


def test_a_histogram_counts_from_each_edge_to_the_next() -> None:
    values = torch.tensor([-1.0, -0.5, -0.51, 0.0, 7.0], dtype=torch.float64)
    assert metrics.histogram(values, [-1.0, -0.5, 0.0]).counts == [2, 1, 2]

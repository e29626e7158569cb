"""What two networks did on the same images: accuracy, probability deviation, paired change.

Every number carries its uncertainty. Tensors are gathered over the whole set first (logits
[n, c], labels [n]); sums run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

from npprune.core.paired import Z95
from npprune.errors import UsageError, plural
from npprune.records import (
    Accuracy,
    ConfidenceBin,
    FeatureAgreement,
    Histogram,
    Mean,
    Rate,
    Reliability,
)

BINS = 15  # of confidence
DEVIATIONS = [step / 10 for step in range(-10, 11)]  # edges of the deviation's histogram


def wilson(correct: int, total: int) -> Rate:
    """A proportion with its 95 % Wilson score interval (Wilson, 1927).

    Raises:
        UsageError: total is not positive, or correct not within 0..total.
    """
    if total < 1 or not 0 <= correct <= total:
        raise UsageError(
            f"a rate needs 0 <= correct <= total and total >= 1, got {correct}/{total}"
        )
    share, z2 = correct / total, Z95 * Z95
    scale = 1 + z2 / total
    center = (share + z2 / (2 * total)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / scale
    # at the ends the interval touches the share exactly; rounding must not move it past
    low = 0.0 if correct == 0 else max(0.0, center - half)
    high = 1.0 if correct == total else min(1.0, center + half)
    return Rate(correct=correct, total=total, value=share, low=low, high=high)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> Mean | None:
    """Spearman's correlation of paired values, with a 95 % interval; None where there are fewer
    than five pairs, or one side does not vary.

    Source of the interval: Fisher's z with the variance of Bonett and Wright, "Sample size
    requirements for estimating Pearson, Kendall and Spearman correlations" (2000).
    """
    n = len(x)
    if n < 5 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    r = float(spearmanr(x, y).statistic)
    error = math.sqrt((1 + r * r / 2) / (n - 3))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    low, high = math.tanh(z - 1.96 * error), math.tanh(z + 1.96 * error)
    return Mean(r, error * (1 - r * r), low, high, n)


def mean_interval(values: Tensor | Sequence[float]) -> Mean:
    """A mean with its standard error s / sqrt(n) and the 95 % interval of the normal.

    One value has no spread to estimate: its standard error is 0, and n = 1 says why.

    Raises:
        UsageError: no values, or one that is not finite.
    """
    x = torch.as_tensor(values).detach().to("cpu", torch.float64).flatten()
    n = x.numel()
    if n == 0:
        raise UsageError("a mean needs at least one value, got none")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise UsageError(f"a mean needs finite values, got {bad} of {n} that are not")
    value = float(x.mean())
    error = float(x.std(correction=1)) / math.sqrt(n) if n > 1 else 0.0
    half = Z95 * error
    return Mean(value=value, standard_error=error, low=value - half, high=value + half, n=n)


def restrict(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits with every class but the chosen ones at -inf: [n, c] -> [n, c].

    Softmax and argmax of the result are those of the classifier limited to `classes`.
    """
    index = torch.as_tensor(sorted(set(classes)), device=logits.device)
    if index.numel() == 0 or int(index[0]) < 0 or int(index[-1]) >= logits.shape[1]:
        raise UsageError(
            f"classes must name outputs 0..{logits.shape[1] - 1}, got {list(classes)[:8]}"
        )
    limited = torch.full_like(logits, -math.inf)
    limited[:, index] = logits[:, index]
    return limited


def true_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability of each image's own label: [n, c], [n] -> [n], float64."""
    _check(logits, labels)
    log_p = logits.to(torch.float64).log_softmax(dim=1)
    return log_p.gather(1, labels.long()[:, None])[:, 0].exp()


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1, top-5 and the mean true-class probability of logits [n, c] on labels [n].

    With fewer than five classes top-5 counts all of them. -inf stands for a class that is not
    offered (see `restrict`).
    """
    _check(logits, labels)
    n, offered = logits.shape
    ranked = logits.topk(min(5, offered), dim=1).indices == labels.long()[:, None]
    return Accuracy(
        top1=wilson(int((logits.argmax(dim=1) == labels).sum()), n),
        top5=wilson(int(ranked.any(dim=1).sum()), n),
        true_probability=mean_interval(true_probability(logits, labels)),
    )


def reliability(logits: Tensor, labels: Tensor) -> Reliability:
    """Confidence against accuracy in bins of equal width, and the expected calibration error.

    It is above 0 for a perfectly calibrated network, too: the fewer images, the more.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), equations 2 and 3.
    """
    _check(logits, labels)
    confidence, predicted = logits.to(torch.float64).softmax(dim=1).max(dim=1)
    right = predicted == labels
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    for i in place.unique().tolist():
        inside = place == i
        rate = wilson(int(right[inside].sum()), int(inside.sum()))
        bins.append(ConfidenceBin(float(confidence[inside].mean()), rate))
    gaps = [b.accuracy.total * abs(b.confidence - b.accuracy.value) for b in bins]
    return Reliability(sum(gaps) / len(labels), bins)


def histogram(values: Tensor, edges: Sequence[float]) -> Histogram:
    """How many values [n] lie between edges; none may lie below the first one."""
    place = torch.bucketize(values, torch.tensor(edges, dtype=values.dtype), right=True) - 1
    counts = place.clamp_min(0).bincount(minlength=len(edges))
    return Histogram(list(edges), counts.tolist())


def agreement(dense: Tensor, pruned: Tensor) -> Rate:
    """How often two networks' logits [n, c] have the same top-1."""
    same = dense.argmax(dim=1) == pruned.argmax(dim=1)
    return wilson(int(same.sum()), same.numel())


def top1_change(dense: Tensor, pruned: Tensor, labels: Tensor) -> Mean:
    """Pruned minus dense top-1, paired: the mean over images of (right now) - (right before).

    The two networks saw the same images, so the interval of the paired differences is the right
    one, and narrower than that of two separate rates.
    """
    _check(dense, labels)
    _check(pruned, labels)
    after = (pruned.argmax(dim=1) == labels).to(torch.float64)
    before = (dense.argmax(dim=1) == labels).to(torch.float64)
    return mean_interval(after - before)


def probability_deviation(p_dense: Tensor, p_pruned: Tensor) -> Tensor:
    """The paper's deviation per image, (p_pruned - p_dense) / p_dense: [n], [n] -> [n] float64.

    p is the softmax probability of the image's true class. A dense probability that underflows
    is held at the smallest normal float64, so that the ratio stays finite.

    Source: Neuron Path (ICLR 2025), deviation of the probability under removal.
    """
    if p_dense.shape != p_pruned.shape:
        raise UsageError(
            f"probabilities must come in pairs, got {tuple(p_dense.shape)} "
            f"and {tuple(p_pruned.shape)}"
        )
    before = p_dense.to(torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    return (p_pruned.to(torch.float64) - before) / before


def by_class(values: Tensor, labels: Tensor) -> dict[int, float]:
    """The mean of per-image values [n] within each class, classes ascending."""
    if values.shape != labels.shape:
        raise UsageError(
            f"one value per label is needed, got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    classes, place = labels.unique(return_inverse=True)
    total = torch.zeros(classes.numel(), dtype=torch.float64, device=values.device)
    total.index_add_(0, place, values.to(torch.float64))
    mean = total / place.bincount(minlength=classes.numel())
    return dict(zip(classes.tolist(), mean.tolist(), strict=True))


def deviation_by_class(p_dense: Tensor, p_pruned: Tensor, labels: Tensor) -> Mean:
    """The deviation averaged within each class first, then over classes, as the paper does."""
    return mean_interval(list(by_class(probability_deviation(p_dense, p_pruned), labels).values()))


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned) of the predictions per image, in nats: logits [n, c] -> [n] float64."""
    log_p = dense.to(torch.float64).log_softmax(dim=1)
    log_q = pruned.to(torch.float64).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def feature_distances(dense: Tensor, pruned: Tensor) -> Tensor:
    """Of two networks' features [n, s, d]: cosine and relative squared error of the pooled vectors,
    and of the patch tokens, the mean over an image's patches: [n, 2 or 4] float64."""
    a, b = dense.to(torch.float64), pruned.to(torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    norms = a.square().sum(-1).clamp_min(tiny), b.square().sum(-1).clamp_min(tiny)
    cosine = (a * b).sum(-1) / (norms[0] * norms[1]).sqrt()
    error = (a - b).square().sum(-1) / norms[0]
    columns = [cosine[:, 0], error[:, 0]]
    if dense.shape[1] > 1:
        columns += [cosine[:, 1:].mean(1), error[:, 1:].mean(1)]
    return torch.stack(columns, 1)


def feature_agreement(distances: Tensor) -> FeatureAgreement:
    """The means of `feature_distances` over the images, with their intervals."""
    return FeatureAgreement(*map(mean_interval, distances.unbind(1)))


def expected_drop(dense: Tensor, pruned: Tensor) -> Tensor:
    """Expected loss of top-1 per image, were the dense network's probabilities true: its own best
    class's less that of the class that the pruned network prefers. Logits [n, c] -> [n] float64.

    It needs no labels and varies far less than counting right answers: an image on which the two
    agree adds exactly 0. It is as good as the dense network is calibrated.
    """
    p = dense.to(torch.float64).softmax(dim=1)
    best = torch.stack([p.argmax(dim=1), pruned.argmax(dim=1)], dim=1)
    before, after = p.gather(1, best).unbind(dim=1)
    return before - after


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UsageError(
            "logits must be [n, c] and labels [n], got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    bad = (torch.isnan(logits) | (logits == math.inf)).any(dim=1)
    if bool(bad.any()):
        raise UsageError(
            f"logits must be numbers, got NaN or infinity for {int(bad.sum())} of "
            f"{plural(len(logits), 'image')}, number {int(bad.nonzero()[0])} the first",
            hint="the network overflowed: check its weights and the precision it runs in",
        )
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
        raise UsageError(
            f"labels must lie in 0..{logits.shape[1] - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )

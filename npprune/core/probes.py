"""Simple classifiers on features [n, d], to say what features are worth: each image is judged by a
classifier that has not seen it, exactly, without a split.

k-NN: the k other images with the largest cosine vote with weights exp(cosine / T) (Wu et al., CVPR
2018, as DINO is measured by).

Ridge: one-hot labels are regressed on the centred features and a constant. With s the eigenvalues
of X^T X and V its eigenvectors, prediction without an image's own part follows from the fit of all:

    y_i - z_i = (y_i - fit_i) / (1 - h_i)      h_i = 1/n + sum over j of (x_i . v_j)^2 / (s_j + l)

and l is the one of a few with the least squared error of these (Allen's PRESS, 1974).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from npprune.core.linear import check_finite

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = tuple(10.0**e for e in range(-6, 2))
"""Of the mean eigenvalue."""
SCALES = tuple(2.0 ** (e / 2) for e in range(13))
"""From 1 to 64."""
ROWS = 1024  # images at a time


def nearest_neighbours(features: Tensor, labels: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The label [n] that the k nearest other images vote for; labels [n] are 0 or more."""
    x = functional.normalize(features.double(), dim=1)
    classes, y = labels.unique(return_inverse=True)
    found = []
    for start in range(0, len(x), ROWS):
        near = x[start : start + ROWS] @ x.T
        own = torch.arange(start, start + len(near))
        near[torch.arange(len(near)), own] = -torch.inf
        cosine, place = near.topk(min(k, len(x) - 1), dim=1)
        votes = torch.zeros(len(near), len(classes), dtype=x.dtype)
        votes.scatter_add_(1, y[place], (cosine / TEMPERATURE).exp())
        found.append(classes[votes.argmax(1)])
    return torch.cat(found)


def ridge(features: Tensor, labels: Tensor) -> Tensor:
    """The label [n] that ridge regression on the other images predicts."""
    fit = Ridge(features, labels)
    return fit.classes[fit.left_out(fit.best).argmax(1)]


class Ridge:
    """Ridge regressions of one-hot labels on features, for each of `PENALTIES`; `best` is taken."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        x = features.double()
        check_finite(x)
        self.classes, place = labels.unique(return_inverse=True)
        y = functional.one_hot(place, len(self.classes)).double()
        self.mean, self.share = x.mean(0), y.mean(0)
        self.x, self.y = x - self.mean, y - self.share
        values, self.vectors = torch.linalg.eigh(self.x.T @ self.x)
        self.values = values.clamp_min(0)
        self.turned = self.x @ self.vectors
        self.target = self.turned.T @ self.y
        errors = {p: float((self.left_out(p) - y).square().sum()) for p in PENALTIES}
        self.best = min(errors, key=lambda p: errors[p])

    def left_out(self, penalty: float) -> Tensor:
        """Predictions [n, c] of each image without its own part."""
        scale = 1 / (self.values + self._ridge(penalty))
        fit = self.turned @ (scale[:, None] * self.target)
        own = (self.turned.square() @ scale + 1 / len(self.x)).clamp_max(1 - 1e-9)
        return self.y + self.share - (self.y - fit) / (1 - own)[:, None]

    def layer(self) -> tuple[Tensor, Tensor]:
        """The classifier of all images: weight [c, d] and bias [c], float64, of logits.

        What regression gives is near 0 and 1: it is scaled by that of `SCALES` with the least
        cross-entropy of images left out. A label that no image has gets zeros.
        """
        shrunk = 1 / (self.values + self._ridge(self.best))
        weight = (self.vectors @ (shrunk[:, None] * self.target)).T
        bias = self.share - weight @ self.mean
        found, labels = self.left_out(self.best), self.y.argmax(1)
        losses = {s: float(functional.cross_entropy(s * found, labels)) for s in SCALES}
        scale = min(losses, key=lambda s: losses[s])
        count = int(self.classes.max()) + 1
        every = weight.new_zeros(count, weight.shape[1]), bias.new_zeros(count)
        every[0][self.classes], every[1][self.classes] = scale * weight, scale * bias
        return every

    def _ridge(self, penalty: float) -> float:
        return penalty * float(self.values.mean().clamp_min(torch.finfo(self.values.dtype).tiny))

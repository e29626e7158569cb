"""What a network is for, as the mathematics sees it: what counts as a change of its outputs.

A classifier's outputs are logits [b, c], and a change is the divergence of its predictions. A
network without a classifier gives features [b, s, d]: the pooled vector and, where it has them, the
patch tokens after it, as its user reads them. There a change is the squared error of each token
over its squared norm, the pooled vector counting as much as all patches together:

    D(f, f') = sum over tokens s of w_s |f_s - f'_s|^2 / |f_s|^2        w = 1/2, then 1/2 over n

Near equal features that is twice one minus the cosine, where norms agree. It is quadratic, so its
curvature is exact: 2 w_s / |f_s|^2 times the identity, of which random signs are a square root.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from npprune.core import metrics

TINY = 1e-12
"""Least squared norm of a token that an error is measured by."""


class Objective(Protocol):
    """How outputs are compared; `unit`: what a change is counted in."""

    unit: str

    def divergence(self, dense: Tensor, changed: Tensor) -> Tensor:
        """The change per image, [n] float64."""
        ...

    def cotangent(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A random v of the outputs' shape, with the mean of v v^T the Hessian of the change."""
        ...

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The change per image, [b], to be trained on."""
        ...


class Predictions:
    """Logits [b, c], by KL divergence.

    The cotangent is sqrt(p) e - p (sqrt(p) . e) with random signs e: its outer product is
    diag(p) - p p^T on average, the exact curvature of KL(dense || changed) (the Fisher matrix),
    with far less noise than drawn labels where the network is sure of itself. It needs no labels.
    """

    unit = "nats"

    def divergence(self, dense: Tensor, changed: Tensor) -> Tensor:
        return metrics.divergence(dense, changed)

    def cotangent(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        p = outputs.softmax(dim=1)
        signs = _signs(p, generator)
        root = p.sqrt()
        return root * signs - p * (root * signs).sum(dim=1, keepdim=True)

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence_at(student, teacher, temperature)


class Features:
    """Features [b, s, d], the pooled vector first, by relative squared error."""

    unit = "relative error"

    def divergence(self, dense: Tensor, changed: Tensor) -> Tensor:
        pairs = zip(dense.split(16), changed.split(16), strict=True)  # in float64: a few at a time
        return torch.cat([_error(a.double(), b.double()) for a, b in pairs])

    def cotangent(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        signs = _signs(outputs, generator)
        norm = outputs.square().sum(-1, keepdim=True).clamp_min(TINY)
        return signs * (2 * _weights(outputs)[:, None] / norm).sqrt()

    def loss(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """`temperature` plays no part."""
        return _error(teacher.float(), student.float())


def divergence_at(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the predictions softened by T: logits [b, c] -> nats [b].

    T^2 keeps the gradient's size independent of T. A teacher's logit of -inf leaves that class
    out: its probability is 0, and the student learns to give it none.
    """
    p = (teacher.float() / temperature).softmax(dim=1)
    log_q = (student.float() / temperature).log_softmax(dim=1)
    return functional.kl_div(log_q, p, reduction="none").sum(dim=1) * temperature**2


def _error(dense: Tensor, changed: Tensor) -> Tensor:
    """D of the module's text, [b]."""
    norm = dense.square().sum(-1).clamp_min(TINY)
    return ((changed - dense).square().sum(-1) / norm) @ _weights(dense)


def _weights(features: Tensor) -> Tensor:
    """Of the tokens, [s]."""
    patches = features.shape[1] - 1
    if patches == 0:
        return features.new_ones(1)
    return torch.cat([features.new_tensor([0.5]), features.new_full((patches,), 0.5 / patches)])


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1

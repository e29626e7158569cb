"""The ways to find a path: joint attribution, and what it is compared with.

Every method returns the same thing, a path of K units per block for each image, with the joint
attribution score of that path, so that they can be set side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npprune.core.attribution.quadrature import Integral, quadrature
from npprune.core.attribution.search import (
    PathBatch,
    clean_hidden,
    joint_attribution,
    own_attribution,
)
from npprune.core.view import VitView, frozen
from npprune.errors import ModelError, UsageError
from npprune.words import METHODS, Method, check_word


def find_paths(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    *,
    topk: int = 1,
    method: Method = "neuron-path",
    integral: Integral | None = None,
    generator: torch.Generator | None = None,
) -> PathBatch:
    """One path for each image, and its joint attribution score.

    Args:
        view: the network; images: [b, 3, H, W], preprocessed; labels: int64 [b].
        topk: units per block, best first.
        method: `neuron-path` (the paper's search), `activation`, `influence-pattern`,
            `knowledge-neuron`, `random`.
        integral: tokens, quadrature and accumulation; None: the network's defaults.
        generator: on the CPU, for `random`; seed 0 if not given.

    Raises:
        UsageError: an unknown word, or K outside 1..the narrowest block's width.
        ModelError: the network merges tokens, has one output, or gives no finite numbers on these
            images.
    """
    check_word("method", method, METHODS)
    if view.merges:
        raise ModelError(
            "paths cannot be found in a network that merges tokens: a neuron is read at the same "
            "tokens in every block",
            hint="find them in the dense network",
        )
    if view.own_units:
        raise ModelError(
            "paths cannot be found in a network whose class token has hidden units of its own: a "
            "neuron is no longer one thing for all tokens",
            hint="find them in the dense network",
        )
    if not 1 <= topk <= min(view.widths):
        raise UsageError(
            f"`topk` must be in 1..{min(view.widths)} (the narrowest block's hidden units), "
            f"got {topk}"
        )
    integral = integral or Integral.of(view.scope)
    if method == "neuron-path":
        return joint_attribution(view, images, labels, integral, topk=topk)
    if method == "random":
        neurons = _random(view, len(images), topk, generator)
    else:
        scores = SCORERS[method](view, images, labels, integral)
        best = [s.sort(dim=-1, descending=True, stable=True).indices[:, :topk] for s in scores]
        neurons = torch.stack(best, 1)
    return joint_attribution(view, images, labels, integral, topk=topk, neurons=neurons)


def activation(view: VitView, images: Tensor, labels: Tensor, integral: Integral) -> list[Tensor]:
    """The activation itself, signed, summed over the scope's tokens: [b, h] per block.

    The paper's Activation baseline.
    """
    hidden, _ = clean_hidden(view, images, integral.scope)
    return [h.sum(1) for h in hidden]


def influence_pattern(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    integral: Integral,
) -> list[Tensor]:
    """The mean gradient of p in every unit while the input image is scaled from 0: [b, h] per
    block, summed over the scope's tokens.

    Influence Patterns (Lu et al., NeurIPS 2021), as the paper's released program runs them: each
    block on its own.
    """
    points = quadrature(integral.rule, integral.image_points)
    alphas, weights = (v.to(images) for v in points)
    tokens, blocks = view.tokens(integral.scope), range(len(view.widths))
    total = [images.new_zeros(len(images), h) for h in view.widths]
    with frozen(view.model):
        for alpha, weight in zip(alphas, weights, strict=True):
            hidden: list[Tensor] = []

            def keep(h: Tensor, hidden: list[Tensor] = hidden) -> Tensor:
                hidden.append(h)
                return h

            x = view.embed(alpha * images).requires_grad_()
            for l in blocks:
                x = view.block(l, x, edit=keep)
            p = view.head(x).softmax(-1).gather(1, labels[:, None]).sum()
            for l, g in zip(blocks, torch.autograd.grad(p, hidden), strict=True):
                total[l] += weight * g[:, tokens].sum(1)
    return total


def knowledge_neuron(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    integral: Integral,
) -> list[Tensor]:
    """Each unit's own activation times its integrated gradient: [b, h] per block.

    Knowledge Neurons (Dai et al., ACL 2022): the block's units are scaled together from 0, all
    else follows. The scores of a block add up to the change of p (completeness).
    """
    return own_attribution(view, images, labels, integral)


SCORERS: dict[str, Callable[[VitView, Tensor, Tensor, Integral], list[Tensor]]] = {
    "activation": activation,
    "influence-pattern": influence_pattern,
    "knowledge-neuron": knowledge_neuron,
}
"""Methods that score every unit for itself."""


def _random(view: VitView, b: int, topk: int, generator: torch.Generator | None) -> Tensor:
    """K different units per block, uniformly: [b, L, k]."""
    g = generator or torch.Generator().manual_seed(0)
    draws = [torch.rand(b, h, generator=g).argsort(-1)[:, :topk] for h in view.widths]
    return torch.stack(draws, 1).to(next(view.model.parameters()).device)

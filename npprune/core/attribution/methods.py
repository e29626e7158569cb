"""The ways to find a path: joint attribution, and what it is compared with.

Every method returns the same thing, a path of K units per block for each image, with the joint
attribution score of that path, so that they can be set side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from npprune.core.attribution.quadrature import (
    IMAGE_POINTS,
    RuleOrAuto,
    default_points,
    first_block_points,
    quadrature,
    rule_for,
)
from npprune.core.attribution.search import (
    Accumulation,
    PathBatch,
    clean_hidden,
    joint_attribution,
    own_attribution,
)
from npprune.core.view import Scope, VitView, frozen
from npprune.errors import ModelError

Method = Literal["neuron-path", "activation", "influence-pattern", "knowledge-neuron", "random"]
METHODS: tuple[str, ...] = get_args(Method)


def find_paths(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    *,
    topk: int = 1,
    method: Method = "neuron-path",
    scope: Scope | Literal["auto"] = "auto",
    rule: RuleOrAuto = "auto",
    points: int | None = None,
    accumulation: Accumulation = "sum",
    generator: torch.Generator | None = None,
) -> PathBatch:
    """One path for each image, and its joint attribution score.

    Args:
        view: the network; images: [b, 3, H, W], preprocessed; labels: int64 [b].
        topk: units per block, best first.
        method: `neuron-path` (the paper's search), `activation`, `influence-pattern`,
            `knowledge-neuron`, `random`.
        scope: the tokens at which neurons are read and scaled; `auto` follows the pooling.
        rule, points: the quadrature, see `core.quadrature`.
        accumulation: see `core.paths.joint_attribution`.
        generator: on the CPU, for `random`; seed 0 if not given.

    Raises:
        ValueError: an unknown name, or K outside 1..the narrowest block's width.
        ModelError: a network that merges tokens.
    """
    if view.merges:
        raise ModelError(
            "paths cannot be found in a network that merges tokens: a neuron is read at the same "
            "tokens in every block",
            hint="find them in the dense network",
        )
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
    if accumulation not in get_args(Accumulation):
        raise ValueError(f"`accumulation` must be sum or last, got {accumulation!r}")
    if not 1 <= topk <= min(view.widths):
        raise ValueError(
            f"`topk` must be in 1..{min(view.widths)} (the narrowest block's hidden units), "
            f"got {topk}"
        )
    tokens = view.scope if scope == "auto" else scope
    attribute: dict[str, Any] = {
        "topk": topk, "scope": tokens, "rule": rule, "points": points,
        "accumulation": accumulation,
    }  # fmt: skip
    if method == "neuron-path":
        return joint_attribution(view, images, labels, **attribute)
    if method == "random":
        neurons = _random(view, len(images), topk, generator)
    else:
        scorers: dict[str, Callable[..., list[Tensor]]] = {
            "activation": activation,
            "influence-pattern": influence_pattern,
            "knowledge-neuron": knowledge_neuron,
        }
        scores = scorers[method](view, images, labels, scope=tokens, rule=rule, points=points)
        best = [s.sort(dim=-1, descending=True, stable=True).indices[:, :topk] for s in scores]
        neurons = torch.stack(best, 1)
    return joint_attribution(view, images, labels, neurons=neurons, **attribute)


def points_of(method: str, rule: RuleOrAuto, scope: str, points: int | None) -> tuple[int, int]:
    """Points of the integral by which `find_paths` chooses neurons, and of the one in block 0."""
    if points is not None:
        return points, points
    if method == "influence-pattern":
        return IMAGE_POINTS, IMAGE_POINTS
    m = default_points(rule, scope)
    by_block = method in ("neuron-path", "knowledge-neuron")
    return m, first_block_points(rule, scope) if by_block else m


def activation(
    view: VitView, images: Tensor, labels: Tensor, *, scope: Scope, **unused: Any
) -> list[Tensor]:
    """The activation itself, signed, summed over the scope's tokens: [b, h] per block.

    The paper's Activation baseline.
    """
    hidden, _ = clean_hidden(view, images, scope)
    return [h.sum(1) for h in hidden]


def influence_pattern(
    view: VitView,
    images: Tensor,
    labels: Tensor,
    *,
    scope: Scope,
    rule: RuleOrAuto = "auto",
    points: int | None = None,
) -> list[Tensor]:
    """The mean gradient of p in every unit while the input image is scaled from 0: [b, h] per
    block, summed over the scope's tokens.

    Influence Patterns (Lu et al., NeurIPS 2021), as the paper's released program runs them: each
    block on its own.
    """
    m = IMAGE_POINTS if points is None else points
    alphas, weights = (v.to(images) for v in quadrature(rule_for(rule, scope), m))
    tokens, blocks = view.tokens(scope), range(len(view.widths))
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
    *,
    scope: Scope,
    rule: RuleOrAuto = "auto",
    points: int | None = None,
) -> list[Tensor]:
    """Each unit's own activation times its integrated gradient: [b, h] per block.

    Knowledge Neurons (Dai et al., ACL 2022): the block's units are scaled together from 0, all
    else follows. The scores of a block add up to the change of p (completeness).
    """
    return own_attribution(view, images, labels, scope=scope, rule=rule, points=points)


def _random(view: VitView, b: int, topk: int, generator: torch.Generator | None) -> Tensor:
    """K different units per block, uniformly: [b, L, k]."""
    g = generator or torch.Generator().manual_seed(0)
    draws = [torch.rand(b, h, generator=g).argsort(-1)[:, :topk] for h in view.widths]
    return torch.stack(draws, 1).to(next(view.model.parameters()).device)

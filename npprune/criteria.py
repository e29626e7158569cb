"""The criteria: which hidden units of a block stay first. One registry, one signature.

A criterion maps a `Context` and a block to one score per hidden unit ([h], higher = keep). Those
in this file are all there is to say of a criterion: recipes, the command line, the Python API and
the study read the registry. Your own is one function more:

    @register("peak", "largest activation", "moments")
    def peak(context, l):
        return context.moments(l).second

Knows no torch: tensors come from the context and bring their methods along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from npprune.errors import UsageError
from npprune.words import check_word

Tensor = Any
"""PyTorch's, which is not loaded here."""

Need = Literal["moments", "salience", "gates", "curvature", "read"]
"""Statistics of the calibration images (see `core.compression.statistics`)."""
NEEDS: tuple[Need, ...] = get_args(Need)


class Context(Protocol):
    """What a criterion may read of block l. Each raises UsageError where it is not there."""

    def weight(self, l: int) -> Tensor:
        """W = fc2.weight [d, h], float64."""
        ...

    def row_norms(self, l: int) -> Tensor:
        """Norm of each unit's row of fc1, [1, h]; [2, h] where there is a gate."""
        ...

    def moments(self, l: int) -> Any:
        """Of the activations: mean, variance, mean_absolute, second [h], covariance [h, h]
        ("moments")."""
        ...

    @property
    def statistics(self) -> Any:
        """The pass over the images: taylor(l), fisher(l) [h] ("gates"), curvature(l) [d, d]
        ("curvature")."""
        ...

    def votes(self, l: int) -> Tensor:
        """How many class paths hold each unit, weighted by rank, [h]."""
        ...

    def attribution(self, l: int) -> Tensor:
        """Summed score of the paths through each unit, [h]."""
        ...

    def random(self, l: int) -> Tensor:
        """Uniform numbers from the seed, [h]."""
        ...

    def eliminate(self, l: int, curvature: Tensor | None = None) -> Tensor:
        """Scores [h] of the greedy elimination (see `core.compression.elimination`)."""
        ...


Function = Callable[[Any, int], Tensor]


@dataclass(frozen=True)
class Criterion:
    """One way to rank hidden units: a function, what it reads, where it is from."""

    name: str
    function: Function
    needs: tuple[Need, ...]
    source: str
    paths: bool = False  # reads a run's paths
    draws: bool = False  # reads random numbers


CRITERIA: dict[str, Criterion] = {}


def register(
    name: str, source: str, *needs: Need, paths: bool = False, draws: bool = False
) -> Callable[[Function], Function]:
    """Add a criterion under `name`: a decorator of `function(context, l)`.

    The function gives a tensor [h]: a score for every hidden unit of block l, higher stays. What it
    may read is said by `Context`. Run again, as a notebook's cell is, the same function takes its
    own place.

    Args:
        name: what `criterion=`, recipes and the command line call it.
        source: where it is from: one line.
        needs: the statistics it reads, so that one pass collects just those: `moments` of the
            activations, `gates` (`statistics.taylor`, `fisher`), `curvature`
            (`statistics.curvature`), `salience` (tokens weighted by the loss's gradient), `read`
            (all of these once more, over the tokens that the classifier reads).
        paths: it reads `votes` or `attribution`.
        draws: it reads `random`.

    Raises:
        UsageError: the name is another function's, or a need is unknown.
    """
    for need in needs:
        check_word("needs", need, NEEDS)

    def add(function: Function) -> Function:
        there = CRITERIA.get(name)
        if there is not None and _place(there.function) != _place(function):
            raise UsageError(f"a criterion `{name}` is registered already")
        CRITERIA[name] = Criterion(name, function, needs, source, paths, draws)
        return function

    return add


def _place(function: Function) -> tuple[str, str]:
    return function.__module__, function.__qualname__


@register("random", "chance; the baseline", draws=True)
def random(context: Context, l: int) -> Tensor:
    """A random order."""
    return context.random(l)


@register("magnitude", "weight magnitude: Han et al., 2015; whole neurons: Li et al., 2017")
def magnitude(context: Context, l: int) -> Tensor:
    """|w| |r|: the norms of fc2's column and of fc1's row (both rows where there is a gate)."""
    return context.weight(l).norm(dim=0) * context.row_norms(l).norm(dim=0)


@register("activation", "mean absolute activation: Hu et al. (network trimming), 2016", "moments")
def activation(context: Context, l: int) -> Tensor:
    """E |h|."""
    return context.moments(l).mean_absolute


@register("variance", "activation variance, VBP: Berisha et al., ICCV workshops 2025", "moments")
def variance(context: Context, l: int) -> Tensor:
    """Var h."""
    return context.moments(l).variance


@register("variance-weight", "variance of each neuron's contribution to the output", "moments")
def variance_weight(context: Context, l: int) -> Tensor:
    """Var h x |w|^2, w the unit's column of fc2: the output variance it carries alone."""
    h = context.moments(l)
    return h.variance * context.weight(l).to(h.mean).square().sum(0)


@register("wanda", "weights and activations: Sun et al. (Wanda), ICLR 2024", "moments")
def wanda(context: Context, l: int) -> Tensor:
    """|h|_2 x |w|_1: Wanda's score of every weight, summed over the unit's column."""
    h = context.moments(l)
    return h.second.clamp_min(0).sqrt() * context.weight(l).to(h.mean).abs().sum(0)


@register("taylor", "first-order Taylor on gates: Molchanov et al., CVPR 2019", "gates")
def taylor(context: Context, l: int) -> Tensor:
    """E |dL / d gate| over images."""
    return context.statistics.taylor(l)


@register("fisher", "Fisher information of gates: Theis et al., 2018", "gates")
def fisher(context: Context, l: int) -> Tensor:
    """E (dL / d gate)^2 over images."""
    return context.statistics.fisher(l)


@register("path-votes", "class paths that hold a neuron: Neuron Path, ICLR 2025", paths=True)
def path_votes(context: Context, l: int) -> Tensor:
    """Votes of the class paths, weighted by rank."""
    return context.votes(l)


@register("path-attribution", "summed path scores: Neuron Path, ICLR 2025", paths=True)
def path_attribution(context: Context, l: int) -> Tensor:
    """Summed joint attribution score of the paths through each unit."""
    return context.attribution(l)


@register("obs", "greedy elimination: Hassibi and Stork, 1993; ZipLM, NeurIPS 2023", "moments")
def obs(context: Context, l: int) -> Tensor:
    """Order of greedy elimination by the reconstruction error after refit."""
    return context.eliminate(l)


@register(
    "curvature-obs",
    "greedy elimination in units of the loss: OBS with K-FAC's output factor, 2015",
    "moments",
    "curvature",
)
def curvature_obs(context: Context, l: int) -> Tensor:
    """The same, errors weighted by the loss's curvature at the block's output."""
    return context.eliminate(l, context.statistics.curvature(l))

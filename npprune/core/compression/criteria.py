"""The criteria: which neurons of a block stay first. One registry, one signature.

A criterion maps a `Context` to one score per neuron and block ([h], float64, higher = keep).
`needs` names the statistics it reads, so that one pass collects just those. Protected neurons and
a prior may be combined with any of them (`score`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from npprune.core.compression.elimination import SHRINKAGE, Elimination, eliminate
from npprune.core.compression.statistics import Moments, Need, Statistics
from npprune.errors import UsageError

DAMPING = 0.1
"""Identity added to the curvature, over its mean diagonal, in `curvature-obs`."""


@dataclass
class Context:
    """What criteria may read.

    Args:
        second: fc2 of each block (weight [d, h]).
        first: fc1 of each block where there is a plain one (weight [h or 2h, d]); `magnitude`.
        statistics: one pass' sums, with what the criterion needs.
        votes: per block [h], how many class paths hold each neuron, weighted by rank.
        attribution: per block [h], the summed path score of each neuron.
        protected: per block, neurons that the elimination must never take.
        prior: per block [h], factors on the elimination's costs (see `path_prior`).
        salience: share of the loss-gradient token weighting (see `Statistics.moments`); only 0
            can do without the need "salience".
        shrinkage, damping: of the eliminations (see `eliminate`).
        generator: for `random`.
    """

    second: Sequence[nn.Linear]
    first: Sequence[nn.Linear] | None = None
    statistics: Statistics | None = None
    votes: Sequence[Tensor] | None = None
    attribution: Sequence[Tensor] | None = None
    protected: Sequence[Sequence[int]] | None = None
    prior: Sequence[Tensor] | None = None
    salience: float = 0.0
    shrinkage: float = SHRINKAGE
    damping: float = DAMPING
    generator: torch.Generator | None = None
    eliminations: dict[int, Elimination] = field(default_factory=dict)  # filled by obs criteria

    def moments(self, l: int) -> Moments:
        """Moments of block l under the context's token weighting."""
        return self.stats.moments(l, self.salience)

    @property
    def stats(self) -> Statistics:
        """The statistics, which must be there."""
        if self.statistics is None:
            raise UsageError("this criterion reads calibration statistics, and none were given")
        return self.statistics

    def weight(self, l: int) -> Tensor:
        """fc2.weight of block l in float64 [d, h]."""
        return self.second[l].weight.detach().to(torch.float64)


@dataclass(frozen=True)
class Criterion:
    """One way to rank neurons: a function of (context, block), what it reads, where it is from."""

    name: str
    function: Callable[[Context, int], Tensor]
    needs: tuple[Need, ...]
    source: str
    paths: bool = False  # reads a run's paths


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, source: str, *needs: Need, paths: bool = False
) -> Callable[[Callable[[Context, int], Tensor]], Callable[[Context, int], Tensor]]:
    """Register a criterion under `name`."""

    def register(function: Callable[[Context, int], Tensor]) -> Callable[[Context, int], Tensor]:
        CRITERIA[name] = Criterion(name, function, needs, source, paths)
        return function

    return register


def score(name: str, context: Context, blocks: Sequence[int] | None = None) -> list[Tensor]:
    """Scores of every block (or of `blocks`): a list of [h] float64, on the CPU, higher = keep.

    For every criterion but the eliminations, which do it exactly, a prior multiplies the scores
    and protected neurons are lifted above all others.

    Raises:
        UsageError: an unknown criterion, or one whose statistics or paths are missing.
    """
    if name not in CRITERIA:
        raise UsageError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {name!r}",
            hint="see npprune.core.compression.criteria for what each one is",
        )
    out = []
    for l in range(len(context.second)) if blocks is None else blocks:
        s = CRITERIA[name].function(context, l).detach().to("cpu", torch.float64)
        if l not in context.eliminations:
            if context.prior is not None:
                s = (s - s.min()) * context.prior[l].to(s)
            if context.protected is not None and len(context.protected[l]):
                s[list(context.protected[l])] += s.max() - s.min() + 1
        out.append(s)
    return out


def path_prior(votes: Sequence[Tensor], weight: float) -> list[Tensor]:
    """Factors 1 + weight x (a neuron's votes over the block's most), for `Context.prior`."""
    if weight < 0:
        raise UsageError(f"the weight of a prior must be >= 0, got {weight}")
    return [1 + weight * v.to(torch.float64) / max(float(v.max()), 1.0) for v in votes]


@criterion("random", "chance; the baseline")
def random(context: Context, l: int) -> Tensor:
    """A random order."""
    if context.generator is None:
        raise UsageError("criterion 'random' needs a generator")
    return torch.rand(context.weight(l).shape[1], generator=context.generator, dtype=torch.float64)


@criterion("magnitude", "weight magnitude: Han et al., 2015; whole neurons: Li et al., 2017")
def magnitude(context: Context, l: int) -> Tensor:
    """Product of the norms of fc1's row(s) and fc2's column."""
    norm = context.weight(l).norm(dim=0)
    if context.first is None:
        return norm
    rows = context.first[l].weight.detach().to(torch.float64).norm(dim=1)
    return norm * rows.reshape(-1, len(norm)).norm(dim=0)  # two rows where the MLP is gated


@criterion("activation", "mean absolute activation: Hu et al. (network trimming), 2016", "moments")
def activation(context: Context, l: int) -> Tensor:
    """E|h|."""
    return context.moments(l).mean_absolute


@criterion("variance", "activation variance, VBP: Berisha et al., ICCV workshops 2025", "moments")
def variance(context: Context, l: int) -> Tensor:
    """Var h."""
    return context.moments(l).variance


@criterion("variance-weight", "variance of each neuron's contribution to the output", "moments")
def variance_weight(context: Context, l: int) -> Tensor:
    """Var h x |w|^2, w the neuron's column of fc2: the output variance it carries alone."""
    return context.moments(l).variance * context.weight(l).to(context.moments(l).mean).square().sum(
        0
    )


@criterion("wanda", "weights and activations: Sun et al. (Wanda), ICLR 2024", "moments")
def wanda(context: Context, l: int) -> Tensor:
    """|h|_2 x |w|_1: Wanda's score of every weight, summed over the neuron's column."""
    moments = context.moments(l)
    return moments.second.clamp_min(0).sqrt() * context.weight(l).to(moments.mean).abs().sum(0)


@criterion("taylor", "first-order Taylor on gates: Molchanov et al., CVPR 2019", "gates")
def taylor(context: Context, l: int) -> Tensor:
    """E|dL / d gate| over images."""
    return context.stats.taylor(l)


@criterion("fisher", "Fisher information of gates: Theis et al., 2018", "gates")
def fisher(context: Context, l: int) -> Tensor:
    """E (dL / d gate)^2 over images."""
    return context.stats.fisher(l)


@criterion("path-votes", "class paths that hold a neuron: Neuron Path, ICLR 2025", paths=True)
def path_votes(context: Context, l: int) -> Tensor:
    """Votes of the class paths, weighted by rank."""
    if context.votes is None:
        raise UsageError("criterion 'path-votes' needs a run with paths, and none were given")
    return context.votes[l]


@criterion("path-attribution", "summed path scores: Neuron Path, ICLR 2025", paths=True)
def path_attribution(context: Context, l: int) -> Tensor:
    """Summed joint attribution score of the paths through each neuron."""
    if context.attribution is None:
        raise UsageError("criterion 'path-attribution' needs a run with paths, and none were given")
    return context.attribution[l]


@criterion("obs", "greedy elimination: Hassibi and Stork, 1993; ZipLM, NeurIPS 2023", "moments")
def obs(context: Context, l: int) -> Tensor:
    """Order of greedy elimination by the reconstruction error after refit."""
    return _eliminated(context, l, None)


@criterion(
    "curvature-obs",
    "greedy elimination in units of the loss: OBS with K-FAC's output factor, 2015",
    "moments",
    "curvature",
)
def curvature_obs(context: Context, l: int) -> Tensor:
    """The same, errors weighted by the loss's curvature at the block's output."""
    return _eliminated(context, l, context.stats.curvature(l))


def _eliminated(context: Context, l: int, curvature: Tensor | None) -> Tensor:
    result = eliminate(
        context.moments(l).covariance,
        context.weight(l),
        curvature,
        shrinkage=context.shrinkage,
        damping=context.damping,
        protected=() if context.protected is None else context.protected[l],
        prior=None if context.prior is None else context.prior[l],
    )
    context.eliminations[l] = result
    return result.scores()

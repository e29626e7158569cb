"""Scores of hidden units by a criterion of `npprune.criteria`, and what criteria read.

Protected units and a prior may be combined with any criterion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.compression.elimination import SHRINKAGE, eliminate
from npprune.core.compression.statistics import Moments, Statistics
from npprune.criteria import CRITERIA
from npprune.errors import UsageError
from npprune.words import check_word

DAMPING = 0.1
"""Identity added to the curvature, over its mean diagonal, in the elimination."""


@dataclass
class Context:
    """What criteria may read (see `npprune.criteria.Context`).

    Args:
        second: fc2 of each block (weight [d, h]).
        first: the layers before the hidden units, per block (see `VitView.first`).
        sums: one pass' statistics, with what the criterion needs.
        path_votes: per block [h], how many class paths hold each unit, weighted by rank.
        path_scores: per block [h], the summed path score of each unit.
        protected: per block, units that the elimination must never take.
        prior: per block [h], positive factors: above 1 goes later.
        salience: share of the loss-gradient token weighting (see `Statistics.moments`); only 0
            can do without the need "salience".
        generator: of `random`.
        shrinkage: of the elimination's covariance (see `eliminate`).
    """

    second: Sequence[nn.Linear]
    first: Sequence[Sequence[nn.Linear]] | None = None
    sums: Statistics | None = None
    path_votes: Sequence[Tensor] | None = None
    path_scores: Sequence[Tensor] | None = None
    protected: Sequence[Sequence[int]] | None = None
    prior: Sequence[Tensor] | None = None
    salience: float = 0.0
    generator: torch.Generator | None = None
    shrinkage: float = SHRINKAGE
    eliminated: set[int] = field(default_factory=set)  # blocks whose order is an elimination's

    def weight(self, l: int) -> Tensor:
        """fc2.weight of block l in float64 [d, h]."""
        return self.second[l].weight.detach().to(torch.float64)

    def row_norms(self, l: int) -> Tensor:
        """Norms of fc1's rows, [1, h] or [2, h]."""
        if self.first is None:
            raise UsageError("this criterion reads the layers before the hidden units: none given")
        weights = [layer.weight.detach().to(torch.float64) for layer in self.first[l]]
        norms = torch.cat([w.norm(dim=1) for w in weights])
        return norms.reshape(-1, self.second[l].in_features)

    def moments(self, l: int) -> Moments:
        """Moments of block l under the context's token weighting."""
        return self.statistics.moments(l, self.salience)

    @property
    def statistics(self) -> Statistics:
        """The statistics, which must be there."""
        if self.sums is None:
            raise UsageError("this criterion reads calibration statistics, and none were given")
        return self.sums

    def votes(self, l: int) -> Tensor:
        """Votes of the class paths [h]."""
        return _of_paths(self.path_votes)[l]

    def attribution(self, l: int) -> Tensor:
        """Summed scores of the paths [h]."""
        return _of_paths(self.path_scores)[l]

    def random(self, l: int) -> Tensor:
        """Uniform numbers [h]."""
        if self.generator is None:
            raise UsageError("this criterion draws at random and needs a generator")
        h = self.second[l].in_features
        return torch.rand(h, generator=self.generator, dtype=torch.float64)

    def eliminate(self, l: int, curvature: Tensor | None = None) -> Tensor:
        """Scores of the greedy elimination, which knows protection and prior itself."""
        self.eliminated.add(l)
        return eliminate(
            self.moments(l).covariance,
            self.weight(l),
            curvature,
            shrinkage=self.shrinkage,
            damping=DAMPING,
            protected=() if self.protected is None else self.protected[l],
            prior=None if self.prior is None else self.prior[l],
        ).scores()


def score(name: str, context: Context, blocks: Iterable[int] | None = None) -> list[Tensor]:
    """Scores of every block (or of some): a list of [h] float64, on the CPU, higher = keep.

    For every criterion but the eliminations, which do it exactly, a prior multiplies the scores
    and protected units are lifted above all others.

    Raises:
        UsageError: an unknown criterion, one whose statistics or paths are missing, or one that
            gives no score for some unit.
    """
    check_word("criterion", name, CRITERIA)
    out = []
    for l in range(len(context.second)) if blocks is None else blocks:
        s = _checked(CRITERIA[name].function(context, l), name, l, context.second[l].in_features)
        if l not in context.eliminated:
            if context.prior is not None:
                s = (s - s.min()) * context.prior[l].to(s)
            if context.protected is not None and len(context.protected[l]):
                s[list(context.protected[l])] += s.max() - s.min() + 1
        out.append(s)
    return out


def _checked(found: Any, name: str, l: int, hidden: int) -> Tensor:
    """A criterion's scores of block l, as a copy [h] on the CPU."""
    if isinstance(found, Tensor) and found.shape == (hidden,) and not bool(found.isnan().any()):
        return found.detach().to("cpu", torch.float64, copy=True)
    got = type(found).__name__
    if isinstance(found, Tensor):
        got = "NaN" if found.shape == (hidden,) else f"a tensor of {list(found.shape)}"
    raise UsageError(
        f"criterion `{name}` must give a score for each of the {hidden} hidden units of block {l}, "
        f"got {got}",
        hint="a tensor [h] of numbers, higher stays",
    )


def _of_paths(found: Sequence[Tensor] | None) -> Sequence[Tensor]:
    if found is None:
        raise UsageError("this criterion needs a run with paths, and none were given")
    return found

"""Hidden units of the MLPs: which go first, what their going does, what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from npprune.core.compression.cost import Price, Sizes, neuron_price
from npprune.core.compression.harm import candidates_for, measure_harm
from npprune.core.compression.selection import Ranking, nearest
from npprune.core.compression.statistics import Moments, Statistics
from npprune.core.view import VitView
from npprune.pipeline.common.processes import ALONE, Processes
from npprune.pipeline.prune.axes import Tell

HARM_STEPS = 8  # widths measured in a block: multiples of an eighth


@dataclass(frozen=True)
class HiddenUnits:
    """Every block's hidden units; options are the widths of `ranking`.

    `salience`: share of the token weighting by the squared loss gradient.
    """

    view: VitView
    statistics: Statistics
    ranking: Ranking
    salience: float

    def moments(self, l: int) -> Moments:
        """Mean and covariance of block l's hidden units."""
        return self.statistics.moments(l, self.salience)

    def harm(
        self, images: Sequence[Tensor], tell: Tell, team: Processes = ALONE
    ) -> list[dict[int, float]]:
        """Nats of a few widths of each block, refitted by least squares, that block alone."""
        options = self.ranking.widths
        if all(len(row) == 1 for row in options):
            return [{h: 0.0} for h in self.view.widths]
        grid = []
        for h, allowed in zip(self.view.widths, options, strict=True):
            steps = {nearest(allowed, h * i / HARM_STEPS) for i in range(1, HARM_STEPS)}
            grid.append(sorted(steps))

        def measure(rows: list[list[int]]) -> list[dict[int, float]]:
            candidates = candidates_for(
                self.view, self.moments, self.ranking.scores, rows,
                protected=self.ranking.protected,
            )  # fmt: skip
            return measure_harm(self.view, images, candidates, on_block=tell)

        table = team.shared_out(grid, measure)
        for h, row in zip(self.view.widths, table, strict=True):
            row.setdefault(h, 0.0)
        return table

    def prices(self, l: int, sizes: Sizes, unit: Price) -> dict[int, float]:
        """What block l's widths cost in a network of these sizes."""
        each = float(neuron_price(sizes, l, unit))
        return {w: each * w for w in self.ranking.widths[l]}

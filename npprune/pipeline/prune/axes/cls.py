"""Hidden units of the class token's own: which ones, what they are worth, what they cost.

In every block the tokens that the classifier reads may leave the units that all tokens share and
have some to themselves, all of a block's units at most; the patches then keep what serves patches.
Each side is ranked, measured and refitted on its own tokens. There is one class token an image, so
its layers are shrunk towards the dense ones far more than the patches' are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from npprune.core.compression.cost import Price, Sizes, neuron_price, own_price
from npprune.core.compression.elimination import SHRINKAGE
from npprune.core.compression.harm import (
    Replacement,
    candidates_for,
    least_squares,
    measure_harm,
)
from npprune.core.compression.selection import Split, Table, nearest
from npprune.core.compression.statistics import Statistics
from npprune.pipeline.common.processes import ALONE, Processes
from npprune.pipeline.prune.axes import Tell
from npprune.pipeline.prune.axes.hidden import HiddenUnits

WORD = "cls"
OWN_SHRINKAGE = 0.1
"""lambda over the mean variance, of the class token's units."""
OWN_SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
"""Tried on held-out images, where there are some, in the refit."""
REST_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
OWN_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Of a block's units: what is measured of the patches', and of the class token's."""


@dataclass(frozen=True)
class OwnUnits:
    """Both sides of every block, each as the hidden units of its tokens alone.

    `tokens`: how many are read. `blocks`: where units may be split; not in a last block that
    computes only what is read, whose units are the class token's anyway.
    """

    rest: HiddenUnits
    own: HiddenUnits
    tokens: int
    blocks: range

    @classmethod
    def measured(
        cls,
        shared: HiddenUnits,
        score: Callable[[Statistics, float], list[Tensor]],
        *,
        last_for_read: bool,
    ) -> OwnUnits:
        """What the calibration images say of each side.

        Args:
            shared: the units as all tokens share them; their path neurons are protected among
                the class token's.
            score: scores of all blocks from the statistics of a side, and a shrinkage.
        """
        view = shared.view
        assert view.tokens_read is not None
        rest, own = shared.statistics.side("others"), shared.statistics.side("read")
        of_rest = replace(shared.ranking, scores=score(rest, SHRINKAGE), protected=None)
        of_own = replace(shared.ranking, scores=score(own, OWN_SHRINKAGE))
        return cls(
            replace(shared, statistics=rest, ranking=of_rest),
            replace(shared, statistics=own, ranking=of_own),
            view.tokens_read,
            range(len(view.widths) - last_for_read),
        )

    def harm(
        self, images: Sequence[Tensor], tell: Tell, team: Processes = ALONE
    ) -> tuple[Table, Table]:
        """Nats per block and width of the patches' units and of the class token's, that side of
        that block alone changed."""
        rest = self._harm(self.rest, REST_SHARES, SHRINKAGE, images, tell, team)
        return rest, self._harm(self.own, OWN_SHARES, OWN_SHRINKAGE, images, tell, team)

    def _harm(
        self,
        side: HiddenUnits,
        shares: Sequence[float],
        shrinkage: float,
        images: Sequence[Tensor],
        tell: Tell,
        team: Processes,
    ) -> Table:
        view, ranking = side.view, side.ranking
        grid = [
            sorted({nearest(allowed, h * s) for s in shares} - {h}) if l in self.blocks else []
            for l, (h, allowed) in enumerate(zip(view.widths, ranking.widths, strict=True))
        ]

        def measure(rows: list[list[int]]) -> list[dict[int, float]]:
            made = candidates_for(view, side.moments, ranking.scores, rows, shrinkage=shrinkage)
            candidates = (
                {
                    w: {fc2: self._beside(fc2, r, side)}
                    for w, row in found.items()
                    for fc2, r in row.items()
                    if isinstance(fc2, nn.Linear) and isinstance(r, Replacement)
                }
                for found in made
            )
            return measure_harm(view, images, candidates, on_block=tell)

        table = team.shared_out(grid, measure)
        for h, measured in zip(view.widths, table, strict=True):
            measured.setdefault(h, 0.0)
        return table

    def _beside(self, fc2: nn.Linear, smaller: Replacement, side: HiddenUnits) -> Replacement:
        """One side's smaller second layer, the other side's as it is."""
        bias = fc2.weight.new_zeros(fc2.out_features) if fc2.bias is None else fc2.bias
        dense = Replacement(range(fc2.in_features), fc2.weight, bias)
        rest, own = (smaller, dense) if side is self.rest else (dense, smaller)
        return replace(rest, first=(self.tokens, own))

    def least_squares(self, l: int, keep: Sequence[int], own: Sequence[int]) -> Replacement:
        """Block l's second layers of both sides, each refitted by itself."""
        fc2 = self.rest.view.fc2(l)
        rest = least_squares(fc2, self.rest.moments(l), keep)
        theirs = least_squares(fc2, self.own.moments(l), own, OWN_SHRINKAGE)
        return replace(rest, first=(self.tokens, theirs))

    def split(self, harm: tuple[Table, Table], sizes: Sizes, unit: Price) -> Split:
        """What a budget may choose from in a network of these sizes."""
        blocks = range(len(sizes.hidden))
        alone = replace(sizes, own_tokens=self.tokens)
        beside = replace(alone, own=(1,) * len(blocks))  # fewer tokens go through the shared units
        widths = self.own.ranking.widths
        prices = [{c: float(own_price(alone, l, unit, c)) for c in widths[l]} for l in blocks]
        return Split(
            self.rest.ranking, self.own.ranking, widths, harm,
            ([float(neuron_price(beside, l, unit)) for l in blocks], prices), self.blocks,
        )  # fmt: skip

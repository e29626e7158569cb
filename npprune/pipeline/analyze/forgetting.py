"""Forgetting: a class's path edited for all images, and what that class and all others lose.

If a path carries its class, removing it costs that class and spares the others (necessity), and
keeping it alone serves that class and not the others (sufficiency). Every image is seen with its
own class's neurons edited, and with those of a few other classes in turn, so that each class has
about `OTHERS` times as many images of others as of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npprune.core import metrics
from npprune.core.attribution.editing import Factors, edited_logits, stack
from npprune.core.view import VitView
from npprune.pipeline.analyze.editing_tables import EDITS, TOKENS, Cell
from npprune.recipe.sections import EditSection
from npprune.records import Analysis, Mean

OTHERS = 5
COLUMNS = (
    "class before %", "after %", "others before %", "after %",
    "class loses", "from", "to", "others lose", "from", "to", "difference", "from", "to",
)  # fmt: skip


@dataclass
class Forgetting:
    """Hits before and after the edit, by class whose neurons are edited: [own images, others']."""

    classes: Sequence[int]
    before: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    after: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    seen: int = 0

    def pairs(self, labels: Sequence[int]) -> list[tuple[int, int]]:
        """(image of the batch, class whose neurons are edited): its own and some others in turn."""
        rank = {c: i for i, c in enumerate(self.classes)}
        out = []
        for i, label in enumerate(labels):
            others = [c for c in self.classes if c != label]
            start = (self.seen * OTHERS + rank[label]) % max(1, len(others))
            turn = [others[(start + j) % len(others)] for j in range(min(OTHERS, len(others)))]
            out += [(i, c) for c in (label, *turn)]
            self.seen += 1
        return out

    def add(
        self, pairs: Iterable[tuple[int, int]], labels: Tensor, base: Tensor, edited: Tensor
    ) -> None:
        """The predictions of a batch [b], and those of its pairs, edited."""
        for (i, c), got in zip(pairs, edited.tolist(), strict=True):
            label = int(labels[i])
            for hits, one in ((self.before, int(base[i])), (self.after, got)):
                hits.setdefault(c, ([], []))[label != c].append(float(one == label))

    def numbers(self) -> tuple[list[float], list[Mean]]:
        """Mean over classes of the four accuracies; and intervals, over classes, of what the class
        loses, what the others lose, and the difference."""
        rows = []
        for c, before in self.before.items():
            if all(before):
                rows.append([_mean(h) for h in (*before, *self.after[c])])
        table = torch.tensor(rows, dtype=torch.float64)  # own, others before; own, others after
        own, others = table[:, 0] - table[:, 2], table[:, 1] - table[:, 3]
        means = table.mean(0)[[0, 2, 1, 3]].tolist()
        return means, [metrics.mean_interval(x) for x in (own, others, own - others)]


def measure_forgetting(
    view: VitView,
    batches: Iterable[tuple[Tensor, Tensor]],
    cells: Sequence[Cell],
    factors: Callable[[Cell, int], Factors],
    classes: Sequence[int],
    tell: Callable[[int], None],
) -> dict[Cell, Forgetting]:
    """What each class and the others lose by every way to edit.

    Args:
        batches: images on the network's device, and their labels.
        factors: of a way to edit and a class.
        tell: called with the number of images done.
    """
    found = {cell: Forgetting(classes) for cell in cells}
    for x, labels in batches:
        with torch.no_grad():
            base = view.model(x).float().cpu().argmax(1)
        for cell, total in found.items():
            pairs = total.pairs(labels.tolist())
            guess = []
            for part in (pairs[i : i + len(x)] for i in range(0, len(pairs), len(x))):
                rows = stack([factors(cell, c) for _, c in part])
                images = x[[i for i, _ in part]]
                out = edited_logits(view, images, rows, scope=cell.scope, depth=cell.depth)
                guess.append(out.float().cpu().argmax(1))
            total.add(pairs, labels, base, torch.cat(guess))
        tell(next(iter(found.values())).seen)
    return found


def forgetting_analysis(
    found: dict[Cell, Forgetting], settings: EditSection, images: str
) -> Analysis:
    """The table, one row per way to edit, and what to read in it."""
    rows: list[list[str | int | float | None]] = []
    for cell, total in found.items():
        means, losses = total.numbers()
        row: list[str | int | float | None] = [cell.method, cell.topk, TOKENS[cell.scope]]
        row += [100 * m for m in means]
        for loss in losses:
            row += [100 * loss.value, 100 * loss.low, 100 * loss.high]
        rows.append(row)
    classes = len(next(iter(found.values())).before)
    reading = "above 0, the class needs these neurons more than others do"
    if settings.edit == "keep":
        reading = "below 0, these neurons serve the class more than others"
    what = EDITS[settings.edit].format(factor=settings.factor)
    return Analysis(
        title="Forgetting a class: its neurons edited for all images",
        text=f"{what[0].upper()}{what[1:]}, those of one class at a time; "
        f"top-1 of that class's images and of {OTHERS} times as many of other classes, mean over "
        f"{classes} classes, 95 % intervals over classes. The difference is how much more the "
        f"class loses than the others do: {reading}. {images}",
        columns=["paths by", "K", "tokens", *COLUMNS],
        rows=rows,
    )


def _mean(hits: list[float]) -> float:
    return sum(hits) / len(hits)

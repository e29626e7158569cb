"""What the editing experiments found, as a table and a figure with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from npprune.core import metrics
from npprune.core.compression import cost
from npprune.core.view import Scope
from npprune.recipe.sections import EditSection
from npprune.records import Analysis, FigureData, Mean, Rate, Series
from npprune.report import five_numbers

Value = str | int | float | None

EDITS = {
    "remove": "the path's neurons are set to 0",
    "enhance": "the path's neurons are multiplied by {factor:g}",
    "keep": "all neurons but the path's are set to 0 (p: a random share of them)",
}
CHOICES = {
    "image": "an image's own path, found with its true label",
    "class": "the neurons that the paths of its true class hold most often: the label is used",
    "predicted": "the same for the class that the un-edited network predicts, among those with "
    "paths: no label is used",
    "union": "the neurons of all classes together, the same for every image: no label is used",
}
TOKENS = {"cls": "class token", "patch": "patch tokens", "all": "all tokens"}


class Cell(NamedTuple):
    """One way to edit."""

    method: str
    paths: str
    topk: int
    fraction: float
    depth: int
    scope: Scope


@dataclass
class Measured:
    """n images: [n, 2] holds the true class's probability and whether it was predicted."""

    labels: Tensor
    base: Tensor
    cells: dict[Cell, Tensor]
    kept: dict[Cell, list[list[int]]]  # per class and block, neurons of the path
    outside: int  # images whose prediction has no paths
    sizes: cost.Sizes | None = None

    @property
    def images(self) -> int:
        """How many were evaluated on."""
        return len(self.labels)


def analysis(measured: Measured, settings: EditSection, images: str) -> Analysis:
    """The table, one row a cell below the un-edited network's, and its figure."""
    cells = list(measured.cells)
    varying = [i for i in range(len(Cell._fields)) if len({c[i] for c in cells}) > 1]
    if 0 not in varying:
        varying.insert(0, 0)
    costs = settings.edit == "keep" and any(_whole(c, measured) for c in cells)
    numbers = ["kept" if settings.edit == "keep" else "edited", *_COLUMNS]
    numbers += ["parameters %", "MACs %"] if costs else []
    rows = [_baseline(measured, len(varying), costs)]
    rows += [_row(measured, cell, varying, costs) for cell in cells]
    return Analysis(
        title=_title(settings),
        text=_text(measured, settings, images, costs),
        columns=[*(_AXES[i] for i in varying), *numbers],
        rows=rows,
        figure=_bars(measured) if settings.edit == "keep" else _boxes(measured),
    )


_AXES = ("paths by", "neurons of", "K", "p %", "blocks", "tokens")
_COLUMNS = (
    "top-1 %", "from", "to",
    "accuracy dev. %", "from", "to",
    "probability dev. %", "from", "to",
    "its median %", "by class %",
    "change in points", "from", "to",
)  # fmt: skip


def _title(settings: EditSection) -> str:
    what = {
        "remove": "Removing the path's neurons",
        "enhance": f"Enhancing the path's neurons ({settings.factor:g} x)",
        "keep": "Keeping only the path's neurons",
    }[settings.edit]
    return f"{what}: by {', '.join(dict.fromkeys(settings.paths))}"


def _text(measured: Measured, settings: EditSection, images: str, costs: bool) -> str:
    one = next(iter(measured.cells))
    fixed = [
        f"K = {one.topk}" if len({c.topk for c in measured.cells}) == 1 else "",
        TOKENS[one.scope] if len({c.scope for c in measured.cells}) == 1 else "",
        f"first {one.depth} blocks" if len({c.depth for c in measured.cells}) == 1 else "",
    ]
    if settings.edit == "keep" and len({c.fraction for c in measured.cells}) == 1:
        fixed.append(f"p = {100 * one.fraction:g} %")
    parts = [
        f"Edit: {EDITS[settings.edit].format(factor=settings.factor)}; later blocks compute anew "
        f"({', '.join(f for f in fixed if f)}).",
        *(f"Neurons of `{p}`: {CHOICES[p]}." for p in dict.fromkeys(settings.paths)),
        images,
        "Deviations are relative to the un-edited network on the same images: of top-1 over all, "
        "and of the true class's probability per image (mean, median, mean of the classes' means); "
        "intervals are 95 %, paired. Kept or edited: the path's neurons per block.",
    ]
    if "predicted" in settings.paths and measured.outside:
        parts.append(
            f"The un-edited network predicts a class without paths for {measured.outside} of "
            f"{measured.images} images; those take the likeliest class that has some."
        )
    if settings.edit == "keep" and settings.seeds > 1:
        parts.append(f"Shares below 100 % are means of {settings.seeds} draws.")
    if costs:
        parts.append(
            "At all tokens, setting neurons to 0 and removing them for real give the same logits; "
            "parameters and MACs are those of the network that is left: the mean over classes "
            "(one network each), or the one network of the union. Nothing is compensated."
        )
    return " ".join(parts)


# ---------------------------------------------------------------- rows


def _row(measured: Measured, cell: Cell, varying: Sequence[int], costs: bool) -> list[Value]:
    edited, base = measured.cells[cell], measured.base
    shown: tuple[Value, ...] = (
        cell.method, cell.paths, cell.topk, 100 * cell.fraction, cell.depth, TOKENS[cell.scope],
    )  # fmt: skip
    top1 = metrics.mean_interval(edited[:, 1])
    rate = top1 if not _whole_draws(edited) else _as_mean(_rate(edited))
    deviation = metrics.probability_deviation(base[:, 0], edited[:, 0])
    row: list[Value] = [shown[i] for i in varying]
    row += [_kept(measured, cell)]
    row += _percent(rate)
    row += _percent(relative_change(base[:, 1], edited[:, 1]))
    row += _percent(metrics.mean_interval(deviation))
    by_class = metrics.deviation_by_class(base[:, 0], edited[:, 0], measured.labels)
    row += [100 * float(deviation.median()), 100 * by_class.value]
    row += _percent(metrics.mean_interval(edited[:, 1] - base[:, 1]))
    return row + (_shares(measured, cell) if costs else [])


def _baseline(measured: Measured, texts: int, costs: bool) -> list[Value]:
    rate = _rate(measured.base)
    row: list[Value] = ["un-edited", *[None] * (texts - 1), None]
    row += [*_percent(_as_mean(rate)), 0.0, None, None, 0.0, None, None, 0.0, 0.0, 0.0, None, None]
    return row + ([100.0, 100.0] if costs else [])


def _percent(mean: Mean | None) -> list[Value]:
    return [None] * 3 if mean is None else [100 * mean.value, 100 * mean.low, 100 * mean.high]


def _rate(values: Tensor) -> Rate:
    return metrics.wilson(round(float(values[:, 1].sum())), len(values))


def _whole_draws(values: Tensor) -> bool:
    """Whether every image was either right or wrong: no mean of several draws."""
    return bool(((values[:, 1] == 0) | (values[:, 1] == 1)).all())


def _as_mean(rate: Rate) -> Mean:
    return Mean(rate.value, 0.0, rate.low, rate.high, rate.total)


def relative_change(before: Tensor, after: Tensor) -> Mean | None:
    """mean(after) / mean(before) - 1 over the same images, with its 95 % interval.

    The interval is the ratio's by linearisation (delta method): that of the mean of
    (after - (1 + r) before) / mean(before). None where nothing was right before.
    """
    if float(before.sum()) == 0:
        return None
    ratio = float(after.mean() / before.mean())
    spread = metrics.mean_interval((after - ratio * before) / before.mean())
    shift = ratio - 1
    return replace(
        spread, value=shift, low=shift + spread.low - spread.value,
        high=shift + spread.high - spread.value,
    )  # fmt: skip


def _kept(measured: Measured, cell: Cell) -> Value:
    """Neurons in the path per block, the mean over blocks and classes."""
    if cell.paths == "image":
        return cell.topk
    counts = torch.tensor(measured.kept[cell], dtype=torch.float64)
    return float(counts.mean())


def _whole(cell: Cell, measured: Measured) -> bool:
    """Whether the cell's edit is removal for real of everything else."""
    blocks = len(next(iter(measured.kept.values()), [[]])[0])
    everything = cell.scope == "all" and cell.fraction == 1 and cell.depth == blocks
    return everything and cell.paths != "image" and measured.sizes is not None


def _shares(measured: Measured, cell: Cell) -> list[Value]:
    if not _whole(cell, measured):
        return [None, None]
    sizes = measured.sizes
    assert sizes is not None
    each = [sizes.with_hidden(hidden) for hidden in measured.kept[cell]]
    return [
        100 * sum(price(s) for s in each) / len(each) / price(sizes)
        for price in (cost.params, cost.macs)
    ]


# ---------------------------------------------------------------- figures


def _label(cell: Cell, axes: Sequence[int]) -> str:
    words = (
        cell.method, cell.paths, f"K = {cell.topk}", f"p = {100 * cell.fraction:g} %",
        f"{cell.depth} blocks", TOKENS[cell.scope],
    )  # fmt: skip
    return ", ".join(words[i] for i in axes)


def _layout(cells: Sequence[Cell], first: Sequence[int]) -> tuple[list[int], int]:
    """The axes that tell series apart, and the axis along x: the first of `first` that varies."""
    varying = [i for i in range(len(Cell._fields)) if len({c[i] for c in cells}) > 1]
    x = next((i for i in first if i in varying), first[0])
    return [i for i in varying if i != x], x


def _boxes(measured: Measured) -> FigureData:
    """The probability deviations of single images."""
    cells = list(measured.cells)
    series, x = _layout(cells, (2, 1, 0, 4, 5))
    figure = FigureData("box", x_label=_AXES[x], y_label="probability deviation in %")
    figure.x_names = [_label(c, [x]) for c in _along(cells, x)]
    figure.reference = {"un-edited": 0.0}
    for name, group in _groups(cells, series, x):
        deviations = [
            100 * metrics.probability_deviation(measured.base[:, 0], measured.cells[c][:, 0])
            for c in group
        ]
        figure.series.append(
            Series(
                name,
                y=[float(d.median()) for d in deviations],
                boxes=[five_numbers(d.tolist()) for d in deviations],
            )
        )
    return figure


def _bars(measured: Measured) -> FigureData:
    """Top-1 of every cell."""
    cells = list(measured.cells)
    series, x = _layout(cells, (2, 4, 3, 1, 0, 5))
    figure = FigureData("bars", x_label=_AXES[x], y_label="top-1 in %")
    figure.x_names = [_label(c, [x]) for c in _along(cells, x)]
    figure.reference = {"un-edited": 100 * _rate(measured.base).value}
    for name, group in _groups(cells, series, x):
        means = [metrics.mean_interval(measured.cells[c][:, 1]) for c in group]
        figure.series.append(
            Series(
                name,
                y=[100 * m.value for m in means],
                low=[100 * max(m.low, 0.0) for m in means],
                high=[100 * min(m.high, 1.0) for m in means],
            )
        )
    return figure


def _along(cells: Sequence[Cell], x: int) -> list[Cell]:
    """One cell for each value of an axis."""
    return list({c[x]: c for c in reversed(cells)}.values())[::-1]


def _groups(cells: Sequence[Cell], series: list[int], x: int) -> list[tuple[str, list[Cell]]]:
    """Cells by series, each in the order of the x axis."""
    order = [c[x] for c in _along(cells, x)]
    values = product(*(dict.fromkeys(c[i] for c in cells) for i in series))
    found = []
    for value in values:
        group = [c for c in cells if tuple(c[i] for i in series) == value]
        group.sort(key=lambda c: order.index(c[x]))
        found.append((_label(group[0], series) if series else group[0].method, group))
    return found

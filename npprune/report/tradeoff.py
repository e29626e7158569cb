"""Accuracy against cost: the dense network, the pruned ones, and every point of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from npprune.records import FigureData, ModelInfo, Rate, Result, Series
from npprune.report import drawing, text
from npprune.report.document import Figure, Table, cells

TITLE = "Accuracy against cost"


@dataclass
class Point:
    """A network in the picture: top-1 in % with its interval, and MACs per image."""

    label: str
    macs: float
    top1: float
    low: float
    high: float

    @classmethod
    def of(cls, label: str, model: ModelInfo, rate: Rate) -> Point:
        """A network that was measured."""
        return cls(label, model.macs, 100 * rate.value, 100 * rate.low, 100 * rate.high)


def studied(result: Result) -> list[Point]:
    """Every point of a run's study; none where it has no study."""
    analysis = result.analyses.get("study")
    figure = analysis.figure if analysis is not None else None
    if figure is None or figure.x_label != STUDY_COST:
        return []
    return [
        Point(text.clean(s.name), x / 100 * result.model.macs, y, low, high)
        for s in figure.series
        for x, y, low, high in zip(s.x or [], s.y, s.low or [], s.high or [], strict=False)
        if y is not None and low is not None and high is not None
    ]


STUDY_COST = "MACs in % of dense"


def figure(
    networks: Sequence[Point], studies: Sequence[tuple[str, Sequence[Point]]], caption: str = ""
) -> Figure:
    """The picture. studies: name and points of each, drawn in one colour."""
    groups = [(point.label, [point]) for point in networks]
    groups += [(name, list(points)) for name, points in studies if points]
    data = FigureData(
        "scatter",
        [
            Series(
                name,
                [p.top1 for p in points],
                [p.macs / 1e6 for p in points],
                [p.low for p in points],
                [p.high for p in points],
            )
            for name, points in groups
        ],
        x_label="MACs per image in millions",
        y_label="top-1 in %, with 95 % intervals",
        front=any(points for _, points in studies),
    )
    rows = [
        (p.label if len(points) == 1 else f"{name}: {p.label}", p)
        for name, points in groups
        for p in points
    ]
    table = Table(
        ["network", "MACs", "top-1"],
        [
            cells(
                name,
                text.macs(round(p.macs)),
                f"{text.fixed(p.top1)} % ({text.span(p.low, p.high, scale=1)})",
            )
            for name, p in rows
        ],
    )
    said = "Higher and further left is better."
    if data.front:
        said += (
            " Points on the stepped line are beaten by none that costs less; a chosen network far "
            "below it was chosen badly, or measured on other images."
        )
    said += " Where intervals overlap, the picture does not say which of two is better."
    return Figure(
        TITLE,
        f"{said} {caption}".strip(),
        partial(drawing.draw, data, TITLE, "cost-picture"),
        table,
    )

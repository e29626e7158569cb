"""Sections beside the standard ones: a table and a figure drawn from plain data.

Later stages put such sections into `Result.analyses`; `pareto`, `learning_curve` and
`five_numbers` make the common ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from npprune.errors import UsageError
from npprune.records import Analysis, FigureData, Series
from npprune.report import text
from npprune.report.document import Cell, Figure, Paragraph, Section, Table
from npprune.report.drawing import draw

QUANTILES = (5, 25, 50, 75, 95)
FRONT = (
    "Higher and further left is better; the points on the stepped line are beaten by none that "
    "costs less; points of one cost are drawn side by side. Where intervals overlap, the paired "
    "differences in the table say more."
)

Row = list[str | int | float | None]


def section(anchor: str, analysis: Analysis) -> Section:
    """One analysis as a part of the report."""
    out = Section(anchor, text.clean(analysis.title))
    if analysis.text:
        out.items.append(Paragraph(analysis.text))
    given = _table(analysis.columns, analysis.rows) if analysis.rows else None
    if analysis.figure:
        table = _figure_table(analysis.figure)
        alt = text.clean(analysis.title)
        said = FRONT if analysis.figure.front else ""
        out.items.append(Figure("", said, partial(draw, analysis.figure, alt, anchor), table))
    if given:
        out.items.append(given)
    return out


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Columns that hold a text anywhere at the left are words."""
    width = max([len(columns), *(len(r) for r in rows)])
    header = [*columns, *[""] * (width - len(columns))]
    full = [[*row, *[None] * (width - len(row))] for row in rows]
    words = 0
    while rows and words < width and any(isinstance(r[words], str) for r in rows if words < len(r)):
        words += 1
    header, body = folded(header, full)
    for row, given in zip(body, rows, strict=True):
        if len(given) < width:  # nothing there, not even a dash
            row[len(given) :] = [Cell("")] * (len(row) - len(given))
    return Table(header, body, text=max(words, 1))


def folded(
    columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> tuple[list[str], list[list[Cell]]]:
    """Columns `from` and `to` behind a value become the interval in its cell."""
    header: list[str] = []
    places: list[tuple[int, bool]] = []
    i = 0
    while i < len(columns):
        interval = list(columns[i + 1 : i + 3]) == ["from", "to"]
        header.append(columns[i])
        places.append((i, interval))
        i += 3 if interval else 1
    body = []
    for row in rows:
        cells = []
        for i, interval in places:
            detail = ""
            if interval and row[i + 1] is not None and row[i + 2] is not None:
                detail = f"{text.significant(row[i + 1])} to {text.significant(row[i + 2])}"
            cells.append(Cell(text.significant(row[i]), detail))
        body.append(cells)
    return header, body


def _figure_table(data: FigureData) -> Table:
    """The numbers that the figure shows."""
    if data.kind == "heatmap":
        columns = data.x_names or []
        return _table(["", *columns], [[n, *r] for n, r in _named_rows(data)])
    if data.kind == "strips":
        most = max((len(row) for row in data.matrix or []), default=0)
        named = [
            [name, *(f"{n}: {text.significant(v)}" for n, v in zip(cells, values, strict=False))]
            for (name, values), cells in zip(_named_rows(data), data.cells or [], strict=False)
        ]
        return _table(["", *(f"{i + 1}." for i in range(most))], named or [[""]])
    if data.kind == "box":
        rows: list[Sequence[Any]] = []
        for s in data.series:
            for i, box in enumerate(s.boxes or []):
                rows.append([s.name, _category(data, s, i), *box])
        return _table(["series", data.x_label, *(f"{q} %" for q in QUANTILES)], rows or [[""]])
    rows = []
    intervals = any(s.low and s.high for s in data.series)
    for s in data.series:
        for i, y in enumerate(s.y):
            row: list[Any] = [s.name, _category(data, s, i), y]
            if intervals:
                row += [s.low[i] if s.low else None, s.high[i] if s.high else None]
            rows.append(row)
    ends = ["95 % from", "to"] if intervals else []
    return _table(["series", data.x_label or "x", data.y_label or "y", *ends], rows or [[""]])


def _named_rows(data: FigureData) -> list[tuple[str, list[float | None]]]:
    matrix = data.matrix or []
    names = data.y_names or [str(i) for i in range(len(matrix))]
    return list(zip(names, matrix, strict=False))


def _category(data: FigureData, series: Series, i: int) -> Any:
    label = series.labels[i] if series.labels and i < len(series.labels) else ""
    if series.x is not None and i < len(series.x):
        value = text.significant(series.x[i])
        return f"{label}: {value}" if label else series.x[i]
    names = data.x_names or []
    return label or (names[i] if i < len(names) else i)


# ---------------------------------------------------------------- common ones


def pareto(
    title: str,
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    *,
    x_label: str,
    y_label: str = "top-1 in %",
    columns: Sequence[str] = (),
    rows: Sequence[Row] = (),
    dense: float | None = None,
    text: str = "",
) -> Analysis:
    """Accuracy against a cost: one series per setting, the points none beats are joined.

    points: series -> (cost, accuracy, low, high), accuracy and its interval in the same unit;
    dense: the dense network's accuracy, drawn as a line. Smaller cost and larger accuracy win.
    """
    series = []
    for name, each in points.items():
        ordered = sorted(each)
        series.append(
            Series(
                name,
                x=[p[0] for p in ordered],
                y=[p[1] for p in ordered],
                low=[p[2] for p in ordered],
                high=[p[3] for p in ordered],
            )
        )
    figure = FigureData(
        "scatter",
        series,
        x_label=x_label,
        y_label=y_label,
        front=True,
        reference={} if dense is None else {"dense": dense},
    )
    return Analysis(title, text, list(columns), [list(r) for r in rows], figure)


def learning_curve(
    title: str,
    steps: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    *,
    x_label: str = "step",
    y_label: str = "loss",
    columns: Sequence[str] = (),
    rows: Sequence[Row] = (),
    text: str = "",
) -> Analysis:
    """Curves over the same steps; None where a curve was not measured at a step."""
    wrong = [name for name, y in curves.items() if len(y) != len(steps)]
    if wrong:
        raise UsageError(
            f"a learning curve has one value per step ({len(steps)}), got "
            f"{len(curves[wrong[0]])} for `{wrong[0]}`"
        )
    series = [Series(name, x=list(steps), y=list(y)) for name, y in curves.items()]
    figure = FigureData("lines", series, x_label=x_label, y_label=y_label)
    return Analysis(title, text, list(columns), [list(r) for r in rows], figure)


def five_numbers(values: Sequence[float]) -> list[float]:
    """The 5, 25, 50, 75 and 95 % quantiles (linear interpolation), for a box figure."""
    import numpy as np

    if not len(values):
        raise UsageError("quantiles need at least one value, got none")
    return [float(q) for q in np.percentile(np.asarray(values, dtype=np.float64), QUANTILES)]


__all__ = ["five_numbers", "folded", "learning_curve", "pareto", "section"]

"""Draws the data of an analysis: points, curves, bars, boxes, heat maps, strips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from npprune.records import FigureData, Series
from npprune.report import text
from npprune.report.svg import (
    ACCENT,
    DENSE,
    INK,
    MUTED,
    ON_ACCENT,
    PAPER,
    SERIES,
    WIDTH,
    picture,
)

MARKERS = "osD^vPX*"
LABELS_DRAWN = 30  # single points with names
MOVED = 120  # points up to which those of one cost are drawn side by side
CELLS_NAMED = 18  # columns of a heat map up to which cells show their value


def draw(data: FigureData, alt: str, name: str) -> str:
    """The figure as inline SVG."""
    if data.kind == "heatmap":
        rows, columns = len(data.matrix or []), len(data.x_names or [])
        height = 1.2 + min(9.0, 0.3 * rows)
        return picture(
            lambda f: _heatmap(f, data),
            width=WIDTH if columns > 8 else 2.4 + 0.7 * columns,
            height=height,
            alt=alt,
            name=name,
        )
    if data.kind == "strips":
        height = 0.9 + 0.3 * len(data.matrix or [])
        return picture(lambda f: _strips(f, data), width=WIDTH, height=height, alt=alt, name=name)
    return picture(lambda f: _axes(f, data), width=WIDTH, height=4.0, alt=alt, name=name)


def _axes(figure: Any, data: FigureData) -> None:
    ax = figure.add_subplot()
    kinds = {"scatter": _scatter, "lines": _lines, "bars": _bars, "box": _boxes}
    kinds[data.kind](ax, data)
    for label, y in data.reference.items():
        ax.axhline(y, color=DENSE, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.annotate(
            text.clip(label, 40),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=MUTED,
        )
    if data.log_x:
        ax.set_xscale("log")
    ax.set_xlabel(text.clean(data.x_label))
    ax.set_ylabel(text.clean(data.y_label))
    ax.grid(axis="both" if data.kind in ("scatter", "lines") else "y")
    ax.tick_params(length=0)
    handles, names = ax.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside upper left", ncols=4)


def _color(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _xs(series: Series) -> list[float]:
    return list(series.x) if series.x is not None else [float(i) for i in range(len(series.y))]


_Point = tuple[float, float, float | None, float | None, str]


def _known(series: Series) -> list[_Point]:
    """(x, y, low, high, label) of the points that were measured."""
    out = []
    for i, (x, y) in enumerate(zip(_xs(series), series.y, strict=False)):
        if y is not None:
            low = series.low[i] if series.low else None
            high = series.high[i] if series.high else None
            out.append((x, y, low, high, series.labels[i] if series.labels else ""))
    return out


def _errors(known: list[_Point]) -> Any:
    if not any(low is not None and high is not None for _, _, low, high, _ in known):
        return None
    below = [0.0 if low is None else max(y - low, 0.0) for _, y, low, _, _ in known]
    above = [0.0 if high is None else max(high - y, 0.0) for _, y, _, high, _ in known]
    return [below, above]


def _scatter(ax: Any, data: FigureData) -> None:
    from matplotlib.transforms import ScaledTranslation

    total = sum(len(s.y) for s in data.series)
    if data.front:
        best = front([(x, y) for s in data.series for x, y, *_ in _known(s)])
        if len(best) > 1:
            xs, ys = zip(*best, strict=True)
            ax.plot(xs, ys, color=DENSE, linewidth=1, drawstyle="steps-post", label="best so far")
    beside = _beside([x for s in data.series for x, *_ in _known(s)])
    for i, s in enumerate(data.series):
        aside: dict[float, list[_Point]] = {}  # points of the series by how far they are moved
        for point in _known(s):
            aside.setdefault(next(beside), []).append(point)
        for n, (move, known) in enumerate(aside.items()):
            ax.update_datalim([(p[0], y) for p in known for y in p[1:4] if y is not None])
            ax.errorbar(
                [p[0] for p in known],
                [p[1] for p in known],
                yerr=_errors(known),
                fmt=MARKERS[i // len(SERIES) % len(MARKERS)],
                color=_color(i),
                markersize=5.5,
                elinewidth=1.1,
                capsize=2.5,
                label="" if n else text.clip(s.name, 32),
                transform=ax.transData + ScaledTranslation(move / 72, 0, ax.figure.dpi_scale_trans),
            )
            for x, y, _, _, label in known if total <= LABELS_DRAWN else []:
                ax.annotate(
                    text.clip(label, 24),
                    (x, y),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=MUTED,
                )
    ax.autoscale_view()  # by the values, not by what is drawn aside


def _beside(xs: list[float]) -> Iterator[float]:
    """How far to the side each point is drawn, in points: few of one cost would hide each other."""
    apart = 0.004 * (max(xs, default=0.0) - min(xs, default=0.0))
    for i, x in enumerate(xs):
        near = [j for j, y in enumerate(xs) if abs(y - x) <= apart] if len(xs) <= MOVED else []
        yield 7.0 * (near.index(i) - (len(near) - 1) / 2) if len(near) <= 8 and near else 0.0


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats (smaller x and larger y), by x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _lines(ax: Any, data: FigureData) -> None:
    for i, s in enumerate(data.series):
        known = _known(s)
        xs, ys = [p[0] for p in known], [p[1] for p in known]
        marker = "o" if len(xs) <= 40 else None
        ax.plot(
            xs,
            ys,
            color=_color(i),
            linewidth=1.5,
            marker=marker,
            markersize=3.5,
            label=text.clip(s.name, 32),
        )
        if all(p[2] is not None and p[3] is not None for p in known) and known:
            low, high = [p[2] for p in known], [p[3] for p in known]
            ax.fill_between(xs, low, high, color=_color(i), alpha=0.15, linewidth=0)
    if data.x_names:
        ax.set_xticks(range(len(data.x_names)), [text.clip(n, 18) for n in data.x_names])


def _bars(ax: Any, data: FigureData) -> None:
    wide = 0.8 / max(len(data.series), 1)
    for i, s in enumerate(data.series):
        known = _known(s)
        ax.bar(
            [p[0] - 0.4 + wide * (i + 0.5) for p in known],
            [p[1] for p in known],
            wide * 0.9,
            yerr=_errors(known),
            color=_color(i),
            ecolor=INK,
            capsize=2,
            error_kw={"elinewidth": 1},
            label=text.clip(s.name, 32),
        )
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set_xlim(-0.6, max((len(s.y) for s in data.series), default=1) - 0.4)
    _names(ax, data)


def _boxes(ax: Any, data: FigureData) -> None:
    wide = 0.8 / max(len(data.series), 1)
    for i, s in enumerate(data.series):
        boxes = s.boxes or []
        stats = [
            {"whislo": b[0], "q1": b[1], "med": b[2], "q3": b[3], "whishi": b[4], "fliers": []}
            for b in boxes
        ]
        line = {"color": _color(i), "linewidth": 1.2}
        ax.bxp(
            stats,
            positions=[j - 0.4 + wide * (i + 0.5) for j in range(len(boxes))],
            widths=wide * 0.7,
            showfliers=False,
            boxprops=line,
            whiskerprops=line,
            capprops=line,
            medianprops={"color": INK, "linewidth": 1.6},
            manage_ticks=False,
        )
        ax.plot([], [], color=_color(i), label=text.clip(s.name, 32))
    _names(ax, data)


def _names(ax: Any, data: FigureData) -> None:
    if data.x_names:
        long = max(len(n) for n in data.x_names) * len(data.x_names) > 90
        ax.set_xticks(
            range(len(data.x_names)),
            [text.clip(n, 18) for n in data.x_names],
            **({"rotation": 40, "ha": "right"} if long else {}),
        )


def _strips(figure: Any, data: FigureData) -> None:
    """A row of segments for each category: wide where frequent, named, the first one darkest."""
    ax = figure.add_subplot()
    rows, names = data.matrix or [], data.cells or []
    widest = max((sum(v or 0 for v in row) for row in rows), default=1.0)
    for i, row in enumerate(rows):
        start = 0.0
        for j, value in enumerate(row):
            width = value or 0.0
            ax.barh(
                -i, width, 0.78, left=start, color=ACCENT, alpha=max(0.85 - 0.12 * j, 0.12),
                edgecolor=PAPER, linewidth=0.8,
            )  # fmt: skip
            name = names[i][j] if i < len(names) and j < len(names[i]) else ""
            if width > 0.011 * widest * (len(name) + 1):
                ax.text(
                    start + width / 2, -i, name, ha="center", va="center", fontsize=7.5,
                    color=ON_ACCENT if j < 2 else INK, in_layout=False,
                )  # fmt: skip
            start += width
    ax.set_xlim(0, max(100.0, widest))
    ax.set_ylim(-max(len(rows), 1) + 0.4, 0.6)
    labels = [text.clip(n, 28) for n in data.y_names or []]
    ax.set_yticks([-i for i in range(len(labels))], labels, fontsize=8)
    ax.set_xlabel(text.clean(data.x_label))
    ax.tick_params(length=0)
    ax.spines["left"].set_visible(False)


def _heatmap(figure: Any, data: FigureData) -> None:
    from matplotlib.collections import PolyCollection

    ax = figure.add_subplot()
    matrix = data.matrix or []
    values = [v for row in matrix for v in row if v is not None and math.isfinite(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    columns = max((len(r) for r in matrix), default=0)
    squares, depths = [], []
    for i, row in enumerate(matrix):
        for j, v in enumerate(row):
            if v is None or not math.isfinite(v):
                continue
            depth = 0.05 + 0.95 * (v - low) / ((high - low) or 1.0)
            squares.append([(j, -i), (j + 1, -i), (j + 1, -i - 1), (j, -i - 1)])
            depths.append(depth)
            if columns <= CELLS_NAMED:
                ax.text(
                    j + 0.5,
                    -i - 0.5,
                    f"{v:.2g}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=ON_ACCENT if depth > 0.7 else INK,
                    in_layout=False,  # measuring each is slow and moves nothing
                )
    cells = PolyCollection(squares, facecolor=ACCENT, edgecolor="none")
    cells.set_alpha(depths or None)
    ax.add_collection(cells)
    ax.set_xlim(0, max(columns, 1))
    ax.set_ylim(-max(len(matrix), 1), 0)
    small = 8 if max(columns, len(matrix)) <= 30 else 5
    x_names = [text.clip(n, 20) for n in data.x_names or []]
    y_names = [text.clip(n, 28) for n in data.y_names or []]
    ax.set_xticks(
        [j + 0.5 for j in range(len(x_names))], x_names, rotation=45, ha="right", fontsize=small
    )
    ax.set_yticks([-i - 0.5 for i in range(len(y_names))], y_names, fontsize=small)
    ax.set_xlabel(text.clean(data.x_label))
    ax.set_ylabel(text.clean(data.y_label))
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)

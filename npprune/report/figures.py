"""The standard pictures: accuracy, cost, kept widths, path frequency, paths of classes.

Each returns inline SVG. Neuron indices are categories here: cells with names, never positions
on a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npprune.records import Rate, Reliability
from npprune.report import text
from npprune.report.svg import (
    ACCENT,
    DENSE,
    INK,
    MARK,
    MUTED,
    ON_ACCENT,
    SERIES,
    WIDTH,
    picture,
)

FEW = 10  # images of a bin below which its accuracy says little
PROTECTED = "of these, path neurons (protected)"


def accuracy(rows: Sequence[tuple[str, Rate, Rate]], alt: str, name: str) -> str:
    """Top-1 and top-5 with 95 % intervals, one line per network, top to bottom; the axis begins
    at 0, or at a round number where all are far above it."""
    lowest = min((100 * top1.low for _, top1, _ in rows), default=0.0)
    start = 0 if lowest < 50 else 10 * int((lowest - 5) // 10)

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        for i, (_, top1, top5) in enumerate(rows):
            color = DENSE if i == 0 else ACCENT
            for rate, face, label in ((top5, "none", "top-5"), (top1, color, "top-1")):
                y = -i + (0.14 if label == "top-5" else -0.14)
                ends = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
                ax.errorbar(
                    [100 * rate.value],
                    [y],
                    xerr=ends,
                    fmt="o" if label == "top-1" else "D",
                    color=color,
                    markerfacecolor=face,
                    markersize=6 if label == "top-1" else 5,
                    elinewidth=1.4,
                    capsize=3,
                )
                ax.annotate(
                    f"{label} {100 * rate.value:.1f} %",
                    (100 * rate.high, y),
                    xytext=(7, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=MUTED,
                )
        ax.set_yticks([-i for i in range(len(rows))], [text.clip(r[0], 34) for r in rows])
        ax.set_ylim(-len(rows) + 0.45, 0.55)
        ax.set_xlim(start, 100 + 0.12 * (100 - start))
        ax.set_xticks(range(start, 101, 20 if start == 0 else 10 if start < 70 else 5))
        ax.set_xlabel("accuracy in %, with 95 % intervals")
        ax.grid(axis="x")
        ax.tick_params(length=0)
        ax.spines["left"].set_visible(False)

    return picture(paint, width=WIDTH, height=0.75 + 0.62 * len(rows), alt=alt, name=name)


def reliability(networks: Sequence[tuple[str, Reliability]], alt: str, name: str) -> str:
    """Accuracy against confidence with 95 % intervals, and the line where both are equal; bins of
    few images hollow, and joined by no line."""

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        for (label, found), color, marker in zip(networks, (DENSE, ACCENT), "os", strict=True):
            said = f"{label}, calibration error {100 * found.error:.1f} %"
            for many in (True, False):
                bins = [b for b in found.bins if (b.accuracy.total >= FEW) == many]
                rates = [b.accuracy for b in bins]
                below = [100 * (r.value - r.low) for r in rates]
                above = [100 * (r.high - r.value) for r in rates]
                ax.errorbar(
                    [100 * b.confidence for b in bins],
                    [100 * r.value for r in rates],
                    yerr=[below, above],
                    fmt=f"{marker}-" if many else marker,
                    color=color,
                    markerfacecolor=color if many else "none",
                    markersize=5,
                    linewidth=1.4,
                    elinewidth=1 if many else 0.4,
                    capsize=2.5 if many else 0,
                    label=said if many else None,
                )
        ax.set_xlim(0, 102)
        ax.set_ylim(0, 102)
        ax.set_xlabel("confidence: probability of the predicted class in %")
        ax.set_ylabel("top-1 in %, with 95 % intervals")
        ax.grid(axis="both")
        ax.tick_params(length=0)
        figure.legend(loc="outside upper left", ncols=2)

    return picture(paint, width=6.4, height=5.0, alt=alt, name=name)


def histogram(
    edges: Sequence[float], shares: Sequence[float], axis: tuple[str, str], alt: str, name: str
) -> str:
    """Bars between edges; one share more than there are such, for all above the last edge.

    axis: what is counted, and what the shares are of.
    """
    ends = [*edges, edges[-1] + (edges[-1] - edges[-2])]

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        widths = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        ax.bar(ends[:-1], shares, [0.92 * w for w in widths], align="edge", color=ACCENT)
        ax.axvline(0, color=DENSE, linewidth=1.2, linestyle=(0, (4, 2)))
        step = max(1, round((len(edges) - 1) / 10))
        ticks = list(edges[::step])
        names = [text.fixed(t, 0, sign=True) for t in ticks]
        if ticks[-1] == edges[-1]:
            names[-1] = f"{names[-1]} and more"
        ax.set_xticks(ticks, names)
        ax.set_xlim(ends[0], ends[-1])
        ax.set_xlabel(axis[0])
        ax.set_ylabel(axis[1])
        ax.grid(axis="y")
        ax.tick_params(length=0)

    return picture(paint, width=WIDTH, height=3.4, alt=alt, name=name)


def costs(
    labels: Sequence[str], variants: Sequence[tuple[str, list[float | None]]], alt: str, name: str
) -> str:
    """Cost as a share of the dense network's: a bar per measure and variant, dense at 100 %."""
    thick = 0.8 / len(variants)

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        for j, (variant, values) in enumerate(variants):
            for i, value in enumerate(values):
                if value is None:
                    continue
                y = -i + 0.4 - thick * (j + 0.5)
                ax.barh(
                    y,
                    100 * value,
                    height=thick * 0.88,
                    color=SERIES[j % len(SERIES)],
                    label=text.clip(variant, 30) if i == 0 else None,
                )
                ax.text(100 * value + 1, y, f"{100 * value:.0f} %", va="center", fontsize=8)
        ax.axvline(100, color=DENSE, linewidth=1.2, linestyle=(0, (4, 2)))
        ax.set_yticks([-i for i in range(len(labels))], labels)
        longest = max([1.0, *(v for _, values in variants for v in values if v is not None)])
        ax.set_xlim(0, 100 * longest + 9)
        ax.set_ylim(-len(labels) + 0.45, 0.55)
        ax.set_xlabel("% of the dense network (dashed line)")
        ax.tick_params(length=0)
        ax.spines["left"].set_visible(False)
        if len(variants) > 1:
            figure.legend(loc="outside upper left", ncols=4)

    rows = len(labels) * max(1.0, 0.45 * len(variants))
    return picture(paint, width=WIDTH, height=0.8 + 0.36 * rows, alt=alt, name=name)


def widths(
    dense: Sequence[int],
    variants: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    alt: str,
    name: str,
) -> str:
    """Hidden units per block: outline dense, filled kept, a line at the protected path neurons.

    variants: (name, kept per block, protected per block or empty).
    """
    blocks = list(range(len(dense)))

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(variants), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (variant, kept, protected) in zip(panels, variants, strict=True):
            ax.bar(blocks, dense, 0.78, facecolor="none", edgecolor=DENSE, label="dense")
            ax.bar(blocks, kept, 0.78, color=ACCENT, label="kept")
            if any(protected):
                ax.hlines(
                    protected,
                    [b - 0.39 for b in blocks],
                    [b + 0.39 for b in blocks],
                    color=MARK,
                    linewidth=2.2,
                    label=PROTECTED,
                )
            small = 8 if len(blocks) <= 16 else 6
            for b, n in zip(blocks, kept, strict=True):
                ax.annotate(
                    str(n),
                    (b, n),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=small,
                )
            ax.set_ylim(0, max(dense) * 1.08)
            ax.set_xlim(-0.6, len(blocks) - 0.4)
            ax.tick_params(length=0)
            ax.set_ylabel("hidden units")
            if len(variants) > 1:
                ax.set_title(text.clip(variant, 70))
        panels[-1].set_xticks(blocks)
        panels[-1].set_xlabel("block")
        found: dict[str, Any] = {}
        for ax in panels:  # only some variants may protect neurons
            handles, names = ax.get_legend_handles_labels()
            found.update(zip(names, handles, strict=True))
        order = sorted(found, key=["dense", "kept", PROTECTED].index)
        figure.legend([found[n] for n in order], order, loc="outside upper left", ncols=3)

    height = 0.7 + (2.3 if len(variants) == 1 else 1.9 * len(variants))
    return picture(paint, width=WIDTH, height=height, alt=alt, name=name)


def strips(
    rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]],
    columns: Sequence[str],
    axis: str,
    alt: str,
    name: str,
) -> str:
    """Rows of named cells, the darker the larger the share in [0, 1] (darkest: the largest).

    rows: (label, cells of (name, line below it, share)); columns: names above, or empty.
    """
    from matplotlib.collections import PolyCollection

    longest = max(len(cells) for _, cells in rows)
    largest = max((share for _, cells in rows for *_, share in cells), default=1.0) or 1.0
    tall = 0.36 if any(below for _, cells in rows for _, below, _ in cells) else 0.29
    font = 8 if longest <= 16 else max(4.0, 128 / longest)

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        boxes, depths = [], []
        for i, (_, cells) in enumerate(rows):
            for j, (cell, below, share) in enumerate(cells):
                depth = min(1.0, 0.07 + 0.93 * share / largest)
                x0, x1, y0, y1 = j + 0.03, j + 0.97, -i - 0.94, -i - 0.06
                boxes.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
                depths.append(depth)
                color = ON_ACCENT if depth > 0.7 else INK
                up = 0.34 if below else 0.5
                style = {"ha": "center", "va": "center", "color": color, "in_layout": False}
                ax.text(j + 0.5, -i - up, cell, fontsize=font, **style)
                if below:
                    ax.text(j + 0.5, -i - 0.71, below, fontsize=font * 0.78, **style)
        drawn = PolyCollection(boxes, facecolor=ACCENT, edgecolor="none")
        drawn.set_alpha(depths)
        ax.add_collection(drawn)
        ax.set_xlim(0, longest)
        ax.set_ylim(-len(rows), 0)
        ax.set_yticks([-i - 0.5 for i in range(len(rows))], [text.clip(r[0], 28) for r in rows])
        ax.set_xticks([j + 0.5 for j in range(longest)], columns or [""] * longest)
        ax.xaxis.tick_top()
        ax.xaxis.set_label_position("top")
        ax.set_xlabel(axis)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)

    return picture(paint, width=WIDTH, height=0.7 + tall * len(rows), alt=alt, name=name)


def classes(rows: Sequence[tuple[str, float, float]], alt: str, name: str) -> str:
    """Top-1 of single classes, dense and pruned, joined by a line: (name, dense, pruned)."""

    def paint(figure: Any) -> None:
        ax = figure.add_subplot()
        ys = [-i for i in range(len(rows))]
        dense, pruned = [100 * r[1] for r in rows], [100 * r[2] for r in rows]
        ax.hlines(ys, dense, pruned, color=MUTED, linewidth=1.1)
        ax.plot(dense, ys, "o", color=DENSE, markerfacecolor="none", markersize=7, label="dense")
        ax.plot(pruned, ys, "o", color=ACCENT, markersize=5, label="pruned")
        ax.set_yticks(ys, [text.clip(r[0], 34) for r in rows])
        ax.set_ylim(-len(rows) + 0.4, 0.6)
        ax.set_xlim(-2, 102)
        ax.set_xlabel("top-1 in %")
        ax.grid(axis="x")
        ax.tick_params(length=0)
        ax.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2)

    return picture(paint, width=WIDTH, height=0.9 + 0.23 * len(rows), alt=alt, name=name)

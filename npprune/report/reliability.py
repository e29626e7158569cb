"""How sure networks are against how often they are right, and how far probabilities moved."""

from __future__ import annotations

from functools import partial

from npprune.records import Evaluation, Histogram, Reliability
from npprune.report import figures, text
from npprune.report.document import Cell, Figure, Table, cells


def curve(evaluation: Evaluation, prefix: str, name: str) -> Figure | None:
    """The calibration curve of both networks; None where an older evaluation has none."""
    dense, pruned = evaluation.dense_reliability, evaluation.pruned_reliability
    if dense is None or pruned is None:
        return None
    both = [("dense", dense), ("pruned", pruned)]
    errors = [f"{text.percent(r.error)} {who}" for who, r in both]
    return Figure(
        f"{prefix}Confidence and accuracy",
        "Below the line a network is surer than it is right, above it less sure. Expected "
        f"calibration error: {', '.join(errors)} (few images make it larger than it is). Where the "
        "pruned network leaves the line, its probabilities want a new temperature before anything "
        f"is decided by them. Hollow: of fewer than {figures.FEW} images.",
        partial(figures.reliability, both, "Accuracy against confidence", name),
        Table(
            ["network", "images", "confidence", "top-1"],
            [row for who, r in both for row in _rows(who, r)],
        ),
    )


def _rows(who: str, found: Reliability) -> list[list[Cell]]:
    return [
        cells(who, text.count(b.accuracy.total), text.percent(b.confidence), text.rate(b.accuracy))
        for b in found.bins
    ]


def deviations(evaluation: Evaluation, prefix: str, name: str) -> Figure | None:
    """How far the true class's probability moved, image by image; None where it is not known."""
    found = evaluation.deviations
    if found is None or not sum(found.counts):
        return None
    total = sum(found.counts)
    ranges = _ranges(found)
    shares = [100 * n / total for n in found.counts]
    axis = ("probability deviation in %", "% of the images")
    title = f"{prefix}Probability deviation, image by image"
    return Figure(
        title,
        "How the true class's probability changed against the dense network's (dashed: not at "
        "all). A tall bar on the far left is images whose class was all but forgotten; the mean "
        "hides them.",
        partial(figures.histogram, [100 * e for e in found.edges], shares, axis, title, name),
        Table(
            ["probability deviation", "images", "share"],
            [
                cells(label, text.count(n), text.percent(n / total))
                for label, n in zip(ranges, found.counts, strict=False)
            ],
        ),
    )


def _ranges(found: Histogram) -> list[str]:
    ends = [text.fixed(100 * edge, 0, sign=True) for edge in found.edges]
    inner = [f"{a} to {b} %" for a, b in zip(ends, ends[1:], strict=False)]
    return [*inner, f"{ends[-1]} % and more"]

"""What is shown of networks without a classifier: their features beside the dense network's."""

from __future__ import annotations

from npprune.records import FeatureEvaluation, Mean
from npprune.report import text
from npprune.report.document import Card, Cell

Row = tuple[str, Cell, Cell, Cell]
"""Label, dense, pruned, change."""

EXPLAINED = (
    "There is no classifier: what is compared are the features. The pooled vector is the class "
    "token's, or what the network pools its tokens to; relative error is the squared distance from "
    "the dense network's feature over its squared norm, of patch tokens the mean over an image's. "
    "k-NN (20 neighbours, by cosine) and the ridge probe (a linear classifier in closed form) "
    "judge every image by the others; intervals of changes are paired over the same images."
)


def rows(done: FeatureEvaluation) -> list[Row]:
    """Nearness first, then the probes."""
    near, found = done.agreement, list[Row]()
    for label, cosine, error in (
        ("pooled vector", near.cosine, near.relative_error),
        ("patch tokens", near.patch_cosine, near.patch_relative_error),
    ):
        if cosine is not None and error is not None:
            found += [
                _row(f"Cosine to dense, {label}", cosine, "1"),
                _row(f"Relative error, {label}", error, "0"),
            ]
    for probe in done.probes:
        a, b = probe.dense, probe.pruned
        found.append(
            (
                f"Top-1, {probe.name}",
                Cell(text.percent(a.value), text.rate_detail(a)),
                Cell(text.percent(b.value), text.rate_detail(b)),
                Cell(text.points(probe.change.value), text.change_span(probe.change)),
            )
        )
    return found


def sentence(done: FeatureEvaluation) -> str:
    """How near the features stay."""
    near = done.agreement
    said = (
        f"On {text.plural(done.data.images, 'image')} the cosine of its features to the dense "
        f"network's is {_mean(near.cosine)} (pooled)"
    )
    if near.patch_cosine is not None:
        said += f" and {_mean(near.patch_cosine)} (patch tokens)"
    for probe in done.probes:
        said += (
            f"; a {probe.name} reaches {text.percent(probe.pruned.value)} top-1 on them, and "
            f"{text.percent(probe.dense.value)} on the dense network's"
        )
    return said


def cards(done: FeatureEvaluation) -> list[Card]:
    """The largest numbers."""
    mean = done.agreement.cosine
    shown = [Card("Cosine to dense", text.fixed(mean.value, 4), "1", f"pooled, {_span(mean)}")]
    for probe in done.probes[:1]:
        change = f"{text.points(probe.change.value)}, {text.change_span(probe.change)}"
        values = text.percent(probe.pruned.value), text.percent(probe.dense.value)
        shown.append(Card(f"Top-1, {probe.name}", *values, change))
    return shown


def brief(done: FeatureEvaluation) -> str:
    """`cosine to dense 0.9913 (95 % 0.9899–0.9927) on 80 images`."""
    where = text.plural(done.data.images, "image")
    return f"cosine to dense {_mean(done.agreement.cosine)} on {where}"


def _row(label: str, mean: Mean, dense: str) -> Row:
    return label, Cell(dense), Cell(text.fixed(mean.value, 4), _span(mean)), Cell(text.DASH)


def _mean(mean: Mean) -> str:
    return f"{text.fixed(mean.value, 4)} ({_span(mean)})"


def _span(mean: Mean) -> str:
    return f"95 % {text.fixed(mean.low, 4)}–{text.fixed(mean.high, 4)}"

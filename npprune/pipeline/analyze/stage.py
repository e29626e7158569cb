"""Analyses of a run's paths: scores of the methods, similarity of classes, preferred paths.

Each adds sections to the run's `result.json`. Scores need the network; the others only paths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from npprune.core.attribution import similarity as like
from npprune.core.attribution.votes import class_top, frequency
from npprune.core.metrics import mean_interval
from npprune.data.hierarchy import imagenet_hierarchy, read_hierarchy
from npprune.errors import DataError, UsageError, plural
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import (
    FinishedRun,
    choose_labels,
    open_finished,
    paths_of,
    record,
)
from npprune.records import Analysis, FigureData, Series
from npprune.report import five_numbers, text
from npprune.words import METHODS, check_word

STAGE = "analyze"
PAIRS_SHOWN = 5
STRIP = 8  # neurons of a block that a picture names
IMAGES_SHOWN = 5  # that follow the preferred path most, and that leave it most
RANKS = 10  # first neurons of a class that rank overlap compares

Row = list[str | int | float | None]


# ---------------------------------------------------------------- scores


def analyze_scores(
    run: Path,
    methods: Sequence[str] | None = None,
    *,
    work: Work | None = None,
) -> dict[str, Analysis]:
    """Joint attribution scores of the methods' paths on the run's images.

    methods: None: all of them. Paths that the run does not hold are found with its settings, in
    run folders below it.

    Raises:
        NpPruneError: an unknown method, or what `discover` raises.
    """
    work = (work or Work()).on(STAGE)
    for m in methods or ():
        check_word("methods", m, METHODS)
    found = open_finished(run, work)
    chosen = list(dict.fromkeys(methods or METHODS))
    tables = {m: paths_of(found, m, work) for m in chosen}
    first = found.settings.method if found.settings.method in tables else chosen[0]
    scores = {m: torch.from_numpy(t.scores) for m, t in tables.items()}
    rows: list[Row] = []
    for m, values in scores.items():
        mean, gap = mean_interval(values), mean_interval(scores[first] - values)
        row: Row = [m, mean.value, mean.low, mean.high, float(values.median())]
        paired: Row = [gap.value, gap.low, gap.high, _above(scores[first], values)]
        rows.append(row + (paired if m != first else [None] * 4))
    figure = FigureData(
        "box",
        [
            Series(m, y=[float(v.median())], boxes=[five_numbers(v.tolist())])
            for m, v in scores.items()
        ],
        x_label="images",
        y_label="joint attribution score",
        x_names=["all"],
        reference={"0": 0.0},
    )
    s, summary = found.settings, found.result.discovery
    assert summary is not None
    said = (
        f"The joint attribution score of each method's path on the same "
        f"{plural(len(found.table), 'image')}: "
        f"K = {s.topk} per block, {summary.scope} tokens, {text.integral(summary)}, "
        f"accumulation {s.accumulation}. Intervals are 95 %; differences "
        f"are paired, {first} minus the other. The score is what the search of neuron-path seeks "
        "to raise, so this says how well it searches, not that its neurons matter more: the "
        "editing experiments test that."
    )
    columns = [
        "paths by", "mean", "from", "to", "median",
        f"{first} minus it", "from", "to", f"{first} higher, % of images",
    ]  # fmt: skip
    result = {"scores": Analysis("Joint attribution scores", said, columns, rows, figure)}
    record(found, result, work)
    return result


def _above(a: torch.Tensor, b: torch.Tensor) -> float:
    return 100 * float((a > b).double().mean())


# ---------------------------------------------------------------- similarity


def analyze_similarity(
    run: Path,
    classes: Sequence[str | int] | str | None = None,
    *,
    hierarchy: Path | None = None,
    permutations: int = 10_000,
    work: Work | None = None,
) -> dict[str, Analysis]:
    """How alike classes are in their neurons, and whether like classes are alike in meaning.

    Args:
        classes: None: all that have paths.
        work: its seed draws the relabellings.
        hierarchy: a file of child and parent (see `data.hierarchy`), by synset, name or index;
            None: WordNet's, where the classes are ImageNet's.

    Raises:
        NpPruneError: fewer than two classes, or a hierarchy that does not hold them.
    """
    work = (work or Work()).on(STAGE)
    found = open_finished(run, work)
    labels = choose_labels(found, classes)
    if len(labels) < 2:
        raise UsageError(f"a similarity needs at least two classes, got {len(labels)}")
    table = found.table
    matrices = like.frequency_matrix(table.neurons, table.labels, labels, found.widths)
    cosine = like.cosine(matrices)
    ranks = like.rank_overlap(
        [class_top(table.neurons, table.labels, c, RANKS) for c in labels], RANKS
    )
    result = {
        "similarity": _heat(found, labels, cosine),
        "similarity-pairs": _pairs(found, labels, cosine, ranks),
        "similarity-hierarchy": _agreement(
            found, labels, {"cosine": cosine, "rank overlap": ranks}, hierarchy, permutations, work,
        ),
        "consistency": _consistency(found, labels),
    }  # fmt: skip
    record(found, result, work)
    return result


def _heat(found: FinishedRun, labels: list[int], cosine: like.Matrix) -> Analysis:
    order = like.cluster_order(cosine)
    names = [found.name(labels[i]) for i in order]
    matrix: list[list[float | None]] = [[float(cosine[i, j]) for j in order] for i in order]
    return Analysis(
        "Similarity of classes",
        "Cosine of two classes' neuron frequencies (the share of a class's images whose path holds "
        "a neuron), block by block, then the mean over blocks. Classes stand in the order of a "
        "hierarchical clustering (average linkage), so like ones are neighbours.",
        figure=FigureData("heatmap", x_names=names, y_names=names, matrix=matrix),
    )


def _pairs(
    found: FinishedRun, labels: list[int], cosine: like.Matrix, ranks: like.Matrix
) -> Analysis:
    ordered = like.pairs(cosine)
    shown = [("most", p) for p in ordered[:PAIRS_SHOWN]]
    shown += [("least", p) for p in ordered[max(PAIRS_SHOWN, len(ordered) - PAIRS_SHOWN) :]]
    rows: list[Row] = [
        [which, found.name(labels[i]), found.name(labels[j]), value, float(ranks[i, j])]
        for which, (value, i, j) in shown
    ]
    return Analysis(
        "Most and least similar classes",
        f"Rank overlap: average overlap of the classes' {RANKS} most voted neurons, block by "
        "block, then the mean over blocks (1: the same neurons in the same order).",
        ["similar", "class", "class", "cosine", "rank overlap"],
        rows,
    )


def _agreement(
    found: FinishedRun,
    labels: list[int],
    matrices: dict[str, like.Matrix],
    hierarchy: Path | None,
    permutations: int,
    work: Work,
) -> Analysis:
    title = "Agreement with the hierarchy of meanings"
    names, parents, where = _meanings(found, labels, hierarchy)
    if parents is None:
        work.warn(where)
        return Analysis(title, where[0].upper() + where[1:] + ".")
    try:
        tree = like.tree_similarity(names, parents)
        found_rows = {
            name: like.agreement(m, tree, permutations=permutations, seed=work.seed)
            for name, m in matrices.items()
        }
    except ValueError as err:
        if hierarchy is not None and len(labels) >= 3:
            raise DataError(f"{err} ({where})", hint="give one that holds all classes") from err
        work.warn(str(err))
        return Analysis(title, f"Not measured: {err}.")
    rows: list[Row] = [
        [name, len(labels), a.correlation, a.p_value] for name, a in found_rows.items()
    ]
    upper = np.triu_indices(len(labels), 1)
    points = Series(
        "pairs of classes", y=matrices["cosine"][upper].tolist(), x=tree[upper].tolist()
    )
    return Analysis(
        title,
        f"Spearman's rank correlation over all pairs of classes between their likeness in neurons "
        f"and in meaning (Wu-Palmer similarity in {where}). The p-value is one-sided, from "
        f"{permutations} relabellings of the classes (Mantel test): the share that correlates at "
        "least as much.",
        ["likeness in neurons", "classes", "correlation", "p-value"],
        rows,
        FigureData("scatter", [points], x_label="likeness in meaning", y_label="cosine"),
    )


def _meanings(
    found: FinishedRun, labels: list[int], hierarchy: Path | None
) -> tuple[list[str], like.Parents | None, str]:
    """The classes' names in a hierarchy, the hierarchy, and which it is (or why there is none)."""
    known = [found.result.classes[c] for c in labels]
    if hierarchy is None:
        parents = imagenet_hierarchy()
        missing = [c.name for c in known if c.synset not in parents]
        if missing:
            return (
                [],
                None,
                (
                    f"no hierarchy is known for {len(missing)} of "
                    f"{plural(len(labels), 'class', 'classes')} "
                    f"(`{missing[0]}` is no ImageNet-1k synset): give one with `--hierarchy FILE`"
                ),
            )
        return [c.synset or "" for c in known], parents, "WordNet"
    parents = read_hierarchy(hierarchy)
    nodes = set(parents)
    names = []
    for label, c in zip(labels, known, strict=True):
        words = [w for w in (c.synset, c.name, c.name.split(",")[0].strip(), str(label)) if w]
        name = next((w for w in words if w in nodes), None)
        if name is None:
            raise DataError(
                f"hierarchy `{hierarchy}` holds none of {', '.join(f'`{w}`' for w in words)}",
                hint="name a class by its synset, its name or its index",
            )
        names.append(name)
    return names, parents, str(hierarchy)


def _consistency(found: FinishedRun, labels: list[int]) -> Analysis:
    table = found.table
    inside = np.isin(table.labels, labels)
    blocks = like.consistency(table.neurons[inside], table.labels[inside], labels, found.widths)
    curves = {
        "same class": [_percent(b.within) for b in blocks],
        "different classes": [_percent(b.between) for b in blocks],
        "by chance": [_percent(b.chance) for b in blocks],
    }
    series = [
        Series(name, y=values, x=[float(l) for l in range(len(blocks))])
        for name, values in curves.items()
    ]
    rows: list[Row] = [[l, *(values[l] for values in curves.values())] for l in range(len(blocks))]
    return Analysis(
        "Consistency of paths",
        "The share of their neurons that two images' paths have in common, block by block: images "
        "of the same class (mean of the classes with two or more), of different classes, and two "
        "paths drawn at random.",
        ["block", *(f"{name} %" for name in curves)],
        rows,
        FigureData("lines", series, x_label="block", y_label="neurons in common in %"),
    )


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * share


# ---------------------------------------------------------------- pictures


def analyze_paths(
    run: Path,
    classes: Sequence[str | int] | str | None = None,
    *,
    every: bool = False,
    work: Work | None = None,
) -> dict[str, Analysis]:
    """The preferred path through the blocks, as frequency strips, and who follows or leaves it.

    Args:
        classes: one picture for each of these. None: one of all images together.
        every: one picture for each class that has paths.

    Raises:
        NpPruneError: a class without paths.
    """
    work = (work or Work()).on(STAGE)
    found = open_finished(run, work)
    if every:
        labels = found.table.classes
    else:
        labels = [] if classes is None else choose_labels(found, classes)
    result: dict[str, Analysis] = {}
    if not labels:
        rows = np.arange(len(found.table))
        result["paths"] = _strips(found, rows, "all classes", named=False)
    for label in labels:
        rows = np.flatnonzero(found.table.labels == label)
        result[f"paths-{label}"] = _strips(found, rows, found.name(label), named=True)
    record(found, result, work)
    return result


def _strips(found: FinishedRun, rows: np.ndarray, name: str, *, named: bool) -> Analysis:
    """Per block a strip: its segments are neurons, as wide as their share of the paths."""
    neurons = found.table.neurons[rows]
    topk = neurons.shape[2]
    shares, cells = [], []
    for block in frequency(neurons, STRIP):
        shares.append([share / topk for _, share in block])
        cells.append([str(neuron) for neuron, _ in block])
    figure = FigureData(
        "strips",
        x_label="share of the paths' neurons in %",
        y_names=[f"block {l}" for l in range(len(shares))],
        matrix=[[100 * s for s in row] for row in shares],
        cells=cells,
    )
    images = plural(len(rows), "image")
    said = (
        f"Each strip is a block; its segments are the {STRIP} neurons that the paths of {images} "
        "hold most often, the preferred one first, as wide as their share (what is missing at the "
        "right are all others). A neuron's number is its name, no place on a line."
    )
    if not named:
        return Analysis(f"Preferred path: {name}", said, figure=figure)
    preferred = [block[0][0] for block in frequency(neurons, 1)]
    held = (neurons == np.array(preferred)[:, None]).any(2).sum(1)
    order = np.lexsort((found.table.ids[rows], -held))
    most = [i for i in order[:IMAGES_SHOWN] if held[i]]
    least = [i for i in order[::-1][:IMAGES_SHOWN] if held[i] < len(preferred) and i not in most]
    listed: list[Row] = [
        [which, str(found.table.ids[rows[i]]), int(held[i]), float(found.table.scores[rows[i]])]
        for which, group in (("follows", most), ("leaves", least))
        for i in group
    ]
    spread = Counter(held.tolist())
    said += (
        f" An image follows the preferred path in so many of the {len(preferred)} blocks: "
        + ", ".join(f"{n} in {b}" for b, n in sorted(spread.items(), reverse=True))
        + "."
    )
    columns = ["preferred path", "image", "blocks in common", "score of its own path"]
    return Analysis(f"Preferred path: {name}", said, columns, listed, figure)

"""How alike classes are in the neurons of their paths, and how alike in meaning.

Neurons are categories: two classes are alike where their images' paths hold the same units, and
a unit's index says nothing of its neighbours.

Letters: n images, L blocks, K neurons per block and path, h hidden units, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Parents = Mapping[str, Sequence[str]]
"""A hierarchy: the parents of each node; the root has none."""


def frequency_matrix(
    neurons: ArrayLike, labels: ArrayLike, classes: Sequence[int], widths: Sequence[int]
) -> list[Matrix]:
    """Per block [C, h]: the share of a class's images whose path holds the unit.

    neurons [n, L, K], labels [n]. A row adds up to K. ValueError: a class without images.
    """
    paths, labels = np.asarray(neurons), np.asarray(labels)
    blocks = [np.zeros((len(classes), h)) for h in widths]
    for i, c in enumerate(classes):
        own = paths[labels == c]
        if not len(own):
            raise ValueError(f"class {c} has no images")
        for l, h in enumerate(widths):
            blocks[l][i] = np.bincount(own[:, l].reshape(-1), minlength=h) / len(own)
    return blocks


def cosine(frequencies: Sequence[Matrix]) -> Matrix:
    """Cosine of the classes' frequencies [C, C], each block by itself, then the mean of blocks."""
    total = np.zeros((len(frequencies[0]),) * 2)
    for f in frequencies:
        unit = f / np.linalg.norm(f, axis=1, keepdims=True)
        total += unit @ unit.T
    return np.clip(total / len(frequencies), 0.0, 1.0)


def rank_overlap(rankings: Sequence[Sequence[Sequence[int]]], depth: int) -> Matrix:
    """Average overlap of the classes' rankings [C, C], the mean over blocks.

    rankings: per class and block, its neurons, most voted first. At each d up to `depth`, the
    share of common neurons among the first d of both; the mean over d (Fagin et al., 2003). A
    list that ends earlier has no more to agree on: d is then that of the longer list.
    """
    blocks = len(rankings[0])
    result = np.eye(len(rankings))
    for i, j in combinations(range(len(rankings)), 2):
        values = [_overlap(rankings[i][l], rankings[j][l], depth) for l in range(blocks)]
        result[i, j] = result[j, i] = sum(values) / blocks
    return result


def _overlap(a: Sequence[int], b: Sequence[int], depth: int) -> float:
    depth = min(depth, max(len(a), len(b)))
    shares = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, depth + 1)]
    return sum(shares) / depth if depth else 0.0


def pairs(similarity: Matrix) -> list[tuple[float, int, int]]:
    """(similarity, i, j) of all pairs of classes, the most similar first."""
    c = len(similarity)
    found = [(float(similarity[i, j]), i, j) for i, j in combinations(range(c), 2)]
    return sorted(found, key=lambda p: (-p[0], p[1], p[2]))


def cluster_order(similarity: Matrix) -> list[int]:
    """The classes in the order of a hierarchical clustering (average linkage of 1 - similarity).

    Neighbouring leaves are as alike as the tree allows.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    distance = 1.0 - (similarity + similarity.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [int(i) for i in leaves_list(tree)]


@dataclass
class Consistency:
    """Shares of common neurons of two images' paths in one block, over all pairs of images."""

    within: float  # both of one class; the mean of the classes that have two images
    between: float  # of different classes; the mean of the pairs of classes
    chance: float  # two paths drawn at random: K / h


def consistency(
    neurons: ArrayLike, labels: ArrayLike, classes: Sequence[int], widths: Sequence[int]
) -> list[Consistency]:
    """How much two images' paths share in each block, within a class and between classes.

    NaN where no class has two images, or there is only one class.
    """
    paths, labels = np.asarray(neurons), np.asarray(labels)
    k = paths.shape[2]
    counts = np.array([(labels == c).sum() for c in classes], dtype=np.float64)
    result = []
    for f, h in zip(frequency_matrix(paths, labels, classes, widths), widths, strict=True):
        squares = (f**2).sum(1)  # of shares; an image's path meets itself in K of n * n pairs
        several = counts > 1
        n = counts[several]
        within = (n * squares[several] - k) / (n - 1) / k
        common = f @ f.T / k
        between = common[~np.eye(len(classes), dtype=bool)]
        result.append(
            Consistency(
                float(within.mean()) if len(within) else math.nan,
                float(between.mean()) if len(between) else math.nan,
                k / h,
            )
        )
    return result


# ---------------------------------------------------------------- hierarchy


def tree_similarity(names: Sequence[str], parents: Parents) -> Matrix:
    """Wu and Palmer's similarity [n, n] (ACL 1994): 2 d / (2 d + edges), in (0, 1].

    d: the depth of a common ancestor (the root's is 1); edges: from it down to both. The
    ancestor that makes most of it counts. ValueError: a name the hierarchy does not hold, or two
    without a common ancestor.
    """
    known = set(parents) | {p for above in parents.values() for p in above}
    for name in names:
        if name not in known:
            raise ValueError(f"the hierarchy does not hold `{name}`")
    above = [_ancestors(name, parents) for name in names]
    depth = {node: 1 + _to_root(node, parents) for each in above for node in each}
    result = np.eye(len(names))
    for i, j in combinations(range(len(names)), 2):
        common = set(above[i]) & set(above[j])
        if not common:
            raise ValueError(f"`{names[i]}` and `{names[j]}` have no common ancestor")
        result[i, j] = result[j, i] = max(
            2 * depth[node] / (2 * depth[node] + above[i][node] + above[j][node]) for node in common
        )
    return result


def _ancestors(name: str, parents: Parents) -> dict[str, int]:
    """Every node above a name, and itself, with the least number of edges."""
    found, front, edges = {name: 0}, [name], 0
    while front:
        edges += 1
        front = [p for node in front for p in parents.get(node, ()) if p not in found]
        found.update(dict.fromkeys(front, edges))
    return found


def _to_root(name: str, parents: Parents) -> int:
    """The least number of edges up to a node without parents."""
    return min(edges for node, edges in _ancestors(name, parents).items() if not parents.get(node))


@dataclass
class Agreement:
    """Spearman's rank correlation of two similarities over all pairs, with a Mantel test."""

    correlation: float
    p_value: float  # one-sided: relabelled classes correlate at least as much
    permutations: int


def agreement(a: Matrix, b: Matrix, *, permutations: int = 10_000, seed: int = 0) -> Agreement:
    """How far two similarity matrices [C, C] order the pairs alike (Mantel, 1967).

    The p-value comes from relabelling one matrix's classes at random: pairs that share a class
    are not independent, so a table of the correlation's distribution would not do.
    ValueError: fewer than three classes, or a matrix whose pairs are all alike.
    """
    from scipy.stats import rankdata

    upper = np.triu_indices(len(a), 1)
    if len(a) < 3:
        raise ValueError(f"an agreement needs at least three classes, got {len(a)}")
    if np.ptp(a[upper]) == 0 or np.ptp(b[upper]) == 0:
        raise ValueError("an agreement needs pairs that differ: all are equally similar")
    x = rankdata(a[upper])
    x = (x - x.mean()) / np.linalg.norm(x - x.mean())
    ranks = np.zeros_like(b)
    y = rankdata(b[upper])
    ranks[upper] = (y - y.mean()) / np.linalg.norm(y - y.mean())
    ranks += ranks.T
    observed = float(x @ ranks[upper])
    generator, reached = np.random.default_rng(seed), 0
    for _ in range(permutations):
        order = generator.permutation(len(b))
        reached += float(x @ ranks[np.ix_(order, order)][upper]) >= observed - 1e-12
    return Agreement(observed, (1 + reached) / (1 + permutations), permutations)

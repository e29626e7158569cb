"""From the paths of images to the neurons of a class: votes weighted by rank.

A neuron at rank r (0: the best) of a path with K neurons per block gets (K - r) / K votes from
that image. Letters: n images, L blocks, K neurons per block and path, h hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def votes(neurons: ArrayLike, widths: Sequence[int]) -> list[NDArray[np.float64]]:
    """Votes of all images: neurons [n, L, K], widths [L] -> per block an array [h].

    Counted in whole numbers and divided once, so the order of the images changes no bit.
    ValueError where a neuron lies outside its block.
    """
    paths = _paths(neurons)
    images, blocks, topk = paths.shape
    if blocks != len(widths):
        raise ValueError(f"paths of {blocks} blocks, but widths of {len(widths)}")
    weights = np.tile(np.arange(topk, 0, -1), images)
    result = []
    for block, width in enumerate(widths):
        chosen = paths[:, block].reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= width):
            raise ValueError(f"block {block}: neurons must lie in 0..{width - 1}")
        counts = np.bincount(chosen, weights=weights, minlength=width)
        result.append(counts / topk)
    return result


def class_votes(
    neurons: ArrayLike, labels: ArrayLike, label: int, widths: Sequence[int]
) -> list[NDArray[np.float64]]:
    """As `votes`, from the images of one class: neurons [n, L, K], labels [n]."""
    return votes(_of_class(neurons, labels, label), widths)


def attribution(
    neurons: ArrayLike, scores: ArrayLike, widths: Sequence[int]
) -> list[NDArray[np.float64]]:
    """Summed score of the paths that hold a neuron, at whatever rank: neurons [n, L, K], scores
    [n], widths [L] -> per block an array [h]. ValueError as in `votes`."""
    paths = _paths(neurons)
    each = np.asarray(scores, np.float64)
    if len(paths) != len(each) or paths.shape[1] != len(widths):
        raise ValueError(
            f"paths of {len(paths)} images and {paths.shape[1]} blocks, but {len(each)} scores "
            f"and widths of {len(widths)}"
        )
    weights = np.repeat(each, paths.shape[2])
    result = []
    for block, width in enumerate(widths):
        chosen = paths[:, block].reshape(-1)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= width):
            raise ValueError(f"block {block}: neurons must lie in 0..{width - 1}")
        summed = np.bincount(chosen, weights=weights, minlength=width)
        result.append(summed.astype(np.float64))
    return result


def top(block_votes: NDArray[np.float64], k: int) -> list[int]:
    """The k most voted neurons of a block, ties by lower index; fewer if fewer have a vote."""
    order = np.argsort(-block_votes, kind="stable")[:k]
    return [int(j) for j in order if block_votes[j] > 0]


def class_top(neurons: ArrayLike, labels: ArrayLike, label: int, k: int) -> list[list[int]]:
    """Per block, the k most voted neurons of one class, best first (see `top`)."""
    paths = _of_class(neurons, labels, label)
    widths = [int(block.max(initial=0)) + 1 for block in paths.swapaxes(0, 1)]
    return [top(v, k) for v in votes(paths, widths)]


def frequency(neurons: ArrayLike, limit: int | None = None) -> list[list[tuple[int, float]]]:
    """Per block, (neuron, share of the images whose path holds it), most frequent first.

    Ranks do not matter here; ties go by lower index; `limit` cuts each list.
    """
    paths = _paths(neurons)
    result = []
    for block in paths.swapaxes(0, 1):  # [n, K]
        found, counts = np.unique(block, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        result.append([(int(found[j]), float(counts[j] / len(paths))) for j in order])
    return result


def _paths(neurons: ArrayLike) -> NDArray[np.integer[Any]]:
    paths = np.asarray(neurons)
    if paths.ndim != 3:
        raise ValueError(f"neurons must be [images, blocks, K], got shape {list(paths.shape)}")
    return paths


def _of_class(neurons: ArrayLike, labels: ArrayLike, label: int) -> NDArray[np.integer[Any]]:
    return _paths(neurons)[np.asarray(labels) == label]

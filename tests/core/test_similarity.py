"""Similarity of classes against counts by hand, and the hierarchies it is compared with."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from npprune.core.attribution.similarity import (
    agreement,
    cluster_order,
    consistency,
    cosine,
    frequency_matrix,
    pairs,
    rank_overlap,
    tree_similarity,
)
from npprune.data.hierarchy import imagenet_hierarchy, read_hierarchy
from npprune.errors import DataError

WIDTHS = [6, 5]
RNG = np.random.default_rng(0)
# two neurons a block, without repeats in a path
NEURONS = np.stack([[RNG.permutation(h)[:2] for h in WIDTHS] for _ in range(12)])
LABELS = np.array([0] * 5 + [4] * 4 + [9] * 3)


def test_frequencies_are_shares_of_images() -> None:
    found = frequency_matrix(NEURONS, LABELS, [0, 4, 9], WIDTHS)
    for l, h in enumerate(WIDTHS):
        for i, c in enumerate([0, 4, 9]):
            for j in range(h):
                own = NEURONS[c == LABELS, l]
                assert found[l][i, j] == np.mean([j in path for path in own])
    with pytest.raises(ValueError, match="class 7 has no images"):
        frequency_matrix(NEURONS, LABELS, [0, 7], WIDTHS)


def test_cosine_is_the_mean_over_blocks() -> None:
    f = frequency_matrix(NEURONS, LABELS, [0, 4, 9], WIDTHS)
    by_hand = np.mean([b[0] @ b[2] / math.sqrt((b[0] @ b[0]) * (b[2] @ b[2])) for b in f])
    found = cosine(f)
    assert found[0, 2] == pytest.approx(by_hand)
    np.testing.assert_allclose(np.diag(found), 1)


def test_rank_overlap_counts_from_the_top() -> None:
    a, b, c = [[1, 2, 3]], [[1, 3, 2]], [[7]]
    found = rank_overlap([a, b, c], 3)
    assert found[0, 1] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found[0, 2] == 0
    assert rank_overlap([a, a], 3)[0, 1] == 1
    short = rank_overlap([[[1]], [[1]]], 5)  # both lists end after one neuron
    assert short[0, 1] == 1
    longer = rank_overlap([[[1]], [[1, 2]]], 5)
    assert longer[0, 1] == pytest.approx((1 + 1 / 2) / 2)


def test_within_class_consistency_is_the_mean_over_pairs_of_images() -> None:
    found = consistency(NEURONS, LABELS, [0, 4, 9], WIDTHS)

    def share(i: int, j: int, l: int) -> float:
        return len(set(NEURONS[i, l]) & set(NEURONS[j, l])) / 2

    for l in range(2):
        within = [
            np.mean([share(i, j, l) for i, j in combinations(np.flatnonzero(c == LABELS), 2)])
            for c in (0, 4, 9)
        ]
        between = [
            np.mean([share(i, j, l) for i in np.flatnonzero(a == LABELS)
                     for j in np.flatnonzero(b == LABELS)])
            for a, b in combinations((0, 4, 9), 2)
        ]  # fmt: skip
        assert found[l].within == pytest.approx(np.mean(within))
        assert found[l].between == pytest.approx(np.mean(between))
        assert found[l].chance == 2 / WIDTHS[l]


def test_a_class_with_one_image_has_no_pairs() -> None:
    one = consistency(NEURONS[:6], np.array([0, 0, 0, 0, 0, 1]), [0, 1], WIDTHS)[0]
    five = consistency(NEURONS[:5], np.zeros(5), [0], WIDTHS)[0]
    assert one.within == five.within
    assert math.isnan(five.between)
    assert math.isnan(consistency(NEURONS[:1], [0], [0], WIDTHS)[0].within)


def test_clusters_stand_together() -> None:
    like = np.array([[1, 0.1, 0.9, 0], [0.1, 1, 0, 0.8], [0.9, 0, 1, 0.1], [0, 0.8, 0.1, 1]])
    order = cluster_order(like)
    assert sorted(order) == [0, 1, 2, 3]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset((0, 2)), frozenset((1, 3))}
    assert cluster_order(like[:2, :2]) == [0, 1]
    assert [p[1:] for p in pairs(like)[:2]] == [(0, 2), (1, 3)]


def test_wu_palmer_takes_the_best_common_node() -> None:
    parents = {"a": ["x"], "b": ["x"], "c": ["y"], "x": ["top", "y"], "y": ["top"]}
    found = tree_similarity(["a", "b", "c"], parents)
    # x: above it y, then top; the shortest way to the top is one edge, so its depth is 2
    assert found[0, 1] == 2 * 2 / (2 * 2 + 1 + 1)
    assert found[0, 2] == 2 * 2 / (2 * 2 + 2 + 1)  # over y, not over the top
    assert found[0, 0] == 1
    with pytest.raises(ValueError, match="does not hold `z`"):
        tree_similarity(["a", "z"], parents)
    with pytest.raises(ValueError, match="`a` and `q` have no common ancestor"):
        tree_similarity(["a", "q"], {**parents, "q": ["elsewhere"]})


def test_agreement_is_spearmans_and_its_p_value_counts_relabellings() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(9, 2))
    far = np.linalg.norm(points[:, None] - points[None], axis=-1)
    a = np.exp(-far)
    noise = rng.normal(scale=0.05, size=a.shape)
    b = a + noise + noise.T
    upper = np.triu_indices(9, 1)
    found = agreement(a, b, permutations=500)
    assert found.correlation == pytest.approx(spearmanr(a[upper], b[upper]).statistic)
    assert found.p_value == pytest.approx(1 / 501)
    unrelated = rng.normal(size=(9, 9))
    assert agreement(a, unrelated + unrelated.T, permutations=500).p_value > 0.05
    assert agreement(a, a, permutations=50).correlation == pytest.approx(1)
    with pytest.raises(ValueError, match="at least three classes, got 2"):
        agreement(a[:2, :2], b[:2, :2])
    with pytest.raises(ValueError, match="all are equally similar"):
        agreement(np.ones((4, 4)), a[:4, :4])


def test_imagenet_synsets_all_reach_the_root() -> None:
    from timm.data import ImageNetInfo

    info, parents = ImageNetInfo(), imagenet_hierarchy()
    names = [info.index_to_label_name(i) for i in range(1000)]
    for name in names:
        node = name
        while node in parents:
            node = parents[node][0]
        assert node == "entity.00001740", name
    tabby, tiger_cat, tench, coffee_mug = "n02123045", "n02123159", "n01440764", "n03063599"
    found = tree_similarity([tabby, tiger_cat, tench, coffee_mug], parents)
    assert found[0, 1] > found[0, 2] > found[0, 3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h.json", json.dumps({"a": "x", "b": ["x", "y"]})),
        ("h.tsv", "# a comment\na\tx\nb\tx\nb\ty\n"),
        ("wordnet.is_a.txt", "x a\nx b\ny b\n"),
    ],
)
def test_hierarchies_from_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert read_hierarchy(path) == {"a": ["x"], "b": ["x", "y"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.json", "{", "is not valid JSON"),
        ("h.json", "[]", "must hold an object"),
        ("h.json", '{"a": 3}', "`a` must have a parent or a list of them, got 3"),
        ("h.tsv", "a x\n", r"`:1 must be `child<TAB>parent`, got `a x`"),
        ("h.tsv", "# nothing\n", "is empty"),
        ("absent.tsv", None, "cannot read hierarchy"),
    ],
)
def test_bad_hierarchies_are_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_hierarchy(tmp_path / name)

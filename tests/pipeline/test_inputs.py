"""What stages begin with: class names of checkpoints, and labels that do not fit the network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from npprune.data.labels import KnownNames
from npprune.data.opening import open_source
from npprune.data.sources import ImageSource
from npprune.pipeline.common.inputs import dense_names, label_doubt
from npprune.records import ClassInfo
from npprune.store.checkpoints import read_config
from tests.helpers.digits_network import random_digits_network


@pytest.fixture
def source() -> ImageSource:
    return open_source("digits:test")


def test_labels_that_fit_are_not_doubted(source: ImageSource) -> None:
    labels = torch.arange(10).repeat(2)
    assert label_doubt(labels, labels, 10, source) == ""
    weak = torch.where(torch.arange(20) < 8, labels, (labels + 1) % 10)
    assert label_doubt(weak, labels, 10, source) == ""


@pytest.mark.parametrize("n", [0, 2])
def test_few_images_are_no_reason_for_doubt(source: ImageSource, n: int) -> None:
    labels = torch.zeros(n, dtype=torch.long)
    assert label_doubt(labels + 1, labels, 10, source) == ""


def test_a_network_no_better_than_chance_puts_labels_in_doubt(source: ImageSource) -> None:
    labels = torch.arange(10).repeat(2)
    said = label_doubt((labels + 1) % 10, labels, 10, source)
    assert said.startswith("labels are probably shifted: the dense network is right on 0 of 20")
    assert "chance is 10.0 %" in said
    assert "--class-map" in said
    assert "npprune predict" in said


def test_the_other_order_is_named_where_it_is_right(source: ImageSource) -> None:
    source.text_order = {0: 0, 1: 1, 2: 9, **{i: i - 1 for i in range(3, 10)}}
    labels = torch.arange(10).repeat(4)
    right = torch.tensor([source.text_order[int(y)] for y in labels])
    said = label_doubt(right, labels, 10, source)
    assert "is right on 8 of 40" in said
    assert "plain text order, as torchvision does, it is right on 40 (100.0 %)" in said


def test_names_of_a_cut_head_are_those_of_the_dense_labels(tmp_path: Path) -> None:
    config = read_config(random_digits_network(tmp_path / "dense"))
    config = replace(config, classes=[ClassInfo(i, f"digit {i}") for i in range(10)])
    assert dense_names(config) == KnownNames(config.classes)
    few = [replace(c, index=i) for i, c in enumerate(config.classes[3:5])]
    cut = replace(config, classes=few, num_classes=2, details={"outputs": [3, 4]})
    names = dense_names(cut)
    assert [(c.index, c.name) for c in names.classes] == [(3, "digit 3"), (4, "digit 4")]
    assert names.within == {3, 4}
    again = dense_names(replace(cut, details={"cut": True}))
    assert again.within == {0, 1}

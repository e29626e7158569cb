"""Images that a caller holds: every form gives the same images and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from npprune.data.given import AsGiven, Given, open_given
from npprune.data.labels import Asked, KnownNames
from npprune.data.loading import batches
from npprune.data.sources import ImageSource
from npprune.errors import DataError
from npprune.records import ClassInfo, Preprocessing

PRE = Preprocessing(input_size=(3, 8, 8))
IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 4


class Plain(Dataset[Any]):
    """With `targets` and `classes`, as torchvision's; `opened` are the positions that were read."""

    def __init__(self, **own: Any) -> None:
        self.opened: list[int] = []
        vars(self).update(own)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.opened.append(i)
        return IMAGES[i], int(LABELS[i])

    def __len__(self) -> int:
        return len(IMAGES)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from zip(IMAGES, LABELS.tolist(), strict=True)


class Batches:
    """Neither a list nor a loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(IMAGES.split(6), LABELS.split(6), strict=True)


def opened(images: Any, **asked: Any) -> ImageSource:
    return open_given(Given(images), "memory:images", Asked(**{"num_classes": 4, **asked}))


def read(source: ImageSource) -> list[tuple[int, Tensor, int]]:
    """(position in what was given, image, label), by position."""
    found = []
    for batch in batches(source, AsGiven(PRE), 7):
        rows = zip(batch.ids, batch.images, batch.labels.tolist(), strict=True)
        found += [(int(name), image, label) for name, image, label in rows]
    return sorted(found, key=lambda row: row[0])


FORMS: dict[str, Any] = {
    "tensors": (IMAGES, LABELS),
    "arrays": (IMAGES.numpy(), LABELS.numpy().astype(np.uint8)),
    "doubles": [IMAGES.double(), LABELS.tolist()],
    "samples": list(zip(IMAGES, LABELS, strict=True)),
    "batches": list(zip(IMAGES.split(6), LABELS.split(6), strict=True)),
    "data set": TensorDataset(IMAGES, LABELS),
    "with targets": Plain(targets=LABELS.tolist()),
    "without": Plain(),
    "wrong targets": Plain(targets=["a"] * 20),
    "loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6),
    "shuffled": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=6, shuffle=True),
    "collated": DataLoader(
        TensorDataset(IMAGES, LABELS),
        6,
        collate_fn=lambda s: tuple(map(torch.stack, zip(*s, strict=True))),
    ),
    "streamed": DataLoader(Stream(), batch_size=6),
    "anything": Batches(),
    "three of a sample": [(x, y, "name") for x, y in zip(IMAGES, LABELS, strict=True)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str) -> None:
    source = opened(FORMS[form])
    for found in (read(source), read(source)):  # as often as one likes
        assert [i for i, _, _ in found] == list(range(20))
        assert torch.equal(torch.stack([x for _, x, _ in found]), IMAGES)
        assert [y for _, _, y in found] == LABELS.tolist()
    assert source.label_rule == "the loader"


@pytest.mark.parametrize("form", ["tensors", "without", "anything"])
def test_classes_and_images_of_each_are_chosen(form: str) -> None:
    found = read(opened(FORMS[form], classes=[1, 3], images_per_class=2))
    assert [(i, y) for i, _, y in found] == [(1, 1), (3, 3), (5, 1), (7, 3)]


def test_a_data_set_that_knows_its_labels_is_opened_only_where_it_is_read() -> None:
    data = Plain(targets=LABELS.tolist())
    source = opened(Subset(data, [4, 5, 6, 7]), classes=[2])
    assert data.opened == []
    assert [(i, y) for i, _, y in read(source)] == [(2, 2)]
    assert data.opened == [6]


def test_a_loader_that_takes_some_is_iterated() -> None:
    data = TensorDataset(IMAGES, LABELS)
    some = DataLoader(data, 4, sampler=RandomSampler(data, num_samples=8))
    dropped = DataLoader(data, 6, drop_last=True)
    assert len(read(opened(some))) == 8
    assert len(read(opened(dropped))) == 18


def test_pil_images_are_prepared_as_the_network_says() -> None:
    grey = [(Image.new("L", (20, 10), 51 * i), i) for i in range(4)]
    found = read(opened(grey))
    values = torch.stack([x for _, x, _ in found])
    assert values.shape == (4, 3, 8, 8)
    assert torch.allclose(values[:, 0, 0, 0], (torch.arange(4) * 0.2 - 0.5) / 0.5, atol=1e-6)


def test_labels_that_are_missing_are_predicted_or_left_out() -> None:
    def own(images: Sequence[Any]) -> Tensor:
        return (torch.stack(list(map(AsGiven(PRE), images))).mean((1, 2, 3)) > 0).long()

    expected = own(list(IMAGES)).tolist()
    grey = [Image.new("L", (20, 10), 51 * i) for i in range(4)]
    source = open_given(Given(grey, own), "x", Asked(num_classes=4))
    assert [y for _, _, y in read(source)] == [0, 0, 0, 1]
    for images in (IMAGES, list(IMAGES.split(6)), TensorDataset(IMAGES)):
        source = open_given(Given(images, own), "x", Asked(num_classes=4))
        assert [y for _, _, y in read(source)] == expected
        assert "own predictions" in source.label_rule
        unknown = open_given(Given(images), "x", Asked(num_classes=4))
        assert {y for _, _, y in read(unknown)} == {-1}
        assert unknown.selected == []
        with pytest.raises(DataError, match="measured by their labels"):
            open_given(Given(images, labelled=True), "x", Asked(num_classes=4))
        with pytest.raises(DataError, match="chooses images by their labels"):
            open_given(Given(images), "x", Asked(num_classes=4, classes=[1]))


def test_names_are_the_networks_else_the_data_sets() -> None:
    data = Plain(targets=LABELS.tolist(), classes=["ant", "bee", "cat", "dog"])
    assert [c.name for c in opened(data).classes] == ["ant", "bee", "cat", "dog"]
    assert opened(data, classes=["Bee"]).selected == [1]
    known = KnownNames([ClassInfo(i, f"n{i}") for i in range(4)])
    assert [c.name for c in opened(data, known=known).classes] == ["n0", "n1", "n2", "n3"]


def test_a_cut_head_leaves_the_other_classes_out() -> None:
    known = KnownNames([ClassInfo(i, str(i)) for i in range(4)], within=frozenset({0, 2}))
    for form in ("tensors", "anything"):
        assert {y for _, _, y in read(opened(FORMS[form], known=known))} == {0, 2}


def test_other_images_of_the_same_labels_are_told_apart() -> None:
    changed = IMAGES.clone()
    changed[0] += 1
    for a, b in (
        ((IMAGES, LABELS), (changed, LABELS)),
        (FORMS["batches"], list(zip(changed.split(6), LABELS.split(6), strict=True))),
    ):
        first, again, second = opened(a).content, opened(a).content, opened(b).content
        assert first is not None
        assert again is not None
        assert second is not None
        assert first() == again() != second()


def test_a_data_set_whose_labels_contradict_its_list_is_refused() -> None:
    with pytest.raises(DataError, match=r"image 3 .* has label 3, and its list of labels says 0"):
        read(opened(Plain(targets=((LABELS + 1) % 4).tolist())))

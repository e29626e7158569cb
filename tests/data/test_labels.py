"""Labels by the network's own class names; ranks where none are known; text files as people save
them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from npprune.data.labels import KnownNames, choose_classes, find_labels, read_class_map
from npprune.data.opening import open_source
from npprune.errors import DataError
from npprune.records import ClassInfo, plain_text

ANIMALS = ["ant", "bee", "cat", "dog"]


def named(*names: str, **options: object) -> KnownNames:
    return KnownNames([ClassInfo(i, name) for i, name in enumerate(names)], **options)  # type: ignore[arg-type]


def index(names: list[str], known: KnownNames, num_classes: int | None = None) -> dict[str, int]:
    return find_labels(names, known=known, num_classes=num_classes or len(known.classes)).index


# ---------------------------------------------------------------- names that are known


def test_names_decide_and_a_missing_class_is_fine() -> None:
    labels = find_labels(["bee", "cat", "dog"], known=named(*ANIMALS), num_classes=4)
    assert labels.index == {"bee": 1, "cat": 2, "dog": 3}
    assert labels.rule == "the network's class names"
    assert [c.name for c in labels.classes] == ANIMALS
    assert labels.notes == []


def test_another_set_of_classes_is_refused_with_both_lists() -> None:
    with pytest.raises(DataError) as caught:
        find_labels(["bee", "cat", "elk"], known=named(*ANIMALS), num_classes=4, where="val")
    assert caught.value.message == (
        "`elk` is none of the network's 4 classes: `ant`, `bee`, `cat`, `dog`; the other names in "
        "val: `bee`, `cat`"
    )
    assert "class_map=FILE" in str(caught.value.hint)
    assert "classes=bee,cat" in str(caught.value.hint)


def test_the_class_map_that_the_network_was_made_with_is_named() -> None:
    with pytest.raises(DataError, match=r"`fox`, `elk` are none") as caught:
        index(["fox", "elk"], named(*ANIMALS, class_map="map.json"))
    assert "`class_map=map.json`" in str(caught.value.hint)


def test_chosen_classes_leave_the_others_out() -> None:
    labels = find_labels(["bee", "elk"], known=named(*ANIMALS), num_classes=4, some=True)
    assert labels.index == {"bee": 1}
    assert choose_classes("bee", labels) == [1]
    with pytest.raises(DataError, match="unknown class `elk`"):
        choose_classes("elk", labels)


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (["Ant", "BEE"], ["ant", "bee"], {"Ant": 0, "BEE": 1}),
        (["cafe\u0301"], ["ant", "caf\u00e9"], {"cafe\u0301": 1}),  # as macOS writes it
        (["n01440764"], ["ant", "tench"], {"n01440764": 1}),
        (["tench"], ["ant", "n01440764"], {"tench": 1}),
        (["ant", "Ant"], ["Ant", "ant"], {"ant": 1, "Ant": 0}),
    ],
)
def test_names_match_without_case_and_as_synsets(
    names: list[str], classes: list[str], expected: dict[str, int]
) -> None:
    assert index(names, named(*classes)) == expected


@pytest.mark.parametrize(
    ("names", "classes"), [(["ANT"], ["Ant", "ant"]), (["ant", "ANT"], ["Ant", "bee"])]
)
def test_a_name_that_may_mean_two_is_refused(names: list[str], classes: list[str]) -> None:
    with pytest.raises(DataError, match="none of the network's 2 classes"):
        index(names, named(*classes))


def test_a_class_map_decides_over_names_and_the_rest_keep_theirs(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("x\ny\n")
    labels = find_labels(["y"], known=named(*ANIMALS), num_classes=4, class_map=file)
    assert labels.index == {"y": 1}
    assert [c.name for c in labels.classes] == ["x", "y", "cat", "dog"]


def test_numbers_as_names_are_the_digits_where_all_are_there() -> None:
    digits = named(*"0123456789")
    assert index(["3", "5"], digits) == {"3": 3, "5": 5}
    shifted = [str(i) for i in range(1, 11)]
    labels = find_labels(shifted, known=digits, num_classes=10)
    assert labels.rule == "folder rank"  # the names are placeholders: `10` is none of them
    assert labels.index["10"] == 9


def test_ranks_count_where_they_agree_with_the_few_names_that_are_known() -> None:
    known = named("ant", "bee", "2", "3")
    assert index(ANIMALS, known) == {"ant": 0, "bee": 1, "cat": 2, "dog": 3}
    with pytest.raises(DataError, match=r"`aardvark`.* none of the network's 2 classes"):
        index(["aardvark", "ant", "bee"], known)


def test_class_names_of_imagenet_are_found_without_a_map() -> None:
    labels = find_labels(["goldfish", "tench"], num_classes=1000)
    assert labels.rule == "ImageNet class names"
    assert labels.index == {"goldfish": 1, "tench": 0}


# ---------------------------------------------------------------- networks cut to some classes


def test_a_cut_network_leaves_the_other_classes_out_and_counts_them() -> None:
    cut = named("bee", "dog", within=frozenset({0, 1}))
    images = {"ant": 5, "bee": 3, "cat": 6, "dog": 2}
    labels = find_labels(ANIMALS, known=cut, num_classes=2, images=images)
    assert labels.index == {"bee": 0, "dog": 1}
    assert labels.notes == [
        "left out: `ant`, `cat`, with 11 images: the network's head was cut to `bee`, `dog`"
    ]
    with pytest.raises(DataError, match="none of the network's 2 classes"):
        find_labels(["ant", "cat"], known=cut, num_classes=2)


def test_a_class_that_the_head_was_cut_from_cannot_be_chosen(tmp_path: Path) -> None:
    for name in ANIMALS:
        picture(tmp_path / "data" / name / "x.png")
    file = tmp_path / "map.txt"
    file.write_text("\n".join(ANIMALS))
    cut = KnownNames([ClassInfo(1, "bee"), ClassInfo(3, "dog")], within=frozenset({1, 3}))
    (tmp_path / "data" / "ant" / "x.png").unlink()  # an empty folder of a class that is left out
    spec = f"folder:{tmp_path / 'data'}"
    for class_map in (None, file):
        source = open_source(spec, num_classes=4, known=cut, class_map=class_map)
        assert source.selected == [1, 3]
        with pytest.raises(DataError, match=r"class `0` is not one of the 2 .*: `bee`, `dog`"):
            open_source(spec, num_classes=4, known=cut, class_map=class_map, classes=[0])


def test_digits_of_a_network_cut_to_some() -> None:
    cut = named("3", "5", within=frozenset({0, 1}))
    source = open_source("digits:test", num_classes=2, known=cut)
    assert source.selected == [0, 1]
    assert source.length == 80


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["class1", "class2", "class10"], "the classes are class1, class10, class2:"),
        (["ant", "Zebra"], "the classes are Zebra, ant:"),
    ],
)
def test_two_orders_of_names_are_both_said(names: list[str], shown: str) -> None:
    labels = find_labels(names)
    assert len(labels.notes) == 1
    assert f"natural order ({', '.join(names)})" in labels.notes[0]
    assert shown in labels.notes[0]
    assert "--class-map" in labels.notes[0]
    assert labels.text_order is not None
    assert [names[labels.text_order[i]] for i in range(len(names))] != names


def test_one_order_of_names_needs_no_word() -> None:
    labels = find_labels(ANIMALS)
    assert labels.notes == []
    assert labels.text_order is None


def test_names_that_were_ranks_remember_the_other_order() -> None:
    labels = find_labels(["b2"], known=named("b1", "b2", "b10", ranked=True), num_classes=3)
    assert labels.rule == "the network's class names, once given by folder rank"
    assert labels.text_order == {0: 0, 1: 2, 2: 1}


# ---------------------------------------------------------------- text of other programs


@pytest.mark.parametrize(
    ("name", "text"), [("map.txt", "ant\nbee\n"), ("map.json", '["ant", "bee"]')]
)
def test_a_byte_order_mark_is_left_out(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8-sig")
    assert list(read_class_map(file)) == ["ant", "bee"]
    listed = tmp_path / "some.txt"
    listed.write_text("bee\n", encoding="utf-8-sig")
    assert choose_classes(str(listed), find_labels(["ant", "bee"])) == [1]


def test_text_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text("ant\n", encoding="utf-16")
    with pytest.raises(DataError, match="it is not UTF-8 text") as caught:
        read_class_map(file)
    assert caught.value.hint == "save it as UTF-8"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def test_names_that_are_not_utf8_are_written_as_text(tmp_path: Path) -> None:
    folder, file = os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff.png")
    try:
        (tmp_path / folder).mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    picture(tmp_path / folder / "x.png")
    (tmp_path / folder / "x.png").rename(tmp_path / folder / file)
    source = open_source(f"folder:{tmp_path}")
    assert source.items is not None
    assert [item.id for item in source.items] == ["caf\\xe9/\\xff.png"]
    assert source.name(0) == "caf\\xe9"
    assert len(source.info().sha256) == 64
    assert source.load(0).size == (4, 4)
    assert plain_text("caf\u00e9") == "caf\u00e9"

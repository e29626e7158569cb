"""Sources: which labels a folder gets, which images are taken, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npprune.data.digits import split_positions
from npprune.data.opening import open_source
from npprune.data.unlabelled import open_unlabelled
from npprune.errors import DataError

TENCH, COCK, TABBY = "n01440764", "n01514668", "n02123045"


def picture(path: Path, value: int = 128, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 20, 30)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two plain classes with 3 and 2 images."""
    for name in ("b.png", "a.JPG", "deep/c.jpeg"):
        picture(tmp_path / "images" / "dog" / name)
    for name in ("z.png", "y.png"):
        picture(tmp_path / "images" / "cat" / name)
    return tmp_path / "images"


@pytest.fixture
def synsets(tmp_path: Path) -> Path:
    """Three ImageNet synset folders, one image each."""
    for name in (TABBY, TENCH, COCK):
        picture(tmp_path / "synsets" / name / "x.jpg")
    return tmp_path / "synsets"


def test_plain_folders_get_their_rank_and_items_are_sorted(folder: Path) -> None:
    source = open_source(f"folder:{folder}")
    assert source.label_rule == "folder rank"
    assert source.items is not None
    assert [(item.id, item.label) for item in source.items] == [
        ("cat/y.png", 0),
        ("cat/z.png", 0),
        ("dog/a.JPG", 1),
        ("dog/b.png", 1),
        ("dog/deep/c.jpeg", 1),
    ]
    assert [c.name for c in source.classes] == ["cat", "dog"]
    assert source.selected == [0, 1]
    assert source.length == 5
    assert source.load(2).size == (12, 10)


def test_ranks_follow_the_natural_order_of_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "0"):
        picture(tmp_path / name / "x.png")
    source = open_source(f"folder:{tmp_path}")
    assert [c.name for c in source.classes] == ["0", "2", "10"]
    assert "`10` has label 2" in source.notes[0]


def test_synset_folders_get_the_imagenet_index_and_name(synsets: Path) -> None:
    source = open_source(f"folder:{synsets}", num_classes=1000)
    assert source.label_rule == "ImageNet synset folders"
    assert source.selected == [0, 7, 281]
    assert len(source.classes) == 1000
    assert source.name(281) == "tabby"
    assert source.classes[281].synset == TABBY


@pytest.mark.parametrize("num_classes", [21843, 21841, 11821])
def test_larger_imagenets_have_their_own_index(synsets: Path, num_classes: int) -> None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = ImageNetInfo(infer_imagenet_subset({"num_classes": num_classes})).label_names()
    source = open_source(f"folder:{synsets}", num_classes=num_classes)
    assert source.selected == sorted(names.index(name) for name in (TENCH, COCK, TABBY))
    assert source.selected != [0, 7, 281]


def test_synset_folders_of_a_small_model_get_their_rank(synsets: Path) -> None:
    source = open_source(f"folder:{synsets}", num_classes=3)
    assert source.label_rule == "folder rank"
    assert source.selected == [0, 1, 2]


def test_a_synset_among_other_names_is_refused(synsets: Path) -> None:
    picture(synsets / "cat" / "x.png")
    with pytest.raises(DataError, match=r"class `cat` in .* is no ImageNet synset") as caught:
        open_source(f"folder:{synsets}", num_classes=1000)
    assert "class_map" in str(caught.value.hint)


def test_a_synset_outside_the_models_imagenet_is_refused(synsets: Path) -> None:
    picture(synsets / "n00004475" / "x.png")
    with pytest.raises(DataError, match=r"`n00004475` in .* is not one of the 1000 ImageNet"):
        open_source(f"folder:{synsets}")


def test_fewer_folders_than_outputs_is_said(folder: Path) -> None:
    source = open_source(f"folder:{folder}", num_classes=1000)
    assert source.notes == [
        "labels are folder ranks 0..1, and the model has 1000 classes; "
        "a class map (--class-map FILE) says otherwise"
    ]


def test_a_label_without_an_output_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"class `dog` in .* has label 1 \(folder rank\).* 0\.\.0"):
        open_source(f"folder:{folder}", num_classes=1)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "dog\nbird\ncat\n"),
        ("map.json", json.dumps({"dog": 0, "bird": 1, "cat": 2})),
        ("map.json", json.dumps({"0": "dog", "1": "bird", "2": "cat"})),
        ("map.json", json.dumps(["dog", "bird", "cat"])),
        ("map.json", json.dumps({"0": ["dog", "dog"], "1": ["b", "bird"], "2": ["cat", "cat"]})),
    ],
)
def test_every_form_of_a_class_map(folder: Path, tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    source = open_source(f"folder:{folder}", class_map=file)
    assert source.label_rule == f"class map {file}"
    assert [(c.index, c.name) for c in source.classes] == [(0, "dog"), (1, "bird"), (2, "cat")]
    assert source.items is not None
    assert [item.label for item in source.items] == [0, 0, 0, 2, 2]


def test_a_class_map_wins_over_synsets(synsets: Path, tmp_path: Path) -> None:
    file = tmp_path / "map.txt"
    file.write_text(f"{TABBY}\n{COCK}\n{TENCH}\n")
    source = open_source(f"folder:{synsets}", num_classes=1000, class_map=file)
    assert source.selected == [0, 1, 2]
    assert source.name(0) == "tabby"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.txt", "dog\ndog\n", "names `dog` twice"),
        ("map.txt", "dog\n\ncat\n", "entry 2 must be a name"),
        ("map.txt", "", "is empty"),
        ("map.txt", "dog\ncow\n", r"class `cat` in .* is not in the class map"),
        ("map.json", "{", "is not valid JSON"),
        ("map.json", "3", "must hold an object or a list"),
        ("map.json", "{}", "must hold an object or a list"),
        ("map.json", '{"dog": 0, "dog": 1}', "has the key `dog` twice"),
        ("map.json", '{"dog": -1, "cat": 0}', "a label must be 0 or more"),
        ("map.json", '{"dog": true, "cat": 0}', "cannot read `dog: true`"),
        ("map.json", '{"dog": "cat"}', 'cannot read `dog: "cat"`'),
        ("map.json", '{"0": "cat", "1": "cat"}', "names `cat` twice"),
        ("map.yaml", "cat: 0", "must be a .txt or .json file"),
    ],
)
def test_bad_class_maps(folder: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{folder}", class_map=file)


def test_a_missing_class_map(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read class map .*none\.txt.*No such file"):
        open_source(f"folder:{folder}", class_map=tmp_path / "none.txt")


@pytest.mark.parametrize(
    "classes",
    [
        [281, 0],
        ["281", TENCH],
        "tench, TABBY",
        "Tabby Cat,n01440764",
        "tabby, tabby cat,tench",
    ],
)
def test_classes_by_index_synset_and_name(synsets: Path, classes: list[str | int] | str) -> None:
    assert open_source(f"folder:{synsets}", classes=classes).selected == [0, 281]


def test_a_name_with_commas_is_one_class(synsets: Path) -> None:
    assert open_source(f"folder:{synsets}", classes="tench, Tinca tinca").selected == [0]


def test_classes_from_a_file(synsets: Path, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("tench\n\n7\n")
    assert open_source(f"folder:{synsets}", classes=str(file)).selected == [0, 7]


@pytest.mark.parametrize(
    ("classes", "message", "hint"),
    [
        ("tensh", "unknown class `tensh`", "`tench`"),
        ("crane", r"`crane` is ambiguous: 134 crane \(n02012849\), 517", "index or synset"),
        ([1000], r"class index `1000` must be one of 0\.\.999", None),
        ([-1], "class index `-1` must be", None),
        ([], "at least one class", None),
        ("none.txt", "class file `none.txt` does not exist", "one index"),
        ([1], r"no images in .* of class 1 \(goldfish\)", "that it holds"),
    ],
)
def test_bad_classes(
    synsets: Path, classes: list[str | int] | str, message: str, hint: str | None
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(f"folder:{synsets}", num_classes=1000, classes=classes)
    assert hint is None or hint in str(caught.value.hint)


def test_an_index_that_is_also_another_class_name_is_ambiguous(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        picture(tmp_path / name / "x.png")
    with pytest.raises(DataError, match="class `2` is ambiguous: 1 2, 2 3"):
        open_source(f"folder:{tmp_path}", classes="2")
    assert open_source(f"folder:{tmp_path}", classes=[2]).selected == [2]


def test_images_per_class_takes_the_first_of_each(folder: Path) -> None:
    source = open_source(f"folder:{folder}", images_per_class=1)
    assert source.items is not None
    assert [item.id for item in source.items] == ["cat/y.png", "dog/a.JPG"]
    with pytest.raises(DataError, match="`images_per_class` must be 1 or more, got 0"):
        open_source(f"folder:{folder}", images_per_class=0)


def test_info_counts_skipped_images_and_hashes_ids_and_labels(folder: Path, tmp_path: Path) -> None:
    source = open_source(f"folder:{folder}")
    info = source.info(["cat/y.png"])
    assert (info.images, info.classes, info.skipped) == (4, 2, ["cat/y.png"])
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert open_source(f"folder:{moved}").info().sha256 == info.sha256
    picture(moved / "cat" / "x.png")
    assert open_source(f"folder:{moved}").info().sha256 != info.sha256


def test_other_files_are_ignored(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "README").write_text("no class")
    picture(folder / ".cache" / "x.png")
    picture(folder / "cat" / "._y.png")
    assert open_source(f"folder:{folder}").length == 5


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source(f"folder:{tmp_path / 'none'}")
    with pytest.raises(DataError, match="the folder is empty"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no images below") as caught:
        open_source(f"folder:{tmp_path}")
    assert ".jpg" in str(caught.value.hint)
    with pytest.raises(DataError, match="is a file, not an image folder"):
        open_source(f"folder:{tmp_path / 'cat' / 'notes.txt'}")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    with pytest.raises(DataError, match="holds images without class folders") as caught:
        open_source(f"folder:{tmp_path}")
    assert "folder of its own" in str(caught.value.hint)


def test_a_class_without_images_is_refused_unless_left_out(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder .*empty` has no images"):
        open_source(f"folder:{folder}")
    assert open_source(f"folder:{folder}", classes="cat").length == 2


def test_a_folder_of_splits_is_refused(folder: Path) -> None:
    (folder / "cat").rename(folder / "train")
    (folder / "dog").rename(folder / "val")
    with pytest.raises(DataError, match=r"holds splits \(train, val\)") as caught:
        open_source(f"folder:{folder}")
    assert f"folder:{folder / 'train'}" in str(caught.value.hint)


def test_empty_folders_are_named_before_ranks(folder: Path) -> None:
    for name in ("@eaDir", "lost+found", "apple"):
        (folder / name).mkdir()
    (folder / "apple" / "0.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"class folder .*apple` has no images, only 1 \.heic"):
        open_source(f"folder:{folder}", num_classes=2)
    (folder / "apple" / "0.heic").unlink()
    (folder / "apple").rmdir()
    assert open_source(f"folder:{folder}", num_classes=2).selected == [0, 1]


def test_a_second_link_to_a_class_is_named(folder: Path) -> None:
    (folder / "hound").symlink_to(folder / "dog")
    with pytest.raises(DataError, match=r"hound` has no images: it is a link to what is read"):
        open_source(f"folder:{folder}")


def test_what_is_left_out_is_noted(folder: Path) -> None:
    picture(folder / "loose.png")
    (folder / "cat" / "a.heic").write_bytes(b"")
    (folder / "dog" / "all").symlink_to("..")
    assert open_source(f"folder:{folder}").notes == [
        f"`{folder}`: left out 1 image beside the class folders, e.g. `loose.png`",
        f"`{folder}`: left out 1 file that is no image npprune reads: 1 .heic",
        f"`{folder}`: link `dog/all` leads to what is read under another name; each file counts "
        "once",
    ]
    assert len(open_source(f"folder:{folder}", classes="cat").notes) == 2


def test_files_of_every_ending_are_read(tmp_path: Path) -> None:
    for name in ("a/0.jfif", "a/1.gif", "b/2.JPE", "b/3.pnm"):
        kind = {".jfif": "JPEG", ".JPE": "JPEG", ".pnm": "PPM"}.get(Path(name).suffix)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, kind)
    source = open_source(f"folder:{tmp_path}")
    assert [source.load(i).size for i in range(4)] == [(4, 4)] * 4


@pytest.mark.parametrize(
    ("images", "message", "suggested"),
    [
        ("set/train/a set/train/b set/val/a set/val/b", r"holds one folder \(set\)", "set/train"),
        ("set/a set/b", r"holds one folder \(set\)", "set"),
        ("train/a train/b val/a val/b", r"holds splits \(train, val\)", "train"),
        ("train/a train/b val/a val/b doc", r"holds splits \(train, val\)", "val"),
        ("x/train/a x/train/b y/train/a y/train/b", r"holds data sets \(x, y\)", "y/train"),
        ("s/train/a/images s/train/b/images s/test", r"holds one folder \(s\)", "s/train"),
    ],
)
def test_one_level_too_high(tmp_path: Path, images: str, message: str, suggested: str) -> None:
    for name in images.split():
        picture(tmp_path / name / "0.png")
    with pytest.raises(DataError, match=message) as caught:
        open_source(f"folder:{tmp_path}", num_classes=4)
    assert f"`folder:{tmp_path / suggested}`" in str(caught.value.hint)
    assert open_source(f"folder:{tmp_path / suggested}").length == 2


def test_folders_of_folders_are_noted(tmp_path: Path) -> None:
    for name in ("cat/a", "cat/b", "dog/a", "dog/b"):
        picture(tmp_path / name / "0.png")
    (note,) = open_source(f"folder:{tmp_path}").notes
    assert note.endswith(
        "(cat, dog) counts as one class, and holds folders of images; if those are the classes, "
        f"did you mean `folder:{tmp_path / 'cat'}` or `folder:{tmp_path / 'dog'}`?"
    )


@pytest.mark.parametrize("more", ["", "out/none"])
def test_errors_about_classes_say_that_they_may_lie_deeper(tmp_path: Path, more: str) -> None:
    for name in ("x/a", "x/b", "y/train/a", "y/train/b", "z/data/a"):
        picture(tmp_path / name / "0.png")
    (tmp_path / more).mkdir(parents=True, exist_ok=True)
    message = "out` has no images" if more else "class `z` in .* has label 2"
    with pytest.raises(DataError, match=message) as caught:
        open_source(f"folder:{tmp_path}", num_classes=2)
    assert f"did you mean `folder:{tmp_path / 'x'}` or `folder:" in str(caught.value.hint)


def test_one_class_may_hold_folders_where_a_map_names_it(tmp_path: Path) -> None:
    for name in ("cat/a", "cat/b"):
        picture(tmp_path / "data" / name / "0.png")
    file = tmp_path / "map.txt"
    file.write_text("cat\n")
    assert open_source(f"folder:{tmp_path / 'data'}", class_map=file).notes == []


@pytest.mark.parametrize("images", ["a/images b/images", "a b/deep/x b/deep/y", "a/x/y/z b"])
def test_class_folders_may_be_deep(tmp_path: Path, images: str) -> None:
    for name in images.split():
        picture(tmp_path / name / "0.png")
    source = open_source(f"folder:{tmp_path}")
    assert (source.selected, source.notes) == ([0, 1], [])


def test_unlabelled_images_are_found_by_the_same_rule(folder: Path) -> None:
    picture(folder / "loose.png")
    picture(folder / "cat" / ".ipynb_checkpoints" / "z.png")
    (folder / "cat" / "a.heic").write_bytes(b"")
    (folder / "dog" / "all").symlink_to("..")
    source = open_unlabelled(f"folder:{folder}")
    assert (source.length, len(source.notes)) == (6, 2)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data source") as caught:
        open_source(str(tmp_path))
    assert f"`folder:{tmp_path}`" in str(caught.value.hint)
    with pytest.raises(DataError, match="unknown data source `imagenet`") as caught:
        open_source("imagenet")
    assert "tfds/NAME" in str(caught.value.hint)


def test_digits_splits_are_fixed_disjoint_and_stratified() -> None:
    parts = {name: split_positions(name) for name in ("train", "calibration", "test")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 1097,
        "calibration": 300,
        "test": 400,
    }
    assert sorted(i for part in parts.values() for i in part) == list(range(1797))
    assert parts["test"][:5] == [3, 7, 13, 16, 19]
    test = open_source("digits:test")
    assert test.items is not None
    assert all(sum(item.label == d for item in test.items) == 40 for d in range(10))


def test_digits_are_the_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits", num_classes=10)
    assert source.length == 1797
    assert [c.name for c in source.classes] == [str(d) for d in range(10)]
    assert source.items is not None
    pixels = np.asarray(source.load(5))
    assert pixels.shape == (8, 8, 3)
    position = int(source.items[5].id)
    expected = np.round(load_digits().images[position] * 255 / 16)
    assert np.array_equal(pixels[..., 0], expected)
    assert pixels.max() == 255


def test_digits_refuse_what_they_do_not_have() -> None:
    with pytest.raises(DataError, match="the digits have the splits train, calibration, test"):
        open_source("digits:val")
    with pytest.raises(DataError, match="takes no class map"):
        open_source("digits", class_map="x.txt")
    with pytest.raises(DataError, match="class `9` in digits has label 9"):
        open_source("digits", num_classes=9)
    assert open_source("digits:test", classes="3,5", images_per_class=2).length == 4


@pytest.mark.testbed
def test_real_imagenet_folders(shared_testbed: Path) -> None:
    val = open_source(f"folder:{shared_testbed / 'imagenet' / 'val'}", num_classes=1000)
    assert val.length == 800
    assert val.label_rule == "ImageNet synset folders"
    train = open_source(f"folder:{shared_testbed / 'imagenet' / 'train'}", num_classes=1000)
    assert train.selected == list(range(1000))
    assert train.items is not None
    assert train.items[281].id == f"{TABBY}/{TABBY}_tabby.JPEG"

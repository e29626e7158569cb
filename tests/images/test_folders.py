"""The one walker: each image once, what systems leave about never, and a count of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npprune.errors import DataError
from npprune.images.folders import walk


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_images_are_listed_in_the_order_of_names(tmp_path: Path) -> None:
    put(tmp_path, "b/1.PNG", "a.b/2.jpg", "a/c/3.jfif", "0.gif", "a/0.tif")
    tree = walk(tmp_path)
    assert tree.images == ["0.gif", "a/0.tif", "a/c/3.jfif", "a.b/2.jpg", "b/1.PNG"]
    assert tree.folders == ["a", "a.b", "b"]
    assert tree.notes() == []


@pytest.mark.parametrize("level", ["", "cat/", "cat/deep/"])
@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints", ".hidden", "__MACOSX", "__pycache__", "@eaDir", "#recycle",
        "lost+found", "$RECYCLE.BIN", "System Volume Information",
    ],
)  # fmt: skip
def test_folders_of_the_system_are_left_out_at_every_level(
    tmp_path: Path, level: str, name: str
) -> None:
    put(tmp_path, "cat/deep/0.png", f"{level}{name}/1.png", f"{level}{name}/more/2.png")
    tree = walk(tmp_path)
    assert (tree.images, tree.folders, tree.notes()) == (["cat/deep/0.png"], ["cat"], [])


def test_hidden_files_and_folders_named_like_images_are_no_images(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png", "cat/._0.png", "cat/.DS_Store", "cat/album.png/1.jpg")
    (tmp_path / "cat" / "empty.jpg").mkdir()
    assert walk(tmp_path).images == ["cat/0.png", "cat/album.png/1.jpg"]


def test_other_files_are_counted_by_ending_companions_not(tmp_path: Path) -> None:
    heic = [f"cat/{i}.HEIC" for i in range(6)]
    put(tmp_path, "cat/0.png", "dog/0.png", *heic, "dog/x.svg", "dog/scan", "dog/a. b c")
    put(tmp_path, "cat/notes.txt", "cat/Thumbs.db", "cat/LICENSE", "cat/0.json")
    tree = walk(tmp_path)
    said = f"`{tmp_path}`: left out"
    assert tree.notes() == [
        f"{said} 9 files that are no images npprune reads: 6 .heic, 2 without ending, 1 .svg"
    ]
    assert tree.notes({"dog"}) == [
        f"{said} 3 files that are no images npprune reads: 2 without ending, 1 .svg"
    ]
    assert tree.instead("cat") == ", only 6 .heic, 1 .db, 1 .json, 1 .txt, 1 without ending"
    put(tmp_path, "x/1.a", "x/1.b", "x/1.c", "x/1.d", "x/1.e", "x/1.f", "x/2.f")
    assert walk(tmp_path).notes({"x"})[0].endswith(": 2 .f, 1 .a, 1 .b, 1 .c, 1 .d, 1 more")


@pytest.mark.parametrize("target", ["..", ".", "../..", "/"])
def test_a_link_back_is_not_followed(tmp_path: Path, target: str) -> None:
    root = put(tmp_path / "data", "ant/0.png", "bee/0.png")
    (root / "ant" / "all").symlink_to(target)
    tree = walk(root)
    assert tree.images == ["ant/0.png", "bee/0.png"]
    assert tree.again == ["ant/all"]
    assert "link `ant/all` leads to what is read under another name" in tree.notes()[0]
    assert tree.notes({"bee"}) == []


def test_a_link_back_behind_a_link_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path, "store/bee/0.png", "store/cat/0.png", "data/ant/0.png")
    (tmp_path / "data" / "bee").symlink_to(tmp_path / "store" / "bee")
    (tmp_path / "store" / "bee" / "up").symlink_to("..")
    tree = walk(tmp_path / "data")
    assert tree.images == ["ant/0.png", "bee/0.png"]
    assert tree.again == ["bee/up"]


def test_folders_behind_links_are_read_once_where_they_are(tmp_path: Path) -> None:
    """Real folders keep their files; of links, the one nearest to the root is taken."""
    root = put(tmp_path / "data", "bee/0.png", "ant/0.png")
    put(tmp_path, "store/cat/0.png", "store/cat/1.png")
    (root / "ant" / "a").symlink_to(root / "bee")
    (root / "ant" / "b").symlink_to(tmp_path / "store" / "cat")
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    tree = walk(root)
    assert tree.images == ["ant/0.png", "bee/0.png", "cat/0.png", "cat/1.png"]
    assert tree.again == ["ant/a", "ant/b"]
    assert tree.folders == ["ant", "bee", "cat"]
    assert "2 links, e.g. `ant/a`, lead to" in tree.notes()[0]


def test_links_to_files(tmp_path: Path) -> None:
    """Inside: counted under its own name. Elsewhere: each name is an image, as in a copy."""
    root = put(tmp_path / "data", "ant/0.png", "bee/.0.png")
    put(tmp_path, "blobs/f00d")
    for name, target in (
        ("ant/1.png", "0.png"), ("ant/2.png", "../../blobs/f00d"), ("bee/3.png", "../ant/0.png"),
        ("bee/4.png", tmp_path / "blobs" / "f00d"), ("bee/5.png", ".0.png"),
    ):  # fmt: skip
        (root / name).symlink_to(target)
    tree = walk(root)
    assert tree.images == ["ant/0.png", "ant/2.png", "bee/4.png", "bee/5.png"]
    assert tree.again == ["ant/1.png", "bee/3.png"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    put(tmp_path, "ant/0.png")
    for name in ("bee", "circle", "ant/1.png"):
        (tmp_path / name).symlink_to("circle" if name == "circle" else "gone")
    tree = walk(tmp_path)
    assert tree.images == ["ant/0.png", "ant/1.png"]  # the decoder says that it is missing
    assert tree.notes() == [f"`{tmp_path}`: 2 links, e.g. `bee`, lead nowhere"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_special_files_are_counted_and_no_images(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    tree = walk(tmp_path)
    assert tree.images == ["0.png"]
    assert tree.notes()[0].endswith("npprune reads: 1 pipe, socket or device")


def test_a_root_is_read_whatever_its_name(tmp_path: Path) -> None:
    put(tmp_path / ".cache" / "@eaDir", "0.png")
    assert walk(tmp_path / ".cache" / "@eaDir").images == ["0.png"]
    (tmp_path / "link").symlink_to(tmp_path / ".cache" / "@eaDir")
    assert walk(tmp_path / "link").images == ["0.png"]


def test_a_root_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        walk(tmp_path / "none")
    put(tmp_path, "x/a.txt", "x/b.webm")
    with pytest.raises(DataError, match="is a file, not an image folder"):
        walk(tmp_path / "x" / "a.txt")
    assert walk(tmp_path).without_images().message.endswith("`, only 1 .txt, 1 .webm")
    (tmp_path / "empty").mkdir()
    assert walk(tmp_path / "empty").without_images().message.endswith("`: the folder is empty")


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, npprune.images.decoding, npprune.images.folders\n"
        "print([m for m in ('torch', 'timm', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The paper's files, in all the shapes its released program writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from npprune.errors import StoreError
from npprune.store.paper_files import (
    ReleasedImage,
    read_released,
    released_files,
    released_from_table,
    released_name,
    shard_from_released,
    write_released,
)
from npprune.store.path_store import PathStore

PATHS = [
    ReleasedImage([[3], [1]], 0.5, [[0], [1]], -0.25),
    ReleasedImage([[2], [0]], 1e-9, [[0], [4]], 2.5),
]
SHAPES = {  # one image in each shape, as text
    "path": '{"ja": [[3, 1]], "ja_score": [[0.5]], "base": [[0, 1]], "base_score": [[-0.25]]}',
    "top-2": (
        '{"ja": [[3, 4], [1, 0]], "ja_score": [[0.5]], '
        '"base": [[0, 5], [1, 2]], "base_score": [[-0.25]]}'
    ),
    "influence": '{"path": [[3.0, 1.0]]}',
    "influence top-2": '{"path": [[3.0, 2.0], [1.0, 0.0]]}',
    "edit": '{"ja": [[3, 1]], "remove": [1e-06], "base": [0.5], "enhance": [875.0]}',
    "no baseline": '{"ja": [[3, 1]], "ja_score": [[0.5]]}',
}
PARSED = {
    "path": PATHS[0],
    "top-2": ReleasedImage([[3, 4], [1, 0]], 0.5, [[0, 5], [1, 2]], -0.25),
    "influence": ReleasedImage([[3], [1]], influence_pattern=True),
    "influence top-2": ReleasedImage([[3, 2], [1, 0]], influence_pattern=True),
    "edit": ReleasedImage([[3], [1]], edit=(1e-6, 0.5, 875.0)),
    "no baseline": ReleasedImage([[3], [1]], 0.5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_and_written_alike(tmp_path: Path, shape: str) -> None:
    path = tmp_path / released_name(7)
    one, text = PARSED[shape], SHAPES[shape]
    for layout, content in (
        ("image", f"{text}\n{text}\n{text}\n"),
        ("batch", f"[{text}, {text}]\n[{text}]\n"),
    ):
        path.write_text(content)
        assert read_released(path) == [one] * 3
        write_released(path, [one] * 3, layout=layout, batch_size=2)  # type: ignore[arg-type]
        assert path.read_text() == content


def test_layouts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_released(path, PATHS)
    assert [len(json.loads(x)) for x in path.read_text().splitlines()] == [2]
    write_released(path, PATHS, batch_size=1)
    assert [len(json.loads(x)) for x in path.read_text().splitlines()] == [1, 1]
    path.write_text(path.read_text() + "\n\n")
    assert read_released(path) == PATHS
    write_released(path, [])
    assert read_released(path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "an image must be an object, got int"),
        ("3", "an image must be an object, got int"),
        ("{", "Expecting property name"),
        ('{"jo": [[1]]}', r"an image has `ja` or `path`, got the keys \['jo'\]"),
        ('{"path": [[1]], "ja_score": [[1]]}', "got the keys"),
        ('{"ja": [1, 2]}', "`ja` must be a list of lists of neurons"),
        ('{"ja": []}', "`ja` must be a list of lists of neurons"),
        ('{"ja": [[]]}', "`ja` must be a list of lists of neurons"),
        ('{"ja": [[1.5]]}', r"`ja` must hold whole numbers, got 1\.5"),
        ('{"ja": [["1"]]}', "`ja` must hold whole numbers, got '1'"),
        ('{"ja": [[true]]}', "`ja` must hold whole numbers, got True"),
        ('{"ja": [[NaN]]}', "`ja` must hold whole numbers, got nan"),
        ('{"ja": [[Infinity]]}', "`ja` must hold whole numbers, got inf"),
        ('{"ja": [[-1]]}', "`ja` must hold indices from 0 on, got -1"),
        ('{"ja": [[1]], "ja_score": [0.5]}', r"`ja_score` must be one number in 2 list"),
        ('{"ja": [[1]], "ja_score": [[0.5, 1]]}', r"`ja_score` must be one number in 2 list"),
        ('{"ja": [[1]], "ja_score": [["x"]]}', "`ja_score` must be a number, got 'x'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{SHAPES['path']}\n{line}\n")
    with pytest.raises(StoreError, match=f"not one of the paper's files: .*{message}") as caught:
        read_released(path)
    assert caught.value.message.endswith(f"({path}:2)")


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no file `imgnet_all-LABEL.rlt.jsonl` in"):
        released_files(tmp_path)
    with pytest.raises(StoreError, match="cannot read"):
        released_files(tmp_path / "absent")
    for label in (10, 2):
        write_released(tmp_path / released_name(label), PATHS)
    (tmp_path / "imgnet_all-x.rlt.jsonl").write_text("")
    assert list(released_files(tmp_path)) == [2, 10]


def test_into_a_path_store_and_back(tmp_path: Path) -> None:
    store = PathStore(tmp_path)
    top = [PARSED["top-2"]] * 2
    store.write_shard(0, shard_from_released(top, 9))
    store.write_shard(1, shard_from_released(top[:1], 4, first_position=2))
    store.write_shard(2, shard_from_released([], 5, first_position=3))
    table = store.read_all(3)
    assert table.neurons.shape == (3, 2, 2)
    assert list(table.ids) == ["9/0", "9/1", "4/0"]
    back = released_from_table(table)
    assert list(back) == [4, 9]
    assert [(i.neurons, i.score) for i in back[9]] == [(top[0].neurons, 0.5)] * 2

    shard = shard_from_released([PARSED["influence"]], 1)
    assert np.isnan(shard.scores).all()
    PathStore(tmp_path / "ip").write_shard(0, shard)
    table = PathStore(tmp_path / "ip").read_all(1)
    assert released_from_table(table, influence_pattern=True) == {1: [PARSED["influence"]]}
    assert released_from_table(table)[1][0].score is None
    with pytest.raises(StoreError, match="class 1: paths differ in blocks or neurons"):
        shard_from_released([PARSED["path"], PARSED["top-2"]], 1)


LAYOUTS = {  # how many images a line of the golden files holds; 0: an image without a list
    "vit/neuron_path": 10,
    "vit/topk5": 0,
    "vit/influence_pattern": 0,
    "vit/edit_path_probability": 10,
    "vit/edit_activation_probability": 10,
    "vit/edit_path_class": 10,
    "vit/edit_activation_class": 10,
    "mae/neuron_path": 2,
}


@pytest.mark.golden
@pytest.mark.parametrize("folder", LAYOUTS)
def test_the_golden_files_come_back(tmp_path: Path, shared_golden: Path, folder: str) -> None:
    size = LAYOUTS[folder]
    files = released_files(shared_golden / folder)
    assert 0 in files
    for label, path in files.items():
        images = read_released(path)
        assert len(images) == 10
        assert all(len(i.neurons) == 6 for i in images)
        per_block = 5 if folder == "vit/topk5" else 1
        assert all(len(block) == per_block for i in images for block in i.neurons)
        shard = shard_from_released(images, label)
        assert shard.neurons.shape == (10, 6, per_block)
        assert shard.neurons.max() < 384
        copy = tmp_path / path.name
        write_released(copy, images, layout="batch" if size else "image", batch_size=size or None)
        assert read_released(copy) == images
        lines = [json.loads(x) for x in path.read_text().splitlines()]
        assert [json.loads(x) for x in copy.read_text().splitlines()] == lines
        first = lines[0][0] if size else lines[0]
        if "remove" in first:
            assert images[0].edit is not None
            assert images[0].edit[1] == first["base"][0]
        elif "ja_score" in first:
            assert images[0].score == first["ja_score"][0][0]
            assert images[0].baseline is not None
            assert not math.isnan(images[0].baseline_score or math.nan)
        else:
            assert images[0].influence_pattern


@pytest.mark.golden
def test_every_golden_folder_is_read(shared_golden: Path) -> None:
    found = {str(p.parent.relative_to(shared_golden)) for p in shared_golden.rglob("*.jsonl")}
    assert found == set(LAYOUTS)

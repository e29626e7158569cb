"""Data sets through timm's factory: names, missing packages, streams, broken samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npprune.data import readers
from npprune.data.labels import find_labels
from npprune.data.loading import batches
from npprune.data.opening import open_source
from npprune.data.sources import StreamSource
from npprune.data.transforms import make_transform
from npprune.errors import DataError
from npprune.records import Preprocessing

TINY = Preprocessing(input_size=(3, 4, 4), crop_pct=1.0)


def png(value: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def test_names_in_their_parts() -> None:
    spec = readers.parse_spec("HFDS/uoft-cs/cifar10?split=test&root=/data/x y")
    assert (spec.prefix, spec.name) == ("hfds", "uoft-cs/cifar10")
    assert spec.options == {"split": "test", "root": "/data/x y"}
    shards = readers.parse_spec("wds//data/in1k/val-{000..009}.tar")
    assert shards.options == {"split": "val-{000..009}.tar", "root": "/data/in1k"}
    assert readers.parse_spec("wds/data/in1k?split=val").options["root"] == "data/in1k"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hfds/x?splt=test", "cannot read the option `splt=test`"),
        ("hfds/x?split=", "cannot read the option `split=`"),
        ("tfds/", "`tfds/` names no data set"),
    ],
)
def test_bad_names(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(spec)


@pytest.mark.parametrize(
    ("spec", "install"),
    [
        ("hfds/x", "pip install datasets"),
        ("hfids/x", "pip install datasets"),
        ("tfds/x", "pip install tensorflow tensorflow-datasets"),
        ("wds/x", "pip install webdataset"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(
    spec: str, install: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="which is not installed") as caught:
        open_source(spec)
    assert caught.value.hint == install
    assert capsys.readouterr().out == ""


def test_torchvision_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(png(10))
    (tmp_path / "val" / "dog" / "1.png").write_text("broken")
    source = open_source(f"torch/image_folder?root={tmp_path}", num_classes=2)
    assert source.label_rule == "class index of the data set"
    assert source.items is not None
    assert [(item.id, item.label) for item in source.items] == [
        ("cat/0.png", 0),
        ("dog/0.png", 1),
        ("dog/1.png", 1),
    ]
    skipped: list[str] = []
    (batch,) = batches(source, make_transform(TINY), 8, on_bad="skip", skipped=skipped)
    assert batch.labels.tolist() == [0, 1]
    assert skipped == ["dog/1.png"]


def test_torchvision_folders_of_synsets_get_imagenet_labels(tmp_path: Path) -> None:
    for name in ("n02123045", "n01440764"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(10))
    source = open_source(f"torch/image_folder?root={tmp_path}", num_classes=1000)
    assert source.label_rule == "ImageNet synset folders"
    assert source.selected == [0, 281]


def test_torchvision_binary_data(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (raw / "t10k-images-idx3-ubyte").write_bytes(head + images.tobytes())
    labels = bytes([0, 0, 8, 1]) + (3).to_bytes(4, "big") + bytes([7, 2, 7])
    (raw / "t10k-labels-idx1-ubyte").write_bytes(labels)
    for kind in ("images-idx3", "labels-idx1"):
        (raw / f"train-{kind}-ubyte").write_bytes((raw / f"t10k-{kind}-ubyte").read_bytes())
    source = open_source(f"torch/mnist?root={tmp_path}", num_classes=10)
    assert source.items is not None
    assert [(item.id, item.label) for item in source.items] == [
        ("00000001", 2),
        ("00000000", 7),
        ("00000002", 7),
    ]
    assert source.name(7) == "7 - seven"
    assert np.array_equal(np.asarray(source.load(0))[..., 1], images[1])


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open `torch/cifar10.*Dataset not found") as caught:
        open_source(f"torch/cifar10?root={tmp_path}")
    assert "download=1" in str(caught.value.hint)


class Counted:
    """Five endless-looking samples of classes 0, 1, 0, 1, 0 that count how many were read."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self) -> Iterator[tuple[str, int, object]]:
        for i in range(5):
            self.read += 1
            yield f"{i}", i % 2, lambda i=i: Image.new("RGB", (4, 4), (i, 0, 0))


def stream(samples: Counted, **options: object) -> StreamSource:
    labels = find_labels(["a", "b"], ranked="class index of the data set")
    return StreamSource("test", labels, samples, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_in_order_and_again(workers: int) -> None:
    source = stream(Counted(), length=5)
    assert source.items is None
    assert source.length == 5
    assert source.info().sha256 == ""
    for _ in range(2):
        found = list(batches(source, make_transform(TINY), 2, workers=workers))
        assert [batch.positions for batch in found] == [[0, 1], [2, 3], [4]]
        assert [label for batch in found for label in batch.labels.tolist()] == [0, 1, 0, 1, 0]
    info = source.info()
    assert (info.images, info.classes) == (5, 2)
    assert len(info.sha256) == 64


def test_a_stream_stops_when_every_class_is_full() -> None:
    samples = Counted()
    source = stream(samples, images_per_class=1, length=5)
    assert source.length is None
    assert [item.id for item, _ in source.stream()] == ["0", "1"]
    assert samples.read == 2
    source = stream(samples, images_per_class=2, chosen=[1])
    assert [item.id for item, _ in source.stream()] == ["1", "3"]
    assert source.selected == [1]


def test_a_stream_without_a_chosen_class_is_refused_at_its_end() -> None:
    labels = find_labels(["a", "b", "c"])
    source = StreamSource("test", labels, Counted(), chosen=[0, 2])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no images in `test` of class 2 \(c\)"):
        list(source.stream())


def test_a_stream_has_no_positions() -> None:
    source = stream(Counted())
    with pytest.raises(DataError, match="is a stream"):
        source.load(0)
    with pytest.raises(DataError, match="is a stream"):
        next(batches(source, make_transform(TINY), 2, indices=[0]))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three samples; the second sample's image is no image."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as tar:
            for i in range(3):
                image = b"broken" if (shard, i) == (0, 1) else png(i)
                meta = json.dumps({"label": 2 - i}).encode()
                for name, data in (("png", image), ("cls", str(i).encode()), ("json", meta)):
                    member = tarfile.TarInfo(f"{shard}{i}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tmp_path


@pytest.mark.skipif(find_spec("webdataset") is None, reason="needs the package webdataset")
def test_webdataset_shards(shards: Path) -> None:
    source = open_source(f"wds/{shards}/x-{{0..1}}.tar", num_classes=3)
    assert source.items is None
    assert source.length is None
    skipped: list[str] = []
    found = list(batches(source, make_transform(TINY), 4, on_bad="skip", skipped=skipped))
    assert [batch.ids for batch in found] == [["00", "02", "10"], ["11", "12"]]
    assert [batch.labels.tolist() for batch in found] == [[0, 2, 0], [1, 2]]
    assert skipped == ["01"]
    with pytest.raises(DataError, match="cannot read image `01`"):
        list(batches(source, make_transform(TINY), 4))
    with pytest.raises(DataError, match=r"label 2 is outside 0\.\.1"):
        list(open_source(f"wds/{shards}/x-{{0..1}}.tar", num_classes=2).stream())


@pytest.mark.skipif(find_spec("webdataset") is None, reason="needs the package webdataset")
def test_webdataset_labels_from_json_and_a_missing_shard(shards: Path) -> None:
    source = open_source(f"wds/{shards}/x-{{0..1}}.tar?target_key=label", num_classes=3)
    assert [item.label for item, _ in source.stream()] == [2, 1, 0, 2, 1, 0]
    gone = open_source(f"wds/{shards}/x-{{1..2}}.tar", num_classes=3)
    with pytest.raises(DataError, match=r"reading `wds/.*` failed: .*No such file"):
        list(gone.stream())


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs the package datasets")
@pytest.mark.parametrize("prefix", ["hfds", "hfids"])
def test_hugging_face_data(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog"):
        for i in range(2):
            path = tmp_path / "data" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i))
    (tmp_path / "data" / "train" / "cat" / "1.png").write_bytes(b"broken")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = open_source(
        f"{prefix}/{tmp_path / 'data'}?split=train&root={tmp_path / 'cache'}", num_classes=2
    )
    assert [c.name for c in source.classes] == ["cat", "dog"]
    skipped: list[str] = []
    found = list(batches(source, make_transform(TINY), 4, on_bad="skip", skipped=skipped))
    assert [batch.labels.tolist() for batch in found] == [[0, 1, 1]]
    assert skipped == ["00000001"]

"""Prediction from the file alone: the same pixels as timm, the same labels as PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from npprune.errors import DataError, ExportError, UsageError
from npprune.export.onnx import OnnxForm, export_onnx
from npprune.export.predict import Classifier, find_images, predict, resize_and_crop, softmax
from npprune.records import ClassInfo, Preprocessing

CLASSES = [ClassInfo(10 + i, f"kind, {i}", None) for i in range(7)]
PREPROCESSING = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.9)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with some structure, so that a shift of one pixel shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), np.int16)
    noisy = smooth + rng.integers(-30, 30, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tiny(classes: int = 7, channels: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3,
        num_classes=classes, in_chans=channels,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "model.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.JPEG", "deep/c.png"]):
        picture(40 + 7 * i, 50, i).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def reference(preprocessing: Preprocessing):
    return create_transform(
        preprocessing.input_size, interpolation=preprocessing.interpolation,
        mean=preprocessing.mean, std=preprocessing.std, crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_pixels_are_timms(interpolation, mode, crop_pct, shape):
    pre = Preprocessing(
        (3, *shape), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), interpolation, crop_pct, mode
    )
    classifier = Classifier.__new__(Classifier)
    classifier.preprocessing, classifier.pixels = pre, False
    transform = reference(pre)
    for size in [(64, 64), (75, 50), (50, 75), (32, 32), (20, 61), (37, 33), (41, 24)]:
        image = picture(*size)
        difference = np.abs(classifier.prepare(image) - transform(image).numpy()).max()
        assert difference < 1e-6, f"{size}: {difference}"


def test_it_predicts_what_pytorch_predicts(model, onnx_file, folder):
    found = list(predict(onnx_file, [folder], topk=3, batch=2, provider="cpu"))
    assert [Path(p.image).name for p in found] == ["a.png", "b.JPEG", "c.png"]
    transform = reference(PREPROCESSING)
    for prediction in found:
        with torch.no_grad():
            x = transform(Image.open(prediction.image).convert("RGB"))[None]
            values, order = model(x).softmax(-1)[0].topk(3)
        assert [g.index for g in prediction.guesses] == [10 + int(i) for i in order]
        assert [g.name for g in prediction.guesses] == [f"kind, {int(i)}" for i in order]
        got = [g.probability for g in prediction.guesses]
        assert got == pytest.approx(values.tolist(), abs=1e-5)


def test_topk_beyond_the_classes_gives_all_of_them(onnx_file, folder):
    only = next(predict(onnx_file, [folder / "a.png"], topk=50, provider="cpu"))
    assert len(only.guesses) == 7
    assert sum(g.probability for g in only.guesses) == pytest.approx(1)


def test_fixed_batch_and_preprocessing_inside(model, onnx_file, folder, tmp_path):
    path = tmp_path / "fixed.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, path, OnnxForm(batch=2, with_preprocessing=True))
    there = list(predict(path, [folder], topk=7, provider="cpu"))
    here = list(predict(onnx_file, [folder], topk=7, provider="cpu"))
    for a, b in zip(there, here, strict=True):
        assert [g.index for g in a.guesses] == [g.index for g in b.guesses]
        assert a.guesses[0].probability == pytest.approx(b.guesses[0].probability, abs=1e-6)


def test_one_channel(tmp_path):
    pre = Preprocessing((1, 32, 32), (0.5,), (0.5,), "bilinear", 1.0, "squash")
    path = tmp_path / "grey.onnx"
    export_onnx(tiny(channels=1), pre, CLASSES, path)
    classifier = Classifier(path, provider="cpu")
    assert classifier.prepare(picture(40, 40)).shape == (1, 32, 32)
    assert len(classifier.classify([picture(40, 40)], topk=2)[0]) == 2


def test_a_moved_file_in_a_process_without_torch(onnx_file, folder, tmp_path):
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(onnx_file.read_bytes())
    code = (
        "import sys; from pathlib import Path; from npprune.export.predict import predict\n"
        f"found = list(predict(Path({str(moved)!r}), [Path({str(folder)!r})], provider='cpu'))\n"
        "heavy = [m for m in ('torch', 'timm', 'torchvision', 'onnx') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "print(len(found), len(found[0].guesses))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("3 5", "", 0)


def test_a_damaged_image_is_named_or_skipped(onnx_file, folder):
    (folder / "b.JPEG").write_bytes((folder / "b.JPEG").read_bytes()[:200])
    (folder / "d.png").write_text("words")
    with pytest.raises(DataError, match=r"cannot read image `.*b\.JPEG`"):
        list(predict(onnx_file, [folder], provider="cpu"))
    found = list(predict(onnx_file, [folder], provider="cpu", on_bad="skip"))
    assert [bool(p.guesses) for p in found] == [True, False, False, True] or [
        (Path(p.image).name, bool(p.guesses)) for p in found
    ] == [("a.png", True), ("b.JPEG", False), ("d.png", False), ("c.png", True)]
    assert [p.error is None for p in found] == [bool(p.guesses) for p in found]


def test_sixteen_bits_are_no_white(model, onnx_file, tmp_path):
    """In a file, in memory, and where the network scales the pixels itself."""
    low, deep = tmp_path / "low.png", tmp_path / "deep.png"
    picture(40, 50).convert("L").save(low)
    Image.fromarray(np.asarray(Image.open(low)).astype(np.uint16) * 257).save(deep)
    pixels = tmp_path / "pixels.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, pixels, OnnxForm(with_preprocessing=True))
    for file in (onnx_file, pixels):
        a, b = predict(file, [low, deep], topk=7, provider="cpu")
        assert a.guesses == b.guesses
        (c,) = Classifier(file, provider="cpu").classify([Image.open(deep)], topk=7)
        assert c == b.guesses
    with pytest.raises(DataError, match="float pixels have no fixed range"):
        Classifier(onnx_file, provider="cpu").classify([Image.new("F", (32, 32))])


def test_folders_are_walked_as_elsewhere(folder, tmp_path):
    picture(40, 50).save(tmp_path / "elsewhere.png")
    (tmp_path / "more").mkdir()
    picture(40, 50).save(tmp_path / "more" / "d.gif")
    (folder / "album.png").mkdir()
    (folder / "._a.png").write_bytes(b"\0\5\x16\7")
    (folder / "e.heic").write_bytes(b"")
    (folder / "deep" / "more").symlink_to(tmp_path / "more")
    (folder / "deep" / "all").symlink_to("..")
    said: list[str] = []
    found = find_images([folder, tmp_path / "elsewhere.png"], said.append)
    names = ["photos/a.png", "photos/b.JPEG", "photos/deep/c.png", "photos/deep/more/d.gif"]
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [*names, "elsewhere.png"]
    assert said == [
        f"`{folder}`: left out 1 file that is no image npprune reads: 1 .heic",
        f"`{folder}`: link `deep/all` leads to what is read under another name; each file counts "
        "once",
    ]


def test_only_damaged_images(onnx_file, tmp_path):
    (tmp_path / "d.png").write_text("words")
    found = list(predict(onnx_file, [tmp_path / "d.png"], provider="cpu", on_bad="skip"))
    assert len(found) == 1
    assert found[0].guesses == []


def test_wrong_inputs(onnx_file, tmp_path, folder):
    with pytest.raises(DataError, match="no image at"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(DataError, match="no image was given"):
        find_images([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images below"):
        find_images([tmp_path / "empty"])
    with pytest.raises(UsageError, match="`topk` must be at least 1"):
        list(predict(onnx_file, [folder], topk=0, provider="cpu"))
    with pytest.raises(UsageError, match="`batch` must be at least 1"):
        list(predict(onnx_file, [folder], batch=0, provider="cpu"))


def test_a_file_of_someone_else(onnx_file, tmp_path):
    proto = onnx.load(onnx_file)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(ExportError, match="must carry `labels` in its metadata"):
        Classifier(tmp_path / "bare.onnx", provider="cpu")
    entry = proto.metadata_props.add()
    entry.key, entry.value = "labels", "[{]"
    entry = proto.metadata_props.add()
    entry.key, entry.value = "preprocessing", "{}"
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match=r"metadata of .* cannot be read"):
        Classifier(tmp_path / "bad.onnx", provider="cpu")


def test_interpolation_must_be_known():
    with pytest.raises(ExportError, match=r"`interpolation` .* got `mitchell`"):
        resize_and_crop(picture(50, 50), Preprocessing(interpolation="mitchell"))


def test_softmax_does_not_overflow():
    assert softmax(np.array([[1000.0, 0.0]], np.float32)).tolist() == [[1.0, 0.0]]


def test_names_that_are_not_utf8_are_shown_as_text(onnx_file, tmp_path):
    try:
        picture(32, 32).save(tmp_path / os.fsdecode(b"caf\xe9.png"))
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    found = {p.image: p.error for p in predict(onnx_file, [tmp_path], on_bad="skip")}
    assert found[f"{tmp_path}/caf\\xe9.png"] is None
    assert "\\xff.png" in str(found[f"{tmp_path}/\\xff.png"])

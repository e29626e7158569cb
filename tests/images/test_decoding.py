"""The one decoder: every format and mode becomes 8-bit RGB, or is refused by name."""

from __future__ import annotations

import io
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from npprune.data.transforms import make_transform
from npprune.errors import DataError, UsageError
from npprune.export.predict import resize_and_crop
from npprune.images import decoding
from npprune.images.decoding import ENDINGS, FORMATS, UnreadableImage, decode, to_rgb
from npprune.images.resizing import fault
from npprune.records import Preprocessing


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = to_rgb(noise((8, 6)).convert("RGB").convert(mode))
    assert (image.mode, image.size) == ("RGB", (8, 6))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    pixels = np.asarray(decode(tmp_path / "x.png", "x"))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels[0, :, 2].tolist() == [0, 1, 128, 255]


def test_float_pixels_are_unreadable(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(UnreadableImage, match=r"x\.tiff`: float pixels have no fixed range"):
        decode(tmp_path / "x.tiff", str(tmp_path / "x.tiff"))


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_format_is_read(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 12), (250, 10, 20)).save(tmp_path / "x", kind)
    image = decode(tmp_path / "x", "x")
    assert (image.mode, image.size) == ("RGB", (16, 12))
    assert np.abs(np.asarray(image).astype(int) - [250, 10, 20]).max() < 12
    assert FORMATS[kind][0] in ENDINGS


def test_the_usual_endings_come_first() -> None:
    assert ENDINGS[:2] == (".jpg", ".jpeg")
    assert {".jfif", ".png", ".gif", ".tiff", ".ppm"} <= set(ENDINGS)


def test_sixteen_bits_in_other_files(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 4 1 65535 " + values.astype(">u2").tobytes())
    for name in ("x.tif", "x.pgm"):
        assert np.asarray(decode(tmp_path / name, name))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "x.gif", "x").getpixel((3, 3)) == (255, 0, 0)


def test_postscript_starts_no_other_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: object, **options: object) -> None:
        pytest.fail("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    buffer = io.BytesIO()
    noise((8, 8)).save(buffer, "EPS")
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    for source in (tmp_path / "x.png", buffer.getvalue()):
        with pytest.raises(UnreadableImage, match="not an image, or of none of the formats JPEG"):
            decode(source, "x.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_plain_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=r"`x\.png`: a pipe, socket or device"):
        decode(tmp_path / "x.png", "x.png")
    with pytest.raises(UnreadableImage, match="a folder"):
        decode(tmp_path, "x.png")
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(tmp_path / "none.png", "none.png")


def test_pixels_without_a_range_are_refused_outside_files_too() -> None:
    with pytest.raises(DataError, match="float pixels have no fixed range"):
        to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(DataError, match=r"integer pixels outside 0\.\.65535"):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)))


def test_no_pixel_is_decoded_of_an_image_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise((40, 30)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", "x", 1200).size == (40, 30)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    for source in (tmp_path / "x.png", (tmp_path / "x.png").read_bytes()):
        with pytest.raises(UnreadableImage, match=r"40 x 30 pixels, and at most 0\.001199 million"):
            decode(source, "x", 1199)


def test_the_limit_can_be_raised_above_pillows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (20_000, 9_000)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(Image.Image, "load", lambda self: None)
    monkeypatch.setattr(decoding, "to_rgb", lambda image: image.size)
    with pytest.raises(UnreadableImage, match="Pillow's limit, and at most 89 million"):
        decode(tmp_path / "x.png", "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "x.png", "x", 200_000_000) == (20_000, 9_000)


@pytest.mark.parametrize(("size", "mode"), [((1, 2_000), "center"), ((4_000, 1), "center")])
def test_what_would_be_too_large_after_resizing_is_not_resized(
    size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre = Preprocessing((3, 224, 224), crop_mode=mode)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("it was resized"))
    image = Image.new("RGB", size)
    for prepare in (make_transform(pre), lambda image: resize_and_crop(image, pre)):
        with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels are too long and thin"):
            prepare(image)
    monkeypatch.undo()
    squashed = make_transform(Preprocessing((3, 16, 16), crop_mode="squash", crop_pct=1.0))
    assert squashed(image).shape == (3, 16, 16)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("crop_pct", 1e-4, "resizes images to 2,240,000 x 2,240,000 pixels"),
    ("crop_pct", float("nan"), r"`crop_pct` must be in \(0, 1\]"),
    ("crop_pct", 0.0, r"`crop_pct` must be in \(0, 1\]"),
    ("input_size", (3, 0, 224), "must be channels, height and width"),
    ("input_size", (3, 224, 10**9), "at most 16384 pixels a side"),
    ("input_size", (10**6, 224, 224), "must be channels"),
    ("mean", (float("inf"),), "`mean` must be 3 finite numbers"),
    ("mean", (0.5, 0.5), "`mean` must be 3 finite numbers"),
    ("std", (0.0,), "`std` must be above 0"),
])  # fmt: skip
def test_a_preparation_that_takes_any_memory_is_a_fault(
    field: str, value: Any, message: str
) -> None:
    pre = replace(Preprocessing(), **{field: value})
    assert re.search(message, fault(pre) or "")
    with pytest.raises(UsageError):
        make_transform(pre)
    assert fault(Preprocessing()) is None

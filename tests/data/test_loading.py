"""Transforms and batches: the model's preprocessing, odd images, broken images, a fixed grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from npprune.data.loading import batches
from npprune.data.opening import open_source
from npprune.data.sources import ImageSource
from npprune.data.transforms import describe, make_transform, resolve
from npprune.errors import DataError, UsageError
from npprune.images.decoding import UnreadableImage
from npprune.records import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Preprocessing(input_size=(3, 16, 16), crop_pct=1.0, crop_mode="squash")


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of one class and one of another; `0/3.png` is text, `0/7.jpg` truncated."""
    for i in range(10):
        path = tmp_path / "0" / f"{i}.{'jpg' if i == 7 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        noise((20 + i, 24), seed=i).save(path)
    (tmp_path / "1").mkdir()
    noise((9, 9)).save(tmp_path / "1" / "x.png")
    (tmp_path / "0" / "3.png").write_text("not an image")
    whole = (tmp_path / "0" / "7.jpg").read_bytes()
    (tmp_path / "0" / "7.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.fixture
def source(folder: Path) -> ImageSource:
    return open_source(f"folder:{folder}")


@pytest.mark.parametrize("size", [(32, 32), (227, 227), (300, 128)])
def test_squash_is_torchvisions_resize_to_both_sides(size: tuple[int, int]) -> None:
    pre = Preprocessing((3, 96, 96), MEAN, STD, "bilinear", 1.0, "squash")
    plain = tv.Compose(
        [
            tv.Resize((96, 96), tv.InterpolationMode.BILINEAR, antialias=True),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    image = noise(size)
    assert torch.equal(make_transform(pre)(image), plain(image))


def test_center_resizes_the_shorter_side_then_crops() -> None:
    pre = Preprocessing((3, 224, 224), MEAN, STD, "bicubic", 0.9, "center")
    plain = tv.Compose(
        [
            tv.Resize(248, tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(224),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    image = noise((300, 260))
    assert torch.equal(make_transform(pre)(image), plain(image))


def test_border_keeps_the_whole_image_and_pads_with_the_mean() -> None:
    pre = Preprocessing((3, 40, 40), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "border")
    out = make_transform(pre)(Image.new("RGB", (40, 20), (255, 255, 255)))
    assert out.shape == (3, 40, 40)
    assert torch.all(out[:, 10:30] == 1)
    assert out[:, :10].abs().max() < 0.01


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    pre = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0)
    image = noise((8, 8))
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(make_transform(pre)(image), (expected - 0.5) / 0.25, atol=1e-6)


def test_a_model_of_one_channel_gets_grey() -> None:
    pre = Preprocessing((1, 8, 8), (0.5,), (0.5,), "bicubic", 1.0)
    assert make_transform(pre)(noise((8, 8))).shape == (1, 8, 8)


def test_resolve_puts_what_was_asked_for_in_place() -> None:
    base = Preprocessing()
    assert resolve(base) == base
    pre = resolve(base, mean=[0.1], std=MEAN, interpolation="bilinear", crop_pct=1, img_size=96)
    assert pre == Preprocessing((3, 96, 96), (0.1,) * 3, MEAN, "bilinear", 1, "center")
    assert resolve(base, img_size=(32, 48), crop_mode="squash").input_size == (3, 32, 48)
    assert base == Preprocessing()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mean": [0.1, 0.2]}, "`mean` must have 1 or 3 values, got 2"),
        ({"mean": [float("nan")]}, "`mean` must be finite"),
        ({"std": [0.0]}, "`std` must be above 0"),
        ({"interpolation": "cubic"}, "`interpolation` must be one of `bicubic`, .* got `cubic`"),
        ({"crop_mode": "middle"}, "`crop_mode` must be one of `center`, .* got `middle`"),
        ({"crop_pct": 0}, r"`crop_pct` must be in \(0, 1\], got 0"),
        ({"crop_pct": 1.5}, r"`crop_pct` must be in \(0, 1\], got 1.5"),
        ({"img_size": 0}, "`img_size` must be 1 or more"),
        ({"img_size": (1, 2, 3)}, "`img_size` must be one side or"),
    ],
)
def test_resolve_refuses(overrides: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(Preprocessing(), **overrides)


def test_describe_is_one_line() -> None:
    assert (
        describe(Preprocessing((3, 224, 192), MEAN, (0.5,) * 3))
        == "224x192 bicubic, crop 0.9 center, mean 0.485 0.456 0.406, std 0.5 0.5 0.5"
    )


def test_an_unreadable_image_ends_the_run_and_is_named(source: ImageSource, folder: Path) -> None:
    found = batches(source, make_transform(SMALL), 2)
    assert next(found).ids == ["0/0.png", "0/1.png"]
    with pytest.raises(DataError, match=r"cannot read image `.*/0/3\.png`: not an image") as err:
        next(found)
    assert str(folder) in err.value.message
    assert "--on-bad-image skip" in str(err.value.hint)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_leaves_the_grid_as_it_was(source: ImageSource, workers: int) -> None:
    skipped: list[str] = []
    found = list(
        batches(source, make_transform(SMALL), 4, on_bad="skip", skipped=skipped, workers=workers)
    )
    assert skipped == ["0/3.png", "0/7.jpg"]
    assert [batch.positions for batch in found] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert found[2].labels.tolist() == [0, 0, 1]
    assert found[2].ids == ["0/8.png", "0/9.png", "1/x.png"]
    assert found[0].images.shape == (3, 3, 16, 16)
    assert source.info(skipped).images == 9


def test_workers_change_nothing(source: ImageSource) -> None:
    state = torch.get_rng_state()
    one, two = (
        list(batches(source, make_transform(SMALL), 3, on_bad="skip", skipped=[], workers=workers))
        for workers in (0, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [a.ids for a in one] == [b.ids for b in two]
    assert all(torch.equal(a.images, b.images) for a, b in zip(one, two, strict=True))


def test_workers_report_an_unreadable_image(source: ImageSource) -> None:
    with pytest.raises(UnreadableImage, match=r"0/3\.png"):
        list(batches(source, make_transform(SMALL), 3, workers=2))


def test_a_batch_without_a_readable_image_is_left_out(source: ImageSource) -> None:
    skipped: list[str] = []
    found = batches(
        source, make_transform(SMALL), 1, on_bad="skip", skipped=skipped, indices=[3, 10, 7, 0]
    )
    assert [batch.ids for batch in found] == [["1/x.png"], ["0/0.png"]]
    assert skipped == ["0/3.png", "0/7.jpg"]


def test_a_batch_size_of_nothing_is_refused(source: ImageSource) -> None:
    with pytest.raises(DataError, match="`batch_size` must be 1 or more, got 0"):
        next(batches(source, make_transform(SMALL), 0))


@pytest.mark.golden
def test_the_golden_images_as_their_readme_says(shared_golden: Path) -> None:
    source = open_source(f"folder:{shared_golden / 'images'}", num_classes=1000)
    pre = Preprocessing((3, 96, 96), MEAN, STD, "bilinear", 1.0, "squash")
    (batch,) = batches(source, make_transform(pre), 20)
    assert batch.labels.tolist() == [0] * 10 + [1] * 10
    plain = tv.Compose([tv.Resize((96, 96)), tv.ToTensor(), tv.Normalize(MEAN, STD)])
    with Image.open(shared_golden / "images" / "cat" / "0009.jpg") as image:
        assert torch.equal(batch.images[19], plain(image.convert("RGB")))

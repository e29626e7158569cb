"""Classify images with nothing but an exported file: ONNX Runtime, NumPy and Pillow.

Labels and preprocessing are read from the file's metadata. No PyTorch is loaded: images are found
and decoded by the same code as everywhere in npprune, and resized and cropped by Pillow as timm
does it. Normalising in NumPy may differ from PyTorch in the last bit of a float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import DataError, ExportError, NpPruneError, UsageError
from npprune.export.beside import check_beside
from npprune.export.session import open_session
from npprune.images.decoding import UnreadableImage, decode, reading, to_rgb
from npprune.images.folders import walk
from npprune.images.resizing import check_resized, fault, resized
from npprune.records import ClassInfo, Preprocessing, from_dict, plain_text
from npprune.untrusted import MAX_PIXELS, parse_json
from npprune.words import CROP_MODES, INTERPOLATIONS, OnBadImage

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Guess:
    """One class and its softmax probability."""

    index: int  # of the class, as in the label space the network was trained on
    name: str
    probability: float
    synset: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; empty, with `error`, if it was skipped."""

    image: str
    guesses: list[Guess]
    error: str | None = None


class Classifier:
    """An exported file that knows how to read an image and what its outputs mean.

    Errors: ExportError where the file is missing, broken, without our metadata, or not the one
    that `export.json` beside it records; DeviceError for a named provider that is not there.
    """

    def __init__(self, path: Path, *, provider: str = "auto", threads: int | None = None) -> None:
        check_beside(Path(path))
        self.session = open_session(path, provider, threads)
        self.classes, self.preprocessing = _read_metadata(self.session.metadata, Path(path))
        self.pixels = self.session.input_name == "pixels"
        self._check_input(Path(path))

    def open(self, source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """An image file, or its bytes, as `classify` takes it.

        Raises:
            UnreadableImage: it cannot be decoded, or is too large before or after resizing.
        """
        image = decode(source, name, max_pixels)
        with reading(name):
            check_resized(image.height, image.width, self.preprocessing)
        return image

    def classify(self, images: Sequence[Image.Image], *, topk: int = 5) -> list[list[Guess]]:
        """The `topk` likeliest classes of each image, best first. One run per call, or several
        where the file has a fixed batch size."""
        import numpy as np

        if topk < 1:
            raise UsageError(f"`topk` must be at least 1, got `{topk}`")
        if not images:
            return []
        probabilities = softmax(self._logits(np.stack([self.prepare(i) for i in images])))
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :topk]
        return [
            [self._guess(int(c), float(row[c])) for c in best]
            for row, best in zip(probabilities, order, strict=True)
        ]

    def prepare(self, image: Image.Image) -> np.ndarray:
        """What the network is fed: float32 [C, H, W] normalised, or uint8 [H, W, C] where the
        file does that itself."""
        import numpy as np

        pixels = np.asarray(resize_and_crop(image, self.preprocessing))
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if self.pixels:
            return pixels
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (
            np.asarray(v, np.float32).reshape(-1, 1, 1)
            for v in (self.preprocessing.mean, self.preprocessing.std)
        )
        normal: np.ndarray = (scaled - mean) / std
        return normal

    def _check_input(self, path: Path) -> None:
        """ExportError where the file does not take the images that its metadata describes."""
        channels, *size = self.preprocessing.input_size
        wanted = [*size, channels] if self.pixels else [channels, *size]
        batch, *shape = self.session.input_shape or [0]
        sizes = [
            b if isinstance(a, str) or a is None else a for a, b in zip(shape, wanted, strict=False)
        ]
        if len(shape) != 3 or sizes != wanted or (isinstance(batch, int) and batch < 1):
            raise ExportError(
                f"{path} takes inputs of shape {self.session.input_shape}, and its metadata "
                f"describes images of {wanted}",
                hint="export the network with `npprune export`",
            )

    def _logits(self, batch: np.ndarray) -> np.ndarray:
        import numpy as np

        logits = np.asarray(self._run(batch))
        if logits.shape != (len(batch), len(self.classes)) or logits.dtype.kind != "f":
            raise ExportError(
                f"{self.session.path} must give a number for each of its {len(self.classes)} "
                f"classes, got {logits.dtype} {list(logits.shape)} for {len(batch)} images",
                hint="export the network with `npprune export`",
            )
        if not np.isfinite(logits).all():
            raise ExportError(
                f"{self.session.path} gives NaN or infinity for one of {len(batch)} images",
                hint="export the network again, in fp32 if it was not",
            )
        return logits

    def _run(self, batch: np.ndarray) -> np.ndarray:
        import numpy as np

        fixed = self.session.fixed_batch
        if fixed is None:
            return self.session.run(batch)
        n = len(batch)
        parts = [
            self.session.run(batch[np.arange(start, start + fixed) % n])
            for start in range(0, n, fixed)
        ]
        return np.concatenate(parts)[:n]

    def _guess(self, output: int, probability: float) -> Guess:
        info = self.classes[output]
        return Guess(info.index, info.name, probability, info.synset)


def predict(
    onnx_path: Path,
    images: Sequence[Path],
    *,
    topk: int = 5,
    batch: int = 16,
    provider: str = "auto",
    threads: int | None = None,
    on_bad: OnBadImage = "error",
    warn: Callable[[str], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Predictions for `images` (files, and folders searched through), in order, batch by batch.

    An image that cannot be read ends with UnreadableImage, a DataError, or with `on_bad="skip"`
    gives a prediction without guesses that says why. `warn` is told what folders hold besides.
    """
    if batch < 1:
        raise UsageError(f"`batch` must be at least 1, got `{batch}`")
    if topk < 1:
        raise UsageError(f"`topk` must be at least 1, got `{topk}`")
    files = find_images(images, warn)
    classifier = Classifier(onnx_path, provider=provider, threads=threads)
    for start in range(0, len(files), batch):
        opened = [_open(classifier, f, on_bad, max_pixels) for f in files[start : start + batch]]
        good = [image for image in opened if not isinstance(image, str)]
        guesses = iter(classifier.classify(good, topk=topk))
        for file, image in zip(files[start : start + batch], opened, strict=False):
            if isinstance(image, str):
                yield Prediction(plain_text(str(file)), [], plain_text(image))
            else:
                yield Prediction(plain_text(str(file)), next(guesses))


def find_images(sources: Sequence[Path], warn: Callable[[str], None] | None = None) -> list[Path]:
    """Files as given, and all images below the folders, in the order of their names; `warn` is
    told what was left out. DataError where there are none."""
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            tree = walk(source)
            if not tree.images:
                raise tree.without_images()
            found += [source / path for path in tree.images]
            if warn is not None:
                for note in tree.notes():
                    warn(note)
        elif source.exists():
            found.append(source)
        else:
            raise DataError(f"no image at {source}")
    if not found:
        raise DataError("no image was given")
    return found


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An image at the network's input size, mode RGB (L for one channel), by the rules of timm's
    evaluation transform: `center` resizes the shorter side, `squash` both, `border` the longer
    one, to size / crop_pct; then the middle is cut out or padded."""
    channels, height, width = preprocessing.input_size
    image = to_rgb(image)
    if channels == 1:
        image = image.convert("L")
    check_resized(image.height, image.width, preprocessing)
    h, w = resized(image.height, image.width, preprocessing)
    if (h, w) != (image.height, image.width):
        image = image.resize((w, h), _resample(preprocessing.interpolation))
    fill: tuple[int, ...] = (0,) * channels
    if preprocessing.crop_mode == "border":
        fill = tuple(round(255 * v) for v in preprocessing.mean)
    return _center(image, height, width, fill)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [b, c] of logits [b, c], in float64."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    probabilities: np.ndarray = e / e.sum(axis=1, keepdims=True)
    return probabilities


def _center(image: Image.Image, height: int, width: int, fill: tuple[int, ...]) -> Image.Image:
    """The middle height x width, padded with `fill` where the image is smaller."""
    from PIL import Image

    short_w, short_h = max(width - image.width, 0), max(height - image.height, 0)
    if short_w or short_h:
        size = (image.width + short_w, image.height + short_h)
        padded = Image.new(image.mode, size, fill if len(fill) > 1 else fill[0])
        padded.paste(image, (short_w // 2, short_h // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _resample(name: str) -> Any:
    from PIL import Image

    known = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "lanczos": Image.Resampling.LANCZOS,
        "nearest": Image.Resampling.NEAREST,
    }
    if name not in known:
        raise ExportError(
            f"`interpolation` in the file's metadata must be one of {', '.join(known)}, "
            f"got `{name}`"
        )
    return known[name]


def _open(classifier: Classifier, path: Path, on_bad: str, limit: int) -> Image.Image | str:
    try:
        return classifier.open(path, str(path), limit)
    except UnreadableImage as err:
        if on_bad == "skip":
            return err.message
        raise


def _read_metadata(known: dict[str, str], path: Path) -> tuple[list[ClassInfo], Preprocessing]:
    if "features" in known:
        raise ExportError(
            f"{path} gives features ({known['features']}) and no classes to choose among",
            hint="run it in ONNX Runtime: its output is `features`",
        )
    missing = [key for key in ("labels", "preprocessing") if key not in known]
    if missing:
        raise ExportError(
            f"{path} must carry `{missing[0]}` in its metadata, and does not",
            hint="export the network with `npprune export`",
        )
    try:
        labels = parse_json(known["labels"])
        settings = parse_json(known["preprocessing"])
        classes = [from_dict(ClassInfo, c, where=f"{path}, labels") for c in labels]
        prepared = from_dict(Preprocessing, settings, where=f"{path}, preprocessing")
    except (ValueError, TypeError, NpPruneError) as err:
        raise ExportError(f"the metadata of {path} cannot be read: {err}") from err
    if why := fault(prepared):
        raise ExportError(f"the metadata of {path} cannot be used: {why}")
    for name, words in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if (word := getattr(prepared, name)) not in words:
            rule = ", ".join(words)
            raise ExportError(f"`{name}` in the metadata of {path} must be {rule}, got `{word}`")
    return classes, prepared

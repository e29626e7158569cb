"""The images of healing: opened with or without labels, split, read."""

from __future__ import annotations

from dataclasses import replace

import torch

from npprune.data.sources import ImageSource
from npprune.data.transforms import make_transform, resolve
from npprune.data.unlabelled import Joined, open_unlabelled
from npprune.errors import DataError, plural, setting
from npprune.pipeline.common.inputs import Images, dense_names, open_images
from npprune.pipeline.common.work import Work
from npprune.pipeline.heal.image_cache import ImagesInFiles, ImagesInMemory, read
from npprune.pipeline.heal.teacher import HeldOut, Teacher, TrainingSet, logits_of
from npprune.recipe import DataSection, HealSection
from npprune.records import CheckpointConfig, ModelInfo

HELD_OUT = 10  # one image of so many is never trained on
HELD_OUT_MOST = 2000
HELD_OUT_FEATURES = 200  # of networks without a classifier, whose features are large


def open_training_images(
    config: CheckpointConfig,
    dense: ModelInfo,
    data: DataSection,
    settings: HealSection,
    work: Work,
) -> tuple[Images, Images | None]:
    """The images, those of `unlabelled` behind them (and alone beside them)."""
    specialised = config.details.get("classes")
    names = dense_names(config)
    asked = data
    if specialised is not None and data.classes is None and names.within is None:
        asked = data.model_copy(update={"classes": list(specialised)})
    try:
        images = open_images(
            data.train or data.calibration, asked, dense, work, asked="data.train", on_bad="skip",
            preprocessing=config.preprocessing, names=names,
        )  # fmt: skip
    except DataError as err:
        spec = data.train or data.calibration or ""
        needed = settings.label_weight > 0 or asked.classes is not None
        if needed or names.within is not None or not spec.startswith("folder:"):
            raise
        source = open_unlabelled(spec, data.max_pixels)  # raises where there are no images at all
        work.say(f"labels are not used: {err.message}")
        images = _unlabelled(source, config, asked, work)
    if specialised is not None and not set(images.source.selected) <= set(specialised):
        other = sorted(set(images.source.selected) - set(specialised))[0]
        raise DataError(
            f"the checkpoint was pruned for {plural(len(specialised), 'class', 'classes')}, and "
            f"class {other} is not "
            "one of them",
            hint=f"leave {setting('data.classes')} out, or choose among those of the checkpoint",
        )
    if settings.unlabelled is None:
        return images, None
    extra = _unlabelled(open_unlabelled(settings.unlabelled, data.max_pixels), config, asked, work)
    more = plural(extra.source.length or 0, "more image")
    work.say(f"{settings.unlabelled}: {more}, unlabelled")
    joined = replace(images, source=Joined(images.source, extra.source))
    return joined, extra


def _unlabelled(
    source: ImageSource, config: CheckpointConfig, data: DataSection, work: Work
) -> Images:
    pre = resolve(
        config.preprocessing, mean=data.mean, std=data.std, interpolation=data.interpolation,
        crop_pct=data.crop_pct, crop_mode=data.crop_mode,
    )  # fmt: skip
    for note in source.notes:
        work.warn(note)
    on_bad = data.on_bad_image or "skip"
    return Images(source, pre, make_transform(pre), data, on_bad, work)


def most_held(teacher: Teacher) -> int:
    """How many images are held out at most."""
    return HELD_OUT_MOST if teacher.classifies else HELD_OUT_FEATURES


def split(images: Images, most: int = HELD_OUT_MOST) -> tuple[list[int] | None, list[int] | None]:
    """Positions to train on and to measure on; None for a stream, which is split when read."""
    if images.source.items is None:
        return None, None
    first = images.source.first if isinstance(images.source, Joined) else images.source
    assert first.items is not None
    return every_tenth(len(images.source.items), len(first.items), images.source.spec, most)


def every_tenth(
    n: int, of_first: int, spec: str, most: int = HELD_OUT_MOST
) -> tuple[list[int], list[int]]:
    """Positions of n images to train on, and to hold out.

    Only the first source's images are held out: it is what the network is for.
    """
    if of_first < 2:
        raise DataError(
            f"`{spec}` has one image: healing trains on some and is measured on others",
            hint="give at least two; a hundred or more make sense",
        )
    stride = max(HELD_OUT, -(-of_first // most))
    held = [i for i in range(of_first) if i % stride == stride - 1] or [of_first - 1]
    out = set(held)
    return [i for i in range(n) if i not in out], held


def read_training_images(
    images: Images,
    train: list[int] | None,
    held_out: list[int] | None,
    course: str,
    teacher: Teacher,
    work: Work,
) -> TrainingSet:
    """The training images, in memory where they fit, and those held out with the teacher's
    logits."""
    flips = course in ("mixed", "flips")
    outputs = teacher.chosen if not teacher.expands else None
    seed, sharing = work.seed, work.team.local_count
    if train is None or held_out is None:
        everything = read(images, None, "reading images", sharing=sharing)
        if everything is None:
            raise DataError(
                f"the images of the stream `{images.source.spec}` do not fit into memory",
                hint=f"{setting('data.images_per_class', 'N')} takes fewer, a folder can be read "
                "again and again",
            )
        pixels, labels, found = everything
        labels = to_outputs(labels, outputs)
        chosen, other = every_tenth(len(found), len(found), images.source.spec, most_held(teacher))
        kept, memory = (
            ImagesInMemory(
                pixels[rows], labels[rows], images.preprocessing, flips=mirrored, seed=seed
            )
            for rows, mirrored in ((chosen, flips), (other, False))
        )
        return TrainingSet(kept, _held_out(memory, teacher, work))
    measured = read(images, held_out, "reading held-out images")
    if measured is None:
        raise DataError("the held-out images do not fit into memory")
    pixels, labels = measured[0], to_outputs(measured[1], outputs)
    memory = ImagesInMemory(pixels, labels, images.preprocessing, flips=False, seed=seed)
    held = _held_out(memory, teacher, work)
    everything = None
    if course != "strong":
        everything = read(images, train, "reading images", sharing=sharing)
    if everything is not None:
        pixels, labels = everything[0], to_outputs(everything[1], outputs)
        kept = ImagesInMemory(pixels, labels, images.preprocessing, flips=flips, seed=seed)
        return TrainingSet(kept, held)
    files = ImagesInFiles(
        images, train, strong=course == "strong", flips=flips, seed=seed,
        relabel=lambda y: to_outputs(y, outputs),
    )  # fmt: skip
    return TrainingSet(files, held)


def to_outputs(labels: torch.Tensor, outputs: list[int] | None) -> torch.Tensor:
    """Labels as indices of a cut head's outputs; -1 stays."""
    if outputs is None:
        return labels
    place = {label: i for i, label in enumerate(outputs)}
    return torch.tensor([place.get(int(y), -1) for y in labels], dtype=torch.int64)


def _held_out(memory: ImagesInMemory, teacher: Teacher, work: Work) -> HeldOut:
    return HeldOut(memory, logits_of(teacher, memory, work.where))

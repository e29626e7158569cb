"""The images of healing: opened with or without labels, split, read."""

from __future__ import annotations

from dataclasses import replace

import torch

from npprune.data.sources import ImageSource
from npprune.data.transforms import make_transform, resolve
from npprune.data.unlabelled import Joined, open_unlabelled
from npprune.errors import DataError
from npprune.pipeline.common.events import Emit, Event
from npprune.pipeline.common.inputs import Images, open_images
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.heal.image_cache import Files, Memory, Pool, read
from npprune.pipeline.heal.teacher import Held, Teacher, logits_of
from npprune.recipe import DataSection, HealSection
from npprune.records import CheckpointConfig, ModelInfo

STAGE = "heal"
HELD_OUT = 10  # one image of so many is never trained on
HELD_OUT_MOST = 2000


def open_training_images(
    config: CheckpointConfig,
    dense: ModelInfo,
    data: DataSection,
    settings: HealSection,
    emit: Emit,
) -> tuple[Images, Images | None]:
    """The images, those of `unlabelled` behind them (and alone beside them)."""
    specialised = config.details.get("classes")
    asked = data
    if specialised is not None and data.classes is None:
        asked = data.model_copy(update={"classes": list(specialised)})
    try:
        images = open_images(
            data.train or data.calibration, asked, dense, flag="--data", on_bad="skip",
            stage=STAGE, emit=emit, preprocessing=config.preprocessing,
        )  # fmt: skip
    except DataError as err:
        spec = data.train or data.calibration or ""
        needed = settings.label_weight > 0 or asked.classes is not None
        if needed or not spec.startswith("folder:"):
            raise
        source = open_unlabelled(spec)  # raises where there are no images at all
        emit(Event(STAGE, f"labels are not used: {err.message}"))
        images = _unlabelled(source, config, asked, emit)
    if specialised is not None and not set(images.source.selected) <= set(specialised):
        other = sorted(set(images.source.selected) - set(specialised))[0]
        raise DataError(
            f"the checkpoint was pruned for {len(specialised)} classes, and class {other} is not "
            "one of them",
            hint="leave `--classes` out, or choose among those of the checkpoint",
        )
    if settings.unlabelled is None:
        return images, None
    extra = _unlabelled(open_unlabelled(settings.unlabelled), config, asked, emit)
    emit(Event(STAGE, f"{settings.unlabelled}: {extra.source.length} images more, unlabelled"))
    joined = replace(images, source=Joined(images.source, extra.source))
    return joined, extra


def _unlabelled(
    source: ImageSource, config: CheckpointConfig, data: DataSection, emit: Emit
) -> Images:
    pre = resolve(
        config.preprocessing, mean=data.mean, std=data.std, interpolation=data.interpolation,
        crop_pct=data.crop_pct, crop_mode=data.crop_mode,
    )  # fmt: skip
    on_bad = data.on_bad_image or "skip"
    return Images(source, pre, make_transform(pre), data, on_bad, STAGE, emit)


def split(images: Images) -> tuple[list[int] | None, list[int] | None]:
    """Positions to train on and to measure on; None for a stream, which is split when read."""
    if images.source.items is None:
        return None, None
    first = images.source.first if isinstance(images.source, Joined) else images.source
    assert first.items is not None
    return every_tenth(len(images.source.items), len(first.items), images.source.spec)


def every_tenth(n: int, of_first: int, spec: str) -> tuple[list[int], list[int]]:
    """Positions of n images to train on, and to hold out.

    Only the first source's images are held out: it is what the network is for.
    """
    if of_first < 2:
        raise DataError(
            f"`{spec}` has one image: healing trains on some and is measured on others",
            hint="give at least two; a hundred or more make sense",
        )
    stride = max(HELD_OUT, -(-of_first // HELD_OUT_MOST))
    held = [i for i in range(of_first) if i % stride == stride - 1] or [of_first - 1]
    out = set(held)
    return [i for i in range(n) if i not in out], held


def read_training_images(
    images: Images,
    train: list[int] | None,
    held_out: list[int] | None,
    course: str,
    teacher: Teacher,
    device: torch.device,
    peers: Processes,
    seed: int,
) -> tuple[Pool, Held]:
    """The training images, in memory where they fit, and those held out with the teacher's
    logits."""
    flips = course in ("mixed", "flips")
    outputs = teacher.chosen if not teacher.expands else None
    pool: Pool
    if train is None or held_out is None:
        everything = read(images, None, "reading images", processes=peers.local_count)
        if everything is None:
            raise DataError(
                f"the images of the stream `{images.source.spec}` do not fit into memory",
                hint="`--images-per-class N` takes fewer, a folder can be read again and again",
            )
        pixels, labels, found = everything
        labels = to_outputs(labels, outputs)
        chosen, other = every_tenth(len(found), len(found), images.source.spec)
        pool = Memory(pixels[chosen], labels[chosen], images.preprocessing, flips=flips, seed=seed)
        memory = Memory(pixels[other], labels[other], images.preprocessing, flips=False, seed=seed)
        return pool, _held(memory, teacher, device)
    kept = read(images, held_out, "reading held-out images")
    if kept is None:
        raise DataError("the held-out images do not fit into memory")
    pixels, labels = kept[0], to_outputs(kept[1], outputs)
    memory = Memory(pixels, labels, images.preprocessing, flips=False, seed=seed)
    held = _held(memory, teacher, device)
    everything = None
    if course != "strong":
        everything = read(images, train, "reading images", processes=peers.local_count)
    if everything is not None:
        pixels, labels = everything[0], to_outputs(everything[1], outputs)
        return Memory(pixels, labels, images.preprocessing, flips=flips, seed=seed), held
    pool = Files(
        images, train, strong=course == "strong", flips=flips, seed=seed,
        relabel=lambda y: to_outputs(y, outputs),
    )  # fmt: skip
    return pool, held


def to_outputs(labels: torch.Tensor, outputs: list[int] | None) -> torch.Tensor:
    """Labels as indices of a cut head's outputs; -1 stays."""
    if outputs is None:
        return labels
    place = {label: i for i, label in enumerate(outputs)}
    return torch.tensor([place.get(int(y), -1) for y in labels], dtype=torch.int64)


def _held(memory: Memory, teacher: Teacher, device: torch.device) -> Held:
    return Held(memory, logits_of(teacher, memory, device))

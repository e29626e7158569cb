"""The images of an export: those it is compared on, and for int8 others to calibrate with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npprune.data.labels import KnownNames
from npprune.errors import DataError, UsageError, plural, setting
from npprune.pipeline.common.inputs import Images, open_images, remembered
from npprune.pipeline.common.work import Work
from npprune.recipe import DataSection
from npprune.records import CheckpointConfig, ModelInfo

PARITY_IMAGES = 51  # three runs of the largest batch that is compared
HELD_OUT_IMAGES = 400  # for fp16 and int8, which are judged by accuracy
FEW_IMAGES = 100
ONE_IN = 5  # of the images of int8 calibrates, the others are held out


@dataclass
class ExportImages:
    """Normalised images, evenly over the source.

    images: [n, 3, H, W], to compare and to judge on. labels: [n], as outputs of the network.
    source_labels: [n], as the source says. calibration: [m, 3, H, W], none of `images`; int8 only.
    """

    images: Tensor
    labels: Tensor
    source_labels: Tensor
    calibration: Tensor | None
    opened: Images

    def details(self) -> dict[str, Any]:
        """What the record says of them."""
        found: dict[str, Any] = {
            "source": self.opened.source.spec,
            "compared": len(self.images),
            "skipped": list(self.opened.skipped),
        }
        if self.calibration is not None:
            found["calibration"] = len(self.calibration)
        return found


def read_images(
    info: ModelInfo,
    config: CheckpointConfig | None,
    data: DataSection,
    precision: str,
    work: Work,
    *,
    num_classes: int,
    names: KnownNames | None,
) -> ExportImages:
    """Real images for a network, `num_classes` and `names` being of the source's label space.

    Where `data` names no source, a checkpoint's own calibration source is read.

    Raises:
        UsageError: no source was named and none is remembered; DataError: it cannot be read.
    """
    opened = _open(replace(info, num_classes=num_classes), config, data, work, precision, names)
    outputs: list[int] | None = None if config is None else config.details.get("outputs")
    wanted = PARITY_IMAGES if precision == "fp32" else HELD_OUT_IMAGES
    if precision == "int8":
        wanted = wanted * ONE_IN // (ONE_IN - 1)
    images, labels = _read(opened, wanted)
    calibrates = torch.zeros(len(labels), dtype=torch.bool)
    if precision == "int8":
        calibrates[::ONE_IN] = True
        if len(labels) < 2:
            raise DataError(
                f"int8 needs at least two readable images of `{opened.source.spec}`, one to "
                f"calibrate and one to judge by; it has {len(labels)}",
                hint=f"give more images with {setting('data.val')}",
            )
    held = ~calibrates
    if precision != "fp32" and int(held.sum()) < FEW_IMAGES:
        n = int(held.sum())
        work.warn(
            f"{precision} is judged by {plural(n, 'image')} only: one of them is {100 / n:.1f} "
            "points of top-1"
        )
    source_labels = labels[held]
    return ExportImages(
        images=images[held],
        labels=source_labels if outputs is None else _as_outputs(source_labels, outputs),
        source_labels=source_labels,
        calibration=images[calibrates] if precision == "int8" else None,
        opened=opened,
    )


def _open(
    info: ModelInfo,
    config: CheckpointConfig | None,
    data: DataSection,
    work: Work,
    precision: str,
    names: KnownNames | None,
) -> Images:
    """The source named in `data`, else the one that the checkpoint remembers."""
    # Judging int8 takes part in making it: images kept for evaluation are the last to be used.
    own = (data.val, data.calibration, data.train)
    spec = next((s for s in (own if precision != "int8" else (*own[1:], own[0])) if s), None)
    recalled = spec is None and config is not None
    if spec is None and config is not None:
        given = data.model_dump(exclude_unset=True, exclude_none=True)
        said = {**config.details.get("data", {}), **given}
        data = remembered(DataSection, said, "the checkpoint")
        spec = data.calibration or data.train
    try:
        return open_images(
            spec, data, info, work, asked="data.val", on_bad="skip",
            preprocessing=info.preprocessing, names=names,
        )  # fmt: skip
    except DataError as err:
        if not recalled:
            raise
        raise DataError(
            f"the checkpoint was calibrated on `{spec}`, which cannot be read now: {err.message}",
            hint=f"give images with {setting('data.val', 'SOURCE')}",
        ) from err


def _read(opened: Images, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` images [n, 3, H, W] and their labels [n]."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    missing = count
    for batch in opened.batches(indices=opened.evenly(count)):
        images.append(batch.images[:missing])
        labels.append(batch.labels[:missing])
        missing -= len(labels[-1])
        opened.work.progress(count - missing, None)
        if missing == 0:
            break
    if missing == count:
        raise UsageError(
            f"no image of `{opened.source.spec}` could be read",
            hint=f"give others with {setting('data.val')}",
        )
    return torch.cat(images), torch.cat(labels)


def _as_outputs(labels: Tensor, outputs: list[int]) -> Tensor:
    position = {c: i for i, c in enumerate(outputs)}
    return torch.tensor([position[int(y)] for y in labels])


def whole_batches(images: Tensor, batch: str | int) -> Tensor:
    """The images, the first ones again until whole batches are full; calibration drops a rest."""
    if batch == "dynamic":
        return images
    count = -(-len(images) // int(batch)) * int(batch)
    return images[torch.arange(count) % len(images)]

"""Whether a network gives numbers, and if not, where they end: image, weights or block.

NaN ranks above every number, so a path or a score made of it looks like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npprune.core.view import VitView
from npprune.errors import DataError, ModelError, NpPruneError


def check_outputs(
    view: VitView, images: Tensor, outputs: Tensor, *, first: int | None = None
) -> None:
    """The usual case costs one reduction of the outputs.

    Args:
        images: [b, 3, H, W]; outputs: logits or features [b, ...], what the network gave on them.
        first: the number of the first image, for the message; None: images are counted within
            their batch.

    Raises:
        DataError: an image holds values that are not finite.
        ModelError: the weights do, or the network gives none on finite images.
    """
    good = torch.isfinite(outputs.detach().flatten(1).logsumexp(dim=1))
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        name = f"image {row} of its batch" if first is None else f"image {first + row}"
        raise explained(view, images[row : row + 1], name)


def check_scores(scores: Tensor, *, what: str, dtype: torch.dtype) -> None:
    """ModelError where one of the scores [b, ...] of a batch is not finite."""
    good = torch.isfinite(scores.flatten(1)).all(dim=1)
    if not bool(good.all()):
        raise ModelError(
            f"{what} must be finite, got NaN or infinity for image {int((~good).nonzero()[0])} of "
            f"its batch: gradients overflow in {_name(dtype)}",
            hint="run the network in float32: `model.float()`",
        )


@torch.no_grad()
def explained(view: VitView, image: Tensor, name: str) -> NpPruneError:
    """Where the numbers of one image [1, 3, H, W] end, as the error to raise."""
    if not bool(torch.isfinite(image).all()):
        bad = int((~torch.isfinite(image)).sum())
        return DataError(
            f"{name} must hold finite values, got NaN or infinity in {bad} of {image.numel()}",
            hint="check its file and the mean and standard deviation it is normalised by",
        )
    for part, value in view.model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            return ModelError(
                f"the weights must be finite, got NaN or infinity in `{part}`",
                hint="the file is damaged, or training diverged: take other weights",
            )
    x, where = view.embed(image), "the embedding"
    for l in range(len(view.widths)):
        if not bool(torch.isfinite(x).all()):
            break
        x, where = view.block(l, x), f"block {l}"
    if bool(torch.isfinite(x).all()):
        where = "the classifier" if view.classifiers() else "the last norm"
    return ModelError(
        f"the network gives no finite numbers after {where} for {name}: it overflows in "
        f"{_name(x.dtype)}",
        hint="run it in float32: `model.float()`, or `--precision fp32`",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Who pays: images whose prediction flipped, and on which of them networks were right."""

from __future__ import annotations

import base64
import binascii

from npprune.errors import StoreError
from npprune.records import Evaluation, FlippedImage, Outcomes
from npprune.report import text
from npprune.report.document import Cell, Gallery, Picture, Table, cells

KINDS = {"UklGR": "webp", "/9j/": "jpeg", "iVBOR": "png"}  # how base64 of such a file begins
CAPTION = (
    "Images are spread evenly over all that flipped, not the worst. Read what the lost ones have "
    "in common, and how sure of the wrong class the pruned network is: a sure mistake costs more "
    "than a doubtful one."
)


def gallery(evaluation: Evaluation, title: str) -> Gallery | None:
    """Some of the images that flipped; None where an evaluation has none."""
    shown = [image for image in evaluation.flipped if kind(image.picture)]
    if not shown:
        return None
    said = ""
    if evaluation.outcomes is not None:
        before, after = (right(evaluation.outcomes, which) for which in ("dense", "pruned"))
        lost, gained = changed(before, after)
        said = (
            f"Of {text.plural(evaluation.outcomes.images, 'image')} {text.count(lost)} "
            f"{'was right before and is' if lost == 1 else 'were right before and are'} wrong now, "
            f"{text.count(gained)} the other way round. "
        )
    return Gallery(title, said + CAPTION, [_picture(image) for image in shown], _table(shown))


def kind(picture: str) -> str | None:
    """The type of a picture in base64, by how it begins; None: no picture that is shown."""
    found = next((k for begin, k in KINDS.items() if picture.startswith(begin)), None)
    try:
        base64.b64decode(picture, validate=True)
    except (binascii.Error, ValueError):
        return None
    return found


def right(outcomes: Outcomes, which: str) -> int:
    """On which images the dense or the pruned network is right, as the bits of a number.

    Raises:
        StoreError: there are not as many as images.
    """
    try:
        data = base64.b64decode(getattr(outcomes, which), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != (outcomes.images + 7) // 8:
        raise StoreError(
            f"`outcomes.{which}` must hold a bit for each of "
            f"{text.plural(outcomes.images, 'image')}, got {len(data)} bytes",
            hint="evaluate the checkpoint again",
        )
    return int.from_bytes(data, "big") >> (-outcomes.images % 8)


def changed(before: int, after: int) -> tuple[int, int]:
    """How many images are lost (right before, wrong now), and how many gained."""
    return (before & ~after).bit_count(), (after & ~before).bit_count()


def _picture(image: FlippedImage) -> Picture:
    dense, pruned = _predictions(image)
    return Picture(
        f"data:image/{kind(image.picture)};base64,{image.picture}",
        text.clean(image.name),
        [
            f"{text.clip(image.name, 48)}: {'lost' if image.lost else 'gained'}",
            f"dense: {dense}",
            f"pruned: {pruned}",
        ],
    )


def _predictions(image: FlippedImage) -> tuple[str, str]:
    return (
        f"{text.clip(image.dense, 48)}, {text.percent(image.dense_probability, 0)}",
        f"{text.clip(image.pruned, 48)}, {text.percent(image.pruned_probability, 0)}",
    )


def _table(images: list[FlippedImage]) -> Table:
    rows = [
        [
            *cells(text.clean(i.name), "lost" if i.lost else "gained"),
            *(Cell(said) for said in _predictions(i)),
        ]
        for i in images
    ]
    return Table(["class", "", "dense says", "pruned says"], rows, text=4)

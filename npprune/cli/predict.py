"""`npprune predict`: labels and probabilities from an ONNX file alone."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from npprune import files
from npprune.cli import options
from npprune.cli.console import Output, drop
from npprune.cli.options import argument, choice, option
from npprune.cli.streams import PLAIN
from npprune.errors import DataError, StoreError, UsageError
from npprune.report import text
from npprune.untrusted import MAX_PIXELS, cell
from npprune.words import ON_BAD_IMAGE, PROVIDERS, TABLE_FORMATS, check_word

if TYPE_CHECKING:
    from npprune.export.predict import Prediction

EXAMPLES = """\
Example

  npprune predict vit_tiny_half.onnx cat.jpg

Example: a folder, as a table for other programs

  npprune predict vit_tiny_half.onnx photos --topk 1 --on-bad-image skip --out photos.csv

Classes and preprocessing are read from the file; PyTorch is not needed.
"""

PREDICTION = "Prediction"


def command(
    model: Annotated[Path, argument("MODEL.onnx", "a file written by npprune export")],
    images: Annotated[list[Path], argument("IMAGE_OR_FOLDER...", "folders are searched through")],
    *,
    topk: Annotated[int, option(PREDICTION, "--topk", "K", "likeliest classes of each image")] = 5,
    batch: Annotated[int, option(PREDICTION, "--batch", "N", "images per run")] = 16,
    provider: Annotated[str, options.provider(PREDICTION, "what runs it")] = "auto",
    threads: Annotated[
        int | None, option(PREDICTION, "--threads", "N", "\\[default: one per core]")
    ] = None,
    on_bad_image: Annotated[
        str,
        choice(PREDICTION, "--on-bad-image", "stop, or report it and continue", ON_BAD_IMAGE),
    ] = "error",
    max_megapixels: Annotated[
        float,
        option(PREDICTION, "--max-megapixels", "N", "millions of pixels of the largest image"),
    ] = MAX_PIXELS / 1e6,
    format: Annotated[
        str | None,
        choice("Output", "--format", "\\[default: by --out's name, else table]", TABLE_FORMATS),
    ] = None,
    out: Annotated[
        Path | None, option("Output", "--out", "FILE", "\\[default: the terminal]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Classify images with an exported file."""
    shape = _format(format, out, as_json)
    out = None if out is not None and files.is_stdout(out) else out
    check_word("provider", provider, PROVIDERS)
    for flag, value in (("--topk", topk), ("--batch", batch), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"`{flag}` must be at least 1, got `{value}`")
    check_word("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    if not 0 < max_megapixels <= 10_000:
        raise UsageError(f"`--max-megapixels` must be in (0, 10000], got `{max_megapixels:g}`")

    from npprune.export.predict import find_images, predict

    if out is not None and not files.is_stream(out):
        files.check_file(out)
        if out.exists():
            files.refuse_overwriting(out, [model, f"{model}.data", *find_images(images)])
    output = Output(as_json=shape != "table")
    found = predict(
        model,
        images,
        topk=topk,
        batch=batch,
        provider=provider,
        threads=threads,
        on_bad="skip" if on_bad_image == "skip" else "error",
        warn=lambda note: output.warn([note]),
        max_pixels=int(1e6 * max_megapixels),
    )
    seen = _Count()
    first = next(found)  # what cannot start is said before anything is written
    with _sink(out) as sink:
        try:
            WRITERS[shape](sink, seen.watch(chain([first], found), output), model)
        except BrokenPipeError:
            drop(sys.stdout)
    if seen.bad == seen.images:
        raise DataError(f"none of the {text.plural(seen.images, 'image')} could be read")
    if out is not None:
        if seen.bad:
            output.warn([f"{seen.bad} of {text.plural(seen.images, 'image')} could not be read"])
        done = text.plural(seen.images - seen.bad, "prediction")
        Output(as_json=as_json).line(f"{done}  {out}")


def _format(given: str | None, out: Path | None, as_json: bool) -> str:
    if as_json and given not in (None, "json"):
        raise UsageError(f"`--json` means `--format json`, got `--format {given}` as well")
    suffix = out.suffix.lower().removeprefix(".") if out is not None else ""
    shape = given or ("json" if as_json else suffix if suffix in TABLE_FORMATS else "table")
    check_word("format", shape, TABLE_FORMATS)
    return shape


class _Count:
    """How many images went by, and how many of them could not be read: those are said at once."""

    def __init__(self) -> None:
        self.images = self.bad = 0

    def watch(self, found: Iterable[Prediction], output: Output) -> Iterator[Prediction]:
        for prediction in found:
            self.images += 1
            if prediction.error is not None:
                self.bad += 1
                output.warn([prediction.error])
            yield prediction


@contextmanager
def _sink(out: Path | None) -> Iterator[IO[str]]:
    """The terminal, a device or pipe, or a file that gets its name when it is complete.

    Where the file cannot be written in the end, the predictions go to the terminal instead.
    """
    if out is None:
        yield sys.stdout
        sys.stdout.flush()
    elif files.is_stream(out):
        try:
            with out.open("a", encoding="utf-8", errors=PLAIN, newline="") as stream:
                yield stream
        except BrokenPipeError:
            pass  # its reader has left
        except OSError as err:
            raise files.store_error(err, out) from err
    else:
        held = io.StringIO(newline="")
        yield held
        try:
            files.write_bytes(out, held.getvalue().encode(errors=PLAIN))
        except StoreError:
            sys.stdout.write(held.getvalue())
            raise


# ---------------------------------------------------------------- formats


def _table(sink: IO[str], found: Iterable[Prediction], model: Path) -> None:
    """An image, then a class a line: nothing to align, so nothing has to be waited for."""
    for prediction in found:
        sink.write(text.clean(prediction.image) + "\n")
        if prediction.error is not None:
            sink.write("   not readable\n")
        for guess in prediction.guesses:
            share = text.percent(guess.probability).rjust(9)
            sink.write(f"{share}  {text.clean(guess.name)} ({guess.index})\n")


def _csv(sink: IO[str], found: Iterable[Prediction], model: Path) -> None:
    """A line for each class of each image."""
    rows = csv.writer(sink, lineterminator="\n")
    rows.writerow(["image", "rank", "index", "name", "synset", "probability", "error"])
    for p in found:
        if p.error is not None:
            rows.writerow([cell(p.image), "", "", "", "", "", cell(p.error)])
        for rank, g in enumerate(p.guesses, 1):
            words = cell(g.name), cell(g.synset or "")
            rows.writerow([cell(p.image), rank, g.index, *words, f"{g.probability:.6g}", ""])


def _json(sink: IO[str], found: Iterable[Prediction], model: Path) -> None:
    """One document, written image by image."""
    from npprune.records import SCHEMA_VERSION

    head = {"schema_version": SCHEMA_VERSION, "kind": "predictions", "model": str(model)}
    sink.write(json.dumps(head)[:-1] + ', "predictions": [')
    for i, prediction in enumerate(found):
        sink.write((",\n  " if i else "\n  ") + json.dumps(asdict(prediction), allow_nan=False))
    sink.write("\n]}\n")


WRITERS = {"table": _table, "csv": _csv, "json": _json}

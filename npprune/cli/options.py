"""The options that several commands share: one alias each, so that they read the same everywhere.

Values stay text or plain numbers here; `npprune.cli.flags` checks them against the recipe's
sections, so that the bounds and the messages have one home.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL = "Model"
IMAGES = "Images"
PREPROCESSING = "Preprocessing (the model's own unless given)"
RUN = "Run"


def option(panel: str, flag: str, metavar: str | None, what: str, **more: Any) -> Any:
    """An option in a panel of the help; `metavar` None: a switch."""
    return typer.Option(flag, metavar=metavar or "", help=what, rich_help_panel=panel, **more)


def choice(panel: str, flag: str, what: str, *values: str) -> Any:
    """An option of a few words: named in the help, completed by the shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    text = f"{what}: {', '.join(values)}"
    return option(panel, flag, "WORD", text, autocompletion=complete)


def required(panel: str, flag: str, metavar: str, what: str) -> Any:
    """An option without a default."""
    return option(panel, flag, metavar, what, show_default=False)


def argument(metavar: str, what: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=what, show_default=False)


# ---------------------------------------------------------------- model

Model = Annotated[
    str, argument("MODEL", "timm name, or `auto`: the architecture is read from --checkpoint")
]
Checkpoint = Annotated[
    str | None,
    option(MODEL, "--checkpoint", "FILE", ".safetensors, .pth or .npz; else timm's own weights"),
]
NumHeads = Annotated[int | None, option(MODEL, "--num-heads", "N", "attention heads per block")]
ImgSize = Annotated[
    str | None,
    option(MODEL, "--img-size", "N|HxW", "input side or sides; position embeddings are resampled"),
]
ReleasedHead = Annotated[
    bool,
    option(
        MODEL, "--released-head", None, "normalise MAE's pooled tokens twice, as the paper's code"
    ),
]
NumClasses = Annotated[int | None, option(MODEL, "--num-classes", "N", "outputs of the classifier")]
CheckpointFolder = Annotated[Path, argument("CHECKPOINT", "a folder written by npprune prune")]
RunFolder = Annotated[Path, argument("RUN", "a run folder, or its result.json")]

# ---------------------------------------------------------------- images

Data = Annotated[
    str,
    required(IMAGES, "--data", "SOURCE", "folder:PATH, digits, or tfds/, hfds/, wds/, torch/ NAME"),
]
ClassMap = Annotated[
    str | None,
    option(IMAGES, "--class-map", "FILE", "json or txt: class index of each folder's name"),
]
Classes = Annotated[
    list[str] | None,
    option(
        IMAGES,
        "--classes",
        "LIST|FILE",
        "only these: indices, synsets or names, separated by commas, or a file",
    ),
]
ImagesPerClass = Annotated[
    int | None, option(IMAGES, "--images-per-class", "N", "at most N images of each class")
]
OnBadImage = Annotated[
    str | None, choice(IMAGES, "--on-bad-image", "end the run, or skip and count", "error", "skip")
]
BatchSize = Annotated[int | None, option(IMAGES, "--batch-size", "N", "images per batch")]
Workers = Annotated[
    int | None, option(IMAGES, "--workers", "N", "processes that read images; 0: the main one")
]

# ---------------------------------------------------------------- preprocessing

Preprocessing = Annotated[
    str | None,
    choice(
        PREPROCESSING, "--preprocessing", "released: the paper's code's own", "model", "released"
    ),
]
Mean = Annotated[
    str | None, option(PREPROCESSING, "--mean", "R,G,B", "subtracted from pixels in 0 to 1")
]
Std = Annotated[
    str | None, option(PREPROCESSING, "--std", "R,G,B", "pixels are divided by it, after the mean")
]
Interpolation = Annotated[
    str | None,
    choice(
        PREPROCESSING, "--interpolation", "resizing", "bicubic", "bilinear", "nearest", "lanczos"
    ),
]
CropPct = Annotated[
    float | None,
    option(PREPROCESSING, "--crop-pct", "SHARE", "the crop's side over the image's, in (0, 1]"),
]
CropMode = Annotated[
    str | None,
    choice(
        PREPROCESSING,
        "--crop-mode",
        "cut the middle, resize straight, or pad",
        "center",
        "squash",
        "border",
    ),
]
NoCrop = Annotated[
    bool, option(PREPROCESSING, "--no-crop", None, "short for --crop-mode squash --crop-pct 1")
]

# ---------------------------------------------------------------- run

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
Device = Annotated[str, choice(RUN, "--device", "must be there if named", *DEVICES)]
Seed = Annotated[int, option(RUN, "--seed", "N", "for everything random")]
DryRun = Annotated[
    bool, option(RUN, "--dry-run", None, "check, say what would be done, write nothing")
]
Json = Annotated[bool, option(RUN, "--json", None, "one JSON document on stdout")]
Root = Annotated[Path, option(RUN, "--root", "FOLDER", "reports/ and ckpt/ are written below it")]

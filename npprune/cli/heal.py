"""`npprune heal`: a short training of a pruned network, the dense one being the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, RUN, choice, option, required

EXAMPLES = """\
Example: eight times through a thousand images, minutes on two CPU cores

  npprune heal ckpt/vit_tiny_half --data folder:imagenet/train --epochs 8 \\
    --out ckpt/vit_tiny_half_healed

Example: as long as there is time, with more images that need no labels

  npprune heal ckpt/vit_tiny_half --data folder:imagenet/train --minutes 30 \\
    --unlabelled folder:more --out ckpt/vit_tiny_half_healed

Example: eight GPUs

  torchrun --nproc-per-node 8 -m npprune heal ckpt/vit_base_half --epochs 30 \\
    --data folder:imagenet/train --batch-size 1024 --workers 8 --precision bf16 \\
    --out ckpt/vit_base_half_healed

Interrupted, the same command resumes where it stopped.
"""

LENGTH = "Length (one of epochs and minutes)"
TEACHING = "Teaching"


def command(
    ctx: typer.Context,
    checkpoint: options.CheckpointFolder,
    *,
    epochs: Annotated[
        int | None, option(LENGTH, "--epochs", "N", "times through the images")
    ] = None,
    minutes: Annotated[
        float | None, option(LENGTH, "--minutes", "M", "all in all, reading the images included")
    ] = None,
    patience: Annotated[
        int,
        option(LENGTH, "--patience", "N", "stop when the held-out divergence rose N times running"),
    ] = 3,
    lr: Annotated[float, option(TEACHING, "--lr", "X", "highest learning rate")] = 5e-5,
    batch_size: Annotated[
        int, option(TEACHING, "--batch-size", "N", "images per step, over all processes")
    ] = 16,
    weight_decay: Annotated[float, option(TEACHING, "--weight-decay", "X", "of matrices")] = 0.01,
    temperature: Annotated[
        float, option(TEACHING, "--temperature", "T", "softens the predictions")
    ] = 1.0,
    feature_weight: Annotated[
        float | None,
        option(
            TEACHING,
            "--feature-weight",
            "X",
            "of each block's output, in addition \\[default: 20, or 0 where blocks do not match]",
        ),
    ] = None,
    label_weight: Annotated[
        float, option(TEACHING, "--label-weight", "X", "of the labels, in addition; 0: not read")
    ] = 0.0,
    augment: Annotated[
        str,
        choice(
            TEACHING,
            "--augment",
            "auto goes by the length",
            "auto",
            "mixed",
            "flips",
            "strong",
            "none",
        ),
    ] = "auto",
    layerwise: Annotated[
        bool,
        option(TEACHING, "--layerwise", None, "each block's MLP on its own: cheap, gains less"),
    ] = False,
    precision: Annotated[
        str, choice(TEACHING, "--precision", "of matrix products", "fp32", "bf16")
    ] = "fp32",
    dense: Annotated[
        str | None, option(TEACHING, "--dense", "FILE", "the dense weights, where they have moved")
    ] = None,
    any_teacher: Annotated[
        bool, option(TEACHING, "--any-teacher", None, "other weights than those that were pruned")
    ] = False,
    data: options.Data,
    unlabelled: Annotated[
        str | None,
        option(IMAGES, "--unlabelled", "SOURCE", "folder:PATH of more images, in any order"),
    ] = None,
    class_map: options.ClassMap = None,
    classes: options.Classes = None,
    images_per_class: options.ImagesPerClass = None,
    on_bad_image: options.OnBadImage = None,
    workers: options.Workers = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    no_crop: options.NoCrop = False,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the healed checkpoint's folder")],
    device: options.Device = "auto",
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Train a pruned network to predict what its dense network predicts. Needs no labels."""
    from npprune.recipe import HealSection

    settings = flags.section(
        HealSection,
        epochs=epochs,
        minutes=minutes,
        patience=patience,
        lr=lr,
        batch_size=batch_size,
        weight_decay=weight_decay,
        temperature=temperature,
        feature_weight=feature_weight,
        label_weight=label_weight,
        augment=augment,
        layerwise=layerwise,
        precision=precision,
        unlabelled=unlabelled,
    )
    source = flags.checkpoint_folder(checkpoint)
    flags.existing_file("--dense", dense)
    folder = flags.out_folder(out)
    images = flags.data_section({**ctx.params, "batch_size": None}, train=data)
    chosen, seed_value = flags.device(device), flags.seed(seed)

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.heal.stage import heal

    output = Output(as_json=as_json)
    with output.working() as emit:
        variant = output.result(
            heal,
            source,
            images,
            settings,
            folder,
            dense_checkpoint=dense,
            any_teacher=any_teacher,
            work=Work(chosen, seed_value, emit, flags.command_line(ctx)),
            dry_run=dry_run,
        )
    show.healed(output, variant, folder)
    output.finish()

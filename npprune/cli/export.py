"""`npprune export`: one file, run and compared before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npprune import words
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, RUN, argument, choice, option
from npprune.errors import UsageError

if TYPE_CHECKING:
    from npprune.recipe import ExportSection

EXAMPLES = """\
Example: a pruned network, timed against the dense one

  npprune export ckpt/vit_tiny_half --data folder:imagenet/val --out vit_tiny_half.onnx

Example: eight-bit integers, at most half a point of top-1 worse

  npprune export ckpt/vit_tiny_half --precision int8 --max-drop 0.5 \\
    --data folder:imagenet/train --out vit_tiny_half_int8.onnx

Example: the dense network, the same way

  npprune export vit_tiny_patch16_224.augreg_in21k_ft_in1k --checkpoint W.safetensors \\
    --data folder:imagenet/val --out vit_tiny.onnx

The file is run on real images at batch sizes 1, 3 and 17 and compared with the network. Where \
they differ, nothing is left under the file's name and the exit code is 1.
"""

FILE = "File"
MODEL_FLAGS = ("checkpoint", "num_heads", "img_size", "num_classes")


def command(
    ctx: typer.Context,
    source: Annotated[
        str, argument("CKPT_OR_MODEL", "a folder of npprune prune, or a model's name")
    ],
    *,
    format: Annotated[
        str, choice(FILE, "--format", "torch is a torch.export archive", *words.FORMATS)
    ] = "onnx",
    precision: Annotated[
        str, choice(FILE, "--precision", "of the weights", *words.FILE_PRECISIONS)
    ] = "fp32",
    max_drop: Annotated[
        float | None,
        option(
            FILE,
            "--max-drop",
            "POINTS",
            "exit 1 where top-1 falls by more \\[default: 1.0 for int8, 0.5 for fp16]",
        ),
    ] = None,
    opset: Annotated[int, option(FILE, "--opset", "N", "ONNX operator set, 17 to 23")] = 20,
    batch: Annotated[
        str, option(FILE, "--batch", "dynamic|N", "images per run; dynamic: any number")
    ] = "dynamic",
    with_preprocessing: Annotated[
        bool,
        option(
            FILE, "--with-preprocessing", None, "pixels in (uint8, NHWC), normalised by the file"
        ),
    ] = False,
    provider: Annotated[
        str, choice(FILE, "--provider", "runs the comparison", *words.PROVIDERS)
    ] = "auto",
    latency: Annotated[
        bool, option(FILE, "--latency/--no-latency", None, "time it against the dense network")
    ] = True,
    dense: Annotated[
        str | None, option(FILE, "--dense", "FILE", "the dense weights, where they have moved")
    ] = None,
    data: Annotated[
        str | None,
        option(
            IMAGES,
            "--data",
            "SOURCE",
            "images to compare on, for int8 also to calibrate with \\[default: the checkpoint's]",
        ),
    ] = None,
    class_map: options.ClassMap = None,
    classes: options.Classes = None,
    on_bad_image: options.OnBadImage = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    no_crop: options.NoCrop = False,
    checkpoint: options.Checkpoint = None,
    num_heads: options.NumHeads = None,
    img_size: options.ImgSize = None,
    num_classes: options.NumClasses = None,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "FILE", "\\[default: CKPT/model.onnx, or MODEL.onnx]"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a network as one file, and check that both give the same answers."""
    from npprune.recipe import ExportSection

    settings = flags.section(
        ExportSection,
        format=format,
        opset=opset,
        precision=precision,
        batch=_batch(batch),
        with_preprocessing=with_preprocessing,
        max_drop=max_drop,
        latency=latency,
    )
    flags.provider(provider)
    flags.existing_file("--dense", dense)
    images = flags.data_section(ctx.params, val=data)
    folder = _checkpoint(source, ctx)
    target = out or _default_target(folder, source, ctx, settings)
    output = Output(as_json=as_json)
    from npprune.pipeline.common.work import Work

    with output.working() as emit:
        work = Work(emit=emit, command=flags.command_line(ctx))
        if folder is not None:
            from npprune.pipeline.export.stage import export_checkpoint

            record = output.result(
                export_checkpoint,
                folder,
                images,
                settings,
                out=target,
                provider=provider,
                dense_checkpoint=dense,
                work=work,
            )
        else:
            from npprune.pipeline.export.stage import export_model

            model = flags.model_section(source, ctx.params)
            record = output.result(
                export_model, model, images, settings, out=target, provider=provider, work=work
            )
    show.exported(output, record, target)
    output.finish()
    if not record.passed:
        raise typer.Exit(1)


def _batch(text: str) -> int | str:
    """`dynamic`, or a number of images."""
    if text == "dynamic":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"`--batch` must be `dynamic` or at least 1, got `{text}`")
    return int(text)


def _checkpoint(source: str, ctx: typer.Context) -> Path | None:
    """The checkpoint folder that is meant, or None: a model's name."""
    path = Path(source)
    given = [f"--{name.replace('_', '-')}" for name in MODEL_FLAGS if ctx.params.get(name)]
    if not (path / "config.json").is_file():
        like_path = "/" in source and not source.startswith(flags.HUB_PREFIXES)
        if not given and (path.is_dir() or like_path):
            return flags.checkpoint_folder(path)
        if ctx.params.get("dense") is not None:
            raise UsageError(
                f"`--dense` goes with a checkpoint of npprune prune, and `{source}` is a model",
                hint="the weights of a model are given by `--checkpoint`",
            )
        return None
    if given:
        raise UsageError(
            f"`{given[0]}` describes a model, and `{source}` is a checkpoint of npprune prune",
            hint="leave it out; where the dense weights have moved, `--dense FILE`",
        )
    return path


def _default_target(
    folder: Path | None, source: str, ctx: typer.Context, settings: ExportSection
) -> Path:
    """Into the checkpoint's folder (timm's own folder: beside it); a model: the current one."""
    suffix = {"onnx": ".onnx", "torch": ".pt2", "timm": "_timm"}[settings.format]
    if folder is not None:
        if settings.format == "timm":
            return folder.with_name(f"{folder.resolve().name}_timm")
        return folder / f"model{suffix}"
    return Path(flags.folder_name(flags.model_section(source, ctx.params)) + suffix)

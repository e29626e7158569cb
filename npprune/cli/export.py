"""`npprune export`: one ONNX file, run and compared before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, RUN, choice, option

EXAMPLES = """\
Example

  npprune export ckpt/vit_tiny_half --data folder:imagenet/val --out vit_tiny_half.onnx

The file is run on real images at batch sizes 1, 3 and 17 and compared with the checkpoint. Where \
they differ, nothing is left under the file's name and the exit code is 1.
"""

FILE = "ONNX file"


def command(
    ctx: typer.Context,
    checkpoint: options.CheckpointFolder,
    *,
    opset: Annotated[int, option(FILE, "--opset", "N", "ONNX operator set, 17 to 23")] = 20,
    precision: Annotated[
        str, choice(FILE, "--precision", "of the weights", "fp32", "fp16", "int8")
    ] = "fp32",
    provider: Annotated[
        str, choice(FILE, "--provider", "runs the comparison", "auto", "cpu", "cuda", "tensorrt")
    ] = "auto",
    dense: Annotated[
        str | None, option(FILE, "--dense", "FILE", "the dense weights, where they have moved")
    ] = None,
    data: Annotated[
        str | None,
        option(IMAGES, "--data", "SOURCE", "images to compare on \\[default: the run's own]"),
    ] = None,
    class_map: options.ClassMap = None,
    on_bad_image: options.OnBadImage = None,
    out: Annotated[
        Path | None, option(RUN, "--out", "FILE", "\\[default: CHECKPOINT/model.onnx]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint as one ONNX file, and check that both give the same answers."""
    from npprune.recipe import ExportSection

    settings = flags.section(ExportSection, opset=opset, precision=precision)
    folder = flags.checkpoint_folder(checkpoint)
    flags.provider(provider)
    flags.existing_file("--dense", dense)
    images = flags.data_section(ctx.params, val=data)

    from npprune.pipeline.export import export_checkpoint

    output = Output(as_json=as_json)
    with output.working() as emit:
        record = export_checkpoint(
            folder,
            images,
            settings,
            out=out,
            provider=provider,
            dense_checkpoint=dense,
            emit=emit,
            command=flags.command_line(ctx),
        )
    show.exported(output, record, out or folder / "model.onnx")
    if not record.passed:
        raise typer.Exit(1)

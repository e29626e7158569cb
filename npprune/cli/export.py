"""`npprune export`: one file, run and compared before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, of, option
from npprune.errors import UsageError, setting
from npprune.files import foreign_folder
from npprune.recipe.sections import FILE, DataSection, ExportSection
from npprune.words import PROVIDERS, check_word

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


@options.settings(ExportSection)
@options.images(
    val=of(
        DataSection,
        "val",
        flag="--data",
        help="images to compare on, for int8 also to calibrate with",
        shown="the checkpoint's",
    ),
    omit=["images_per_class"],
)
@options.model()
@options.run()
def command(
    source: Annotated[
        str, argument("CKPT_OR_MODEL", "a folder of npprune prune, or a model's name")
    ],
    *,
    settings: ExportSection,
    images: DataSection,
    network: dict[str, Any],
    run: options.RunOptions,
    provider: Annotated[str, options.provider(FILE, "runs the comparison")] = "auto",
    dense: Annotated[str | None, options.dense(FILE)] = None,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "FILE", "\\[default: CKPT/model.onnx, or MODEL.onnx]"),
    ] = None,
) -> None:
    """Write a network as one file, and check that both give the same answers."""
    check_word("provider", provider, PROVIDERS)
    flags.existing_file("--dense", dense)
    folder = _checkpoint(source, network, dense)
    model = None if folder is not None else flags.model_section(source, network)

    from npprune.pipeline.export import stage

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        if model is None:
            assert folder is not None
            target = out or stage.default_target(folder, settings.format)
            record = output.result(
                stage.export_checkpoint,
                folder,
                images,
                settings,
                out=target,
                provider=provider,
                dense_checkpoint=dense,
                work=run.work(emit),
            )
        else:
            suffix = stage.SUFFIXES[settings.format] or f"_{settings.format}"
            target = out or Path(flags.folder_name(model) + suffix)
            record = output.result(
                stage.export_model,
                model,
                images,
                settings,
                out=target,
                provider=provider,
                work=run.work(emit),
            )
    show.exported(output, record, target)
    output.finish()
    if not record.passed:
        raise typer.Exit(1)


def _checkpoint(source: str, network: dict[str, Any], dense: str | None) -> Path | None:
    """The checkpoint folder that is meant, or None: a model's name."""
    path = Path(source)
    foreign = foreign_folder(path) is not None
    if foreign or not (path / "config.json").is_file():
        if not foreign and not network and (path.is_dir() or flags.like_path(source)):
            return flags.checkpoint_folder(path)
        if dense is not None:
            raise UsageError(
                f"`--dense` goes with a checkpoint of npprune prune, and `{source}` is a model",
                hint="the weights of a model are given by `--checkpoint`",
            )
        return None
    if network:
        raise UsageError(
            f"{setting(f'model.{min(network)}')} describes a model, and `{source}` is a "
            "checkpoint of npprune prune",
            hint="leave it out; where the dense weights have moved, `--dense FILE`",
        )
    return path

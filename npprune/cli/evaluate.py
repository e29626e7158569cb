"""`npprune eval`: dense and pruned on the same images, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npprune.cli import edit as editing
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, option
from npprune.errors import UsageError

if TYPE_CHECKING:
    from npprune.records import Evaluation, Result

EXAMPLES = """\
Example

  npprune eval ckpt/vit_tiny_half --data folder:imagenet/val

Numbers go to result.json of the run that the checkpoint belongs to, and from there to its report.

Example: the paper's experiments on the paths of a run folder

  npprune eval reports/vit_tiny --edit remove --methods all
  npprune eval reports/vit_tiny --edit keep --paths class,predicted --topk 1,5,10
"""

MEASURE = "Measurement"


def command(
    ctx: typer.Context,
    checkpoint: options.CheckpointFolder,
    *,
    latency: Annotated[
        bool, option(MEASURE, "--latency/--no-latency", None, "time dense and pruned in turn")
    ] = True,
    batches: Annotated[
        str | None,
        option(MEASURE, "--batches", "N,N", "batch sizes that are timed \\[default: 1,16]"),
    ] = None,
    dense: Annotated[
        str | None,
        option(MEASURE, "--dense", "FILE", "the dense weights, where they have moved"),
    ] = None,
    edit: editing.Edit = None,
    paths: editing.Paths = None,
    methods: editing.Methods = None,
    topk: editing.Topk = None,
    factor: editing.Factor = None,
    fraction: editing.Fraction = None,
    depth: editing.Depth = None,
    scope: editing.Tokens = None,
    seeds: editing.Seeds = None,
    name: editing.Name = None,
    data: Annotated[
        str | None,
        option(IMAGES, "--data", "SOURCE", "as for discover; --edit: else the run's own images"),
    ] = None,
    class_map: options.ClassMap = None,
    classes: options.Classes = None,
    images_per_class: options.ImagesPerClass = None,
    on_bad_image: options.OnBadImage = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    no_crop: options.NoCrop = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a pruned network against its dense one: accuracy, probabilities, latency."""
    from npprune.recipe import EvaluateSection

    if edit is not None:
        editing.run_edit(ctx, checkpoint, flags.device(device), as_json)
        return
    editing.refuse_without_edit(ctx.params)
    if data is None:
        raise UsageError(
            "`--data` is needed: the images to evaluate on", hint="e.g. `--data folder:PATH`"
        )
    sizes = flags.numbers("--batches", batches, int)
    if sizes is not None and min(sizes) < 1:
        raise UsageError(f"`--batches` must be at least 1 each, got `{batches}`")
    settings = flags.section(EvaluateSection, latency=latency, batches=sizes)
    folder = flags.checkpoint_folder(checkpoint)
    flags.existing_file("--dense", dense)
    images = flags.data_section(ctx.params, val=data)
    chosen = flags.device(device)

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.evaluate.stage import evaluate

    output = Output(as_json=as_json)
    with output.working() as emit:
        evaluation = output.result(
            evaluate,
            folder,
            images,
            settings,
            dense_checkpoint=dense,
            work=Work(chosen, emit=emit, command=flags.command_line(ctx)),
        )
    show.evaluated(output, evaluation, folder, _run_result(folder, evaluation))
    output.finish()


def _run_result(checkpoint: Path, evaluation: Evaluation) -> Result | None:
    """The result of the checkpoint's run, with this checkpoint as its only variant; None where
    the evaluation is not the one that was recorded there."""
    from npprune.pipeline.common.results import run_of
    from npprune.records import to_json
    from npprune.store.checkpoints import read_config

    run = run_of(checkpoint, read_config(checkpoint))
    if run is None:
        return None
    result = run.read_result()
    result.variants = [v for v in result.variants if v.name == checkpoint.resolve().name]
    recorded = [v.evaluation for v in result.variants if v.evaluation is not None]
    return result if list(map(to_json, recorded)) == [to_json(evaluation)] else None

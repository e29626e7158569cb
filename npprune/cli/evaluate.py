"""`npprune eval`: dense and pruned on the same images, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from npprune.cli import edit as editing
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import of
from npprune.errors import UsageError
from npprune.recipe.sections import MEASURE, DataSection, EvaluateSection

if TYPE_CHECKING:
    from npprune.records import Evaluation, FeatureEvaluation, Result

EXAMPLES = """\
Example

  npprune eval ckpt/vit_tiny_half --data folder:imagenet/val

Numbers go to result.json of the run that the checkpoint belongs to, and from there to its report.

Example: the paper's experiments on the paths of a run folder

  npprune eval reports/vit_tiny --edit remove --methods all
  npprune eval reports/vit_tiny --edit keep --paths class,predicted --topk 1,5,10
"""


@options.settings(EvaluateSection)
@editing.options
@options.images(
    val=of(
        DataSection,
        "val",
        flag="--data",
        help="as for discover; with --edit it may be left out: the run's own images",
    )
)
@options.run("device")
def command(
    checkpoint: options.CheckpointFolder,
    *,
    settings: EvaluateSection,
    edit: editing.Editing | None,
    images: DataSection,
    run: options.RunOptions,
    dense: Annotated[str | None, options.dense(MEASURE)] = None,
) -> None:
    """Measure a pruned network against its dense one: accuracy, probabilities, latency."""
    if edit is not None:
        editing.run_edit(checkpoint, edit, images, run)
        return
    if images.val is None:
        raise UsageError(
            "`--data` is needed: the images to evaluate on", hint="e.g. `--data folder:PATH`"
        )
    folder = flags.checkpoint_folder(checkpoint)
    flags.existing_file("--dense", dense)

    from npprune.pipeline.evaluate.stage import evaluate

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        evaluation = output.result(
            evaluate,
            folder,
            images,
            settings,
            dense_checkpoint=dense,
            work=run.work(emit),
        )
    show.evaluated(output, evaluation, folder, _run_result(folder, evaluation))
    output.finish()


def _run_result(checkpoint: Path, evaluation: Evaluation | FeatureEvaluation) -> Result | None:
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
    recorded = [v.measured for v in result.variants if v.measured is not None]
    return result if list(map(to_json, recorded)) == [to_json(evaluation)] else None

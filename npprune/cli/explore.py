"""`npprune explore`: pages about the classes, neurons and images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import flags, options
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, option
from npprune.recipe.sections import EXPLORER, ExploreSection

EXAMPLES = """\
Examples

  npprune explore reports/vit_tiny --plan ckpt/vit_tiny_half
  npprune explore reports/vit_tiny --single --out vit_tiny.html

Open the page in any browser: it needs no server and no network.
"""


@options.settings(ExploreSection)
@options.run("device", "seed")
def command(
    folder: Annotated[Path, argument("RUN", "a run folder of npprune discover")],
    *,
    settings: ExploreSection,
    run: options.RunOptions,
    plan: Annotated[
        Path | None,
        option(
            EXPLORER, "--plan", "CHECKPOINT", "a network pruned from the run's: what it removed"
        ),
    ] = None,
    single: Annotated[bool, option(RUN, "--single", None, "one file that holds all")] = False,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "PATH", "a folder, or a file with --single \\[default: RUN/explore]"),
    ] = None,
) -> None:
    """Build pages that show the neuron paths of a run on its images, to be opened from disk."""
    folder = flags.run_folder(folder)
    if plan is not None:
        plan = flags.checkpoint_folder(plan)
    target = out or folder / ("explore.html" if single else "explore")

    from npprune.pipeline.explore import explore_run
    from npprune.report import text

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        found = explore_run(folder, settings, target, plan=plan, single=single, work=run.work(emit))
    output.document(
        "explorer",
        {
            "page": str(found.page),
            "classes": found.classes,
            "images": found.images,
            "neurons": found.neurons,
            "bytes": found.bytes,
            "seconds": found.seconds,
            "notes": found.notes,
        },
    )
    output.files(
        [
            ("explorer", str(found.page)),
            ("classes", text.count(found.classes)),
            ("images", text.count(found.images)),
            ("neurons", text.count(found.neurons)),
            ("size", text.size(found.bytes)),
            ("time", text.seconds(found.seconds)),
        ]
    )

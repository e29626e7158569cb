"""`npprune discover`: find the neuron paths of images and store them, class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, of, option
from npprune.files import out_folder
from npprune.recipe.sections import DataSection, DiscoverSection

EXAMPLES = """\
Example: the five strongest neurons per block, for every image of a folder

  npprune discover vit_tiny_patch16_224.augreg_in21k_ft_in1k \\
    --checkpoint W.safetensors --data folder:imagenet/train \\
    --topk 5 --out reports/vit_tiny

An interrupted run resumes where it stopped: give the same command again.
"""


@options.settings(DiscoverSection, omit=["batch_size", "images_per_class"])
@options.images(
    train=of(DataSection, "train", flag="--data", needed=True),
    preprocessing=of(DataSection, "preprocessing"),
    batch_size=of(DataSection, "batch_size", help="images searched at once", shown="16"),
)
@options.model("probe", "released_head")
@options.run("device", "seed", "dry_run")
def command(
    model: options.Model,
    *,
    settings: DiscoverSection,
    images: DataSection,
    network: dict[str, Any],
    run: options.RunOptions,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "FOLDER", "the run folder \\[default: reports/MODEL]"),
    ] = None,
) -> None:
    """Find the neurons that carry each image's class, and store their paths in a run folder."""
    if "batch_size" in images.model_fields_set:  # of the search as well
        settings.batch_size = images.batch_size
    source = flags.model_section(model, network)
    folder = out_folder(out or Path("reports") / flags.folder_name(source))

    from npprune.pipeline.discover.stage import discover

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        result = output.result(discover,
            source, images, settings, folder, work=run.work(emit), dry_run=run.dry_run,
        )  # fmt: skip
    show.discovery(output, result, folder, dry_run=run.dry_run)
    output.finish()

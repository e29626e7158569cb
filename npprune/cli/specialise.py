"""`npprune specialise`: a smaller network for some classes, from their images to the ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, of, option, required
from npprune.errors import UsageError
from npprune.files import out_folder
from npprune.recipe.sections import (
    IMAGES,
    LENGTH,
    DataSection,
    DiscoverSection,
    HealSection,
    PruneSection,
    Recipe,
)

PATH_IMAGES = 5  # of each class, that paths are found for
HEAL_MINUTES = 8.0

EXAMPLES = """\
Example: half of the MACs for twenty classes; cats.txt names one class per line

  npprune specialise vit_tiny_patch16_224.augreg_in21k_ft_in1k --classes cats.txt \\
    --data folder:imagenet/train --val folder:imagenet/val --target-macs 0.5 --out ckpt/cats

The same, step by step, is the recipe `specialise`. Interrupted, the same command resumes.
"""


@options.settings(PruneSection, omit=["calibration_images", "keep_head"])
@options.images(
    train=of(DataSection, "train", flag="--data", needed=True),
    val=of(DataSection, "val", needed=True),
    omit=["images_per_class"],
)
@options.model()
@options.run("device", "seed")
def command(
    model: options.Model,
    *,
    settings: PruneSection,
    images: DataSection,
    network: dict[str, Any],
    run: options.RunOptions,
    path_images: Annotated[
        int,
        option(IMAGES, "--path-images", "N", "images of each class that paths are found for"),
    ] = PATH_IMAGES,
    heal_minutes: Annotated[
        float, option(LENGTH, "--heal-minutes", "M", "of training after pruning; 0: none")
    ] = HEAL_MINUTES,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the checkpoint folder, e.g. ckpt/NAME")],
) -> None:
    """A smaller network for some classes: discover, prune, heal, evaluate, export and report."""
    if images.classes is None:
        raise UsageError(
            "`--classes` is needed: the classes that the smaller network is for",
            hint="`--classes 281,282,285`, or a file with one class per line",
        )
    if heal_minutes < 0:
        raise UsageError(f"`--heal-minutes` must not be negative, got `{heal_minutes:g}`")
    folder = out_folder(out)
    recipe = Recipe(
        name=folder.name,
        model=flags.model_section(model, network),
        data=images,
        discover=flags.section(
            DiscoverSection, topk=settings.topk or 5, images_per_class=path_images
        ),
        prune=settings,
        heal=HealSection(minutes=heal_minutes) if heal_minutes else None,
        device=run.device,
        seed=run.seed,
    )

    from npprune.pipeline.run import run_recipe

    output = Output(as_json=run.as_json)
    beside = folder.parent.parent if folder.parent.name == "ckpt" else folder.parent
    with output.working() as emit:
        result = output.result(
            run_recipe,
            recipe,
            run=beside / "reports" / folder.name,
            checkpoint=folder,
            work=run.work(emit),
        )
    show.result(output, result, beside)
    output.finish()

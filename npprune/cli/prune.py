"""`npprune prune`: choose the neurons that stay, remove the rest, adjust what remains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, option, required
from npprune.errors import UsageError
from npprune.files import out_folder
from npprune.recipe.sections import DataSection, HealSection, PruneSection

if TYPE_CHECKING:
    from npprune.records import Variant

EXAMPLES = """\
Example: keep half of the hidden units, the paths' neurons first

  npprune prune reports/vit_tiny --topk 5 --keep 0.5 \\
    --calibration folder:imagenet/train --out ckpt/vit_tiny_half

Example: half of the MACs; tokens merge, hidden units, heads and query/key dimensions go

  npprune prune vit_tiny_patch16_224.augreg_in21k_ft_in1k --target-macs 0.5 \\
    --calibration folder:imagenet/train --out ckpt/vit_tiny_50

Example: no paths, a network by its name

  npprune prune vit_tiny_patch16_224.augreg_in21k_ft_in1k --no-protect-paths \\
    --keep 0.5 --calibration folder:imagenet/train --out ckpt/vit_tiny_half
"""


@options.settings(PruneSection)
@options.images(calibration=options.of(DataSection, "calibration"))
@options.model()
@options.run("device", "seed", "dry_run")
def command(
    source: Annotated[
        str, argument("RUN_OR_MODEL", "a run folder of npprune discover, or a model's name")
    ],
    *,
    settings: PruneSection,
    images: DataSection,
    network: dict[str, Any],
    run: options.RunOptions,
    heal: Annotated[
        int | None,
        option(
            RUN, "--heal", "EPOCHS", "train it from the dense network, into FOLDER_healed, as well"
        ),
    ] = None,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the checkpoint folder, e.g. ckpt/NAME")],
) -> None:
    """Remove hidden units for real and write the smaller network as a checkpoint folder."""
    if heal is not None and heal < 1:
        raise UsageError(f"`--heal` must be at least 1 epoch, got `{heal}`")
    start = flags.run_or_model(source, network)
    folder = out_folder(out)

    from npprune.pipeline.prune.stage import prune

    if heal is not None:
        from npprune.pipeline.common.outputs import check_checkpoint, reads_of
        from npprune.pipeline.heal.stage import healed_folder

        check_checkpoint(healed_folder(folder), reads_of(start), write=not run.dry_run)
    output = Output(as_json=run.as_json)
    with output.working() as emit:
        variant = output.result(
            prune,
            start,
            images,
            settings,
            folder,
            work=run.work(emit),
            dry_run=run.dry_run,
        )
    healing = heal is not None and not run.dry_run and output.unstored is None
    if not (healing and run.as_json):  # one document: the healed network's tells of the pruning
        show.pruned(output, variant, folder, dry_run=run.dry_run)
    output.finish()
    if not healing:
        return

    from npprune.pipeline.heal.stage import heal_pruned, healed_folder

    def train() -> Variant:
        training = HealSection(epochs=heal)
        return heal_pruned(folder, training, work=run.work(emit))[1]

    with output.working() as emit:
        variant = output.result(train)
    output.line()
    show.healed(output, variant, healed_folder(folder))
    output.finish()

"""`npprune heal`: a short training of a pruned network, the dense one being the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, of, option, required
from npprune.files import out_folder
from npprune.recipe.sections import TEACHING, DataSection, HealSection

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


@options.settings(HealSection)
@options.images(train=of(DataSection, "train", flag="--data", needed=True), omit=["batch_size"])
@options.run("device", "seed", "dry_run")
def command(
    checkpoint: options.CheckpointFolder,
    *,
    settings: HealSection,
    images: DataSection,
    run: options.RunOptions,
    dense: Annotated[str | None, options.dense(TEACHING)] = None,
    any_teacher: Annotated[
        bool, option(TEACHING, "--any-teacher", None, "accept other weights than those pruned")
    ] = False,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the healed checkpoint's folder")],
) -> None:
    """Train a pruned network to predict what its dense network predicts. Needs no labels."""
    source = flags.checkpoint_folder(checkpoint)
    flags.existing_file("--dense", dense)
    folder = out_folder(out)

    from npprune.pipeline.heal.stage import heal

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        variant = output.result(
            heal,
            source,
            images,
            settings,
            folder,
            dense_checkpoint=dense,
            any_teacher=any_teacher,
            work=run.work(emit),
            dry_run=run.dry_run,
        )
    show.healed(output, variant, folder)
    output.finish()

"""`npprune prune`: choose the neurons that stay, remove the rest, adjust what remains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npprune import words
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, RUN, argument, choice, option, required
from npprune.criteria import CRITERIA
from npprune.errors import UsageError

if TYPE_CHECKING:
    from npprune.records import Variant

EXAMPLES = """\
Example: keep half of the hidden units, the paths' neurons first

  npprune prune reports/vit_tiny --topk 5 --keep 0.5 \\
    --calibration folder:imagenet/train --out ckpt/vit_tiny_half

Example: 70 % of the MACs; hidden units, heads and query/key dimensions share the budget

  npprune prune reports/vit_tiny --axes mlp,heads,qk --target-macs 0.7 \\
    --calibration folder:imagenet/train --out ckpt/vit_tiny_70

Example: no paths, a network by its name

  npprune prune vit_tiny_patch16_224.augreg_in21k_ft_in1k --no-protect-paths \\
    --keep 0.5 --calibration folder:imagenet/train --out ckpt/vit_tiny_half
"""

BUDGET = "Budget (one of keep, target-params, target-macs, target-latency)"
CHOICE = "Which neurons stay"


def command(
    ctx: typer.Context,
    source: Annotated[
        str, argument("RUN_OR_MODEL", "a run folder of npprune discover, or a model's name")
    ],
    *,
    keep: Annotated[
        float | None, option(BUDGET, "--keep", "SHARE", "of the hidden units, in (0, 1]")
    ] = None,
    target_params: Annotated[
        float | None,
        option(BUDGET, "--target-params", "X", "parameters: a share up to 1, a count above"),
    ] = None,
    target_macs: Annotated[
        float | None,
        option(BUDGET, "--target-macs", "X", "MACs per image: a share up to 1, a count above"),
    ] = None,
    target_latency: Annotated[
        float | None,
        option(
            BUDGET,
            "--target-latency",
            "X",
            "in ONNX Runtime on this machine: a share of dense up to 1, milliseconds above",
        ),
    ] = None,
    latency_batch: Annotated[
        int, option(BUDGET, "--latency-batch", "N", "images at once while timing")
    ] = 1,
    latency_threads: Annotated[
        int | None,
        option(BUDGET, "--latency-threads", "N", "threads while timing \\[default: PyTorch's]"),
    ] = None,
    max_drop: Annotated[
        float | None,
        option(
            BUDGET,
            "--max-drop",
            "POINTS",
            "of top-1, predicted; without a budget: the smallest network within it",
        ),
    ] = None,
    axes: Annotated[
        str,
        choice(CHOICE, "--axes", "what may go, separated by commas", *words.AXES),
    ] = "mlp",
    topk: Annotated[
        int | None,
        option(CHOICE, "--topk", "K", "path neurons per block of each class \\[default: all]"),
    ] = None,
    criterion: Annotated[
        str, choice(CHOICE, "--criterion", "ranks the neurons that no path names", *CRITERIA)
    ] = "curvature-obs",
    selection: Annotated[
        str,
        choice(CHOICE, "--selection", "how blocks share the budget", *words.SELECTIONS),
    ] = "measured",
    protect_paths: Annotated[
        bool,
        option(
            CHOICE,
            "--protect-paths/--no-protect-paths",
            None,
            "keep the paths' neurons as far as the budget goes",
        ),
    ] = True,
    compensation: Annotated[
        str,
        choice(
            CHOICE,
            "--compensation",
            "closed-form change to what stays",
            *words.COMPENSATIONS,
        ),
    ] = "sequential",
    shrinkage: Annotated[
        float | None,
        option(
            CHOICE,
            "--shrinkage",
            "X",
            "ridge of the refit, over the mean variance \\[default: chosen on held-out images]",
        ),
    ] = None,
    round_to: Annotated[int, option(CHOICE, "--round-to", "N", "widths are multiples of N")] = 16,
    min_keep: Annotated[
        int, option(CHOICE, "--min-keep", "N", "hidden units left in any block")
    ] = 16,
    keep_head: Annotated[
        bool,
        option(
            CHOICE,
            "--keep-head/--cut-head",
            None,
            "with --classes: all outputs stay, or only those",
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        option(
            IMAGES, "--calibration", "SOURCE", "for statistics \\[default: the run's own images]"
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, option(IMAGES, "--calibration-images", "N", "at most N images")
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
    checkpoint: options.Checkpoint = None,
    num_heads: options.NumHeads = None,
    img_size: options.ImgSize = None,
    num_classes: options.NumClasses = None,
    heal: Annotated[
        int | None,
        option(
            RUN, "--heal", "EPOCHS", "train it from the dense network, into FOLDER_healed, as well"
        ),
    ] = None,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the checkpoint folder, e.g. ckpt/NAME")],
    memory: Annotated[
        float | None,
        option(
            RUN,
            "--memory",
            "GIB",
            "for statistics; what does not fit is kept on disk \\[default: half of the memory]",
        ),
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Remove hidden units for real and write the smaller network as a checkpoint folder."""
    from npprune.recipe import HealSection, PruneSection

    if heal is not None and heal < 1:
        raise UsageError(f"`--heal` must be at least 1 epoch, got `{heal}`")
    settings = flags.section(
        PruneSection,
        axes=flags.words("--axes", axes),
        topk=topk,
        keep=keep,
        target_params=target_params,
        target_macs=target_macs,
        target_latency=target_latency,
        latency_batch=latency_batch,
        latency_threads=latency_threads,
        criterion=criterion,
        selection=selection,
        compensation=compensation,
        shrinkage=shrinkage,
        protect_paths=protect_paths,
        round_to=round_to,
        min_keep=min_keep,
        calibration_images=calibration_images,
        keep_head=keep_head,
        max_drop=max_drop,
        memory=memory,
    )
    start = flags.run_or_model(source, ctx.params)
    folder = flags.out_folder(out)
    images = flags.data_section(ctx.params, calibration=calibration)
    chosen, seed_value = flags.device(device), flags.seed(seed)

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.prune.stage import prune

    if heal is not None:
        from npprune.pipeline.common.outputs import check_checkpoint, reads_of
        from npprune.pipeline.heal.stage import healed_folder

        check_checkpoint(healed_folder(folder), reads_of(start), write=not dry_run)
    output = Output(as_json=as_json)
    with output.working() as emit:
        variant = output.result(
            prune,
            start,
            images,
            settings,
            folder,
            work=Work(device=chosen, seed=seed_value, emit=emit, command=flags.command_line(ctx)),
            dry_run=dry_run,
        )
    healing = heal is not None and not dry_run and output.unstored is None
    if not (healing and as_json):  # one document: the healed network's tells of the pruning, too
        show.pruned(output, variant, folder, dry_run=dry_run)
    output.finish()
    if not healing:
        return

    from npprune.pipeline.heal.stage import heal_pruned, healed_folder

    def train() -> Variant:
        training = HealSection(epochs=heal)
        return heal_pruned(folder, training, device=chosen, seed=seed_value, emit=emit)[1]

    with output.working() as emit:
        variant = output.result(train)
    output.line()
    show.healed(output, variant, healed_folder(folder))
    output.finish()

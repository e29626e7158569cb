"""`npprune discover`: find the neuron paths of images and store them, class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, choice, option

EXAMPLES = """\
Example: the five strongest neurons per block, for every image of a folder

  npprune discover vit_tiny_patch16_224.augreg_in21k_ft_in1k \\
    --checkpoint W.safetensors --data folder:imagenet/train \\
    --topk 5 --out reports/vit_tiny

An interrupted run resumes where it stopped: give the same command again.
"""

SEARCH = "Search"


def command(
    ctx: typer.Context,
    model: options.Model,
    *,
    topk: Annotated[int, option(SEARCH, "--topk", "K", "neurons per block in each path")] = 1,
    method: Annotated[
        str,
        choice(
            SEARCH,
            "--method",
            "how neurons are scored",
            "neuron-path",
            "activation",
            "influence-pattern",
            "knowledge-neuron",
            "random",
        ),
    ] = "neuron-path",
    scope: Annotated[
        str,
        choice(
            SEARCH,
            "--scope",
            "tokens scored (auto: those the classifier pools)",
            "auto",
            "cls",
            "patch",
            "all",
        ),
    ] = "auto",
    quadrature: Annotated[
        str,
        choice(
            SEARCH,
            "--quadrature",
            "rule of the attribution integral (auto: gauss-radau at the class token, mapped-radau "
            "elsewhere)",
            "auto",
            "gauss-radau",
            "mapped-radau",
            "gauss-legendre",
            "left-riemann",
        ),
    ] = "auto",
    points: Annotated[
        int | None,
        option(
            SEARCH,
            "--points",
            "M",
            "points of the rule \\[default: 4 at the class token, 6 elsewhere (12 in block 0); "
            "20 for left-riemann and influence-pattern]",
        ),
    ] = None,
    accumulation: Annotated[
        str,
        choice(
            SEARCH,
            "--accumulation",
            "gradients of the whole path, or of its last block",
            "sum",
            "last",
        ),
    ] = "sum",
    memory: Annotated[
        float | None,
        option(SEARCH, "--memory", "GIB", "the search takes at most this many GiB"),
    ] = None,
    shard_size: Annotated[
        int,
        option(SEARCH, "--shard-size", "N", "images per stored shard; a resume loses one at most"),
    ] = 256,
    precision: Annotated[
        str,
        choice(
            SEARCH,
            "--precision",
            "of matrix products; tf32 needs a CUDA GPU",
            "fp32",
            "tf32",
            "bf16",
        ),
    ] = "fp32",
    compile_blocks: Annotated[
        bool,
        option(SEARCH, "--compile", None, "blocks through torch.compile, on a CUDA GPU"),
    ] = False,
    data: options.Data,
    class_map: options.ClassMap = None,
    classes: options.Classes = None,
    images_per_class: options.ImagesPerClass = None,
    on_bad_image: options.OnBadImage = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    preprocessing: options.Preprocessing = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    crop_pct: options.CropPct = None,
    crop_mode: options.CropMode = None,
    no_crop: options.NoCrop = False,
    checkpoint: options.Checkpoint = None,
    num_heads: options.NumHeads = None,
    img_size: options.ImgSize = None,
    released_head: options.ReleasedHead = False,
    num_classes: options.NumClasses = None,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "FOLDER", "the run folder \\[default: reports/MODEL]"),
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Find the neurons that carry each image's class, and store their paths in a run folder."""
    from npprune.recipe import DiscoverSection

    settings = flags.section(
        DiscoverSection,
        topk=topk,
        method=method,
        scope=scope,
        quadrature=quadrature,
        points=points,
        accumulation=accumulation,
        batch_size=batch_size,
        shard_size=shard_size,
        memory=memory,
        precision=precision,
        compile=compile_blocks,
    )
    network = flags.model_section(model, ctx.params)
    images = flags.data_section(ctx.params, train=data)
    chosen, start = flags.device(device), flags.seed(seed)
    folder = flags.out_folder(out or Path("reports") / flags.folder_name(network))

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.discover.stage import discover

    output = Output(as_json=as_json)
    with output.working() as emit:
        result = output.result(discover,
            network, images, settings, folder,
            work=Work(chosen, start, emit, flags.command_line(ctx)), dry_run=dry_run,
        )  # fmt: skip
    show.discovery(output, result, folder, dry_run=dry_run)
    output.finish()

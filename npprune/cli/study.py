"""`npprune study`: ways to prune side by side, on one network and the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from npprune import words
from npprune.cli import flags, options
from npprune.cli.console import Output
from npprune.cli.options import IMAGES, RUN, argument, option, required

EXAMPLES = """\
Example: what the compensation and the criterion are worth, at two budgets

  npprune study vit_tiny_patch16_224.augreg_in21k_ft_in1k \\
    --criteria variance,fisher,curvature-obs --compensations mean,least-squares \\
    --keep 0.5,0.7 --calibration folder:imagenet/train --val folder:imagenet/val \\
    --out reports/study

Example: what neuron paths are worth, from a run of npprune discover

  npprune study reports/vit_tiny --topk 1 --calibration folder:imagenet/train \\
    --val folder:imagenet/val --out reports/paths_study

An interrupted study resumes where it stopped; other criteria may be added to it later.
"""

COMPARED = "Compared (lists are separated by commas, and all combined)"
SHARED = "The same in all rows"
SHOWN = (  # columns that fit a terminal; the report has all
    "seed", "top-1, %", "to best, points", "KL, nats", "MACs, %", "latency, %", "seconds",
    "healed, %", "difference, points",
)  # fmt: skip


def command(
    ctx: typer.Context,
    source: Annotated[
        str, argument("MODEL_OR_RUN", "a model's name, or a run folder: with criteria by paths")
    ],
    *,
    criteria: Annotated[
        str | None, option(COMPARED, "--criteria", "LIST", "rank the neurons \\[default: all]")
    ] = None,
    selections: Annotated[
        str, option(COMPARED, "--selections", "LIST", f"of {', '.join(words.SELECTIONS)}")
    ] = "uniform",
    compensations: Annotated[
        str,
        option(COMPARED, "--compensations", "LIST", f"of {', '.join(words.COMPENSATIONS)}"),
    ] = "least-squares",
    keep: Annotated[
        str, option(COMPARED, "--keep", "LIST", "shares of the hidden units that stay")
    ] = "0.5",
    seeds: Annotated[
        str, option(COMPARED, "--seeds", "LIST", "of criteria that draw; others get one row")
    ] = "0",
    protect: Annotated[
        str | None,
        option(
            COMPARED,
            "--protect",
            "LIST",
            "of on, off: path neurons kept first \\[default: both for a run, else off]",
        ),
    ] = None,
    topk: Annotated[
        int | None,
        option(SHARED, "--topk", "K", "path neurons per block of each class \\[default: all]"),
    ] = None,
    round_to: Annotated[int, option(SHARED, "--round-to", "N", "widths are multiples of N")] = 16,
    min_keep: Annotated[
        int, option(SHARED, "--min-keep", "N", "hidden units left in any block")
    ] = 16,
    heal: Annotated[
        int | None,
        option(SHARED, "--heal", "EPOCHS", "train every row as well, as npprune heal does"),
    ] = None,
    latency: Annotated[
        bool,
        option(SHARED, "--latency/--no-latency", None, "time every row in ONNX Runtime"),
    ] = False,
    latency_batch: Annotated[
        int, option(SHARED, "--latency-batch", "N", "images at once while timing")
    ] = 1,
    latency_threads: Annotated[
        int | None,
        option(SHARED, "--latency-threads", "N", "threads while timing \\[default: PyTorch's]"),
    ] = None,
    calibration: Annotated[
        str | None,
        option(
            IMAGES, "--calibration", "SOURCE", "for statistics \\[default: the run's own images]"
        ),
    ] = None,
    val: Annotated[str, required(IMAGES, "--val", "SOURCE", "to measure on")],
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
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "e.g. reports/study")],
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Compare criteria, selections, compensations and budgets on the same images."""
    from npprune.recipe import StudySection

    settings = flags.section(
        StudySection,
        criteria=flags.words("--criteria", criteria),
        selections=flags.words("--selections", selections),
        compensations=flags.words("--compensations", compensations),
        keep=flags.numbers("--keep", keep),
        seeds=flags.numbers("--seeds", seeds, int),
        protect=flags.words("--protect", protect),
        topk=topk,
        round_to=round_to,
        min_keep=min_keep,
        calibration_images=calibration_images,
        heal=heal,
        latency=latency,
        latency_batch=latency_batch,
        latency_threads=latency_threads,
    )
    start = flags.run_or_model(source, ctx.params)
    folder = flags.out_folder(out)
    images = flags.data_section(ctx.params, calibration=calibration, val=val)
    chosen = flags.device(device)

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.study.stage import study

    output = Output(as_json=as_json)
    with output.working() as emit:
        result = output.result(
            study,
            start,
            images,
            settings,
            folder,
            work=Work(device=chosen, emit=emit, command=flags.command_line(ctx)),
            dry_run=dry_run,
        )
    _show(output, result, folder, dry_run=dry_run)
    output.finish()


def _show(output: Output, result: Any, folder: Path, *, dry_run: bool) -> None:
    """The table, what neuron paths bring, and where the rest lies."""
    from npprune.records import to_dict
    from npprune.report import text
    from npprune.report.analyses import folded

    output.document("result", to_dict(result))
    for name in ("study", "study-paths"):
        analysis = result.analyses.get(name)
        if analysis is None or not analysis.rows:
            continue
        header, rows = folded(analysis.columns, analysis.rows)
        words = next(i for i, v in enumerate(analysis.rows[0]) if not isinstance(v, str))
        places = [i for i, name in enumerate(header) if i >= words and name in SHOWN]
        shown = [
            [", ".join(c.value for c in row[:words]), *(row[i].text for i in places)]
            for row in rows
        ]
        names = [header[i] for i in places]
        output.table(analysis.title, (", ".join(header[:words]), *names), shown)
        output.line()
        output.line(text.clean(analysis.text))
        output.line()
    if dry_run:
        output.line(f"dry run: nothing was computed or written; it would go to {folder}")
        return
    if output.unstored is None:
        output.files([("HTML report", str(folder / "report.html")), ("rows", str(folder / "rows"))])

"""`npprune study`: ways to prune side by side, on one network and the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from npprune.cli import flags, options
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, of, required
from npprune.files import out_folder
from npprune.recipe.sections import DataSection, StudySection

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

SHOWN = (  # columns that fit a terminal; the report has all
    "seed", "top-1, %", "to best, points", "KL, nats", "MACs, %", "latency, %", "seconds",
    "healed, %", "difference, points",
)  # fmt: skip


@options.settings(StudySection)
@options.images(calibration=of(DataSection, "calibration"), val=of(DataSection, "val", needed=True))
@options.model()
@options.run("device", "dry_run")
def command(
    source: Annotated[
        str, argument("MODEL_OR_RUN", "a model's name, or a run folder: with criteria by paths")
    ],
    *,
    settings: StudySection,
    images: DataSection,
    network: dict[str, Any],
    run: options.RunOptions,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "e.g. reports/study")],
) -> None:
    """Compare criteria, selections, compensations and budgets on the same images."""
    start = flags.run_or_model(source, network)
    folder = out_folder(out)

    from npprune.pipeline.study.stage import study

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        result = output.result(
            study,
            start,
            images,
            settings,
            folder,
            work=run.work(emit),
            dry_run=run.dry_run,
        )
    _show(output, result, folder, dry_run=run.dry_run)
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
        differ = [i for i in range(words) if len({row[i].value for row in rows}) > 1]
        shown = [
            [", ".join(row[i].value for i in differ), *(row[i].text for i in places)]
            for row in rows
        ]
        names = [", ".join(header[i] for i in differ), *(header[i] for i in places)]
        output.table(analysis.title, names, shown)
        output.line()
        if same := [f"{header[i]} {rows[0][i].value}" for i in range(words) if i not in differ]:
            output.text(f"In every row: {', '.join(same)}.")
        output.text(text.clean(analysis.text))
        output.line()
    if dry_run:
        output.line(f"dry run: nothing was computed or written; it would go to {folder}")
        return
    if output.unstored is None:
        output.files([("HTML report", str(folder / "report.html")), ("rows", str(folder / "rows"))])

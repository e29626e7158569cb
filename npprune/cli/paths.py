"""`npprune paths`: the paper's files from a run folder, and a run folder from the paper's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from npprune.cli import flags, options
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, choice, option, required
from npprune.files import out_folder
from npprune.report import text
from npprune.words import LAYOUTS, check_word

FILES = "Files"

EXAMPLES = """\
Examples

  npprune paths export reports/vit_base --out neuron_path \\
    --baseline reports/vit_base_activation

  npprune paths import neuron_path vit_base_patch16_224 --out reports/paper

The files are named imgnet_all-LABEL.rlt.jsonl, as those of the paper's released program.
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Exchange paths with the paper's own files.",
)


@app.command("export", epilog=EXAMPLES)
def export_command(
    run: Annotated[Path, argument("RUN", "a run folder of npprune discover")],
    *,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "where the files go, one per class")],
    baseline: Annotated[
        Path | None,
        option(FILES, "--baseline", "RUN", "of method activation: `base` and `base_score`"),
    ] = None,
    layout: Annotated[
        str | None,
        choice(
            FILES,
            "--layout",
            "a line is a class or an image \\[default: as the paper's]",
            LAYOUTS,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a run's paths as the paper's files: for its notebooks.

    Scores are the joint attribution scores themselves; for average-pooled networks the paper's
    program divides them by 196.
    """
    if layout is not None:
        check_word("layout", layout, LAYOUTS)
    out_folder(out)

    from npprune.pipeline.discover.path_files import export_released

    output = Output(as_json=as_json)
    with output.working():
        files = export_released(run, out, baseline=baseline, layout=layout)  # type: ignore[arg-type]
    output.files([("files", f"{len(files)} in {out}"), ("first", str(files[0]))])
    output.document("paths", {"folder": str(out), "files": [path.name for path in files]})


@app.command("import", epilog=EXAMPLES)
@options.model()
@options.run()
def import_command(
    files: Annotated[Path, argument("FOLDER", "with imgnet_all-LABEL.rlt.jsonl")],
    model: options.Model,
    *,
    network: dict[str, Any],
    run: options.RunOptions,
    baseline: Annotated[
        bool,
        option(FILES, "--baseline", None, "take the Activation baseline's paths, `base`"),
    ] = False,
    out: Annotated[Path, required(RUN, "--out", "FOLDER", "the run folder, e.g. reports/NAME")],
) -> None:
    """Make a run folder of the paper's files, to report and analyze.

    The files do not say of which weights they are. Without --checkpoint MODEL is the architecture
    alone (nothing is downloaded), and `npprune prune` refuses the run. Results of edits hold
    predictions, not scores of paths, and are refused.
    """
    source = flags.model_section(model, network)
    folder = out_folder(out)

    from npprune.pipeline.discover.path_files import import_released

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        result = output.result(import_released,
            files, source, folder, baseline=baseline, work=run.work(emit),
        )  # fmt: skip
    from npprune.records import UNKNOWN_WEIGHTS, to_dict

    output.document("result", to_dict(result))
    found, known = result.discovery, result.model.source.sha256
    assert found is not None
    output.files(
        [
            ("model", result.model.source.architecture),
            ("weights", known if known == UNKNOWN_WEIGHTS else f"sha256 {known[:12]}..."),
            ("images", text.data(found.data)),
            ("method", found.method),
            ("paths", f"{text.plural(found.images, 'image')}, K = {found.topk} per block"),
            ("run folder", str(folder)),
        ]
    )
    output.line(f"\nnext: npprune report {folder}")
    output.finish()

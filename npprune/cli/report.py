"""`npprune report`: a run's result.json as HTML and Markdown; several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import options
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, option

EXAMPLES = """\
Example

  npprune report reports/vit_tiny

Example: what two runs give, with paired tests on the images they share

  npprune report reports/vit_tiny reports/other

A pure function of result.json: no model, no images, no torch, no network.
"""


def command(
    runs: Annotated[list[Path], argument("RUN...", "run folders, or their result.json")],
    *,
    out: Annotated[
        Path | None,
        option(RUN, "--out", "FOLDER", "where the report goes \\[default: the first RUN]"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Render a run's result as one self-contained HTML page and as Markdown; several runs are
    compared."""
    from npprune.pipeline.common.results import render_comparison, render_report

    output = Output(as_json=as_json)
    with output.working():
        several = len(runs) > 1
        pages = render_comparison(runs, out=out) if several else render_report(runs[0], out=out)
    html, markdown = map(str, pages)
    output.files([("HTML comparison" if several else "HTML report", html), ("Markdown", markdown)])
    output.document("report", {"html": html, "markdown": markdown})

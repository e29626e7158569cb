"""`npprune report`: a run's result.json as HTML and Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import options
from npprune.cli.console import Output
from npprune.cli.options import RUN, option

EXAMPLES = """\
Example

  npprune report reports/vit_tiny

A pure function of result.json: no model, no images, no torch, no network.
"""


def command(
    run: options.RunFolder,
    *,
    out: Annotated[
        Path | None, option(RUN, "--out", "FOLDER", "where the report goes \\[default: RUN]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Render a run's result as one self-contained HTML page and as Markdown."""
    from npprune.pipeline.common.results import render_report

    output = Output(as_json=as_json)
    with output.working():
        html, markdown = render_report(run, out=out)
    output.files([("HTML report", str(html)), ("Markdown", str(markdown))])
    output.document("report", {"html": str(html), "markdown": str(markdown)})

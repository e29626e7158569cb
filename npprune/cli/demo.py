"""`npprune demo`: the main job on data that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, option

EXAMPLES = """\
Example

  npprune demo

Writes reports/demo and ckpt/demo below the current folder. No network, no GPU needed.
"""


@options.run("device", "seed")
def command(
    *,
    run: options.RunOptions,
    out: Annotated[
        Path, option(RUN, "--out", "FOLDER", "reports/ and ckpt/ are written below it")
    ] = Path("."),
) -> None:
    """Show everything on a small network and handwritten digits, in under three minutes."""
    from npprune.pipeline.run import EXPLORER, run_demo

    output = Output(as_json=run.as_json)
    with output.working() as emit:
        result = output.result(
            run_demo,
            root=out,
            work=run.work(emit),
        )
    explorer = out / "reports" / "demo" / EXPLORER / "index.html"
    show.result(output, result, out, also=[("explorer", explorer)])
    output.finish()

"""`npprune demo`: the main job on data that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, option

EXAMPLES = """\
Example

  npprune demo

Writes reports/demo and ckpt/demo below the current folder. No network, no GPU needed.
"""


def command(
    ctx: typer.Context,
    *,
    out: Annotated[
        Path, option(RUN, "--out", "FOLDER", "reports/ and ckpt/ are written below it")
    ] = Path("."),
    device: options.Device = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Show everything on a small network and handwritten digits, in under three minutes."""
    chosen, start = flags.device(device), flags.seed(seed)

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.run import run_demo

    output = Output(as_json=as_json)
    with output.working() as emit:
        result = output.result(
            run_demo,
            root=out,
            work=Work(chosen, start, emit, flags.command_line(ctx)),
        )
    show.result(output, result, out)
    output.finish()

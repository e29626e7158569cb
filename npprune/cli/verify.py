"""`npprune verify`: whether a run, a checkpoint or an export is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import options
from npprune.cli.console import Output
from npprune.cli.options import argument
from npprune.errors import GateError, plural

EXAMPLES = """\
Examples

  npprune verify reports/vit_tiny
  npprune verify ckpt/vit_tiny_half --json

Every checksum and hash is checked. A file that is damaged or missing is named, and the exit code
is 1; the command that made it makes it again.
"""


def command(
    folder: Annotated[Path, argument("FOLDER", "a run, a checkpoint or the folder of an export")],
    *,
    as_json: options.Json = False,
) -> None:
    """Check every file of a run, a checkpoint or an export against its hash."""
    from npprune.pipeline.verify import verify

    output = Output(as_json=as_json)
    with output.working():
        found = verify(folder)
    output.document(
        "verified",
        {"folder": str(folder), "files": found.files, "damaged": found.damaged},
    )
    output.files(list(found.damaged.items()))
    output.line(f"{plural(len(found.files), 'file')} checked, {len(found.damaged)} damaged")
    if found.damaged:
        raise GateError(
            f"{plural(len(found.damaged), 'file')} of `{folder}` not as written: "
            f"`{next(iter(found.damaged))}`" + (", ..." if len(found.damaged) > 1 else ""),
            hint="the command that made them makes them again",
        )

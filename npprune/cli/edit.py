"""`npprune eval RUN --edit`: the paper's editing experiments, from the flags of `npprune eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npprune.cli import flags
from npprune.cli.console import Output
from npprune.cli.options import choice, option
from npprune.errors import UsageError
from npprune.words import METHODS

if TYPE_CHECKING:
    from npprune.recipe.sections import EditSection
    from npprune.records import Analysis

EDIT = "Edit the neurons of a run's paths, nothing is removed for real"

Edit = Annotated[
    str | None,
    choice(EDIT, "--edit", "what happens to the neurons; CHECKPOINT is then a run folder",
           "remove", "enhance", "keep"),
]  # fmt: skip
Factor = Annotated[float | None, option(EDIT, "--factor", "X", "enhance: times X \\[default: 2]")]
Paths = Annotated[
    str | None,
    option(
        EDIT,
        "--paths",
        "LIST",
        "whose neurons: image, class, predicted, union (of all classes) \\[default: image]",
    ),
]
Methods = Annotated[
    str | None,
    option(EDIT, "--methods", "LIST", "of discover, or `all` \\[default: the run's own]"),
]
Topk = Annotated[
    str | None, option(EDIT, "--topk", "K,K", "neurons per block \\[default: the run's]")
]
Fraction = Annotated[
    str | None,
    option(EDIT, "--fraction", "P,P", "keep: share of the others that goes \\[default: 1]"),
]
Depth = Annotated[
    str | None, option(EDIT, "--depth", "D,D", "only the first D blocks \\[default: all]")
]
Tokens = Annotated[
    str | None,
    option(EDIT, "--scope", "LIST", "tokens: auto, cls, patch, all \\[default: auto]"),
]
Seeds = Annotated[
    int | None, option(EDIT, "--seeds", "N", "keep: draws of each share \\[default: 1]")
]
Name = Annotated[
    str | None, option(EDIT, "--name", "KEY", "the section in result.json \\[default: by edit]")
]

FLAGS = ("factor", "paths", "methods", "topk", "fraction", "depth", "scope", "seeds", "name")


def refuse_without_edit(given: Mapping[str, Any]) -> None:
    """UsageError where a flag of the editing experiments comes without `--edit`."""
    for name in FLAGS:
        if given.get(name) is not None:
            raise UsageError(
                f"`--{name}` belongs to `--edit remove|enhance|keep`, and `--edit` is missing"
            )


def run_edit(ctx: typer.Context, run: Path, device: str, as_json: bool) -> None:
    """Check the flags, run the experiment, show what it found."""
    given = ctx.params
    settings = _settings(given)
    folder = flags.run_folder(run)
    data = None
    if given.get("data") is not None:
        data = flags.data_section(given, val=given["data"])

    from npprune.pipeline.analyze.editing import edit_neurons
    from npprune.pipeline.common.work import Work

    output = Output(as_json=as_json)
    with output.working() as emit:
        found = output.result(
            edit_neurons,
            folder,
            settings,
            data,
            name=given.get("name"),
            work=Work(device, emit=emit, command=flags.command_line(ctx)),
        )
    show_analyses(output, found, folder)
    output.finish()


def _settings(given: Mapping[str, Any]) -> EditSection:
    from npprune.recipe.sections import EditSection

    return flags.section(
        EditSection,
        edit=given["edit"],
        factor=given.get("factor"),
        paths=words(given.get("paths")),
        methods=methods(given.get("methods")),
        topk=flags.numbers("--topk", given.get("topk"), int),
        fraction=flags.numbers("--fraction", given.get("fraction")),
        depth=flags.numbers("--depth", given.get("depth"), int),
        scope=words(given.get("scope")),
        seeds=given.get("seeds"),
    )


def words(text: str | None) -> list[str] | None:
    """Words separated by commas."""
    return None if text is None else [word.strip() for word in text.split(",")]


def methods(text: str | None) -> list[str] | None:
    """`--methods`: names separated by commas; `all` stands for every method."""
    if text == "all":
        return list(METHODS)
    return words(text)


def show_analyses(output: Output, found: Mapping[str, Analysis], folder: Path) -> None:
    """Sections that were added to a run's result, and where they lie."""
    from npprune.records import to_dict

    output.document("analyses", {"analyses": {key: to_dict(a) for key, a in found.items()}})
    for analysis in found.values():
        if analysis.rows:
            _wide_table(output, analysis)
        if analysis.text:
            output.line(analysis.text)
            output.line()
    if output.unstored is None and _recorded(found, folder):
        output.files([("result", str(folder / "result.json")), ("sections", ", ".join(found))])
        output.line()
        output.line(f"next: npprune report {folder}")


def _recorded(found: Mapping[str, Analysis], folder: Path) -> bool:
    """Whether the run's result holds these sections: a folder may not be writable."""
    from npprune.records import to_json
    from npprune.store.runs import RunFolder

    there = RunFolder(folder).read_result().analyses
    return all(key in there and to_json(there[key]) == to_json(a) for key, a in found.items())


def _wide_table(output: Output, analysis: Analysis) -> None:
    """As many of a section's columns as fit, from the left; the report has all."""
    from npprune.report.analyses import folded

    columns, body = folded(analysis.columns, analysis.rows)
    rows = [[cell.text for cell in row] for row in body]
    room, shown = output.width, 0
    for i, name in enumerate(columns):
        parts = [name, *(part for row in rows for part in row[i].partition(" (")[::2])]
        room -= max(map(len, parts)) + 2
        if room < -2:
            break
        shown += 1
    if shown < 2:  # too narrow for any number: the table is a list then, and holds all
        shown = len(columns)
    output.table(analysis.title, columns[:shown], [row[:shown] for row in rows])
    if shown < len(columns):
        output.line(f"not shown for want of room: {', '.join(columns[shown:])}")
    output.line()

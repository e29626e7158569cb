"""`npprune eval RUN --edit`: the paper's editing experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from npprune.cli import flags
from npprune.cli.console import Output
from npprune.cli.options import Command, Option, RunOptions, extended, of, option
from npprune.errors import UsageError
from npprune.recipe.sections import EDIT, DataSection, EditSection
from npprune.words import EDITS, METHODS

if TYPE_CHECKING:
    from npprune.records import Analysis


@dataclass(frozen=True)
class Editing:
    """What `--edit` and the options that belong to it ask for."""

    settings: EditSection
    name: str | None


def options(command: Command) -> Command:
    """The options of the editing experiments; the command gets `edit`, None without `--edit`."""
    made = {name: of(EditSection, name) for name in EditSection.model_fields}
    made["edit"] = of(EditSection, "edit", default=False)
    name = option(EDIT, "--name", "KEY", "the section in result.json \\[default: by edit]")
    made["name"] = Option(Annotated[str | None, name], "--name")
    return extended(command, "edit", made, _editing)


def _editing(given: dict[str, Any]) -> Editing | None:
    """UsageError where an option of the editing experiments comes without `--edit`."""
    if given["edit"] is None:
        for name, value in given.items():
            if value is not None:
                words = "|".join(EDITS)
                raise UsageError(f"`--{name}` belongs to `--edit {words}`, and `--edit` is missing")
        return None
    name = given.pop("name")
    settings = flags.section(EditSection, **{**given, "methods": methods(given["methods"])})
    return Editing(settings, name)


def run_edit(run: Path, edit: Editing, images: DataSection, options: RunOptions) -> None:
    """Run the experiment, show what it found."""
    folder = flags.run_folder(run)

    from npprune.pipeline.analyze.editing import edit_neurons

    output = Output(as_json=options.as_json)
    with output.working() as emit:
        found = output.result(
            edit_neurons,
            folder,
            edit.settings,
            images if images.val is not None else None,
            name=edit.name,
            work=options.work(emit),
        )
    show_analyses(output, found, folder)
    output.finish()


def methods(text: str | None) -> list[str] | None:
    """`--methods`: names separated by commas; `all` stands for every method."""
    if text == "all":
        return list(METHODS)
    return None if text is None else [word.strip() for word in text.split(",")]


def show_analyses(output: Output, found: Mapping[str, Analysis], folder: Path) -> None:
    """Sections that were added to a run's result, and where they lie."""
    from npprune.records import to_dict

    output.document("analyses", {"analyses": {key: to_dict(a) for key, a in found.items()}})
    for analysis in found.values():
        if analysis.rows:
            _wide_table(output, analysis)
        if analysis.text:
            output.text(analysis.text)
            output.line()
    if output.unstored is None and _recorded(found, folder):
        output.facts([("result", str(folder / "result.json")), ("sections", ", ".join(found))])
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
        output.text(f"not shown for want of room: {', '.join(columns[shown:])}")
    output.line()

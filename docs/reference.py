"""The generated reference pages: command line, recipes, Python API, core.

Everything is read from the installed package, so that a page cannot differ from the program. The
same package gives the same text.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from functools import cache
from typing import Any

import typer

import npprune
import npprune.core
from npprune import records
from npprune.cli.app import app
from npprune.recipe import Recipe
from npprune.recipe.sections import EditSection, StudySection
from npprune.recipe.settings import told

RESULTS = (
    records.Evaluation, records.FeatureEvaluation, records.FeatureAgreement, records.Probe,
    records.Accuracy, records.Rate, records.Mean, records.ClassRow, records.Latency,
    records.HealSummary, records.HealPoint, records.ExportRecord, records.ParityRow,
    records.Result, records.DiscoverySummary, records.Analysis,
)  # fmt: skip
FIELD = re.compile(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+?)?(?:  # (.+))?$", re.MULTILINE)
"""A field of a dataclass in its source: name, type, and the comment beside it."""


def pages() -> dict[str, str]:
    """Every generated page: its path below the documentation's folder, and its Markdown."""
    return {
        "reference/cli.md": command_line(),
        "reference/recipes.md": recipes(),
        "reference/python.md": python(),
        "reference/core.md": core(),
    }


# ---------------------------------------------------------------- command line


@cache
def commands() -> dict[str, Any]:
    """The program's commands by name, those of groups as `group command`."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for inner, each in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = each
    return found


def command_line() -> str:
    """One section per command: usage, arguments, options by panel, examples."""
    parts = [
        "# Command line\n\nThis page is generated from the program. `npprune COMMAND --help` shows "
        "the same.\n\nEvery command that yields a result takes `--json`: one JSON document on "
        "stdout, all messages on stderr. Exit codes are listed in [Reliability]"
        "(../reliability.md#exit-codes).\n\n| command | what it does |\n| --- | --- |\n"
        + "".join(
            f"| [`npprune {name}`](#npprune-{name.replace(' ', '-')}) | {_first(command.help)} |\n"
            for name, command in commands().items()
        )
    ]
    for name, command in commands().items():
        parts.append(f"## npprune {name}\n\n{_text(command.help)}\n")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(p.metavar for p in arguments)
        parts.append(f"```\nnpprune {name} {usage} [OPTIONS]\n```\n".replace("  ", " "))
        if arguments:
            rows = [(f"`{p.metavar}`", _text(p.help)) for p in arguments]
            parts.append(_table(("argument", "meaning"), rows))
        panels: dict[str, list[Any]] = {}
        for p in command.params:
            if p.param_type_name == "option":
                panels.setdefault(p.rich_help_panel or "Options", []).append(p)
        for panel, options in panels.items():
            parts.append(f"**{panel}**\n")
            parts.append(_table(("option", "default", "meaning"), [_option(p) for p in options]))
        if command.epilog:
            parts.append(_examples(command.epilog))
    return "\n".join(parts)


def _option(parameter: Any) -> tuple[str, str, str]:
    names = " ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.metavar:
        names += f" `{parameter.metavar}`".replace("|", "\\|")
    text, default = _split_default(parameter.help or "")
    if not default and parameter.required:
        default = "required"
    elif not default and isinstance(parameter.show_default, str):
        default = parameter.show_default
    elif not default and parameter.secondary_opts:
        default = f"`{parameter.opts[0] if parameter.default else parameter.secondary_opts[0]}`"
    elif not default and parameter.default is not None and parameter.default is not False:
        default = f"`{parameter.default}`"
    return names, _cell(default), _cell(text)


def _split_default(text: str) -> tuple[str, str]:
    """A help text, and the default that it states itself: `... [default: all]`."""
    text = text.replace("\\[", "[")
    found = re.search(r"\s*\[default: (.*)\]$", text)
    if not found:
        return text, ""
    default = found[1] if " " in found[1] else f"`{found[1]}`"
    return text[: found.start()], default


def _examples(epilog: str) -> str:
    """The epilog: indented lines are code, the others are text."""
    out = []
    for paragraph in re.split(r"\n\n+", epilog.strip("\n")):
        code = all(line.startswith("  ") for line in paragraph.splitlines())
        out.append(f"```sh\n{inspect.cleandoc(paragraph)}\n```" if code else _text(paragraph))
    return "\n\n".join(out) + "\n"


# ---------------------------------------------------------------- recipes


def recipes() -> str:
    """One section per section of a recipe: every key, its type, its default, its meaning."""
    parts = [
        "# Recipes\n\nThis page is generated from the program. [Write a recipe](../how-to/"
        "recipes.md) says how recipes are used.\n\nAn unknown key is refused with the nearest "
        "right name, a duplicate key is an error, and every message names file and line. In YAML, "
        "`null` means *not set*.\n",
        _section("recipe", Recipe, "The keys at the top level; the sections follow."),
    ]
    for key, field in Recipe.model_fields.items():
        if (section := _section_class(field.annotation)) is not None:
            null = "\n\n`null` leaves this stage out." if field.default is None else ""
            if field.default_factory is not None and "None" in str(field.annotation):
                null = f"\n\nWritten as `{key}: null`, this stage is left out."
            parts.append(_section(key, section, _text(inspect.getdoc(section)) + null))
    parts.append("## Settings of other commands\n\nThese are not part of a recipe.\n")
    parts.append(_section("study", StudySection, "`npprune study`.", level=3))
    parts.append(_section("edit", EditSection, "`npprune eval --edit`.", level=3))
    return "\n".join(parts)


def _section_class(annotation: Any) -> Any:
    """The section that a key holds, or None."""
    found = [annotation, *getattr(annotation, "__args__", ())]
    return next((a for a in found if hasattr(a, "model_fields")), None)


def _section(key: str, section: Any, text: str, level: int = 2) -> str:
    schema = section.model_json_schema()["properties"]
    rows = []
    for name, field in section.model_fields.items():
        if _section_class(field.annotation) is None:
            default = field.get_default(call_default_factory=True)
            shown = "required" if field.is_required() else f"`{_yaml(default)}`"
            said = told(field)
            shown += f": {_cell(said.shown)}" if said.shown else ""
            rows.append((f"`{name}`", _type(schema[name]), shown, _cell(said.help)))
    title = "Top level" if section is Recipe else f"`{key}`"
    table = _table(("key", "type", "default", "meaning"), rows)
    return f"{'#' * level} {title}\n\n{text}\n\n{table}"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `integer, at least 1`."""
    kinds = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
    return " or ".join(_kind(kind) for kind in kinds)


def _kind(schema: dict[str, Any]) -> str:
    words = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if words:
        return ", ".join(f"`{word}`" for word in words)
    if schema["type"] == "array":
        return f"list of: {_type(schema['items'])}"
    bounds = [
        f"{text} {schema[key]}"
        for key, text in (
            ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]  # fmt: skip
    kind = {"string": "text", "boolean": "`true` or `false`"}.get(schema["type"], schema["type"])
    return ", ".join([kind, *bounds])


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


# ---------------------------------------------------------------- Python


def python() -> str:
    """The public names of the package, and its exceptions."""
    parts = [
        "# Python API\n\n`import npprune` loads nothing heavy; each name loads on first use. "
        "[Use it from Python](../how-to/python.md) shows them at work.\n"
    ]
    for name in npprune.__all__:
        if not name.startswith("__"):
            thing = getattr(npprune, name)
            place = f"{thing.__module__}.{thing.__qualname__}"
            parts.append(
                f"::: {place}\n    options:\n      heading_level: 2\n"
                f"      heading: npprune.{name}\n      toc_label: npprune.{name}\n"
            )
            if sections := getattr(thing, "sections", ()):
                keys = [section.__name__.removesuffix("Section").lower() for section in sections]
                links = [f"[{k}](recipes.md#{k})" for k in keys if k in Recipe.model_fields]
                if links:
                    parts.append(f"Settings, by their names in a recipe: {', '.join(links)}.\n")
    parts.append(
        "## npprune.criteria.register\n\nA criterion of your own, known to `prune` as long as the "
        "process runs.\n\n"
        + _docstrings("npprune.criteria.register")
        + "\n### What it may read\n\n"
        + _docstrings("npprune.criteria.Context")
    )
    parts.append(
        "## What they return\n\nRecords of plain values, as in the JSON of the commands.\n\n"
        + "\n".join(map(_record, RESULTS))
    )
    parts.append(
        "## Exceptions\n\nAll of them are `npprune.errors.NpPruneError`, with a `message`, a "
        "`hint` or None, and the `exit_code` of the command line.\n\n"
        + _docstrings("npprune.errors")
    )
    return "\n".join(parts)


def _record(kind: type) -> str:
    """A record's fields; what they hold is said by the comments beside them."""
    rows = [
        (f"`{name}`", f"`{kind_of.strip()}`".replace("|", "\\|"), _cell(said or ""))
        for name, kind_of, said in FIELD.findall(inspect.getsource(kind))
        if not kind_of.startswith("ClassVar")
    ]
    table = _table(("field", "type", "holds"), rows)
    return f"### {kind.__name__}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n{table}"


def core() -> str:
    """Every module of `npprune.core`."""
    parts = [
        "# Core: the mathematics\n\nTensors in, tensors out: `npprune.core` knows torch and a "
        "view of a network ([VitView](../architecture.md#the-seam)), and no files, no recipes "
        "and no terminal. Every function here can be called from a notebook. Between versions it "
        "may change; what is promised is in [Python API](python.md).\n"
    ]
    for module in sorted(
        m.name for m in pkgutil.walk_packages(npprune.core.__path__, "npprune.core.")
    ):
        if importlib.import_module(module).__doc__:
            parts.append(f"## {module}\n\n{_docstrings(module)}")
    return "\n".join(parts)


def _docstrings(place: str) -> str:
    """What the docstrings of a module, class or function say, below a heading of our own."""
    return (
        f"::: {place}\n    options:\n      show_root_heading: false\n"
        "      show_root_toc_entry: false\n"
    )


# ---------------------------------------------------------------- text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|").replace("\n", " ")


def _first(text: str) -> str:
    return _cell(text.strip().split("\n\n")[0])


def _text(text: str | None) -> str:
    """Help text as Markdown."""
    return (text or "").replace("\\[", "[").replace("<", "&lt;").replace("*", "\\*").strip()

"""Options of the commands, made from the fields of a recipe, so that each is told once.

`of` makes one option of a field. The decorators add a group of options to a command and hand it
ONE object for all of them: a section, or `RunOptions`. An option that was not given is None and
leaves the field's default; its bounds and messages are the field's (`npprune.cli.flags`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from npprune import words
from npprune.cli import flags
from npprune.errors import NpPruneError
from npprune.recipe.sections import (
    BUDGET,
    IMAGES,
    MODEL,
    PREPROCESSING,
    RUN,
    DataSection,
    ModelSection,
    Recipe,
    Section,
)
from npprune.recipe.settings import told, words_of

if TYPE_CHECKING:
    from npprune.pipeline.common.events import Emit
    from npprune.pipeline.common.work import Work

Command = Callable[..., None]
ORDER = {BUDGET: -1, IMAGES: 1, PREPROCESSING: 2, MODEL: 3, RUN: 4}
"""Where a panel stands in the help; a command's own panels are at 0."""


def option(panel: str, flag: str, metavar: str | None, what: str, **more: Any) -> Any:
    """An option in a panel of the help; `metavar` None: a switch."""
    return typer.Option(flag, metavar=metavar or "", help=what, rich_help_panel=panel, **more)


def choice(panel: str, flag: str, what: str, values: Sequence[str], metavar: str = "WORD") -> Any:
    """An option of a few words: named in the help, completed by the shell."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    text, default, more = what.partition("\\[default")
    shown = ": ".join(filter(None, (text.strip(), ", ".join(values))))
    shown += f" {default}{more}" if default else ""
    return option(panel, flag, metavar, shown, autocompletion=complete)


def required(panel: str, flag: str, metavar: str, what: str) -> Any:
    """An option without a default."""
    return option(panel, flag, metavar, what, show_default=False)


def argument(metavar: str, what: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=what, show_default=False)


# ---------------------------------------------------------------- from fields


@dataclass(frozen=True)
class Option:
    """An option as Typer reads it, and the setting that it stands for (`prune.keep`)."""

    annotation: Any
    flag: str
    setting: str = ""
    needed: bool = False


def of(
    section: type[Section],
    name: str,
    *,
    needed: bool = False,
    default: bool = True,
    values: Sequence[str] = (),
    **other: str,
) -> Option:
    """The option of a recipe's field; `other` replaces what is told of it (help, flag, shown).

    `needed`: it must be given. `default` False: the help does not show the field's default.
    """
    field = section.model_fields[name]
    said = replace(told(field), **other)
    kind = _kind(field)
    flag = said.flag or f"--{name.replace('_', '-')}"
    if kind is bool and field.default is True and "/" not in flag:
        flag += flag.replace("--", "/--no-", 1)
    shown = said.shown or (_shown(field.default, flag) if default else "")
    text = said.help + (f" \\[default: {shown}]" if shown and not needed else "")
    if values := tuple(values) or words_of(field):
        made = choice(said.panel, flag, text, values, said.metavar or "WORD")
    else:
        made = option(said.panel, flag, said.metavar or None, text, show_default=False)
    shape: Any = kind if needed else kind | None
    annotation: Any = Annotated[shape, made]
    return Option(annotation, flag, section.key(name), needed)


def _kind(field: FieldInfo) -> Any:
    """What the parser makes of the text: a number or a switch; all else is the section's."""
    plain = [k for k in (field.annotation, *get_args(field.annotation)) if k in (bool, int, float)]
    return plain[0] if len(plain) == 1 else str


def _shown(default: Any, flag: str) -> str:
    """A default as the help shows it."""
    if isinstance(default, bool):
        on, _, off = flag.partition("/")
        return (on if default else off).removeprefix("--")
    if isinstance(default, list):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
    return "" if default is None else str(default)


def flag_name(named: Mapping[str, str], name: str, value: str | None) -> str:
    """A setting as the command line has it: `--topk`, `--topk 5`, `--no-latency`."""
    flag = named.get(name) or f"--{name.rpartition('.')[2].replace('_', '-')}"
    on, _, off = flag.partition("/")
    if value == "False":
        return f"`{off or on.replace('--', '--no-', 1)}`"
    return f"`{on}`" if value in (None, "True") else f"`{on} {value}`"


# ---------------------------------------------------------------- groups


def extended(
    command: Command,
    into: str,
    options: Mapping[str, Option],
    build: Callable[[dict[str, Any]], Any],
    *,
    last: bool = False,
) -> Command:
    """A command with more options; `build` turns what was given into the one parameter `into`.

    Its errors name settings by the options of the command (`flag_name`). In the help, groups
    stand in the order of the decorators, before the command's own options unless `last`.
    """
    named: dict[str, str] = getattr(command, "named", {})
    named.update({o.setting: o.flag for o in options.values() if o.setting})

    def wrapped(*args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in options}
        try:
            command(*args, **kwargs, **{into: build(given)})
        except NpPruneError as err:
            err.name_of = err.name_of or partial(flag_name, named)
            raise

    signature = inspect.signature(command, eval_str=True)
    old = [p for p in signature.parameters.values() if p.name != into]
    fixed = [p for p in old if p.kind is not p.KEYWORD_ONLY]
    own = old[len(fixed) :]
    new = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if o.needed else None,
            annotation=o.annotation,
        )
        for name, o in options.items()
    ]
    params = fixed + sorted(own + new if last else new + own, key=_rank)
    update_wrapper(wrapped, command)
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    wrapped.__signature__ = signature.replace(parameters=params)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in params} | {"return": None}
    wrapped.named = named  # type: ignore[attr-defined]
    return wrapped


def _rank(parameter: inspect.Parameter) -> int:
    made = [*getattr(parameter.annotation, "__metadata__", ()), None][0]
    return ORDER.get(getattr(made, "rich_help_panel", "") or "", 0)


def settings(
    section: type[Section], *, into: str = "settings", omit: Iterable[str] = ()
) -> Callable[[Command], Command]:
    """The options of a section; the command gets the section as `into`."""
    made = {name: of(section, name) for name in section.model_fields if name not in set(omit)}
    return lambda command: extended(
        command, into, made, lambda given: flags.section(section, **given)
    )


def images(*, omit: Iterable[str] = (), **chosen: Option) -> Callable[[Command], Command]:
    """Which images, and how they are prepared: the command gets `images`, a DataSection.

    `chosen` gives the options of its sources (train, calibration, val) and of `preprocessing`,
    which only some commands have.
    """
    left_out = {"train", "calibration", "val", "preprocessing", *omit} - set(chosen)
    names = [name for name in DataSection.model_fields if name not in left_out]
    made = {name: chosen.get(name) or of(DataSection, name, default=False) for name in names}
    if "classes" in made:
        many = Annotated[list[str] | None, made["classes"].annotation.__metadata__[0]]
        made["classes"] = replace(made["classes"], annotation=many)
    switch = option(PREPROCESSING, "--no-crop", None, "short for --crop-mode squash --crop-pct 1")
    made["no_crop"] = Option(Annotated[bool | None, switch], "--no-crop")
    return lambda command: extended(command, "images", made, flags.data_section)


def model(*more: str) -> Callable[[Command], Command]:
    """How a network is built: the command gets `network`, the fields that were given.

    `more` names fields that only some commands have: `probe`, `released_head`.
    """
    left_out = {"name", "probe", "released_head"} - set(more)
    made = {n: of(ModelSection, n) for n in ModelSection.model_fields if n not in left_out}

    def build(given: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in given.items() if value is not None}

    def decorate(command: Command) -> Command:
        wrapped = extended(command, "network", made, build)
        wrapped.named["model.name"] = "MODEL"  # type: ignore[attr-defined]
        return wrapped

    return decorate


@dataclass(frozen=True)
class RunOptions:
    """Where, with which seed and how a command runs, and the command line itself."""

    device: str = "auto"
    seed: int = 0
    dry_run: bool = False
    as_json: bool = False
    command: str = ""

    def work(self, emit: Emit) -> Work:
        """What every stage needs."""
        from npprune.pipeline.common.work import Work

        return Work(self.device, self.seed, emit, self.command)


def run(*names: str) -> Callable[[Command], Command]:
    """Options of a run by name (device, seed, dry_run), and `--json`: the command gets `run`."""
    dry = option(RUN, "--dry-run", None, "check, say what would be done, write nothing")
    known = {
        "device": of(Recipe, "device", values=words.DEVICES),
        "seed": of(Recipe, "seed"),
        "dry_run": Option(Annotated[bool | None, dry], "--dry-run"),
        "as_json": Option(Json, "--json"),
    }
    made = {"ctx": Option(typer.Context, "")}
    made |= {name: known[name] for name in (*names, "as_json")}

    def build(given: dict[str, Any]) -> RunOptions:
        command = flags.command_line(given.pop("ctx"))
        for name in ("device", "seed"):
            flags.check_setting(Recipe, name, given.get(name))
        return RunOptions(**{k: v for k, v in given.items() if v is not None}, command=command)

    return lambda command: extended(command, "run", made, build, last=True)


# ---------------------------------------------------------------- shared by several commands

Model = Annotated[str, argument("MODEL", told(ModelSection.model_fields["name"]).help)]
CheckpointFolder = Annotated[Path, argument("CHECKPOINT", "a folder written by npprune prune")]
RunFolder = Annotated[Path, argument("RUN", "a run folder, or its result.json")]
Json = Annotated[bool, option(RUN, "--json", None, "one JSON document on stdout")]
Root = Annotated[Path, option(RUN, "--root", "FOLDER", "reports/ and ckpt/ are written below it")]


def dense(panel: str) -> Any:
    """`--dense`: the dense weights of a checkpoint."""
    what = "the dense weights, if the file has moved"
    return option(panel, "--dense", "FILE", what)


def provider(panel: str, what: str) -> Any:
    """`--provider`: ONNX Runtime's execution provider."""
    return choice(panel, "--provider", what, words.PROVIDERS)

"""From a file, a shipped recipe's name and `--set a.b=c` to a `Recipe`, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from npprune.criteria import CRITERIA
from npprune.errors import RecipeError, setting
from npprune.recipe.messages import Place, place_of, recipe_error, recipe_name, usage_error
from npprune.recipe.rules import Conflict, check
from npprune.recipe.sections import Recipe, Section
from npprune.words import nearest

S = TypeVar("S", bound=Section)

_FOLDER_NAME = re.compile(r"^[^./\\\s][^/\\\n]*\Z")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or by a shipped recipe's name, changed by `a.b=c` overrides.

    RecipeError says the key, the rule, what came, and file:line (or the `--set`).
    """
    return read_recipe(source, overrides)[0]


def read_recipe(
    source: str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe, dict[Place, str]]:
    """As `load_recipe`; besides, where each value was written: file:line, or the `--set`."""
    from npprune.recipe.tree import override, parse

    data, places = parse(_find(source))
    for text in overrides:
        override(data, places, text)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as err:
        raise recipe_error(err, data, places) from err
    try:
        _check(recipe)
    except Conflict as err:
        message, hint = err.said(recipe_name)
        place = place_of(places, tuple(err.field.split(".")))
        raise RecipeError(f"{message} ({place})", hint=hint) from err
    return recipe, places


def section_of(
    cls: type[S], values: Mapping[str, Any], *, as_given: Mapping[str, Any] | None = None
) -> S:
    """A section of values that came from no recipe; None leaves a setting's default.

    as_given: the values as a message is to show them.

    Raises:
        UsageError: a value is out of bounds, or contradicts another.
    """
    try:
        settings = cls(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as err:
        raise usage_error(cls, err, values if as_given is None else as_given) from err
    check(settings)
    return settings


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, every value spelled out; `load_recipe` gives the same recipe back."""
    from npprune.recipe.tree import dump

    return dump(recipe.model_dump(mode="json"))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with npprune: name -> file."""
    here = Path(__file__).resolve().parent.parent
    folder = here / "_recipes"  # in a wheel
    if not folder.is_dir() and (here.parent / "pyproject.toml").is_file():
        folder = here.parent / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _check(recipe: Recipe) -> None:
    """What a recipe must keep to beyond the bounds of single fields. Raises Conflict."""
    if not _FOLDER_NAME.match(recipe.name):
        raise Conflict(
            "name",
            f"{setting('name')} must be able to name a folder, got `{recipe.name}`",
            hint="no `/`, and no `.` or blank in front",
        )
    for section in (recipe.prune, recipe.heal, recipe.export):
        if section is not None:
            check(section)
    if recipe.discover is None and recipe.prune is not None:
        for field, value, reads in (
            ("topk", recipe.prune.topk, recipe.prune.topk is not None),
            ("criterion", recipe.prune.criterion, CRITERIA[recipe.prune.criterion].paths),
        ):
            if reads:
                raise Conflict(
                    f"prune.{field}",
                    f"{setting(f'prune.{field}', value)} reads paths, and `discover` is null",
                    hint="leave one of the two out",
                )


def _find(source: str | Path) -> Path:
    """The file that a path or a shipped recipe's name means."""
    path, shipped = Path(source), shipped_recipes()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    if path.is_dir():
        raise RecipeError(f"a recipe must be a YAML file, got the folder `{path}`")
    near = nearest(path.stem, shipped)
    names = ", ".join(f"`{name}`" for name in shipped)
    raise RecipeError(
        f"no recipe at `{path}`",
        hint=f"did you mean the shipped recipe `{near}`?"
        if near
        else f"a YAML file, or one of the shipped recipes: {names}",
    )

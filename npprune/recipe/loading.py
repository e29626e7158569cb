"""From a file, a shipped recipe's name and `--set a.b=c` to a `Recipe`, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from npprune.criteria import CRITERIA
from npprune.errors import RecipeError
from npprune.recipe.messages import place_of, recipe_error
from npprune.recipe.rules import conflict, key
from npprune.recipe.sections import Recipe
from npprune.recipe.tree import Dumper, Place, override, parse

_FOLDER_NAME = re.compile(r"^[^./\\\s][^/\\\n]*\Z")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or by a shipped recipe's name, changed by `a.b=c` overrides.

    RecipeError says the key, the rule, what came, and file:line (or the `--set`).
    """
    path = _find(source)
    data, places = parse(path)
    for text in overrides:
        override(data, places, text)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as err:
        raise recipe_error(err, data, places) from err
    _check(recipe, places)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as YAML, every value spelled out; `load_recipe` gives the same recipe back."""
    return yaml.dump(
        recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with npprune: name -> file."""
    here = Path(__file__).resolve().parent.parent
    folder = here / "_recipes"  # in a wheel
    if not folder.is_dir() and (here.parent / "pyproject.toml").is_file():
        folder = here.parent / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _check(recipe: Recipe, places: dict[Place, str]) -> None:
    """What a recipe file must keep to beyond the bounds of single fields."""
    if not _FOLDER_NAME.match(recipe.name):
        raise RecipeError(
            f"`name` must be able to name a folder, got `{recipe.name}` "
            f"({place_of(places, ('name',))})",
            hint="no `/`, and no `.` or blank in front",
        )
    for name in ("prune", "heal", "export"):
        section = getattr(recipe, name)
        found = conflict(section, key(name)) if section is not None else None
        if found is not None:
            place = place_of(places, (name, found.field))
            raise RecipeError(f"{found.message} ({place})", hint=found.hint)
    if recipe.discover is None and recipe.prune is not None:
        for field, value, reads in (
            ("topk", recipe.prune.topk, recipe.prune.topk is not None),
            ("criterion", recipe.prune.criterion, CRITERIA[recipe.prune.criterion].paths),
        ):
            if reads:
                raise RecipeError(
                    f"`prune.{field}: {value}` reads paths, and `discover` is null "
                    f"({place_of(places, ('prune', field))})",
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
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    names = ", ".join(f"`{name}`" for name in shipped)
    raise RecipeError(
        f"no recipe at `{path}`",
        hint=f"did you mean the shipped recipe `{near[0]}`?"
        if near
        else f"a YAML file, or one of the shipped recipes: {names}",
    )

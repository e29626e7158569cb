"""What is wrong with a recipe, in words: the key, the rule, what came, where, what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from npprune.errors import RecipeError, UsageError, setting
from npprune.recipe.sections import Recipe, Section
from npprune.recipe.settings import item_of, rule_of, told, words_of
from npprune.words import did_you_mean, nearest

Place = tuple[str | int, ...]
"""Where a value stands in a recipe: ("prune", "keep"), ("data", "classes", 0)."""


def recipe_name(name: str, value: str | None) -> str:
    """A setting as a recipe has it: `prune.topk`, or `prune.topk: 5`."""
    yaml = {"True": "true", "False": "false"}
    return f"`{name}`" if value is None else f"`{name}: {yaml.get(value, value)}`"


def recipe_error(
    err: ValidationError, data: dict[str, Any], places: dict[Place, str]
) -> RecipeError:
    """The first thing that is wrong; an unknown key goes first, for it explains a missing one."""
    errors = err.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path = _path_in(data, first["loc"])
    if first["type"] == "missing":
        path = (*path, first["loc"][-1])
    name = ".".join(map(str, path))
    where = f" ({place_of(places, path)})"
    if first["type"] == "extra_forbidden":
        return RecipeError(f"unknown key `{name}`{where}", hint=_nearest(path))
    if first["type"] == "missing":
        return RecipeError(f"`{name}` is missing{where}", hint=f"every recipe gives `{name}`")
    value = _at_path(data, path)
    if inner := _sections().get(name):  # a value where a section belongs
        rule, hint = "a section (a mapping of keys)", f"its keys: {_listed(inner)}"
    else:
        section, key, *item = path if path[0] in _sections() else ("", *path)
        field = _section(str(section)).model_fields[str(key)]
        rule = rule_of(field, first["type"], item=bool(item))
        hint = did_you_mean(value, words_of(field)) or told(field).hint
    return RecipeError(f"`{name}` must be {rule}, got {show(value)}{where}", hint=hint or None)


def usage_error(cls: type[Section], err: ValidationError, values: Mapping[str, Any]) -> UsageError:
    """The first value of a section that is wrong, given outside of a recipe; numbers of a list are
    shown as they were given."""
    first = err.errors()[0]
    name = str(first["loc"][0])
    field, value = cls.model_fields[name], first["input"]
    known = words_of(field)
    item = len(first["loc"]) > 1 and item_of(field) is not None
    rule = rule_of(field, first["type"], item=item)
    if item and not known:
        numbers = {"int_parsing": "whole numbers", "float_parsing": "numbers"}.get(first["type"])
        rule = f"{numbers} separated by commas" if numbers else f"{rule} each"
        value = values[name]
    return UsageError(
        f"{setting(cls.key(name))} must be {rule}, got `{value}`",
        hint=did_you_mean(value, known) or told(field).hint or None,
    )


def show(value: Any) -> str:
    """A value as in a message, short."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return f"`{text if len(text) <= 60 else text[:57] + '...'}`"


def place_of(places: dict[Place, str], path: Place) -> str:
    """Where a value, or else what holds it, was written."""
    while path not in places and path:
        path = path[:-1]
    return places.get(path, "--set")


def _sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe by name."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = kind
    return found


def _section(name: str) -> type[BaseModel]:
    """The class of a section by its name; the empty name is the recipe itself."""
    return _sections()[name] if name else Recipe


def _listed(section: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in section.model_fields)


def _nearest(path: Place) -> str:
    """Which key may have been meant."""
    parent, key = ".".join(map(str, path[:-1])), str(path[-1])
    prefix = f"{parent}." if parent else ""
    if near := nearest(key, _section(parent).model_fields):
        return f"did you mean `{prefix}{near}`?"
    elsewhere = [f"{name}.{key}" for name, s in _sections().items() if key in s.model_fields]
    if parent and key in Recipe.model_fields:
        elsewhere.append(key)
    if elsewhere:
        return "did you mean " + " or ".join(f"`{name}`" for name in elsewhere) + "?"
    return f"known here: {_listed(_section(parent))}"


def _path_in(data: Any, loc: tuple[str | int, ...]) -> Place:
    """The part of an error's location that is in the data: pydantic adds names of union members."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(data, list) and not isinstance(part, int):
            continue
        if not isinstance(data, list) and not (isinstance(data, dict) and part in data):
            break
        data = data[int(part)] if isinstance(data, list) else data[part]
        path.append(part)
    return tuple(path)


def _at_path(data: Any, path: Place) -> Any:
    for part in path:
        data = data[part]
    return data

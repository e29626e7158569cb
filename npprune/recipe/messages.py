"""What is wrong with a recipe, in words: the key, the rule, what came, where, what to do."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from npprune.errors import RecipeError
from npprune.recipe.sections import IMG_SIZE, Recipe, Section
from npprune.recipe.tree import Place, show
from npprune.words import did_you_mean


def bounds(section: type[BaseModel], name: str) -> str:
    """What a number field must be, in words: `in (0, 1]`, `at least 1`; empty without limits."""
    limits: dict[str, float] = {}
    for constraint in section.model_fields[name].metadata:
        for kind in ("gt", "ge", "lt", "le"):
            if getattr(constraint, kind, None) is not None:
                limits[kind] = getattr(constraint, kind)
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if low is not None and high is not None:
        left, right = "[" if "ge" in limits else "(", "]" if "le" in limits else ")"
        return f"in {left}{low:.15g}, {high:.15g}{right}"
    if low is not None:
        return f"at least {low:.15g}" if "ge" in limits else f"greater than {low:.15g}"
    return "" if high is None else f"at most {high:.15g}"


_RULES = {  # fields whose rule is not said by their type and bounds
    "device": "one of `auto`, `cpu`, `cuda`, `cuda:N`, `mps`",
    "model.img_size": IMG_SIZE,
    "data.classes": "a list of indices, synsets or names, or a file's path",
    "data.mean": "a list of numbers, one per channel",
    "data.std": "a list of numbers above 0, one per channel",
    "evaluate.batches": "a list of batch sizes, each at least 1",
    "export.batch": "`dynamic` or a whole number of at least 1",
}

_KINDS = {  # by the first word of pydantic's error type
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "model": "a section (a mapping of keys)",
}

_HINTS = {
    "prune.keep": "`0.5` keeps half of the neurons",
    "prune.topk": "`1` keeps each class's most frequent neuron of every block",
    "prune.target_params": "`0.7` asks for 70 % of the dense parameters, `4e6` for four million",
    "prune.target_macs": "`0.7` asks for 70 % of the dense MACs, `1e9` for a billion",
    "discover.topk": "`1` finds one neuron per block, as in the paper",
    "discover.points": "leave it out, or take 4 at the class token, 8 at the patches",
    "data.crop_pct": "`0.9` crops the middle 90 % of the resized image's side",
    "data.train": "for example `folder:PATH` or `digits:train`",
}


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
    field = _field_of(path)
    hint = _HINTS.get(field)
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first.get("ctx", {}).get("expected", ""))
        hint = did_you_mean(first["input"], choices) or hint
    value = show(_at_path(data, path))
    return RecipeError(f"`{name}` must be {_rule(first, field)}, got {value}{where}", hint=hint)


def _rule(error: ErrorDetails, field: str) -> str:
    """What a field must be, in words."""
    if field in _RULES:
        return _RULES[field]
    if field in _section_names():
        return _KINDS["model"]
    section, _, key = field.rpartition(".")
    limits = bounds(_section(section), key)
    kind = error["type"].split("_")[0]
    if kind == "literal":
        choices = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
        return "one of " + ", ".join(f"`{c}`" for c in choices)
    if kind == "finite" and not limits.startswith("in "):
        return f"a finite number {limits}".rstrip()
    if kind in _KINDS:
        return f"{_KINDS[kind]} {limits}".rstrip()
    if kind == "not":  # a bool where a number or text belongs
        return f"a number {limits}" if limits else "something other than true or false"
    return limits or error["msg"].lower()


def _section(name: str) -> type[BaseModel]:
    """The class of a section by its name; the empty name is the recipe itself."""
    if not name:
        return Recipe
    annotation = Recipe.model_fields[name].annotation
    classes = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type)]
    return next(c for c in classes if issubclass(c, Section))


def _field_of(path: Place) -> str:
    """The dotted name of the field that holds a value: `data.classes` for data.classes.0."""
    names = [str(part) for part in path]
    return ".".join(names[: 2 if names[0] in _section_names() else 1])


def _section_names() -> list[str]:
    return [n for n, f in Recipe.model_fields.items() if "Section" in str(f.annotation)]


def _nearest(path: Place) -> str:
    """Which key may have been meant."""
    parent = ".".join(map(str, path[:-1]))
    key = str(path[-1])
    known = list(_section(parent).model_fields)
    prefix = f"{parent}." if parent else ""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"did you mean `{prefix}{near[0]}`?"
    elsewhere = [f"{s}.{key}" for s in _section_names() if key in _section(s).model_fields]
    if parent and key in Recipe.model_fields:
        elsewhere.append(key)
    if elsewhere:
        return "did you mean " + " or ".join(f"`{name}`" for name in elsewhere) + "?"
    return f"known here: {', '.join(f'`{name}`' for name in known)}"


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


def place_of(places: dict[Place, str], path: Place) -> str:
    """Where a value, or else what holds it, was written."""
    while path not in places and path:
        path = path[:-1]
    return places.get(path, "--set")

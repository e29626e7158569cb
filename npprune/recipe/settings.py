"""A setting is told once: its help, panel, metavar and hint stand on its recipe field."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_KEY = "npprune"


@dataclass(frozen=True)
class Told:
    """What is said of a setting besides its type, bounds and default.

    help: one line, lower case, without the default. panel: group in the command's help.
    metavar: its value in the help, e.g. `SHARE`. hint: an example, said where a value is refused.
    flag: the command line's name where it is not `--` and the field's name.
    shown: the default in words, where the field's own says nothing (None).
    """

    help: str
    panel: str = ""
    metavar: str = ""
    hint: str = ""
    flag: str | None = None
    shown: str = ""


def setting(
    default: Any,
    help: str,
    *,
    panel: str = "",
    metavar: str = "",
    hint: str = "",
    flag: str | None = None,
    shown: str = "",
    **bounds: Any,
) -> Any:
    """A recipe field with everything that is said of it; `bounds` are pydantic's (gt, ge, ...)."""
    said = Told(help, panel, metavar, hint, flag, shown)
    extra: dict[str, Any] = {_KEY: said}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def told(field: FieldInfo) -> Told:
    """What `setting` said of a field; an empty text where it was made without."""
    extra = field.json_schema_extra
    found = extra.get(_KEY) if isinstance(extra, dict) else None
    return found if isinstance(found, Told) else Told(field.description or "")


# ---------------------------------------------------------------- types


@dataclass(frozen=True)
class OneOf:
    """`Annotated[str, OneOf(words)]`: a word of a registry, which may grow while we run."""

    known: Callable[[], Iterable[str]]

    def _check(self, word: str) -> str:
        if word not in self.known():
            raise PydanticCustomError("literal_error", "not one of the words known here")
        return word

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self.known())}


@dataclass(frozen=True)
class Rule:
    """`Annotated[A | B, Rule("...")]`: what a value must be, where its type does not say it."""

    text: str

    def _check(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        try:
            return inner(value)
        except (ValidationError, ValueError) as err:
            raise PydanticCustomError("rule", "not as it must be") from err

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))


# ---------------------------------------------------------------- what a value must be, in words

_KINDS = {  # by the first word of pydantic's error type
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
}


def item_of(field: FieldInfo) -> Any:
    """The type of a list's items; None where the field holds no list."""
    kinds = _kinds(field.annotation)
    is_list = len(kinds) == 1 and get_origin(kinds[0]) is list
    return get_args(kinds[0])[0] if is_list else None


def words_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field, or each item of its list, may be; () where it is not of words."""
    metadata = list(field.metadata)
    kinds = _kinds(field.annotation)
    while len(kinds) == 1 and get_origin(kinds[0]) in (list, Annotated):
        annotation, *more = get_args(kinds[0])
        metadata += more
        kinds = _kinds(annotation)
    for each in metadata:
        if isinstance(each, OneOf):
            return tuple(each.known())
    literal = len(kinds) == 1 and get_origin(kinds[0]) is Literal
    return get_args(kinds[0]) if literal else ()


def rule_of(field: FieldInfo, error_type: str, *, item: bool = False) -> str:
    """What a field must be, or each `item` of its list, given the type of pydantic's error."""
    for each in field.metadata:
        if isinstance(each, Rule):
            return each.text
    kind = error_type.split("_")[0]
    if kind == "literal":
        return "one of " + ", ".join(f"`{word}`" for word in words_of(field))
    limits = bounds(field, item=item)
    if kind == "finite" and not limits.startswith("in "):
        return f"a finite number {limits}".rstrip()
    if kind in _KINDS:
        return f"{_KINDS[kind]} {limits}".rstrip()
    if kind == "not":  # a bool where a number or text belongs
        return f"a number {limits}" if limits else "something other than true or false"
    return limits or ("a list with at least one entry" if kind == "too" else "of another kind")


def bounds(field: FieldInfo, *, item: bool = False) -> str:
    """What a number field must be, in words: `in (0, 1]`, `at least 1`; empty without limits."""
    metadata = field.metadata
    if item:
        of = item_of(field)
        inner = get_args(of)[1:] if get_origin(of) is Annotated else ()
        metadata = [m for each in inner if isinstance(each, FieldInfo) for m in each.metadata]
    limits: dict[str, float] = {}
    for constraint in metadata:
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


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union without None; the type itself where it is none."""
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    return [m for m in members if m is not type(None)]

"""Arguments of the Python API: checked before anything is computed.

Settings are given as keywords, by their names in a recipe; the recipe's sections check them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from npprune.errors import ModelError, UsageError
from npprune.recipe import DataSection, ModelSection, Section, section_of
from npprune.recipe.settings import told
from npprune.words import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS = {"train", "calibration", "val", "name", "paths"}
"""Fields of sections that are arguments of the functions, not settings."""
SEEDS = 2**32


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"`model` must be a network, got {type(model).__name__}",
            hint="`npprune.load_model(NAME)` gives one",
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("the network has no weights: its parameters are on the meta device")


def number(name: str, value: Any, least: int, most: int | None = None) -> int | None:
    """As `whole`, or None."""
    return None if value is None else whole(name, value, least, most)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number within bounds, of any integer type."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    inside = number is not None and number >= least and (most is None or number <= most)
    if number is None or isinstance(value, bool) or not inside:
        bounds = f"at least {least}" if most is None else f"in {least}..{most}"
        raise UsageError(f"`{name}` must be a whole number {bounds}, got {value!r}")
    return number


def taking(*kinds: type[Section]) -> Callable[[F], F]:
    """A function that takes the settings of these sections as keywords: its signature and its
    docstring name them."""

    def add(function: F) -> F:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = {n: f for kind in kinds for n, f in settings_of(kind).items()}
        more = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=field.annotation,
                default=field.get_default(call_default_factory=True),
            )
            for name, field in fields.items()
            if name not in own.parameters
        ]  # fmt: skip
        function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        lines = (f"        {name}: {told(field).help}" for name, field in fields.items())
        function.__doc__ = "\n".join(
            [(function.__doc__ or "").rstrip(), "", "    Settings:", *lines]
        )
        function.sections = kinds  # type: ignore[attr-defined]
        return function

    return add


def settings_of(kind: type[Section]) -> dict[str, Any]:
    """The fields of a section that are settings, by name."""
    return {name: f for name, f in kind.model_fields.items() if name not in ARGUMENTS}


def by_section(
    given: Mapping[str, Any], kinds: Sequence[type[Section]], beside: Iterable[str]
) -> list[dict[str, Any]]:
    """The keywords of each section; one that two sections have goes to both.

    Args:
        beside: the function's other arguments, which a misspelt keyword may mean.

    Raises:
        UsageError: a keyword that is no setting here.
    """
    fields = [settings_of(kind) for kind in kinds]
    known = [*dict.fromkeys(name for names in fields for name in names), *beside]
    for name in given:
        if not any(name in names for names in fields):
            raise UsageError(
                f"there is no setting `{name}` here",
                hint=did_you_mean(name, known) or f"the settings are {', '.join(sorted(known))}",
            )
    return [{k: _plain(v) for k, v in given.items() if k in names} for names in fields]


def data_section(values: Mapping[str, Any], **sources: str | None) -> DataSection:
    """A data section of keywords, and its sources by name."""
    return section_of(DataSection, {**values, **sources})


def model_section(name: str | Path, values: Mapping[str, Any]) -> ModelSection:
    """A network by its name, or the folder that it lies in."""
    return section_of(ModelSection, {"name": str(name), **values})


def _plain(value: Any) -> Any:
    """Lists for arrays, ranges and sets; a path as text."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, (range, set, frozenset, tuple)):
        return list(value)
    return str(value) if isinstance(value, Path) else value

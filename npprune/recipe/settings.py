"""A setting is told once: its help, panel, metavar and hint stand on its recipe field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo

_KEY = "npprune"


@dataclass(frozen=True)
class Told:
    """What is said of a setting besides its type, bounds and default.

    help: one line, lower case, without the default. panel: group in the command's help.
    metavar: its value in the help, e.g. `SHARE`. hint: an example, said where a value is refused.
    flag: the command line's name where it is not `--` and the field's name; "" for none.
    default: the default in words, where the field's own says nothing (None).
    """

    help: str
    panel: str = ""
    metavar: str = ""
    hint: str = ""
    flag: str | None = None
    default: str = ""


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

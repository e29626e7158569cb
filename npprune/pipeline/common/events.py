"""What a stage says while it works. The command line shows it; a notebook may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    `progress` events carry `done` and `total` (None: unknown) in `unit`s; the others a message.
    """

    stage: str  # discover | statistics | prune | evaluate | export | report | train
    message: str = ""
    level: Literal["info", "warning", "progress"] = "info"
    done: int = 0
    total: int | None = None
    unit: str = "images"
    data: dict[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `Emit` that says nothing."""

"""The exceptions a user may meet, each with a hint and an exit code.

A message says the thing, the rule and what came; the hint says the next step. `cli` turns
them into text in one place; nothing below it prints or exits.

Exit codes: 0 done; 1 ran, and a gate failed; 2 could not start; 70 a bug of ours;
130 interrupted and 143 terminated, both resumable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_SETTING = re.compile("«([^»=]+)(?:=([^»]*))?»")

NameOf = Callable[[str, "str | None"], str]
"""How a reader writes a setting: (`prune.topk`, a value or None) -> `--topk`, `prune.topk`, ..."""


def setting(name: str, value: object = None) -> str:
    """A setting in a message, by its recipe name: `prune.topk`.

    It is a marker until somebody reads it: `--topk` at the shell, `prune.topk` in a recipe,
    `topk` in Python.
    """
    return f"«{name}»" if value is None else f"«{name}={value}»"


def rendered(text: str, name_of: NameOf) -> str:
    """A message with its settings as one kind of reader writes them."""
    return _SETTING.sub(lambda m: name_of(m.group(1), m.group(2)), text)


def python_name(name: str, value: str | None) -> str:
    """`topk`, or `topk=5`."""
    field = name.rpartition(".")[2]
    return f"`{field}`" if value is None else f"`{field}={value}`"


def plural(n: int, one: str, many: str | None = None) -> str:
    """`1 class`, `1,000 images`: a count with its noun, for every message."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


class NpPruneError(Exception):
    """Base of everything npprune raises on purpose.

    `message` is one sentence (thing, rule, what came); `hint` is the next step or None. Both name
    settings as Python does; `said` gives them in another reader's words (see `setting`).
    """

    exit_code = 2
    name_of: NameOf | None = None
    """How whoever asked for the work writes settings; put there by a command or `npprune run`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self._raw = message, hint
        self.message, self.hint = self.said(python_name)
        super().__init__(self.message)
        if self.hint:
            self.__notes__ = [f"hint: {self.hint}"]  # below the message in Python's traceback

    def said(self, name_of: NameOf) -> tuple[str, str | None]:
        """Message and hint with the settings named by `name_of`."""
        message, hint = self._raw
        return rendered(message, name_of), hint and rendered(hint, name_of)

    def settings(self) -> list[str]:
        """The settings that the message names, in order."""
        return [m.group(1) for m in _SETTING.finditer(self._raw[0])]


class UsageError(NpPruneError):
    """An argument is missing, out of range, or contradicts another."""


class RecipeError(NpPruneError):
    """A recipe file or a `--set` override is wrong; the message carries file:line."""


class ModelError(NpPruneError):
    """A model is unknown, unsupported, or does not match its checkpoint."""


class DataError(NpPruneError):
    """A data source is missing, empty, unreadable or mislabelled."""


class DeviceError(NpPruneError):
    """A device was asked for by name and is not there."""


class StoreError(NpPruneError):
    """A run folder, checkpoint or plan cannot be read, written, or belongs to another run."""


class DamagedError(StoreError):
    """A file of ours is not what was written: cut short, changed, or another one's."""


class UnstoredError(StoreError):
    """The work is done and could not be stored; `found` is what it came to, to be shown."""

    def __init__(self, message: str, *, hint: str | None = None, found: Any = None) -> None:
        super().__init__(message, hint=hint)
        self.found = found


class ExportError(NpPruneError):
    """An exported file cannot be made, read or run."""


class PeerError(NpPruneError):
    """Another process of this torchrun failed, and says why; or it is gone, as the hint says."""


class GateError(NpPruneError):
    """The work ran, and a gate it must pass failed: parity, budget, accuracy floor."""

    exit_code = 1

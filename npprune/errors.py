"""The exceptions a user may meet, each with a hint and an exit code.

A message says the thing, the rule and what came; the hint says the next step. `cli` turns
them into text in one place; nothing below it prints or exits.

Exit codes: 0 done; 1 ran, and a gate failed; 2 could not start; 70 a bug of ours;
130 interrupted, resumable.
"""

from __future__ import annotations

from typing import Any


def plural(n: int, one: str, many: str | None = None) -> str:
    """`1 class`, `1,000 images`: a count with its noun, for every message."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


class NpPruneError(Exception):
    """Base of everything npprune raises on purpose.

    `message` is one sentence (thing, rule, what came); `hint` is the next step or None.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


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


class UnstoredError(StoreError):
    """The work is done and could not be stored; `found` is what it came to, to be shown."""

    def __init__(self, message: str, *, hint: str | None = None, found: Any = None) -> None:
        super().__init__(message, hint=hint)
        self.found = found


class ExportError(NpPruneError):
    """An exported file cannot be made, read or run."""


class PeerError(NpPruneError):
    """Another process of this torchrun failed or was killed. Never shown: that one says why."""


class GateError(NpPruneError):
    """The work ran, and a gate it must pass failed: parity, budget, accuracy floor."""

    exit_code = 1

"""How much of a network may stay: a unit and an amount, told and checked in one place.

Knows no torch: recipes, the command line, the planner and the study share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from npprune.errors import UsageError, setting

Unit = Literal["neurons", "params", "macs", "latency"]
UNITS: tuple[Unit, ...] = get_args(Unit)

SETTINGS: dict[str, Unit] = {
    "keep": "neurons",
    "target_params": "params",
    "target_macs": "macs",
    "target_latency": "latency",
}
"""The setting that asks for each unit."""

_WORDS = {
    "neurons": "hidden units",
    "params": "parameters",
    "macs": "MACs",
    "latency": "latency",
}


@dataclass(frozen=True)
class Budget:
    """`amount` up to 1 is a share of the dense network's; above 1 a count, or milliseconds.

    Raises:
        UsageError: an unknown unit, an amount that is not positive, a count of hidden units.
    """

    unit: Unit
    amount: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"a budget's unit must be one of {', '.join(UNITS)}, got {self.unit}")
        if not self.amount > 0:
            raise UsageError(f"{self.setting} must be greater than 0, got `{self.amount}`")
        if self.unit == "neurons" and self.amount > 1:
            raise UsageError(
                f"{self.setting} must be in (0, 1], got `{self.amount}`",
                hint="`0.5` keeps half of the hidden units",
            )

    @property
    def setting(self) -> str:
        """The setting that asks for it, as errors name it."""
        return setting(f"prune.{next(k for k, unit in SETTINGS.items() if unit == self.unit)}")

    def absolute(self, dense: float) -> float:
        """The amount in units of the dense network's total; never above it."""
        return self.amount * dense if self.amount <= 1 else min(self.amount, dense)

    def __str__(self) -> str:
        what = _WORDS[self.unit]
        if self.amount <= 1:
            return f"{self.amount:.4g} of the dense network's {what}"
        return f"{self.amount:.6g} ms" if self.unit == "latency" else f"{self.amount:.6g} {what}"


def budgets(settings: Any) -> list[str]:
    """The budget settings that were given (not None), in `SETTINGS`' order."""
    read = settings.get if isinstance(settings, Mapping) else lambda k: getattr(settings, k, None)
    return [name for name in SETTINGS if read(name) is not None]


def budget_of(settings: Any) -> Budget | None:
    """The one budget that settings (a section or a mapping) ask for; None where there is none.

    Raises:
        UsageError: more than one.
    """
    given = budgets(settings)
    if len(given) > 1:
        named = [setting(f"prune.{name}") for name in given]
        every = [setting(f"prune.{name}") for name in SETTINGS]
        raise UsageError(
            f"a budget is one of {', '.join(every[:-1])} and {every[-1]}, got "
            f"{' and '.join(named)}",
            hint="leave all but one out",
        )
    if not given:
        return None
    value = settings[given[0]] if isinstance(settings, Mapping) else getattr(settings, given[0])
    return Budget(SETTINGS[given[0]], float(value))

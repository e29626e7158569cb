"""npprune: influential neuron paths of vision transformers, kept; the rest, removed.

The names below load on first use, so that `import npprune` stays cheap.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from npprune._version import __version__

__all__ = [
    "Cost",
    "Event",
    "Found",
    "PathBatch",
    "Plan",
    "Pruned",
    "__version__",
    "analyze",
    "apply_plan",
    "discover",
    "discover_paths",
    "evaluate",
    "explore",
    "export",
    "heal",
    "load",
    "load_model",
    "prune",
    "report",
    "save",
    "study",
]

if TYPE_CHECKING:
    from npprune.api import (
        Cost,
        Event,
        Found,
        PathBatch,
        Plan,
        Pruned,
        analyze,
        apply_plan,
        discover,
        discover_paths,
        evaluate,
        explore,
        export,
        heal,
        load,
        load_model,
        prune,
        report,
        save,
        study,
    )

_MODULES = ("criteria", "errors")  # `npprune.criteria.register`, `npprune.errors.NpPruneError`


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"npprune.{name}")
    if name in __all__:
        from npprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'npprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])


class _Package(ModuleType):
    """`npprune.export` and `npprune.report` are the functions, whatever was imported from the
    packages of these names."""

    @property
    def export(self) -> Any:
        return __getattr__("export")

    @export.setter
    def export(self, package: ModuleType) -> None:
        """Importing the package would put it here."""

    @property
    def report(self) -> Any:
        return __getattr__("report")

    @report.setter
    def report(self, package: ModuleType) -> None:
        """Likewise."""


sys.modules[__name__].__class__ = _Package

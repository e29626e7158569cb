"""npprune: influential neuron paths of vision transformers, kept; the rest, removed.

The names below load on first use, so that `import npprune` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npprune._version import __version__

__all__ = ["PathBatch", "Plan", "__version__", "apply_plan", "discover_paths", "load_model"]

if TYPE_CHECKING:
    from npprune.api import PathBatch, Plan, apply_plan, discover_paths, load_model


def __getattr__(name: str) -> Any:
    if name in __all__:
        from npprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'npprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

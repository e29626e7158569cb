"""The runtimes that can run a network: one file each, all opened and run in the same way."""

from __future__ import annotations

from npprune.export.runtimes.base import Opened, Runtime, Served
from npprune.export.runtimes.onnxruntime import OnnxRuntime
from npprune.export.runtimes.openvino import OpenVino
from npprune.export.runtimes.pytorch import Compiled, Eager

__all__ = ["RUNTIMES", "Opened", "Runtime", "Served"]

RUNTIMES: dict[str, Runtime] = {r.name: r for r in (OnnxRuntime(), Eager(), Compiled(), OpenVino())}
"""By the words of `words.RUNTIMES`."""

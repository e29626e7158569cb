"""Demo: the whole line on handwritten digits, from training to the report, in minutes."""

from __future__ import annotations

from pathlib import Path

from npprune.pipeline.common.events import Emit, ignore
from npprune.pipeline.run import run_recipe
from npprune.recipe import load_recipe
from npprune.records import Result


def run_demo(
    *,
    root: Path = Path("."),
    seed: int = 0,
    device: str = "auto",
    emit: Emit = ignore,
    command: str = "",
) -> Result:
    """Train a small network on scikit-learn's digits and run the shipped recipe `demo` on it.

    Writes `ckpt/demo_dense/` (the trained network), `ckpt/demo/` and `reports/demo/` below
    `root`. A network trained before with this seed is used again.
    """
    recipe = load_recipe("demo").model_copy(update={"seed": seed, "device": device})
    return run_recipe(recipe, root=root, emit=emit, command=command)

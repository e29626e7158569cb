"""Demo: the whole line on handwritten digits, from training to the report, in minutes."""

from __future__ import annotations

from pathlib import Path

from npprune.pipeline.common.work import Work
from npprune.pipeline.run import run_recipe
from npprune.recipe import load_recipe
from npprune.records import Result


def run_demo(*, root: Path = Path("."), work: Work | None = None) -> Result:
    """Train a small network on scikit-learn's digits and run the shipped recipe `demo` on it.

    Writes `ckpt/demo_dense/` (the trained network), `ckpt/demo/` and `reports/demo/` below
    `root`. A network trained before with this seed is used again.
    """
    work = work or Work()
    chosen = {"seed": work.seed, "device": work.device}
    return run_recipe(load_recipe("demo").model_copy(update=chosen), root=root, work=work)

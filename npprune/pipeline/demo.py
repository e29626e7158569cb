"""Demo: the whole line on handwritten digits, from training to the report, in minutes."""

from __future__ import annotations

from pathlib import Path

from npprune.models.info import model_info, state, weights_sha256
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.run import run_recipe
from npprune.recipe import load_recipe
from npprune.records import CheckpointConfig, ClassInfo, ModelSource, Result
from npprune.store.checkpoints import is_checkpoint, write_checkpoint


def run_demo(
    *,
    root: Path = Path("."),
    seed: int = 0,
    device: str = "auto",
    emit: Emit = ignore,
    command: str = "",
) -> Result:
    """Train a small network on scikit-learn's digits, then run the shipped recipe `demo` on it.

    Writes `ckpt/demo_dense/` (the trained network), `ckpt/demo/` and `reports/demo/` below
    `root`. A network trained before with this seed is used again.
    """
    recipe = load_recipe("demo")
    dense = root / "ckpt" / "demo_dense"
    if not (is_checkpoint(dense) and _seed(dense) == seed):
        _train(dense, seed, emit)
    else:
        emit(Event("train", f"{dense} is there already: not trained again"))
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": str(dense)}),
            "seed": seed,
            "device": device,
        }
    )
    return run_recipe(recipe, root=root, emit=emit, command=command)


def _train(folder: Path, seed: int, emit: Emit) -> None:
    from npprune.pipeline.train_demo import ARCHITECTURE, MODEL_ARGS, train_demo_model

    model, found = train_demo_model(seed=seed, emit=emit)
    emit(Event("train", f"trained in {found['seconds']:.0f} s, test top-1 {found['accuracy']:.1%}"))
    source = ModelSource(ARCHITECTURE, dict(MODEL_ARGS), sha256=weights_sha256(model))
    info = model_info(model, source)
    config = CheckpointConfig(
        source=source,
        widths=info.widths,
        heads=info.heads,
        num_classes=info.num_classes,
        preprocessing=info.preprocessing,
        classes=[ClassInfo(i, str(i)) for i in range(info.num_classes)],
        weights_sha256="",
        details={"trained": {"seed": seed, **found}},
    )
    write_checkpoint(folder, config, state(model))


def _seed(folder: Path) -> int | None:
    from npprune.store.checkpoints import read_config

    seed = read_config(folder).details.get("trained", {}).get("seed")
    return int(seed) if seed is not None else None

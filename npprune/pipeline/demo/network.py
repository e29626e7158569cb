"""The network that the demo recipe calls `digits`: trained here once, then read from its folder."""

from __future__ import annotations

from pathlib import Path

from npprune.models.info import model_info, state, weights_sha256
from npprune.pipeline.common.work import Work
from npprune.recipe import ModelSection
from npprune.records import CheckpointConfig, ClassInfo, ModelSource
from npprune.store.checkpoints import is_checkpoint, read_config, write_checkpoint

NAME = "digits"


def digits_network(root: Path, work: Work | None = None) -> ModelSection:
    """The checkpoint folder `ckpt/demo_dense` below `root`, trained if it is not there."""
    folder = root / "ckpt" / "demo_dense"
    work = (work or Work()).on("train")
    if is_checkpoint(folder) and _seed(folder) == work.seed:
        work.say(f"{folder} is there already: not trained again")
    else:
        _train(folder, work)
    return ModelSection(name=str(folder))


def _train(folder: Path, work: Work) -> None:
    from npprune.pipeline.demo.training import ARCHITECTURE, MODEL_ARGS, train_demo_model

    model, found = train_demo_model(work)
    work.say(f"trained in {found['seconds']:.0f} s, test top-1 {found['accuracy']:.1%}")
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
        details={"trained": {"seed": work.seed, **found}},
    )
    write_checkpoint(folder, config, state(model))


def _seed(folder: Path) -> int | None:
    seed = read_config(folder).details.get("trained", {}).get("seed")
    return int(seed) if seed is not None else None

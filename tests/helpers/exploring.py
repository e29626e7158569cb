"""A run with paths by two methods and a plan, on a network and images of next to no size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import open_finished, paths_of
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.explore import Explored, explore_run
from npprune.pipeline.prune.stage import prune
from npprune.recipe import DataSection, DiscoverSection, ModelSection
from npprune.recipe.sections import ExploreSection, PruneSection
from tests.helpers.digits_network import random_digits_network

HOSTILE = "<script>alert(1)<!--"
IMAGES = {HOSTILE: 5, "bee": 1, "cat": 4}


def build(run: Path, out: Path, **options: Any) -> Explored:
    """The explorer of a run; settings and arguments by name."""
    settings = {k: options.pop(k) for k in list(options) if k in ExploreSection.model_fields}
    return explore_run(run, ExploreSection(**settings), out, work=Work("cpu"), **options)


def explored(root: Path) -> Path:
    """`run`, `half` (the plan), `images`, and `site`, the explorer of all of it."""
    dense = random_digits_network(root / "dense")
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(IMAGES.items()):
        (root / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (8, 8, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{i}.png")
    data = DataSection(train=f"folder:{root / 'images'}", batch_size=4)
    discover(ModelSection(name=str(dense)), data, DiscoverSection(topk=2, points=2), root / "run")
    few = PruneSection(
        keep=0.5, criterion="magnitude", selection="uniform", compensation="none", min_keep=1
    )
    prune(root / "run", DataSection(), few, root / "half")
    paths_of(open_finished(root / "run"), "activation", Work("cpu"))
    build(root / "run", root / "site", plan=root / "half")
    return root

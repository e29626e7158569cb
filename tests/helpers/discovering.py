"""A tiny network with a folder of tiny images, and discovery on them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from npprune.cli import app
from npprune.core.attribution.methods import find_paths
from npprune.core.attribution.quadrature import Integral
from npprune.core.view import Scope, VitView
from npprune.models.view import make_view
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover import stage as stage
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.prune import stage as prune_stage
from npprune.recipe import DataSection, DiscoverSection, ModelSection
from npprune.records import Result
from npprune.store.path_store import PathStore, PathTable
from tests.helpers.tiny import tiny_batch, tiny_vit

# A server that forks before autograd has threads: they would not survive a fork of the tests' own
# process. What is slow to import is imported once: an optimizer's first step brings
# `torch._dynamo`.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["npprune.api", "npprune.pipeline.run", "npprune.cli.app", "torch._dynamo"]
)

COUNTS = (6, 6, 1, 6, 6, 6, 6)  # images per class: 37
FEW = {"images_per_class": 1}  # 7 images, where one batch or two say as much


@dataclass
class World:
    """What the tests discover on; `events` are those of the latest run."""

    root: Path
    events: list[Event] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.root / "images"

    def discover(
        self, out: str | Path = "run", data: Any = None, command: str = "", **settings: Any
    ) -> Result:
        """A batch a shard, of 8 images: five shards."""
        self.events = []
        data = {"train": f"folder:{self.images}", **(data or {})}
        settings = {"topk": 2, "batch_size": 8, "shard_size": 8, **settings}
        return discover(
            ModelSection(name="auto", checkpoint=str(self.root / "w.safetensors"), num_heads=3),
            DataSection(**data),
            DiscoverSection(**settings),
            self.root / out,
            work=Work("cpu", emit=self.events.append, command=command),
        )

    def said(self, level: str) -> list[str]:
        return [e.message for e in self.events if e.level == level]

    def files(self, out: str = "run") -> dict[str, bytes]:
        """All files of the store, by name."""
        return {p.name: p.read_bytes() for p in sorted((self.root / out / "paths").iterdir())}

    def table(self, out: str = "run") -> PathTable:
        store = PathStore(self.root / out / "paths")
        return store.read_all(store.count())


def make_world(root: Path) -> World:
    tensors = {k: v.float().contiguous() for k, v in tiny_vit().state_dict().items()}
    save_file(tensors, root / "w.safetensors")
    rng = np.random.default_rng(0)
    for label, count in enumerate(COUNTS):
        folder = root / "images" / f"class_{label}"
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return World(root)


def discover_slowly(world: World, pause: float) -> None:
    """In a process of its own: discovery that rests before every batch."""
    _rest(pause)
    world.discover()


def run_rank(
    root: Path, args: list[str], rank: int, count: int, port: int, pause: float, dies: str
) -> None:
    """In a process of its own: the command line as torchrun starts it; texts go to files.

    dies: rank 1 is killed where it would call this function of `pipeline.prune.stage`.
    """
    _rest(pause)
    if dies and rank == 1:
        setattr(prune_stage, dies, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in values.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(root / f"out{rank}", "w")  # noqa: SIM115
    sys.stderr = open(root / f"err{rank}", "w")  # noqa: SIM115
    sys.argv = ["npprune", *args]
    code = 70
    try:
        app.main()
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rest(pause: float) -> None:
    find = stage.find_paths

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(pause)
        return find(*args, **kwargs)

    if pause:
        stage.find_paths = slow


def measure_peaks(scope: Scope, answer: Any) -> None:
    """In a process of its own: the GiB that a search of 12 images takes beyond one of 1."""
    torch.set_num_threads(1)
    view, images, labels = large_search()
    peaks = []
    for n in (1, 12):
        find_paths(view, images[:n], labels[:n], integral=Integral.of(scope))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    answer.put(peaks[1] - peaks[0])


def large_search() -> tuple[VitView, Tensor, Tensor]:
    """A network and 12 images whose activations are large beside everything else."""
    options = {"img_size": 160, "patch_size": 16, "embed_dim": 192, "depth": 2, "mlp_ratio": 4}
    images, labels = tiny_batch(4, size=160)
    view = make_view(tiny_vit(**options).float())
    return view, images.float().repeat(3, 1, 1, 1), labels.repeat(3)

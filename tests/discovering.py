"""A tiny network with a folder of tiny images, and discovery on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_vit

from npprune.pipeline.discover import discover
from npprune.pipeline.events import Event
from npprune.recipe import DataSection, DiscoverSection, ModelSection
from npprune.records import Result
from npprune.store.paths import PathStore, PathTable

COUNTS = (6, 6, 1, 6, 6, 6, 6)  # images per class: 37


@dataclass
class World:
    """What the tests discover on; `events` are those of the latest run."""

    root: Path
    events: list[Event] = field(default_factory=list)

    @property
    def images(self) -> Path:
        return self.root / "images"

    def discover(self, out: str | Path = "run", data: Any = None, **settings: Any) -> Result:
        """Batches of 4, shards of 8 images: five shards."""
        self.events = []
        data = {"train": f"folder:{self.images}", **(data or {})}
        settings = {"topk": 2, "batch_size": 4, "shard_size": 8, **settings}
        return discover(
            ModelSection(name="auto", checkpoint=str(self.root / "w.safetensors"), num_heads=3),
            DataSection(**data),
            DiscoverSection(**settings),
            self.root / out,
            device="cpu",
            emit=self.events.append,
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

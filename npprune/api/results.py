"""What the functions of the Python API give."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.errors import plural
from npprune.records import CheckpointConfig, HealSummary, Plan, Result
from npprune.store.path_store import PathStore, PathTable
from npprune.store.runs import RunFolder


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates of one image, of the pruned network and the dense one.

    `dense_params` and `dense_macs` are None where a folder was read without its dense network.
    """

    params: int
    macs: int
    dense_params: int | None = None
    dense_macs: int | None = None


@dataclass
class Pruned:
    """A pruned network, how it was chosen, and what it costs.

    Attributes:
        model: an ordinary `torch.nn.Module`; train it, move it, save it.
        plan: what stays of every block, and how that was chosen.
        config: what a checkpoint folder says of it: preprocessing, classes, where it is from.
        cost: parameters and MACs, beside the dense network's.
        dense: the network that it was pruned from, to be measured against; None where only the
            folder says where that is.
        folder: where it lies, if anywhere.
        healing: how it was trained, if it was.
    """

    model: nn.Module
    plan: Plan
    config: CheckpointConfig
    cost: Cost
    dense: nn.Module | None = field(default=None, repr=False)
    folder: Path | None = None
    healing: HealSummary | None = None
    weights: str = field(default="", repr=False)  # hash of those in the folder

    @property
    def predicted(self) -> dict[str, float]:
        """Top-1 that is to be expected, on calibration images that nothing was fitted on.

        `dense_top1` and `pruned_top1` in [0, 1], the expected `drop` with its 95 % interval
        (`drop_low`, `drop_high`), `divergence_nats` of the predictions, and how many `images` say
        so; empty where there were too few. Of a network without a classifier: `cosine` and
        `relative_error` of its features, and of its patch tokens `patch_cosine` and
        `patch_relative_error`, each with `_low` and `_high`.
        """
        return dict(self.config.prune.predicted) if self.config.prune is not None else {}

    @property
    def warnings(self) -> list[str]:
        """What was noticed while pruning."""
        return list(self.config.prune.warnings) if self.config.prune is not None else []

    def __repr__(self) -> str:
        c = self.cost

        def beside(value: int, dense: int | None) -> str:
            return f"{value:,}" + (f" of {dense:,} ({value / dense:.1%})" if dense else "")

        lines = [
            f"{type(self.model).__name__}, pruned from {self.config.source.architecture}",
            f"parameters: {beside(c.params, c.dense_params)}",
            f"MACs an image: {beside(c.macs, c.dense_macs)}",
            f"hidden units: {self.plan.kept_widths}",
        ]
        if "cosine" in (p := self.predicted):
            images = plural(int(p["images"]), "held-out image")
            lines.append(f"predicted cosine of features: {p['cosine']:.4f} on {images}")
        elif p:
            lines.append(
                f"predicted top-1: {100 * p['dense_top1']:.1f} -> {100 * p['pruned_top1']:.1f} % "
                f"on {plural(int(p['images']), 'held-out image')}"
            )
        return "\n".join(lines)


@dataclass(eq=False)
class Found:
    """The paths of many images, in the run folder that they lie in.

    A folder that was not asked for goes when this object does.

    Attributes:
        folder: the run folder, which `npprune.prune` and every command read.
        result: what the report shows: settings, frequencies, the paths of every class.
    """

    folder: Path
    result: Result
    images: Any = field(default=None, repr=False)
    temporary: InitVar[ExitStack | None] = None

    def __post_init__(self, temporary: ExitStack | None) -> None:
        if temporary is not None:
            weakref.finalize(self, temporary.close)

    @cached_property
    def _table(self) -> PathTable:
        run = RunFolder(self.folder)
        store = PathStore(run.paths_folder, run.read_manifest().settings_sha256)
        return store.read_all(store.count())

    @property
    def neurons(self) -> Tensor:
        """The path of every image: int64 [images, blocks, topk], best first."""
        return torch.from_numpy(self._table.neurons)

    @property
    def scores(self) -> Tensor:
        """The joint attribution score of every path: float64 [images]."""
        return torch.from_numpy(self._table.scores)

    @property
    def labels(self) -> Tensor:
        """The class of every image: int64 [images], ascending where images have positions."""
        return torch.from_numpy(self._table.labels)

    @property
    def ids(self) -> list[str]:
        """What the images are called: a file's path, or the position in what was given."""
        return [str(name) for name in self._table.ids]

    @property
    def class_paths(self) -> dict[int, list[list[int]]]:
        """Of every class, the most frequent neurons of each block: lists by block, then by rank."""
        found = self.result.discovery
        return {} if found is None else dict(found.class_paths)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        found = self.result.discovery
        assert found is not None
        return (
            f"{plural(found.images, 'path')} of {plural(found.classes, 'class', 'classes')}, "
            f"{plural(found.topk, 'neuron')} a block ({found.method}), in {self.folder}"
        )

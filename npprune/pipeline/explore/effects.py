"""What a class loses without its path, and keeps with nothing else; beside a random path.

Every image is measured with a path that it had no vote in: that of the other half of its class's
images. Edits are those of the paper, at the scope's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npprune.core import metrics
from npprune.core.attribution.editing import (
    Factors,
    edited_logits,
    members,
    path_factors,
    stack,
)
from npprune.core.attribution.votes import class_top
from npprune.core.view import Scope, VitView
from npprune.pipeline.discover.finished import divide
from npprune.store.path_store import PathTable
from npprune.words import Edit

CACHED = 512  # classes' factors kept at a time
EDITS: tuple[Edit, ...] = ("remove", "keep")
RANDOM = "random"
Outcome = tuple[float, bool]  # probability of the true class, and whether it is the prediction


class Effects:
    """Measures edits batch by batch, and sums them up by class."""

    def __init__(
        self,
        view: VitView,
        tables: dict[str, PathTable],
        topk: int,
        scope: Scope,
        seed: int,
    ) -> None:
        self.view, self.tables, self.topk, self.scope, self.seed = view, tables, topk, scope, seed
        first = next(iter(tables.values()))
        take, hold, alone = divide(first)
        self.halves = {**dict.fromkeys(take.tolist(), 0), **dict.fromkeys(hold.tolist(), 1)}
        self.voters = (take, hold)
        self.alone = set(alone)
        self.outcomes: dict[str, dict[Edit | str, dict[int, Outcome]]] = {
            name: {edit: {} for edit in EDITS} for name in (*tables, RANDOM)
        }
        self._class_masks = lru_cache(maxsize=CACHED)(self._masks)

    def add(self, rows: Sequence[int], images: Tensor, labels: Tensor) -> None:
        """Measure the images of some rows of the tables, [b, 3, H, W], with their labels [b]."""
        held = [i for i, y in enumerate(labels.tolist()) if y not in self.alone]
        if not held:
            return
        rows, images, labels = [rows[i] for i in held], images[held], labels[held]
        for name, outcomes in self.outcomes.items():
            masks = [self._of(name, r, y) for r, y in zip(rows, labels.tolist(), strict=True)]
            for edit in EDITS:
                factors: Factors = stack([path_factors(m, edit) for m in masks])
                logits = edited_logits(self.view, images, factors, scope=self.scope).float().cpu()
                p = metrics.true_probability(logits, labels).tolist()
                right = (logits.argmax(1) == labels).tolist()
                outcomes[edit].update(zip(rows, zip(p, right, strict=True), strict=True))

    def of_class(self, rows: Sequence[int], dense: dict[int, Outcome]) -> dict[str, Any] | None:
        """The sums of a class whose images are `rows`: None where nothing was measured.

        Probabilities and their falls come as [mean, low, high], the ends None for one image.
        """
        own = self.outcomes[next(iter(self.tables))]["remove"]
        rows = [r for r in rows if r in own]
        if not rows:
            return None
        found: dict[str, Any] = {"n": len(rows), "dense": _summed([dense[r] for r in rows])}
        for name, outcomes in self.outcomes.items():
            found[name] = {}
            for edit in EDITS:
                after = [outcomes[edit][r] for r in rows]
                change = [p - dense[r][0] for r, (p, _) in zip(rows, after, strict=True)]
                found[name][edit] = {**_summed(after), "change": interval(change)}
        return found

    def _of(self, name: str, row: int, label: int) -> list[Tensor]:
        other = 1 - self.halves[row]
        if name != RANDOM:
            return self._class_masks(name, label, other)
        sizes = [int(m.sum()) for m in self._class_masks(next(iter(self.tables)), label, other)]
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        drawn = [
            torch.randperm(h, generator=g)[:k].tolist()
            for h, k in zip(self.view.widths, sizes, strict=True)
        ]
        return members(drawn, self.view.widths)

    def _masks(self, name: str, label: int, half: int) -> list[Tensor]:
        table, voters = self.tables[name], self.voters[half]
        chosen = class_top(table.neurons[voters], table.labels[voters], label, self.topk)
        return members(chosen, self.view.widths)


def interval(values: Sequence[float]) -> list[float | None]:
    """[mean, low, high]: a mean with its 95 % interval by Student's t; no ends for one value."""
    from scipy.stats import t

    x = np.asarray(values, np.float64)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return [mean, None, None]
    half = float(t.ppf(0.975, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
    return [mean, mean - half, mean + half]


def _summed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    mean, low, high = interval([p for p, _ in outcomes])
    ends = (None, None) if low is None or high is None else (max(0.0, low), min(1.0, high))
    return {"p": [mean, *ends], "right": sum(right for _, right in outcomes)}

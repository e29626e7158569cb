"""One pass over a run's images: pictures, activations, predictions, edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npprune.core.attribution.ablation import ablated_logits
from npprune.core.tokens import Tokens
from npprune.core.view import HiddenEdit, Scope
from npprune.data.loading import Batch
from npprune.export.onnx import to_pixels
from npprune.models.view import TimmView
from npprune.models.writing import written
from npprune.pipeline.common.inputs import Images
from npprune.pipeline.common.work import Work
from npprune.pipeline.explore.effects import Effects, Outcome
from npprune.pipeline.explore.exemplars import Exemplars, each_lit
from npprune.pipeline.explore.site import Site
from npprune.store.path_store import PathTable

TOP = 5  # classes shown of a prediction
RANKS = 5  # neurons of a block, of an image's own path, that are shown in its picture
EXEMPLARS = 9
LENS_IMAGES = 8


@dataclass
class Pruned:
    """The smaller network, and which class of the dense one each of its outputs is."""

    model: nn.Module
    outputs: list[int] | None = None


@dataclass
class Seen:
    """What the pass found, by row of the path table."""

    grid: tuple[int, int] | None = None  # patches down and across; None: they merge, or are none
    dense: dict[int, list[list[float]]] = field(default_factory=dict)  # [class, p], best first
    pruned: dict[int, list[list[float]]] = field(default_factory=dict)
    true: dict[int, Outcome] = field(default_factory=dict)
    true_pruned: dict[int, float | None] = field(default_factory=dict)
    ablated: dict[int, list[list[float]]] = field(default_factory=dict)  # true class's p, [L][K]
    maps: dict[int, list[list[str]]] = field(default_factory=dict)  # own path's neurons, [L][K]
    values: dict[int, list[list[float]]] = field(default_factory=dict)  # the same at the scope
    exemplars: list[Exemplars] = field(default_factory=list)  # of each block
    streams: list[Tensor] = field(default_factory=list)  # final ones of a few images


class Pass:
    """Reads the images of a run once.

    neurons: per block, those that exemplars are kept of. ablate: rows whose neurons are removed
    one at a time.
    """

    def __init__(
        self,
        view: TimmView,
        table: PathTable,
        neurons: list[list[int]],
        scope: Scope,
        *,
        pruned: Pruned | None,
        effects: Effects,
        ablate: set[int],
        site: Site,
        work: Work,
    ) -> None:
        self.view, self.table, self.scope = view, table, scope
        self.neurons = [torch.tensor(units, dtype=torch.int64) for units in neurons]
        self.pruned, self.effects, self.ablate = pruned, effects, ablate
        self.site, self.work = site, work
        self.seen = Seen()
        self.ranks = min(RANKS, table.neurons.shape[2])
        self.writes = [written(view, l) for l in range(len(view.widths))]

    def read(self, images: Images, rows: dict[int, int]) -> Seen:
        """Read the images at some positions of the source: position -> row of the table."""
        done = 0
        lens = spread(list(rows.values()), LENS_IMAGES)
        for batch, of in _batches(images, rows):
            self._add(batch, of, images, lens)
            done += len(of)
            self.work.progress(done, len(rows))
        return self.seen

    def _add(self, batch: Batch, rows: list[int], images: Images, lens: set[int]) -> None:
        x = batch.images.to(self.work.where)
        labels = torch.from_numpy(self.table.labels[rows])
        for row, image in zip(rows, to_pixels(batch.images, images.preprocessing), strict=True):
            self.site.picture(row, image.squeeze(-1).numpy())
        stream, hidden, own = self._run(x, rows)
        with torch.no_grad():
            logits = self.view.head(stream)
        self._activations(rows, hidden, own, x)
        self._predictions(rows, labels, logits, x)
        self.effects.add(rows, x, labels)
        for i, row in enumerate(rows):
            if row in lens and isinstance(stream, Tensor):
                self.seen.streams.append(stream[i])
            if row in self.ablate and not self.view.merges:
                path = torch.from_numpy(self.table.neurons[row, :, : self.ranks])[None]
                out = ablated_logits(
                    self.view, x[i : i + 1], path, scope=self.scope, writes=self.writes
                )[0]
                p = out.double().softmax(-1)[..., int(labels[i])]
                self.seen.ablated[row] = p.cpu().tolist()

    @torch.no_grad()
    def _run(
        self, x: Tensor, rows: Sequence[int]
    ) -> tuple[Tensor | Tokens, list[Tensor], list[Tensor]]:
        """The final stream, and activations of the chosen neurons [b, t, n] and of the images' own
        [b, t, K] in each block."""
        paths = torch.from_numpy(self.table.neurons[list(rows), :, : self.ranks]).to(x.device)
        hidden: list[Tensor] = []
        own: list[Tensor] = []

        def reading(l: int) -> HiddenEdit:
            def read(h: Tensor) -> Tensor:
                hidden.append(h[..., self.neurons[l].to(h.device)].float().cpu())
                index = paths[:, l, None].expand(-1, h.shape[1], -1)
                own.append(h.gather(2, index).float().cpu())
                return h

            return read

        stream: Any = self.view.embed(x)
        for l in range(len(self.view.widths)):
            stream = self.view.block(l, stream, edit=reading(l))
        return stream, hidden, own

    def _activations(
        self, rows: list[int], hidden: list[Tensor], own: list[Tensor], x: Tensor
    ) -> None:
        prefix, tokens = self.view.num_prefix_tokens, self.view.tokens(self.scope)
        seen = self.seen
        if not seen.exemplars:
            counts = {h.shape[1] for h in hidden}
            seen.grid = _grid(counts.pop() - prefix, x) if len(counts) == 1 else None
            patches = seen.grid[0] * seen.grid[1] if seen.grid else 0
            seen.exemplars = [Exemplars(len(n), EXEMPLARS, patches) for n in self.neurons]
        patch = slice(prefix, None) if seen.grid else slice(0)
        for kept, h in zip(seen.exemplars, hidden, strict=True):
            kept.add(rows, h[:, tokens].mean(1), h[:, patch])
        means = torch.stack([h[:, tokens].mean(1) for h in own], 1).tolist()  # [b, L, K]
        seen.values.update(zip(rows, means, strict=True))
        if seen.grid:
            maps = torch.stack([h[:, patch].transpose(1, 2) for h in own], 1)  # [b, L, K, p]
            texts = [text for (text,) in each_lit(maps.reshape(-1, 1, maps.shape[-1]))]
            per = self.ranks
            blocks = [texts[i : i + per] for i in range(0, len(texts), per)]
            count = len(self.neurons)
            for i, row in enumerate(rows):
                seen.maps[row] = blocks[i * count : (i + 1) * count]

    def _predictions(self, rows: list[int], labels: Tensor, logits: Tensor, x: Tensor) -> None:
        p = logits.double().softmax(1).cpu()
        right = p.argmax(1) == labels
        for i, row in enumerate(rows):
            self.seen.dense[row] = _best(p[i])
            self.seen.true[row] = (float(p[i, labels[i]]), bool(right[i]))
        if self.pruned is None:
            return
        with torch.no_grad():
            q = self.pruned.model(x).double().softmax(1).cpu()
        outputs = self.pruned.outputs
        for i, row in enumerate(rows):
            label = int(labels[i])
            at = label if outputs is None else outputs.index(label) if label in outputs else None
            best = _best(q[i])
            names = best if outputs is None else [[outputs[int(c)], v] for c, v in best]
            self.seen.pruned[row] = names
            self.seen.true_pruned[row] = None if at is None else float(q[i, at])


def _batches(images: Images, rows: dict[int, int]) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of the wanted images, with their rows."""
    if images.source.items is not None:
        for batch in images.batches(indices=sorted(rows)):
            yield batch, [rows[p] for p in batch.positions]
        return
    for batch in images.batches():
        keep = [i for i, p in enumerate(batch.positions) if p in rows]
        if keep:
            positions = [batch.positions[i] for i in keep]
            ids = [batch.ids[i] for i in keep]
            cut = Batch(batch.images[keep], batch.labels[keep], ids, positions)
            yield cut, [rows[p] for p in positions]


def _grid(patches: int, x: Tensor) -> tuple[int, int] | None:
    """Patches down and across of images [b, c, h, w]; None where they form no such grid."""
    height, width = x.shape[2:]
    down = round((patches * height / width) ** 0.5)
    return (down, patches // down) if down and patches % down == 0 else None


def _best(p: Tensor) -> list[list[float]]:
    values, index = p.sort(descending=True, stable=True)
    n = min(TOP, len(p))
    return [[int(c), float(v)] for c, v in zip(index[:n], values[:n], strict=True)]


def spread(rows: list[int], count: int) -> set[int]:
    """So many of the rows, evenly spaced."""
    at = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return {rows[i] for i in at.tolist()}

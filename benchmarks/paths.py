"""Which neurons are worth keeping first: paths of every kind, against the criterion alone.

    python benchmarks/paths.py --checkpoint W.safetensors --train folder:imagenet/train \
        --val folder:imagenet/val --squash --out paths.json
    python benchmarks/paths.py --checkpoint W.safetensors --train folder:tiny-imagenet/train \
        --val folder:tiny-imagenet/val --draws 5:0 20:0 20:1 --out paths.json
    python benchmarks/paths.py --checkpoint W.safetensors --train folder:imagenet/train \
        --val folder:imagenet/val --squash --side cls --keep 0.5 0.25 0.125 --out cls.json
    python benchmarks/paths.py --table paths.json

`--draws N:SEED` draws N of the images' classes at random. The criterion and measured harm settle
the widths. At these the neurons that a candidate ranks first take a share of each block's kept
units, the criterion's the rest; everything is refitted by least squares, one block at a time, and
compared with the criterion alone on the same validation images. With `--side cls` only the class
token loses units, the same number in every block, and the patches keep theirs: which units does it
need? Parts already in the file are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import npprune
from npprune.core.attribution.votes import class_votes
from npprune.core.compression.harm import Replacement, least_squares, predict
from npprune.core.compression.selection import keep_sets
from npprune.core.compression.statistics import collect_statistics
from npprune.core.metrics import divergence, mean_interval
from npprune.models.info import model_sizes
from npprune.pipeline.common.inputs import Images, open_images
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.measuring import Measured, PlanSettings, Subject, measure, prepared
from npprune.pipeline.prune.opening import calibration_images, open_source
from npprune.pipeline.prune.planning import amount, choose
from npprune.recipe import DataSection, ModelSection, PruneSection

SHARES = (0.25, 0.5, 1.0)  # of a block's kept units, for those that a candidate ranks first
SEARCHES: dict[str, dict[str, Any]] = {
    "path, class token, K = 1": {"topk": 1, "scope": "cls"},
    "path, class token, K = 10": {"topk": 10, "scope": "cls"},
    "path, class token, K = 5": {"topk": 5, "scope": "cls"},
    "path, class token, K = 5, last": {"topk": 5, "scope": "cls", "accumulation": "last"},
    "path, patches, K = 5": {"topk": 5, "scope": "patch"},
    "path, all tokens, K = 5": {"topk": 5, "scope": "all"},
    "knowledge neurons, class token, K = 5": {
        "topk": 5, "scope": "cls", "method": "knowledge-neuron",
    },
    "activation, class token, K = 5": {"topk": 5, "scope": "cls", "method": "activation"},
    "knowledge neurons, all tokens, K = 5": {
        "topk": 5, "scope": "all", "method": "knowledge-neuron",
    },
    "activation, all tokens, K = 5": {"topk": 5, "scope": "all", "method": "activation"},
}  # fmt: skip
MEAN, WORST, CHANCE = "harm, mean over classes", "harm, worst class", "at random"
CANDIDATES = (*SEARCHES, MEAN, WORST, CHANCE)
OF_CLS = (*(name for name in SEARCHES if "class token" in name), CHANCE)
Votes = list[Tensor]  # [h] per block, the highest first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", help="images to find paths and to calibrate on")
    parser.add_argument("--val", help="images to evaluate on")
    parser.add_argument("--squash", action="store_true", help="resize those without a crop")
    parser.add_argument("--draws", nargs="+", default=["all"], metavar="N:SEED", help="of classes")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.35])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of what is kept")
    parser.add_argument("--side", choices=["all", "cls"], default="all", help="who loses units")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES)
    parser.add_argument("--images-per-class", type=int, default=5, help="to find paths on")
    parser.add_argument("--path-images", type=int, help="at most so many of these in all")
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--val-images", type=int, help="at most so many to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("paths.json"))
    parser.add_argument("--table", type=Path, metavar="JSON")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_text()))))
        return
    args.candidates = args.candidates or (OF_CLS if args.side == "cls" else CANDIDATES)
    found = json.loads(args.out.read_text()) if args.out.exists() else []
    for draw in args.draws:
        done = [(p["candidate"], p["keep"]) for p in found if p["draw"] == draw]
        if all((c, k) in done for c in args.candidates for k in args.keep):
            continue
        world = World(args, draw)
        for candidate in args.candidates:
            if all((candidate, k) in done for k in args.keep):
                continue
            votes = world.votes(candidate)
            for point in world.points(candidate, votes):
                found.append(point)
                print(json.dumps(point), flush=True)
            args.out.write_text(json.dumps(found, indent=1))


class World:
    """The network on a draw of classes, its images, and what calibration says of it."""

    def __init__(self, args: argparse.Namespace, draw: str) -> None:
        self.args, self.draw, self.work = args, draw, Work().on("paths")
        model = ModelSection(name=args.model, checkpoint=args.checkpoint)
        data = DataSection(calibration=args.train, classes=self._drawn(model))
        self.opened = open_source(model, data, None, self.work)
        self.view = self.opened.view
        fit, held = calibration_images(self.opened.images, args.calibration_images, self.work)
        self.fit = fit
        dense = self.opened.network.model
        subject = Subject(self.view, fit.images, lambda: model_sizes(dense), held.images)
        asked = PlanSettings(axes=("mlp", "cls") if args.side == "cls" else ("mlp",))
        self.measured: Measured = measure(subject, asked, self.work)
        if args.side == "all":
            self.measured = prepared(self.measured, asked, self.work)
        crop = {"crop_mode": "squash", "crop_pct": 1.0} if args.squash else {}
        self.images, labels = _decoded(self._open(args.val, data, crop), args.val_images)
        self.labels = self._restricted(labels)
        self.dense = predict(self.view, self.images.split(25))
        self.kept = {share: self._criterion(share) for share in args.keep}

    def _drawn(self, model: ModelSection) -> str | None:
        """Classes of the draw, as a list of indices; None: all."""
        if self.draw == "all":
            return None
        count, seed = map(int, self.draw.split(":"))
        everything = open_source(model, DataSection(calibration=self.args.train), None, self.work)
        assert everything.images.source.items is not None
        there = sorted({item.label for item in everything.images.source.items})
        return ",".join(map(str, sorted(random.Random(seed).sample(there, count))))

    def _open(self, source: str, data: DataSection, crop: dict[str, Any]) -> Images:
        section = DataSection(val=source, classes=data.classes, **crop)
        info = self.opened.network.info
        return open_images(source, section, info, self.work, asked="data.val", on_bad="error")

    def _restricted(self, labels: Tensor) -> Tensor:
        """Labels among the outputs that the network keeps."""
        outputs = self.opened.outputs
        if outputs is None:
            return labels
        place = {c: i for i, c in enumerate(outputs)}
        return torch.tensor([place[int(c)] for c in labels])

    def _criterion(self, share: float) -> tuple[list[int], Tensor]:
        """Widths that measured harm settles, and the logits of the criterion alone."""
        if self.args.side == "cls":
            widths = [max(1, int(share * h)) for h in self.view.widths]
            return widths, self._logits(widths, None, 0.0)
        asked = PlanSettings.of(PruneSection(keep=share))
        budget = amount(self.measured, asked)
        assert budget is not None
        widths = choose(self.measured, asked, budget).selection.widths
        return widths, self._logits(widths, None, 0.0)

    def _logits(self, widths: list[int], votes: Votes | None, share: float) -> Tensor:
        """Of the pruned network on the validation images."""
        own = self.measured.own
        units = self.measured.hidden if own is None else own.own
        scores = units.ranking.scores
        first: list[list[int]] = [[] for _ in widths]
        if votes is not None:
            first = [_first(v, int(share * w)) for v, w in zip(votes, widths, strict=True)]
        keep = keep_sets(scores, widths, first)[0]
        layers: dict[int, Replacement] = {}
        for l, kept in enumerate(keep):
            if own is not None:
                layers[l] = own.least_squares(l, range(self.view.widths[l]), kept)
            elif len(kept) < self.view.widths[l]:
                layers[l] = least_squares(self.view.fc2(l), units.moments(l), kept)
        return predict(self.view, self.images.split(25), layers)

    # ------------------------------------------------------------ candidates

    def votes(self, candidate: str) -> Votes:
        """How a candidate ranks every block's neurons; 0 where it does not name them."""
        if candidate == CHANCE:
            generator = torch.Generator().manual_seed(0)
            return [torch.rand(h, generator=generator) for h in self.view.widths]
        if candidate in (MEAN, WORST):
            by_class = torch.stack([self._harm_of(x) for x in self._by_class()])  # [c, l, h]
            shared = by_class / by_class.sum(-1, keepdim=True)  # every class's harm sums to 1
            return list(shared.mean(0) if candidate == MEAN else shared.amax(0))
        images, labels = self._few()
        paths = npprune.discover(
            self.opened.network.model, (images, labels), progress=False, **SEARCHES[candidate]
        )
        votes = [torch.zeros(h, dtype=torch.float64) for h in self.view.widths]
        for c in sorted(set(labels.tolist())):
            found = class_votes(paths.neurons, paths.labels, c, self.view.widths)
            for total, v in zip(votes, found, strict=True):
                total += torch.from_numpy(v) / int((labels == c).sum())
        return votes

    def _by_class(self) -> Iterator[Tensor]:
        images, labels = torch.cat(self.fit.images), torch.cat(self.fit.labels)
        for c in sorted(set(labels.tolist())):
            yield images[labels == c]

    def _few(self) -> tuple[Tensor, Tensor]:
        """The first images of every class, to find paths on."""
        images, labels = torch.cat(self.fit.images), torch.cat(self.fit.labels)
        seen: dict[int, int] = {}
        chosen = []
        for i, c in enumerate(labels.tolist()):
            seen[c] = seen.get(c, 0) + 1
            if seen[c] <= self.args.images_per_class:
                chosen.append(i)
        limit = min(len(chosen), self.args.path_images or len(chosen))
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
        return images[chosen], labels[chosen]

    def _harm_of(self, images: Tensor) -> Tensor:
        """[l, h]: what replacing each unit by its mean over all classes costs one class, to second
        order: E_c[(a - mean)^2] w^T G_c w, with G_c the curvature at the block's output."""
        needs: set[Any] = {"moments", "curvature"}
        generator = torch.Generator().manual_seed(0)
        sums = collect_statistics(self.view, images.split(25), needs=needs, generator=generator)
        rows = []
        for l, width in enumerate(self.view.widths):
            m, mean = sums.moments(l), self.measured.hidden.moments(l).mean
            w = self.view.fc2(l).weight.detach().double()
            spread = m.variance + (m.mean - mean) ** 2
            rows.append(spread * torch.einsum("dh,de,eh->h", w, sums.curvature(l), w))
            assert rows[-1].shape == (width,)
        return torch.stack(rows)

    # ------------------------------------------------------------ points

    def points(self, candidate: str, votes: Votes) -> Iterator[dict[str, Any]]:
        """What each share costs or gains, compared with the criterion alone."""
        named = [int((v > 0).sum()) for v in votes]
        for keep, (widths, alone) in self.kept.items():
            for share in self.args.shares:
                logits = self._logits(widths, votes, share)
                yield {
                    "draw": self.draw,
                    "keep": keep,
                    "candidate": candidate,
                    "share": share,
                    "named": sum(named),
                    "dense": self._top1(self.dense),
                    "alone": self._top1(alone),
                    "top1": self._top1(logits),
                    "nats": float(divergence(self.dense, logits).mean()),
                    **self._paired("top1_change", self._right(logits) - self._right(alone)),
                    **self._paired("nats_change", self._nats(logits) - self._nats(alone)),
                }

    def _right(self, logits: Tensor) -> Tensor:
        return (logits.argmax(1) == self.labels).double()

    def _top1(self, logits: Tensor) -> float:
        return float(self._right(logits).mean())

    def _nats(self, logits: Tensor) -> Tensor:
        return divergence(self.dense, logits)

    @staticmethod
    def _paired(name: str, change: Tensor) -> dict[str, list[float]]:
        found = mean_interval(change)
        return {name: [found.value, found.low, found.high]}


def _first(votes: Tensor, count: int) -> list[int]:
    """The best of those that are named."""
    ranked = sorted(range(len(votes)), key=lambda j: (-float(votes[j]), j))
    return sorted(j for j in ranked[:count] if votes[j] > 0)


def _decoded(images: Images, limit: int | None) -> tuple[Tensor, Tensor]:
    """Images and labels, `limit` of them evenly over the source."""
    items = images.source.items
    indices = None
    if limit and items is not None and len(items) > limit:
        indices = [i * len(items) // limit for i in range(limit)]
    batches = list(images.batches(indices=indices))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def table(points: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: per draw and candidate, the change of top-1 in points and of nats, by share."""
    for draw, keep in dict.fromkeys((p["draw"], p["keep"]) for p in points):
        rows = [p for p in points if (p["draw"], p["keep"]) == (draw, keep)]
        yield (
            f"\n{draw}, {keep:g} kept: dense {100 * rows[0]['dense']:.1f}, "
            f"criterion alone {100 * rows[0]['alone']:.1f}\n"
        )
        shares = sorted({p["share"] for p in rows})
        yield "| kept first | " + " | ".join(f"{100 * s:g} % of the kept" for s in shares) + " |"
        yield "| --- |" + " --- |" * len(shares)
        for name in dict.fromkeys(p["candidate"] for p in rows):
            cells = {p["share"]: _cell(p) for p in rows if p["candidate"] == name}
            yield f"| {name} | " + " | ".join(cells.get(s, "") for s in shares) + " |"


def _cell(p: dict[str, Any]) -> str:
    change, low, high = (100 * x for x in p["top1_change"])
    return f"{change:+.1f} ({low:+.1f} to {high:+.1f}); {p['nats_change'][0]:+.3f} nats"


if __name__ == "__main__":
    main()

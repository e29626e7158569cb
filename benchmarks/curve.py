"""Top-1 against MACs and measured latency: each axis alone, all together, rivals' recipes, healed.

    python benchmarks/curve.py --checkpoint W.safetensors --train folder:imagenet/train \
        --val folder:imagenet/val --squash --out curve.json
    python benchmarks/curve.py --draw curve.json docs/img/curve.svg

Calibration images are measured once; every point is planned, refitted and evaluated on its own, as
`npprune prune` and `npprune eval` do. Latency is ONNX Runtime's on one CPU thread, in turn with the
dense network's. Points already in the file are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from npprune.core.metrics import divergence
from npprune.errors import GateError
from npprune.models.info import count_macs, model_sizes
from npprune.pipeline.common.inputs import open_images
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.latency import DenseTimer
from npprune.pipeline.prune.measuring import Measured, PlanSettings, Subject, measure, prepared
from npprune.pipeline.prune.opening import calibration_images, open_source
from npprune.pipeline.prune.planning import amount, choose, refit
from npprune.pipeline.prune.stage import carried_out
from npprune.recipe import DataSection, ModelSection, PruneSection
from npprune.records import Plan

EVERY = ("mlp", "cls", "heads", "qk", "tokens")
SERIES: dict[str, dict[str, Any]] = {
    "all axes": {"axes": ("mlp", "heads", "qk", "tokens")},
    "all axes and cls": {"axes": EVERY},
    "tokens": {"axes": ("tokens",)},
    "hidden units": {"axes": ("mlp",)},
    "attention": {"axes": ("heads", "qk")},
    "variance, least squares, uniform": {
        "axes": ("mlp",),
        "criterion": "variance",
        "selection": "uniform",
        "compensation": "least-squares",
    },
}
SHARES = {
    "all axes": [0.35, 0.5, 0.25, 0.7, 0.3, 0.42, 0.6, 0.85],
    "all axes and cls": [0.35, 0.25, 0.5, 0.7],
    "tokens": [0.85, 0.7, 0.6, 0.5, 0.42],
    "hidden units": [0.85, 0.7, 0.6, 0.5],
    "attention": [0.85, 0.75],
    "variance, least squares, uniform": [0.85, 0.7, 0.6],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", help="calibration images, e.g. folder:imagenet/train")
    parser.add_argument("--val", help="images to evaluate on")
    parser.add_argument(
        "--squash", action="store_true", help="resize them straight, without a crop"
    )
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=list(SERIES))
    parser.add_argument("--latency", action="store_true", help="at batch sizes 1 and 16")
    parser.add_argument("--out", type=Path, default=Path("curve.json"))
    parser.add_argument("--draw", nargs=2, metavar=("JSON", "SVG"))
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(Path(args.draw[0]).read_text()), Path(args.draw[1]))
        return
    found = json.loads(args.out.read_text()) if args.out.exists() else []
    world = World(args)
    for name in args.series:
        for share in SHARES[name]:
            if any((p["series"], p["asked"]) == (name, share) for p in found):
                continue
            try:
                point = world.point(name, share)
            except GateError as err:
                print(f"{name} at {share}: {err.message}", flush=True)
                continue
            found.append(point)
            args.out.write_text(json.dumps(found, indent=1))
            print(json.dumps(point), flush=True)


class World:
    """The network, its images, and what calibration said of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work = Work().on("curve")
        model = ModelSection(name=args.model, checkpoint=args.checkpoint)
        self.opened = open_source(model, DataSection(calibration=args.train), None, self.work)
        fit, held = calibration_images(self.opened.images, None, self.work)
        dense = self.opened.network.model
        self.subject = Subject(
            self.opened.view, fit.images, lambda: model_sizes(dense), held.images
        )
        crop = {"crop_mode": "squash", "crop_pct": 1.0} if args.squash else {}
        data = DataSection(val=args.val, **crop)
        images = open_images(
            args.val, data, self.opened.network.info, self.work, asked="data.val", on_bad="error"
        )
        batches = list(images.batches())
        self.images = torch.cat([b.images for b in batches])
        self.labels = torch.cat([b.labels for b in batches])
        self.dense = self.predict(dense)
        self.size = images.preprocessing.input_size
        self.timers = [
            DenseTimer(dense, images.preprocessing, batch=b, threads=1)
            for b in ((1, 16) if args.latency else ())
        ]
        self.known: dict[tuple[Any, ...], Measured] = {}

    @torch.no_grad()
    def predict(self, model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([model(x).float() for x in self.images.split(25)])

    def measured(self, asked: PlanSettings) -> Measured:
        """What calibration says; of axes together, a part of what it says of all."""
        key = (asked.criterion, asked.selection, asked.compensation)
        if key not in self.known:
            whole = replace(asked, axes=EVERY if asked.selection == "measured" else asked.axes)
            found = prepared(measure(self.subject, whole, self.work), whole, self.work)
            self.known[key] = found
        found = self.known[key]
        harm = found.harm
        if harm is None:
            return found
        if not {"heads", "qk"} & set(asked.axes):
            found, harm = replace(found, further=[]), replace(harm, further=[])
        if "cls" not in asked.axes:
            found, harm = replace(found, own=None), replace(harm, own=None)
        if "tokens" not in asked.axes:
            harm = replace(harm, schedules=harm.schedules[:1])
        if "mlp" not in asked.axes:
            ranking = replace(found.hidden.ranking, min_keep=max(self.opened.view.widths))
            found = replace(found, hidden=replace(found.hidden, ranking=ranking))
        return replace(found, harm=harm)

    def point(self, name: str, share: float) -> dict[str, Any]:
        start = time.perf_counter()
        section = PruneSection(target_macs=share)
        asked = replace(PlanSettings.of(section), **SERIES[name])
        measured = self.measured(asked)
        budget = amount(measured, asked)
        assert budget is not None
        chosen = refit(measured, asked, choose(measured, asked, budget), self.work)
        dense = self.opened.network.model
        plan = Plan(chosen.keep, list(self.opened.view.widths), **chosen.fields())
        smaller = carried_out(self.opened.network, plan, chosen)
        logits = self.predict(smaller)
        right = logits.argmax(1) == self.labels
        return {
            "series": name,
            "asked": share,
            "macs": count_macs(smaller, self.size) / count_macs(dense, self.size),
            "top1": float(right.double().mean()),
            "dense": float((self.dense.argmax(1) == self.labels).double().mean()),
            "nats": float(divergence(self.dense, logits).mean()),
            "merged": chosen.merged,
            "widths": plan.kept_widths,
            "axes": chosen.details.get("axes"),
            "latency": {t.batch: t.against(smaller).ratio for t in self.timers},
            "seconds": round(time.perf_counter() - start, 1),
        }


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """The picture of the curve; rivals in grey."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(p["series"] for p in points))
    timed = any(p["latency"] for p in points)
    figure, panels = plt.subplots(1, 1 + timed, figsize=(5 + 4.2 * timed, 4), sharey=True)
    panels = [panels] if not timed else list(panels)
    readings = [("MACs", lambda p: p["macs"])]
    if timed:
        readings.append(("latency in ONNX Runtime, batch 16", lambda p: p["latency"].get("16")))
    for panel, (label, read) in zip(panels, readings, strict=True):
        for i, name in enumerate(names):
            mine = sorted(
                (read(p), 100 * p["top1"]) for p in points if p["series"] == name and read(p)
            )
            mine.append((1.0, 100 * points[0]["dense"]))
            rival = name.startswith("variance")
            panel.plot(
                *zip(*mine, strict=True),
                marker="o", markersize=3.5, linewidth=2.2 if i == 0 else 1.3,
                color="0.55" if rival else f"C{i}", linestyle="--" if rival else "-", label=name,
            )  # fmt: skip
        panel.set_xlabel(f"{label}, share of the dense network")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("top-1, %")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""What merging tokens costs and saves: top-1, divergence, MACs and latency of schedules.

    python benchmarks/tokens.py --checkpoint W.safetensors --data folder:imagenet/val --squash
    python benchmarks/tokens.py --checkpoint ... --merged 13 16 0,40,0,40,0,40,0,20,0,10,0,0
    python benchmarks/tokens.py --img-size 384 --latency      # random weights: for the times only

A schedule is tokens merged in each block: one number (in every block but the last) or one a block.
Where the classifier reads few tokens, the network measured computes those alone in its last block,
which changes no logit; its MACs stand beside those with all of the last block computed. MACs are
counted by running the network on shapes (torch's counter), merging included. Latency is ONNX
Runtime's on one CPU thread, in turn with the dense network's. Nothing is trained or fitted.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.compression.token_harm import measure_token_harm
from npprune.core.metrics import divergence
from npprune.data.loading import batches
from npprune.data.opening import open_source
from npprune.data.transforms import make_transform
from npprune.export.bench import bench_pair, onnx_runner
from npprune.export.onnx import export_onnx
from npprune.models.info import count_macs, model_preprocessing
from npprune.models.load import create, load
from npprune.models.tokens import apply_tokens
from npprune.models.view import classifiers, make_view
from npprune.records import Preprocessing

SCHEDULES = ["0", "8", "11", "13", "15", "16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", help="e.g. folder:imagenet/val; without: no accuracy")
    parser.add_argument("--squash", action="store_true", help="resize straight, without a crop")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--merged", nargs="+", default=SCHEDULES, metavar="SCHEDULE")
    parser.add_argument(
        "--single", action="store_true", help="also the sum of nats of its blocks merging alone"
    )
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="for latency")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.checkpoint:
        dense = load(args.model, checkpoint=args.checkpoint, img_size=args.img_size).model
    else:
        dense = create(args.model, {"img_size": args.img_size} if args.img_size else {})
    pre = model_preprocessing(dense)
    if args.squash:
        pre = replace(pre, crop_mode="squash", crop_pct=1.0)
    outputs = classifiers(dense)[0].out_features
    images, labels = read(args.data, outputs, pre, args.images) if args.data else (None, None)
    reference = predict(dense, images) if images is not None else None
    whole = count_macs(dense, pre.input_size)
    print(f"{args.model}, {whole / 1e9:.4f} G MACs, torch {torch.__version__}\n")
    timed = [f" batch {b} |" for b in args.batches] if args.latency else []
    sums = [" sum of single blocks |"] if args.single else []
    print("| tokens merged | last block | MACs | top-1 | nats |" + "".join(sums + timed))
    print("| --- " * (5 + len(sums + timed)) + "|")
    read_alone = make_view(dense).tokens_read is not None
    with tempfile.TemporaryDirectory() as folder:
        dense_file = Path(folder) / "dense.onnx"
        if args.latency:
            export_onnx(dense, pre, [], dense_file)
        for name in args.merged:
            model = apply_tokens(copy.deepcopy(dense), schedule(name, dense))
            shares = {"all": count_macs(model, pre.input_size) / whole}
            if read_alone:
                apply_tokens(model, schedule(name, dense), last=True)
                shares["what is read"] = count_macs(model, pre.input_size) / whole
            cells = ["", ""]
            if reference is not None:
                logits = predict(model, images)
                top1 = float((logits.argmax(1) == labels).double().mean())
                nats = float(divergence(reference, logits).mean())
                cells = [f"{100 * top1:.2f}", f"{nats:.4f}"]
            if args.single:
                cells.append(f"{single(dense, images, reference, schedule(name, dense)):.4f}")
            if args.latency:
                cells += [f"{r:.3f}" for r in ratios(model, pre, dense_file, args.batches)]
            for last, share in shares.items():  # the same logits; times are the second's
                print(f"| {name} | {last} | {share:.3f} | " + " | ".join(cells) + " |", flush=True)


def read(spec: str, outputs: int, pre: Preprocessing, count: int) -> tuple[Tensor, Tensor]:
    """`count` images, evenly spread over the source."""
    source = open_source(spec, num_classes=outputs)
    assert source.items is not None
    chosen = torch.linspace(0, len(source.items) - 1, min(count, len(source.items))).long()
    found = list(batches(source, make_transform(pre), 50, indices=chosen.tolist()))
    return torch.cat([b.images for b in found]), torch.cat([b.labels for b in found])


def schedule(name: str, model: Any) -> list[int]:
    counts = [int(n) for n in name.split(",")]
    return counts if len(counts) > 1 else counts * (len(model.blocks) - 1) + [0]


def predict(model: nn.Module, images: Any, batch: int = 25) -> Tensor:
    return torch.cat([model(part) for part in images.split(batch)])


def single(model: Any, images: Any, reference: Any, merged: list[int]) -> float:
    """The nats of each block merging alone, added up."""
    options = [[r] for r in merged]
    parts = list(images.split(25))
    table = measure_token_harm(make_view(model), parts, options, reference=reference)
    return sum(row[r] for row, r in zip(table, merged, strict=True))


def ratios(model: nn.Module, pre: Preprocessing, dense_file: Path, sizes: list[int]) -> list[float]:
    """Time of the merging network over the dense one's, in ONNX Runtime, for each batch size."""
    path = dense_file.with_name("merging.onnx")
    export_onnx(model, pre, [], path)
    found = []
    for batch in sizes:
        runners = [onnx_runner(file, batch, threads=1) for file in (dense_file, path)]
        found.append(bench_pair(*runners, min_seconds=10.0).ratio)
    return found


if __name__ == "__main__":
    main()

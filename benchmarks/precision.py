"""What reduced precision and `torch.compile` bring to discovery on a GPU, and what they change.

    python benchmarks/precision.py --model vit_base_patch16_224 --images 128 --reference 4
    python benchmarks/precision.py --checkpoint W.safetensors --data folder:imagenet/train \
        --images 1000

The first line times noise in a network of random weights; agreement needs the second, a trained
network and images. All settings see the same images and take turns after a warm-up; a GPU is waited
for before the clock is read. `agreement` is the share of blocks whose neuron is float32's. With
--reference the released program's cost profile (see `discovery.py`) is timed as well, left-Riemann
with 20 points, in float32. Reading and decoding of images is not timed.
"""

from __future__ import annotations

import argparse
import os

import torch
from discovery import Search, default, load_inputs, ours, reference, timed
from torch import nn

from npprune.core.view import Scope
from npprune.models.view import make_view
from npprune.pipeline.common.device import products

VALIDATION = 50_000  # images of ImageNet's validation set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", help="e.g. folder:imagenet/train; without: noise")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scope", choices=["cls", "patch", "all"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--img-size", type=int)
    parser.add_argument(
        "--settings", default="fp32,fp32+compile,tf32,tf32+compile,bf16,bf16+compile"
    )
    parser.add_argument("--reference", type=int, metavar="IMAGES", help="time it on so many, too")
    args = parser.parse_args()
    loaded, images, labels = load_inputs(args)
    device = images.device
    scope: Scope = args.scope or loaded.scope
    names = args.settings.split(",")
    searches = {name: search_in(name, loaded.model, scope) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    paths: dict[str, torch.Tensor] = {}
    for name, search in searches.items():  # a warm-up, and what is compiled
        with products(name.partition("+")[0], device):
            timed(search, images[: args.batch], labels[: args.batch], args.batch)
    for _ in range(args.rounds):
        for name, search in searches.items():
            with products(name.partition("+")[0], device):
                seconds, paths[name] = timed(search, images, labels, args.batch)
            times[name].append(seconds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(
        f"{args.model}, scope {scope}, {len(images)} images, {args.batch} at a time, "
        f"{args.rounds} rounds, {where}, {os.cpu_count()} CPU cores, torch {torch.__version__}\n"
    )
    print("| setting | images/s (median) | range | agreement with fp32 | "
          f"hours for {VALIDATION:,} |")  # fmt: skip
    print("| --- | --- | --- | --- | --- |")
    if args.reference:
        few, known = images[: args.reference], labels[: args.reference]

        def released(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return reference(loaded, x, y, scope, "left-riemann", 20)

        with products("fp32", device):
            timed(released, few[:1], known[:1], 1)
            spent = [timed(released, few, known, len(few))[0] for _ in range(args.rounds)]
        row("reference, left-Riemann 20, fp32", spent, len(few), "")
    for name in names:
        same = (paths[name] == paths[names[0]]).float().mean()
        row(f"{default(scope)}, {name}", times[name], len(images), f"{100 * float(same):.2f} %")


def search_in(name: str, model: nn.Module, scope: Scope) -> Search:
    """The default search at a setting such as `bf16+compile`."""
    precision, _, compiled = name.partition("+")
    view = make_view(model, precision=precision, compiled=bool(compiled))  # type: ignore[arg-type]
    return ours(view, scope, "auto", None)


def row(name: str, spent: list[float], images: int, agreement: str) -> None:
    rates = sorted(images / s for s in spent)
    middle = rates[len(rates) // 2]
    print(
        f"| {name} | {middle:.1f} | {rates[0]:.1f}-{rates[-1]:.1f} | {agreement} | "
        f"{VALIDATION / middle / 3600:.2f} |"
    )


if __name__ == "__main__":
    main()

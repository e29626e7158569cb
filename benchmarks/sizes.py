"""The memory that pruning takes by the size of the network: computed, and measured on a few images.

    python benchmarks/sizes.py                                   # computed, in seconds
    python benchmarks/sizes.py --measure vit_small_patch16_224 --images 4

Networks are built on shapes alone; what is computed are the estimates by which the program itself
cuts its work: sums of statistics (`sums_bytes`), the matrices at work on one block, the
activations of an image that gradients go through. The streams of the refit are its four tensors
[images, tokens, width]. Passes are those over the calibration images with so much `--memory`.

--measure runs the statistics of a network with random weights on noise, and gives the memory that
they took above the loaded network next to the sum of the estimates.
"""

from __future__ import annotations

import argparse

import psutil
import torch

from npprune.core.compression.statistics import collect_statistics
from npprune.core.view import VitView
from npprune.criteria import Need
from npprune.models.load import create
from npprune.models.view import make_view
from npprune.pipeline.common.memory import bytes_of_an_image
from npprune.pipeline.prune.statistics_cache import WORK, sums_bytes

MODELS = {
    "ViT-Ti/16, 224": "vit_tiny_patch16_224",
    "ViT-S/16, 224": "vit_small_patch16_224",
    "ViT-B/16, 224": "vit_base_patch16_224",
    "ViT-B/16, 384": "vit_base_patch16_384",
    "ViT-L/16, 224": "vit_large_patch16_224",
    "ViT-L/16, 384": "vit_large_patch16_384",
    "ViT-H/14, 224": "vit_huge_patch14_224",
}
NEEDS: tuple[Need, ...] = ("moments", "salience", "gates", "curvature")
GIB = 2**30


def tokens_of(view: VitView) -> int:
    """Patches, and the tokens before them."""
    return int(view.model.patch_embed.num_patches) + view.num_prefix_tokens  # type: ignore[union-attr]


def row(name: str, model: str, images: int, memory: float) -> str:
    """A line of the table."""
    with torch.device("meta"):
        view = make_view(create(model, {"num_classes": 1000}))
    tokens = tokens_of(view)
    width, hidden = view.fc2(0).out_features, view.widths[0]
    weights = 4 * sum(p.numel() for p in view.model.parameters())
    sums = sum(sums_bytes(h, width, NEEDS) for h in view.widths)
    room = memory * GIB - WORK * 8 * hidden**2
    each = sums_bytes(hidden, width, NEEDS)
    depth = len(view.widths)
    passes = 1 if sums <= room else -(-depth // max(1, int(room // each)))
    grads = bytes_of_an_image(view, tokens)
    streams = 4 * 4 * images * tokens * width
    figures = (weights, sums, each, WORK * 8 * hidden**2, grads, streams)
    cells = " | ".join(f"{value / GIB:.2f}" for value in figures)
    return f"| {name} | {depth} | {width} | {hidden} | {tokens} | {cells} | {passes} |"


def measured(model: str, images: int) -> str:
    """Resident memory of the statistics above the network's."""
    torch.manual_seed(0)
    view = make_view(create(model, {"num_classes": 1000}).eval())
    side = view.model.patch_embed.img_size  # type: ignore[union-attr]
    x = torch.randn(images, 3, *side)  # type: ignore[misc]
    process = psutil.Process()
    before = process.memory_info().rss

    def peak() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    collect_statistics(view, [x], needs=NEEDS, generator=torch.Generator().manual_seed(0))
    most = peak() - before
    width = view.fc2(0).out_features
    sums = sum(sums_bytes(h, width, NEEDS) for h in view.widths)
    grads = images * bytes_of_an_image(view, tokens_of(view))
    return (
        f"{model}, {images} images: {most / GIB:.2f} GiB above the network; computed "
        f"{(sums + grads) / GIB:.2f} ({sums / GIB:.2f} of sums, {grads / GIB:.2f} of activations)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--images", type=int, help="of the refit, or measured [1000; 4]")
    parser.add_argument("--memory", type=float, default=12.0, metavar="GIB")
    args = parser.parse_args()
    if args.measure:
        print(measured(args.measure, args.images or 4))
        return
    images = args.images or 1000
    print(
        f"| network | blocks | width | hidden | tokens | weights, GiB | sums | of one block | "
        f"at work on a block | an image with gradients | refit, {images:,} images | "
        f"passes with {args.memory:g} GiB |"
    )
    print("|" + " --- |" * 12)
    for name, model in MODELS.items():
        print(row(name, model, images, args.memory))


if __name__ == "__main__":
    main()

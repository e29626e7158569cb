"""Discovery against the released program's way, timed in one run on the same model and images.

    python benchmarks/discovery.py --checkpoint W.safetensors --data folder:imagenet/train
    python benchmarks/discovery.py --checkpoint W.safetensors --data ... --scope patch
    python benchmarks/discovery.py --linear 50,400 --img-size 64    # time an image by their number

The reference reruns the whole network for every block, with all quadrature points and images as
one batch, and walks the graph back once for every layer of the path: the cost profile of the
paper's released program, written here from the formula. All settings see the same images, the same
threads, and take turns after a warm-up. `agreement` is the share of blocks whose neuron is that of
the converged integral (64 Gauss-Legendre points).

Without --data the images are noise, without --checkpoint the weights are random: for the times
only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from npprune.core.attribution.quadrature import Integral, quadrature
from npprune.core.attribution.search import clean_hidden, joint_attribution
from npprune.core.view import Scope, VitView, frozen
from npprune.data.loading import batches
from npprune.data.opening import open_source
from npprune.data.transforms import make_transform
from npprune.models.load import create, load
from npprune.models.view import make_view

Search = Callable[[Tensor, Tensor], Tensor]


def reference(
    view: VitView, images: Tensor, labels: Tensor, scope: Scope, rule: str, points: int
) -> Tensor:
    """One neuron a block: [b, L, 1]. Every block a full forward, every path layer a backward."""
    alphas, weights = (v.to(images) for v in quadrature(rule, points))  # type: ignore[arg-type]
    m, b, tokens = points, len(images), view.tokens(scope)
    scale = alphas.repeat_interleave(b)[:, None, None]
    rows = torch.arange(b)
    with frozen(view.model):
        w, _ = clean_hidden(view, images, scope)
        path: list[Tensor] = []
        for l in range(len(view.widths)):
            given = []
            for j, chosen in enumerate(path):
                h = w[j].repeat(m, 1, 1)
                index = chosen.repeat(m)[:, None, None].expand(-1, h.shape[1], 1)
                given.append(h.scatter(2, index, scale * h.gather(2, index)).requires_grad_())
            given.append((scale * w[l].repeat(m, 1, 1)).requires_grad_())
            x = view.embed(images).repeat(m, 1, 1)
            for j in range(len(view.widths)):
                edit = None
                if j <= l:

                    def edit(h: Tensor, value: Tensor = given[j]) -> Tensor:
                        h = h.clone()
                        h[:, tokens] = value
                        return h

                x = view.block(j, x, edit=edit)
            p = view.head(x).softmax(-1).gather(1, labels.repeat(m)[:, None]).sum()
            g_path, w_path = 0.0, 0.0
            for j, chosen in enumerate(path):
                (g,) = torch.autograd.grad(p, given[j], retain_graph=True)
                g = torch.einsum("m,mbsh->bsh", weights, g.unflatten(0, (m, b)))
                g_path = g_path + g[rows, :, chosen]
                w_path = w_path + w[j][rows, :, chosen]
            (g,) = torch.autograd.grad(p, given[l])
            g = torch.einsum("m,mbsh->bsh", weights, g.unflatten(0, (m, b)))
            if path:
                score = ((w_path[..., None] + w[l]) * (g_path[..., None] + g)).sum(1)
            else:
                score = (w[l] * g).sum(1)
            path.append(score.argmax(1))
    return torch.stack(path, 1)[..., None]


def ours(view: VitView, scope: Scope, rule: str, points: int | None) -> Search:
    integral = Integral.of(view.scope, scope, rule, points)  # type: ignore[arg-type]
    return lambda x, y: joint_attribution(view, x, y, integral).neurons


def settings(view: VitView, scope: Scope) -> dict[str, Search]:
    return {
        "reference, left-Riemann 20": lambda x, y: reference(view, x, y, scope, "left-riemann", 20),
        "npprune, left-Riemann 20": ours(view, scope, "left-riemann", 20),
        f"npprune, {default(scope)} (default)": ours(view, scope, "auto", None),
    }


def default(scope: Scope) -> str:
    integral = Integral.of(scope)
    points, first = integral.points_by("neuron-path")
    more = f", {first} in block 0" if first != points else ""
    return f"{integral.rule} {points}{more}"


def load_inputs(args: argparse.Namespace) -> tuple[VitView, Tensor, Tensor]:
    """The network, images and labels: random weights without --checkpoint, noise without --data."""
    if args.checkpoint is None:
        if args.data is not None:
            sys.exit("--data needs --checkpoint: random weights say nothing about real images")
        size_of = {} if args.img_size is None else {"img_size": args.img_size}
        model = create(args.model, {"num_classes": 1000, **size_of})
        shape, classes = (3, *model.patch_embed.img_size), 1000  # type: ignore[union-attr, misc]
    else:
        loaded = load(args.model, checkpoint=args.checkpoint, img_size=args.img_size)
        model, classes = loaded.model, loaded.info.num_classes
        shape = loaded.info.preprocessing.input_size
    if args.data is None:
        g = torch.Generator().manual_seed(0)
        images = torch.randn(args.images, *shape, generator=g)
        labels = torch.randint(0, classes, (args.images,), generator=g)
    else:
        source = open_source(args.data, num_classes=classes)
        assert source.items is not None
        step = max(1, len(source.items) // args.images)
        batch = next(
            batches(
                source, make_transform(loaded.info.preprocessing), args.images,
                indices=range(0, len(source.items), step)[: args.images],
            )
        )  # fmt: skip
        images, labels = batch.images, batch.labels
    view, device = make_view(model), torch.device(args.device)
    view.model.to(device)
    return view, images.to(device), labels.to(device)


def timed(search: Search, images: Tensor, labels: Tensor, batch: int) -> tuple[float, Tensor]:
    start = time.perf_counter()
    parts = [
        search(images[i : i + batch], labels[i : i + batch]) for i in range(0, len(images), batch)
    ]
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cat(parts).cpu()


def peak(args: argparse.Namespace, name: str | None) -> float:
    """Peak memory in MiB of a process that runs one setting on one batch (None: only loads)."""
    command = [sys.executable, __file__, "--one", name or "", *sys.argv[1:]]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out.splitlines()[-1])["peak_mib"])


def resident_peak() -> float:
    """The most MiB this process ever held. Linux's own counter starts anew with the program;
    `getrusage` would begin with what the parent held."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(args: argparse.Namespace) -> None:
    view, images, labels = load_inputs(args)
    scope = args.scope or view.scope
    if args.one:
        settings(view, scope)[args.one](images[: args.batch], labels[: args.batch])
    mib = resident_peak()
    if images.is_cuda:
        mib = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"peak_mib": mib}))


def linear(args: argparse.Namespace) -> None:
    """Seconds an image of the default setting, for a few and for many images, in turn."""
    few, many = (int(n) for n in args.linear.split(","))
    args.images = many
    view, images, labels = load_inputs(args)
    scope = args.scope or view.scope
    search = ours(view, scope, "auto", None)
    timed(search, images[: args.batch], labels[: args.batch], args.batch)
    ratios = []
    for _ in range(args.rounds):
        short, _ = timed(search, images[:few], labels[:few], args.batch)
        long, _ = timed(search, images, labels, args.batch)
        ratios.append((long / many) / (short / few))
        print(f"{few} images: {short / few:.4f} s each; {many}: {long / many:.4f} s each")
    ratios.sort()
    print(f"ratio {ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", default=None, help="e.g. folder:imagenet/train")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="images at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scope", choices=["cls", "patch", "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--linear", metavar="FEW,MANY", help="only: time an image by their number")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        one(args)
        return
    if args.linear is not None:
        linear(args)
        return
    view, images, labels = load_inputs(args)
    scope: Scope = args.scope or view.scope
    searches = settings(view, scope)
    for search in searches.values():
        search(images[:1], labels[:1])
    times: dict[str, list[float]] = {name: [] for name in searches}
    paths: dict[str, Tensor] = {}
    for _ in range(args.rounds):
        for name, search in searches.items():
            seconds, paths[name] = timed(search, images, labels, args.batch)
            times[name].append(seconds)
    _, exact = timed(ours(view, scope, "gauss-legendre", 64), images, labels, 1)
    first = next(iter(searches))
    loaded = peak(args, None)
    print(
        f"{args.model}, scope {scope}, {len(images)} images, {args.batch} at a time, "
        f"{args.rounds} rounds, {args.device}, {torch.get_num_threads()} threads "
        f"of {os.cpu_count()}, torch {torch.__version__}\n"
    )
    print("| setting | s an image (median) | times faster (range) | path = reference | "
          "agreement with converged | peak MiB above loading |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- |")
    for name in searches:
        ordered = sorted(times[name])
        ratios = sorted(a / b for a, b in zip(times[first], times[name], strict=True))
        same = (paths[name] == paths[first]).float().mean()
        close = (paths[name] == exact).float().mean()
        print(
            f"| {name} | {ordered[len(ordered) // 2] / len(images):.2f} | "
            f"{ratios[len(ratios) // 2]:.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f}) | "
            f"{100 * float(same):.1f} % | {100 * float(close):.1f} % | "
            f"{peak(args, name) - loaded:.0f} |"
        )


if __name__ == "__main__":
    main()

"""The whole line on one device, stage by stage, next to what the device can do.

    python benchmarks/gpu.py --out gpu                          # ViT-B/16 at 224, one GPU
    python benchmarks/gpu.py --out gpu --profile                # where discovery's time goes
    python benchmarks/gpu.py --model vit_large_patch16_224 --images 128 --out gpu
    python benchmarks/gpu.py --device cpu --small --out gpu  # a tiny network, in seconds

Weights are random and images are noise: for times and memory only; nothing is downloaded. Every
stage is the function that the commands call. It runs once to warm up (except refit, which runs a
block at a time anyway) and once between two synchronisations. The operations of products and
attention are counted by torch's counter, on a few images more (2 of them a multiply-add); what
else a stage does is not counted, so that "of peak" is a floor.

"Product" is what one large matrix product reaches here in the same precision, "peak" what the maker
states without sparsity, where the card is known or `--peak PRECISION=TFLOPS` says. A stage of
several precisions (statistics sum in float64) is compared to that of its network.

Writes gpu.json and gpu.md, with --profile profile.txt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import npprune
from npprune.core.attribution.methods import find_paths
from npprune.core.attribution.quadrature import Integral
from npprune.core.compression.attention import collect_attention
from npprune.core.compression.sequential import Fit, compensate_in_sequence
from npprune.core.compression.statistics import collect_statistics
from npprune.errors import NpPruneError
from npprune.models.info import model_sizes
from npprune.models.load import create
from npprune.models.view import make_view
from npprune.pipeline.common.device import products
from npprune.pipeline.common.work import Work
from npprune.pipeline.export.bench import bench_checkpoint
from npprune.pipeline.export.timings import BenchSettings
from npprune.pipeline.prune.measuring import Measured, PlanSettings, Subject, measure

TINY = {
    "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10,
}  # fmt: skip
PEAKS = {  # dense TFLOP/s as the makers state them
    "H100": {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0, "fp64": 67.0},
    "H200": {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0, "fp64": 67.0},
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5, "fp64": 19.5},
    "L40S": {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6},
    "L4": {"bf16": 121.0, "tf32": 60.0, "fp32": 30.3},
}
DTYPES = {
    "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COUNTS = dict(flop_registry) | {  # torch's own counter knows attention on GPUs alone
    FORWARD: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    BACKWARD: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
NEEDS = ("moments", "salience", "gates", "curvature")


@dataclass
class Row:
    """One stage: of how many images, how long, how many operations, how much memory."""

    stage: str
    precision: str
    images: int
    seconds: float
    tflop: float
    peak_gib: float | None

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.tflop / self.seconds


@dataclass
class Report:
    """What gpu.json holds."""

    model: str
    device: str
    torch: str
    parameters: int
    product: dict[str, float]
    peak: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    runtimes: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


class Counter(TorchDispatchMode):
    """Counts the operations of products, convolutions and attention. (`FlopCounterMode` also
    follows modules, which `torch.autograd.grad` of single layers does not allow.)"""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := COUNTS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


class Clock:
    """Times stages on a device."""

    def __init__(self, device: torch.device, report: Report) -> None:
        self.device, self.report = device, report

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def stage(
        self,
        name: str,
        precision: str,
        images: int,
        work: Callable[[], object],
        few: Callable[[], object] | None = None,
        times: float = 1.0,
        warm: bool = True,
    ) -> None:
        """`few` is the same on a part of the images, to count; `times` as many are in `work`."""
        with products(precision, self.device):
            if warm:
                (few or work)()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds = self.seconds(work)
            peak = None
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            counter = Counter()
            with counter:
                (few or work)()
        row = Row(name, precision, images, seconds, counter.flops * times / 1e12, peak)
        self.report.rows.append(row)
        print(f"{name}, {precision}: {seconds:.2f} s, {images / seconds:.1f} images/s", flush=True)


def product_rate(device: torch.device, precision: str, size: int) -> float:
    """TFLOP/s of one large matrix product, the best of five."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    clock = Clock(device, None)  # type: ignore[arg-type]
    with products(precision, device):
        clock.seconds(lambda: a @ b)
        return 2 * size**3 / 1e12 / min(clock.seconds(lambda: a @ b) for _ in range(5))


def stated(card: str, given: list[str]) -> dict[str, float]:
    found = next((dict(peaks) for name, peaks in PEAKS.items() if name in card), {})
    return found | {name: float(value) for name, _, value in (g.partition("=") for g in given)}


def discovery(
    model: nn.Module, x: Tensor, y: Tensor, clock: Clock, batch: int, precision: str, compiled: bool
) -> Callable[[], object]:
    """Paths of all images, in batches; returns the work, to be profiled."""
    view = make_view(model, precision=precision, compiled=compiled)  # type: ignore[arg-type]
    integral = Integral.of(view.scope)

    def find(count: int) -> None:
        for i in range(0, count, batch):
            find_paths(view, x[i : i + batch], y[i : i + batch], topk=5, integral=integral)

    name = "discover, compiled" if compiled else "discover"
    first = min(batch, len(x))
    clock.stage(
        name, precision, len(x), lambda: find(len(x)), lambda: find(first), times=len(x) / first
    )
    return lambda: find(first)


def pruning(model: nn.Module, x: Tensor, clock: Clock, batch: int) -> None:
    """Statistics, attention, harm and refit, as `npprune prune --target-macs` has them."""
    view, batches = make_view(model), list(x.split(batch))
    first, times = batches[:1], len(x) / len(batches[0])
    seeded = torch.Generator().manual_seed
    clock.stage(
        "statistics", "fp32", len(x),
        lambda: collect_statistics(view, batches, needs=NEEDS, generator=seeded(0)),
        lambda: collect_statistics(view, first, needs=NEEDS, generator=seeded(0)), times,
    )  # fmt: skip
    clock.stage(
        "attention statistics", "fp32", len(x),
        lambda: collect_attention(view, batches, generator=seeded(0)),
        lambda: collect_attention(view, first, generator=seeded(0)), times,
    )  # fmt: skip
    subject = Subject(view, [b.cpu() for b in batches], lambda: model_sizes(model))
    asked = PlanSettings(round_to=16)
    measured: list[Measured] = []
    device = str(clock.device)
    seconds = clock.seconds(lambda: measured.append(measure(subject, asked, Work(device))))
    scores = seconds - measured[0].collected.seconds
    clock.report.rows.append(Row("scores (blocks)", "fp64", len(view.widths), scores, 0.0, None))
    few = subject.few(100)
    options = sum(min(7, len(row) - 1) for row in measured[0].hidden.ranking.widths)
    clock.stage(
        "harm (images x options)", "fp32", sum(map(len, few)) * options,
        lambda: measured[0].hidden.harm(few, lambda done: None), warm=False,
    )  # fmt: skip
    keep = [list(range(0, h, 2)) for h in view.widths]

    def refit(images: list[Tensor]) -> None:
        compensate_in_sequence(view, images, keep, fit=Fit())

    clock.stage(
        "refit", "fp32", len(x), lambda: refit(batches), lambda: refit(first), times, warm=False
    )


def forward(model: nn.Module, x: Tensor, clock: Clock, batch: int, precision: str) -> None:
    """The network alone."""
    batches = x.split(batch)

    @torch.no_grad()
    def predict(images: tuple[Tensor, ...]) -> None:
        bf16 = precision == "bf16"
        with torch.autocast(clock.device.type, torch.bfloat16, enabled=bf16):
            for b in images:
                model(b)

    clock.stage(
        "evaluate", precision, len(x), lambda: predict(batches), lambda: predict(batches[:1]),
        len(x) / len(batches[0]),
    )  # fmt: skip


def runtimes(
    model: nn.Module, x: Tensor, report: Report, providers: list[str], batches: list[int]
) -> None:
    """Dense and pruned in ONNX Runtime, with each provider that is here."""
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense", Path(folder) / "pruned"
        npprune.save(model.cpu(), dense)
        npprune.prune(dense, x[:64].cpu(), keep=0.5, selection="uniform", out=pruned, device="cpu")
        for provider in providers:
            settings = BenchSettings(["onnxruntime"], batches, seconds=1.0, provider=provider)
            try:
                found = bench_checkpoint(pruned, settings)
            except NpPruneError as err:
                report.absent[provider] = err.message
                print(f"onnxruntime, {provider}: {err.message}", flush=True)
                continue
            report.absent |= {f"{provider}: {k}": v for k, v in found.absent.items()}
            report.runtimes += [{"provider": provider, **asdict(row)} for row in found.rows]


def profiled(work: Callable[[], object], device: torch.device) -> str:
    """Where the time of one batch goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, record_shapes=True) as found:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(found.key_averages(group_by_input_shape=True).table(sort_by=key, row_limit=40))


def table(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        f"{report.model}, {report.parameters / 1e6:.0f} M parameters, {report.device}, "
        f"torch {report.torch}",
        "",
        "| stage | precision | images/s | seconds | TFLOP/s | of one product | of the peak | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def share(row: Row, of: dict[str, float]) -> str:
        return f"{row.rate / of[row.precision]:.0%}" if row.tflop and of.get(row.precision) else ""

    lines += [
        f"| {r.stage} | {r.precision} | {r.images / r.seconds:.1f} | {r.seconds:.2f} | "
        f"{f'{r.rate:.3g}' if r.tflop else ''} | {share(r, report.product)} | "
        f"{share(r, report.peak)} | {'' if r.peak_gib is None else f'{r.peak_gib:.2f}'} |"
        for r in report.rows
    ]
    said = ", ".join(f"{name} {rate:.3g}" for name, rate in report.product.items())
    lines += ["", f"One product, TFLOP/s: {said}."]
    if report.runtimes:
        lines += [
            "",
            "| ONNX Runtime | batch | dense, ms | pruned, ms |",
            "| --- | --- | --- | --- |",
        ]
        for row in report.runtimes:
            at = row["latency"]
            lines.append(
                f"| {row['provider']} | {at['batch']} | {at['dense_ms']:.2f} | "
                f"{at['pruned_ms']:.2f} |"
            )
    lines += [f"\nNot measured: {what}: {why}." for what, why in report.absent.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--small", action="store_true", help="a tiny network, to try the program")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", default="fp32,tf32,bf16", help="of discovery")
    parser.add_argument("--compile", action="store_true", help="discovery compiled as well")
    parser.add_argument("--profile", action="store_true", help="discovery, in the last precision")
    parser.add_argument("--providers", default="cuda,tensorrt", help="of ONNX Runtime; none: none")
    parser.add_argument("--peak", action="append", default=[], metavar="PRECISION=TFLOPS")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here: `--device cpu --small` tries the program")
    sizes = {} if args.img_size is None else {"img_size": args.img_size}
    torch.manual_seed(0)
    model = create(args.model, TINY if args.small else sizes).to(device).eval()
    side = model.patch_embed.img_size  # type: ignore[union-attr]
    x = torch.randn(args.images, 3, *side, device=device)  # type: ignore[misc]
    with torch.no_grad():
        y = torch.cat([model(b).argmax(1) for b in x.split(args.batch)])
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precisions = args.precisions.split(",") if device.type == "cuda" else ["fp32", "bf16"]
    size = 8192 if device.type == "cuda" else 512
    report = Report(
        args.model + (", tiny" if args.small else ""),
        card,
        torch.__version__,
        sum(p.numel() for p in model.parameters()),
        {p: product_rate(device, p, size) for p in dict.fromkeys([*precisions, "fp32", "fp64"])},
        stated(card, args.peak),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(device, report)
    last: Callable[[], object] = print
    for precision in precisions:
        last = discovery(model, x, y, clock, args.batch, precision, compiled=False)
        if args.compile:
            last = discovery(model, x, y, clock, args.batch, precision, compiled=True)
    if args.profile:
        (args.out / "profile.txt").write_text(profiled(last, device))
    pruning(model, x, clock, args.batch)
    for precision in precisions:
        forward(model, x, clock, args.batch, precision)
    if args.providers != "none":
        runtimes(model, x, report, args.providers.split(","), [1, args.batch])
    (args.out / "gpu.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (args.out / "gpu.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()

"""Bench: dense and pruned side by side, in PyTorch and ONNX Runtime, run in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn

from npprune.errors import UsageError
from npprune.export.bench import (
    Runner,
    bench_pair,
    noise_warning,
    onnx_runner,
    peak_memory,
    torch_runner,
)
from npprune.export.onnx import export_onnx
from npprune.export.session import Session, open_session
from npprune.files import check_folder, keeping, refuse_overwriting, scratch
from npprune.pipeline.common.device import environment, resolve_device
from npprune.pipeline.common.inputs import Network, open_checkpoint
from npprune.pipeline.common.outputs import reads_of, recordable
from npprune.pipeline.common.results import add_command, run_of
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import open_dense
from npprune.records import Analysis, Benchmark, BenchmarkRow, FigureData, Series
from npprune.report import text
from npprune.report.drawing import draw
from npprune.report.svg import standalone
from npprune.store import atomic

STAGE = "bench"
RUNTIMES = ("onnxruntime", "torch")
CPU = "CPUExecutionProvider"
FILES = ("bench.json", "bench.svg")


@dataclass
class BenchSettings:
    """What is timed. `runtimes` and `threads` empty: both where there are checkpoints, ONNX
    Runtime alone for files; and as many threads as PyTorch takes by itself."""

    runtimes: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=lambda: [1, 16])
    threads: list[int] = field(default_factory=list)
    seconds: float = 2.0  # for each pair
    provider: str = "auto"
    memory: bool = True


Memory = Callable[[int, int], tuple[int | None, int | None]]  # of (batch, threads)


@dataclass
class _Bed:
    """One runtime, with the two networks ready for it."""

    runner: Callable[[bool, int, int], Runner]  # (pruned?, batch, threads)
    memory: Memory
    on_cpu: bool


def bench_checkpoint(
    checkpoint: Path,
    settings: BenchSettings,
    *,
    dense_checkpoint: str | None = None,
    out: Path | None = None,
    work: Work | None = None,
) -> Benchmark:
    """Time a pruned checkpoint beside its dense network, both in float32 on noise images.

    The timings go into the run's `result.json`, and with `out` into a folder of their own.

    Raises:
        NpPruneError: what is wrong with checkpoint, dense weights, provider or settings.
    """
    work = (work or Work()).on(STAGE).on_cpu()
    _check_out(out, reads_of(checkpoint))
    pruned = open_checkpoint(checkpoint, work)
    config = pruned.config
    assert config is not None
    if config.prune is None:
        raise UsageError(
            f"`{checkpoint}` is not pruned: there is nothing to time it against",
            hint="give a folder that `npprune prune` wrote, or two .onnx files",
        )
    run = run_of(checkpoint, config, work)
    recorded = recordable(run, work)
    dense = open_dense(config, checkpoint, dense_checkpoint, work)
    with scratch() as folder:
        beds = [
            _onnx_bed(*_exported(dense, pruned, folder, work), settings.provider)
            if runtime == "onnxruntime"
            else _torch_bed(dense, pruned, settings.provider)
            for runtime in settings.runtimes or RUNTIMES
        ]
        rows = _time(beds, settings, work)
    found = _benchmark(
        dense.info.source.architecture,
        checkpoint.resolve().name,
        rows,
        pruned.info.macs / dense.info.macs,
    )
    with keeping(found):
        if out is not None:
            write_benchmark(out, found)
        if run is not None and recorded:
            with run.updating() as result:
                result.analyses[f"benchmark-{found.pruned}"] = analysis(found)
                add_command(result, work.command)
    return found


def bench_files(
    dense: Path,
    pruned: Path,
    settings: BenchSettings,
    *,
    out: Path | None = None,
    work: Work | None = None,
) -> Benchmark:
    """Time two ONNX files side by side on noise images, the first one as the reference.

    Raises:
        NpPruneError: a file cannot be opened, or the two take other images; wrong settings.
    """
    work = (work or Work()).on(STAGE)
    if "torch" in settings.runtimes:
        raise UsageError(
            "`--runtime torch` needs a checkpoint, and .onnx files were given",
            hint="leave it out, or give the folder that `npprune prune` wrote",
        )
    _check_out(out, [dense, pruned])
    sessions = [open_session(path, settings.provider) for path in (dense, pruned)]
    inputs = [(s.input_name, s.input_shape[1:]) for s in sessions]
    if inputs[0] != inputs[1]:
        raise UsageError(
            f"the two files must take the same images: {dense} takes `{inputs[0][0]}` "
            f"{inputs[0][1]}, {pruned} takes `{inputs[1][0]}` {inputs[1][1]}"
        )
    fixed = {s.fixed_batch for s in sessions if s.fixed_batch is not None}
    if len(fixed) > 1:
        raise UsageError(f"the two files must take the same batch size, got {sorted(fixed)}")
    if fixed and settings.batches != list(fixed):
        work.say(f"batch {next(iter(fixed))}: the only one that the files take")
        settings.batches = list(fixed)
    rows = _time([_onnx_bed(dense, pruned, settings.provider)], settings, work)
    found = _benchmark(dense.name, pruned.name, rows, _macs_ratio(*sessions))
    if out is not None:
        with keeping(found):
            write_benchmark(out, found)
    return found


def _check_out(out: Path | None, reads: list[str | Path]) -> None:
    if out is not None:
        check_folder(out)
        for name in FILES:
            refuse_overwriting(out / name, reads)


def analysis(found: Benchmark) -> Analysis:
    """The benchmark as a section of a report: bars of the ratios, and a table."""
    columns = ["timed in", "batch", "threads", f"{found.dense}, ms", f"{found.pruned}, ms"]
    columns += ["ratio", "quartiles", "of the MACs' speed-up", "images/s", "images/s before"]
    columns += ["memory", "memory before"]
    table: list[list[str | int | float | None]] = []
    for row in found.rows:
        t = row.latency
        gain = found.saved / t.ratio if found.saved else None
        table.append(
            [
                text.runtime(t),
                str(t.batch),
                str(t.threads),
                f"{t.dense_ms:.4g} ± {t.dense_iqr_ms:.2g}",
                f"{t.pruned_ms:.4g} ± {t.pruned_iqr_ms:.2g}",
                text.fixed(t.ratio, 2),
                f"{t.ratio_low:.2f}–{t.ratio_high:.2f}",
                text.percent(gain, 0),
                text.fixed(row.pruned_images_per_second, 1),
                text.fixed(row.dense_images_per_second, 1),
                text.size(row.pruned_memory),
                text.size(row.dense_memory),
            ]
        )
    reference = {"dense": 1.0}
    if found.macs_ratio is not None:
        reference["MACs"] = found.macs_ratio
    figure = FigureData(
        "bars",
        _ratios(found),
        x_label="batch, threads",
        y_label="latency, pruned over dense",
        x_names=_places(found),
        reference=reference,
    )
    words = (
        "Median ± interquartile range in milliseconds per batch, on noise images, the two networks "
        "run in turn after a warm-up. The ratio is the median of the paired ratios. Memory is the "
        "most that opening the file and running it takes, beyond the runtime itself."
    )
    noisy = [row.warning for row in found.rows if row.warning]
    if noisy:
        words += " Not all timings can be trusted: " + "; ".join(dict.fromkeys(noisy)) + "."
    title = f"Speed of {found.pruned} compared with {found.dense}"
    return Analysis(title, words, columns, table, figure)


def _places(found: Benchmark) -> list[str]:
    return list(dict.fromkeys(f"{r.latency.batch}, {r.latency.threads}" for r in found.rows))


def _ratios(found: Benchmark) -> list[Series]:
    """A row of bars for each runtime, over the batch sizes and thread counts."""
    places = _places(found)
    rows: dict[str, list[float | None]] = {}
    for row in found.rows:
        t = row.latency
        values = rows.setdefault(text.runtime(t), [None] * len(places))
        values[places.index(f"{t.batch}, {t.threads}")] = t.ratio
    return [Series(name, values) for name, values in rows.items()]


def write_benchmark(folder: Path, found: Benchmark) -> None:
    """`bench.json` and the plot, `bench.svg`, into a folder."""
    shown = analysis(found)
    assert shown.figure is not None
    atomic.make_folder(folder)
    data, plot = (folder / name for name in FILES)
    atomic.write_json(data, found)
    atomic.write_text(plot, standalone(draw(shown.figure, shown.title, "bench")))


# ---------------------------------------------------------------- the two runtimes


def _exported(dense: Network, pruned: Network, folder: Path, work: Work) -> tuple[Path, Path]:
    work.say("exporting both networks")
    paths = folder / "dense.onnx", folder / "pruned.onnx"
    for network, path in zip((dense, pruned), paths, strict=True):
        export_onnx(network.model, network.info.preprocessing, [], path)
    return paths


def _onnx_bed(dense: Path, pruned: Path, provider: str) -> _Bed:
    running = open_session(dense, provider).provider

    def memory(batch: int, threads: int) -> tuple[int | None, int | None]:
        if running != CPU:  # a fresh process on the CPU would measure something else
            return None, None
        return tuple(peak_memory(p, batch, threads=threads) for p in (dense, pruned))  # type: ignore[return-value]

    return _Bed(
        lambda smaller, batch, threads: onnx_runner(
            pruned if smaller else dense, batch, provider=provider, threads=threads
        ),
        memory,
        running == CPU,
    )


def _torch_bed(dense: Network, pruned: Network, provider: str) -> _Bed:
    asked = {"tensorrt": "cuda"}.get(provider, provider)
    device = resolve_device(asked)[0]
    noise = torch.randn(
        1, *dense.info.preprocessing.input_size, generator=torch.Generator().manual_seed(0)
    )

    def memory(batch: int, threads: int) -> tuple[int | None, int | None]:
        if device.type != "cuda":
            return None, None
        both = [_cuda_memory(n.model, noise, batch, device) for n in (dense, pruned)]
        return both[0], both[1]

    return _Bed(
        lambda smaller, batch, threads: torch_runner(
            (pruned if smaller else dense).model,
            batch,
            images=noise,
            device=str(device),
            threads=threads,
        ),
        memory,
        device.type == "cpu",
    )


def _cuda_memory(model: nn.Module, image: Tensor, batch: int, device: torch.device) -> int:
    """Bytes of the weights and of the most that one run adds to them."""
    run = torch_runner(model, batch, images=image, device=str(device))
    run.call()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run.call()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return weights + torch.cuda.max_memory_allocated(device) - before


def _time(beds: list[_Bed], settings: BenchSettings, work: Work) -> list[BenchmarkRow]:
    """Every runtime at every batch size and thread count; a GPU at the first count only."""
    counts = settings.threads or [torch.get_num_threads()]
    jobs = [
        (bed, threads, batch)
        for bed in beds
        for threads in (counts if bed.on_cpu else counts[:1])
        for batch in settings.batches
    ]
    rows = []
    for done, (bed, threads, batch) in enumerate(jobs, 1):
        pair = [bed.runner(smaller, batch, threads) for smaller in (False, True)]
        latency = bench_pair(*pair, min_seconds=settings.seconds)
        memory = bed.memory(batch, threads) if settings.memory else (None, None)
        row = BenchmarkRow(
            latency,
            1e3 * batch / latency.dense_ms,
            1e3 * batch / latency.pruned_ms,
            *memory,
            noise_warning(latency),
        )
        rows.append(row)
        work.progress(done, len(jobs), "timings")
        if row.warning is not None:
            work.warn(f"{_short(row)}: {row.warning}")
    return rows


def _benchmark(
    dense: str, pruned: str, rows: list[BenchmarkRow], macs_ratio: float | None
) -> Benchmark:
    first = rows[0].latency
    return Benchmark(
        dense=dense,
        pruned=pruned,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(torch.device("cpu"), f"timed on {first.provider}", 0),
        rows=rows,
        macs_ratio=macs_ratio,
    )


def _macs_ratio(dense: Session, pruned: Session) -> float | None:
    """From what the files say of themselves; None for files of other makers."""
    macs = [s.metadata.get("macs", "") for s in (dense, pruned)]
    if not all(m.isdigit() and int(m) > 0 for m in macs):
        return None
    return int(macs[1]) / int(macs[0])


def _short(row: BenchmarkRow) -> str:
    t = row.latency
    return f"{text.runtime(t)}, batch {t.batch}, {text.plural(t.threads, 'thread')}"

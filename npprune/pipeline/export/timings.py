"""The rows of a benchmark: every runtime, place, precision, thread count and batch in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import cast

import numpy as np
import torch

from npprune.errors import DeviceError, ExportError, NpPruneError, UsageError
from npprune.export.bench import (
    Runner,
    bench_twice,
    filled,
    fixed_share,
    noise_warning,
    peak_memory,
    runner,
)
from npprune.export.onnx import Int8Needs, OnnxForm, export_onnx
from npprune.export.parity import batched_logits, compare_logits, torch_logits
from npprune.export.runtimes import RUNTIMES, Opened, Runtime, Served
from npprune.export.session import Session
from npprune.pipeline.common.device import place_of
from npprune.pipeline.common.inputs import Network
from npprune.pipeline.common.work import Work
from npprune.records import BenchmarkRow, ParityRow
from npprune.report import text
from npprune.words import SERVED_PRECISIONS, FilePrecision

ALL = "all"
CPU = "CPUExecutionProvider"
ON_CPU = (CPU, "CPU", "cpu")
COMPARED = 64  # images that the agreement with PyTorch is measured on, at most
NOISE = 16  # of them, where they are noise
REPEATED = 0.05  # by which a row may change when it is timed again
LAUNCH_BOUND = 0.5  # share of the time that does not grow with the batch


@dataclass
class BenchSettings:
    """What is timed. `runtimes` empty: ONNX Runtime, and PyTorch where there are checkpoints.
    `runtimes` or `precisions` `["all"]`: everything that is there, the rest is named. `threads`
    empty: as many as PyTorch takes by itself."""

    runtimes: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=lambda: [1, 16])
    threads: list[int] = field(default_factory=list)
    seconds: float = 2.0  # for each pair
    provider: str = "auto"
    memory: bool = True
    precisions: list[str] = field(default_factory=lambda: ["fp32"])
    data: str | None = None  # images for int8 and the agreement; None: the checkpoint's, noise


@dataclass
class Subject:
    """One of the two networks; with its logits in PyTorch where it is one.

    int8: which of `to_int8`'s versions stands for int8, once it was made.
    """

    served: Served
    expected: np.ndarray | None = None  # [n, c], of the images that are compared
    features: bool = False  # `expected` are features
    int8: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """A runtime, where it runs, and in which precision."""

    runtime: Runtime
    provider: str
    precision: str

    @property
    def title(self) -> str:
        """`ONNX Runtime, cuda, fp16`."""
        parts = [text.RUNTIMES[self.runtime.name], self.provider, self.precision]
        return ", ".join(p for p in parts if p not in ("auto", "fp32"))


def network_subject(
    network: Network, name: str, folder: Path, images: np.ndarray, calibration: np.ndarray | None
) -> Subject:
    """A network: its files are exported when a runtime asks for them. int8 is the version of
    `to_int8` that most often has the network's own top-1 on `images`."""
    tensor = torch.from_numpy(images)
    expected, features = torch_logits(network.model, tensor), network.info.num_classes == 0

    def score(session: Session) -> float:
        found = batched_logits(session.run, images, 16)
        return compare_logits(16, found, expected, features=features).top1_agreement

    def file(precision: str) -> Path:
        path = folder / f"{name}-{precision}.onnx"
        if not path.exists():
            needs = None
            if calibration is not None:
                needs = Int8Needs(torch.from_numpy(calibration), score)
            form = OnnxForm(  # the runtimes' own words
                precision=cast(FilePrecision, precision),
                output="features" if features else "logits",
            )
            made = export_onnx(
                network.model, network.info.preprocessing, [], path, form, int8=needs
            )
            subject.int8.extend(c.name for c in made if c.chosen)
        return path

    subject = Subject(
        Served(network.model, file), expected[:COMPARED], features
    )  # `file` adds to it
    return subject


def places_of(
    settings: BenchSettings, runtimes: Sequence[str], absent: dict[str, str]
) -> list[Place]:
    """What is to be timed. A precision asked for that a runtime lacks goes into `absent`.

    Raises:
        UsageError: nothing is left.
    """
    everything = settings.precisions == [ALL]
    wanted = SERVED_PRECISIONS if everything else tuple(dict.fromkeys(settings.precisions))
    found = []
    for name in runtimes:
        runtime = RUNTIMES[name]
        spread = settings.runtimes == [ALL] and settings.provider == "auto"
        for precision in (p for p in wanted if p not in absent):
            places = [
                Place(runtime, where, precision)
                for where in (runtime.places if spread else [settings.provider])
            ]
            if precision in runtime.precisions:
                found += places
            elif not everything:
                title = text.RUNTIMES[name]
                absent[f"{title}, {precision}"] = f"{title} has {', '.join(runtime.precisions)}"
    if not found:
        raise UsageError("nothing to time: " + "; ".join(absent.values()))
    return found


def time_all(
    places: Sequence[Place],
    pair: tuple[Subject, Subject],
    images: np.ndarray,
    settings: BenchSettings,
    absent: dict[str, str],
    work: Work,
) -> list[BenchmarkRow]:
    """Every place at every thread count (a GPU at the first only) and batch size. Where `all` was
    asked for, what is not here, or cannot run these networks, goes into `absent`; otherwise it is
    an error.

    Raises:
        DeviceError: what was asked for by name is not here; ExportError: it cannot run them.
    """
    counts = settings.threads or [torch.get_num_threads()]
    lenient = ALL in (settings.runtimes + settings.precisions)
    jobs = [(p, t, b) for p in places for t in counts for b in settings.batches]
    rows: list[BenchmarkRow] = []
    skipped: set[tuple[Place, int]] = set()
    for done, (place, threads, batch) in enumerate(jobs, 1):
        at_all = replace(place, precision="fp32").title not in absent
        if at_all and place.title not in absent and (place, threads) not in skipped:
            try:
                row = _row(place, threads, batch, pair, images, settings)
            except (DeviceError, ExportError) as err:
                if not lenient:
                    raise
                absent[place.title] = reason(err)
            else:
                rows.append(row)
                if row.latency.provider not in ON_CPU:
                    skipped |= {(place, t) for t in counts[1:]}
        work.progress(done, len(jobs), "timings")
    if not rows:
        raise DeviceError("nothing that was asked for is here: " + "; ".join(absent.values()))
    _mark_launch_bound(rows)
    for row in rows:
        if row.warning is not None:
            work.warn(f"{short(row)}: {row.warning}")
    return rows


def reason(err: NpPruneError) -> str:
    """What is missing, and the next step."""
    return f"{err.message} ({err.hint})" if err.hint else err.message


def short(row: BenchmarkRow) -> str:
    """`ONNX Runtime, CPU, batch 1, 2 threads`."""
    return f"{text.where(row.latency)}, {text.plural(row.latency.threads, 'thread')}"


@dataclass
class _Ready:
    """One network in a runtime, its batch in place."""

    runner: Runner
    start_ms: float
    agreement: ParityRow | None


def _row(
    place: Place,
    threads: int,
    batch: int,
    pair: tuple[Subject, Subject],
    images: np.ndarray,
    settings: BenchSettings,
) -> BenchmarkRow:
    dense, pruned = (_ready(place, threads, batch, subject, images) for subject in pair)
    latency, off = bench_twice(dense.runner, pruned.runner, settings.seconds)
    memory: list[int | None] = [None, None]
    if settings.memory:
        memory = [_memory(place, latency.provider, threads, batch, s, images) for s in pair]
    return BenchmarkRow(
        latency,
        1e3 * batch / latency.dense_ms,
        1e3 * batch / latency.pruned_ms,
        memory[0],
        memory[1],
        noise_warning(latency),
        repeat_off=off,
        noisy=off > REPEATED,
        dense_start_ms=dense.start_ms,
        pruned_start_ms=pruned.start_ms,
        dense_agreement=dense.agreement,
        pruned_agreement=pruned.agreement,
    )


def _ready(place: Place, threads: int, batch: int, subject: Subject, images: np.ndarray) -> _Ready:
    """Opened and run once, and compared with PyTorch."""
    feed = filled(images, batch)
    if place.runtime.takes_files:
        subject.served.path(place.precision)  # exporting is not part of the start
    begin = time.perf_counter()
    opened = open_in(place, subject.served, feed, threads)
    opened.run(feed)
    start_ms = 1e3 * (time.perf_counter() - begin)
    agreement = None
    if subject.expected is not None:
        found = batched_logits(opened.run, images[: len(subject.expected)], batch)
        agreement = compare_logits(batch, found, subject.expected, features=subject.features)
    return _Ready(runner(place.runtime.name, opened, feed, place.precision), start_ms, agreement)


def open_in(place: Place, served: Served, feed: np.ndarray, threads: int | None) -> Opened:
    """A network opened where `place` says."""
    where = place_of(place.runtime.name, place.provider)
    return place.runtime.open(served, feed, precision=place.precision, place=where, threads=threads)


def _memory(
    place: Place,
    provider: str,
    threads: int,
    batch: int,
    subject: Subject,
    images: np.ndarray,
) -> int | None:
    """Bytes at the peak, where they can be told: of ONNX Runtime on the CPU, in a process of its
    own (one on the CPU would say nothing of others); of PyTorch's weights and runs on CUDA."""
    if provider == CPU:
        return peak_memory(subject.served.path(place.precision), batch, threads=threads)
    if place.runtime.name != "torch" or not provider.startswith("cuda"):
        return None
    model, device = subject.served.model, torch.device(provider)
    assert model is not None
    opened = open_in(place, subject.served, images, threads)
    call = opened.bind(filled(images, batch))
    call()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    size = 4 if place.precision == "fp32" else 2
    weights = size * sum(p.numel() for p in model.parameters())
    return weights + torch.cuda.max_memory_allocated(device) - before


def _mark_launch_bound(rows: list[BenchmarkRow]) -> None:
    """Where most of the dense time stays the same at the next batch size: fewer MACs cannot show
    there. The batches of a place and thread count lie side by side."""

    def what(row: BenchmarkRow) -> tuple[str, str, str, int]:
        t = row.latency
        return t.runtime, t.provider, t.precision, t.threads

    for _, group in groupby(rows, what):
        ordered = sorted(group, key=lambda row: row.latency.batch)
        for i, row in enumerate(ordered):
            near = ordered[i + 1 if i + 1 < len(ordered) else i - 1].latency
            own = row.latency
            if near.batch != own.batch:
                row.fixed_share = fixed_share(own.dense_ms, own.batch, near.dense_ms, near.batch)
                row.launch_bound = row.fixed_share > LAUNCH_BOUND

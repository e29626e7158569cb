"""Time two networks side by side: A B A B, after a warm-up, in one process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import ExportError, UsageError
from npprune.export.runtimes import RUNTIMES, Opened, Served
from npprune.export.session import open_session
from npprune.records import Latency

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

NOISY = 0.2
"""Interquartile range over median above which a timing says little."""


@dataclass(frozen=True)
class Runner:
    """A network with its input at hand: calling it runs one batch to its end."""

    call: Callable[[], object]
    runtime: str  # a word of `words.RUNTIMES`
    provider: str  # what runs, e.g. "CPUExecutionProvider" or "cpu"
    batch: int
    threads: int  # 0: the runtime's own choice
    precision: str = ""  # empty: float32


def onnx_runner(
    path: Path,
    batch: int,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    images: np.ndarray | None = None,
) -> Runner:
    """`path` in ONNX Runtime on `batch` images [b, 3, H, W] (None: noise of the right shape)."""
    session = open_session(path, provider, threads)
    if session.fixed_batch not in (None, batch):
        raise UsageError(
            f"`batch` must be {session.fixed_batch}, the size {path.name} was exported with, "
            f"got `{batch}`"
        )
    feed = filled(images, batch) if images is not None else noise(session, batch)
    return Runner(
        lambda: session.run(feed), "onnxruntime", session.provider, batch, session.threads
    )


def torch_runner(
    model: nn.Module,
    batch: int,
    *,
    images: Any,
    device: str = "cpu",
    threads: int | None = None,
) -> Runner:
    """`model` in PyTorch on `batch` of the `images` tensor [n, 3, H, W]. The model moves to
    `device` and is put in evaluation mode; a CUDA device is waited for."""
    feed = filled(images.cpu().numpy(), batch)
    opened = RUNTIMES["torch"].open(Served(model), feed, place=device, threads=threads)
    return runner("torch", opened, feed)


def runner(runtime: str, opened: Opened, images: np.ndarray, precision: str = "fp32") -> Runner:
    """What runs `images`, one batch, in an opened network."""
    own = "" if precision == "fp32" else precision
    return Runner(opened.bind(images), runtime, opened.provider, len(images), opened.threads, own)


def bench_pair(
    dense: Runner,
    pruned: Runner,
    *,
    warmup: int = 5,
    runs: int | None = None,
    min_seconds: float = 2.0,
    max_runs: int = 1000,
) -> Latency:
    """Time both in turn, dense first. `runs` pairs; None: at least 10, until `min_seconds` have
    gone by. The ratio is the median of the paired ratios: load on the machine that lasts longer
    than a pair cancels in it. Milliseconds per batch."""
    if (dense.batch, dense.runtime) != (pruned.batch, pruned.runtime):
        raise UsageError("two networks are compared on the same runtime and batch size")
    if runs is not None and runs < 1:
        raise UsageError(f"`runs` must be at least 1, got `{runs}`")
    return _latency(
        dense, *interleave([dense.call, pruned.call], warmup, runs, min_seconds, max_runs)
    )


def bench_twice(dense: Runner, pruned: Runner, min_seconds: float) -> tuple[Latency, float]:
    """`bench_pair` twice, in half of `min_seconds` each: the timing over both, and the largest
    relative change, from the first to the second, of a median or of the ratio."""
    calls = [dense.call, pruned.call]
    passes = [interleave(calls, 5, None, min_seconds / 2) for _ in range(2)]
    first, second = (_latency(dense, *times) for times in passes)
    both = _latency(dense, *(a + b for a, b in zip(*passes, strict=True)))
    return both, max(
        abs(getattr(second, name) / getattr(first, name) - 1)
        for name in ("dense_ms", "pruned_ms", "ratio")
    )


def fixed_share(ms: float, batch: int, other_ms: float, other_batch: int) -> float:
    """The share of a batch's time that does not grow with the batch, from another batch's time: 0
    where all of it grows, 1 where none does."""
    return 1 - (other_ms - ms) / (other_batch - batch) * batch / ms


def _latency(dense: Runner, a: list[float], b: list[float]) -> Latency:
    """Of the times of both, in pairs."""
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    return Latency(
        runtime=dense.runtime,
        provider=dense.provider,
        batch=dense.batch,
        threads=dense.threads,
        runs=len(a),
        dense_ms=quantile(a, 0.5),
        pruned_ms=quantile(b, 0.5),
        dense_iqr_ms=quantile(a, 0.75) - quantile(a, 0.25),
        pruned_iqr_ms=quantile(b, 0.75) - quantile(b, 0.25),
        ratio=quantile(ratios, 0.5),
        ratio_low=quantile(ratios, 0.25),
        ratio_high=quantile(ratios, 0.75),
        precision=dense.precision,
    )


def interleave(
    calls: Sequence[Callable[[], object]],
    warmup: int,
    runs: int | None,
    min_seconds: float,
    max_runs: int = 1000,
) -> list[list[float]]:
    """Milliseconds of every run of every call; one round runs each of them once, in order."""
    for _ in range(warmup):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while not _enough(len(times[0]), time.perf_counter() - begin, runs, min_seconds, max_runs):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return times


def _enough(done: int, seconds: float, runs: int | None, min_seconds: float, max_runs: int) -> bool:
    if runs is not None:
        return done >= runs
    return done >= max_runs or (done >= 10 and seconds >= min_seconds)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


_PEAK = """
import sys
from pathlib import Path
import numpy, onnxruntime
from npprune.export.bench import onnx_runner, peak_of_this_process
before = peak_of_this_process()
runner = onnx_runner(Path(sys.argv[1]), int(sys.argv[2]), threads=int(sys.argv[3]) or None)
for _ in range(3):
    runner.call()
sys.stdout.write(str(peak_of_this_process() - before))
"""


def peak_of_this_process() -> int:
    """The most bytes of memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would start from the parent's peak here
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_memory(path: Path, batch: int, *, threads: int | None = None) -> int:
    """Bytes that a fresh process needs at its peak, beyond ONNX Runtime itself, to open `path`
    and run it on the CPU at this batch size. ExportError where it cannot be measured."""
    command = [sys.executable, "-c", _PEAK, str(path), str(batch), str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"the memory of {path} cannot be measured: {last[0]}")
    return int(done.stdout)


def noise_warning(latency: Latency) -> str | None:
    """A sentence where the timings scatter too much to compare, else None."""
    spread = max(latency.dense_iqr_ms / latency.dense_ms, latency.pruned_iqr_ms / latency.pruned_ms)
    if spread > NOISY:
        return (
            f"this machine is busy or noisy: half of the timings at batch {latency.batch} scatter "
            f"over {100 * spread:.0f} % of their median (above {100 * NOISY:.0f} %)"
        )
    if latency.ratio_low < 1 < latency.ratio_high:
        return (
            f"dense and pruned cannot be told apart at batch {latency.batch}: the middle half of "
            f"the paired ratios is {latency.ratio_low:.2f} to {latency.ratio_high:.2f}"
        )
    return None


def filled(images: np.ndarray, batch: int) -> np.ndarray:
    """`batch` of the images, from the first on, again and again."""
    import numpy as np

    return np.ascontiguousarray(images[np.arange(batch) % len(images)])


def noise(session: Any, batch: int) -> np.ndarray:
    """`batch` images of noise that an open file takes."""
    import numpy as np

    shape = [batch, *(int(s) for s in session.input_shape[1:])]
    rng = np.random.default_rng(0)
    if session.input_name == "pixels":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape, dtype=np.float32)

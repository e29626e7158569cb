"""Bench: dense and pruned side by side, in the runtimes that are here, run in turn."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from npprune.errors import DataError, UsageError
from npprune.export.bench import noise
from npprune.export.runtimes import RUNTIMES, Served
from npprune.export.session import Session, open_session
from npprune.files import check_folder, keeping, refuse_overwriting, scratch
from npprune.pipeline.common.device import environment
from npprune.pipeline.common.inputs import Network, dense_names, open_checkpoint
from npprune.pipeline.common.outputs import reads_of, recordable
from npprune.pipeline.common.results import add_command, run_of
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import open_dense
from npprune.pipeline.export.images import read_images
from npprune.pipeline.export.timings import (
    ALL,
    NOISE,
    BenchSettings,
    Subject,
    network_subject,
    places_of,
    reason,
    time_all,
)
from npprune.recipe import DataSection
from npprune.records import Analysis, Benchmark, BenchmarkRow, FigureData, Series
from npprune.report import text
from npprune.report.drawing import draw
from npprune.report.svg import standalone
from npprune.store import atomic

STAGE = "bench"
BY_DEFAULT = ("onnxruntime", "torch")
FILES = ("bench.json", "bench.svg")


def bench_checkpoint(
    checkpoint: Path,
    settings: BenchSettings,
    *,
    dense_checkpoint: str | None = None,
    out: Path | None = None,
    work: Work | None = None,
) -> Benchmark:
    """Time a pruned checkpoint beside its dense network.

    They run on noise images, or on those of `settings.data`; with int8, on the checkpoint's own.

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
    names = _runtimes(settings, BY_DEFAULT)
    absent: dict[str, str] = {}
    images, calibration, spec = _images(pruned, dense, settings, absent, work)
    places = places_of(settings, names, absent)
    with scratch() as folder:
        pair = (
            network_subject(dense, "dense", folder, images, calibration),
            network_subject(pruned, "pruned", folder, images, calibration),
        )
        rows = time_all(places, pair, images, settings, absent, work)
    found = _benchmark(
        dense.info.source.architecture,
        checkpoint.resolve().name,
        rows,
        pruned.info.macs / dense.info.macs,
    )
    found.absent, found.images = absent, spec
    found.int8 = [name for subject in pair for name in subject.int8]
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
    names = _runtimes(settings, BY_DEFAULT[:1])
    absent = {}
    for name in names:
        if not RUNTIMES[name].takes_files:
            said = f"`--runtime {name}` needs a checkpoint, and .onnx files were given"
            if settings.runtimes != [ALL]:
                raise UsageError(
                    said, hint="leave it out, or give the folder that `npprune prune` wrote"
                )
            absent[text.RUNTIMES[name]] = said
    if settings.precisions != ["fp32"] or settings.data is not None:
        raise UsageError(
            "`--precision` and `--data` go with a checkpoint, and .onnx files were given",
            hint="a file has the precision that `npprune export --precision` gave it",
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
    places = places_of(settings, [n for n in names if RUNTIMES[n].takes_files], absent)
    pair = (_file_subject(dense), _file_subject(pruned))
    rows = time_all(places, pair, noise(sessions[0], max(settings.batches)), settings, absent, work)
    found = _benchmark(dense.name, pruned.name, rows, _macs_ratio(*sessions))
    found.absent = absent
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
    columns += ["memory", "memory before", "logits off", "same top-1", "top-1 before"]
    columns += ["start-up", "start-up before", "when repeated", "marks"]
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
                *_agreement(row),
                _ms(row.pruned_start_ms),
                _ms(row.dense_start_ms),
                text.percent(row.repeat_off, sign=True),
                row.marks or text.DASH,
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
        f"Median ± interquartile range in milliseconds per batch, on {found.images or 'noise'} "
        "images, the two networks run in turn after a warm-up. The ratio is the median of the "
        "paired ratios. Memory is the most that opening the file and running it takes, beyond the "
        "runtime itself. Logits and top-1 are compared with PyTorch's in float32. Start-up goes "
        "from opening to the first logits; compilers keep what they made for the next time. Noisy: "
        "a time or the ratio changed by more than 5 % when repeated. Launch-bound: most of the "
        "dense time does not grow with the batch, so that fewer MACs cannot show."
    )
    if found.int8:
        words += f" int8 of dense and pruned: {', '.join(found.int8)}."
    if found.absent:
        words += " Not here: " + "; ".join(f"{k}: {v}" for k, v in found.absent.items()) + "."
    noisy = [row.warning for row in found.rows if row.warning]
    if noisy:
        words += " Not all timings can be trusted: " + "; ".join(dict.fromkeys(noisy)) + "."
    title = f"Speed of {found.pruned} compared with {found.dense}"
    return Analysis(title, words, columns, table, figure)


def _agreement(row: BenchmarkRow) -> list[str]:
    """Of the pruned network's logits and top-1, and of the dense one's top-1."""
    pruned, dense = row.pruned_agreement, row.dense_agreement
    if pruned is None or dense is None:
        return [text.DASH] * 3
    return [
        text.scientific(pruned.max_relative_error),
        text.percent(pruned.top1_agreement),
        text.percent(dense.top1_agreement),
    ]


def _ms(value: float | None) -> str:
    return text.DASH if value is None else text.milliseconds(value)


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


# ---------------------------------------------------------------- what runs on what


def _runtimes(settings: BenchSettings, default: tuple[str, ...]) -> tuple[str, ...]:
    """The words that were asked for, each once."""
    if settings.runtimes == [ALL]:
        return tuple(RUNTIMES)
    return tuple(dict.fromkeys(settings.runtimes)) or default


def _file_subject(path: Path) -> Subject:
    """A file: it has the precision that it has."""
    return Subject(Served(file=lambda precision: path))


def _images(
    pruned: Network, dense: Network, settings: BenchSettings, absent: dict[str, str], work: Work
) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """Images [n, 3, H, W] to run on, others to calibrate int8 with, and the name of their source.
    Where int8 is one of `all` and there are none, it goes into `absent` and out of the settings.
    """
    info, config = pruned.info, pruned.config
    assert config is not None
    wanted = "int8" in settings.precisions or settings.precisions == [ALL]
    if not wanted and settings.data is None:
        rng = np.random.default_rng(0)
        return (
            rng.standard_normal((NOISE, *info.preprocessing.input_size), np.float32),
            None,
            None,
        )
    try:
        read = read_images(
            info, config, DataSection(val=settings.data), "int8" if wanted else "fp32", work,
            num_classes=dense.info.num_classes, names=dense_names(config),
        )  # fmt: skip
    except (UsageError, DataError) as err:
        if settings.precisions != [ALL] or settings.data is not None:
            raise
        absent["int8"] = f"{reason(err)}; `--data SOURCE` gives images to calibrate with"
        return _images(pruned, dense, replace(settings, precisions=["fp32"]), absent, work)
    calibration = None if read.calibration is None else read.calibration.numpy()
    return read.images.numpy(), calibration, read.opened.source.spec


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

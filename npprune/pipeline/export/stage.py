"""Export: a file that ran, agreed with PyTorch on real images, and was timed beside the dense one.

A pruned checkpoint and a dense network go the same way; only the timing needs both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from npprune.errors import ExportError, GateError, ModelError, UsageError
from npprune.export.archive import to_timm, to_torch_archive
from npprune.export.bench import bench_pair, noise_warning, onnx_runner
from npprune.export.checked import export_checked
from npprune.export.onnx import Producer, export_onnx, to_pixels
from npprune.export.parity import (
    GATES,
    Gate,
    Parity,
    compare_logits,
    failures_of,
    require,
    top1_score,
    torch_logits,
)
from npprune.export.session import Session
from npprune.export.staging import publish, sha256, staging
from npprune.models.load import load_timm_folder
from npprune.pipeline.common.events import Emit, Event, ignore
from npprune.pipeline.common.inputs import Network, class_names, open_checkpoint, open_network
from npprune.pipeline.common.results import update_variant
from npprune.pipeline.evaluate.stage import open_dense
from npprune.pipeline.export.images import ExportImages, read_images, whole_batches
from npprune.recipe import DataSection, ExportSection, ModelSection
from npprune.records import CheckpointConfig, ClassInfo, ExportRecord, Preprocessing, Variant
from npprune.store import atomic

STAGE = "export"
BATCHES = (1, 16)
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "timm": ""}


def export_checkpoint(
    checkpoint: Path,
    data: DataSection,
    settings: ExportSection,
    *,
    out: Path | None = None,
    provider: str = "auto",
    dense_checkpoint: str | None = None,
    emit: Emit = ignore,
    command: str = "",
) -> ExportRecord:
    """Export a checkpoint, compare it on real images, time it beside the dense network.

    Without a data source in `data`, the images of the calibration set that the checkpoint
    remembers are used. Nothing that fails the comparison keeps the final name. Where the dense
    weights cannot be found and `dense_checkpoint` does not name them, there is no timing.

    Raises:
        GateError: the file does not agree with PyTorch.
        NpPruneError: what is wrong with checkpoint, images or target.
    """
    target = out or default_target(checkpoint, settings.format)
    _check(settings, provider, target)
    network = open_checkpoint(checkpoint, torch.device("cpu"))
    config = network.config
    assert config is not None
    dense = _dense(config, checkpoint, settings, dense_checkpoint, emit)
    read = read_images(
        network.info, config, data, settings.precision,
        num_classes=_label_space(config, dense), emit=emit,
    )  # fmt: skip
    subject = _Subject(
        network, config.classes, read,
        Producer(config.source.architecture, config.plan_sha256, config.weights_sha256),
    )  # fmt: skip
    emit(Event(STAGE, f"exporting {checkpoint.name} to {target}"))
    record = _write(subject, settings, target, provider, emit)
    if dense is not None:
        _time(record, subject, dense, settings, target, provider, emit)
    atomic.write_json(record_path(target, settings.format), record)

    def update(variant: Variant) -> None:
        old = [variant.export] if variant.export is not None else []
        old += variant.more_exports
        variant.export, variant.more_exports = record, [x for x in old if x.file != record.file]

    update_variant(checkpoint, config, network.info, network.info, update, command=command)
    return record


def export_model(
    model: ModelSection,
    data: DataSection,
    settings: ExportSection,
    *,
    out: Path,
    provider: str = "auto",
    emit: Emit = ignore,
) -> ExportRecord:
    """Export a network as it is, on the same way as a checkpoint; there is nothing to time it
    beside.

    Raises:
        GateError: the file does not agree with PyTorch.
        NpPruneError: what is wrong with the network, images or target.
    """
    _check(settings, provider, out)
    network = open_network(model, torch.device("cpu"), emit, STAGE)
    info = network.info
    read = read_images(
        info, None, data, settings.precision, num_classes=info.num_classes, emit=emit
    )
    producer = Producer(info.source.architecture, weights_sha256=info.source.sha256)
    subject = _Subject(network, class_names(read.opened, info.num_classes), read, producer)
    emit(Event(STAGE, f"exporting {info.source.architecture} to {out}"))
    record = _write(subject, settings, out, provider, emit)
    atomic.write_json(record_path(out, settings.format), record)
    return record


def default_target(checkpoint: Path, format: str) -> Path:
    """Where an export goes when nothing is said: into the checkpoint's folder, or beside it."""
    if format == "timm":
        return checkpoint.with_name(f"{checkpoint.resolve().name}_timm")
    return checkpoint / f"model{SUFFIXES[format]}"


def record_path(target: Path, format: str) -> Path:
    """`export.json` beside `model.onnx` or in timm's folder; else `NAME.export.json`."""
    if format == "timm":
        return target / "export.json"
    name = "export.json" if target.name == "model.onnx" else f"{target.stem}.export.json"
    return target.with_name(name)


@dataclass
class _Subject:
    """What is exported, with the images that judge it."""

    network: Network
    classes: list[ClassInfo]
    read: ExportImages
    producer: Producer

    def __post_init__(self) -> None:
        info = self.network.info
        costs = {"macs": str(info.macs), "params": str(info.params)}
        self.producer = replace(self.producer, extra={**self.producer.extra, **costs})
        self.classes = self.classes or class_names(self.read.opened, info.num_classes)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.read.opened.preprocessing


def _check(settings: ExportSection, provider: str, target: Path) -> None:
    """What is wrong before anything is loaded."""
    suffix = SUFFIXES[settings.format]
    if target.suffix != suffix and suffix:
        raise UsageError(
            f"`--out` must end in {suffix} for `--format {settings.format}`, got `{target}`"
        )
    if settings.format == "timm" and target.exists() and not target.is_dir():
        raise UsageError(f"`--out` must be a folder for `--format timm`, got the file `{target}`")
    if settings.format != "timm" and target.is_dir():
        raise UsageError(f"`--out` must be a file, got the folder `{target}`")
    if settings.format == "onnx":
        return
    fixed = settings.batch != "dynamic" and settings.format == "timm"
    for flag, wrong in (
        ("--precision " + settings.precision, settings.precision != "fp32"),
        ("--with-preprocessing", settings.with_preprocessing),
        ("--provider " + provider, provider != "auto"),
        (f"--batch {settings.batch}", fixed),
    ):
        if wrong:
            raise UsageError(
                f"`{flag}` does not go with `--format {settings.format}`",
                hint="leave it out, or export with `--format onnx`",
            )


def _dense(
    config: CheckpointConfig,
    checkpoint: Path,
    settings: ExportSection,
    override: str | None,
    emit: Emit,
) -> Network | None:
    """The dense network to time beside; None where there is nothing to time or it is not there."""
    if config.prune is None or settings.format != "onnx" or not settings.latency:
        return None
    try:
        return open_dense(config, checkpoint, torch.device("cpu"), override, emit)
    except ModelError as err:
        if override is not None:
            raise
        said = f"not timed beside the dense network: {err.message}"
        emit(Event(STAGE, f"{said}; `--dense FILE` says where it is", level="warning"))
        return None


def _label_space(config: CheckpointConfig, dense: Network | None) -> int:
    """How many classes the image source's labels are of; a cut head has fewer outputs."""
    if dense is not None:
        return dense.info.num_classes
    if config.details.get("outputs") is None:
        return config.num_classes
    given = config.source.model_args.get("num_classes")
    if given is None:
        import timm

        published = timm.get_pretrained_cfg(config.source.architecture)
        given = published.num_classes if published is not None else 0
    return int(given)


# ---------------------------------------------------------------- writing


def _write(
    subject: _Subject, settings: ExportSection, target: Path, provider: str, emit: Emit
) -> ExportRecord:
    """The file in the format asked for, compared before it gets its name."""
    read = subject.read
    if settings.format == "timm":
        record = _write_timm(subject, target)
    elif settings.format == "torch":
        record = to_torch_archive(
            subject.network.model, subject.preprocessing, subject.classes, read.images, target,
            batch=settings.batch, producer=subject.producer,
        )  # fmt: skip
    else:
        record = _write_onnx(subject, settings, target, provider, emit)
        record.details["provider_asked"] = provider
    record.details["images"] = read.details()
    return record


def _write_onnx(
    subject: _Subject, settings: ExportSection, target: Path, provider: str, emit: Emit
) -> ExportRecord:
    read, gate = subject.read, GATES[settings.precision]
    if settings.max_drop is not None:
        gate = replace(gate, max_drop=settings.max_drop)
    calibration, score = _int8_needs(subject, settings, read.labels, emit)
    try:
        return export_checked(
            subject.network.model,
            subject.preprocessing,
            subject.classes,
            read.images,
            target,
            opset=settings.opset,
            batch=settings.batch,
            precision=settings.precision,
            with_preprocessing=settings.with_preprocessing,
            calibration=calibration,
            score=score,
            producer=subject.producer,
            labels=read.labels,
            provider=provider,
            gate=gate,
        )
    except GateError as err:
        if settings.precision == "fp32":
            raise
        raise GateError(
            err.message,
            hint="no file was kept under that name; `--max-drop POINTS` allows top-1 to fall more, "
            "and fp32 and fp16 lose less",
        ) from err


def _int8_needs(
    subject: _Subject, settings: ExportSection, labels: torch.Tensor, emit: Emit
) -> tuple[torch.Tensor | None, Callable[[Session], float] | None]:
    """Calibration images, and the accuracy on held-out ones by which candidates are chosen."""
    read = subject.read
    if settings.precision != "int8" or read.calibration is None:
        return None, None
    top1 = top1_score(read.images, labels, subject.preprocessing)

    def score(session: Session) -> float:
        share = top1(session)
        name = session.path.suffix.removeprefix(".")
        said = f"{name}: top-1 {100 * share:.2f} % on {len(labels)} held-out images"
        emit(Event(STAGE, said))
        return share

    return whole_batches(read.calibration, settings.batch), score


def _write_timm(subject: _Subject, target: Path) -> ExportRecord:
    """timm's own checkpoint folder, read back by timm and compared before it is moved there."""
    network, images = subject.network, subject.read.images
    gate = Gate()
    info = replace(network.info, preprocessing=subject.preprocessing)
    with staging(target) as folder:
        made = folder / "made"
        to_timm(network.model, info, subject.classes, made)
        loaded = load_timm_folder(made)
        expected, found = (torch_logits(m, images) for m in (network.model, loaded))
        rows = [compare_logits(len(images), found, expected)]
        said = failures_of(rows, gate)
        require(Parity(rows, not said, gate, "timm", "", said), target.name)
        weights = made / "model.safetensors"
        record = ExportRecord(
            file=weights.name,
            format="timm",
            precision="fp32",
            opset=0,
            bytes=sum(f.stat().st_size for f in made.iterdir()),
            sha256=sha256(weights),
            provider="timm",
            parity=rows,
            tolerance=gate.tolerance or 0.0,
            passed=True,
            details={"files": sorted(f.name for f in made.iterdir())},
        )
        try:
            target.mkdir(exist_ok=True)
        except OSError as err:
            raise ExportError(f"cannot write to {target}: {err.strerror}") from err
        publish(made, target / weights.name)
    return record


# ---------------------------------------------------------------- timing


def _time(
    record: ExportRecord,
    subject: _Subject,
    dense: Network,
    settings: ExportSection,
    target: Path,
    provider: str,
    emit: Emit,
) -> None:
    """Milliseconds beside the dense network, exported with the same settings; into the record."""
    emit(Event(STAGE, "timing it beside the dense network"))
    read = subject.read
    calibration, score = _int8_needs(subject, settings, read.source_labels, ignore)
    threads = torch.get_num_threads()
    feed = read.images[: max(BATCHES)]
    if settings.with_preprocessing:
        feed = to_pixels(feed, subject.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "dense.onnx"
        export_onnx(
            dense.model,
            subject.preprocessing,
            [],
            beside,
            opset=settings.opset,
            batch=settings.batch,
            precision=settings.precision,
            with_preprocessing=settings.with_preprocessing,
            calibration=calibration,
            score=score,
        )
        record.dense_bytes = sum(f.stat().st_size for f in Path(folder).iterdir())
        for b in BATCHES if settings.batch == "dynamic" else (int(settings.batch),):
            pair = [
                onnx_runner(path, b, provider=provider, threads=threads, images=feed.numpy())
                for path in (beside, target)
            ]
            latency = bench_pair(*pair)
            latency.precision = "" if settings.precision == "fp32" else settings.precision
            record.latency.append(latency)
            if (said := noise_warning(latency)) is not None:
                record.details.setdefault("notes", []).append(said)
                emit(Event(STAGE, said, level="warning"))

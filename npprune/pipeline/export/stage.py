"""Export: a file that ran, agreed with PyTorch on real images, and was timed beside the dense one.

A pruned checkpoint and a dense network go the same way; only the timing needs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from npprune.errors import GateError, ModelError, StoreError, UsageError, setting
from npprune.export.archive import to_timm, to_torch_archive
from npprune.export.bench import bench_pair, noise_warning, onnx_runner
from npprune.export.beside import SUFFIXES, hashes, record_path
from npprune.export.checked import Comparison, export_checked
from npprune.export.hugging import bring, load_transformers, to_transformers
from npprune.export.onnx import Int8Needs, OnnxForm, Producer, export_onnx, to_pixels
from npprune.export.parity import (
    Gate,
    Parity,
    compare_logits,
    cosine_score,
    failures_of,
    gates,
    require,
    top1_score,
    torch_logits,
)
from npprune.export.session import Session
from npprune.files import (
    check_file,
    check_folder,
    keeping,
    publish,
    refuse_overwriting,
    scratch,
    sha256_file,
    staging,
)
from npprune.models.features import giving
from npprune.models.info import model_info
from npprune.models.load import load_timm_folder, timm_code
from npprune.models.tokens import apply_tokens, tokens_of
from npprune.pipeline.common.inputs import (
    Network,
    class_names,
    dense_names,
    open_checkpoint,
    open_network,
)
from npprune.pipeline.common.outputs import reads_of, recordable
from npprune.pipeline.common.results import run_of, update_variant
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import open_dense
from npprune.pipeline.export.images import ExportImages, read_images, whole_batches
from npprune.recipe import DataSection, ExportSection, ModelSection, check
from npprune.records import CheckpointConfig, ClassInfo, ExportRecord, Preprocessing, Variant
from npprune.store import atomic
from npprune.store.checkpoints import is_checkpoint

STAGE = "export"
BATCHES = (1, 16)


def export_checkpoint(
    checkpoint: Path,
    data: DataSection,
    settings: ExportSection,
    *,
    out: Path | None = None,
    provider: str = "auto",
    dense_checkpoint: str | None = None,
    work: Work | None = None,
) -> ExportRecord:
    """Export a checkpoint, compare it on real images, time it beside the dense network.

    Without a data source in `data`, the images of the calibration set that the checkpoint
    remembers are used. Nothing that fails the comparison keeps the final name. Where the dense
    weights cannot be found and `dense_checkpoint` does not name them, there is no timing.

    Raises:
        GateError: the file does not agree with PyTorch.
        NpPruneError: what is wrong with checkpoint, images or target.
    """
    work = (work or Work()).on(STAGE).on_cpu()
    target = out or default_target(checkpoint, settings.format)
    reads = [*reads_of(checkpoint), *([dense_checkpoint] if dense_checkpoint else [])]
    _check(settings, provider, target, reads)
    network = open_checkpoint(checkpoint, work)
    config, own = network.config, network.info
    assert config is not None
    recorded = recordable(run_of(checkpoint, config, work), work)
    network = _for_file(network, settings)
    dense = _dense(config, checkpoint, settings, dense_checkpoint, work)
    read = read_images(
        network.info, config, data, settings.precision, work,
        num_classes=_label_space(config, dense), names=dense_names(config),
    )  # fmt: skip
    subject = _Subject(
        network, config.classes, read,
        Producer(config.source.architecture, config.plan_sha256, config.weights_sha256),
    )  # fmt: skip
    work.say(f"exporting {checkpoint.name} to {target}")
    record = _write(subject, settings, target, provider, work)
    if dense is not None:
        _time(record, subject, dense, settings, target, provider, work)

    def update(variant: Variant) -> None:
        old = [variant.export] if variant.export is not None else []
        old += variant.more_exports
        variant.export, variant.more_exports = record, [x for x in old if x.file != record.file]

    with keeping(record):
        atomic.write_json(record_path(target, settings.format), record)
        if recorded:
            update_variant(checkpoint, config, own, own, update, command=work.command)
    return record


def export_model(
    model: ModelSection,
    data: DataSection,
    settings: ExportSection,
    *,
    out: Path,
    provider: str = "auto",
    work: Work | None = None,
) -> ExportRecord:
    """Export a network as it is, on the same way as a checkpoint; there is nothing to time it
    beside.

    Raises:
        GateError: the file does not agree with PyTorch.
        NpPruneError: what is wrong with the network, images or target.
    """
    work = (work or Work()).on(STAGE).on_cpu()
    _check(settings, provider, out, reads_of(model))
    network = _for_file(open_network(model, work), settings)
    info = network.info
    read = read_images(
        info, None, data, settings.precision, work, num_classes=info.num_classes,
        names=network.names,
    )  # fmt: skip
    producer = Producer(info.source.architecture, weights_sha256=info.source.sha256)
    subject = _Subject(network, class_names(read.opened, info.num_classes), read, producer)
    work.say(f"exporting {info.source.architecture} to {out}")
    return _write(subject, settings, out, provider, work)


def _for_file(network: Network, settings: ExportSection) -> Network:
    """The network as the file is to have it.

    Raises:
        ModelError: its last block has to compute every token.
    """
    if settings.features is not None and settings.format in ("timm", "transformers"):
        raise UsageError(
            f"{setting('export.features')} does not go with "
            f"{setting('export.format', settings.format)}: the folder is the whole network",
            hint=f"leave it out, or use {setting('export.format', 'onnx')}",
        )
    if settings.format == "transformers" and network.info.num_classes == 0:
        raise ModelError(
            f"{setting('export.format', 'transformers')} writes a network for image "
            "classification, and this one has no classifier",
            hint=f"use {setting('export.format', 'onnx')} or {setting('export.format', 'timm')}",
        )
    if settings.max_drop is not None and network.info.num_classes == 0:
        raise UsageError(
            f"{setting('export.max_drop')} is in points of top-1, and there is no classifier",
            hint="leave it out: features are compared by error and cosine",
        )
    if settings.features is not None:
        giving(network.model, settings.features)  # refused before any image is read
    if settings.last_for_read:
        apply_tokens(network.model, tokens_of(network.model)[0], last=True)
        network.info = model_info(network.model, network.info.source)
    return network


def default_target(checkpoint: Path, format: str) -> Path:
    """Where an export goes when nothing is said: into the checkpoint's folder, or beside it."""
    if not SUFFIXES[format]:
        return checkpoint.with_name(f"{checkpoint.resolve().name}_{format}")
    return checkpoint / f"model{SUFFIXES[format]}"


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

    @property
    def gives_features(self) -> bool:
        return self.network.info.num_classes == 0


def _check(
    settings: ExportSection, provider: str, target: Path, reads: Sequence[str | Path]
) -> None:
    """What is wrong before anything is loaded."""
    check(settings)
    suffix = SUFFIXES[settings.format]
    if target.suffix != suffix and suffix:
        raise UsageError(
            f"`--out` must end in {suffix} for {setting('export.format', settings.format)}, "
            f"got `{target}`"
        )
    files = [target]
    if not suffix:
        files += [target / name for name in ("model.safetensors", "config.json")]
        check_folder(target, replaced=True)
    else:
        check_file(target)
    for path in files:
        refuse_overwriting(path, reads)
    if not suffix and is_checkpoint(target):
        raise StoreError(
            f"`{target}` is not replaced: it is a checkpoint of npprune",
            hint=f"choose another {setting('out')}",
        )
    if settings.format != "onnx" and provider != "auto":
        raise UsageError(
            f"`--provider {provider}` does not go with {setting('export.format', settings.format)}",
            hint=f"leave it out, or export with {setting('export.format', 'onnx')}",
        )


def _dense(
    config: CheckpointConfig,
    checkpoint: Path,
    settings: ExportSection,
    override: str | None,
    work: Work,
) -> Network | None:
    """The dense network to time beside; None where there is nothing to time or it is not there."""
    if config.prune is None or settings.format != "onnx" or not settings.latency:
        return None
    try:
        return open_dense(config, checkpoint, override, work)
    except ModelError as err:
        if override is not None:
            raise
        said = f"not timed against the dense network: {err.message}"
        work.warn(f"{said}; `--dense FILE` says where it is")
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
    subject: _Subject, settings: ExportSection, target: Path, provider: str, work: Work
) -> ExportRecord:
    """The file in the format asked for, compared before it gets its name."""
    read = subject.read
    if subject.gives_features:
        said = {**subject.producer.extra, "features": settings.features or "pooled"}
        subject.producer = replace(subject.producer, extra=said)
    if settings.format in ("timm", "transformers"):
        record = _write_folder(subject, target, settings.format)
    elif settings.format == "torch":
        record = to_torch_archive(
            _giving(subject.network, settings), subject.preprocessing, subject.classes,
            read.images, target, batch=settings.batch, producer=subject.producer,
            features=subject.gives_features,
        )  # fmt: skip
    else:
        record = _write_onnx(subject, settings, target, provider, work)
        record.details["provider_asked"] = provider
    if subject.gives_features and settings.format in ("onnx", "torch"):
        record.details["features"] = settings.features or "pooled"
    record.details["images"] = read.details()
    with keeping(record):  # before anything that may be interrupted: the file has its name
        atomic.write_json(record_path(target, settings.format), record)
    return record


def _write_onnx(
    subject: _Subject, settings: ExportSection, target: Path, provider: str, work: Work
) -> ExportRecord:
    read, form = subject.read, _form(settings, subject.network)
    gate = gates(form.output)[settings.precision]
    if settings.max_drop is not None:
        gate = replace(gate, max_drop=settings.max_drop)
    try:
        labels = None if subject.gives_features else read.labels
        return export_checked(
            _giving(subject.network, settings),
            subject.preprocessing,
            subject.classes,
            target,
            Comparison(read.images, labels, provider=provider, gate=gate),
            form,
            int8=_int8_needs(subject, settings, read.labels, work),
            producer=subject.producer,
        )
    except GateError as err:
        if settings.precision == "fp32":
            raise
        raise GateError(
            err.message,
            hint="no file was kept under that name; "
            f"{setting('export.max_drop', 'POINTS')} allows top-1 to fall more, and fp32 and fp16 "
            "lose less",
        ) from err


def _form(settings: ExportSection, network: Network) -> OnnxForm:
    """How the file is to be."""
    return OnnxForm(
        settings.opset, settings.batch, settings.precision, settings.with_preprocessing,
        output="logits" if network.info.num_classes else "features",
    )  # fmt: skip


def _giving(network: Network, settings: ExportSection) -> nn.Module:
    """What the file computes: the network, or one that gives the features asked for."""
    if network.info.num_classes:
        return network.model
    return giving(network.model, settings.features or "pooled")


def _int8_needs(
    subject: _Subject, settings: ExportSection, labels: torch.Tensor, work: Work
) -> Int8Needs | None:
    """Calibration images, and the accuracy on held-out ones by which candidates are chosen."""
    read = subject.read
    if settings.precision != "int8" or read.calibration is None:
        return None
    if subject.gives_features:
        model = _giving(subject.network, settings)
        cosine = cosine_score(model, read.images, subject.preprocessing)
        return Int8Needs(whole_batches(read.calibration, settings.batch), cosine)
    top1 = top1_score(read.images, labels, subject.preprocessing)

    def score(session: Session) -> float:
        share = top1(session)
        name = session.path.suffix.removeprefix(".")
        work.say(f"{name}: top-1 {100 * share:.2f} % on {len(labels)} held-out images")
        return share

    return Int8Needs(whole_batches(read.calibration, settings.batch), score)


def _write_folder(subject: _Subject, target: Path, format: str) -> ExportRecord:
    """A folder of timm or transformers, read back by these and compared before it is moved."""
    network, images = subject.network, subject.read.images
    gate = Gate()
    info = replace(network.info, preprocessing=subject.preprocessing)
    with staging(target) as folder:
        made = folder / "made"
        if format == "timm":
            if to_timm(network.model, info, subject.classes, made):
                bring(made, timm_code())
            loaded = load_timm_folder(made)
        else:
            made.mkdir()
            own = to_transformers(network.model, info, subject.classes, made, _origin(network))
            loaded = load_transformers(made, own)
        expected, found = (torch_logits(m, images) for m in (network.model, loaded))
        rows = [compare_logits(len(images), found, expected, features=subject.gives_features)]
        said = failures_of(rows, gate)
        require(Parity(rows, not said, gate, format, "", said), target.name)
        weights = made / "model.safetensors"
        record = ExportRecord(
            file=weights.name,
            format=format,
            precision="fp32",
            opset=0,
            bytes=sum(f.stat().st_size for f in made.iterdir()),
            sha256=sha256_file(weights),
            provider=format,
            parity=rows,
            tolerance=gate.tolerance or 0.0,
            passed=True,
            details={"files": sorted(f.name for f in made.iterdir())},
            hashes=hashes(made.iterdir()),
        )
        atomic.make_folder(target)
        publish(made, target / weights.name)
    return record


def _origin(network: Network) -> str:
    """A sentence for the model card."""
    config = network.config
    source = network.info.source
    name = source.architecture + (f", {Path(source.checkpoint).name}" if source.checkpoint else "")
    if config is None or config.prune is None:
        return f"The network {name}, as it is."
    return f"Pruned from {name}."


# ---------------------------------------------------------------- timing


def _time(
    record: ExportRecord,
    subject: _Subject,
    dense: Network,
    settings: ExportSection,
    target: Path,
    provider: str,
    work: Work,
) -> None:
    """Milliseconds beside the dense network, exported with the same settings; into the record."""
    work.say("timing it against the dense network")
    read = subject.read
    threads = torch.get_num_threads()
    feed = read.images[: max(BATCHES)]
    if settings.with_preprocessing:
        feed = to_pixels(feed, subject.preprocessing)
    with scratch() as folder:
        beside = folder / "dense.onnx"
        export_onnx(
            _giving(dense, settings),
            subject.preprocessing,
            [],
            beside,
            _form(settings, dense),
            int8=_int8_needs(subject, settings, read.source_labels, Work()),  # in silence
        )
        record.dense_bytes = sum(f.stat().st_size for f in folder.iterdir())
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
                work.warn(said)

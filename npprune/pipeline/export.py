"""Export: an ONNX file that ran, agreed with PyTorch on real images, and was timed."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from npprune.errors import UsageError
from npprune.export.bench import bench_pair, onnx_runner
from npprune.export.checked import export_checked
from npprune.export.onnx import Producer, export_onnx
from npprune.pipeline.evaluate import open_dense
from npprune.pipeline.events import Emit, Event, ignore
from npprune.pipeline.inputs import Network, open_checkpoint, open_images
from npprune.pipeline.results import update_variant
from npprune.recipe import DataSection, ExportSection
from npprune.records import ExportRecord, Variant
from npprune.store import atomic

STAGE = "export"
PARITY_IMAGES = 17
BATCHES = (1, 16)


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
    """Export a pruned checkpoint to ONNX, compare it on real images, time it beside the dense one.

    Without a data source in `data`, the images of the calibration set that the checkpoint
    remembers are used. Nothing that fails the comparison keeps the final name.

    Raises:
        GateError: the file does not agree with PyTorch.
        NpPruneError: what is wrong with checkpoint, images or target.
    """
    cpu = torch.device("cpu")
    pruned = open_checkpoint(checkpoint, cpu)
    config = pruned.config
    assert config is not None
    target = out or checkpoint / "model.onnx"
    if target.suffix != ".onnx":
        raise UsageError(f"`--out` must end in .onnx, got `{target}`")
    dense = open_dense(config, checkpoint, cpu, dense_checkpoint, emit)
    images = _images(pruned, dense, data, emit)
    emit(Event(STAGE, f"exporting {checkpoint.name} to {target}"))
    record = export_checked(
        pruned.model,
        config.preprocessing,
        config.classes,
        images,
        target,
        opset=settings.opset,
        precision=settings.precision,
        provider=provider,
        producer=Producer(
            architecture=config.source.architecture,
            plan_sha256=config.plan_sha256,
            weights_sha256=config.weights_sha256,
        ),
    )
    emit(Event(STAGE, "timing it beside the dense network"))
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "dense.onnx"
        export_onnx(dense.model, config.preprocessing, [], beside, opset=settings.opset)
        record.dense_bytes = sum(f.stat().st_size for f in Path(folder).iterdir())
        for b in BATCHES:
            pair = [
                onnx_runner(path, b, provider=provider, images=images.numpy())
                for path in (beside, target)
            ]
            record.latency.append(bench_pair(*pair))
    atomic.write_json(target.parent / _record_name(target), record)

    def update(variant: Variant) -> None:
        variant.export = record

    update_variant(checkpoint, config, pruned.info, dense.info, update, command=command)
    return record


def _record_name(target: Path) -> str:
    """`export.json` beside `model.onnx`; `NAME.export.json` beside another name."""
    return "export.json" if target.name == "model.onnx" else f"{target.stem}.export.json"


def _images(pruned: Network, dense: Network, data: DataSection, emit: Emit) -> Tensor:
    """A few real images, as the network gets them."""
    config = pruned.config
    assert config is not None
    spec = data.val or data.calibration or data.train
    if spec is None:
        remembered = config.details.get("data", {})
        data = DataSection.model_validate(remembered)
        spec = data.calibration or data.train
    opened = open_images(
        spec, data, dense.info, flag="--data", on_bad="skip", stage=STAGE, emit=emit,
        preprocessing=config.preprocessing,
    )  # fmt: skip
    found = [batch.images for batch in islice(opened.batches(PARITY_IMAGES), 1)]
    if not found:
        raise UsageError(f"no image of `{spec}` could be read")
    return torch.cat(found)

"""The whole safe way to an ONNX file: export, check, compare, and only then the final name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.export.beside import hashes
from npprune.export.onnx import (
    ONNX_FORM,
    Int8Needs,
    OnnxForm,
    Producer,
    export_onnx,
    pixel_input,
    to_pixels,
)
from npprune.export.parity import Gate, Parity, check_parity, gates, require
from npprune.files import publish, sha256_file, staging
from npprune.records import ClassInfo, ExportRecord, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Comparison:
    """What a file is compared with PyTorch on, and how near it has to come.

    images: real ones, normalised [n, 3, H, W]; labels: [n] where known. gate: None takes
    `GATES` of the file's precision.
    """

    images: Tensor
    labels: Tensor | None = None
    batch_sizes: Sequence[int] = (1, 3, 17)
    provider: str = "cpu"
    threads: int | None = None
    gate: Gate | None = None


def export_checked(
    model: nn.Module,
    preprocessing: Preprocessing,
    classes: list[ClassInfo],
    final_path: Path,
    comparison: Comparison,
    form: OnnxForm = ONNX_FORM,
    *,
    int8: Int8Needs | None = None,
    producer: Producer | None = None,
) -> ExportRecord:
    """Export `model`, compare it on images, and give it its name if it passes the gate.

    The work happens in a temporary folder beside `final_path`, so a failure leaves nothing new,
    and an earlier file of that name as it was. See `export_onnx` for the rest.

    Errors: ExportError where the file cannot be made; GateError (exit 1) where it does not agree.
    """
    final_path, images = Path(final_path), comparison.images
    with staging(final_path) as folder:
        path = folder / final_path.name
        candidates = export_onnx(
            model, preprocessing, classes, path, form, int8=int8, producer=producer
        )
        if form.with_preprocessing:
            model, images = pixel_input(model, preprocessing), to_pixels(images, preprocessing)
        parity = check_parity(
            model,
            path,
            images,
            batch_sizes=comparison.batch_sizes,
            provider=comparison.provider,
            threads=comparison.threads,
            gate=comparison.gate or gates(form.output)[form.precision],
            labels=comparison.labels,
            features=form.output == "features",
        )
        require(parity, final_path.name)
        record = _record(path, parity, form)
        record.details |= {"batch": form.batch, "with_preprocessing": form.with_preprocessing}
        if len(candidates) > 1:
            record.details["candidates"] = [vars(c) for c in candidates]
        publish(folder, final_path)
    return record


def _record(path: Path, parity: Parity, form: OnnxForm) -> ExportRecord:
    files = sorted(path.parent.iterdir())
    details: dict[str, Any] = {
        "min_agreement": parity.gate.min_agreement,
        "max_drop": parity.gate.max_drop,
        "torch_top1": parity.torch_top1,
        "onnx_top1": parity.onnx_top1,
        "provider_reason": parity.reason,
        "providers": parity.providers,
        "files": [f.name for f in files],
    }
    return ExportRecord(
        file=path.name,
        format="onnx",
        precision=form.precision,
        opset=form.opset,
        bytes=sum(f.stat().st_size for f in files),
        sha256=sha256_file(path),
        provider=parity.provider,
        parity=parity.rows,
        # JSON has no infinity: -1 stands for "no limit".
        tolerance=-1.0 if parity.gate.tolerance is None else parity.gate.tolerance,
        passed=parity.passed,
        details={key: value for key, value in details.items() if value is not None},
        hashes=hashes(files),
    )

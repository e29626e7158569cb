"""The whole safe way to an ONNX file: export, check, compare, and only then the final name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.export.onnx import Producer, export_onnx, pixel_input, to_pixels
from npprune.export.parity import GATES, Gate, Parity, check_parity, require
from npprune.export.session import Session
from npprune.files import publish, sha256_file, staging
from npprune.records import ClassInfo, ExportRecord, Preprocessing
from npprune.words import Dynamic, FilePrecision

if TYPE_CHECKING:
    from torch import Tensor, nn


def export_checked(
    model: nn.Module,
    preprocessing: Preprocessing,
    classes: list[ClassInfo],
    images: Tensor,
    final_path: Path,
    *,
    opset: int = 20,
    batch: Dynamic | int = "dynamic",
    precision: FilePrecision = "fp32",
    with_preprocessing: bool = False,
    calibration: Tensor | None = None,
    score: Callable[[Session], float] | None = None,
    producer: Producer | None = None,
    labels: Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 3, 17),
    provider: str = "cpu",
    threads: int | None = None,
    gate: Gate | None = None,
    **options: Any,
) -> ExportRecord:
    """Export `model`, compare it on `images`, and give it its name if it passes the gate.

    `images`: real ones, normalised [n, 3, H, W], `labels` [n] where known. `gate`: None takes
    `GATES[precision]`. The work happens in a temporary folder beside `final_path`, so a failure
    leaves nothing new, and an earlier file of that name as it was. `calibration` and `score`
    serve `precision="int8"`, see `export_onnx`, which gets the other options too.

    Errors: ExportError where the file cannot be made; GateError (exit 1) where it does not agree.
    """
    final_path = Path(final_path)
    with staging(final_path) as folder:
        path = folder / final_path.name
        candidates = export_onnx(
            model,
            preprocessing,
            classes,
            path,
            opset=opset,
            batch=batch,
            precision=precision,
            with_preprocessing=with_preprocessing,
            calibration=calibration,
            score=score,
            producer=producer,
            **options,
        )
        if with_preprocessing:
            model, images = pixel_input(model, preprocessing), to_pixels(images, preprocessing)
        parity = check_parity(
            model,
            path,
            images,
            batch_sizes=batch_sizes,
            provider=provider,
            threads=threads,
            gate=gate or GATES[precision],
            labels=labels,
        )
        require(parity, final_path.name)
        record = _record(path, parity, precision, opset)
        record.details |= {"batch": batch, "with_preprocessing": with_preprocessing}
        if len(candidates) > 1:
            record.details["candidates"] = [vars(c) for c in candidates]
        publish(folder, final_path)
    return record


def _record(path: Path, parity: Parity, precision: str, opset: int) -> ExportRecord:
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
        precision=precision,
        opset=opset,
        bytes=sum(f.stat().st_size for f in files),
        sha256=sha256_file(path),
        provider=parity.provider,
        parity=parity.rows,
        # JSON has no infinity: -1 stands for "no limit".
        tolerance=-1.0 if parity.gate.tolerance is None else parity.gate.tolerance,
        passed=parity.passed,
        details={key: value for key, value in details.items() if value is not None},
    )

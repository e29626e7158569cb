"""Other shapes to ship a network in: a `torch.export` archive, and timm's own checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import ExportError, setting
from npprune.export.beside import hashes
from npprune.export.onnx import Producer, first_line, frozen_copy, metadata, quiet, sample_input
from npprune.export.parity import Gate, Parity, compare_logits, failures_of, require, torch_logits
from npprune.files import publish, sha256_file, staging
from npprune.records import ClassInfo, ExportRecord, ModelInfo, ParityRow, Preprocessing
from npprune.words import Dynamic

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


def to_torch_archive(
    model: nn.Module,
    preprocessing: Preprocessing,
    classes: list[ClassInfo],
    images: Tensor,
    final_path: Path,
    *,
    batch: Dynamic | int = "dynamic",
    batch_sizes: Sequence[int] = (1, 3, 17),
    producer: Producer | None = None,
) -> ExportRecord:
    """Write a `torch.export` archive (.pt2), which `torch.export.load(path).module()` runs without
    npprune and without timm. Labels and preprocessing ride along as its extra files.

    It is loaded again and compared on the normalised `images` [n, 3, H, W] before it gets its
    name. Errors: ExportError where it cannot be traced, GateError where it does not agree.
    """
    final_path = Path(final_path)
    frozen = frozen_copy(model)
    extra = metadata(preprocessing, classes, producer or Producer())
    with staging(final_path) as folder:
        path = folder / final_path.name
        loaded = _write_archive(frozen, sample_input(preprocessing, batch), batch, path, extra)
        expected = torch_logits(frozen, images)
        sizes = batch_sizes if batch == "dynamic" else (int(batch),)
        rows = [compare_logits(b, _in_batches(loaded, images, b), expected) for b in sizes]
        gate = Gate()
        said = failures_of(rows, gate)
        require(Parity(rows, not said, gate, "torch.export", "", said), final_path.name)
        record = _record(path, rows, gate)
        publish(folder, final_path)
    return record


def _write_archive(
    model: nn.Module, sample: Tensor, batch: str | int, path: Path, extra: dict[str, str]
) -> Any:
    """Trace, anonymise, write, and read back what was written."""
    import torch

    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch == "dynamic" else None
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model, (sample,), dynamic_shapes=shapes)
            for node in program.graph.nodes:  # source lines of the exporting machine
                node.meta.pop("stack_trace", None)
            torch.export.save(program, path, extra_files=extra)
            return torch.export.load(path).module()
    except Exception as err:  # torch.export raises many kinds; all mean the same here
        raise ExportError(f"torch.export cannot trace the network: {first_line(err)}") from err


def _in_batches(network: Any, images: Tensor, batch: int) -> np.ndarray:
    import torch

    n = len(images)
    with torch.no_grad():
        parts = [network(images[torch.arange(i, i + batch) % n]) for i in range(0, n, batch)]
    logits: np.ndarray = torch.cat(parts)[:n].numpy()
    return logits


def _record(path: Path, rows: list[ParityRow], gate: Gate) -> ExportRecord:
    return ExportRecord(
        file=path.name,
        format="torch",
        precision="fp32",
        opset=0,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        provider="torch.export",
        parity=rows,
        tolerance=gate.tolerance or 0.0,
        passed=True,
        hashes=hashes([path]),
    )


def to_timm(
    model: nn.Module, info: ModelInfo, classes: list[ClassInfo], final_folder: Path
) -> list[Path]:
    """Write `model.safetensors` and `config.json` as timm reads them:
    `timm.create_model("local-dir:" + folder, pretrained=True)`. Returns the files.

    timm knows one hidden width for all blocks and heads that fill the width. Errors: ExportError
    names what does not fit.
    """
    from safetensors.torch import save_file

    if info.merged is not None:
        raise ExportError(
            "timm's networks merge no tokens, and this one does",
            hint="export to ONNX or a torch archive",
        )
    if info.cls_widths is not None:
        raise ExportError(
            "timm's networks have one MLP per block, and here the class token has one of its own",
            hint="export to ONNX or a torch archive",
        )
    if any(name.startswith("layers.") for name in model.state_dict()):
        raise ExportError(
            "a folder in timm's format is written of networks with one width, and this one has "
            "stages",
            hint="export to ONNX or a torch archive",
        )
    ratio = _mlp_ratio(info)
    tensors = {k: v.contiguous() for k, v in frozen_copy(model).state_dict().items()}
    for name, tensor in tensors.items():
        parts = {"attn.qkv.weight": 3, "attn.q_proj.weight": 1}
        count = next((n for end, n in parts.items() if name.endswith(end)), 0)
        if count and tensor.shape[0] != count * info.embed_dim:
            raise ExportError(
                f"timm's attention is as wide as the stream ({info.embed_dim}): `{name}` gives "
                f"{tensor.shape[0] // count}",
                hint="attention was made smaller: export to ONNX or a torch archive",
            )
    pre = info.preprocessing
    config = {
        "architecture": info.source.architecture.split(".")[0],
        "num_classes": info.num_classes,
        "model_args": {**info.source.model_args, "mlp_ratio": ratio},
        "pretrained_cfg": {
            "input_size": list(pre.input_size),
            "mean": list(pre.mean),
            "std": list(pre.std),
            "interpolation": pre.interpolation,
            "crop_pct": pre.crop_pct,
            "crop_mode": pre.crop_mode,
            "num_classes": info.num_classes,
            "label_names": [c.name for c in classes],
        },
    }
    final_folder = Path(final_folder)
    with staging(final_folder / "model.safetensors") as folder:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        publish(folder, final_folder / "model.safetensors")
    return [final_folder / "model.safetensors", final_folder / "config.json"]


def _mlp_ratio(info: ModelInfo) -> float:
    """The ratio that gives back the hidden width when timm computes int(width x ratio)."""
    if len(set(info.widths)) != 1:
        raise ExportError(
            "timm has one hidden width for all blocks, this network has "
            f"{min(info.widths)} to {max(info.widths)}",
            hint=f"prune with {setting('prune.selection', 'uniform')}, or export to ONNX or a "
            "torch archive",
        )
    hidden = info.widths[0]
    ratio = hidden / info.embed_dim
    if int(info.embed_dim * ratio) != hidden:
        ratio = (hidden + 0.5) / info.embed_dim  # the division rounded down
    return ratio

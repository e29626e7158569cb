"""Other shapes to ship a network in: a `torch.export` archive, and timm's own checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import ExportError
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
    features: bool = False,
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
        rows = [
            compare_logits(b, _in_batches(loaded, images, b), expected, features=features)
            for b in sizes
        ]
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
) -> bool:
    """Write `model.safetensors` and `config.json` as timm reads them:
    `timm.create_model("local-dir:" + folder, pretrained=True)`.

    timm knows one hidden width for all blocks, heads that fill the width, and no merging. Another
    network is described as `npprune_vit`, which `npprune_timm.py` teaches it.

    Returns:
        whether the folder needs that file.
    """
    from safetensors.torch import save_file

    if any(name.startswith("layers.") for name in model.state_dict()):
        raise ExportError(
            "a folder in timm's format is written of networks with one width, and this one has "
            "stages",
            hint="export to ONNX or a torch archive",
        )
    tensors = {k: v.contiguous() for k, v in frozen_copy(model).state_dict().items()}
    name, args = info.source.architecture.split(".")[0], dict(info.source.model_args)
    own = not _is_timms(info, tensors)
    if own:
        args = _described(model, info, tensors, name, args)
    else:
        args["mlp_ratio"] = _mlp_ratio(info)
    pre, cfg = info.preprocessing, getattr(model, "default_cfg", None) or {}
    config = {
        "architecture": "npprune_vit" if own else name,
        "num_classes": info.num_classes,
        "model_args": args,
        "pretrained_cfg": {
            **{k: cfg[k] for k in ("first_conv", "classifier") if own and k in cfg},
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
    return own


def _is_timms(info: ModelInfo, tensors: dict[str, Tensor]) -> bool:
    """Whether timm's own arguments can say it."""
    alike = len(set(info.widths)) == 1 and not _narrower(info, tensors)
    return alike and info.merged is None and info.cls_widths is None


def _described(
    model: Any, info: ModelInfo, tensors: dict[str, Tensor], base: str, args: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `npprune_vit`."""
    blocks = list(model.blocks)
    linear = [f"blocks.{l}.{n}" for l in range(len(blocks)) for n in ("mlp", "attn")]
    own = [l for l, width in enumerate(info.cls_widths or []) if width]
    options = getattr(blocks[-1], "token_options", None)
    changed = info.merged is not None or _narrower(info, tensors) or options is not None
    if changed or own:
        _check_plain(blocks)
    values = [b.attn.proj.in_features // h for b, h in zip(blocks, info.heads, strict=True)]
    sizes = zip(info.heads, info.query_dims or values, values, strict=True)
    return {
        "base": base,
        "base_args": args,
        "layers": {
            name.removesuffix(".weight"): list(tensor.shape)
            for name, tensor in tensors.items()
            if tensor.dim() == 2 and name.startswith(tuple(linear))
        },
        "attention": [list(row) for row in sizes] if changed else [],
        "cls": own,
        "cls_tokens": int(blocks[own[0]].mlp.own_tokens) if own else 1,
        "merged": info.merged or [],
        "read": (options.read or 0) if options is not None else 0,
        "follow": bool(options.follow) if options is not None else False,
    }


def _narrower(info: ModelInfo, tensors: dict[str, Tensor]) -> bool:
    """Whether some block's attention is smaller than timm's."""
    parts = {"attn.qkv.weight": 3, "attn.q_proj.weight": 1}
    return any(
        tensor.shape[0] != count * info.embed_dim
        for name, tensor in tensors.items()
        for end, count in parts.items()
        if name.endswith(end)
    )


def _check_plain(blocks: list[Any]) -> None:
    """ExportError, by name, for blocks that `npprune_timm.py` does not know smaller."""
    known = {
        "block": ("Block", "MergingBlock"),
        "attention": ("Attention", "NarrowAttention"),
        "MLP": ("Mlp", "OwnMlp", "GluMlp", "SwiGLU"),
    }
    for block in blocks:
        parts = {"block": block, "attention": block.attn, "MLP": block.mlp}
        for what, part in parts.items():
            if type(part).__name__ not in known[what] or getattr(part, "gate", None) is not None:
                raise ExportError(
                    f"smaller attention, merged tokens and own units are written for timm's plain "
                    f"blocks, and here the {what} is a {type(part).__name__}",
                    hint="export to ONNX or a torch archive",
                )


def _mlp_ratio(info: ModelInfo) -> float:
    """The ratio that gives back the hidden width when timm computes int(width x ratio)."""
    hidden = info.widths[0]
    ratio = hidden / info.embed_dim
    if int(info.embed_dim * ratio) != hidden:
        ratio = (hidden + 0.5) / info.embed_dim  # the division rounded down
    return ratio

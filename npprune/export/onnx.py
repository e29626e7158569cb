"""Write a classifier as an ONNX file that explains itself.

The graph is traced with `torch.export`, cleaned (`graph`), and carries its labels and its
preprocessing, so that the file alone is enough to classify an image (`predict`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npprune._version import __version__
from npprune.errors import ExportError
from npprune.export.graph import EXTERNAL_ABOVE, save, set_metadata, tidy
from npprune.records import ClassInfo, Preprocessing, to_dict
from npprune.words import Dynamic, FilePrecision

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from npprune.export.precision import Candidate
    from npprune.export.session import Session


@dataclass(frozen=True)
class Producer:
    """Where the network came from; written into the file's metadata."""

    architecture: str = ""
    plan_sha256: str = ""
    weights_sha256: str = ""
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxForm:
    """How a file is to be.

    batch: its size, or `dynamic`. with_preprocessing: it takes pixels as they are. Weights above
    `external_above` bytes go into a file of their own. output: what the output is called.
    """

    opset: int = 20
    batch: Dynamic | int = "dynamic"
    precision: FilePrecision = "fp32"
    with_preprocessing: bool = False
    external_above: int = EXTERNAL_ABOVE
    output: Literal["logits", "features"] = "logits"


ONNX_FORM = OnnxForm()


@dataclass(frozen=True)
class Int8Needs:
    """What int8 needs: normalised images [n, 3, H, W] to calibrate with, and a score of an open
    session, higher is better."""

    calibration: Tensor
    score: Callable[[Session], float]


def metadata(
    preprocessing: Preprocessing, classes: list[ClassInfo], producer: Producer
) -> dict[str, str]:
    """What the file says of itself: JSON under `labels` and `preprocessing`, the rest as text."""
    labels = [{"index": c.index, "name": c.name, "synset": c.synset} for c in classes]
    text = {
        "labels": json.dumps(labels, ensure_ascii=False),
        "preprocessing": json.dumps(to_dict(preprocessing)),
        "npprune_version": __version__,
        "architecture": producer.architecture,
        "plan_sha256": producer.plan_sha256,
        "weights_sha256": producer.weights_sha256,
        **producer.extra,
    }
    return {key: value for key, value in text.items() if value}


def export_onnx(
    model: nn.Module,
    preprocessing: Preprocessing,
    classes: list[ClassInfo],
    path: Path,
    form: OnnxForm = ONNX_FORM,
    *,
    int8: Int8Needs | None = None,
    producer: Producer | None = None,
) -> list[Candidate]:
    """Trace `model` in float32 on the CPU and write it to `path`, checked by `onnx.checker`.

    Input `images` float32 [batch, 3, H, W], normalised; with `with_preprocessing` instead `pixels`
    uint8 [batch, H, W, 3], as read from an image of the right size. Output `logits`
    [batch, classes], or `features` [batch, ...]. Large weights go to `path` + `.data`, which must
    stay beside it under that name.

    Precision fp16 keeps float32 at input and output. int8 makes several candidates
    (`precision.to_int8`) from the calibration images, keeps the one that the score prefers, and
    returns all of them with their scores, the kept one marked; the list is empty otherwise.

    Errors: UsageError where int8 lacks its images or its score; ExportError if the classes do not
    match the logits, if the batch size cannot be left open, or if the graph cannot be traced.
    """
    frozen = frozen_copy(model)
    names = set(frozen.state_dict())
    if form.with_preprocessing:
        frozen = pixel_input(frozen, preprocessing)
    sample = sample_input(preprocessing, form.batch, form.with_preprocessing)
    proto = _trace(frozen, sample, form.opset, form.batch, form.output)
    outputs = proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    if classes and outputs != len(classes):
        raise ExportError(
            f"`classes` must name every output: the network has {outputs}, got {len(classes)}",
            hint="the checkpoint's class list and its head do not belong together",
        )
    tidy(proto, names, prefix="model." if form.with_preprocessing else "")
    origin = producer or Producer()
    proto.graph.name = origin.architecture or "network"
    proto.producer_name, proto.producer_version = "npprune", __version__
    set_metadata(proto, metadata(preprocessing, classes, origin))
    save(proto, path, external_above=form.external_above)
    if form.precision == "fp32":
        return []
    from npprune.export import precision as smaller

    if form.precision == "fp16":
        smaller.to_half(path, external_above=form.external_above)
        return []
    if int8 is not None and form.with_preprocessing:
        int8 = replace(int8, calibration=to_pixels(int8.calibration, preprocessing))
    return smaller.to_int8(path, int8)


def pixel_input(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """`model` behind uint8 pixels [b, H, W, 3]: scaled by 1/255, then normalised, in the order
    torchvision's ToTensor and Normalize use, so that the logits are the same bits."""
    import torch
    from torch import nn

    class PixelInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.mean: Tensor
            self.std: Tensor
            shape = (1, -1, 1, 1)
            self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(shape))
            self.register_buffer("std", torch.tensor(preprocessing.std).reshape(shape))

        def forward(self, pixels: Tensor) -> Any:
            images = pixels.permute(0, 3, 1, 2).to(torch.float32)
            return self.model((images / 255 - self.mean) / self.std)

    return PixelInput().eval()


def to_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The uint8 pixels [b, H, W, 3] that normalised images [b, 3, H, W] came from."""
    import torch

    mean = torch.tensor(preprocessing.mean).reshape(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std).reshape(1, -1, 1, 1)
    pixels = (images.cpu().float() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, in evaluation mode: what every export is made of."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


def sample_input(preprocessing: Preprocessing, batch: str | int, pixels: bool = False) -> Tensor:
    """Noise of the input's shape, to trace with."""
    import torch

    channels, height, width = preprocessing.input_size
    # Two images where the batch stays open: torch.export treats a size of one as a constant.
    b = 2 if batch == "dynamic" else int(batch)
    if b < 1:
        raise ExportError(f"`batch` must be `dynamic` or at least 1, got `{batch}`")
    generator = torch.Generator().manual_seed(0)
    if pixels:
        return torch.randint(
            0, 256, (b, height, width, channels), dtype=torch.uint8, generator=generator
        )
    return torch.randn(b, channels, height, width, generator=generator)


def _trace(
    model: nn.Module, sample: Tensor, opset: int, batch: str | int, output: str
) -> onnx.ModelProto:
    import torch

    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch == "dynamic" else None
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                model,
                (sample,),
                dynamo=True,
                opset_version=opset,
                input_names=["pixels" if sample.dtype == torch.uint8 else "images"],
                output_names=[output],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as err:  # the exporter raises many kinds; all mean the same here
        raise ExportError(
            f"the network cannot be traced for ONNX: {first_line(err)}",
            hint="torch.export must be able to trace it with an open batch size"
            if batch == "dynamic"
            else None,
        ) from err
    assert program is not None
    proto = program.model_proto
    got = {o.domain: o.version for o in proto.opset_import}
    if got.get("") != opset:
        raise ExportError(
            f"`opset` {opset} was asked for, the exporter gave {got.get('')}",
            hint="opset 20 is what npprune is tested with",
        )
    if len(proto.graph.output) != 1:
        raise ExportError(
            f"a network has one output, the traced network has {len(proto.graph.output)}"
        )
    first = proto.graph.output[0].type.tensor_type.shape.dim[0]
    if batch == "dynamic" and not first.dim_param:
        raise ExportError(
            f"the batch size became a constant ({first.dim_value}) when the network was traced",
            hint="export with a fixed batch size",
        )
    return proto


def first_line(err: BaseException) -> str:
    """The innermost cause in one line: the exporter wraps errors in pages of advice."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0][:200] if lines else 'no message'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No chatter of the exporter on stdout, stderr, in warnings or in the log."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)

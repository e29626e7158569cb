"""Smaller numbers in an exported file: half precision, and eight-bit integers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npprune.errors import UsageError, setting
from npprune.export.graph import EXTERNAL_ABOVE, save, set_metadata, sort_nodes
from npprune.export.session import open_session

if TYPE_CHECKING:
    import numpy as np

    from npprune.export.onnx import Int8Needs


@dataclass(frozen=True)
class Candidate:
    """One way of quantising: its size in bytes and its score, higher is better."""

    name: str  # int8-static | int8-static-mixed | int8-dynamic
    bytes: int
    score: float
    chosen: bool


def to_half(path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Rewrite `path` with weights and arithmetic in float16; input and output stay float32."""
    import onnx

    with _quiet():
        from onnxruntime.transformers.float16 import convert_float_to_float16

        proto = onnx.load(str(path))
        known = {p.key: p.value for p in proto.metadata_props}
        # Pixels are scaled by 255 before they are normalised: those first steps stay as they are.
        blocked = [n.name for n in proto.graph.node if n.name.split("_")[0] in ("Div", "Sub")]
        half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=blocked)
    sort_nodes(half.graph)  # the converter appends its casts at the end
    set_metadata(half, {**known, "precision": "fp16"})
    save(half, path, external_above=external_above)


def to_int8(path: Path, needs: Int8Needs | None) -> list[Candidate]:
    """Rewrite `path` as the best of its eight-bit versions; returns all with their scores.

    Weights of the linear layers become integers per output channel, of seven of the eight bits:
    processors without VNNI add two products in sixteen bits, which those of eight would overflow,
    and a file must say the same wherever it runs. Attention's products, softmax,
    norms and the patch embedding stay in float32. *static*: activations in eight bits too, with
    ranges from the calibration images; *static-mixed*: the same, but the second layer of each
    MLP and the classifier stay in float32 (after GELU a few large values take up the whole
    range); *dynamic*: ranges are found at run time. Of equal scores the smaller file wins.
    """
    if needs is None or len(needs.calibration) == 0:
        raise UsageError(
            f"{setting('export.precision', 'int8')} needs images to calibrate with, and a score of "
            "held-out images to choose by"
        )
    linear = _linear_nodes(path)
    calm = [n for n in linear if ".mlp.fc2/" in n or ".mlp.w3/" in n or n.startswith("head")]
    mixed = [n for n in linear if n not in calm]
    images = needs.calibration.cpu().numpy()
    ways: dict[str, Callable[[Path], None]] = {
        "int8-static": lambda target: _static(path, target, images, linear),
        "int8-static-mixed": lambda target: _static(path, target, images, mixed),
        "int8-dynamic": lambda target: _dynamic(path, target, linear),
    }
    made = {}
    for name, write in ways.items():
        target = path.with_name(f"{path.name}.{name}")
        with _quiet():
            write(target)
        _restamp(path, target, name)
        made[name] = (
            target,
            target.stat().st_size,
            needs.score(open_session(target, "cpu", timed=False)),
        )
    best = max(made, key=lambda n: (made[n][2], -made[n][1]))
    os.replace(made[best][0], path)
    for target, _, _ in made.values():
        target.unlink(missing_ok=True)
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    return [Candidate(n, size, value, n == best) for n, (_, size, value) in made.items()]


def _linear_nodes(path: Path) -> list[str]:
    """The matrix products with a weight: the linear layers."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {t.name for t in graph.initializer}
    return [
        n.name
        for n in graph.node
        if n.op_type in ("MatMul", "Gemm") and any(i in weights for i in n.input)
    ]


def _static(path: Path, target: Path, images: np.ndarray, nodes: list[str]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    session = open_session(path, "cpu")
    name, batch = session.input_name, session.fixed_batch or 1

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.position = 0

        def get_next(self) -> dict[str, Any] | None:
            part = images[self.position : self.position + batch]
            self.position += batch
            return {name: part} if len(part) == batch else None

    quantize_static(
        str(path),
        str(target),
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_quantize=nodes,
        op_types_to_quantize=["MatMul", "Gemm"],
        # One outlier image would widen every range: average the images' ranges instead.
        extra_options={"CalibMovingAverage": True, "WeightSymmetric": True},
    )


def _dynamic(path: Path, target: Path, nodes: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(path),
        str(target),
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def _restamp(source: Path, target: Path, name: str) -> None:
    """Our producer and metadata on what the quantiser wrote, and the checker's word on it."""
    import onnx

    original = onnx.load(str(source), load_external_data=False)
    proto = onnx.load(str(target))
    proto.producer_name, proto.producer_version = original.producer_name, original.producer_version
    known = {p.key: p.value for p in original.metadata_props}
    set_metadata(proto, {**known, "precision": name})
    save(proto, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters log advice to the root logger and to stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

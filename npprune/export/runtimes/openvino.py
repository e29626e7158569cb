"""OpenVINO: exported ONNX files on a processor; an optional extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npprune.errors import DeviceError, ExportError
from npprune.export.runtimes.base import Opened, Runtime, Served
from npprune.export.session import refuse_loops

if TYPE_CHECKING:
    import numpy as np

INSTALL = "pip install openvino"
_KINDS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}  # of what is not quantised


class OpenVino(Runtime):
    """`openvino`. int8 runs the quantised ONNX file; bf16 and fp16 compute in it from the file in
    float32, where the processor has such products."""

    name = "openvino"
    precisions = ("fp32", "bf16", "fp16", "int8")
    takes_files = True
    places = ("cpu",)

    def open(
        self,
        served: Served,
        batch: np.ndarray,
        *,
        precision: str = "fp32",
        place: str = "auto",
        threads: int | None = None,
        timed: bool = True,
    ) -> Opened:
        """See `Runtime.open`. Compiled for one batch size, and for latency: one stream."""
        if place not in ("auto", "cpu"):
            raise DeviceError(f"OpenVINO runs on the cpu here, and `{place}` was asked for")
        try:
            import openvino
        except ImportError as err:
            raise DeviceError(f"OpenVINO is not installed: {err}", hint=INSTALL) from err
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision in ("bf16", "fp16") and precision.upper() not in able:
            raise DeviceError(
                f"OpenVINO does not compute in {precision} on this processor "
                f"(it has {', '.join(able)})"
            )
        path = served.path("int8" if precision == "int8" else "fp32")
        refuse_loops(path)
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _KINDS[precision],
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(str(path))
            model.reshape(list(batch.shape))
            compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as err:
            said = " ".join(str(err).split())
            raise ExportError(f"{path} cannot be opened by OpenVINO: {said}") from err
        request = compiled.create_infer_request()
        return Opened(
            lambda images: lambda: request.infer([images], share_inputs=True),
            lambda results: results[0].copy(),  # type: ignore[index]
            "CPU",
            threads or 0,
        )

"""ONNX Runtime: any file that npprune exports, on a CPU, with CUDA or TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npprune.export.runtimes.base import Opened, Runtime, Served
from npprune.export.session import open_session

if TYPE_CHECKING:
    import numpy as np


class OnnxRuntime(Runtime):
    """`onnxruntime`."""

    name = "onnxruntime"
    precisions = ("fp32", "fp16", "int8")
    takes_files = True
    places = ("cpu", "cuda", "tensorrt")

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
        """See `Runtime.open`. A file takes batches of any size that it was exported for."""
        session = open_session(served.path(precision), place, threads, timed=timed)
        return Opened(
            lambda images: lambda: session.run(images),
            lambda logits: logits,  # type: ignore[arg-type,return-value]
            session.provider,
            session.threads,
        )

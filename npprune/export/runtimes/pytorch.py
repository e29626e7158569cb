"""PyTorch: the module as it is, or compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from npprune.errors import DeviceError, UsageError
from npprune.export.runtimes.base import Opened, Runtime, Served

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

COMPILED_SHAPES = 1024  # of one forward; PyTorch's own limit is 8, and a bench has more


class Eager(Runtime):
    """`torch`: the module as it is."""

    name = "torch"
    precisions = ("fp32", "bf16", "fp16")
    takes_files = False
    places = ("cpu", "cuda")

    def open(
        self,
        served: Served,
        batch: np.ndarray,
        *,
        precision: str = "fp32",
        place: str = "cpu",
        threads: int | None = None,
        timed: bool = True,
    ) -> Opened:
        """See `Runtime.open`. Half precisions hold weights, input and arithmetic in it. The module
        itself is moved to the device in float32, and a copy of it otherwise."""
        import torch

        if served.model is None:
            raise UsageError(
                f"`{self.name}` runs a checkpoint, and .onnx files were given",
                hint="give the folder that `npprune prune` wrote",
            )
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        model = served.model.eval()
        if precision != "fp32":
            model = copy.deepcopy(model).to(kind)
        run = self.ready(model.to(place))
        count = threads or torch.get_num_threads()

        def bind(images: np.ndarray) -> Any:
            tensor = torch.from_numpy(images).to(place, kind)

            def call() -> object:
                with torch.inference_mode(), torch_threads(count):
                    logits = run(tensor)
                    if tensor.is_cuda:
                        torch.cuda.synchronize(tensor.device)
                    return logits

            return call

        return Opened(bind, _read, str(torch.empty(0, device=place).device), count)

    def ready(self, model: nn.Module) -> Any:
        """What is called with the images."""
        return model


class Compiled(Eager):
    """`torch-compile`: the same, compiled for each shape at its first run."""

    name = "torch-compile"

    def ready(self, model: nn.Module) -> Any:
        """The compiled module: as one graph, so that nothing of it silently stays as it was."""
        import torch

        compiled = torch.compile(model, fullgraph=True, dynamic=False)

        def run(images: torch.Tensor) -> torch.Tensor:
            try:
                with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
                    logits: torch.Tensor = compiled(images)
            except Exception as err:  # compilers fail in ways of their own
                said = next((s for s in str(err).splitlines() if s.strip()), type(err).__name__)
                raise DeviceError(
                    f"torch.compile could not compile the network: {said.strip()}",
                    hint="on a CPU it needs a C++ compiler, such as g++; "
                    "the runtime `torch` runs the network as it is",
                ) from err
            return logits

        return run


def _read(logits: Any) -> np.ndarray:
    found: np.ndarray = logits.float().cpu().numpy()
    return found


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""One ONNX trace per network: torch takes seconds for it, and many tests export the same one."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Trace = Callable[..., Any]
_traced: dict[str, Any] = {}


def once(trace: Trace) -> Trace:
    """`trace(model, sample, opset, batch, output)`, anew only for what was not seen yet."""

    def traced(model: nn.Module, sample: Tensor, opset: int, batch: str | int, output: str) -> Any:
        key = _digest(model, [tuple(sample.shape), sample.dtype, opset, batch, output])
        if key not in _traced:
            _traced[key] = trace(model, sample, opset, batch, output)
        return copy.deepcopy(_traced[key])

    return traced


def _digest(model: nn.Module, form: list[Any]) -> str:
    """Of all that decides the graph: classes, settings and weights of every module."""
    digest = hashlib.sha256(repr(form).encode())
    for name, module in model.named_modules():
        settings = {
            k: getattr(v, "__qualname__", v)
            for k, v in vars(module).items()
            if not k.startswith("_") and not k.endswith("_cfg")
        }
        digest.update(repr((name, type(module), settings)).encode())
        for kind in (module._parameters, module._buffers):
            for own, tensor in kind.items():
                if tensor is not None:
                    digest.update(f"{own} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()

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
        key = digest(model, [tuple(sample.shape), sample.dtype, opset, batch, output])
        if key not in _traced:
            _traced[key] = trace(model, sample, opset, batch, output)
        return copy.deepcopy(_traced[key])

    return traced


def digest(model: nn.Module, form: list[Any], *, values: bool = True) -> str:
    """Of all that decides what a network does: classes, settings and weights of every module.

    values: False leaves out those of the weights, and what they decide.
    """
    found = hashlib.sha256(repr(form).encode())
    for name, module in model.named_modules():
        settings = {
            k: getattr(v, "__qualname__", v)
            for k, v in vars(module).items()
            if not k.startswith("_") and not k.endswith("_cfg")
        }
        found.update(repr((name, type(module), settings)).encode())
        for kind in (module._parameters, module._buffers):
            for own, tensor in kind.items():
                if tensor is not None:
                    found.update(f"{own} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    if values:
                        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()

"""Forward mode through a part of a network: its value, and its change as its input moves.

What `torch.func.jvp` gives, in half the time: that one multiplies the input of every linear layer
by the change of the weight too, which is zero, and the fused attention has no forward mode at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def value_and_tangent(
    f: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, dx: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """f(x), and the directional derivatives of its outputs at x along dx (shaped as x).

    The parameters stand still. Neither result is differentiable.
    """
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), _WrittenOut():
        outputs = [_unpack(y) for y in f(forward_ad.make_dual(x, dx))]
    return tuple(y for y, _ in outputs), tuple(dy for _, dy in outputs)


@cache
def load_rules() -> None:
    """PyTorch loads its rules of forward mode when they are first used, and warns of its own
    `torch.jit.script`: here without."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class _WrittenOut(TorchFunctionMode):
    """Linear layers and plain attention carry their tangent by the formulas below."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            return _linear(*args, **kwargs)
        if func is scaled_dot_product_attention and len(args) == 3 and not _options(kwargs):
            return _attention(*args)
        return func(*args, **kwargs)


def _options(kwargs: dict[str, Any]) -> bool:
    """Whether attention is asked for a mask, dropout or a scale."""
    return any(isinstance(v, Tensor) or v for v in kwargs.values())


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, dx = _unpack(input)
    return forward_ad.make_dual(linear(x, weight, bias), linear(dx, weight))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, queries [b, n, t, d]."""
    (q, dq), (k, dk), (v, dv) = (_unpack(x) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5
    q, dq = scale * q, scale * dq
    p = (q @ k.mT).softmax(-1)
    dp = p * (dq @ k.mT).add_(q @ dk.mT)
    dp -= p * dp.sum(-1, keepdim=True)
    return forward_ad.make_dual(p @ v, (dp @ v).add_(p @ dv))


def _unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    value, tangent = forward_ad.unpack_dual(x)
    return value, torch.zeros_like(value) if tangent is None else tangent

"""Giving a dense architecture the uneven sizes of a pruned network's tensors."""

from __future__ import annotations

import copy
import re
from typing import Any

from timm.layers import Attention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from npprune.core.view import Projections
from npprune.errors import ModelError
from npprune.models.attention import FewerHeads, NarrowAttention, check_attention, projections
from npprune.models.blocks import blocks_of
from npprune.models.own_units import check_own, give_own
from npprune.models.view import make_view

PRUNABLE = re.compile(
    r"(?:layers\.\d+\.)?blocks\.(\d+)\.(mlp\.(?:cls\.)?(fc1|fc1_g|fc1_x|fc2|norm)|attn\.(qkv|proj|[qkv]_proj|[qv]_bias))$"
)
"""The layers whose sizes pruning may change."""


def fit_to(model: nn.Module, tensors: dict[str, Tensor], *, heads: list[int]) -> None:
    """Resize, in place, the layers that pruning changes to the shapes of `tensors`.

    Args:
        tensors: a state dict of the pruned network.
        heads: attention heads per block.

    Raises:
        ModelError: the number of blocks or a size does not agree.
    """
    blocks = blocks_of(model)
    if len(heads) != len(blocks):
        raise ModelError(f"the network has {len(blocks)} blocks, got heads for {len(heads)}")
    for l, block in enumerate(blocks):
        if f"blocks.{l}.mlp.cls.fc2.weight" in tensors:
            tokens_read = make_view(model).tokens_read
            check_own(block.mlp, l, tokens_read)  # type: ignore[arg-type]
            give_own(block.mlp, copy.deepcopy(block.mlp), tokens_read or 1)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        weight = tensors.get(f"{name}.weight")
        if (
            PRUNABLE.match(name)
            and isinstance(module, nn.Linear)
            and weight is not None
            and weight.dim() == 2
        ):
            resize_linear(module, weight.shape[0], weight.shape[1], f"{name}.bias" in tensors)
        elif type(module) is EvaAttention and f"{name}.q_bias" in tensors:
            for part, like in (("q_bias", "q"), ("k_bias", "q"), ("v_bias", "v")):
                size = tensors[f"{name}.{like}_bias"].shape
                old = getattr(module, part)
                if old is not None and old.shape != size:
                    new = old.new_zeros(size)
                    setattr(module, part, nn.Parameter(new) if part != "k_bias" else new)
        elif PRUNABLE.match(name) and weight is not None and weight.dim() == 1:
            resize_norm(module, len(weight))
    for l, (block, count) in enumerate(zip(blocks, heads, strict=True)):
        attn: Any = block.attn
        if type(attn) is Attention:
            p = Projections(count, attn.qkv, attn.proj)
            q, v = p.query_dims, p.value_dims
            if count * v == attn.proj.in_features and 1 <= q <= v <= attn.head_dim:
                if v < attn.head_dim:
                    set_head_dim(attn, v)
                if q < v:
                    set_query_dim(block, q, l)
        set_heads(block.attn, count, l)  # type: ignore[arg-type]


def resize_linear(layer: nn.Linear, out_features: int, in_features: int, bias: bool) -> None:
    """Other sizes for a linear layer, in place, its values undefined where they change."""
    if tuple(layer.weight.shape) != (out_features, in_features):
        layer.weight = nn.Parameter(layer.weight.new_empty(out_features, in_features))
    if not bias:
        layer.bias = None  # type: ignore[assignment]
    elif layer.bias is None or layer.bias.shape != (out_features,):
        layer.bias = nn.Parameter(layer.weight.new_empty(out_features))
    layer.in_features, layer.out_features = in_features, out_features


def resize_norm(norm: Any, units: int) -> None:
    """As many units for a norm, in place, its values undefined where they change."""
    if norm.weight.shape != (units,):
        for name in [name for name, _ in norm.named_parameters()]:
            setattr(norm, name, nn.Parameter(getattr(norm, name).new_empty(units)))
        norm.normalized_shape = (units,)


def set_heads(attn: Any, count: int, l: int) -> None:
    """Tell an attention module that it has `count` heads left, each as wide as before.

    Raises:
        ModelError: its projections do not have that many heads, or its kind cannot lose any.
    """
    if count == attn.num_heads:
        return
    if projections(attn) is None:
        raise ModelError(
            f"block {l}: heads cannot be removed from {type(attn).__module__}."
            f"{type(attn).__name__}",
            hint="remove hidden units of the MLPs alone",
        )
    width = count * attn.head_dim
    rows = width + 2 * count * getattr(attn, "query_dim", attn.head_dim)
    layers = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj, attn.v_proj]
    there = sum(layer.out_features for layer in layers)
    if there != rows or attn.proj.in_features != width:
        raise ModelError(
            f"block {l}: {count} heads of {attn.head_dim} need a qkv of {rows} rows, got {there}"
        )
    if type(attn) is EvaAttention:
        attn.__class__ = FewerHeads
    if hasattr(attn, "num_kv_heads"):
        attn.num_kv_heads, attn.kv_dim = count, width
    # timm reads both; the scale belongs to the head's width, which stays.
    attn.num_heads, attn.attn_dim = count, width


def set_head_dim(attn: Any, head_dim: int) -> None:
    """Tell an attention module how many dimensions its heads have left, values as queries.

    Logits are divided by the root of it: whoever narrows folds the original scale into the weights.
    """
    attn.head_dim, attn.attn_dim = head_dim, attn.num_heads * head_dim
    attn.scale = head_dim**-0.5


def set_query_dim(block: nn.Module, query_dim: int, l: int) -> None:
    """Give a block an attention of so many query/key dimensions a head, over the same layers.

    Raises:
        ModelError: its kind of attention cannot have other queries than values.
    """
    attn: Any = block.attn
    check_attention(attn, l, "qk")
    block.attn = NarrowAttention(attn, query_dim)

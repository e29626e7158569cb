"""Attention that timm's own classes cannot be: queries and keys narrower than values, and fewer
heads in EVA's."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from npprune.core.view import Projections
from npprune.errors import ModelError
from npprune.models.blocks import blocks_of, is_linear


class NarrowAttention(nn.Module):
    """timm's `Attention` with `query_dim` query/key and `head_dim` value dimensions a head.

    Takes over the layers of the attention whose place it takes; `qkv` must then be given rows for
    its sizes. Logits are divided by the root of `query_dim` with both kernels: whoever narrows
    queries and keys folds the original scale into their weights.
    """

    def __init__(self, attn: Any, query_dim: int) -> None:
        super().__init__()
        self.num_heads: int = attn.num_heads
        self.head_dim: int = attn.head_dim
        self.attn_dim: int = attn.attn_dim
        self.query_dim = query_dim
        self.scale = query_dim**-0.5
        self.fused_attn: bool = attn.fused_attn
        self.qkv: nn.Linear = attn.qkv
        self.attn_drop: nn.Dropout = attn.attn_drop
        self.proj: nn.Linear = attn.proj
        self.proj_drop: nn.Dropout = attn.proj_drop
        self.train(attn.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        b, t, _ = x.shape
        n, q_dim, v_dim = self.num_heads, self.query_dim, self.head_dim
        parts = self.qkv(x).split([n * q_dim, n * q_dim, n * v_dim], dim=-1)
        q, k, v = (part.reshape(b, t, n, -1).transpose(1, 2) for part in parts)
        if self.fused_attn:
            x = scaled_dot_product_attention(
                q, k, v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=is_causal,
            )  # fmt: skip
        else:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            if is_causal:
                logits = logits + logits.new_full((t, t), float("-inf")).triu(1)
            elif attn_mask is not None and attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~attn_mask, float("-inf"))
            elif attn_mask is not None:
                logits = logits + attn_mask
            x = self.attn_drop(logits.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(b, t, self.attn_dim)
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class FewerHeads(EvaAttention):
    """timm's `EvaAttention` where some heads are gone: they are narrower together than the stream,
    which timm's cannot be. Layers and names are the same."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = queries_keys_values(self, x, x.shape[1])
        if rope is not None:
            n, half = self.num_prefix_tokens, bool(self.rotate_half)
            q, k = (
                torch.cat([z[:, :, :n], apply_rot_embed_cat(z[:, :, n:], rope, half=half)], 2)
                for z in (q, k)
            )
        out = scaled_dot_product_attention(
            q.type_as(v), k.type_as(v), v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


def queries_keys_values(attn: Any, z: Tensor, read: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens that are read, keys and values of all: [b, heads, t, dimensions]."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(z[:, :read]), attn.k_proj(z), attn.v_proj(z)
    else:
        values = attn.num_heads * attn.head_dim
        queries = attn.num_heads * getattr(attn, "query_dim", attn.head_dim)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        of_q, of_kv = (None, None) if bias is None else (bias[:queries], bias[queries:])
        q = linear(z[:, :read], weight[:queries], of_q)
        k, v = linear(z, weight[queries:], of_kv).split([queries, values], -1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    same = nn.Identity()
    return getattr(attn, "q_norm", same)(q), getattr(attn, "k_norm", same)(k), v


ROTARY = (EvaAttention, FewerHeads, AttentionRope)


def projections(attn: Any) -> Projections | None:
    """The layers of an attention whose heads can be told apart; None for other kinds."""
    layers = [getattr(attn, name, None) for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj")]
    if not all(layer is None or is_linear(layer) for layer in layers):
        return None
    if type(attn) in (Attention, NarrowAttention):
        return Projections(int(attn.num_heads), attn.qkv, attn.proj)
    if type(attn) in ROTARY and getattr(attn, "num_kv_groups", 1) == 1:
        return Projections(int(attn.num_heads), None, attn.proj)
    return None


def answer_first_query(attn: Any, x: Tensor) -> Tensor | None:
    """The attention's output for token 0 of x [b, t, d]: [b, 1, d]; None for kinds that have
    something between their projections and products.

    One query needs neither keys nor values of the tokens: q . (W_k x + b_k) = (W_k' q) . x + a
    constant, which softmax ignores, and the weights add up to 1, so values are projected after
    they are averaged.
    """
    found = projections(attn)
    between = [getattr(attn, name, nn.Identity()) for name in ("q_norm", "k_norm", "norm")]
    plain = all(isinstance(module, nn.Identity) for module in between)
    plain = plain and getattr(attn, "gate", None) is None
    if found is None or found.qkv is None or not plain or attn.training:
        return None
    w_q, w_k, w_v = found.split(found.qkv.weight)  # [n, q or v, d]
    bias = found.qkv.bias
    b_q, _, b_v = (0, 0, 0) if bias is None else found.split(bias)
    scale = found.query_dims**-0.5 if attn.fused_attn else attn.scale
    q = torch.einsum("bd,nqd->bnq", x[:, 0], w_q) + b_q
    weights = (torch.einsum("bnq,nqd->bnd", scale * q, w_k) @ x.transpose(1, 2)).softmax(-1)
    values = torch.einsum("bnd,nvd->bnv", weights @ x, w_v) + b_v
    return found.proj(values.flatten(1))[:, None]  # type: ignore[no-any-return]


def check_heads(model: Any, l: int, axis: str) -> None:
    """As `check_attention`, of a network's block."""
    if getattr(model, "rope_mixed", False):
        raise ModelError(
            f"block {l}: `{axis}` cannot be taken from {type(model).__name__}: each of its heads "
            "has rotary positions of its own",
            hint="remove hidden units of the MLPs alone",
        )
    check_attention(blocks_of(model)[l].attn, l, axis)


def check_attention(attn: Any, l: int, axis: str) -> None:
    """ModelError, with the reason, where block l's attention cannot lose what an axis takes."""
    what = "heads cannot be removed from" if axis == "heads" else f"`{axis}` cannot be narrowed in"
    if axis != "heads":
        reason = None
        if not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity):
            reason = f"a {type(attn.q_norm).__name__} between the projection and the product"
        elif "rope" in inspect.signature(attn.forward).parameters:
            reason = "rotary position embeddings between the projection and the product"
        if reason is not None:
            raise ModelError(
                f"block {l}: {what} {type(attn).__module__}.{type(attn).__name__}: its queries "
                f"and keys pass {reason}, which no smaller projection gives back",
                hint=f"leave `{axis}` out of the axes",
            )
    if axis == "head-dim" and isinstance(attn, NarrowAttention):
        raise ModelError(
            f"block {l}: {what} the network: its queries and keys have {attn.query_dim} dimensions "
            f"a head, its values {attn.head_dim}, and one number for all is what `head-dim` keeps",
            hint="prune the network that it was made from, or take `qk`",
        )
    plain = projections(attn) is not None
    plain = plain and isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)
    if not plain or getattr(attn, "gate", None) is not None:
        raise ModelError(
            f"block {l}: {what} {type(attn).__module__}.{type(attn).__name__} (another attention, "
            "or with a norm or gate on its output, or with layers that are not plain linear ones)",
            hint="remove hidden units of the MLPs alone",
        )

"""Blocks between whose attention and MLP tokens merge, and that may compute what is read alone.

The modules and parameters are timm's own. What merging needs to know travels with the stream from
block to block (`core.tokens.Tokens`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from npprune.core.tokens import Merge, Tokens, expanded, match, merge
from npprune.core.tokens import followed as itself
from npprune.errors import ModelError
from npprune.models.attention import FewerHeads, NarrowAttention, queries_keys_values
from npprune.models.blocks import blocks_of


@dataclass(frozen=True)
class TokenOptions:
    """What one block does with its tokens."""

    prefix: int  # class and register tokens, which never merge
    merged: int = 0
    read: int | None = None  # only the first so many tokens are computed; None: all
    follow: bool = False  # keep in mind which token holds each patch
    last: bool = False  # give back a plain tensor


class Merging(nn.Module):
    """What merging blocks have in common; with a plain tensor for a stream before the first."""

    token_options: TokenOptions

    def forward(
        self,
        x: Tensor | Tokens,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | Tokens:
        if attn_mask is not None or is_causal:
            raise ModelError("a network that merges tokens takes no attention mask")
        o = self.token_options
        tokens = followed(x, o.follow)
        y = attended(self, tokens, attend(self, tokens, rope, o.read))
        pairs = paired(self, tokens, y, o.merged, o.prefix)
        tokens = finish(self, tokens, y, pairs, rope)
        if not o.last:
            return tokens
        return expanded(tokens) if o.follow else tokens.x


class MergingBlock(Merging, Block):  # type: ignore[misc]
    """timm's `Block`, between whose attention and MLP tokens merge."""


class MergingEvaBlock(Merging, EvaBlock):  # type: ignore[misc]
    """timm's `EvaBlock`, between whose attention and MLP tokens merge."""


MERGING: dict[type[nn.Module], type[Merging]] = {Block: MergingBlock, EvaBlock: MergingEvaBlock}
ATTENTIONS = (Attention, NarrowAttention, EvaAttention, FewerHeads, AttentionRope)


def followed(x: Tensor | Tokens, follow: bool) -> Tokens:
    """The stream as tokens; where they are to be followed, each holds itself before the first
    merge."""
    tokens = x if isinstance(x, Tokens) else Tokens(x)
    if not follow or tokens.where is not None:
        return tokens
    return tokens._replace(where=itself(tokens.x).where)


def check_tokens(model: nn.Module, l: int) -> None:
    """ModelError, by name and with the reason, where tokens cannot merge at block l."""
    block = blocks_of(model)[l]
    attn, reason = block.attn, None
    if type(block) not in (*MERGING, *MERGING.values()):
        reason = f"{_name(block)} is another block than timm's plain ones"
    elif type(attn) not in ATTENTIONS:
        reason = (
            f"{_name(attn)} is another attention, or one with biases for each pair of positions"
        )
    elif getattr(attn, "num_kv_groups", 1) != 1:
        reason = f"{_name(attn)} shares keys and values between heads"
    elif getattr(model, "rope_mixed", False):
        reason = "its rotary positions differ from block to block"
    if reason is not None:
        raise ModelError(
            f"block {l} of {type(model).__name__}: tokens cannot merge: {reason}",
            hint="leave `tokens` out of the axes",
        )


def attend(
    block: Any, tokens: Tokens, rope: Tensor | None = None, read: int | None = None
) -> Tensor:
    """The output of a block's attention, [b, t, d], or that of the `read` first tokens.

    rope: the rotary embedding of the whole image [n, c], where the block is called with one.
    """
    attn, z = block.attn, block.norm1(tokens.x)
    if tokens.rotary is not None:
        rope = tokens.rotary[:, None, attn.num_prefix_tokens :]
    bias = None if tokens.sizes is None else tokens.sizes.log()[:, None, None].to(z)
    if read is not None:
        return _answer(attn, z, read, rope, bias)
    options = {} if rope is None else {"rope": rope}
    return attn(z, attn_mask=bias, **options)  # type: ignore[no-any-return]


def attended(block: Any, tokens: Tokens, attention: Tensor) -> Tensor:
    """The stream between attention and MLP: as many tokens as the attention answered."""
    return tokens.x[:, : attention.shape[1]] + _scaled(block, 1, attention)


def paired(block: Any, tokens: Tokens, y: Tensor, merged: int, prefix: int) -> Merge | None:
    """Which tokens merge, y being the stream between attention and MLP."""
    return match(block.norm2(y), tokens.sizes, merged, prefix) if merged else None


def finish(
    block: Any, tokens: Tokens, y: Tensor, pairs: Merge | None = None, rope: Tensor | None = None
) -> Tokens:
    """The rest of a block, y being the stream between attention and MLP: merging, and the MLP."""
    if y.shape[1] < tokens.x.shape[1]:  # only what is read goes on
        tokens = Tokens(y)
    tokens = tokens._replace(x=y)
    if pairs is not None:
        if rope is not None and tokens.rotary is None:
            rows = pad(rope, (0, 0, pairs.prefix, 0))  # tokens before the patches do not turn
            tokens = tokens._replace(rotary=rows.expand(y.shape[0], -1, -1))
        tokens = merge(tokens, pairs)
    x = tokens.x
    return tokens._replace(x=x + _scaled(block, 2, block.mlp(block.norm2(x))))


def _answer(attn: Any, z: Tensor, read: int, rope: Tensor | None, bias: Tensor | None) -> Tensor:
    """The attention's output for the first tokens alone, none of which is a patch: [b, read, d]."""
    q, k, v = queries_keys_values(attn, z, read)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, bool(attn.rotate_half)
        turned = apply_rot_embed_cat(k[:, :, prefix:], rope, half=half)
        k = torch.cat([k[:, :, :prefix], turned], 2).type_as(v)
        q = q.type_as(v)
    out = scaled_dot_product_attention(
        q, k, v,
        attn_mask=bias,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        scale=None if attn.fused_attn else attn.scale,  # as timm has it
    )  # fmt: skip
    out = getattr(attn, "norm", nn.Identity())(out.transpose(1, 2).flatten(2))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(z[:, :read]).sigmoid()
    return attn.proj_drop(attn.proj(out))  # type: ignore[no-any-return]


def _scaled(block: Any, i: int, y: Tensor) -> Tensor:
    """A branch's output after LayerScale and stochastic depth."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{i}")
        y = y if gamma is None else gamma * y
    else:
        y = getattr(block, f"ls{i}")(y)
    return getattr(block, f"drop_path{i}")(y)  # type: ignore[no-any-return]


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"

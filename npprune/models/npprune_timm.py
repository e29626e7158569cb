"""A pruned vision transformer for timm: its blocks differ in width, and may merge tokens.

Written beside the weights by `npprune export --format timm`; needs timm alone. With the folder on
Python's path,

    import npprune_timm, timm
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

gives the pruned network, a `VisionTransformer` of timm's with other sizes. Other `num_classes` give
it a new classifier, as with every network of timm's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import Attention, Mlp
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

try:
    from npprune_tokens import Tokens, expanded, followed, match, merge
except ImportError:  # within npprune
    from npprune.core.tokens import Tokens, expanded, followed, match, merge


@register_model
def npprune_vit(
    pretrained: bool = False,
    *,
    base: str,
    base_args: Mapping[str, Any],
    layers: Mapping[str, Sequence[int]],
    attention: Sequence[Sequence[int]] = (),
    cls: Sequence[int] = (),
    cls_tokens: int = 1,
    merged: Sequence[int] = (),
    read: int = 0,
    follow: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The network of one folder.

    Args:
        base, base_args: timm's network that was pruned.
        layers: [outputs, inputs] of each linear layer that has another size.
        attention: per block, heads and the query and value dimensions of each; empty: timm's.
        cls, cls_tokens: blocks in which the first so many tokens have an MLP of their own.
        merged: per block, patch tokens that merge; empty: in none.
        read: tokens that the last block computes; 0: all.
        follow: the classifier reads patches, so each gets its token back.
    """
    config = resolve_pretrained_cfg("npprune_vit", pretrained_cfg, pretrained_cfg_overlay)
    classes = kwargs.pop("num_classes", config.num_classes)
    model: Any = timm.create_model(base, **{**base_args, **kwargs, "num_classes": classes})
    for l in cls:
        mlp = model.blocks[l].mlp
        mlp.cls, mlp.first = copy.deepcopy(mlp), cls_tokens
        mlp.__class__ = OwnMlp
    for name, (outputs, inputs) in layers.items():
        parent, _, last = name.rpartition(".")
        has_bias = model.get_submodule(name).bias is not None
        setattr(model.get_submodule(parent), last, nn.Linear(inputs, outputs, bias=has_bias))
    for block, (heads, query, value) in zip(model.blocks, attention, strict=False):
        attn = block.attn
        attn.num_heads, attn.query_dim, attn.head_dim = heads, query, value
        attn.attn_dim, attn.scale = heads * value, query**-0.5
        attn.__class__ = PrunedAttention
        block.__class__ = PrunedBlock
        block.merged, block.prefix, block.read, block.follow = 0, 0, None, follow
        block.last = False
    if attention:
        for block, count in zip(model.blocks, merged, strict=False):
            block.merged, block.prefix = count, model.num_prefix_tokens
        model.blocks[-1].read, model.blocks[-1].last = read or None, True
    model.pretrained_cfg = model.default_cfg = config.to_dict()
    if pretrained:
        channels = model.patch_embed.proj.in_channels
        load_pretrained(model, model.pretrained_cfg, classes, channels, cache_dir=cache_dir)
    return model  # type: ignore[no-any-return]


class PrunedAttention(Attention):  # type: ignore[misc]
    """Heads of `query_dim` query and `head_dim` value dimensions."""

    num_heads: int
    query_dim: int
    head_dim: int

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        read: int | None = None,
    ) -> Tensor:
        n, q_dim, v_dim = self.num_heads, self.query_dim, self.head_dim
        parts = self.qkv(x).split([n * q_dim, n * q_dim, n * v_dim], -1)
        q, k, v = (part.unflatten(-1, (n, -1)).transpose(1, 2) for part in parts)
        q, k = self.q_norm(q[:, :, :read]), self.k_norm(k)
        dropped = self.attn_drop.p if self.training else 0.0
        x = scaled_dot_product_attention(q, k, v, attn_mask, dropped, is_causal)
        x = self.norm(x.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class PrunedBlock(Block):  # type: ignore[misc]
    """Patch tokens merge between attention and MLP; a plain tensor before the first and after the
    last."""

    def forward(
        self, x: Tensor | Tokens, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | Tokens:
        if isinstance(x, Tensor):
            x = followed(x) if self.follow else Tokens(x)
        tokens = x
        z = self.norm1(tokens.x)
        if tokens.sizes is not None:
            attn_mask = tokens.sizes.log()[:, None, None].to(z)
        y = self.attn(z, attn_mask, is_causal, self.read)
        x = tokens.x[:, : self.read] + self.drop_path1(self.ls1(y))
        tokens = Tokens(x) if self.read else tokens._replace(x=x)
        if self.merged:
            tokens = merge(tokens, match(self.norm2(x), tokens.sizes, self.merged, self.prefix))
        x = tokens.x
        tokens = tokens._replace(x=x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        if not self.last:
            return tokens
        return tokens.x if tokens.where is None else expanded(tokens)


class OwnMlp(Mlp):  # type: ignore[misc]
    """The first tokens have hidden units of their own."""

    cls: nn.Module
    first: int

    def forward(self, x: Tensor) -> Tensor:
        own, rest = x[:, : self.first], x[:, self.first :]
        return torch.cat([self.cls(own), super().forward(rest)], 1)

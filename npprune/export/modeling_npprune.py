"""A plain vision transformer whose blocks differ in width and may merge tokens, for `transformers`.

Written beside the weights by `npprune export --format transformers`; needs torch and transformers
alone. Tensors have the names of timm's vision transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutput

from .npprune_tokens import Tokens, expanded, followed, match, merge


class NpPruneViTConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes: lists have one entry for each block."""

    model_type = "npprune_vit"

    def __init__(
        self,
        image_size: Any = (224, 224),
        patch_size: Any = (16, 16),
        num_channels: int = 3,
        hidden_size: int = 768,
        intermediate_sizes: Any = (3072,),
        attention_heads: Any = (12,),
        query_dims: Any = (64,),
        value_dims: Any = (64,),
        hidden_act: str = "gelu",
        gated: str = "",  # "first" or "last": the half that passes the activation
        layer_norm_eps: float = 1e-6,
        prefix: Any = ("cls_token",),  # tensors of tokens before the patches, in order
        prefix_tokens: int = 1,
        positions: str = "all",  # "patches": prefix tokens have none
        patch_bias: bool = True,
        qkv_bias: Any = (True,),
        layer_scale: bool = False,
        norms: Any = ("norm",),  # of norm_pre, norm, fc_norm
        pooling: str = "token",  # token | avg | all | class+patches | distilled
        cls_sizes: Any = (),  # hidden units of the tokens that are read; 0: they share; empty: all
        merged: Any = (),  # patch tokens that merge; empty: in no block
        read: int = 0,  # tokens that the last block computes; 0: all
        **kwargs: Any,
    ) -> None:
        self.image_size, self.patch_size = list(image_size), list(patch_size)
        self.num_channels, self.hidden_size = num_channels, hidden_size
        self.intermediate_sizes = list(intermediate_sizes)
        self.attention_heads = list(attention_heads)
        self.query_dims, self.value_dims = list(query_dims), list(value_dims)
        self.hidden_act, self.gated, self.layer_norm_eps = hidden_act, gated, layer_norm_eps
        self.prefix, self.prefix_tokens = list(prefix), prefix_tokens
        self.positions, self.patch_bias = positions, patch_bias
        self.qkv_bias, self.layer_scale = list(qkv_bias), layer_scale
        self.norms, self.pooling = list(norms), pooling
        self.cls_sizes, self.merged, self.read = list(cls_sizes), list(merged), read
        super().__init__(**kwargs)


class _Attention(nn.Module):
    def __init__(self, c: NpPruneViTConfig, l: int) -> None:
        super().__init__()
        self.heads, self.q, self.v = c.attention_heads[l], c.query_dims[l], c.value_dims[l]
        rows = self.heads * (2 * self.q + self.v)
        self.qkv = nn.Linear(c.hidden_size, rows, bias=c.qkv_bias[l])
        self.proj = nn.Linear(self.heads * self.v, c.hidden_size)

    def forward(self, x: Tensor, bias: Tensor | None, read: int | None) -> Tensor:
        b, t, _ = x.shape
        sizes = [self.heads * self.q, self.heads * self.q, self.heads * self.v]
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(sizes, dim=-1)
        )
        x = scaled_dot_product_attention(q[:, :, :read], k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, c: NpPruneViTConfig, width: int) -> None:
        super().__init__()
        self.gated, self.act = c.gated, ACT2FN[c.hidden_act]
        self.fc1 = nn.Linear(c.hidden_size, width * (2 if c.gated else 1))
        self.fc2 = nn.Linear(width, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            first, last = x.chunk(2, dim=-1)
            x = self.act(first) * last if self.gated == "first" else first * self.act(last)
        else:
            x = self.act(x)
        return self.fc2(x)  # type: ignore[no-any-return]


class _OwnMlp(_Mlp):
    """The first tokens have hidden units of their own."""

    def __init__(self, c: NpPruneViTConfig, width: int, own: int) -> None:
        super().__init__(c, width)
        self.first = 2 if c.pooling == "distilled" else 1
        self.cls = _Mlp(c, own)

    def forward(self, x: Tensor) -> Tensor:
        own, rest = x[:, : self.first], x[:, self.first :]
        return torch.cat([self.cls(own), super().forward(rest)], 1)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, c: NpPruneViTConfig, l: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.attn = _Attention(c, l)
        self.ls1 = _Scale(c.hidden_size) if c.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        width, own = c.intermediate_sizes[l], c.cls_sizes[l] if c.cls_sizes else 0
        self.mlp = _OwnMlp(c, width, own) if own else _Mlp(c, width)
        self.ls2 = _Scale(c.hidden_size) if c.layer_scale else nn.Identity()
        self.merged, self.prefix = c.merged[l] if c.merged else 0, c.prefix_tokens
        self.read = c.read if c.read and l == len(c.intermediate_sizes) - 1 else None

    def forward(self, tokens: Tokens) -> Tokens:
        z = self.norm1(tokens.x)
        bias = None if tokens.sizes is None else tokens.sizes.log()[:, None, None].to(z)
        x = tokens.x[:, : self.read] + self.ls1(self.attn(z, bias, self.read))
        tokens = Tokens(x) if self.read else tokens._replace(x=x)
        if self.merged:
            tokens = merge(tokens, match(self.norm2(x), tokens.sizes, self.merged, self.prefix))
        x = tokens.x
        return tokens._replace(x=x + self.ls2(self.mlp(self.norm2(x))))


class _Patches(nn.Module):
    def __init__(self, c: NpPruneViTConfig) -> None:
        super().__init__()
        size = tuple(c.patch_size)
        self.proj = nn.Conv2d(c.num_channels, c.hidden_size, size, size, bias=c.patch_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class NpPruneViTForImageClassification(PreTrainedModel):  # type: ignore[misc]
    config_class = NpPruneViTConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    norm_pre: nn.Module
    norm: nn.Module
    fc_norm: nn.Module

    def __init__(self, config: NpPruneViTConfig) -> None:
        super().__init__(config)
        c, width = config, config.hidden_size
        grid = [a // b for a, b in zip(c.image_size, c.patch_size, strict=True)]
        count = grid[0] * grid[1] + (c.prefix_tokens if c.positions == "all" else 0)
        self.patch_embed = _Patches(c)
        for name in c.prefix:
            tokens = c.prefix_tokens - len(c.prefix) + 1 if name == "reg_token" else 1
            setattr(self, name, nn.Parameter(torch.zeros(1, tokens, width)))
        self.pos_embed = nn.Parameter(torch.zeros(1, count, width))
        self.blocks = nn.ModuleList([_Block(c, l) for l in range(len(c.intermediate_sizes))])
        for name in ("norm_pre", "norm", "fc_norm"):
            norm = nn.LayerNorm(width, eps=c.layer_norm_eps) if name in c.norms else nn.Identity()
            setattr(self, name, norm)
        read = 2 * width if c.pooling == "class+patches" else width
        labels: Any = c.num_labels
        self.head = nn.Linear(read, labels)
        if c.pooling == "distilled":
            self.head_dist = nn.Linear(width, labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from the file."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        c = self.config
        x = self.patch_embed(pixel_values)
        before = [getattr(self, name).expand(len(x), -1, -1) for name in c.prefix]
        if c.positions == "all":
            x = torch.cat([*before, x], 1) + self.pos_embed
        else:
            x = torch.cat([*before, x + self.pos_embed], 1)
        x = self.norm_pre(x)
        tokens = followed(x) if c.pooling in ("avg", "all", "class+patches") else Tokens(x)
        for block in self.blocks:
            tokens = block(tokens)
        x = tokens.x if tokens.where is None else expanded(tokens)
        logits = self._logits(self.norm(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _logits(self, x: Tensor) -> Tensor:
        pooling, patches = self.config.pooling, x[:, self.config.prefix_tokens :]
        if pooling == "distilled":
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2  # type: ignore[no-any-return]
        if pooling == "class+patches":
            x = torch.cat([x[:, 0], patches.mean(1)], 1)
        else:
            x = x[:, 0] if pooling == "token" else (patches if pooling == "avg" else x).mean(1)
        return self.head(self.fc_norm(x))  # type: ignore[no-any-return]

"""Merging patch tokens that say the same: the mathematics.

In block l, between attention and MLP, the patch tokens are split alternately into A and B. Each
token of A finds its nearest in B, the r closest pairs become one token each, at the partner's place
in B: the mean of both, weighted by the numbers of patches they stand for (their sizes). How far two
tokens are apart is what their merging would add to the sum of squares within clusters (Ward),

    s_a s_b / (s_a + s_b) (1 - cos(y_a, y_b)),

y being what the MLP would see of them, so that two big clusters do not merge as lightly as two
patches. Tokens before the patches (class token, registers) are left alone. Attention adds the
logarithm of the sizes to its logits, so that a token of size s counts as s equal tokens would, and
`expanded` gives every patch its token back before a mean over positions.

Shapes depend on r alone, never on the image. There is no scatter: what stays is gathered, and what
joins B is the product of a one-hot matrix [B, r] with the tokens that go, so that the graph
exports. Ties go to the lower index on every device: distances are rounded to steps of 1 / `STEPS`,
far coarser than the rounding of a product, and sorted as integers that hold the position, too.

Letters: b images, t tokens, n patch tokens, r merged, d width.

Source: for the idea, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), which compares mean
keys and no sizes; J. H. Ward, "Hierarchical grouping to optimize an objective function" (1963).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

STEPS, FARTHEST = 4096, 15.0
"""Levels of a distance between 0 and 1, where those of one level are ties; and the distance from
which on all are equal, so that levels stay within the range of float16."""


class Tokens(NamedTuple):
    """The stream of a network that merges tokens."""

    x: Tensor  # [b, t, d]
    sizes: Tensor | None = None  # [b, t], patches that each stands for; None: one each
    where: Tensor | None = None  # [b, t0], which token holds each original one; None: not followed
    rotary: Tensor | None = None  # [b, t, c], rotary embedding; None: that of the whole image


def followed(x: Tensor) -> Tokens:
    """The stream [b, t, d] as tokens that hold themselves: who joins whom will be known."""
    images, tokens, _ = x.shape  # not `len`, which is a constant when the network is traced
    return Tokens(x, where=torch.arange(tokens, device=x.device).expand(images, -1))


class Merge(NamedTuple):
    """Who joins whom in one block; positions count within A, B, or A followed by B."""

    prefix: int  # tokens before the patches
    gone: Tensor  # [b, r]: of A, closest pair first
    into: Tensor  # [b, r]: the partner in B of each that goes
    stays: Tensor  # [b, n - r]: of A and B, in the order that they had in the image


def most(patches: int) -> int:
    """How many of so many patch tokens can merge at once."""
    return patches // 2


@torch.no_grad()
def match(y: Tensor, sizes: Tensor | None, merged: int, prefix: int) -> Merge:
    """The closest pairs.

    Args:
        y: [b, t, d], what the tokens are compared by.
        sizes: [b, t]; None: one each.
        merged: r, at most half of the patch tokens.
        prefix: tokens before the patches.
    """
    y = y[:, prefix:].to(torch.promote_types(y.dtype, torch.float32))
    unit = normalize(y, dim=-1)
    with full_precision(y):
        distance = 1 - unit[:, 0::2] @ unit[:, 1::2].mT  # [b, A, B]
    if sizes is not None:
        _, of_a, of_b = _split(sizes.to(distance)[..., None], prefix)
        distance = distance * (2 / (1 / of_a + 1 / of_b.mT))  # a factor 2: 1 for two patches
    level, nearest = (distance.clamp_max(FARTHEST) * STEPS).round().min(-1)  # the first of equals
    a, b = distance.shape[1:]
    distinct = level.long() * a + torch.arange(a, device=y.device)
    gone, rest = _ascending(distinct)[1].tensor_split([merged], -1)
    every_b = torch.arange(1, 2 * b, 2, device=y.device).expand(y.shape[0], -1)
    patches, _ = _ascending(torch.cat([2 * rest, every_b], 1))
    return Merge(prefix, gone, nearest.gather(1, gone), _by_set(patches, a))


def merge(tokens: Tokens, pairs: Merge) -> Tokens:
    """The tokens [b, t - r, d] after merging; what stays keeps its order.

    Rotary embeddings are averaged as the tokens are: between two groups, each of equal tokens, the
    logit is then the mean of the logits of their members.
    """
    x, sizes, where, rotary = tokens
    sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes[..., None]
    parts = [x, sizes] if rotary is None else [x, rotary.to(x), sizes]
    front, a, b = _split(torch.cat(parts, -1), pairs.prefix)
    partners = torch.arange(b.shape[1], device=x.device)[None, :, None]
    joins = (pairs.into[:, None, :] == partners).to(x)  # [b, B, r]
    with full_precision(x):
        total = _weighted(b) + joins @ _weighted(_rows(a, pairs.gone))
    size = total[..., -1:]
    b = torch.cat([total[..., :-1] / size, size], -1)
    out = torch.cat([front, _rows(torch.cat([a, b], 1), pairs.stays)], 1)
    d = x.shape[-1]
    return Tokens(
        out[..., :d],
        out[..., -1],
        None if where is None else moved_to(pairs).gather(1, where),
        None if rotary is None else out[..., d:-1],
    )


def moved_to(pairs: Merge) -> Tensor:
    """Where each of the tokens before merging is afterwards: positions [b, t]."""
    prefix, gone, into, stays = pairs
    images, left = stays.shape
    patches = left + gone.shape[1]
    a = patches - patches // 2
    positions = torch.arange(prefix + patches, device=stays.device)
    _, rank = _ascending(torch.cat([stays, gone], 1))
    target = torch.cat([positions[:left].expand(images, -1), rank.gather(1, a + into)], 1)
    moved = target.gather(1, rank)[:, _by_set(positions[:patches], a)]
    return torch.cat([positions[:prefix].expand(images, -1), prefix + moved], 1)


def expanded(tokens: Tokens) -> Tensor:
    """Every original token's value [b, t0, d]: that of the token which holds it."""
    if tokens.sizes is None:
        return tokens.x
    if tokens.where is None:
        raise ValueError("these tokens were not followed: `where` must be set before they merge")
    return _rows(tokens.x, tokens.where)


def gathered(x: Tensor, where: Tensor, tokens: int) -> Tensor:
    """The values x [b, t0, d] of the original tokens, summed over those that each token holds."""
    total = x.new_zeros(*where.shape[:1], tokens, x.shape[-1])
    return total.scatter_add_(1, where[..., None].expand(*where.shape, x.shape[-1]), x)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Within automatic mixed precision, products in the precision of their operands."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # shapes alone have no precision
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _ascending(values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct whole numbers [b, s] in their order, and where they were."""
    found = (-values).topk(values.shape[-1])
    return -found.values, found.indices


def _by_set(patches: Tensor, a: int) -> Tensor:
    """Positions among the patches as positions in A followed by B."""
    return patches // 2 + patches % 2 * a


def _weighted(rows: Tensor) -> Tensor:
    """Rows [b, s, d + 1] times their last column, the sizes, which stays as it is."""
    size = rows[..., -1:]
    return torch.cat([rows[..., :-1] * size, size], -1)


def _split(x: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens before the patches, A, and B."""
    return x[:, :prefix], x[:, prefix::2], x[:, prefix + 1 :: 2]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The tokens x [b, t, d] at the positions [b, s] of each image: [b, s, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

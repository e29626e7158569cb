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
from torch.nn.functional import normalize, pad

STEPS, FARTHEST = 4096, 15.0
"""Levels of a distance between 0 and 1, where those of one level are ties; and the distance from
which on all are equal, so that levels stay within the range of float16."""


class Tokens(NamedTuple):
    """The stream of a network that merges tokens."""

    x: Tensor  # [b, t, d]
    sizes: Tensor | None = None  # [b, t], patches that each stands for; None: one each
    where: Tensor | None = None  # [b, t0], which token holds each original one; None: not followed
    rotary: Tensor | None = None  # [b, t, c], rotary embedding; None: that of the whole image


class Merge(NamedTuple):
    """Who joins whom in one block; positions count within A and B."""

    prefix: int  # tokens before the patches
    gone: Tensor  # [b, r]: of A, closest pair first
    rest: Tensor  # [b, A - r]: of A, those that stay, ascending
    into: Tensor  # [b, r]: the partner in B of each that goes


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
        _, a, b = _split(sizes.to(distance)[..., None], prefix)
        distance = distance * (2 / (1 / a + 1 / b.mT))  # a factor 2: 1 for two patches
    level, nearest = (
        (distance.clamp_max(FARTHEST) * STEPS).round().min(-1)
    )  # of equal ones the first
    gone, rest = _ascending(level.long()).tensor_split([merged], -1)
    rest = -(-rest).topk(rest.shape[-1]).values
    return Merge(prefix, gone, rest, nearest.gather(1, gone))


def merge(tokens: Tokens, pairs: Merge) -> Tokens:
    """The tokens [b, t - r, d] after merging, in the order prefix, rest of A, B.

    Rotary embeddings are averaged as the tokens are: between two groups, each of equal tokens, the
    logit is then the mean of the logits of their members.
    """
    x, sizes, where, rotary = tokens
    sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes[..., None]
    values = x if rotary is None else torch.cat([x, rotary.to(x)], -1)
    front, a, b = _split(pad(values, (0, 1), value=1.0), pairs.prefix)
    size_front, size_a, size_b = _split(sizes, pairs.prefix)
    joined = pairs.into[:, None, :] == torch.arange(b.shape[1], device=x.device)[None, :, None]
    with full_precision(x):  # [b, B, r] @ [b, r, d + 1]
        added = joined.to(x) @ _rows(a * size_a, pairs.gone)
    total = b * size_b + added
    size = torch.cat([size_front, _rows(size_a, pairs.rest), total[..., -1:]], 1)[..., 0]
    values = torch.cat([front, _rows(a, pairs.rest), total / total[..., -1:]], 1)[..., :-1]
    d = x.shape[-1]
    return Tokens(
        values[..., :d],
        size,
        None if where is None else moved_to(pairs, x.shape[1]).gather(1, where),
        None if rotary is None else values[..., d:],
    )


def moved_to(pairs: Merge, tokens: int) -> Tensor:
    """Where each of the tokens before merging is afterwards: positions [b, t]."""
    prefix, gone, rest, into = pairs
    images, stay = rest.shape
    a, b = stay + gone.shape[1], (tokens - prefix) // 2
    positions = torch.arange(prefix + stay + b, device=rest.device).expand(images, -1)
    front, of_rest, of_b = positions.split([prefix, stay, b], 1)
    rank = torch.cat([rest, gone], 1).argsort(-1)
    of_a = torch.cat([of_rest, prefix + stay + into], 1).gather(1, rank)
    pairwise = torch.stack([of_a, pad(of_b, (0, a - b))], -1).flatten(1)
    return torch.cat([front, pairwise[:, : tokens - prefix]], 1)


def expanded(tokens: Tokens) -> Tensor:
    """Every original token's value [b, t0, d]: that of the token which holds it."""
    if tokens.sizes is None:
        return tokens.x
    if tokens.where is None:
        raise ValueError("these tokens were not followed: `where` must be set before they merge")
    return _rows(tokens.x, tokens.where)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Within automatic mixed precision, products in the precision of their operands."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # shapes alone have no precision
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _ascending(level: Tensor) -> Tensor:
    """The order [b, a] of whole numbers [b, a], smallest first, of equal ones the first."""
    a = level.shape[-1]
    distinct = level * a + torch.arange(a, device=level.device)
    return (-distinct).topk(a).indices


def _split(x: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens before the patches, A, and B."""
    return x[:, :prefix], x[:, prefix::2], x[:, prefix + 1 :: 2]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The tokens x [b, t, d] at the positions [b, s] of each image: [b, s, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

"""Merging tokens, against loops over single tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npprune.core.tokens import (
    FARTHEST,
    STEPS,
    Merge,
    Tokens,
    expanded,
    match,
    merge,
    most,
)


def loop(y: Tensor, sizes: list[float], merged: int, prefix: int) -> list[list[int]]:
    """One image's tokens after merging, each as the positions it is made of, partner first."""
    patches = range(prefix, len(y))
    a_tokens, b_tokens = list(patches)[0::2], list(patches)[1::2]
    found = []
    for a in a_tokens:
        best = None
        for b in b_tokens:
            cosine = float(y[a] @ y[b] / (y[a].norm() * y[b].norm()))
            weight = 2 * sizes[a] * sizes[b] / (sizes[a] + sizes[b])
            level = round(min(weight * (1 - cosine), FARTHEST) * STEPS)
            if best is None or level < best[0]:
                best = level, a, b
        assert best is not None
        found.append(best)
    pairs = sorted(found)[:merged]  # of equal ones the first
    gone = {a for _, a, _ in pairs}
    groups = [[i] for i in range(len(y)) if i not in gone]
    for _, a, b in pairs:
        next(group for group in groups if group[0] == b).append(a)
    return groups


@pytest.mark.parametrize(("patches", "prefix"), [(16, 1), (15, 2), (9, 0)])
def test_merging_equals_a_loop_over_tokens(patches: int, prefix: int) -> None:
    g = torch.Generator().manual_seed(patches)
    x = torch.randn(3, prefix + patches, 5, generator=g, dtype=torch.float64)
    start = torch.arange(prefix + patches).expand(3, -1)
    rotary = torch.randn(3, prefix + patches, 2, generator=g, dtype=torch.float64)
    tokens = Tokens(x, where=start, rotary=rotary)
    groups = [[[i] for i in range(prefix + patches)] for _ in range(3)]  # of original tokens
    for r in (3, 2):
        pairs = match(tokens.x, tokens.sizes, r, prefix)
        for image, made_of in enumerate(groups):
            sizes = [float(len(group)) for group in made_of]
            joined = loop(tokens.x[image], sizes, r, prefix)
            groups[image] = [[p for i in group for p in made_of[i]] for group in joined]
        tokens = merge(tokens, pairs)
    assert tokens.sizes is not None
    assert tokens.where is not None
    assert tokens.rotary is not None
    assert tokens.x.shape == (3, prefix + patches - 5, 5)
    for image, made_of in enumerate(groups):
        for i, group in enumerate(made_of):
            torch.testing.assert_close(tokens.x[image, i], x[image, group].mean(0))
            torch.testing.assert_close(tokens.rotary[image, i], rotary[image, group].mean(0))
            assert tokens.sizes[image, i] == len(group)
            assert (tokens.where[image] == i).nonzero().flatten().tolist() == sorted(group)
    back = expanded(tokens)
    assert back.shape == x.shape
    torch.testing.assert_close(back.mean(1), x.mean(1))  # weighted by size


def test_ties_go_to_the_lower_index() -> None:
    same = torch.ones(2, 40, 7) * torch.tensor([0.1, 0.7])[:, None, None]
    noise = 1e-6 * torch.randn(same.shape, generator=torch.Generator().manual_seed(0))
    for y in (same, same + noise):
        pairs = match(y, None, 4, 1)
        assert pairs.gone.tolist() == [[0, 1, 2, 3]] * 2
        assert pairs.into.tolist() == [[0, 0, 0, 0]] * 2
        of_a, of_b = range(4, 20), range(20, 39)  # the first four of A are gone
        alternate = [i for pair in zip(of_a, of_b[4:], strict=False) for i in pair]
        assert pairs.stays.tolist() == [[*of_b[:4], *alternate, of_a[-1]]] * 2


def test_big_tokens_merge_later() -> None:
    y = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.15, 1.0]]])
    assert match(y, None, 1, 0).gone.tolist() == [[0]]
    assert match(y, torch.tensor([[9.0, 9.0, 1.0, 1.0]]), 1, 0).gone.tolist() == [[1]]


def test_gradients_are_those_of_means() -> None:
    x = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pairs = Merge(0, torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[3, 1, 4, 2, 5]]))
    out = merge(Tokens(x), pairs)
    out.x[0, 2].sum().backward()  # the second of B, joined by the first of A
    assert x.grad is not None
    weights = x.grad[0, :, 0].tolist()
    assert weights == [0.5, 0, 0, 0.5, 0, 0]


def test_the_most_that_can_merge() -> None:
    y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    assert most(7) == 3
    assert merge(Tokens(y), match(y, None, most(7), 1)).x.shape == (2, 5, 3)


def test_tokens_that_were_not_followed() -> None:
    y = torch.randn(2, 8, 3)
    merged = merge(Tokens(y), match(y, None, 2, 0))
    with pytest.raises(ValueError, match="`where`"):
        expanded(merged)


def test_mixed_precision_changes_no_match() -> None:
    y = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0))
    plain = match(y, None, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = match(y, None, 5, 1)
        x = merge(Tokens(y), mixed).x
    for ours, theirs in zip(mixed, plain, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert torch.equal(x, merge(Tokens(y), plain).x)

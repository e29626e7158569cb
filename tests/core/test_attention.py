"""Smaller attention: logits kept, heads chosen with the repair in mind, harm as really changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npprune.core.compression.attention import (
    SmallerAttention,
    collect_attention,
    query_factors,
    shrink,
    stand_ins,
    value_basis,
    weight_factors,
)
from npprune.core.compression.compensation import compensate, error
from npprune.core.compression.elimination import eliminate_groups
from npprune.core.compression.harm import Replacement, layers_replaced, measure_harm, predict
from npprune.core.metrics import divergence
from npprune.errors import UsageError
from npprune.models.view import TimmView
from tests.core.test_statistics import data, tiny_view


def moments_of(view: TimmView, images: Tensor) -> list:  # type: ignore[type-arg]
    return collect_attention(view, images.split(4), generator=torch.Generator().manual_seed(0))


def queries_and_keys(view: TimmView, l: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """[n, q, b, t] each."""
    p, x = view.attention(l), view.embed(images)
    for i in range(l):
        x = view.block(i, x)
    q, k, _ = p.split(p.qkv(view.blocks[l].norm1(x)).movedim(-1, 0))
    return q, k


def logits_lost(q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> float:
    """Squared error of the logits of each image's pairs, up to what the softmax does not see."""
    k = k - k.mean(-1, keepdim=True)
    dense = torch.einsum("nqbi,nqbj->nbij", q, k)
    small = torch.einsum("nrq,nqbi,nrp,npbj->nbij", a, q, b, k)
    return float((dense - small).square().sum())


def test_statistics_are_those_of_the_layers() -> None:
    view, (images, _) = tiny_view(), data(10)
    found = moments_of(view, images)
    for l in range(3):
        q, k = queries_and_keys(view, l, images)
        centred = (k - k.mean(-1, keepdim=True)).flatten(2)
        torch.testing.assert_close(found[l].keys, centred @ centred.mT / centred.shape[-1])
        assert found[l].queries.shape == (2, 6, 6)
        assert found[l].inputs.covariance.shape == (12, 12)
        assert float(torch.linalg.eigvalsh(found[l].inputs.covariance)[0]) > -1e-9
    # only the class token's answer counts in the last block: its queries get half of the weight
    q, _ = queries_and_keys(view, 2, images)
    cls, even = q[..., 0], q.flatten(2)
    assert view.scope == "cls"
    spread = found[2].queries - 0.5 * even @ even.mT / even.shape[-1]
    ratio = torch.linalg.lstsq(
        torch.stack([(cls @ cls.mT).flatten(), (even @ even.mT).flatten()], 1),
        spread.flatten()[:, None],
    ).solution[:, 0]
    assert float(ratio[0]) > 10 * abs(float(ratio[1]))


def test_full_rank_gives_the_logits_back() -> None:
    view, (images, _) = tiny_view(), data()
    for l, m in enumerate(moments_of(view, images)):
        q, k = queries_and_keys(view, l, images)
        p = view.attention(l)
        for a, b in (query_factors(m.queries, m.keys, 6), weight_factors(p, 6)):
            dense = torch.einsum("nqbi,nqbj->nbij", q, k)
            small = torch.einsum("nrq,nqbi,nrp,npbj->nbij", a, q, b, k)
            assert (dense - small).abs().max() < 1e-5


@pytest.mark.parametrize("r", [1, 2, 4])
def test_calibrated_factors_beat_truncation_and_the_weights_alone(r: int) -> None:
    view, (images, _) = tiny_view(), data(40)
    for l, m in enumerate(moments_of(view, images)):
        q, k = queries_and_keys(view, l, images)
        lost = logits_lost(q, k, *query_factors(m.queries, m.keys, r))
        cut = torch.eye(6, dtype=torch.float64)[:r].expand(2, r, 6)
        assert lost < logits_lost(q, k, cut, cut)
        if l < 2:  # the last block's queries are weighted towards the class token's
            assert lost <= 1.02 * logits_lost(q, k, *weight_factors(view.attention(l), r))
        if l == 0:
            assert lost < logits_lost(q, k, *query_factors(m.keys, m.queries, r))


def test_factors_are_the_best_of_their_rank() -> None:
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 5, 200, generator=g, dtype=torch.float64) for _ in range(2))
    q = torch.randn(1, 5, 5, generator=g, dtype=torch.float64) @ q
    cq, ck = q @ q.mT / 200, k @ k.mT / 200
    a, b = query_factors(cq, ck, 2)

    def lost(a: Tensor, b: Tensor) -> float:
        m = torch.eye(5, dtype=torch.float64) - a.mT @ b
        return float((m.mT @ cq @ m @ ck).diagonal(dim1=-2, dim2=-1).sum())

    best = lost(a, b)
    s = torch.linalg.svdvals(torch.linalg.cholesky(cq).mT @ torch.linalg.cholesky(ck))[0]
    assert best == pytest.approx(float(s[2:].square().sum()), rel=1e-6)
    for _ in range(20):
        step = [0.05 * torch.randn(1, 2, 5, generator=g, dtype=torch.float64) for _ in range(2)]
        assert lost(a + step[0], b + step[1]) > best
    with pytest.raises(UsageError, match=r"query dimensions must be in 1\.\.5, got 6"):
        query_factors(cq, ck, 6)


def test_the_first_values_of_the_basis_lose_least_of_the_output() -> None:
    g = torch.Generator().manual_seed(4)
    root = torch.randn(10, 10, generator=g, dtype=torch.float64)
    s, w = root @ root.T, torch.randn(7, 10, generator=g, dtype=torch.float64)
    basis = value_basis(s, w, 2)
    for h, part in enumerate((slice(0, 5), slice(5, 10))):
        c, p = s[part, part], w[:, part]
        singular = torch.linalg.svdvals(p @ torch.linalg.cholesky(c))
        for r in (1, 3):

            def lost(a: Tensor, c: Tensor = c, p: Tensor = p) -> float:
                """Of the output p o, regressed on a o."""
                best = p @ c @ a.T @ torch.linalg.inv(a @ c @ a.T)
                return float(((p - best @ a) @ c @ (p - best @ a).T).trace())

            a = basis[h, :r]
            assert lost(a) == pytest.approx(float(singular[r:].square().sum()), rel=1e-5)
            for _ in range(10):
                step = 0.1 * torch.randn(a.shape, generator=g, dtype=torch.float64)
                assert lost(a + step) > lost(a)


def test_all_values_in_their_basis_change_nothing() -> None:
    view, (images, _) = tiny_view(), data(20)
    found = moments_of(view, images)
    dense = predict(view, [images])
    for l, m in enumerate(found):
        p = view.attention(l)
        small = shrink(p, m, [0, 1], 5, values=True)
        assert small.basis is not None
        assert small.proj is not None
        assert small.proj.whole is not None
        assert list(small.proj.keep) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
        layers = stand_ins(p, small)
        with layers_replaced(layers):
            assert (predict(view, [images]) - dense).abs().max() > 1e-6
        rows = layers[p.qkv].weight.clone()
        rows[:24] = p.qkv.weight[:24]  # queries and keys as they were
        bias = layers[p.qkv].bias.clone()
        bias[:24] = p.qkv.bias[:24]
        same = {
            p.qkv: Replacement(range(12), rows, bias),
            p.proj: Replacement(range(12), small.proj.whole, p.proj.bias),
        }
        with layers_replaced(same):
            torch.testing.assert_close(predict(view, [images]), dense, rtol=1e-4, atol=1e-5)


def test_groups_go_in_the_order_of_what_their_removal_costs() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=g, dtype=torch.float64)
    s, w = root @ root.T, torch.randn(5, 12, generator=g, dtype=torch.float64)
    found = eliminate_groups(s, w, 4, shrinkage=0.0)
    assert sorted(found.order.tolist()) == [0, 1, 2, 3]
    whole = float((w @ s @ w.T).trace())
    gone: list[int] = []
    spent = 0.0
    for step in range(3):
        left = [h for h in range(4) if h not in gone]
        costs = {}
        for h in left:
            keep = [c for c in range(12) if c // 3 not in [*gone, h]]
            refit = w @ s[:, keep] @ torch.linalg.inv(s[keep][:, keep])
            change = w.clone()
            change[:, keep] -= refit
            costs[h] = float((change @ s @ change.T).trace())
        best = min(costs, key=lambda h: costs[h])
        assert int(found.order[step]) == best
        spent += float(found.costs[step])
        assert spent == pytest.approx(costs[best], rel=1e-8)
        gone.append(best)
    assert float(found.costs.sum()) == pytest.approx(whole, rel=1e-8)
    curved = eliminate_groups(s, w, 4, torch.eye(5, dtype=torch.float64), shrinkage=0.0)
    torch.testing.assert_close(curved.costs, found.costs)


def test_the_head_that_goes_first_is_the_one_whose_loss_is_least() -> None:
    view, (images, _) = tiny_view(), data(40)
    for l, m in enumerate(moments_of(view, images)):
        p = view.attention(l)
        order = eliminate_groups(m.inputs.covariance, p.proj.weight, p.heads, m.curvature).order
        lost = {}
        for h in range(p.heads):
            kept = [c for c in range(12) if c // 6 != h]
            refit = compensate(m.inputs, p.proj.weight, p.proj.bias, kept)
            lost[h] = error(m.inputs, p.proj.weight, refit.weight, kept, curvature=m.curvature)
        assert int(order[0]) == min(lost, key=lambda h: lost[h])


def test_harm_is_measured_on_the_network_with_one_attention_changed() -> None:
    view, (images, _) = tiny_view(), data(8)
    found = moments_of(view, images)
    options = [
        {
            option: stand_ins(view.attention(l), shrink(view.attention(l), m, heads, r))
            for option, (heads, r) in {"head": ([1], 6), "qk": ([0, 1], 2)}.items()
        }
        for l, m in enumerate(found)
    ]
    table = measure_harm(view, images.split(3), options)
    dense = predict(view, [images])
    for l, row in enumerate(options):
        for option, layers in row.items():
            with layers_replaced(layers):
                changed = predict(view, [images])
            assert float(divergence(dense, changed).mean()) == pytest.approx(
                table[l][option], rel=1e-9
            )
            assert table[l][option] > 0
    assert torch.equal(predict(view, [images]), dense)


def test_nothing_changes_where_all_stays() -> None:
    view, (images, _) = tiny_view(), data()
    p = view.attention(0)
    same = shrink(p, moments_of(view, images)[0], [0, 1], 6)
    assert same == SmallerAttention([0, 1], 6)
    assert stand_ins(p, same) == {}


def test_rows_are_queries_then_keys_then_values() -> None:
    p = tiny_view().attention(1)
    assert (p.heads, p.query_dims, p.value_dims) == (2, 6, 6)
    q, k, v = p.split(p.qkv.weight)
    torch.testing.assert_close(torch.cat([x.flatten(0, 1) for x in (q, k, v)]), p.qkv.weight)

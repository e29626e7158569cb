"""Streamed statistics against a direct computation on a tiny float64 model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from npprune.core.compression.statistics import (
    Statistics,
    collect_statistics,
    outputs_of,
)
from npprune.core.recording import recorded
from npprune.errors import UsageError
from npprune.models.view import TimmView, make_view


def tiny_view(seed: int = 0, **args: Any) -> TimmView:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=3,
        num_heads=2,
        num_classes=6,
        mlp_ratio=2,
        **args,
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + 0.05)
    return make_view(model.double().eval().requires_grad_(False))


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    images = torch.randn(n, 3, 16, 16, generator=g, dtype=torch.float64)
    return images, torch.randint(6, (n,), generator=g)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def in_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    yield from images.split(size)


def direct(view: TimmView, image: Tensor, l: int) -> tuple[Tensor, Tensor]:
    """fc2's input [t, h] and the Jacobian of the logits at its output [c, t, d], one image."""
    kept: list[Tensor] = []

    def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(inputs[0].detach()[0])
        return output + shift

    shift = torch.zeros(1, 5, 12, dtype=torch.float64)
    handle = view.fc2(l).register_forward_hook(add)

    def run(s: Tensor) -> Tensor:
        nonlocal shift
        shift = s
        return view.model(image[None])[0]

    jacobian = torch.autograd.functional.jacobian(run, shift)[:, 0]
    handle.remove()
    return kept[0], jacobian


def test_sums_match_a_direct_computation() -> None:
    view, (images, _) = tiny_view(), data()
    stats = collect_statistics(view, in_batches(images, 4), generator=seeded())
    g = seeded()
    signs = torch.cat([torch.randint(0, 2, (n, 6), generator=g) * 2.0 - 1 for n in (4, 4, 2)])
    assert stats.images == 10
    for l in range(3):
        rows, outer, gates, weights, absolute = [], torch.zeros(12, 12).double(), [], [], []
        for image, sign in zip(images, signs, strict=True):
            h, jacobian = direct(view, image, l)
            p = view.model(image[None])[0].softmax(0)
            drawn = p.sqrt() * sign
            g = torch.einsum("c,ctd->td", drawn - p * drawn.sum(), jacobian)
            rows.append(h)
            outer += g.T @ g
            gates.append((h * (g @ view.fc2(l).weight)).sum(0))
            weights.append(g.square().sum(1))
            absolute.append(h.abs())
        h, gate, w = torch.cat(rows), torch.stack(gates), torch.cat(weights)
        found = stats.moments(l)
        torch.testing.assert_close(found.mean, h.mean(0))
        torch.testing.assert_close(found.covariance, torch.cov(h.T, correction=0))
        torch.testing.assert_close(found.mean_absolute, torch.cat(absolute).mean(0))
        torch.testing.assert_close(found.second, h.square().mean(0))
        torch.testing.assert_close(stats.curvature(l), outer / len(h))
        torch.testing.assert_close(stats.taylor(l), gate.abs().mean(0))
        torch.testing.assert_close(stats.fisher(l), gate.square().mean(0))
        salient = stats.moments(l, salience=1.0)
        torch.testing.assert_close(salient.mean, (w / w.sum()) @ h)
        torch.testing.assert_close(
            salient.covariance, torch.cov(h.T, correction=0, aweights=w / w.sum())
        )
        place = w.reshape(10, 5).sum(0)
        torch.testing.assert_close(
            stats.position_weights(l, 0.25), 0.75 + 0.25 * place / place.mean()
        )
        half = stats.moments(l, salience=0.5)
        torch.testing.assert_close(half.mean, (found.mean + salient.mean) / 2)


def test_drawn_gradients_estimate_the_exact_fisher() -> None:
    view, (images, _) = tiny_view(), data(2)
    stats = collect_statistics(view, [images], draws=800, generator=seeded())
    exact, gate = torch.zeros(12, 12).double(), torch.zeros(24).double()
    for image in images:
        h, jacobian = direct(view, image, 1)
        p = view.model(image[None])[0].softmax(0)
        f = p.diag() - torch.outer(p, p)
        exact += torch.einsum("cij,ce,eik->jk", jacobian, f, jacobian)
        a = torch.einsum("ctd,dh,th->ch", jacobian, view.fc2(1).weight, h)
        gate += torch.einsum("ch,ce,eh->h", a, f, a)
    exact, gate = exact / 10, gate / 2
    assert float((stats.curvature(1) - exact).norm() / exact.norm()) < 0.1
    assert float((stats.fisher(1) - gate).norm() / gate.norm()) < 0.1


def test_last_block_is_salient_at_the_class_token_alone() -> None:
    view, (images, _) = tiny_view(), data()
    stats = collect_statistics(view, in_batches(images, 5), generator=seeded())
    h = torch.stack([direct(view, image, 2)[0][0] for image in images])
    w = stats.moments(2, salience=1.0)
    assert float((w.covariance.diagonal() > 0).sum()) > 0
    assert torch.linalg.matrix_rank(w.covariance, rtol=1e-9) <= len(h)


def test_resumption_and_subsets_have_the_same_bits() -> None:
    view, (images, _) = tiny_view(), data()
    g = seeded()
    first = collect_statistics(view, [images[:4]], generator=g)
    resumed = collect_statistics(
        view,
        in_batches(images[4:], 3),
        generator=g,
        state=Statistics.from_tensors(first.to_tensors()),
    )
    cut = [images[:4], *in_batches(images[4:], 3)]
    whole = collect_statistics(view, cut, generator=seeded())
    assert resumed.images == whole.images == 10
    straight = whole.to_tensors()
    assert all(torch.equal(a, straight[name]) for name, a in resumed.to_tensors().items())
    one = collect_statistics(view, cut, blocks=[1], generator=seeded())
    assert list(one.blocks) == [1]
    assert torch.equal(one.curvature(1), whole.curvature(1))
    assert torch.equal(one.moments(1).covariance, whole.moments(1).covariance)


def test_only_what_is_asked_for_is_kept_and_the_model_is_left_alone() -> None:
    view, (images, _) = tiny_view(), data()
    before = {k: v.clone() for k, v in view.model.state_dict().items()}
    seen: list[int] = []
    stats = collect_statistics(
        view,
        in_batches(images, 4),
        needs=["moments"],
        on_batch=lambda s: seen.append(s.images),
    )
    assert seen == [4, 8, 10]
    assert stats.blocks[0].curvature is None
    assert stats.blocks[0].gate is None
    assert all(torch.equal(before[k], v) for k, v in view.model.state_dict().items())
    assert not any(m._forward_hooks for m in view.model.modules())
    with pytest.raises(UsageError, match="'curvature' is needed"):
        stats.curvature(0)
    with pytest.raises(UsageError, match="no statistics of block 7"):
        stats.moments(7)


def test_refusals() -> None:
    view, (images, _) = tiny_view(), data(2)
    with pytest.raises(UsageError, match=r"got \['hessian'\]"):
        collect_statistics(view, [images], needs=["hessian"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="needs a generator"):
        collect_statistics(view, [images])
    a = collect_statistics(view, [images], needs=["moments"])
    with pytest.raises(UsageError, match="`header`"):
        Statistics.from_tensors({})
    with pytest.raises(UsageError, match=r"got `0\.what`"):
        Statistics.from_tensors({**a.to_tensors(), "0.what": torch.zeros(1)})


def test_sums_of_what_is_read_and_of_the_others_are_those_of_their_tokens() -> None:
    view, (images, _) = tiny_view(), data(12)
    every = ["moments", "salience", "gates", "curvature", "read"]
    stats = collect_statistics(view, images.split(5), needs=every, generator=seeded())  # type: ignore[arg-type]
    whole = collect_statistics(view, images.split(5), generator=seeded())
    again = Statistics.from_tensors(stats.to_tensors())
    for l in range(3):
        assert torch.equal(stats.block(l).gram, whole.block(l).gram)  # type: ignore[arg-type]
        read, others = again.side("read"), again.side("others")
        h, g = hidden_and_gradients(view, images.split(5), l)
        for side, rows, grads in (
            (read, h[:, :1], g[:, :1]),
            (others, h[:, 1:], g[:, 1:]),
        ):
            flat, flat_g = rows.flatten(0, 1), grads.flatten(0, 1)
            moments = side.moments(l)
            torch.testing.assert_close(moments.mean, flat.mean(0))
            torch.testing.assert_close(moments.covariance, torch.cov(flat.T, correction=0))
            torch.testing.assert_close(side.curvature(l), flat_g.T @ flat_g / len(flat_g))
            a = (rows * (grads @ view.fc2(l).weight)).sum(1)
            torch.testing.assert_close(side.fisher(l), a.square().mean(0))
            weight = flat_g.square().sum(1)
            assert len(side.position_weights(l, 0.5)) == rows.shape[1]
            if float(weight.sum()) > 1e-9:
                salient = (weight[:, None] * flat).sum(0) / weight.sum()
                found = 0.5 * moments.mean + 0.5 * salient
                torch.testing.assert_close(side.moments(l, 0.5).mean, found)


def hidden_and_gradients(view: TimmView, batches: Any, l: int) -> tuple[Tensor, Tensor]:
    """What goes into block l's `fc2` [n, t, h], and the drawn gradients at its output [n, t, d]."""
    hs, gs, generator = [], [], seeded()
    for images in batches:
        with recorded([view.fc2(l)]) as seen:
            logits = outputs_of(view, images, True)
        h, y = seen[view.fc2(l)]
        (g,) = torch.autograd.grad(logits, y, view.objective.cotangent(logits.detach(), generator))
        hs.append(h.detach())
        gs.append(g)
    return torch.cat(hs), torch.cat(gs)

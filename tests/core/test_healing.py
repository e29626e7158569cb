"""Healing's mathematics: losses, schedule, what is random, blocks on their own."""

from __future__ import annotations

import math

import pytest
import torch

from npprune.core import metrics, objective
from npprune.core.compression import healing
from npprune.models.surgery import apply_plan
from npprune.models.view import make_view
from npprune.records import Plan
from tests.helpers.tiny import tiny_batch, tiny_vit


def logits(n: int = 5, c: int = 7, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_divergence_that_evaluation_measures() -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    found = objective.divergence_at(student, teacher)
    torch.testing.assert_close(
        found.double(), metrics.divergence(teacher, student), rtol=1e-5, atol=0
    )
    assert torch.all(found > 0)
    torch.testing.assert_close(objective.divergence_at(teacher, teacher), torch.zeros(5))


def test_a_temperature_softens_both_and_keeps_the_gradients_size() -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    soft = objective.divergence_at(student, teacher, 4.0)
    torch.testing.assert_close(soft, 16 * objective.divergence_at(student / 4, teacher / 4))
    # for a high temperature, T^2 KL tends to half the variance of the logits' difference
    gap = (student - teacher) - (student - teacher).mean(dim=1, keepdim=True)
    high = objective.divergence_at(student.double(), teacher.double(), 300.0)
    torch.testing.assert_close(high, gap.square().mean(dim=1) / 2, rtol=0.05, atol=1e-3)


def test_classes_the_teacher_leaves_out_are_unlearnt_without_nan() -> None:
    student = logits(2, 3).requires_grad_()
    teacher = torch.tensor([[1.0, -math.inf, 0.5], [0.0, -math.inf, 2.0]])
    loss = objective.divergence_at(student, teacher).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert math.isfinite(float(loss))
    assert torch.isfinite(gradient).all()
    assert torch.all(gradient[:, 1] > 0)  # descent lowers the logit of the class left out


def test_missing_labels_cost_nothing() -> None:
    student = logits(3)
    loss = healing.label_loss(student, torch.tensor([2, -1, 0]))
    assert loss[1] == 0
    expected = -student.log_softmax(dim=1)[0, 2]
    torch.testing.assert_close(loss[0], expected)


def test_feature_distance_ignores_scale_and_sees_direction() -> None:
    streams = [torch.randn(2, 5, 8) for _ in range(3)]
    torch.testing.assert_close(
        healing.feature_distance([3 * s + 1 for s in streams], streams), torch.zeros(2), atol=1e-5,
        rtol=0,
    )  # fmt: skip
    opposite = healing.feature_distance([-s for s in streams], streams)
    torch.testing.assert_close(opposite, torch.full((2,), 4.0), rtol=1e-3, atol=0)


def test_streams_end_in_the_models_own_logits() -> None:
    model = tiny_vit()
    images, _ = tiny_batch()
    with torch.no_grad():
        streams, out = healing.streams_and_outputs(make_view(model), images)
        torch.testing.assert_close(out, model(images))
    assert [tuple(s.shape) for s in streams] == [(4, 17, 24)] * 3


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [healing.rate(i / 100) for i in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_averages_reach_over_a_share_of_the_steps() -> None:
    assert healing.averaging_decay(10) == pytest.approx(0.8)
    assert healing.averaging_decay(1000) == pytest.approx(1 - 1 / 30)
    assert healing.averaging_decay(10**9) == pytest.approx(1 - 1e-4)
    model, average = tiny_vit(1), tiny_vit(2)
    before = average.head.weight.detach().clone()
    healing.update_average(average, model, 0.75)
    expected = 0.75 * before + 0.25 * model.head.weight
    torch.testing.assert_close(average.head.weight, expected)


def test_every_image_is_seen_both_ways_in_two_epochs() -> None:
    for epoch in (0, 2, 8):
        first, second = (healing.epoch_flips(3, e, 50) for e in (epoch, epoch + 1))
        assert torch.equal(first, ~second)
        assert 10 < int(first.sum()) < 40
    assert not torch.equal(healing.epoch_flips(3, 0, 50), healing.epoch_flips(3, 2, 50))


def test_orders_are_permutations_that_seed_and_epoch_decide() -> None:
    order = healing.epoch_order(0, 1, 40)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(order, healing.epoch_order(0, 1, 40))
    assert not torch.equal(order, healing.epoch_order(0, 2, 40))
    assert not torch.equal(order, healing.epoch_order(1, 1, 40))


def test_mixing_keeps_the_shares() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1)
    assert healing.mix(images, 0.75).flatten().tolist() == [0.25, 0.75, 2.25, 2.75]
    assert healing.mix(images[:3], 0.75).flatten().tolist() == [0.25, 0.75, 1.5]
    assert torch.equal(healing.mix(images[:1], 0.75), images[:1])


def test_two_processes_mix_the_same_pairs() -> None:
    images = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    halves = [healing.mix(part, 0.3) for part in images.tensor_split(2)]
    assert torch.equal(torch.cat(halves), healing.mix(images, 0.3))


def test_only_matrices_decay() -> None:
    decayed, plain = healing.parameter_groups(tiny_vit(), 0.1)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() <= 1 for p in plain["params"])
    total = len(decayed["params"]) + len(plain["params"])
    assert total == len(list(tiny_vit().parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


# ---------------------------------------------------------------- block by block


def halves() -> tuple[torch.nn.Module, torch.nn.Module]:
    dense = tiny_vit()
    keep = [sorted(range(0, 48, 2)) for _ in range(3)]
    return dense, apply_plan(dense, Plan(keep, [48, 48, 48])).requires_grad_(True)


def batches() -> list[torch.Tensor]:
    return [tiny_batch(8, seed=s)[0] for s in range(4)]


def test_blocks_come_closer_and_only_their_mlps_change() -> None:
    dense, student = halves()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = healing.reconstruct_blocks(
        make_view(student), make_view(dense), batches(), epochs=30, learning_rate=3e-3
    )
    assert [f.block for f in found] == [0, 1, 2]
    assert all(f.after < 0.7 * f.before for f in found)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".mlp." in k or ".norm2." in k for k in changed)
    images = tiny_batch(16, seed=9)[0]  # unseen
    with torch.no_grad():
        target, after = dense(images), student(images)
        student.load_state_dict(before)
        assert metrics.divergence(target, after).mean() < (
            0.8 * metrics.divergence(target, student(images)).mean()
        )


def test_a_later_block_can_be_the_first_and_gives_the_same() -> None:
    options = {"epochs": 3, "learning_rate": 1e-3, "tokens": 6}
    dense, whole = halves()
    kept: dict[str, torch.Tensor] = {}

    def keep(found: healing.Reconstructed) -> None:
        if found.block == 0:
            kept.update({k: v.clone() for k, v in whole.state_dict().items()})

    healing.reconstruct_blocks(
        make_view(whole), make_view(dense), batches(), on_block=keep, **options
    )
    _, resumed = halves()
    resumed.load_state_dict(kept)
    rest = healing.reconstruct_blocks(
        make_view(resumed), make_view(dense), batches(), first=1, **options
    )
    assert [f.block for f in rest] == [1, 2]
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())


def test_a_regression_that_diverges_leaves_the_block_as_it_was() -> None:
    dense, student = halves()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = healing.reconstruct_blocks(
        make_view(student), make_view(dense), batches(), epochs=2, learning_rate=100.0
    )
    assert all(f.after <= f.before for f in found)
    after = student.state_dict()
    untouched = [f.block for f in found if f.after == f.before]
    assert untouched
    for block in untouched:
        mine = [k for k in before if k.startswith(f"blocks.{block}.")]
        assert all(torch.equal(before[k], after[k]) for k in mine)

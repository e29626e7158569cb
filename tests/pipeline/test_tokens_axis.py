"""Merging tokens within a budget: measured, chosen, refitted, carried out, and what follows."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import npprune
from npprune.core.compression import cost
from npprune.core.compression.selection import smooth
from npprune.core.metrics import divergence
from npprune.errors import ModelError, UsageError
from npprune.models.info import count_macs, model_sizes
from npprune.models.surgery import apply_plan, mask_plan, set_fc2
from npprune.models.tokens import tokens_of
from npprune.models.view import make_view
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.export.stage import export_checkpoint
from npprune.pipeline.heal.stage import heal
from npprune.pipeline.prune.axes.tokens import SHAPES, Schedule, between, merging, schedules
from npprune.pipeline.prune.measuring import PlanSettings, Subject, measure, prepared
from npprune.pipeline.prune.planning import amount, choose, refit
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.study.rows import Setting
from npprune.pipeline.study.stage import available, study
from npprune.recipe import (
    DataSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
    StudySection,
)
from npprune.records import Plan, Variant
from npprune.store.runs import read_plan
from tests.helpers.tiny import tiny_batch, tiny_vit
from tests.models.test_tokens import family
from tests.pipeline.test_axes import DIGITS, dense

__all__ = ["dense"]


@pytest.fixture(scope="module")
def merged(dense: Path) -> tuple[Path, Variant]:
    out = dense.parent / "merged"
    chosen = PruneSection(target_macs=0.55, axes=["mlp", "tokens"], calibration_images=200)
    return out, prune(ModelSection(name=str(dense)), DIGITS, chosen, out)


def test_schedules_merge_no_more_than_there_is() -> None:
    for patches, depth in ((196, 12), (16, 2), (576, 24), (9, 3)):
        found = [s.merged for s in schedules(patches, depth)]
        assert found
        for merged in found:
            left = patches
            assert merged[-1] == 0
            for r in merged:
                assert 0 <= r <= left // 2
                left -= r
    every = [s.merged for s in schedules(196, 12)]
    flat = [m for m in every if max(m[2:-1]) - min(m[2:-1]) <= 1]
    assert len(flat) >= 7
    assert any(m[3] > m[-2] + 4 for m in every)


def test_the_choice_is_the_best_of_all_schedules_and_widths() -> None:
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2, mlp_ratio=1.5)
    images, _ = tiny_batch(24)
    asked = PlanSettings.of(PruneSection(axes=["mlp", "tokens"], target_macs=0.7))
    subject = Subject(make_view(model), [images], lambda: model_sizes(model))
    measured = prepared(measure(subject, asked, Work()), asked, Work())
    harm = measured.harm
    assert harm is not None
    assert harm.schedules[0] == Schedule((0, 0))
    assert len(harm.schedules) > 3
    # as if merging did little harm, and then less and less: so that the budget has a choice
    some = [replace(s, nats=1e-3 * i) for i, s in enumerate(harm.schedules)]
    measured = replace(measured, harm=replace(harm, schedules=some))
    budget = amount(measured, asked)
    assert budget == 0.7 * cost.macs(model_sizes(model))
    found = choose(measured, asked, budget)
    rows = [smooth(row, [16, 32, 48]) for row in harm.hidden]
    best = min(
        s.nats + sum(rows[l][w] for l, w in enumerate(widths))
        for s in some
        for widths in product((16, 32, 48), repeat=2)
        if cost.macs(s.sizes(model_sizes(model), measured.read).with_hidden(widths)) <= budget
    )
    if found.schedule in some:
        assert found.nats == pytest.approx(best, rel=1e-9)
    else:  # between two that were measured
        assert found.nats < best


def test_the_plan_the_network_and_the_cost_agree(merged: tuple[Path, Variant], dense: Path) -> None:
    out, variant = merged
    plan, model, source = read_plan(out), npprune.load_model(out), npprune.load_model(dense)
    assert plan.merged is not None
    assert sum(plan.merged) > 0
    assert plan.last_for_read
    assert tokens_of(model) == (plan.merged, True)
    size = variant.model.preprocessing.input_size
    macs = count_macs(model, size)
    assert macs == variant.model.macs == cost.macs(model_sizes(model))
    assert 0.5 < macs / count_macs(source, size) <= 0.55
    axes = variant.prune.details["axes"]
    assert [row["axis"] for row in axes] == ["last block", "tokens", "mlp"]
    assert sum(row["macs"] for row in axes) == pytest.approx(1 - macs / count_macs(source, size))
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        removed, masked = apply_plan(source, plan)(x), mask_plan(source, plan)(x)
    torch.testing.assert_close(removed, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_that_follows_takes_it(merged: tuple[Path, Variant], dense: Path) -> None:
    out, variant = merged
    val = DataSection(val="digits:test")
    found = evaluate(out, val, EvaluateSection(latency=False))
    assert found.pruned_model is not None
    assert found.pruned_model.macs == variant.model.macs
    assert export_checkpoint(out, val, ExportSection(latency=False)).passed
    html, markdown = render_report(out)
    for text in (html.read_text(), markdown.read_text()):
        assert "tokens merged" in text.lower()


def test_healing_trains_through_it(dense: Path) -> None:
    out, healed = dense.parent / "worse_merged", dense.parent / "healed_merged"
    chosen = PruneSection(
        target_macs=0.4, axes=["mlp", "tokens"], compensation="none", calibration_images=200
    )
    prune(ModelSection(name=str(dense)), DIGITS, chosen, out)
    found = heal(out, DIGITS, HealSection(epochs=2, lr=1e-3), healed).heal
    assert found is not None
    assert found.after.divergence_nats < found.before.divergence_nats
    assert tokens_of(npprune.load_model(healed)) == tokens_of(npprune.load_model(out))
    with pytest.raises(ModelError, match="compares every token block by block"):
        heal(out, DIGITS, HealSection(epochs=1, layerwise=True), dense.parent / "never")


def test_it_is_a_plain_module(merged: tuple[Path, Variant]) -> None:
    model: Any = copy.deepcopy(npprune.load_model(merged[0])).train()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(x).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_what_merges_is_pruned_further_and_merges_as_before(merged: tuple[Path, Variant]) -> None:
    out, variant = merged
    source, again = ModelSection(name=str(out)), out.with_name("again")
    more = prune(source, DIGITS, PruneSection(target_macs=0.7, calibration_images=100), again)
    assert more.model.macs <= 0.7 * variant.model.macs
    assert read_plan(again).merged == read_plan(out).merged == more.model.merged
    asked = PruneSection(target_macs=0.7, axes=["tokens"])
    with pytest.raises(ModelError, match="merges tokens already"):
        prune(source, DIGITS, asked, out.with_name("never"))


def test_refitting_makes_up_for_removed_units_on_the_tokens_that_are_left() -> None:
    model = tiny_vit(embed_dim=32, num_heads=2, depth=3)
    images, _ = tiny_batch(24)
    asked = PlanSettings.of(PruneSection(axes=["mlp", "tokens"], target_macs=0.5))
    subject = Subject(make_view(model), [images], lambda: model_sizes(model))
    measured = prepared(measure(subject, asked, Work()), asked, Work())
    assert measured.harm is not None
    choice = choose(measured, asked, amount(measured, asked) or 0)
    chosen = refit(measured, asked, choice, Work())
    assert chosen.merged == choice.schedule.counts
    # a schedule alone takes nothing away, and there is nothing to make up for
    whole = [list(range(w)) for w in measured.subject.view.widths]
    only = replace(choice, selection=replace(choice.selection, keep=whole))
    still = refit(measured, asked, only, Work()).refitted
    for l, layer in enumerate(still.second):
        torch.testing.assert_close(
            layer.weight.float(), make_view(model).fc2(l).weight.float(), rtol=1e-3, atol=1e-3
        )


def test_a_study_compares_axes_at_equal_macs(dense: Path, tmp_path: Path) -> None:
    asked = StudySection(
        criteria=["variance"], selections=["measured"], compensations=["least-squares"],
        target_macs=[0.6], axes=["tokens+mlp", "mlp"], calibration_images=100,
    )  # fmt: skip
    data = DataSection(calibration="digits:calibration", val="digits:test", batch_size=64)
    table = study(ModelSection(name=str(dense)), data, asked, tmp_path / "study").analyses["study"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert {row["axes"] for row in rows} == {"mlp", "mlp+tokens"}
    assert {row["kept"] for row in rows} == {"60 % MACs"}
    assert all(55 < row["MACs, %"] <= 60 for row in rows)
    with pytest.raises(UsageError, match=r"`axes` must be one of .* got `token`"):
        study(
            ModelSection(name=str(dense)), data, asked.model_copy(update={"axes": ["token"]}),
            tmp_path / "never",
        )  # fmt: skip


def test_between_two_measured_schedules_nats_are_read_from_both() -> None:
    view = make_view(tiny_vit(depth=3))
    one = Schedule(merging(16, 3, 0.3, SHAPES[0]) or (), 0.01, SHAPES[0], 0.3)
    two = Schedule(merging(16, 3, 0.7, SHAPES[0]) or (), 0.09, SHAPES[0], 0.7)
    found = between(view, [Schedule((0, 0, 0)), one, two], one)
    assert found
    for s in found:
        low, high = (0.0, 0.01) if s.share < 0.3 else (0.01, 0.09)
        assert low < s.nats < high
        assert sum(s.merged) == round(s.share * 16)
    assert between(view, [Schedule((0, 0, 0)), one, two], Schedule((0, 0, 0)))


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        pytest.param("vit, average", marks=pytest.mark.slow),
        pytest.param("vit, registers", marks=pytest.mark.slow),
        pytest.param("deit distilled", marks=pytest.mark.slow),
        "dinov3",
    ],
)
def test_families_are_measured_chosen_refitted_and_made_smaller(name: str) -> None:
    model, images = family(name)
    batch = images[:1] + 0.5 * torch.randn(12, *images.shape[1:], dtype=images.dtype)
    asked = replace(
        PlanSettings.of(PruneSection(target_macs=0.75, round_to=1, min_keep=4)),
        axes=("mlp", "tokens"),
    )
    subject = Subject(make_view(model), [batch], lambda: model_sizes(model))
    measured = prepared(measure(subject, asked, Work()), asked, Work())
    budget = amount(measured, asked) or 0
    chosen = refit(measured, asked, choose(measured, asked, budget), Work())
    plan = Plan(chosen.keep, list(subject.view.widths), **chosen.fields())
    assert plan.last_for_read is (subject.view.tokens_read is not None)
    small = apply_plan(model, plan)
    size = tuple(images.shape[1:])
    assert cost.macs(model_sizes(small)) <= budget
    assert count_macs(small, size) < count_macs(model, size)  # type: ignore[arg-type]
    for l, layer in enumerate(chosen.refitted.second):
        set_fc2(small, l, layer.weight.to(images), layer.bias.to(images))
    with torch.no_grad():
        assert small(batch).isfinite().all()
        assert (
            divergence(model(batch), small(batch)).mean()
            < divergence(model(batch), apply_plan(model, plan)(batch)).mean() + 1e-6
        )


def test_all_axes_of_a_study_are_those_that_the_network_has() -> None:
    named = "mlp+heads+qk+tokens"
    every = Setting("variance", "measured", "mean", 0.5, False, 0, "macs", named)
    assert available([every], tiny_vit()) == [every]
    (row,) = available([every], tiny_vit(qk_norm=True))
    assert row.axes == "mlp+heads+tokens"
    with pytest.raises(ModelError, match="`qk` cannot be narrowed"):
        available([replace(every, axes="mlp+qk")], tiny_vit(qk_norm=True))

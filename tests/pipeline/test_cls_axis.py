"""Hidden units of the class token's own: measured, chosen, refitted, carried out, exported."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import npprune
from npprune.cli import show
from npprune.cli.console import Output
from npprune.core.compression import cost
from npprune.core.compression.selection import smooth
from npprune.core.metrics import divergence
from npprune.errors import ModelError
from npprune.models.info import count_macs, model_sizes
from npprune.models.own_units import own_widths
from npprune.models.surgery import apply_plan, check_axes, mask_plan
from npprune.models.view import make_view
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.export.stage import export_checkpoint
from npprune.pipeline.heal.stage import heal
from npprune.pipeline.prune.measuring import Measured, PlanSettings, Subject, measure, prepared
from npprune.pipeline.prune.planning import amount, choose, refit
from npprune.pipeline.prune.stage import carried_out, prune
from npprune.recipe import (
    DataSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
)
from npprune.records import Variant
from npprune.store.runs import read_plan
from tests.helpers.tiny import tiny_batch, tiny_vit
from tests.pipeline.test_axes import DIGITS, dense

__all__ = ["carried_out", "dense"]


@pytest.fixture(scope="module")
def own(dense: Path) -> tuple[Path, Variant]:
    out = dense.parent / "own"
    asked = PruneSection(target_macs=0.4, axes=["mlp", "cls"], calibration_images=200)
    return out, prune(ModelSection(name=str(dense)), DIGITS, asked, out)


def measured_tiny(budget: dict[str, float]) -> tuple[Measured, PlanSettings]:
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2, mlp_ratio=2)
    images, _ = tiny_batch(40)
    asked = PlanSettings.of(PruneSection(axes=["mlp", "cls"], **budget))  # type: ignore[arg-type]
    subject = Subject(make_view(model), [images], lambda: model_sizes(model))
    return prepared(measure(subject, asked, Work()), asked, Work()), asked


@pytest.mark.parametrize("budget", [{"target_macs": 0.55}, {"target_params": 0.75}])
def test_the_choice_is_the_best_of_sharing_and_splitting(budget: dict[str, float]) -> None:
    measured, asked = measured_tiny(budget)
    harm, sizes = measured.harm, measured.subject.sizes()
    assert harm is not None
    assert harm.own is not None
    goal = amount(measured, asked) or 0
    found = choose(measured, asked, goal)
    widths = [16, 32, 48, 64]
    shared = [smooth(row, widths) for row in harm.hidden]
    rest = [smooth(row, widths) for row in harm.own[0]]
    theirs = [smooth(row, widths) for row in harm.own[1]]
    # the last block computes only what is read where MACs count: there is nothing to split
    split = [True, asked.price == "params"]
    blocks = [
        [((w, 0), shared[l][w]) for w in widths]
        + [((w, c), rest[l][w] + theirs[l][c]) for w, c in product(widths, widths) if split[l]]
        for l in range(2)
    ]
    price = cost.macs if asked.price == "macs" else cost.params
    best = min(
        sum(nats for _, nats in options)
        for options in product(*blocks)
        if price(
            sizes.with_tokens(None, measured.read).with_hidden(
                [w for (w, _), _ in options], [c for (_, c), _ in options]
            )
        )
        <= goal
    )
    assert found.nats == pytest.approx(best, rel=1e-9)
    chosen = refit(measured, asked, found, Work())
    assert chosen.own == found.selection.own
    assert len(chosen.refitted.second) == 2


def test_the_class_token_keeps_what_costs_nothing(own: tuple[Path, Variant], dense: Path) -> None:
    out, variant = own
    plan, model, source = read_plan(out), npprune.load_model(out), npprune.load_model(dense)
    assert plan.cls_keep is not None
    assert plan.cls_keep[-1] == []  # the last block is the class token's alone
    assert variant.model.cls_widths == own_widths(model) == [len(k) for k in plan.cls_keep]
    assert [len(k) for k in plan.cls_keep[:-1]] == plan.widths[:-1]  # all of them: that is nothing
    size = variant.model.preprocessing.input_size
    macs = count_macs(model, size)
    assert macs == variant.model.macs == cost.macs(model_sizes(model))
    assert 0.3 < macs / count_macs(source, size) <= 0.4
    # refitted, it comes closer to the dense network than masked alone
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference, masked = source(images), mask_plan(source, plan)(images)
        near, far = (divergence(reference, y).mean() for y in (model(images), masked))
    assert near < far


def test_all_that_follows_takes_it(
    own: tuple[Path, Variant], dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, variant = own
    val = DataSection(val="digits:test")
    found = evaluate(out, val, EvaluateSection(latency=False))
    assert found.pruned_model is not None
    assert found.pruned_model.macs == variant.model.macs
    assert export_checkpoint(out, val, ExportSection(latency=False)).passed
    assert export_checkpoint(out, val, ExportSection(format="timm", latency=False)).passed
    html, markdown = render_report(out)
    for text in (html.read_text(), markdown.read_text()):
        assert "class token" in text
    show.pruned(Output(as_json=False), variant, out, dry_run=False)
    assert "class token's own" in capsys.readouterr().out


def test_healing_trains_both_sides(dense: Path) -> None:
    out, healed = dense.parent / "worse_own", dense.parent / "healed_own"
    asked = PruneSection(
        target_macs=0.4, axes=["mlp", "cls"], compensation="none", calibration_images=200
    )
    prune(ModelSection(name=str(dense)), DIGITS, asked, out)
    heal(out, DIGITS, HealSection(epochs=2, lr=1e-3), healed)
    before, after = npprune.load_model(out), npprune.load_model(healed)
    assert own_widths(after) == own_widths(before)
    name = "blocks.0.mlp.cls.fc2.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    layerwise = HealSection(epochs=1, layerwise=True)
    with pytest.raises(ModelError, match="of its own"):
        heal(out, DIGITS, layerwise, dense.parent / "never")


def test_what_is_split_is_pruned_further_and_keeps_its_own_units(
    own: tuple[Path, Variant],
) -> None:
    out, variant = own
    source, again = ModelSection(name=str(out)), out.with_name("again_own")
    asked = PruneSection(target_macs=0.8, calibration_images=100)
    more = prune(source, DIGITS, asked, again)
    assert more.model.macs <= 0.8 * variant.model.macs
    assert more.model.cls_widths == variant.model.cls_widths
    first, second = npprune.load_model(out), npprune.load_model(again)
    for name, value in first.state_dict().items():
        if ".mlp.cls." in name:
            assert torch.equal(second.state_dict()[name], value)
    plan, x = read_plan(again), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        removed, masked = apply_plan(first, plan)(x), mask_plan(first, plan)(x)
    torch.testing.assert_close(removed, masked, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="of its own already"):
        check_axes(first, ["mlp", "cls"])


@pytest.mark.parametrize("mode", ["none", "mean", "least-squares"])
def test_sides_are_refitted_each_from_its_own_statistics(mode: str) -> None:
    measured, asked = measured_tiny({"target_macs": 0.55})
    asked = replace(asked, compensation=mode)  # type: ignore[arg-type]
    choice = choose(measured, asked, amount(measured, asked) or 0)
    assert choice.selection.own is not None
    fewer = [kept[:24] for kept in choice.selection.own]
    choice = replace(choice, selection=replace(choice.selection, own=fewer))
    chosen = refit(measured, asked, choice, Work())
    l = next(l for l, kept in enumerate(choice.selection.own) if kept)
    first = chosen.refitted.second[l].first
    assert first is not None
    assert list(first[1].keep) == choice.selection.own[l]
    fc2 = measured.subject.view.fc2(l)
    plain = fc2.weight[:, choice.selection.own[l]].double()
    assert torch.allclose(first[1].weight, plain) is (mode != "least-squares")

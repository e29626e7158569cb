"""Heads and query/key dimensions beside hidden units: chosen, carried out, exported, shown."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Attention as TimmAttention
from torch import nn

import npprune
from npprune import words
from npprune.cli import show
from npprune.cli.console import Output
from npprune.core.compression import cost
from npprune.errors import ModelError, UsageError
from npprune.models.info import count_macs, model_info, model_sizes, state
from npprune.models.load import create
from npprune.models.surgery import apply_plan, mask_plan, set_proj
from npprune.models.view import make_view
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.demo.training import ARCHITECTURE, MODEL_ARGS, PREPROCESSING
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.export.stage import export_checkpoint
from npprune.pipeline.heal.stage import heal
from npprune.pipeline.prune.axes.attention import Attention
from npprune.pipeline.prune.measuring import Measured, PlanSettings, Subject, measure, prepared
from npprune.pipeline.prune.planning import amount, choose, refit
from npprune.pipeline.prune.stage import prune
from npprune.recipe import (
    DataSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
    check,
)
from npprune.records import CheckpointConfig, ModelSource, Plan, Variant
from npprune.store.checkpoints import write_checkpoint
from npprune.store.runs import RunFolder, read_plan
from tests.helpers.digits_network import SMALL, write_digits_network
from tests.helpers.tiny import tiny_batch, tiny_vit

DIGITS = DataSection(calibration="digits:calibration", batch_size=64)
ALL = ["mlp", "heads", "qk"]
EVERY = list(words.ALL_AXES)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, each of two heads of 16 dimensions and 128 hidden units, on the digits."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    model = create(ARCHITECTURE, SMALL)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = 0.3 if name.endswith("weight") and p.dim() > 1 else 0.03
            p.copy_(size * torch.randn(p.shape, generator=g))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return write_digits_network(folder, model, SMALL)


def settings(**more: Any) -> PruneSection:
    return PruneSection(**{"axes": ALL, "target_macs": 0.6, "calibration_images": 200, **more})


@pytest.fixture(scope="module")
def small(dense: Path) -> tuple[Path, Variant]:
    out = dense.parent / "small"
    return out, prune(ModelSection(name=str(dense)), DIGITS, settings(), out)


def test_the_budget_is_met_and_the_mix_recorded(small: tuple[Path, Variant]) -> None:
    out, variant = small
    model = npprune.load_model(out)
    source = npprune.load_model(out.parent / "dense")
    size = variant.model.preprocessing.input_size
    macs = count_macs(model, size)
    assert macs == variant.model.macs == cost.macs(model_sizes(model))
    assert 0.55 < macs / count_macs(source, size) <= 0.6
    plan = read_plan(out)
    kept = variant.prune.details["attention"]
    assert plan.heads is not None
    assert [len(h) for h in plan.heads] == kept["heads"] == variant.model.heads
    assert plan.query_dims == kept["query_dims"]
    assert (kept["dense_heads"], kept["dense_query_dims"]) == ([2, 2], [16, 16])
    assert kept["heads"] != [2, 2] or kept["query_dims"] != [16, 16]
    assert plan.how["axes"] == ALL


@pytest.fixture(scope="module")
def equal(dense: Path) -> tuple[Path, Variant]:
    """With one head dimension for queries, keys and values."""
    out = dense.parent / "equal"
    chosen = settings(axes=["mlp", "heads", "head-dim"], target_macs=0.45)
    return out, prune(ModelSection(name=str(dense)), DIGITS, chosen, out)


def test_heads_keep_one_dimension_for_queries_keys_and_values(
    equal: tuple[Path, Variant],
) -> None:
    out, variant = equal
    model = npprune.load_model(out)
    size = variant.model.preprocessing.input_size
    macs = count_macs(model, size)
    assert macs == variant.model.macs == cost.macs(model_sizes(model))
    assert sum(p.numel() for p in model.parameters()) == cost.params(model_sizes(model))
    assert 0.4 < macs / count_macs(npprune.load_model(out.parent / "dense"), size) <= 0.45
    plan, view = read_plan(out), make_view(model)
    assert plan.query_dims is None
    assert plan.head_dims is not None
    assert 8 in plan.head_dims
    for l, dims in enumerate(plan.head_dims):
        assert type(view.blocks[l].attn) is TimmAttention
        assert (view.attention(l).query_dims, view.attention(l).value_dims) == (dims, dims)
    assert variant.prune.details["attention"]["value_dims"] == plan.head_dims


@pytest.mark.parametrize("mode", ["sequential", "least-squares"])
def test_a_head_dimension_that_says_nothing_goes_without_harm(mode: Any) -> None:
    """Queries, keys and values of rank 8 in heads of 16: half of each goes, no logit changes."""
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2)
    g = torch.Generator().manual_seed(1)
    for block in model.blocks:  # type: ignore[union-attr]
        qkv: Any = block.attn.qkv  # type: ignore[union-attr]
        spread = torch.randn(6, 16, 8, generator=g, dtype=torch.float64)
        few = 0.2 * torch.randn(6, 8, 33, generator=g, dtype=torch.float64)
        few = (spread @ few).flatten(0, 1)
        with torch.no_grad():
            qkv.weight.copy_(few[:, :32])
            qkv.bias[:64].copy_(few[:64, 32])  # those of values are free
    chosen = {"axes": ["head-dim"], "target_macs": 0.9, "compensation": mode}
    measured, asked, _ = measured_of(model, **chosen)
    (axis,) = measured.further
    options = [(2, 8)] * 2
    choice = choose(measured, asked, cost.macs(model_sizes(model)))
    choice = replace(choice, selection=replace(choice.selection, others=[options]))
    done = refit(measured, asked, choice, Work())
    kept = done.further[0][1]
    plan = Plan(done.keep, list(measured.subject.view.widths), **axis.plan(kept))
    assert plan.head_dims == [8, 8]
    images, _ = tiny_batch(16, seed=5)
    small = apply_plan(model, plan)
    with torch.no_grad():
        by_weights = (small(images) - model(images)).abs().max()
    axis.carry_out(small, measured.subject.view, kept)
    for l, proj in done.refitted.projections.items():
        set_proj(small, l, proj.weight, proj.bias)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=0, atol=2e-3)
    assert by_weights < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("made", ["small", "equal"])
def test_it_evaluates_heals_exports_and_is_reported(
    made: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    out, variant = request.getfixturevalue(made)
    found = evaluate(out, DataSection(val="digits:test"), EvaluateSection(latency=False))
    assert found.pruned_model is not None
    assert found.pruned_model.macs == variant.model.macs
    record = export_checkpoint(out, DataSection(val="digits:test"), ExportSection(latency=False))
    assert record.passed
    html, markdown = render_report(out)
    show.pruned(Output(as_json=False), variant, out, dry_run=False)
    shown = capsys.readouterr().out
    kept = variant.prune.details["attention"]
    changed = [f"{n} of 2" for n in kept["heads"]] + [f"{r} of 16" for r in kept["query_dims"]]
    for text in (html.read_text(), markdown.read_text(), shown):
        assert ("query/key dimensions" in text) is (made == "small")
        assert "dimensions" in text
        assert all(cell in text for cell in changed)


@pytest.mark.parametrize("axis", ["qk", pytest.param("head-dim", marks=pytest.mark.slow)])
def test_healing_trains_it(dense: Path, axis: str) -> None:
    out, healed = dense.parent / f"worse-{axis}", dense.parent / f"healed-{axis}"
    chosen = settings(axes=["mlp", "heads", axis], target_macs=0.4, compensation="none")
    prune(ModelSection(name=str(dense)), DIGITS, chosen, out)
    found = heal(out, DIGITS, HealSection(epochs=2, lr=1e-3), healed).heal
    assert found is not None
    assert found.after.divergence_nats < found.before.divergence_nats
    before, after = (npprune.load_model(p).state_dict() for p in (out, healed))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    qkv = "blocks.0.attn.qkv.weight"
    assert not torch.equal(before[qkv], after[qkv])


def test_heads_removed_equal_heads_masked_with_the_same_values(dense: Path) -> None:
    out = dense.parent / "heads"
    chosen = settings(axes=["mlp", "heads"], target_macs=0.5)
    prune(ModelSection(name=str(dense)), DIGITS, chosen, out)
    plan, model, pruned = read_plan(out), npprune.load_model(dense), npprune.load_model(out)
    assert plan.query_dims is None
    assert plan.heads is not None
    masked = mask_plan(model, plan)
    for l, (heads, keep) in enumerate(zip(plan.heads, plan.keep, strict=True)):
        small: Any = pruned.blocks[l]  # type: ignore[index,union-attr]
        columns = [16 * h + i for h in heads for i in range(16)]
        view = make_view(masked)
        for layer, kept, values in (
            (view.attention(l).proj, columns, small.attn.proj),
            (view.fc2(l), keep, small.mlp.fc2),
        ):
            with torch.no_grad():
                layer.weight[:, kept] = values.weight
                layer.bias.copy_(values.bias)
    masked.head.load_state_dict(pruned.head.state_dict())  # type: ignore[union-attr]
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), masked(x), rtol=1e-4, atol=1e-5)


def test_attention_alone_leaves_the_widths(dense: Path) -> None:
    out = dense.parent / "attention"
    chosen = settings(axes=["heads", "qk"], target_macs=0.85)
    variant = prune(ModelSection(name=str(dense)), DIGITS, chosen, out)
    assert variant.prune.widths == variant.prune.dense_widths
    assert variant.model.macs <= 0.85 * count_macs(
        npprune.load_model(dense), variant.model.preprocessing.input_size
    )


@pytest.mark.parametrize("compensation", ["none", "least-squares"])
def test_parameters_and_other_compensations(dense: Path, compensation: str) -> None:
    chosen = settings(target_macs=None, target_params=0.7, compensation=compensation)
    variant = prune(ModelSection(name=str(dense)), DIGITS, chosen, dense.parent / "x", dry_run=True)
    whole = sum(p.numel() for p in npprune.load_model(dense).parameters())
    assert 0.6 * whole < variant.model.params <= 0.7 * whole


def test_what_was_pruned_can_be_pruned_further(small: tuple[Path, Variant]) -> None:
    out, variant = small
    again = prune(
        ModelSection(name=str(out)), DIGITS, settings(target_macs=0.7), out.with_name("again")
    )
    assert again.model.macs <= 0.7 * variant.model.macs
    kept, before = again.prune.details["attention"], variant.prune.details["attention"]
    assert kept["dense_heads"] == before["heads"]
    assert kept["dense_query_dims"] == before["query_dims"]
    model = npprune.load_model(out.with_name("again"))
    assert count_macs(model, again.model.preprocessing.input_size) == again.model.macs


def test_max_drop_searches_over_the_macs(dense: Path) -> None:
    chosen = settings(target_macs=None, max_drop=100)
    out = dense.parent / "least"
    variant = prune(ModelSection(name=str(dense)), DIGITS, chosen, out)
    assert variant.prune.details["attention"]["heads"] == [1, 1]
    assert variant.prune.details["attention"]["query_dims"] == [8, 8]
    assert variant.prune.widths[0] == 16  # the last block's are nearly free


def measured_of(model: nn.Module, **more: Any) -> tuple[Measured, PlanSettings, float]:
    """What is measured, for which settings, and how much may stay."""
    images, _ = tiny_batch(24)
    asked = PlanSettings.of(settings(**{"round_to": 16, "min_keep": 16, **more}))
    subject = Subject(make_view(model), [images[:12], images[12:]], lambda: model_sizes(model))
    measured = prepared(measure(subject, asked, Work()), asked, Work())
    budget = amount(measured, asked)
    assert budget is not None
    return measured, asked, budget


def test_the_mix_is_the_best_there_is() -> None:
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2, mlp_ratio=1.5)
    measured, asked, budget = measured_of(model)
    found = choose(measured, asked, budget)
    assert measured.harm is not None
    table, (attention,) = measured.harm.hidden, measured.harm.further
    sizes = model_sizes(model)
    sizes = sizes.with_tokens(None, measured.read)
    assert [set(row) for row in attention] == [set(product((1, 2), (8, 16)))] * 2
    from npprune.core.compression.selection import smooth

    rows = [smooth(row, [16, 32, 48]) for row in table]
    goal, best = 0.6 * cost.macs(model_sizes(model)), (float("inf"), 0.0)
    for widths in product((16, 32, 48), repeat=2):
        for pairs in product(product((1, 2), (8, 16)), repeat=2):
            whole = replace(
                sizes, hidden=widths, queries=tuple(n * r for n, r in pairs),
                values=tuple(16 * n for n, _ in pairs),
            )  # fmt: skip
            if cost.macs(whole) > goal:
                continue
            harm = sum(rows[l][w] for l, w in enumerate(widths))
            harm += sum(attention[l][p] for l, p in enumerate(pairs))
            best = min(best, (harm, float(cost.macs(whole))))
            if (list(widths), [list(pairs)]) == (found.widths, found.selection.others):
                assert cost.macs(whole) - cost.macs(sizes) == pytest.approx(
                    found.selection.achieved - found.selection.total
                )
    assert found.selection.harm == pytest.approx(best[0], rel=1e-9)


def test_hidden_units_are_refitted_on_the_attention_that_stays() -> None:
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2)
    measured, asked, budget = measured_of(model, axes=["heads", "qk"], target_macs=0.6)
    chosen = refit(measured, asked, choose(measured, asked, budget), Work())
    fc2 = make_view(model).fc2(1)
    assert chosen.keep[1] == list(range(fc2.in_features))
    # makes up for what was lost
    assert not torch.equal(chosen.refitted.second[1].weight, fc2.weight)


def test_options_are_few_and_regular() -> None:
    view = make_view(tiny_vit(embed_dim=384, num_heads=6, depth=1))
    images, _ = tiny_batch(2)
    axes = Attention.measured(view, ALL, [images], Work().generator(), lambda done: None)
    assert axes.heads(0) == [1, 2, 3, 4, 5, 6]
    assert axes.query_dims(0) == [16, 24, 32, 48, 64]
    axes.asked = ["heads"]
    assert axes.query_dims(0) == [64]
    axes.asked = ["qk"]
    assert axes.heads(0) == [6]


def test_a_gpu_is_told_of_uneven_head_dimensions() -> None:
    view = make_view(tiny_vit(embed_dim=32, num_heads=2, depth=2))
    images, _ = tiny_batch(2)
    cuda = torch.device("cuda")
    for word, said in (("qk", 1), ("head-dim", 0)):
        axis = Attention.measured(view, [word], [images], Work().generator(), lambda done: None)
        kept = [axis.kept(l, (2, r), "least-squares") for l, r in enumerate((8, 16))]
        warned = axis.warnings(kept, cuda)
        assert len(warned) == said
        assert all("in 1 of 2 blocks" in text and "head-dim" in text for text in warned)
        assert axis.warnings(kept, torch.device("cpu")) == []


def test_pruning_again_replaces_what_was_pruned(dense: Path) -> None:
    out, source = dense.parent / "twice", ModelSection(name=str(dense))
    prune(source, DIGITS, PruneSection(keep=0.5, calibration_images=100), out)
    variant = prune(source, DIGITS, PruneSection(keep=0.75, calibration_images=100), out)
    assert read_plan(out).kept_widths == variant.prune.widths
    assert RunFolder(out).read_result().variants == [variant]


@pytest.mark.parametrize(
    ("budget", "named"),
    [({"keep": 0.7}, ["mlp"]), ({"target_params": 0.8}, ["mlp"]), ({"target_macs": 0.7}, EVERY)],
)
def test_the_default_suits_the_budget(dense: Path, budget: Any, named: list[str]) -> None:
    """All axes for MACs, hidden units for what counts them."""
    plain = {**budget, "calibration_images": 100}
    outs = [dense.parent / name for name in ("default", "named")]
    for out, more in zip(outs, ({}, {"axes": named}), strict=True):
        prune(ModelSection(name=str(dense)), DIGITS, PruneSection(**plain, **more), out)
    one, two = (read_plan(out) for out in outs)
    assert one == two
    assert one.how["axes"] == named
    assert one.last_for_read is (named == EVERY)
    assert (outs[0] / "model.safetensors").read_bytes() == (
        outs[1] / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep": 0.5, "target_macs": None}, r"`keep` is a share .* with `axes=mlp,heads,qk`"),
        ({"axes": ["tokens"], "target_params": 0.5, "target_macs": None}, "removes no parameter"),
        ({"topk": 1, "target_macs": None}, "`topk` alone keeps .* needs a budget"),
        ({"axes": ["qk", "head-dim"]}, "`head-dim` values as well, got both: `qk,head-dim`"),
        ({"selection": "global"}, "needs `selection=measured`, got `global`"),
    ],
)
def test_what_does_not_go_together_is_said(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match) as err:
        check(settings(**change))
    assert err.value.hint
    check(settings(**{**change, "axes": ["mlp"]}))


def test_refusals_come_before_any_work(dense: Path, tmp_path: Path) -> None:
    section = settings(keep=0.5, target_macs=None)
    with pytest.raises(UsageError, match="`keep` is a share"):
        prune(ModelSection(name=str(dense)), DIGITS, section, tmp_path / "x")
    args = {**MODEL_ARGS, "depth": 1, "embed_dim": 32, "num_heads": 2, "qk_norm": True}
    model = create(ARCHITECTURE, args)
    info = model_info(model, ModelSource(ARCHITECTURE, args))
    config = CheckpointConfig(
        source=info.source, widths=info.widths, heads=info.heads, num_classes=10,
        preprocessing=PREPROCESSING, classes=[], weights_sha256="",
    )  # fmt: skip
    write_checkpoint(tmp_path / "normed", config, state(model))
    with pytest.raises(ModelError, match=r"`qk` cannot be narrowed in .* LayerNorm between"):
        prune(ModelSection(name=str(tmp_path / "normed")), DIGITS, settings(), tmp_path / "x")
    assert not (tmp_path / "x").exists()

"""The line end to end on the digits: what each stage writes, keeps and refuses."""

from __future__ import annotations

import base64
import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import npprune
from npprune.core.attribution.votes import class_top
from npprune.errors import DataError, GateError, ModelError, StoreError, UsageError
from npprune.models.info import model_info, state
from npprune.models.load import create
from npprune.models.surgery import mask_plan
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.demo.training import ARCHITECTURE, MODEL_ARGS
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.export.stage import export_checkpoint
from npprune.pipeline.prune.measuring import Measured, Subject, measure
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.run import run_recipe
from npprune.recipe import (
    DataSection,
    DiscoverSection,
    EvaluateSection,
    ExportSection,
    ModelSection,
    PruneSection,
    Recipe,
)
from npprune.records import ModelSource
from npprune.report.flipped import changed, right
from npprune.report.numbers import headline
from npprune.store.checkpoints import read_config, write_checkpoint
from npprune.store.path_store import PathStore
from npprune.store.runs import RunFolder, read_plan
from tests.helpers.digits_network import random_digits_network

TRAIN = DataSection(train="digits:calibration", calibration="digits:calibration", batch_size=64)
QUICK = EvaluateSection(latency=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network and a run with paths of three neurons per block."""
    root = tmp_path_factory.mktemp("world")
    dense = random_digits_network(root / "dense")
    result = discover(
        ModelSection(name=str(dense)),
        TRAIN.model_copy(update={"images_per_class": 4}),
        DiscoverSection(topk=3, quadrature="gauss-legendre", points=2),
        root / "run",
    )
    assert result.discovery is not None
    assert (result.discovery.images, result.discovery.classes) == (40, 10)
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change at will."""
    shutil.copytree(world / "dense", tmp_path / "dense")
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def half(**more: object) -> PruneSection:
    return PruneSection(**{"keep": 0.5, "criterion": "variance", "selection": "uniform",
                           "compensation": "least-squares", **more})  # fmt: skip


def test_the_whole_line(run: Path) -> None:
    checkpoint = run.parent / "half"
    variant = prune(
        run, DataSection(), half(topk=1), checkpoint, work=Work(command="npprune prune ...")
    )
    assert variant.prune.widths == [64, 64]
    found = evaluate(checkpoint, DataSection(val="digits:test"), QUICK)
    assert found.dense_model is not None
    unit = 32 + 1 + 32  # a row of fc1, its bias, a column of fc2
    assert variant.model.params == found.dense_model.params - 2 * 64 * unit
    assert found.dense.top1.total == found.pruned.top1.total == 400
    assert found.pruned_model is not None
    assert found.pruned_model.widths == [64, 64]
    record = export_checkpoint(
        checkpoint, DataSection(val="digits:test"), ExportSection(latency=False)
    )
    assert record.passed
    assert [row.batch for row in record.parity] == [1, 3, 17]
    html, markdown = render_report(run)
    assert "half" in html.read_text()
    assert "half" in markdown.read_text()
    result = RunFolder(run).read_result()
    (stored,) = result.variants
    assert stored.evaluation is not None
    assert stored.export is not None
    assert result.commands == ["npprune prune ..."]


def unions(run: Path, topk: int) -> list[set[int]]:
    """Per block, the neurons that are among the most frequent `topk` of some class."""
    store = PathStore(run / "paths", RunFolder(run).read_manifest().settings_sha256)
    table = store.read_all(store.count())
    tops = [class_top(table.neurons, table.labels, c, topk) for c in range(10)]
    return [{n for top in tops for n in top[block]} for block in range(2)]


def test_topk_keeps_the_union_of_each_classs_most_frequent_neurons(run: Path) -> None:
    prune(run, DataSection(), half(topk=2, paths="protect"), run.parent / "a")
    plan = read_plan(run.parent / "a")
    for union, kept in zip(unions(run, 2), plan.keep, strict=True):
        assert union < set(kept)


@pytest.mark.parametrize("topk", [1, 3])
def test_without_a_budget_the_paths_alone_stay_rounded_up_to_sixteen(run: Path, topk: int) -> None:
    variant = prune(run, DataSection(), half(keep=None, topk=topk), run.parent / "a")
    expected = unions(run, topk)
    assert variant.prune.protected == [len(union) for union in expected]
    most = max(map(len, expected))  # uniform: all blocks get what the widest union needs
    assert variant.prune.widths == [-(-most // 16) * 16] * 2
    for union, kept in zip(expected, read_plan(run.parent / "a").keep, strict=True):
        assert union <= set(kept)


def test_a_union_beyond_the_budget_is_trimmed_by_votes_and_said(run: Path) -> None:
    variant = prune(run, DataSection(), half(topk=3, keep=0.125, paths="protect"), run.parent / "a")
    assert variant.prune.widths == [16, 16]
    expected = unions(run, 3)
    assert max(map(len, expected)) > 16
    for l, (union, kept) in enumerate(zip(expected, read_plan(run.parent / "a").keep, strict=True)):
        over = len(union) - 16
        said = [w for w in variant.prune.warnings if f"{over} with the fewest votes go" in w]
        assert bool(said) is (over > 0), (l, variant.prune.warnings)
        assert set(kept) < union if over > 0 else union <= set(kept)


def test_pruned_equals_masked_with_the_same_second_layers(run: Path) -> None:
    dense = npprune.load_model(run.parent / "dense")
    prune(run, DataSection(), half(compensation="none"), run.parent / "a")
    pruned = npprune.load_model(run.parent / "a")
    masked = mask_plan(dense, read_plan(run.parent / "a"))
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-5, atol=1e-5)


def test_compensation_brings_the_predictions_closer(run: Path) -> None:
    kl = {}
    for mode in ("none", "mean", "least-squares"):
        variant = prune(run, DataSection(), half(compensation=mode), run.parent / mode)
        kl[mode] = variant.prune.predicted["divergence_nats"]
    assert kl["least-squares"] < kl["mean"] < kl["none"]
    assert kl["least-squares"] < 0.1 * kl["mean"]


def test_a_network_without_paths_is_pruned_by_its_criterion(world: Path, tmp_path: Path) -> None:
    section = ModelSection(name=str(world / "dense"))
    variant = prune(section, TRAIN, half(), tmp_path / "plain")
    assert variant.prune.protected == [0, 0]
    evaluate(tmp_path / "plain", DataSection(val="digits:test"), QUICK)
    html, _ = render_report(tmp_path / "plain")
    assert html.is_file()


def test_what_happened_to_each_image_is_recorded(run: Path) -> None:
    out = run.parent / "sixteenth"
    prune(run, DataSection(), half(keep=0.125), out)
    found = evaluate(out, DataSection(val="digits:test"), QUICK)
    outcomes = found.outcomes
    assert outcomes is not None
    before, after = right(outcomes, "dense"), right(outcomes, "pruned")
    assert outcomes.images == 400
    assert (before.bit_count(), after.bit_count()) == (
        found.dense.top1.correct, found.pruned.top1.correct,
    )  # fmt: skip
    lost, gained = changed(before, after)
    assert lost > 0
    assert gained > 0
    shown = [image.lost for image in found.flipped]
    assert (shown.count(True), shown.count(False)) == (min(lost, 8), min(gained, 4))
    for image in found.flipped:
        assert ((image.dense if image.lost else image.pruned) == image.name) is True
        assert image.dense != image.pruned
        assert Image.open(BytesIO(base64.b64decode(image.picture))).size == (8, 8)
    assert found.deviations is not None
    assert sum(found.deviations.counts) == 400
    html, _ = render_report(run)
    assert html.read_text().count("<img") == len(found.flipped)
    assert html.stat().st_size < 1 << 20
    private = QUICK.model_copy(update={"thumbnails": False})
    without = evaluate(out, DataSection(val="digits:test"), private)
    assert (without.flipped, without.merged) == ([], [])
    assert without.outcomes == outcomes
    render_report(run)
    assert "<img" not in html.read_text()

    data = json.loads((run / "result.json").read_text())
    for key in ("outcomes", "flipped", "dense_reliability", "pruned_reliability", "deviations"):
        del data["variants"][0]["evaluation"][key]
    del data["checksum"]
    (run / "result.json").write_text(json.dumps(data))  # of an older version
    html, _ = render_report(run)
    assert "<img" not in html.read_text()


def test_chosen_classes_cut_the_head_and_give_three_numbers(run: Path) -> None:
    out = run.parent / "few"
    data = DataSection(classes=[3, 7, 8])
    variant = prune(run, data, half(keep_head=False), out)
    assert variant.model.num_classes == 3
    assert [c.name for c in read_config(out).classes] == ["3", "7", "8"]
    events: list[Event] = []
    found = evaluate(out, DataSection(val="digits:test"), QUICK, work=Work(emit=events.append))
    assert any("images of the checkpoint's 3 classes" in e.message for e in events)
    assert found.restricted_to == [3, 7, 8]
    assert found.data.classes == 3
    assert found.dense_all is not None
    assert found.dense_all.top1.total == found.dense.top1.total
    assert found.dense_all.top1.correct <= found.dense.top1.correct
    # the networks are compared among the same three classes, image by image too
    assert found.dense_restricted == found.dense
    change = found.pruned.top1.value - found.dense.top1.value
    assert found.top1_change.value == pytest.approx(change)
    rows = sum(row.images * row.dense_top1 for row in found.classes)
    assert rows == pytest.approx(found.dense.top1.correct)
    assert {image.dense for image in found.flipped} <= {"3", "7", "8"}
    some = evaluate(out, DataSection(val="digits:test", classes=[3, 8]), QUICK)
    assert some.data.classes == 2
    with pytest.raises(DataError, match=r"class `0` is not one of the 3 that .* head was cut to"):
        evaluate(out, DataSection(val="digits:test", classes=[0, 3]), QUICK)


def test_a_cut_network_is_pruned_again_with_the_images_it_came_from(run: Path) -> None:
    few, fewer = run.parent / "few", run.parent / "fewer"
    prune(run, DataSection(classes=[3, 7, 8]), half(), few)
    again = prune(ModelSection(name=str(few)), TRAIN, half(), fewer)
    assert again.prune.calibration is not None
    assert again.prune.calibration.classes == 3
    assert [c.name for c in read_config(fewer).classes] == ["3", "7", "8"]
    for folder in (few, fewer):  # what came from it still knows that others are left out
        events: list[Event] = []
        found = evaluate(
            folder, DataSection(val="digits:test"), QUICK, work=Work(emit=events.append)
        )
        assert found.data.classes == 3
        assert [row.name for row in found.classes] == ["3", "7", "8"]
        assert any("head was cut to `3`, `7`, `8`" in e.message for e in events)


def test_labels_that_are_no_better_than_chance_come_first(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    model = ModelSection(name=str(world / "dense"))  # untrained: as if labels were shifted
    variant = prune(model, TRAIN, half(), out)
    assert variant.prune.label_doubt.startswith("labels are probably shifted")
    found = evaluate(out, DataSection(val="digits:test"), QUICK)
    assert "of 400 images of digits:test" in found.label_doubt
    lines = headline(RunFolder(out).read_result())
    assert "of 400 images of digits:test" in lines[1]
    assert [line.startswith("Labels are probably shifted") for line in lines] == [True, True, False]


@pytest.mark.parametrize(("keep_head", "outputs"), [(False, 3), (True, 10)])
def test_what_stays_is_planned_on_the_head_that_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch, keep_head: bool, outputs: int
) -> None:
    seen = []

    def watched(subject: Subject, *args: Any, **kwargs: Any) -> Measured:
        view = subject.view
        seen.append(view.head(view.embed(torch.randn(1, 3, 8, 8))).shape[1])
        return measure(subject, *args, **kwargs)

    monkeypatch.setattr("npprune.pipeline.prune.stage.measure", watched)
    prune(run, DataSection(classes=[3, 7, 8]), half(keep_head=keep_head), run.parent / "few")
    assert seen == [outputs]


def test_a_kept_head_still_answers_all_classes(run: Path) -> None:
    out = run.parent / "few"
    prune(run, DataSection(classes=[3, 7]), half(keep_head=True), out)
    assert read_config(out).num_classes == 10
    found = evaluate(out, DataSection(val="digits:test"), QUICK)
    assert found.restricted_to == [3, 7]
    assert found.dense_all is None


def test_the_same_run_twice_is_the_same_bits(run: Path) -> None:
    for name in ("a", "b"):
        prune(run, DataSection(), half(topk=1), run.parent / name)
    one, two = (run.parent / n / "model.safetensors" for n in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_a_dry_run_writes_nothing(run: Path) -> None:
    before = sorted(run.parent.rglob("*"))
    prune(run, DataSection(), half(), run.parent / "never", dry_run=True)
    assert sorted(run.parent.rglob("*")) == before


def test_max_drop_refuses_a_budget_that_loses_more(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prediction = {"images": 30.0, "drop": 0.025}
    monkeypatch.setattr("npprune.pipeline.prune.stage._predict", lambda *args: dict(prediction))
    out = run.parent / "small"
    with pytest.raises(GateError, match=r"fall by 2\.5 points .* more than `max_drop` 2 ") as err:
        prune(run, DataSection(), half(max_drop=2.0), out)
    assert err.value.exit_code == 1
    assert not out.exists()
    prune(run, DataSection(), half(max_drop=3.0), out)
    assert out.exists()


def test_max_drop_alone_finds_the_smallest_network_within_it(run: Path) -> None:
    settings = half(keep=None, max_drop=100.0)
    variant = prune(run, DataSection(), settings, run.parent / "small")
    assert variant.prune.widths == [16, 16]  # any drop is allowed: the floor


@pytest.mark.parametrize(
    ("selection", "compensation"),
    [
        ("uniform", "least-squares"),
        ("global", "sequential"),
        ("measured", "least-squares"),
        pytest.param("uniform", "sequential", marks=pytest.mark.slow),
        pytest.param("global", "least-squares", marks=pytest.mark.slow),
        pytest.param("measured", "sequential", marks=pytest.mark.slow),
    ],
)
def test_selections_and_compensations_meet_the_budget(
    run: Path, selection: str, compensation: str
) -> None:
    settings = half(selection=selection, compensation=compensation, criterion="curvature-obs")
    variant = prune(run, DataSection(), settings, run.parent / "a")
    assert sum(variant.prune.widths) == 128
    assert all(0 <= lost < 1 for lost in variant.prune.details["lost_variance"])


@pytest.mark.parametrize(("target", "share"), [("target_params", 0.8), ("target_macs", 0.5)])
def test_targets_are_met_for_the_whole_network(run: Path, target: str, share: float) -> None:
    variant = prune(
        run, DataSection(), half(keep=None, round_to=1, **{target: share}), run.parent / "a"
    )
    dense = npprune.load_model(run.parent / "dense")
    whole = model_info(dense, ModelSource(ARCHITECTURE))
    got = variant.model.params if target == "target_params" else variant.model.macs
    all_of_it = whole.params if target == "target_params" else whole.macs
    assert got == pytest.approx(share * all_of_it, rel=0.01)


@pytest.mark.parametrize(("settings", "message"), [
    (PruneSection(), "a budget is needed"),
    (half(topk=4000), "`topk` must be at most 128"),
    (half(target_latency=0.5), "got `keep` and `target_latency`"),
])  # fmt: skip
def test_wrong_settings_are_named(run: Path, settings: PruneSection, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        prune(run, DataSection(), settings, run.parent / "x")
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert not (run.parent / "x").exists()


def test_a_recipe_without_a_budget_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    recipe = Recipe(
        name="x", model=ModelSection(name="nothing"), data=DataSection(val="digits:test")
    )
    with pytest.raises(UsageError, match="a budget is needed"):
        run_recipe(recipe, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_paths_need_a_run(world: Path, tmp_path: Path) -> None:
    section = ModelSection(name=str(world / "dense"))
    with pytest.raises(UsageError, match="no run folder was given"):
        prune(section, TRAIN, half(topk=1), tmp_path / "x")


def test_a_class_without_paths_is_refused(world: Path, tmp_path: Path) -> None:
    data = TRAIN.model_copy(update={"classes": [1, 2], "images_per_class": 2})
    dense = ModelSection(name=str(world / "dense"))
    discover(dense, data, DiscoverSection(points=1), tmp_path / "run")
    with pytest.raises(UsageError, match="no paths of class 5"):
        prune(tmp_path / "run", DataSection(classes=[1, 5]), half(), tmp_path / "x")


def test_paths_of_other_weights_are_refused(run: Path) -> None:
    other = random_digits_network(run.parent / "other")
    config = read_config(other)
    model: nn.Module = npprune.load_model(other)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    shutil.rmtree(run.parent / "dense")
    recipe = (run / "recipe.yaml").read_text()
    name = next(line for line in recipe.splitlines() if "dense" in line).split(": ")[1]
    changed = recipe.partition("\n")[2].replace(name, str(other))  # without its hash
    (run / "recipe.yaml").write_text(changed)
    write_checkpoint(other, config, state(model))
    with pytest.raises(StoreError, match=r"the paths of .* are of weights"):
        prune(run, DataSection(), half(), run.parent / "x")


def test_an_evaluation_finds_the_dense_network_again_after_a_move(run: Path) -> None:
    prune(run, DataSection(), half(), run.parent / "a")
    moved = run.parent.parent / f"{run.parent.name}-moved"
    shutil.move(run.parent, moved)
    found = evaluate(moved / "a", DataSection(val="digits:test"), QUICK)
    assert found.dense.top1.total == 400
    assert RunFolder(moved / "run").read_result().variants[0].evaluation is not None


def test_other_dense_weights_are_refused(run: Path) -> None:
    prune(run, DataSection(), half(), run.parent / "a")
    with pytest.raises(ModelError, match="was pruned from weights"):
        evaluate(
            run.parent / "a", DataSection(val="digits:test"), QUICK,
            dense_checkpoint=str(run.parent / "a"),
        )  # fmt: skip


def test_stages_say_what_they_do(run: Path) -> None:
    events: list[Event] = []
    prune(run, DataSection(), half(), run.parent / "a", work=Work(emit=events.append))
    said = [e.message for e in events if e.level == "info" and e.stage == "prune"]
    assert said[0] == "digits:calibration: 40 images, labels by the digit shown"
    assert said[1].startswith("preprocessing: 8x8")
    assert re.fullmatch(r"vit_tiny_patch16_224 on cpu \(.+\)", said[2])
    assert said[-1] == f"wrote {run.parent / 'a'}"
    counted = [e for e in events if e.stage == "statistics" and e.level == "progress"]
    assert [e.done for e in counted] == sorted(e.done for e in counted)
    assert counted[-1].done == counted[-1].total > 0


def test_the_python_api_needs_no_files() -> None:
    model = create(ARCHITECTURE, {**MODEL_ARGS, "depth": 2, "embed_dim": 32, "num_heads": 2})
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 5, 1])
    found = npprune.discover_paths(model, images, labels, topk=2)
    assert found.neurons.shape == (3, 2, 2)
    assert found.neurons.dtype == torch.int64
    assert found.scores.shape == (3,)
    keep = [sorted(set(found.neurons[:, l].flatten().tolist())) for l in range(2)]
    smaller = npprune.apply_plan(model, npprune.Plan(keep=keep, widths=[128, 128]))
    assert [b.mlp.fc2.in_features for b in smaller.blocks] == [len(k) for k in keep]
    assert np.isfinite(smaller(images).detach().numpy()).all()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"topk": 0}, "`topk` must be a whole number at least 1, got 0"),
    ({"method": "x"}, "`method` must be one of"),
    ({"labels": torch.tensor([1])}, "`labels` must be"),
])  # fmt: skip
def test_the_python_api_names_what_is_wrong(wrong: dict[str, object], message: str) -> None:
    model = create(ARCHITECTURE, {**MODEL_ARGS, "depth": 2, "embed_dim": 32, "num_heads": 2})
    args = {"labels": torch.tensor([1, 2]), **wrong}
    with pytest.raises(UsageError, match=message):
        npprune.discover_paths(model, torch.randn(2, 3, 8, 8), **args)

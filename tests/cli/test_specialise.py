"""`npprune specialise`: from a class list to an exported network, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npprune.cli import app
from npprune.cli.specialise import HEAL_MINUTES, PATH_IMAGES
from npprune.recipe import Recipe, load_recipe
from npprune.records import Result
from npprune.store.runs import RunFolder
from tests.helpers import report_example
from tests.helpers.digits_network import random_digits_network

BASE = ["--data", "digits:train", "--val", "digits:test", "--target-macs", "0.6"]


@pytest.mark.slow
def test_a_class_list_is_all_that_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, names = random_digits_network(tmp_path / "dense"), tmp_path / "some.txt"
    names.write_text("1\n3\n5\n")
    out = tmp_path / "ckpt" / "odd"
    args = ["specialise", str(model), "--classes", str(names), *BASE, "--out", str(out)]
    args += ["--path-images", "4", "--heal-minutes", "0.02"]
    assert app.run_app(args) == 0
    said = capsys.readouterr().out
    run, healed = tmp_path / "reports" / "odd", out.with_name("odd_healed")
    result = RunFolder(run).read_result()
    assert result.discovery is not None
    assert result.discovery.images == 12
    assert {v.name for v in result.variants} == {"odd", "odd_healed"}
    for variant in result.variants:
        assert variant.model.num_classes == 3
        assert variant.evaluation is not None
        for row in variant.evaluation.classes:
            assert row.path_kept is not None
            assert 0 < row.path_kept <= 1
    assert (healed / "model.onnx").is_file()
    assert (run / "report.html").is_file()
    assert str(healed) in said


def test_its_line_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run_recipe(recipe: Recipe, **places: Any) -> Result:
        asked.update(places, recipe=recipe)
        return report_example.result()

    monkeypatch.setattr("npprune.pipeline.run.run_recipe", run_recipe)
    names, out = tmp_path / "some.txt", tmp_path / "ckpt" / "odd"
    names.write_text("1\n3\n5\n")
    args = ["specialise", "vit_tiny_patch16_224", "--classes", str(names), *BASE]
    args += ["--path-images", "4", "--heal-minutes", "0.5", "--topk", "3", "--out", str(out)]
    assert app.run_app(args) == 0
    recipe = asked["recipe"]
    assert recipe.data.classes is not None
    assert (recipe.data.train, recipe.data.val) == ("digits:train", "digits:test")
    assert (recipe.discover.topk, recipe.discover.images_per_class) == (3, 4)
    assert (recipe.prune.topk, recipe.prune.target_macs, recipe.heal.minutes) == (3, 0.6, 0.5)
    assert recipe.evaluate is not None
    assert recipe.export is not None
    assert asked["run"] == tmp_path / "reports" / "odd"
    assert asked["checkpoint"] == out
    assert app.run_app([*args, "--heal-minutes", "0"]) == 0
    assert asked["recipe"].heal is None


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x")]
    assert app.run_app(["specialise", "vit_tiny_patch16_224", *BASE, *out]) == 2
    assert "`--classes` is needed" in capsys.readouterr().err
    one = ["specialise", "vit_tiny_patch16_224", *BASE, *out, "--classes", "1"]
    assert app.run_app([*one, "--heal-minutes", "-1"]) == 2
    assert "`--heal-minutes` must not be negative" in capsys.readouterr().err


def test_the_shipped_recipe_is_the_same_line() -> None:
    recipe = load_recipe("specialise")
    assert recipe.discover is not None
    assert (recipe.discover.topk, recipe.discover.images_per_class) == (5, PATH_IMAGES)
    assert recipe.heal is not None
    assert recipe.heal.minutes == HEAL_MINUTES

"""The registry of criteria: complete, and the only place where a criterion is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from npprune.criteria import CRITERIA, register
from npprune.errors import RecipeError, UsageError
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.study.rows import settings_of
from npprune.recipe import DataSection, ModelSection, PruneSection, StudySection, load_recipe
from tests.helpers.digits_network import random_digits_network

NAMES = [
    "random", "magnitude", "activation", "variance", "variance-weight", "wanda", "taylor",
    "fisher", "path-votes", "path-attribution", "obs", "curvature-obs",
]  # fmt: skip


@pytest.fixture
def peak() -> Iterator[str]:
    """A criterion of one's own, for as long as a test runs."""

    @register("peak", "the largest second moment", "moments")
    def largest(context: Any, l: int) -> Tensor:
        return context.moments(l).second

    yield "peak"
    del CRITERIA["peak"]


def recipe(tmp_path: Path, criterion: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(
        f"name: own\nmodel: {{name: x}}\nprune: {{keep: 0.5, criterion: {criterion}}}\n"
    )
    return path


def test_the_registry_is_complete_and_every_entry_has_a_source() -> None:
    assert list(CRITERIA) == NAMES
    assert {n for n, c in CRITERIA.items() if c.paths} == {"path-votes", "path-attribution"}
    assert {n for n, c in CRITERIA.items() if c.draws} == {"random"}
    assert all(c.source and c.function.__doc__ and c.name == n for n, c in CRITERIA.items())


def test_it_loads_no_torch() -> None:
    code = "import sys, npprune.criteria; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_of_ones_own_prunes_and_stands_in_recipe_and_study(peak: str, tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, peak)).prune.criterion == peak  # type: ignore[union-attr]
    assert peak in {row.criterion for row in settings_of(StudySection(), with_paths=False)}
    model = ModelSection(name=str(random_digits_network(tmp_path / "dense")))
    data = DataSection(calibration="digits:calibration", images_per_class=2)
    kept = [
        prune(
            model, data,
            PruneSection(keep=0.5, criterion=name, selection="uniform", compensation="none"),
            tmp_path / name, dry_run=True,
        ).prune
        for name in (peak, "variance")
    ]  # fmt: skip
    assert kept[0].criterion == peak
    assert kept[0].plan_sha256 != kept[1].plan_sha256


def test_a_notebooks_cell_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CRITERIA, "mine", raising=False)
    for source in ("first", "second"):

        @register("mine", source)
        def mine(context: Any, l: int) -> Tensor:
            return context.random(l)

    assert CRITERIA.pop("mine").source == "second"


def test_what_is_not_registered_is_refused_with_the_nearest(peak: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"`prune\.criterion` must be one of .*`peak`") as err:
        load_recipe(recipe(tmp_path, "peek"))
    assert err.value.hint == "did you mean `peak`?"
    with pytest.raises(UsageError, match="registered already"):
        register("peak", "again")(lambda context, l: None)
    with pytest.raises(UsageError, match=r"got `moment`"):
        register("other", "x", "moment")  # type: ignore[arg-type]

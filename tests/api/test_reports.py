"""Study, analyze, explore and report on what is in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import npprune
import npprune.report.text
from tests.api.conftest import SMALL

Data = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def found(model: nn.Module, data: Data) -> npprune.Found:
    few = data[0][:12], data[1][:12]
    return npprune.discover(model, few, topk=2, points=2)


def test_a_study_in_memory_and_the_report_of_a_folder(
    model: nn.Module, data: Data, found: npprune.Found, tmp_path: Path
) -> None:
    few = data[0][:20], data[1][:20]
    result = npprune.study(
        model, few, few, paths=found, out=tmp_path / "study", criteria=["magnitude", "path-votes"],
        selections=["uniform"], compensations=["none"], keep=[0.5], **SMALL,
    )  # fmt: skip
    table = result.analyses["study"]
    at = table.columns.index("criterion")
    assert {row[at] for row in table.rows} >= {"magnitude", "path-votes"}
    html, markdown = npprune.report(tmp_path / "study", out=tmp_path / "pages")
    assert html.parent == tmp_path / "pages"
    assert "path-votes" in markdown.read_text()


def test_paths_in_memory_are_analyzed_and_explored(
    model: nn.Module, found: npprune.Found, tmp_path: Path
) -> None:
    tables = npprune.analyze("scores", found, model=model, methods=["neuron-path", "random"])
    assert [row[0] for row in tables["scores"].rows] == ["neuron-path", "random"]
    similar = npprune.analyze("similarity", found)
    assert similar["similarity"].figure is not None
    page = npprune.explore(found, tmp_path / "pages", model=model, neurons=4, ablate=2)
    assert page == tmp_path / "pages" / "index.html"
    html, _ = npprune.report(found, out=tmp_path)
    assert "Joint attribution scores" in html.read_text()


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(npprune.errors.UsageError, match="a run is needed"):
        npprune.report()
    with pytest.raises(npprune.errors.UsageError, match="`what` must be one of"):
        npprune.analyze("scroes", "reports/x")  # type: ignore[arg-type]
    with pytest.raises(npprune.errors.UsageError, match="there is no setting `neuron` here"):
        npprune.explore("reports/x", "pages", neuron=3)


def test_the_packages_do_not_hide_the_functions() -> None:
    assert callable(npprune.report)
    assert npprune.report.__module__ == "npprune.api.reports"

"""Several runs side by side: who is compared with whom, and what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from npprune.cli import app
from npprune.errors import UsageError
from npprune.records import Outcomes, Result, to_json
from npprune.report import comparing, pareto, sections, tradeoff
from npprune.report.document import Table
from npprune.report.html import as_html
from npprune.report.markdown import as_markdown
from tests.helpers import report_example as example
from tests.report.test_report import HOSTILE, Page


def a_run(name: str, right: list[bool], dense: list[bool], sha256: str = "list") -> Result:
    """One pruned network, right on some images."""
    result = example.result([example.variant("half")])
    result.name = name
    done = result.variants[0].evaluation
    assert done
    done.outcomes = Outcomes(len(right), sha256, example.packed(dense), example.packed(right))
    return result


DENSE = [True] * 90 + [False] * 10
A = [True] * 60 + [False] * 40
B = [True] * 50 + [False] * 10 + [True] * 25 + [False] * 15  # against A: loses 10, gains 25


def test_pairs_on_the_same_images_are_tested() -> None:
    page = comparing.build([a_run("one", A, DENSE), a_run("two", B, DENSE)])
    text = as_markdown(page)
    assert "On the same 100 images of folder:imagenet/val, image by image." in text
    # exact p of 10 and 25 is 0.0167; the least of three (both against dense) is larger times one
    assert (
        "| two: half | one: half | +15.0 points (95 % +3.7 to +26.3) | 0.017 | 25 | 10 | 50 | 15 |"
        in text
    )
    assert "| one: half | dense | −30.0 points" in text
    assert page.headline == [
        "two: half is better than one: half on the same 100 images: +15.0 points of top-1 "
        "(95 % +3.7 to +26.3, p = 0.017)."
    ]
    assert page.warnings == []


def a_study() -> Result:
    """A run whose study has two points, at 50 % and 70 % of 1.26 G MACs."""
    study = example.result([])
    study.name = "ways"
    points = {"obs": [(50.0, 62.0, 58.6, 65.3), (70.0, 75.8, 72.7, 78.6)]}
    study.analyses["study"] = pareto("Study", points, x_label=tradeoff.STUDY_COST)
    return study


def test_every_point_of_a_study_is_in_the_picture() -> None:
    text = as_markdown(comparing.build([a_run("one", A, DENSE), a_study()]))
    assert "| study ways: obs | 0.63 G | 62.0 % (95 % 58.6–65.3) |" in text
    assert "| study ways: obs | 0.88 G | 75.8 % (95 % 72.7–78.6) |" in text
    with pytest.raises(UsageError, match="at least two pruned networks"):
        comparing.build([a_study(), a_study()])
    own = a_run("one", A, DENSE)  # a study in the run itself
    own.analyses = a_study().analyses
    for said in ("| study: obs | 0.63 G |", "| dense | 1.26 G | 82.5 %", "| half | 0.90 G |"):
        assert said in as_markdown(sections.build(own))


def test_a_dozen_networks_are_compared_in_tables_and_a_picture() -> None:
    page = comparing.build([a_run(f"run {i}", A if i % 2 else B, DENSE) for i in range(12)])
    tests = next(s for s in page.sections if s.anchor == "tests").items[0]
    assert isinstance(tests, Table)
    assert [row[0].value for row in tests.rows] == [f"run {i}: half" for i in range(12)]
    assert {row[1].value for row in tests.rows} == {"dense"}
    beside = page.sections[0].items[1]
    assert isinstance(beside, Table)
    assert beside.columns == ["", "dense", *(f"run {i}: half" for i in range(12))]
    assert as_html(page).count("<svg") == 1


def test_networks_that_are_not_told_apart_are_not_ranked() -> None:
    few = [True] * 61 + [False] * 39
    (line,) = comparing.build([a_run("one", A, DENSE), a_run("two", few, DENSE)]).headline
    assert line.startswith("two: half and one: half are not told apart by the same 100 images")
    assert "p = 1.000" in line


def test_other_images_and_older_results_are_said() -> None:
    old = a_run("old", A, DENSE)
    assert old.variants[0].evaluation
    old.variants[0].evaluation.outcomes = None
    page = comparing.build([a_run("one", A, DENSE), a_run("two", B, DENSE, "others"), old])
    text = as_markdown(page)
    assert not page.headline
    assert "Not all networks were evaluated on the same images" in page.warnings[0]
    assert "| two: half | one: half |" not in text
    assert "old: half was evaluated by an older npprune" in text
    assert "`npprune eval ckpt/half --data folder:imagenet/val`" in text


def test_another_dense_network_is_a_network_of_its_own() -> None:
    other = a_run("two", B, A)
    other.model.source.sha256, other.model.source.architecture = "f00" * 20, "other"
    page = comparing.build([a_run("one", A, DENSE), other])
    assert "The runs began with different dense networks." in page.warnings
    assert "| dense other f00f00 | dense vit\\_tiny" in as_markdown(page)


def test_hostile_names_stay_text() -> None:
    run = a_run(HOSTILE, A, DENSE)
    run.variants[0].name = HOSTILE
    page = as_html(comparing.build([run, run]))
    assert "<script" not in page
    assert not Page(page).open


def test_one_network_is_no_comparison() -> None:
    with pytest.raises(UsageError, match="at least two pruned networks, and these runs have 1"):
        comparing.build([a_run("one", A, DENSE), example.result([])])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, right in zip(runs, (A, B), strict=True):
        run.mkdir()
        (run / "result.json").write_text(to_json(a_run(run.name, right, DENSE)))
    assert app.run_app(["report", *map(str, runs)]) == 0
    assert f"HTML comparison  {runs[0] / 'comparison.html'}" in capsys.readouterr().out
    page = (runs[0] / "comparison.html").read_text()
    assert "the result.json of each run" in page
    assert not Page(page).open
    out = tmp_path / "out"
    assert app.run_app(["report", *map(str, runs), "--out", str(out)]) == 0
    assert (out / "comparison.md").is_file()
    assert app.run_app(["report", str(runs[0]), str(runs[0] / "result.json")]) == 2
    assert "is there twice" in capsys.readouterr().err

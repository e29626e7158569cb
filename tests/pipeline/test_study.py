"""A study: rows that equal a run of their own, resumed and never computed twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npprune.cli.app import run_app
from npprune.core.attribution.votes import attribution
from npprune.errors import StoreError, UsageError
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.heal.stage import heal_pruned
from npprune.pipeline.prune import latency as timing
from npprune.pipeline.prune.opening import _vote
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.study import stage as module
from npprune.pipeline.study.rows import (
    Setting,
    StudyDense,
    StudyRow,
    bits,
    grouped,
    settings_of,
)
from npprune.pipeline.study.stage import study
from npprune.pipeline.study.tables import analyses
from npprune.recipe import (
    DataSection,
    DiscoverSection,
    EvaluateSection,
    HealSection,
    ModelSection,
    PruneSection,
    StudySection,
)
from npprune.records import Mean, Rate
from npprune.store import atomic
from npprune.store.path_store import PathTable
from npprune.store.runs import RunFolder
from tests.helpers.digits_network import random_digits_network
from tests.pipeline.test_heal import dense_network

DATA = DataSection(
    calibration="digits:calibration", val="digits:test", images_per_class=10, batch_size=64
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network on the digits, `dense`, and a run with its paths, `run`."""
    root = tmp_path_factory.mktemp("study")
    random_digits_network(root / "dense")
    discover(
        ModelSection(name=str(root / "dense")),
        DataSection(train="digits:calibration", images_per_class=2, batch_size=64),
        DiscoverSection(topk=2, points=2),
        root / "run",
    )
    return root


def dense_of(world: Path) -> ModelSection:
    return ModelSection(name=str(world / "dense"))


def rows_of(folder: Path) -> dict[str, StudyRow]:
    return {p.stem: atomic.read_json(StudyRow, p) for p in (folder / "rows").glob("*.json")}


# ---------------------------------------------------------------- which rows


def test_rows_are_all_combinations_each_once() -> None:
    rows = settings_of(
        StudySection(
            criteria=["variance", "fisher", "variance"], keep=[0.5, 0.7], seeds=[3, 4],
            selections=["uniform", "global"], compensations=["none", "mean", "least-squares"],
        ),
        with_paths=False,
    )  # fmt: skip
    # the variance draws nothing: one seed is enough
    assert len(rows) == len(set(rows)) == 2 * 2 * 3 * (1 + 2)
    assert {r.seed for r in rows if r.criterion == "variance"} == {3}
    assert len({r.file_name for r in rows}) == len(rows)


def test_path_criteria_and_protection_come_with_a_run() -> None:
    without, with_run = (settings_of(StudySection(), paths) for paths in (False, True))
    assert not {"path-votes", "path-attribution"} & {r.criterion for r in without}
    assert {"path-votes", "path-attribution"} <= {r.criterion for r in with_run}
    assert {r.protect for r in without} == {False}
    assert {r.protect for r in with_run} == {False, True}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"criteria": ["path-votes"]}, "criterion `path-votes` reads paths"),
        ({"protect": ["on"]}, "`protect=on` reads paths"),
        ({"topk": 1}, "`topk` reads paths"),
    ],
)
def test_what_needs_a_run_is_refused_without(asked: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of(StudySection(**asked), with_paths=False)


def test_neighbours_share_statistics_and_scores() -> None:
    rows = settings_of(
        StudySection(
            criteria=["variance", "fisher", "wanda", "taylor"], keep=[0.5, 0.7], seeds=[0, 1]
        ),
        with_paths=False,
    )
    ordered = grouped(rows)
    assert sorted(ordered, key=rows.index) == rows
    changes = sum(a.scores != b.scores for a, b in zip(ordered, ordered[1:], strict=False))
    assert changes == len({r.scores for r in rows}) - 1
    gates = [r.criterion in ("fisher", "taylor") for r in ordered]
    assert sum(a != b for a, b in zip(gates, gates[1:], strict=False)) == 1


# ---------------------------------------------------------------- the work


@pytest.mark.parametrize(
    ("criterion", "selection", "compensation"),
    [
        ("random", "uniform", "none"),
        ("curvature-obs", "measured", "sequential"),
        pytest.param("fisher", "global", "least-squares", marks=pytest.mark.slow),
    ],
)
def test_a_row_is_what_prune_and_eval_would_give(
    world: Path, tmp_path: Path, criterion: str, selection: str, compensation: str
) -> None:
    # a first criterion shares statistics with the one compared: that must change nothing
    first = {"random": "variance", "curvature-obs": "obs", "fisher": "taylor"}[criterion]
    settings = StudySection(
        criteria=[first, criterion], selections=[selection], compensations=[compensation],
        keep=[0.5, 0.75], seeds=[5],
    )  # fmt: skip
    study(dense_of(world), DATA, settings, tmp_path / "study")
    (row,) = (
        r for r in rows_of(tmp_path / "study").values()
        if (r.setting.criterion, r.setting.keep) == (criterion, 0.75)
    )  # fmt: skip
    own = PruneSection(
        keep=0.75, criterion=criterion, selection=selection, compensation=compensation
    )
    variant = prune(dense_of(world), DATA, own, tmp_path / "own", work=Work(seed=5))
    found = evaluate(tmp_path / "own", DATA, EvaluateSection(latency=False))
    assert row.widths == variant.prune.widths
    assert row.top1 == found.pruned.top1
    assert row.change == found.top1_change
    assert (row.macs, row.params) == (variant.model.macs, variant.model.params)
    assert row.correct.count("1") == row.top1.correct


@pytest.mark.parametrize("classes", [None, pytest.param([1, 4, 7], marks=pytest.mark.slow)])
def test_a_healed_row_is_what_prune_heal_and_eval_would_give(
    tmp_path: Path, classes: list[int | str] | None
) -> None:
    data = DATA.model_copy(update={"classes": classes})
    dense_network(tmp_path / "dense")
    settings = StudySection(
        criteria=["variance"], compensations=["none"], keep=[0.25], seeds=[5], heal=3
    )
    result = study(dense_of(tmp_path), data, settings, tmp_path / "study")
    (row,) = rows_of(tmp_path / "study").values()
    prune(
        dense_of(tmp_path), data,
        PruneSection(
            keep=0.25, criterion="variance", selection="uniform", compensation="none"
        ),
        tmp_path / "own", work=Work(seed=5),
    )  # fmt: skip
    healed, variant = heal_pruned(tmp_path / "own", HealSection(epochs=3), work=Work(seed=5))
    assert variant.heal is not None
    found = evaluate(healed, data, EvaluateSection(latency=False))
    assert row.healed == (found.pruned_restricted or found.pruned).top1
    assert row.healed_divergence.value < 0.95 * row.divergence.value
    assert row.healed_correct.count("1") == row.healed.correct
    assert row.healing_seconds > 0
    assert not list((tmp_path / "study" / "rows").glob("*.partial"))
    table = result.analyses["study"]
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["healed, %"] == round(100 * row.healed.value, 2)
    assert "no training" not in table.text
    other = settings.model_copy(update={"heal": None})
    with pytest.raises(StoreError, match="heal"):
        study(dense_of(tmp_path), data, other, tmp_path / "study")


def test_finished_rows_are_never_computed_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    settings = StudySection(criteria=["variance", "magnitude", "wanda"], keep=[0.5])
    whole = study(dense_of(world), DATA, settings, tmp_path / "whole")
    real, made = module._Maker.row, []

    def second_is_interrupted(maker: Any, row: Setting, path: Path) -> StudyRow:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(row)
        return real(maker, row, path)

    monkeypatch.setattr(module._Maker, "row", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(dense_of(world), DATA, settings, out)
    assert len(rows_of(out)) == 1
    partial = RunFolder(out).read_result().analyses["study"]
    assert "Not computed yet: 2 rows" in partial.text
    (file,) = (out / "rows").glob("*.json")
    before = file.stat().st_mtime_ns

    def counted(maker: Any, row: Setting, path: Path) -> StudyRow:
        made.append(row)
        return real(maker, row, path)

    monkeypatch.setattr(module._Maker, "row", counted)
    events: list[Event] = []
    result = study(
        dense_of(world), DATA, settings, out, work=Work(emit=events.append, command="npprune x")
    )
    assert len(made) == len(set(made)) == 3
    assert file.stat().st_mtime_ns == before
    table, reference = result.analyses["study"], whole.analyses["study"]
    seconds = table.columns.index("seconds")
    assert [r[:seconds] for r in table.rows] == [r[:seconds] for r in reference.rows]
    assert result.commands == ["npprune x"]
    shown = [(e.done, e.total) for e in events if e.stage == "study" and e.level == "progress"]
    assert shown == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(module._World, "load", lambda self: pytest.fail("images were decoded"))
    study(dense_of(world), DATA, settings, out)


def test_other_lists_add_rows_and_other_images_are_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    study(dense_of(world), DATA, StudySection(criteria=["variance"]), out)
    result = study(dense_of(world), DATA, StudySection(criteria=["magnitude"], keep=[0.7]), out)
    assert len(result.analyses["study"].rows) == len(rows_of(out)) == 2
    fewer = DATA.model_copy(update={"images_per_class": 5})
    for dry_run in (True, False):
        with pytest.raises(StoreError, match="belongs to a run of other settings"):
            study(dense_of(world), fewer, StudySection(), out, dry_run=dry_run)
        with pytest.raises(StoreError, match="`round_to`: 16 -> 8"):
            study(dense_of(world), DATA, StudySection(round_to=8), out, dry_run=dry_run)


def test_a_budget_that_cannot_be_met_is_a_row_that_says_so(world: Path, tmp_path: Path) -> None:
    settings = StudySection(
        criteria=["variance"], selections=["global"], keep=[0.05, 0.5], min_keep=32
    )
    result = study(dense_of(world), DATA, settings, tmp_path / "study")
    table = result.analyses["study"]
    assert len(table.rows) == 1
    assert "Not possible: variance, global, least-squares, 5 % kept, seed 0: " in table.text
    assert "the smallest widths allowed cost" in table.text


def test_paths_are_compared_and_reported(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    settings = StudySection(criteria=["variance", "path-votes", "path-attribution"], topk=1)
    data = DataSection(val="digits:test", images_per_class=10, batch_size=64)
    result = study(
        tmp_path / "run", data, settings, tmp_path / "study", work=Work(command="npprune study r")
    )
    table = result.analyses["study-paths"]
    assert {row[1] for row in table.rows} == {
        "variance + paths", "path-votes", "path-votes + paths", "path-attribution",
        "path-attribution + paths",
    }  # fmt: skip
    assert {row[2] for row in table.rows} == {"variance"}
    assert "Of 5 comparisons:" in table.text
    rows = rows_of(tmp_path / "study")
    assert sum(rows["keep0.5_variance_paths_uniform_least-squares_seed0"].protected) > 0
    html = (tmp_path / "study" / "report.html").read_text()
    assert "What neuron paths bring" in html
    assert "npprune study r" in html
    assert "Nothing has been pruned" not in html


def test_chosen_classes_are_measured_among_themselves(world: Path, tmp_path: Path) -> None:
    data = DATA.model_copy(update={"classes": [1, 4, 7]})
    # curvature and harm are those of the network with the head cut to these classes
    settings = StudySection(criteria=["curvature-obs"], selections=["measured"])
    result = study(dense_of(world), data, settings, tmp_path / "study")
    own = PruneSection(keep=0.5, compensation="least-squares")
    prune(dense_of(world), data, own, tmp_path / "own")
    found = evaluate(tmp_path / "own", data, EvaluateSection(latency=False))
    (row,) = rows_of(tmp_path / "study").values()
    assert found.pruned_restricted is not None
    assert row.top1 == found.pruned_restricted.top1
    dense = atomic.read_json(StudyDense, tmp_path / "study" / "dense.json")
    assert found.dense_restricted is not None
    assert dense.top1 == found.dense_restricted.top1
    assert dense.top1_all == found.dense.top1
    assert "among the 3 chosen classes" in result.analyses["study"].text


def test_a_dry_run_lists_the_rows_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    settings = StudySection(criteria=["variance", "fisher"], seeds=[0, 1])
    table = study(dense_of(world), DATA, settings, out, dry_run=True).analyses["study"]
    assert [row[1] for row in table.rows] == ["variance", "fisher", "fisher"]
    assert not out.exists()


@pytest.mark.slow
def test_latency_is_measured_beside_dense(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "PAIR_SECONDS", 0.05)
    settings = StudySection(criteria=["magnitude"], latency=True, latency_batch=4)
    result = study(dense_of(world), DATA, settings, tmp_path / "study")
    (row,) = rows_of(tmp_path / "study").values()
    assert row.latency is not None
    assert (row.latency.batch, row.latency.runtime) == (4, "onnxruntime")
    figure = result.analyses["study-latency"].figure
    assert figure is not None
    assert figure.series[0].x == [pytest.approx(100 * row.latency.ratio, abs=0.01)]
    assert "latency, %" in result.analyses["study"].columns


def test_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "study", str(world / "dense"), "--criteria", "variance,random", "--seeds", "0,1",
        "--calibration", "digits:calibration", "--val", "digits:test", "--images-per-class", "5",
        "--out", str(tmp_path / "study"),
    ]  # fmt: skip
    assert run_app([*args, "--dry-run"]) == 0
    assert "random        1" in capsys.readouterr().out
    assert run_app([*args, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "result"
    assert len(document["analyses"]["study"]["rows"]) == 2
    assert run_app(args) == 0
    assert "selection uniform, compensation least-squares" in capsys.readouterr().out
    assert run_app([*args, "--keep", "0.5,1.5"]) == 2
    assert "`--keep` must be in (0, 1] each, got `0.5,1.5`" in capsys.readouterr().err


# ---------------------------------------------------------------- the tables


def a_row(criterion: str, right: list[int], seed: int = 0, protect: bool = False) -> StudyRow:
    correct, n = sum(right), len(right)
    zero = Mean(0.1, 0.0, 0.1, 0.1, n)
    return StudyRow(
        Setting(criterion, "uniform", "mean", 0.5, protect, seed),
        top1=Rate(correct, n, correct / n, 0.0, 1.0), change=zero, divergence=zero,
        correct=bits(torch.tensor(right) == 1), params=10**6, macs=5 * 10**8, seconds=2.0,
    )  # fmt: skip


def table_of(rows: list[StudyRow], paths: bool = False) -> dict[str, object]:
    n = len(rows[0].correct)
    dense = StudyDense(
        Rate(n, n, 1.0, 0.5, 1.0), Rate(n, n, 1.0, 0.5, 1.0), "1" * n, 10**6, 10**9, 9
    )
    return analyses(rows, [], dense, calibration="c", val="v", classes=None, paths=paths)


def test_seeds_are_averaged_and_their_spread_shown() -> None:
    rows = [a_row("random", [1, 1, 0, 0], 0), a_row("random", [1, 0, 0, 0], 1)]
    (table,) = table_of([*rows, a_row("variance", [1, 1, 1, 0])]).values()
    named = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    first, second = (r for r in table.rows)
    assert first[1] == "variance"
    assert second[table.columns.index("top-1, %")] == 37.5
    assert named[1]["seeds"] == 2
    assert named[1]["±, seeds"] == pytest.approx(100 * np.std([0.5, 0.25], ddof=1), abs=0.01)
    assert named[0]["±, seeds"] is None
    assert named[1]["to best, points"] == -37.5
    assert named[0]["to dense, points"] == -25.0


def test_what_healing_gains_is_paired_over_images() -> None:
    rows = [a_row("variance", [1, 0, 0, 0]), a_row("wanda", [1, 1, 1, 0])]
    rows[0].healed_correct, rows[0].healed, rows[0].healing_seconds = "1110", rows[1].top1, 3.0
    rows[0].healed_divergence = Mean(0.05, 0.0, 0.1, 0.1, 4)
    table = table_of(rows)["study"]
    healed = {r[1]: dict(zip(table.columns[-8:], r[-8:], strict=True)) for r in table.rows}
    assert healed["variance"]["healed, %"] == 75.0
    assert healed["variance"]["gain, points"] == 50.0
    assert healed["variance"]["healed KL, nats"] == 0.05
    assert healed["variance"]["healing, s"] == 3.0
    assert set(healed["wanda"].values()) == {None}  # from before healing was asked for


def test_differences_are_paired_over_images() -> None:
    g = np.random.default_rng(0)
    a = g.integers(0, 2, 200)
    b = a.copy()
    b[:20] = 1 - b[:20]
    rows = [a_row("variance", a.tolist()), a_row("fisher", b.tolist())]
    (table,) = table_of(rows).values()
    at = table.columns.index("to best, points")
    value, low, high = table.rows[1][at : at + 3]
    difference = (b - a if a.mean() >= b.mean() else a - b) * 100
    half = 1.959963984540054 * difference.std(ddof=1) / np.sqrt(200)
    assert value == pytest.approx(difference.mean(), abs=0.01)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)


def test_a_loss_of_the_paths_is_shown_like_a_win() -> None:
    good, bad = [1] * 90 + [0] * 10, [1] * 30 + [0] * 70
    rows = [
        a_row("fisher", good), a_row("path-votes", bad),
        a_row("fisher", [1] * 100, protect=True), a_row("path-attribution", good),
    ]  # fmt: skip
    table = table_of(rows, paths=True)["study-paths"]
    verdict = {row[1]: row[table.columns.index("verdict")] for row in table.rows}
    assert verdict == {
        "path-votes": "worse", "fisher + paths": "better", "path-attribution": "not told apart"
    }  # fmt: skip
    assert "better 1, worse 1, not told apart 1" in table.text


# ---------------------------------------------------------------- path attribution


def test_attribution_sums_the_scores_of_the_paths_through_a_neuron() -> None:
    neurons = np.array([[[0, 2], [1, 0]], [[2, 1], [1, 3]]])
    first, second = attribution(neurons, [0.5, -0.25], [3, 5])
    np.testing.assert_allclose(first, [0.5, -0.25, 0.25])
    np.testing.assert_allclose(second, [0.5, 0.25, 0, -0.25, 0])
    with pytest.raises(ValueError, match="but 1 scores"):
        attribution(neurons, [0.5], [3, 5])
    with pytest.raises(ValueError, match=r"block 1: neurons must lie in 0\.\.2"):
        attribution(neurons, [0.5, 1], [3, 3])


def test_every_class_counts_the_same_in_the_attribution() -> None:
    table = PathTable(
        neurons=np.array([[[0]], [[0]], [[1]]]), scores=np.array([1.0, 3.0, 1.5]),
        labels=np.array([7, 7, 8]), ids=np.array(["a", "b", "c"]), positions=np.arange(3),
    )  # fmt: skip

    class View:
        widths = (3,)

    found = _vote(table, [7, 8], View(), 1)  # type: ignore[arg-type]
    torch.testing.assert_close(
        found.attribution[0], torch.tensor([2.0, 1.5, 0.0], dtype=torch.float64)
    )

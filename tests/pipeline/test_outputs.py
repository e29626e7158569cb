"""No stage begins whose output is its input or cannot be written; what was found is never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npprune.cli import app
from npprune.errors import NpPruneError, StoreError, UnstoredError, UsageError
from npprune.models.info import model_info
from npprune.pipeline.common import outputs
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.path_files import export_released, import_released
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.evaluate import stage as evaluating
from npprune.pipeline.export.bench import BenchSettings, bench_checkpoint, bench_files
from npprune.pipeline.export.stage import export_checkpoint, export_model
from npprune.pipeline.heal.stage import heal
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.run import run_recipe
from npprune.pipeline.study.stage import study
from npprune.recipe import (
    DataSection,
    DiscoverSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
    Recipe,
    StudySection,
)
from npprune.records import Environment, Result, Variant
from npprune.store.checkpoints import read_config
from npprune.store.runs import RunFolder
from tests.helpers.deploying import plan_of, write_dense, write_images, write_pruned

NO_IMAGES = DataSection(train="folder:none", calibration="folder:none", val="folder:none")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dense network, one pruned from it, other names of both, and a file of weights."""
    monkeypatch.chdir(tmp_path)
    dense = write_dense(tmp_path / "dense")
    write_pruned(tmp_path / "half", tmp_path / "dense", dense, plan_of(dense))
    (tmp_path / "link").symlink_to("half")
    return tmp_path


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage may begin: opening a network or images is a failure."""

    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    stages = [
        f"{name}.stage" for name in ("prune", "heal", "export", "discover", "study", "evaluate")
    ]
    for module in [*stages, "export.bench"]:
        for name in ("open_network", "open_checkpoint", "open_images", "read_images"):
            monkeypatch.setattr(f"npprune.pipeline.{module}.{name}", begun, raising=False)


def _prune(source: Path | ModelSection, out: Path) -> Any:
    return prune(source, NO_IMAGES, PruneSection(keep=0.5), out)


def _heal(out: Path, dense: str | None = None) -> Any:
    return heal(Path("half"), NO_IMAGES, HealSection(epochs=1), out, dense_checkpoint=dense)


WEIGHTS = ModelSection(name="auto", checkpoint="dense/model.safetensors")
HALF = ModelSection(name="half")
TIMM = ExportSection(format="timm")
CASES: dict[str, Callable[[], Any]] = {
    "prune": lambda: _prune(HALF, Path("half")),
    "prune, a link": lambda: _prune(HALF, Path("link")),
    "prune, its dense": lambda: _prune(HALF, Path("./dense")),
    "prune, the folder of its weights": lambda: _prune(WEIGHTS, Path("dense")),
    "prune, the folder above": lambda: _prune(HALF, Path()),
    "prune, into the checkpoint": lambda: _prune(HALF, Path("half/less")),
    "heal": lambda: _heal(Path("link")),
    "heal, its teacher": lambda: _heal(Path("dense")),
    "heal, another teacher": lambda: _heal(Path("dense"), "dense/model.safetensors"),
    "export": lambda: export_checkpoint(Path("half"), NO_IMAGES, TIMM, out=Path("link")),
    "export, its dense": lambda: export_checkpoint(
        Path("half"), NO_IMAGES, TIMM, out=Path("dense")
    ),
    "export, a network": lambda: export_model(HALF, NO_IMAGES, TIMM, out=Path("half")),
    "discover": lambda: discover(HALF, NO_IMAGES, DiscoverSection(), Path("link")),
    "study": lambda: study(HALF, NO_IMAGES, StudySection(), Path("half")),
    "a recipe": lambda: run_recipe(
        Recipe(name="x", model=ModelSection(name="ckpt/x"), data=NO_IMAGES, prune={"keep": 0.5})  # type: ignore[arg-type]
    ),
    "a recipe's healing": lambda: run_recipe(
        Recipe(
            name="x",
            model=ModelSection(name="ckpt/x_healed"),
            data=NO_IMAGES,
            discover=None,
            prune={"keep": 0.5},
            heal={"epochs": 1},  # type: ignore[arg-type]
        )
    ),
    "import": lambda: import_released(Path("half"), HALF, Path("half")),
    "export of paths": lambda: export_released(Path("half"), Path("half")),
}


@pytest.mark.parametrize("case", CASES)
def test_an_output_that_is_an_input_is_refused_before_any_work(
    case: str, world: Path, idle: None
) -> None:
    (world / "ckpt").mkdir()
    for name in ("x", "x_healed"):
        (world / "ckpt" / name).symlink_to(world / "half")
    before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}
    with pytest.raises(UsageError, match=r"must not (overwrite an input|lie inside)") as caught:
        CASES[case]()
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file()} == before


def test_pruning_and_healing_at_once_spares_the_input(
    world: Path, idle: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "new_healed").symlink_to("half")
    args = ["prune", "half", "--keep", "0.5", "--calibration", "folder:none", "--out", "new"]
    assert app.run_app([*args, "--heal", "1"]) == 2
    assert "must not overwrite an input, got `new_healed`" in capsys.readouterr().err


PLACES: dict[str, Callable[[Path], Any]] = {
    "prune": lambda out: _prune(HALF, out),
    "heal": lambda out: _heal(out),
    "export": lambda out: export_checkpoint(
        Path("half"), NO_IMAGES, ExportSection(), out=out / "m.onnx"
    ),
    "bench": lambda out: bench_checkpoint(Path("half"), BenchSettings(), out=out),
    "bench of files": lambda out: bench_files(Path("a"), Path("b"), BenchSettings(), out=out),
    "discover": lambda out: discover(HALF, NO_IMAGES, DiscoverSection(), out),
    "study": lambda out: study(HALF, NO_IMAGES, StudySection(), out),
    "a recipe": lambda out: run_recipe(
        Recipe(name="x", model=HALF, data=NO_IMAGES, prune={"keep": 0.5}),
        root=out,  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    case: str, world: Path, idle: None
) -> None:
    (world / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        PLACES[case](Path("file/below/out"))


def test_an_export_into_its_checkpoint_may_be_repeated(world: Path) -> None:
    (world / "half" / "model.onnx").write_text("an earlier one")
    with pytest.raises(NpPruneError, match=r"folder:none|`none`|not exist"):
        export_checkpoint(Path("half"), NO_IMAGES, ExportSection(latency=False))


def test_files_of_others_are_found_before_the_work(world: Path, idle: None) -> None:
    (world / "mine").mkdir()
    (world / "mine" / "thesis.tex").write_text("years")
    for work in (_prune, lambda _, out: _heal(out)):
        with pytest.raises(StoreError, match="is not replaced: it is not empty"):
            work(HALF, Path("mine"))


# ---------------------------------------------------------------- what cannot be recorded


@pytest.fixture
def measured(world: Path) -> tuple[Path, DataSection]:
    """A pruned checkpoint with a run, and images."""
    dense = write_dense(world / "other")
    write_pruned(world / "of_run", world / "other", dense, plan_of(dense), run="../run")
    run = RunFolder(world / "run")
    info = read_config(world / "of_run")
    run.path.mkdir()
    model = model_info(dense, info.source)
    assert info.prune is not None
    listed = Variant("of_run", "../of_run", model, info.prune)
    run.write_result(Result("run", "t0", Environment(), model, info.classes, None, [listed]))
    return world / "of_run", DataSection(val=write_images(world / "images", per_class=2))


def _evaluate(folder: Path, data: DataSection, said: list[Event]) -> Any:
    settings = EvaluateSection(latency=False)
    return evaluating.evaluate(folder, data, settings, work=Work("cpu", emit=said.append))


def test_a_run_that_cannot_be_written_is_said_beforehand(
    measured: tuple[Path, DataSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StoreError("cannot write `run`: the file system is read-only")

    before = (measured[0].parent / "run" / "result.json").read_bytes()
    monkeypatch.setattr(outputs, "check_folder", refuse)
    said: list[Event] = []
    assert _evaluate(*measured, said).dense.top1.total == 12
    warning = "cannot write `run`: the file system is read-only: what is found is shown"
    assert next(e for e in said if e.level == "warning").message.startswith(warning)
    assert (measured[0].parent / "run" / "result.json").read_bytes() == before


def test_a_disk_that_is_full_in_the_end_loses_nothing(
    measured: tuple[Path, DataSection],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreError("cannot write `result.json`: no space left on the device")

    monkeypatch.setattr(RunFolder, "write_result", full)
    with pytest.raises(UnstoredError, match="no space left") as caught:
        _evaluate(*measured, [])
    assert caught.value.found.dense.top1.total == 12
    args = ["eval", str(measured[0]), "--data", measured[1].val or "", "--no-latency"]
    assert app.run_app([*args, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert " on 12 images, " in out
    assert "next:" not in out
    assert "error: cannot write `result.json`: no space left on the device" in err


def test_a_report_over_its_own_result_is_refused(world: Path) -> None:
    model = model_info(write_dense(world / "some"), read_config(world / "some").source)
    result = Result("x", "t0", Environment(), model, [])
    RunFolder(world / "run").path.mkdir()
    RunFolder(world / "run").write_result(result)
    path = world / "run" / "report.md"
    (world / "run" / "result.json").rename(path)
    with pytest.raises(NpPruneError, match="must not overwrite an input"):
        render_report(path)

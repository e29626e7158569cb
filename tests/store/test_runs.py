"""Run folders: rerun = resume; another configuration never reuses the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npprune import records
from npprune.errors import StoreError
from npprune.records import (
    DataInfo,
    Environment,
    Manifest,
    ModelInfo,
    ModelSource,
    Plan,
    Preprocessing,
    Result,
)
from npprune.store.runs import RunFolder, read_plan, settings_changes

MODEL = ModelInfo(ModelSource("vit"), 10, 20, [4, 4], [1, 1], 8, 2, "cls", Preprocessing())
DATA = DataInfo("folder:x", "folder rank", 3, 2)


def _manifest(settings: dict[str, Any], created: str = "t0") -> Manifest:
    return Manifest("x", created, Environment(), MODEL, DATA, settings, records.digest(settings))


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_manifest_is_first_and_a_rerun_resumes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "reports" / "x")
    assert not run.exists
    assert run.create_or_resume(_manifest({"topk": 1}), "name: x\n") is False
    assert _names(run.path) == ["manifest.json", "recipe.yaml"]
    assert run.recipe_path.read_text().splitlines()[1] == "name: x"
    assert run.create_or_resume(_manifest({"topk": 1}, "t1")) is True
    assert run.read_manifest().created == "t0"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.create_or_resume(_manifest({"discover": {"topk": 1, "points": 5}, "seed": 0}))
    before = run.manifest_path.read_bytes()
    with pytest.raises(StoreError) as caught:
        run.create_or_resume(_manifest({"discover": {"topk": 5, "points": 5}, "seed": 1}), "new")
    assert caught.value.message == (
        f"`{run.path}` belongs to a run of other settings: `discover.topk`: 1 -> 5; `seed`: 0 -> 1"
    )
    assert "another `out`" in (caught.value.hint or "")
    assert run.manifest_path.read_bytes() == before
    assert not run.recipe_path.exists()


def test_changes_are_listed_in_order_and_shortened() -> None:
    changes = settings_changes({"a": 1, "gone": "x"}, {"a": 1, "new": {"b": list(range(99))}})
    assert changes[0].startswith("`new.b`: (not set) -> [0, 1, 2")
    assert changes[0].endswith("...")
    assert changes[1] == '`gone`: "x" -> (not set)'
    assert settings_changes({"a": [1]}, {"a": (1,)}) == []


def test_more_than_three_changes_are_counted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.create_or_resume(_manifest({str(i): 0 for i in range(5)}))
    with pytest.raises(StoreError, match=r"\(and 2 more\)"):
        run.create_or_resume(_manifest({str(i): 1 for i in range(5)}))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    run = RunFolder(tmp_path)
    for action in (lambda: run.create_or_resume(_manifest({})), lambda: run.lock().__enter__()):
        with pytest.raises(StoreError, match=r"holds no run: it has `photo.jpg`"):
            action()
    assert _names(tmp_path) == ["photo.jpg"]
    with pytest.raises(StoreError, match="is a file, not a folder"):
        RunFolder(tmp_path / "photo.jpg").create_or_resume(_manifest({}))


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / ".manifest.json.0123abcd.tmp").write_text("{")
    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / ".00000.json.0123abcd.tmp").write_text("{")
    (tmp_path / "manifest.json").write_text(records.to_json(_manifest({})))
    with run.lock():
        assert run.create_or_resume(_manifest({})) is True
    assert _names(tmp_path / "paths") == []
    assert ".manifest.json.0123abcd.tmp" not in _names(tmp_path)


HOLD = (
    "import sys; from npprune.store.runs import RunFolder\n"
    "with RunFolder(sys.argv[1]).lock():\n"
    "    sys.stdout.write('held\\n'); sys.stdout.flush(); sys.stdin.readline()\n"
)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=f"is in use by process {process.pid} on "), run.lock():
            pytest.fail("two processes hold the folder")
    finally:
        process.kill()
        process.wait()
    with run.lock():  # the lock died with the process
        assert json.loads((run.path / ".lock.json").read_text())["pid"] == os.getpid()
        assert run.create_or_resume(_manifest({})) is False
    assert ".lock.json" not in _names(run.path)


def test_documents_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(StoreError, match=r"not a run folder: it has no `manifest.json`"):
        run.read_manifest()
    with pytest.raises(StoreError, match=r"has no `result.json`"):
        run.read_result()
    with pytest.raises(StoreError, match="no plan at"):
        run.read_plan()
    result = Result("x", "t0", Environment(), MODEL, [])
    plan = Plan([[0, 2], [1]], [4, 4])
    run.write_result(result)
    run.write_plan(plan)
    assert run.read_result() == result
    assert run.read_plan() == plan == read_plan(tmp_path) == read_plan(run.plan_path)


WORK = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.store.test_paths import _shard
from tests.store.test_runs import _manifest
from npprune.store.path_store import PathStore
from npprune.store.runs import RunFolder
run = RunFolder(sys.argv[2])
with run.lock():
    run.create_or_resume(_manifest({"topk": 2}))
    store = PathStore(run.paths_folder, run.read_manifest().settings_sha256)
    for i in range(60):
        if store.state(i) != "done":
            store.write_shard(i, _shard([2 * i, 2 * i + 1]))
            sys.stdout.write(f"{i}\\n")
            sys.stdout.flush()
"""


def _work(folder: Path, kill_after: int | None = None) -> list[int]:
    """The shards that one process wrote, killed after so many of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(Path(__file__).resolve().parents[2]), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    written: list[int] = []
    for line in process.stdout:
        written.append(int(line))
        if len(written) == kill_after:
            process.kill()
    status = process.wait()
    process.stdout.close()
    assert status == 0 or kill_after is not None
    return written


def test_a_run_killed_again_and_again_leaves_the_same_bits(tmp_path: Path) -> None:
    assert _work(tmp_path / "straight") == list(range(60))
    written: list[int] = []
    for kill_after in (1, 7, 13):
        written += _work(tmp_path / "killed", kill_after)
    written += _work(tmp_path / "killed")
    assert len(written) == len(set(written)), "a finished shard was computed again"
    straight, killed = tmp_path / "straight" / "paths", tmp_path / "killed" / "paths"
    assert _names(killed) == _names(straight)
    for name in _names(straight):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    assert _names(tmp_path / "killed") == _names(tmp_path / "straight")


def test_a_refusal_says_what_the_hashes_are_of(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "x")
    run.create_or_resume(_manifest({"model": "a" * 64, "data": "b" * 64}))
    other = _manifest({"model": "a" * 64, "data": "c" * 64})
    other.data = DataInfo("folder:y", "folder rank", 1, 1, sha256="c" * 64)
    with pytest.raises(StoreError) as caught:
        run.create_or_resume(other)
    assert caught.value.message.endswith(
        "`data`: 3 images of 2 classes, folder:x -> "
        "1 image of 1 class, folder:y (list cccccccccccc)"
    )


def test_words_stand_for_hashes_in_a_training(tmp_path: Path) -> None:
    from npprune.store.training import TrainingFolder

    first = TrainingFolder(tmp_path / "a", {"student": "ckpt/half"})
    with first.lock():
        first.save({"settings": {"student": "1" * 64, "lr": 0.1}, "step": 1}, {})
    second = TrainingFolder(tmp_path / "a", {"student": "ckpt/third"})
    with pytest.raises(StoreError, match="`student`: ckpt/half -> ckpt/third"):
        second.load({"student": "2" * 64, "lr": 0.1})

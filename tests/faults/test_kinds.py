"""What a fault is answered with: the words, the exit code, and what is lost (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from npprune.cli import app
from npprune.errors import StoreError
from npprune.export.predict import Classifier
from npprune.records import Result
from npprune.store.runs import RunFolder
from tests.faults.world import Said, Undisturbed, differences
from tests.helpers.discovering import FORK


def test_a_lost_shard_is_refused_with_what_finds_it_again(
    undisturbed: Undisturbed,
    said: Said,
) -> None:
    """Also the last one, which leaves no gap."""
    line = undisturbed.after("discover")
    (line.root / "run" / "paths" / "00003.json").unlink()
    said()
    for stage in ("prune", "analyze", "paths"):
        assert line.run(stage) == 2
        text = said()
        assert "1 of 4 shards not done: 3 (absent)" in text
        assert "again: it computes only what is missing" in text
    assert line.run("discover") == 0
    assert line.run("paths") == 0


def test_a_discovery_that_has_not_ended_is_refused(
    undisturbed: Undisturbed,
    said: Said,
) -> None:
    line = undisturbed.after("discover")
    (line.root / "run" / "result.json").unlink()
    manifest = json.loads((line.root / "run" / "manifest.json").read_text())
    assert manifest["command"].startswith("npprune discover auto") or not manifest["command"]
    for stage in ("prune", "analyze", "paths"):
        assert line.run(stage) == 2
        assert "has no `result.json`" in said()


def test_verify_names_each_damaged_file(
    undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    line = undisturbed.after("prune")
    capsys.readouterr()
    assert app.run_app(["verify", str(line.root), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["damaged"] == {}
    for name in whole["files"]:
        path = line.root / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        code = app.run_app(["verify", str(line.root), "--json"])
        damaged = json.loads(capsys.readouterr().out)["damaged"]
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        assert (code, bool(damaged)) == (1, True), name
    files = {p.relative_to(line.root).as_posix() for p in line.root.rglob("*") if p.is_file()}
    kept = {f for f in files - set(whole["files"]) if "images/" not in f and "/.lock" not in f}
    assert kept <= {"w.safetensors", "run/.result.lock", "half/README.md"}
    assert app.run_app(["verify", str(line.root / "images")]) == 2


UPDATE = """
import sys, time
from npprune.store.runs import RunFolder
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
with RunFolder(sys.argv[1]).updating() as result:
    time.sleep(0.05)
    result.commands.append(sys.argv[2])
"""


def test_several_changes_of_a_result_at_once_are_all_there(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    line = undisturbed.after("discover")
    run = RunFolder(line.root / "run")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPDATE, str(run.path), f"c{i}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for i in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all of them at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
    assert {f"c{i}" for i in range(3)} <= set(run.read_result().commands)


def test_other_pictures_under_the_same_names_are_refused(
    undisturbed: Undisturbed,
    said: Said,
) -> None:
    line = undisturbed.after("discover")
    path = line.root / "images" / "class_1" / "0.png"
    Image.new("RGB", (9, 9)).save(path)
    assert line.run("discover") == 2
    text = said()
    assert "class_1/0.png` is not the file that the paths" in text
    assert "bring the images back" in text


def test_images_that_were_away_are_tried_again(
    undisturbed: Undisturbed,
    said: Said,
) -> None:
    line = undisturbed.before("discover")
    path = line.root / "images" / "class_1" / "0.png"
    there = path.read_bytes()
    path.write_bytes(b"")
    assert line.run("discover") == 0
    path.write_bytes(there)
    said()
    assert line.run("discover") == 0
    assert "1 image that could not be read can be read now" in said()
    assert differences(line.essence(), undisturbed.essence["discover"]) == []


def test_a_clock_that_goes_back(undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    line, now = undisturbed.before("discover"), time.time()
    for name in ("time", "perf_counter"):
        ticks = iter(range(10**9))
        monkeypatch.setattr(time, name, lambda ticks=ticks: now - next(ticks))
    assert line.run("discover") == 0
    assert differences(line.essence(), undisturbed.essence["discover"]) == []


def test_data_that_disappears(undisturbed: Undisturbed, said: Said) -> None:
    line = undisturbed.after("discover")
    (line.root / "images").rename(line.root / "away")
    for stage in ("discover", "prune", "analyze"):
        code, text = line.run(stage), said()
        assert code == (0 if stage == "analyze" else 2)
        assert "a bug of its own" not in text
    (line.root / "away").rename(line.root / "images")
    assert line.run("discover") == 0


def test_a_newer_manifest_is_not_damage(undisturbed: Undisturbed, said: Said) -> None:
    line = undisturbed.after("discover")
    path = line.root / "run" / "manifest.json"
    newer = json.loads(path.read_text()) | {"schema_version": 99}
    del newer["checksum"]
    path.write_text(json.dumps(newer))
    assert line.run("discover") == 2
    assert "upgrade npprune" in said()
    assert json.loads(path.read_text()) == newer


def test_a_changed_model_file_is_not_served(tmp_path: Path) -> None:
    """Neither one that was changed nor one whose record was; without a record it is opened."""
    from npprune.errors import ExportError
    from npprune.export.beside import hashes
    from npprune.records import ExportRecord
    from npprune.store import atomic

    path = tmp_path / "m.onnx"
    path.write_bytes(b"graph")
    record = ExportRecord(
        "m.onnx", "onnx", "fp32", 17, 5, "", "cpu", [], 0.0, True, hashes=hashes([path])
    )
    atomic.write_json(tmp_path / "m.export.json", record)
    path.write_bytes(b"grapf")
    with pytest.raises(ExportError, match="changed or damaged since it was exported") as caught:
        Classifier(path)
    assert "export it again" in (caught.value.hint or "")
    (tmp_path / "m.export.json").unlink()
    with pytest.raises(ExportError, match=r"m\.onnx") as caught:  # ONNX Runtime's own words
        Classifier(path)
    assert "since it was exported" not in caught.value.message


def _discover(command: list[str], pause: float) -> None:
    """In a process of its own: the command, a moment at every write."""
    write = os.replace

    def slow(*args: Any) -> None:
        time.sleep(pause)
        write(*args)

    os.replace = slow  # type: ignore[assignment]
    os._exit(app.run_app(command))


@pytest.mark.slow
def test_sigkill_leaves_nothing_behind(undisturbed: Undisturbed) -> None:
    line = undisturbed.before("discover")
    paths, killed = line.root / "run" / "paths", 0
    for shards in (1, 2):
        process = FORK.Process(target=_discover, args=(line.command("discover"), 0.05))
        process.start()
        end = time.monotonic() + 60
        while len(list(paths.glob("*.json"))) < shards and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
    assert killed == 2
    assert line.run("discover") == 0
    assert differences(line.essence(), undisturbed.essence["discover"]) == []
    assert line.leftovers() == []


def test_a_result_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no `result\.json`"), RunFolder(tmp_path).updating():
        raise AssertionError("there is nothing to change")
    assert not list(tmp_path.glob("*.json"))
    assert Result.kind == "result"

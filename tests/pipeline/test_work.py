"""What every stage gets: a device with its reason, a seed, and a way to say things."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import npprune
from npprune.errors import DeviceError
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work

ROOMS = ("common", "discover", "evaluate", "heal", "export", "analyze", "demo")
PARTS = {"emit", "command", "processes", "reason"}
"""What `Work` carries, and no function below a stage takes by itself."""


def test_a_stage_speaks_in_its_own_name_and_keeps_what_was_resolved() -> None:
    events: list[Event] = []
    work = Work("cpu", 3, events.append, "npprune x")
    assert str(work.where) == "cpu"
    stage = work.on("heal")
    assert stage.reason == "asked for `cpu`"
    assert stage._place is work._place
    assert stage.team is work.team
    stage.say("begun")
    stage.warn("mind this")
    stage.progress(2, None, "steps", note="loss 1")
    stage.progress(1, 4, stage="calibration")
    assert [(e.stage, e.level) for e in events] == [
        ("heal", "info"), ("heal", "warning"), ("heal", "progress"), ("calibration", "progress"),
    ]  # fmt: skip
    assert (events[2].done, events[2].total, events[2].unit) == (2, None, "steps")
    assert events[2].data == {"note": "loss 1"}
    assert (stage.seed, stage.command) == (3, "npprune x")
    assert (work.environment().seed, work.environment().device) == (3, "cpu")
    assert work.generator().initial_seed() == 3


def test_a_missing_device_is_met_only_where_it_is_needed() -> None:
    work = Work("cuda:99")
    assert str(work.on_cpu().where) == "cpu"
    with pytest.raises(DeviceError, match="`cuda:99` was asked for"):
        _ = work.where
    with pytest.raises(DeviceError, match="`device` must be auto"):
        _ = Work("tpu").where


def test_no_function_takes_the_parts_of_work_one_by_one_or_more_than_eight_things() -> None:
    pipeline = Path(npprune.__file__).parent / "pipeline"
    wrong, seen = [], 0
    for path in (p for room in ROOMS for p in sorted((pipeline / room).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            seen += 1
            args = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]} - {"self", "cls"}
            taken = set() if path.parent.name == "common" else args & PARTS
            if len(args) > 8 or taken:
                wrong.append(f"{path.name}: {node.name}({', '.join(sorted(args))})")
    assert seen > 100
    assert wrong == []

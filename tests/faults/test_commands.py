"""Whole commands: killed, out of room, their files damaged or lost.

The same command then ends with the bits of an undisturbed line. The long run is `pytest -m faults`.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.shim import FULL
from tests.faults.world import (
    BEFORE,
    DAMAGES,
    Said,
    Undisturbed,
    damaged,
    disturbed,
    verified,
)
from tests.faults.writings import FAULTS, WRITINGS, met

SHARES = (0.25, 0.5, 0.75, 1.0)  # of a stage's file operations
HOW = [*DAMAGES, "lost", "swapped"]
READ = {  # by a command after the one that made them
    "run/manifest.json": ("discover", "paths"),
    "run/recipe.yaml": ("discover", "analyze"),
    "run/result.json": ("discover", "analyze"),
    "run/paths/00001.json": ("discover", "paths"),
    "run/paths/00003.safetensors": ("discover", "prune"),
    "run/statistics": ("prune", "prune"),
    "half/config.json": ("prune", "eval"),
    "half/model.safetensors": ("prune", "eval"),
    "half/plan.json": ("prune", "heal"),
    "study/manifest.json": ("study", "study"),
    "study/dense.json": ("study", "study"),
    "study/rows/keep0.5_variance_global_none_seed0.json": ("study", "study"),
    "half/model.onnx": ("export", "predict"),
    "half/export.json": ("export", "predict"),
}
"""File -> the command that made it, and one that reads it."""


@pytest.mark.parametrize(
    "share", [pytest.param(s, marks=[pytest.mark.slow] * (s in (0.25, 0.75))) for s in SHARES]
)
@pytest.mark.parametrize("stage", ["discover", "prune", "heal", "study"])
def test_a_killed_command_resumes(
    stage: str, share: float, undisturbed: Undisturbed, said: Said
) -> None:
    undisturbed.before(stage)
    n = math.ceil(share * undisturbed.operations[stage])
    disturbed(undisturbed, stage, n, "kill", said)


@pytest.mark.parametrize("stage", ["discover", "prune", "heal", "study"])
def test_a_disk_that_is_full(stage: str, undisturbed: Undisturbed, said: Said) -> None:
    undisturbed.before(stage)
    disturbed(undisturbed, stage, undisturbed.operations[stage] // 2, FULL, said)


@pytest.mark.parametrize(
    ("file", "how"),
    [(file, HOW[i % len(HOW)]) for i, file in enumerate(READ) if READ[file][0] != "export"],
)
def test_a_damaged_file_is_found_and_made_again(
    file: str, how: str, undisturbed: Undisturbed, said: Said
) -> None:
    maker, reader = READ[file]
    damaged(undisturbed, maker, reader, _file(undisturbed, file), how, 0, said)


def _file(world: Undisturbed, name: str) -> str:
    """A file of the folder that a name is, or the file itself."""
    maker, _ = READ[name]
    path = world.after(maker).root / name
    if path.is_dir():
        path = sorted(path.rglob("*.safetensors"))[0]
    return path.relative_to(world.line.root).as_posix()


# ---------------------------------------------------------------- the long run


@pytest.mark.faults
def test_faults_for_minutes(
    request: pytest.FixtureRequest, undisturbed: Undisturbed, said: Said, tmp_path: Path
) -> None:
    """Random faults of all commands and files, from `--fault-seed`, for `--fault-minutes`.

    What goes wrong is gathered, with what repeats it; the counts go to `--fault-report`.
    """
    seed, minutes = (
        request.config.getoption("fault_seed"),
        request.config.getoption("fault_minutes"),
    )
    rng, end = random.Random(seed), time.monotonic() + 60 * minutes
    tried: Counter[str] = Counter()
    began = time.process_time()
    wrong: list[str] = []
    case: Callable[[], object]
    while time.monotonic() < end:
        what = rng.choices(("writing", "file", "command", "reading"), (60, 30, 5, 5))[0]
        if what == "writing":
            name, fault, n = (
                rng.choice(list(WRITINGS)),
                rng.choice(list(FAULTS)),
                rng.randint(1, 20),
            )
            place = tmp_path / str(sum(tried.values()))
            key, case = f"writing a {name}: {fault}", partial(met, name, fault, n, place)
            told = f"{key} at {n}"
        elif what == "file":
            how, each = rng.choice(HOW), rng.randrange(10**9)
            key, case = f"verify: {how}", partial(verified, undisturbed, how, each, said)
            told = f"{key}, {each}"
        elif what == "command":
            stage = rng.choice([s for s in BEFORE if s != "export" or rng.random() < 0.1])
            undisturbed.before(stage)
            n, fault = rng.randint(1, undisturbed.operations[stage]), rng.choice(list(FAULTS))
            key = f"{stage}: {fault}"
            case = partial(disturbed, undisturbed, stage, n, FAULTS[fault], said)
            told = f"{key} at {n}"
        else:
            name, how, each = rng.choice(list(READ)), rng.choice(HOW), rng.randrange(10**9)
            maker, reader = READ[name]
            if maker == "export" and rng.random() < 0.9:  # a second or two each
                continue
            file = _file(undisturbed, name)
            key = f"{maker}'s files, read by {reader}: {how}"
            case = partial(damaged, undisturbed, maker, reader, file, how, each, said)
            told = f"{file} {how} ({each}), read by {reader}"
        try:
            case()
        except AssertionError as err:
            wrong.append(f"{told}: {str(err)[:2000]}")
        tried[key] += 1
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    report = "\n".join(f"{count:6} {key}" for key, count in sorted(tried.items()))
    with request.config.getoption("fault_report").open("a") as out:
        spent = f"{time.process_time() - began:.0f} s of processor time"
        count = f"{sum(tried.values())} faults, {len(wrong)} wrong"
        out.write(f"seed {seed}: {count}, {spent}\n{report}\n")
        out.writelines(f"wrong: {each}\n" for each in wrong)
    assert not wrong, "\n\n".join(wrong[:5])

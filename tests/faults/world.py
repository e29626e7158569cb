"""A tiny line of commands, from images to a served file, and what it leaves without faults."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npprune.cli import app
from npprune.files import is_leftover
from npprune.store.atomic import DAMAGED
from npprune.store.runs import LOCKS
from tests.faults.shim import Killed, operations
from tests.helpers.discovering import make_world

Said = Callable[[], str]
"""What was written to stderr since it was last asked."""

VOLATILE = {
    "seconds", "created", "timing", "checksum", "images_per_second", "latency", "parts",
    "healing_seconds", "begun", "found", "passes", "commands",
}  # fmt: skip
"""Entries of documents that are times, hash them, or say what was there already."""

FEW = ["--images-per-class", "2"]


@dataclass
class Line:
    """The commands on one folder, in their order."""

    root: Path

    @property
    def images(self) -> str:
        return f"folder:{self.root / 'images'}"

    def command(self, stage: str) -> list[str]:
        """The command line of a stage."""
        at, data = str(self.root), ["--data", self.images, *FEW, "--device", "cpu"]
        run, half = f"{at}/run", f"{at}/half"
        return {
            "discover": [
                "discover", "auto", "--checkpoint", f"{at}/w.safetensors", "--num-heads", "3",
                "--batch-size", "4", "--shard-size", "4", "--topk", "2", *data, "--out", run,
            ],
            "prune": ["prune", run, "--keep", "0.5", "--out", half, "--device", "cpu"],
            "eval": ["eval", half, "--no-latency", *data],
            "heal": ["heal", half, "--epochs", "2", "--batch-size", "4", "--out", f"{at}/healed",
                     *data],
            "export": ["export", half, "--no-latency", "--data", self.images],
            "predict": ["predict", f"{half}/model.onnx", f"{at}/images/class_0", "--threads", "1",
                        "--provider", "cpu", "--out", f"{at}/out.csv"],
            "study": [
                "study", run, "--criteria", "variance,magnitude", "--seeds", "0",
                "--selections", "global", "--compensations", "none", "--protect", "off",
                "--val", self.images, "--calibration", self.images, *FEW, "--device", "cpu",
                "--out", f"{at}/study",
            ],
            "analyze": ["analyze", "similarity", run, "--permutations", "10", "--device", "cpu"],
            "paths": ["paths", "export", run, "--out", f"{at}/jsonl"],
            "report": ["report", run],
        }[stage]  # fmt: skip

    def run(self, stage: str) -> int:
        """The exit code of a stage's command line."""
        torch.manual_seed(0)
        return app.run_app(self.command(stage))

    def essence(self) -> dict[str, Any]:
        """Every file by name: its bits, without the times in documents."""
        return {
            path.relative_to(self.root).as_posix(): _bits(path)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not _passing(path)
        }

    def leftovers(self) -> list[str]:
        """Temporary files."""
        return [p.name for p in self.root.rglob("*") if is_leftover(p)]

    def restore(self, kept: Path) -> None:
        """Put the world back as it was in `kept`; paths in its files are absolute."""
        shutil.rmtree(self.root)
        shutil.copytree(kept, self.root, symlinks=True)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two values are not the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            where
            for k in sorted({*a, *b}, key=str)
            for where in differences(a.get(k), b.get(k), f"{place}/{k}")
        ]
    return [] if a == b else [f"{place}: {str(a)[:200]} is not {str(b)[:200]}"]


def _passing(path: Path) -> bool:
    """Locks, what was set aside, and pages, which hold times."""
    return path.name in LOCKS or path.name.endswith((DAMAGED, ".html", ".md"))


def _bits(path: Path) -> Any:
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        if path.name == "result.json" and path.parent.name == "study":
            data.pop("analyses")  # tables of the rows, with their times
        return _without_times(data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [_without_times(v) for v in value]
    if isinstance(value, str) and " s, " in value:  # a sentence with a time in it
        return ""
    return value


def make_line(root: Path) -> Line:
    """A network, images, and nothing done yet."""
    root.mkdir(parents=True)
    make_world(root)
    return Line(root)


BEFORE: dict[str, tuple[str, ...]] = {
    "discover": (),
    "prune": ("discover",),
    "heal": ("discover", "prune"),
    "study": ("discover",),
    "paths": ("discover",),
    "eval": ("discover", "prune"),
    "analyze": ("discover",),
    "export": ("discover", "prune"),
    "predict": ("discover", "prune", "export"),
}
"""What each stage needs done."""


class Undisturbed:
    """One world. What stands in it before and after each stage is kept, and put back at will."""

    def __init__(self, folder: Path) -> None:
        self.line, self.folder = make_line(folder / "w"), folder
        self.operations: dict[str, int] = {}  # of each stage
        self.essence: dict[str, dict[str, Any]] = {}  # after each stage
        shutil.copytree(self.line.root, self.folder / "start")

    def before(self, stage: str) -> Line:
        """The world right before a stage, whose undisturbed end is known then."""
        kept = self.kept(BEFORE[stage])
        if stage not in self.essence:
            self.line.restore(kept)
            with operations(self.line.root) as seen:
                assert self.line.run(stage) == 0
            self.operations[stage] = len(seen.names)
            self.essence[stage] = self.line.essence()
        self.line.restore(kept)
        return self.line

    def after(self, stage: str) -> Line:
        """The world right after a stage."""
        self.before(stage)
        self.line.restore(self.kept((*BEFORE[stage], stage)))
        return self.line

    def kept(self, stages: tuple[str, ...]) -> Path:
        """A copy of the world after some stages, each run once."""
        kept = self.folder / ("+".join(stages) or "start")
        if not kept.exists():
            self.line.restore(self.kept(stages[:-1]))
            assert self.line.run(stages[-1]) == 0
            shutil.copytree(self.line.root, kept)
        return kept


# ---------------------------------------------------------------- faults


def disturbed(world: Undisturbed, stage: str, n: int, fault: str | int, said: Said) -> None:
    """Meet the n-th operation of a stage with a fault; the same command then ends as without."""
    line = world.before(stage)
    with operations(line.root, n, fault) as seen:
        try:
            code = line.run(stage)
        except Killed:
            assert fault == "kill"
        else:
            assert code == 2 or "open" not in seen.names[n - 1 :]
    check_words(text := said(), failed=fault != "kill" and code == 2)
    assert line.run(stage) == 0, said() + text
    assert differences(line.essence(), world.essence[stage]) == []
    assert line.leftovers() == []


def check_words(text: str, *, failed: bool) -> None:
    """An error has its hint, and nothing is a bug."""
    assert "Traceback" not in text, text
    assert "a bug of its own" not in text, text
    if failed:
        assert "error: " in text, text
        assert "hint: " in text, text


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data))]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    """A page of zeros, as after a power cut."""
    place = rng.randrange(0, len(data), 512)
    return data[:place] + bytes(len(data[place : place + 512])) + data[place + 512 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "cut": cut,
    "zeroed": zeroed,
}


def damaged(world: Undisturbed, maker: str, reader: str, file: str, how: str, seed: int,
            said: Said) -> str:  # fmt: skip
    """Damage a file that `maker` left: `reader` refuses it or ends as without, and `maker` makes
    it again. Returns what became of it."""
    world.before(reader)  # what it ends with
    line = world.after(maker)
    damage(line.root / file, how, random.Random(f"{file} {how} {seed}"))
    said()
    code = line.run(reader)
    check_words(said(), failed=code == 2)
    assert code in (0, 2)
    if code == 0:
        made = differences(line.essence(), world.essence[reader])
        assert [place for place in made if not place.startswith(f"/{file}")] == []
    assert line.run(maker) == 0, said()
    found, whole = line.essence(), world.essence[maker]
    assert differences({k: found.get(k) for k in whole}, whole) == []
    assert line.leftovers() == []
    return "refused" if code == 2 else "as without"


def damage(path: Path, how: str, rng: random.Random) -> bool:
    """Do it to a file; False where its bytes are as before."""
    before = path.read_bytes()
    if how == "lost":
        path.unlink()
        return True
    if how == "swapped":
        others = [p for p in path.parent.glob(f"*{path.suffix}") if p != path]
        after = rng.choice(sorted(others) or [path]).read_bytes()
    else:
        after = DAMAGES[how](before, rng)
    path.write_bytes(after)
    return after != before


def verified(world: Undisturbed, how: str, seed: int, said: Said) -> None:
    """Damage any file of a whole line: `npprune verify` ends with 1, or nothing says otherwise.

    A flipped blank of a document changes nothing that is read.
    """
    kept = world.kept(("discover", "prune", "heal", "study"))
    rng = random.Random(f"{how} {seed}")
    files = sorted(p for p in kept.rglob("*") if p.suffix in (".json", ".yaml", ".safetensors"))
    path = rng.choice([p for p in files if p.parent != kept])
    before = path.read_bytes()
    if how == "lost" and path.relative_to(kept).as_posix() not in NAMED:
        return  # no other file says that it was there
    try:
        if damage(path, how, rng):
            code = app.run_app(["verify", str(kept)])
            text = said()
            check_words(text, failed=False)
            same = path.suffix == ".json" and path.is_file() and _read(path) == json.loads(before)
            assert code == 1 or same, (path, how, text)
    finally:
        path.write_bytes(before)
    assert app.run_app(["verify", str(kept)]) == 0, said()


NAMED = (
    "half/model.safetensors", "half/plan.json", "run/paths/00000.json", "run/paths/00003.json",
    "run/paths/00001.safetensors",
)  # fmt: skip
"""Files that another one names."""


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None

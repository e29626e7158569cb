"""Statistics on disk: found again, gone on with, collected in groups; never other bits, never
those of other settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from npprune.budget import Budget
from npprune.core.compression.scores import Context, score
from npprune.core.compression.statistics import Statistics, collect_statistics
from npprune.criteria import Need
from npprune.errors import StoreError
from npprune.models.view import TimmView, make_view
from npprune.pipeline.common.events import Event, ignore
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune import statistics_cache as module
from npprune.pipeline.prune.measuring import PlanSettings, Subject, measure
from npprune.pipeline.prune.planning import amount, choose
from npprune.pipeline.prune.stage import prune
from npprune.pipeline.prune.statistics_cache import SavedStatistics, StatisticsCache, collect
from npprune.pipeline.study.stage import study
from npprune.recipe import DataSection, ModelSection, PruneSection, StudySection
from npprune.store import atomic
from npprune.store import statistics_store as store_module
from npprune.store.checkpoints import read_config
from npprune.store.runs import read_plan
from npprune.store.statistics_store import SIDECAR, StatisticsInfo, StatisticsStore
from tests.helpers.tiny import tiny_batch, tiny_vit

ALL: set[Need] = {"moments", "salience", "gates", "curvature"}
TINY = 1e-6  # GiB: one block at a time
DATA = DataSection(calibration="digits:calibration", images_per_class=12, batch_size=16)


def view(seed: int = 0) -> TimmView:
    return make_view(tiny_vit(seed, depth=4))


def batches(n: int = 30, size: int = 6) -> list[Tensor]:
    x, _ = tiny_batch(n)
    return list(x.split(size))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def straight(needs: set[Need] = ALL, seed: int = 3) -> dict[str, Tensor]:
    """An uninterrupted pass over all blocks, without any of this."""
    return collect_statistics(view(), batches(), needs=needs, generator=seeded(seed)).to_tensors()


def tensors(stats: Statistics) -> dict[str, Tensor]:
    """All sums, wherever they lie, in the order of the blocks."""
    whole = Statistics(stats.needs, stats.images)
    whole.blocks = {l: stats.block(l) for l in range(4)}
    return whole.to_tensors()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def gather(
    home: Path | None, *, memory: float | None = None, emit: Callable[[Event], None] = ignore,
    needs: set[Need] = ALL, seed: int = 3, write: bool = True, **network: Any,
) -> module.Collected:  # fmt: skip
    cache = StatisticsCache(home, network or {"sha256": "abc"}, memory, write)
    return collect(view(), batches(), needs, seeded(seed), cache, Work(emit=emit))


def sidecar(home: Path) -> Path:
    (path,) = home.glob(f"*/{SIDECAR}")
    return path


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state saved after every batch."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", 0)


def interrupt(after: int) -> Callable[[Event], None]:
    """An `Emit` that interrupts when so many images are done."""

    def emit(event: Event) -> None:
        if event.level == "progress" and event.done >= after:
            raise KeyboardInterrupt

    return emit


# ---------------------------------------------------------------- found again


@pytest.mark.parametrize("needs", [{"moments"}, {"moments", "gates"}, ALL])
def test_what_is_found_has_the_bits_of_a_fresh_pass(tmp_path: Path, needs: set[Need]) -> None:
    events: list[Event] = []
    first = gather(tmp_path, needs=needs)
    again = gather(tmp_path, needs=needs, emit=events.append)
    assert same(tensors(first.statistics), straight(needs))
    assert same(tensors(again.statistics), straight(needs))
    assert (first.record["passes"], again.record["passes"]) == (1, 0)
    assert again.seconds == first.seconds  # what they took, not what reading took
    (said,) = events  # and no progress: nothing was computed
    assert said.message == f"statistics of 30 images found in {sidecar(tmp_path).parent}"
    info = atomic.read_json(StatisticsInfo, sidecar(tmp_path))
    assert {p.images for p in info.blocks.values()} == {30}


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4}, {"needs": {"moments", "curvature"}}, {"sha256": "abd"},
        {"sha256": "abc", "heads": [3]},
    ],
)  # fmt: skip
def test_other_settings_never_find_them(tmp_path: Path, other: dict[str, Any]) -> None:
    gather(tmp_path)
    assert gather(tmp_path, **other).record["passes"] == 1
    assert len(list(tmp_path.glob(f"*/{SIDECAR}"))) == 2


def test_other_images_batches_threads_and_versions_never_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(found: list[Tensor]) -> int:
        cache = StatisticsCache(tmp_path, {"sha256": "abc"})
        return int(collect(view(), found, ALL, seeded(), cache, Work()).record["passes"])

    usual = batches()
    assert passes(usual) == 1
    assert passes(batches(size=10)) == 1
    changed = [x.clone() for x in usual]
    changed[-1][-1, 0, 0, 0] += 1e-9
    assert passes(changed) == 1
    assert passes(usual) == 0
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert passes(usual) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert passes(usual) == 1


def test_without_draws_the_seed_is_another_and_the_statistics_the_same(tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1, 0):
        generator = seeded(seed)
        cache = StatisticsCache(tmp_path, {"sha256": "abc"})
        collect(view(), batches(), {"moments"}, generator, cache, Work())
        # what comes after them is still drawn from this seed
        found.setdefault(seed, []).append(torch.randint(10**9, (3,), generator=generator).tolist())
    assert found[0][0] == found[0][1] != found[1][0]
    assert len(list(tmp_path.glob(f"*/{SIDECAR}"))) == 1


def test_the_generator_is_left_as_after_a_whole_pass(tmp_path: Path) -> None:
    after = []
    for _ in range(2):
        generator = seeded()
        collect(view(), batches(), ALL, generator, StatisticsCache(tmp_path), Work())
        after.append(torch.randint(10**9, (3,), generator=generator).tolist())
    generator = seeded()
    collect_statistics(view(), batches(), generator=generator)
    after.append(torch.randint(10**9, (3,), generator=generator).tolist())
    assert after[0] == after[1] == after[2]


# ---------------------------------------------------------------- resumed


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("memory", "killed_at", "left"),
    [
        (None, 12, [18, 24, 30]),
        (None, 30, [30]),  # the state after the last batch is not saved yet
        (TINY, 12, [18, 24, 30, *range(36, 121, 6)]),
        (TINY, 48, [24, 30, *range(36, 91, 6)]),  # one block done, the second half-way
    ],
)
def test_an_interrupted_pass_ends_with_the_same_bits(
    tmp_path: Path, memory: float | None, killed_at: int, left: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path, memory=memory, emit=interrupt(killed_at))
    events: list[Event] = []
    found = gather(tmp_path, memory=memory, emit=events.append)
    assert same(tensors(found.statistics), straight())
    assert 0 < found.record["found"] < 1
    assert any("resumes from there" in e.message for e in events)
    # the batches done before are not done again
    assert [e.done for e in events if e.level == "progress"] == left


@pytest.mark.usefixtures("often")
def test_a_pass_goes_on_with_another_grouping(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path, emit=interrupt(12))
    grouped = gather(tmp_path, memory=TINY)
    assert grouped.record["passes"] == 4
    assert same(tensors(grouped.statistics), straight())


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("file", range(4))
def test_a_kill_between_two_files_of_a_state_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    real, written = atomic.write_bytes, []

    def write(path: Path, data: bytes) -> None:
        written.append(path.name)
        if len(written) == 5 + 5 + file + 1:  # four blocks and the sidecar a state
            path.write_bytes(data[: len(data) // 2])  # as a careless writer would leave it
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(atomic, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path)
    monkeypatch.setattr(atomic, "write_bytes", real)
    info = atomic.read_json(StatisticsInfo, sidecar(tmp_path))
    assert {p.images for p in info.blocks.values()} == {12}
    assert same(tensors(gather(tmp_path).statistics), straight())


KILLED = """
import os, sys
from pathlib import Path
from tests.pipeline.test_statistics_cache import gather, module
module.SAVE_SECONDS, module.SAVE_SHARE = 0.0, 0

def emit(event):
    if event.level == "progress" and event.done >= 18:
        os.kill(os.getpid(), 9)

gather(Path(sys.argv[1]), emit=emit)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, cwd=root, check=False
    )
    assert killed.returncode == -9
    found = gather(tmp_path)
    assert found.record["found"] == 0.6
    assert same(tensors(found.statistics), straight())


def test_a_short_pass_is_saved_once_and_a_long_one_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = StatisticsStore.save

    def save(self: StatisticsStore, named: Any, images: int, batches: int) -> None:
        saved.append(batches)
        real(self, named, images, batches)
        clock[0] += 4.0  # so long does a save take

    clock = [0.0]

    def emit(event: Event) -> None:
        clock[0] += 20.0  # and so long a batch

    monkeypatch.setattr(StatisticsStore, "save", save)
    gather(tmp_path / "short")
    assert saved == [5]
    saved.clear()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    gather(tmp_path / "long", emit=emit)
    # batches end at 0, 20, 40 (saved: 30 s are over, until 44), 64, 84 (44 + 10 x 4: saved)
    assert saved == [3, 5]


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize("harm", ["short", "bit", "gone", "sidecar", "foreign"])
def test_damaged_files_are_never_used_and_said_once(tmp_path: Path, harm: str) -> None:
    gather(tmp_path)
    path = sidecar(tmp_path)
    info = atomic.read_json(StatisticsInfo, path)
    file = path.parent / info.blocks[2].file
    data = bytearray(file.read_bytes())
    if harm == "short":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "bit":
        data[-100] ^= 1
        file.write_bytes(data)
    elif harm == "gone":
        file.unlink()
    elif harm == "sidecar":
        path.write_text(path.read_text()[:200])
    else:  # of other settings, by whatever accident
        info.settings["network"] = {"sha256": "other"}
        atomic.write_json(path, info)
    events: list[Event] = []
    found = gather(tmp_path, emit=events.append)
    assert same(tensors(found.statistics), straight())
    warned = [e.message for e in events if e.level == "warning"]
    assert len(set(warned)) == 1
    assert (SIDECAR if harm in ("sidecar", "foreign") else file.name) in warned[0]
    if harm in ("short", "bit", "gone"):
        assert found.record["found"] == 0.75  # the other blocks' files are good
    events.clear()
    assert gather(tmp_path, emit=events.append).record["passes"] == 0
    assert not any(e.level == "warning" for e in events)


def test_a_file_that_vanishes_in_between_is_a_store_error(tmp_path: Path) -> None:
    gather(tmp_path)
    stored = StatisticsStore(tmp_path, {}, images=1, batches=1)
    stored.info.blocks[0] = store_module.StatisticsPart("000-0001.safetensors", "", 1, 1)
    with pytest.raises(StoreError, match="cannot read"):
        stored.file(0)


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("needs", [{"moments"}, {"moments", "gates"}, ALL])
@pytest.mark.parametrize("kept", [True, False])
def test_a_block_at_a_time_gives_the_same_bits(
    tmp_path: Path, needs: set[Need], kept: bool
) -> None:
    events: list[Event] = []
    home = tmp_path / "home" if kept else None
    found = gather(home, memory=TINY, needs=needs, emit=events.append)
    assert isinstance(found.statistics, SavedStatistics)
    assert found.record["passes"] == 4
    assert same(tensors(found.statistics), straight(needs))
    (said,) = [e.message for e in events if "--memory" in e.message]
    assert "4 passes over the images" in said
    progress = [e for e in events if e.level == "progress"]
    assert progress[-1].done == progress[-1].total == 120
    if kept:  # and one pass finds what four have left
        assert same(tensors(gather(home, needs=needs).statistics), straight(needs))


def test_groups_are_as_large_as_the_memory_allows(tmp_path: Path) -> None:
    h, d = 48, 24
    one = 8 * (2 * h * h + d * d + 6 * h)
    work = 8 * module.WORK * h * h
    for blocks, passes in ((1, 4), (2, 2), (3, 2), (4, 1)):
        memory = (blocks * one + work + 100) / 2**30
        found = gather(tmp_path / str(blocks), memory=memory)
        assert found.record["passes"] == passes
        assert isinstance(found.statistics, SavedStatistics) == (blocks < 4)
        assert same(tensors(found.statistics), straight())


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    stats = gather(tmp_path, memory=TINY).statistics
    alive: list[weakref.ref[Any]] = []
    real = module._read

    def read(*args: Any) -> Any:
        assert not [r for r in alive if r() is not None]
        sums = real(*args)
        alive.append(weakref.ref(sums))
        return sums

    monkeypatch.setattr(module, "_read", read)
    v = view()
    context = Context(second=[v.fc2(l) for l in range(4)], sums=stats, salience=0.5)
    scores = score("curvature-obs", context)
    assert len(alive) == 4
    monkeypatch.setattr(module, "_read", real)
    context.sums = Statistics.from_tensors(straight())
    assert all(
        torch.equal(a, b) for a, b in zip(scores, score("curvature-obs", context), strict=True)
    )
    whole = context.statistics.position_weights(1, 0.5)
    assert torch.equal(stats.position_weights(1, 0.5), whole)


def test_what_does_not_fit_and_is_not_kept_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = gather(None, memory=TINY)
    assert len(list(tmp_path.iterdir())) == 1
    del found
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        gather(None, memory=TINY, emit=interrupt(12))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the home


def test_only_the_sets_used_last_are_kept(tmp_path: Path) -> None:
    def seeds() -> list[int]:
        return [s for s in range(6) if gather(tmp_path, seed=s, write=False).record["found"] == 1]

    for seed in range(3):
        gather(tmp_path, seed=seed)
        time.sleep(0.02)
    gather(tmp_path, seed=0)  # used again
    time.sleep(0.02)
    gather(tmp_path, seed=3)
    assert seeds() == [0, 2, 3]
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3


def test_a_set_that_another_process_fills_is_not_removed(tmp_path: Path) -> None:
    gather(tmp_path, seed=0)
    filled = sidecar(tmp_path).parent
    import filelock

    with filelock.FileLock(filled / ".lock"):
        for seed in (1, 2, 3, 4):
            time.sleep(0.02)
            gather(tmp_path, seed=seed)
        assert (filled / SIDECAR).is_file()
    time.sleep(0.02)
    gather(tmp_path, seed=5)
    assert not filled.exists()


def test_a_second_process_waits_and_finds_what_the_first_one_made(tmp_path: Path) -> None:
    import threading

    gather(tmp_path / "made")
    made = sidecar(tmp_path / "made").parent
    home = tmp_path / "home"
    held, said = threading.Event(), threading.Event()
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if "waiting" in event.message:
            said.set()

    import filelock

    (home / made.name).mkdir(parents=True)

    def first() -> None:
        with filelock.FileLock(home / made.name / ".lock"):
            held.set()
            said.wait(20)
            for path in made.iterdir():
                if path.name != ".lock":
                    shutil.copy(path, home / made.name / path.name)

    other = threading.Thread(target=first)
    other.start()
    assert held.wait(20)
    found = gather(home, emit=emit)
    other.join()
    assert found.record["passes"] == 0
    assert same(tensors(found.statistics), straight())
    assert not any(e.level == "progress" for e in events)


def test_a_full_disk_is_said_and_the_pass_made_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StatisticsStore, "free", lambda self: 10_000)
    events: list[Event] = []
    found = gather(tmp_path / "home", emit=events.append)
    assert same(tensors(found.statistics), straight())
    (said,) = [e.message for e in events if e.level == "warning"]
    assert said.startswith("statistics are not kept: they take")
    assert not (tmp_path / "home").exists()


def test_reading_alone_writes_nothing(tmp_path: Path) -> None:
    assert gather(tmp_path / "home", write=False).record["passes"] == 1
    assert not (tmp_path / "home").exists()
    gather(tmp_path / "home")
    before = sorted(tmp_path.rglob("*"))
    assert gather(tmp_path / "home", write=False).record["passes"] == 0
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the line


@pytest.fixture
def dense(tmp_path: Path) -> ModelSection:
    from tests.helpers.digits_network import random_digits_network

    return ModelSection(name=str(random_digits_network(tmp_path / "dense")))


def settings(keep: float = 0.5, **more: Any) -> PruneSection:
    return PruneSection(**{"keep": keep, "selection": "measured", **more})


@pytest.mark.parametrize(
    ("compensation", "memory"),
    [
        ("least-squares", TINY),
        ("sequential", None),
        pytest.param("least-squares", None, marks=pytest.mark.slow),
        pytest.param("sequential", TINY, marks=pytest.mark.slow),
    ],
)
def test_another_budget_finds_them_and_plans_alike(
    dense: ModelSection, tmp_path: Path, compensation: Any, memory: float | None
) -> None:
    """Found, or a block at a time: plan and weights are those of a fresh start."""
    options = {"compensation": compensation, "memory": memory}
    prune(dense, DATA, settings(0.5, **options), tmp_path / "ckpt" / "a")
    events: list[Event] = []
    prune(
        dense,
        DATA,
        settings(0.6, **options),
        tmp_path / "ckpt" / "b",
        work=Work(emit=events.append),
    )
    fresh = settings(0.6, compensation=compensation)
    prune(dense, DATA, fresh, tmp_path / "elsewhere" / "b")
    assert any("statistics of 108 images found in" in e.message for e in events)
    assert not any(e.stage == "statistics" and e.level == "progress" for e in events)
    assert read_plan(tmp_path / "ckpt" / "b") == read_plan(tmp_path / "elsewhere" / "b")
    one, two = (tmp_path / n / "b" / "model.safetensors" for n in ("ckpt", "elsewhere"))
    assert one.read_bytes() == two.read_bytes()
    summary = read_config(tmp_path / "ckpt" / "b").prune
    assert summary is not None
    assert summary.details["statistics"]["found"] == 1
    assert len(summary.details["condition_number"]) == 2


def test_seeds_criteria_and_images_of_another_start_are_computed(
    dense: ModelSection, tmp_path: Path
) -> None:
    def found(name: str, data: DataSection = DATA, seed: int = 0, **more: Any) -> float:
        options = {"selection": "uniform", "compensation": "mean", **more}
        variant = prune(
            dense, data, settings(**options), tmp_path / "ckpt" / name, work=Work(seed=seed)
        )
        return float(variant.prune.details["statistics"]["found"])

    assert found("a") == 0
    assert found("b", keep=0.75) == 1
    assert found("c", seed=1) == 0
    assert found("d", criterion="variance") == 0
    assert found("e", criterion="wanda", seed=1) == 1  # the same moments, and no draws
    assert found("f", criterion="variance", calibration_images=60) == 0
    few = DATA.model_copy(update={"classes": [1, 2]})
    assert found("g", few, criterion="variance", keep_head=True) == 0


def test_random_orders_keep_their_seed_when_statistics_are_found(
    dense: ModelSection, tmp_path: Path
) -> None:
    plans = {}
    for name, home, seed in (("a", "x", 0), ("b", "x", 1), ("c", "y", 1)):
        out = tmp_path / home / name
        prune(
            dense,
            DATA,
            settings(criterion="random", selection="uniform"),
            out,
            work=Work(seed=seed),
        )
        plans[name] = read_plan(out).keep
    assert plans["b"] == plans["c"] != plans["a"]


def test_a_run_keeps_them_in_its_folder_and_its_study_finds_them(
    dense: ModelSection, tmp_path: Path
) -> None:
    from npprune.pipeline.discover.stage import discover
    from npprune.recipe import DiscoverSection

    images = DataSection(train="digits:calibration", images_per_class=3, batch_size=16)
    discover(dense, images, DiscoverSection(points=1), tmp_path / "run")
    prune(tmp_path / "run", DataSection(), settings(topk=1), tmp_path / "a")
    assert sidecar(tmp_path / "run" / "statistics").is_file()
    assert not list(tmp_path.glob(".statistics"))
    events: list[Event] = []
    study(
        tmp_path / "run", DataSection(val="digits:test", images_per_class=3, batch_size=16),
        StudySection(criteria=["curvature-obs"], protect=["off"]), tmp_path / "study",
        work=Work(emit=events.append),
    )  # fmt: skip
    assert any("found in" in e.message and e.stage == "statistics" for e in events)


def test_a_stopped_study_finds_its_statistics(dense: ModelSection, tmp_path: Path) -> None:
    data = DATA.model_copy(update={"val": "digits:test"})
    for keep in (0.5, 0.7):
        events: list[Event] = []
        asked = StudySection(criteria=["fisher"], keep=[keep])
        study(dense, data, asked, tmp_path / "study", work=Work(emit=events.append))
    assert any("statistics of 108 images found" in e.message for e in events)


def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    subject = Subject(view(), batches(), lambda: pytest.fail("no sizes are needed"))
    settings = PlanSettings(Budget("neurons", 0.5), selection="uniform", min_keep=1, round_to=1)
    measured = measure(subject, settings, Work())
    assert choose(measured, settings, amount(measured, settings) or 0).selection.keep
    assert "settings_sha256" not in measured.collected.record

"""Discovery into a run folder: resuming to the bit, shards, bad images, streams, memory."""

from __future__ import annotations

import importlib.util
import io
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npprune.core.attribution.quadrature import Integral
from npprune.core.view import Scope
from npprune.data.labels import Labels
from npprune.data.opening import open_source
from npprune.data.sources import StreamSource
from npprune.errors import DataError, StoreError, UsageError
from npprune.pipeline.common import inputs, memory
from npprune.pipeline.common.device import products
from npprune.pipeline.discover import stage as stage
from npprune.records import ClassInfo, Result
from npprune.report import text
from npprune.store.runs import RunFolder
from tests.helpers.discovering import (
    COUNTS,
    FEW,
    FORK,
    World,
    discover_slowly,
    large_search,
    make_world,
    measure_peaks,
)

TOTAL = sum(COUNTS)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the finished shards' files."""
    done = [p.stem for p in folder.glob("*.json")]
    files = [folder / f"{stem}{end}" for stem in done for end in (".json", ".safetensors")]
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


# ---------------------------------------------------------------- the store


def test_a_run_holds_one_path_for_each_image(world: World) -> None:
    result = world.discover()
    table = world.table()
    assert table.neurons.shape == (TOTAL, 3, 2)
    assert np.bincount(table.labels).tolist() == list(COUNTS)
    assert table.ids[0] == "class_0/0.png"
    found = result.discovery
    assert found is not None
    assert (found.images, found.classes, found.data.images) == (TOTAL, 7, TOTAL)
    assert list(found.class_paths) == list(range(7))
    assert found.class_paths[2] == table.where(2).neurons[0].tolist()  # the only image's path
    assert RunFolder(world.root / "run").read_result() == result


def test_other_shard_sizes_give_the_same_table(world: World) -> None:
    world.discover("a")
    world.discover("b", shard_size=37)
    world.discover("c", shard_size=23)
    assert [len(world.files(name)) for name in "abc"] == [10, 4, 6]  # shards are whole batches
    a, *others = (world.table(name) for name in "abc")
    for other in others:
        assert np.array_equal(a.neurons, other.neurons)
        assert np.array_equal(a.scores, other.scores)
        assert list(a.ids) == list(other.ids)


@pytest.mark.slow
def test_sigkill_at_any_moment_then_the_same_bits(world: World) -> None:
    world.discover("whole")
    rng, paths, killed = random.Random(1), world.root / "run" / "paths", 0
    for _ in range(8):
        before = stamps(paths)
        process = FORK.Process(target=discover_slowly, args=(world, 0.1))
        process.start()
        process.join(rng.uniform(0.1, 0.8))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert stamps(paths).items() >= before.items()  # what was done was not written again
    assert killed >= 3
    result = world.discover()
    assert world.files() == world.files("whole")
    whole = RunFolder(world.root / "whole").read_result().discovery
    assert result.discovery is not None
    assert whole is not None
    assert result.discovery.class_paths == whole.class_paths
    assert result.discovery.mean_score == whole.mean_score


def test_running_again_computes_nothing_and_keeps_what_came_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.discover()
    folder = RunFolder(world.root / "run")
    first.commands = ["npprune prune run"]
    folder.write_result(first)
    before = stamps(folder.paths_folder)
    monkeypatch.setattr(stage, "find_paths", None)  # a search would fail
    again = world.discover()
    assert stamps(folder.paths_folder) == before
    assert again.commands == ["npprune prune run"]
    assert again.discovery == first.discovery
    assert world.said("info")[-1] == f"{TOTAL} images found before: nothing to compute"


def test_a_damaged_shard_is_computed_again(world: World) -> None:
    world.discover()
    good, paths = world.files(), world.root / "run" / "paths"
    (paths / "00001.safetensors").write_bytes(good["00001.safetensors"][:-8])
    (paths / "00003.json").unlink()
    (paths / ".00002.json.0123abcd.tmp").write_text("{")  # a killed process leaves such
    before = stamps(paths)
    world.discover()
    assert world.files() == good
    assert world.said("warning") == ["shard 1 is damaged: computed again"]
    changed = {name for name, stamp in stamps(paths).items() if stamp != before.get(name)}
    assert changed == {f"{i:05d}{end}" for i in (1, 3) for end in (".json", ".safetensors")}


def test_the_folder_belongs_to_one_process_and_one_configuration(world: World) -> None:
    with RunFolder(world.root / "run").lock(), pytest.raises(StoreError, match="is in use by"):
        world.discover()
    world.discover()
    good = world.files()
    with pytest.raises(StoreError, match="other settings: `topk`: 2 -> 1"):
        world.discover(topk=1)
    with pytest.raises(StoreError, match="other settings: `data`"):
        world.discover(data={"images_per_class": 1})
    assert world.files() == good


def test_a_dry_run_writes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def discover(*args: Any, **kwargs: Any) -> Result:
        return stage.discover(*args, **kwargs, dry_run=True)

    monkeypatch.setattr("tests.helpers.discovering.discover", discover)
    assert world.discover().discovery is None
    assert not (world.root / "run").exists()


# ---------------------------------------------------------------- images


def test_broken_images_are_skipped_and_counted(world: World) -> None:
    world.discover("whole")
    for name in ("class_0/0.png", "class_1/5.png", "class_2/0.png"):
        (world.images / name).write_bytes(b"not an image")
    (world.images / "class_0" / "notes.txt").write_text("text")
    result = world.discover()
    found, table, whole = result.discovery, world.table(), world.table("whole")
    assert found is not None
    assert found.data.skipped == ["class_0/0.png", "class_1/5.png", "class_2/0.png"]
    assert (found.images, found.data.images, found.classes) == (TOTAL - 3, TOTAL - 3, 6)
    assert world.said("warning")[0] == "skipped `class_0/0.png`: it cannot be read"
    assert world.said("info")[-1].endswith("; 3 skipped")
    progress = [e.done for e in world.events if e.level == "progress"]
    assert progress == sorted(progress)
    assert progress[-1] == TOTAL
    kept = [i for i, id in enumerate(whole.ids) if id not in found.data.skipped]
    assert np.array_equal(table.neurons, whole.neurons[kept])
    np.testing.assert_allclose(table.scores, whole.scores[kept], rtol=1e-4, atol=1e-6)
    again = world.discover()
    assert again.discovery == found


def test_a_broken_image_ends_the_run_where_asked(world: World) -> None:
    (world.images / "class_1" / "5.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"class_1/5\.png"):
        world.discover(data={"on_bad_image": "error"})
    assert len(world.files()) == 2  # the first shard was whole


def test_a_shard_without_a_readable_image(world: World) -> None:
    for i in range(6):
        (world.images / "class_3" / f"{i}.png").write_bytes(b"")
    world.discover(shard_size=3, batch_size=3)
    assert len(world.table()) == TOTAL - 6
    assert len(world.table().skipped) == 6
    assert world.table().classes == [0, 1, 2, 4, 5, 6]
    for path in world.images.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image could be read"):
        world.discover("none")


def test_an_empty_class_folder_and_too_many_neurons_are_refused(world: World) -> None:
    with pytest.raises(UsageError, match="`topk` must be at most 48"):
        world.discover(topk=49)
    for path in (world.images / "class_6").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="class_6` has no images"):
        world.discover()
    assert not (world.root / "run").exists()


@pytest.mark.parametrize("scope", ["cls", pytest.param("patch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [
        "neuron-path",
        pytest.param("influence-pattern", marks=pytest.mark.slow),
        pytest.param("knowledge-neuron", marks=pytest.mark.slow),
    ],
)
def test_the_number_of_threads_changes_nothing(world: World, method: str, scope: str) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            # batches of 3: products of 3 and 15 rows, and one image left over
            world.discover(
                f"by{threads}", FEW, method=method, scope=scope, batch_size=3, shard_size=9
            )
    finally:
        torch.set_num_threads(before)
    assert world.files("by1") == world.files("by3")


def test_bfloat16_is_another_run(world: World) -> None:
    exact = world.discover("fp32")
    rough = world.discover("bf16", precision="bf16")
    assert exact.discovery is not None
    assert rough.discovery is not None
    assert (exact.discovery.precision, rough.discovery.precision) == ("fp32", "bf16")
    a, b = world.table("fp32"), world.table("bf16")
    assert not np.array_equal(a.scores, b.scores)
    np.testing.assert_allclose(np.median(b.scores / a.scores), 1, atol=0.05)
    assert (a.neurons[..., 0] == b.neurons[..., 0]).mean() > 0.7
    with pytest.raises(StoreError, match="settings"):
        world.discover("fp32", precision="bf16")


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"precision": "tf32"}, "precision=tf32"), ({"compile": True}, "compile")],
)
def test_what_a_cpu_cannot_do_is_refused(world: World, settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=f"`{flag}` needs a CUDA GPU, got `cpu`"):
        world.discover(**settings)
    assert not (world.root / "run").exists()


def test_tf32_holds_for_the_search_alone() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for precision in ("tf32", "fp32"):
        with products(precision, torch.device("cuda")):
            inside = matmul.allow_tf32, cudnn.allow_tf32
        assert inside == ((precision == "tf32"),) * 2
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    with products("fp32", torch.device("cpu")):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_workers_change_nothing(world: World) -> None:
    (world.images / "class_1" / "5.png").write_bytes(b"")
    world.discover()
    world.discover("workers", data={"workers": 2})
    assert world.files() == world.files("workers")


# ---------------------------------------------------------------- streams


class Opened:
    """A stream of the world's images that counts which were decoded."""

    def __init__(self, world: World) -> None:
        self.source = open_source(f"folder:{world.images}")
        assert self.source.items is not None
        self.order = list(range(len(self.source.items)))
        random.Random(2).shuffle(self.order)
        self.opened: list[str] = []

    def __call__(self, spec: str, **options: Any) -> StreamSource:
        labels = Labels("class index", [ClassInfo(i, str(i)) for i in range(7)], {}, [])
        return StreamSource(
            spec, labels, self.samples, images_per_class=options["images_per_class"]
        )

    def samples(self) -> Iterator[tuple[str, int, Any]]:
        assert self.source.items is not None
        for i in self.order:
            item = self.source.items[i]
            yield item.id, item.label, lambda i=i: self.load(i)

    def load(self, i: int) -> Any:
        self.opened.append(self.source.items[i].id)  # type: ignore[index]
        return self.source.load(i)


@pytest.fixture
def stream(world: World, monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened(world)
    monkeypatch.setattr(inputs, "open_source", opened)
    return opened


def test_a_stream_is_searched_and_resumed_without_opening_what_is_done(
    world: World, stream: Opened
) -> None:
    bad = stream.source.items[stream.order[9]].id  # type: ignore[index]
    (world.images / bad).write_bytes(b"")
    result = world.discover()
    whole = world.files()
    assert result.discovery is not None
    assert result.discovery.data.skipped == [bad]
    assert result.discovery.images == result.discovery.data.images == TOTAL - 1
    assert world.table().positions.tolist() == [i for i in range(TOTAL) if i != 9]
    assert {e.total for e in world.events if e.level == "progress"} == {None}
    (world.root / "run" / "paths" / "00001.json").unlink()
    stream.opened.clear()
    again = world.discover(data={"workers": 2})
    assert world.files() == whole
    assert (
        sorted(stream.opened)
        == sorted(
            stream.source.items[i].id  # type: ignore[index]
            for i in stream.order[8:16]
        )
    )
    assert again.discovery is not None
    assert again.discovery.data == result.discovery.data
    with pytest.raises(StoreError, match="images_per_class"):
        world.discover(data={"images_per_class": 2})


def test_a_stretch_of_a_stream_that_cannot_be_read(world: World, stream: Opened) -> None:
    for i in stream.order[:4] + stream.order[12:21]:
        (world.images / stream.source.items[i].id).write_bytes(b"")  # type: ignore[index]
    world.discover(batch_size=2, shard_size=4)
    assert len(world.table()) == TOTAL - 13
    whole = world.files()
    assert len(whole) == 2 * 10
    for i in (0, 3, 4):
        (world.root / "run" / "paths" / f"{i:05d}.json").unlink()
    world.discover(batch_size=2, shard_size=4)
    assert world.files() == whole


def test_a_stream_balances_its_classes(world: World, stream: Opened) -> None:
    result = world.discover(data={"images_per_class": 2})
    assert np.bincount(world.table().labels).tolist() == [2, 2, 1, 2, 2, 2, 2]
    assert len(stream.opened) == 13
    assert result.discovery is not None
    assert result.discovery.data.images == 13


@pytest.mark.skipif(not importlib.util.find_spec("webdataset"), reason="needs webdataset")
def test_a_webdataset_tar(world: World) -> None:
    items = open_source(f"folder:{world.images}").items
    assert items is not None
    (world.root / "tars").mkdir()
    with tarfile.open(world.root / "tars" / "x-000.tar", "w") as tar:
        for n, item in enumerate(items):
            parts = {"png": (world.images / item.id).read_bytes(), "cls": str(item.label).encode()}
            for end, data in parts.items():
                info = tarfile.TarInfo(f"{n:05d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    world.discover()
    world.discover("stream", data={"train": f"wds/{world.root}/tars/x-000.tar"})
    assert np.array_equal(world.table("stream").neurons, world.table().neurons)


# ---------------------------------------------------------------- memory and time


def test_out_of_memory_halves_the_images_at_a_time_said_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.discover("whole", FEW)
    find, sizes = stage.find_paths, []

    def limited(view: Any, images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return find(view, images, *args, **kwargs)

    monkeypatch.setattr(stage, "find_paths", limited)
    world.discover(data=FEW, batch_size=4)
    assert world.said("warning") == ["out of memory: 1 image at a time"]
    assert sizes == [4, 2, *[1] * 7]
    table, whole = world.table(), world.table("whole")
    assert np.array_equal(table.neurons, whole.neurons)
    np.testing.assert_allclose(table.scores, whole.scores, rtol=1e-4, atol=1e-6)


def test_the_command_is_remembered_once(world: World) -> None:
    for _ in range(2):
        result = world.discover(data=FEW, command="npprune discover x")
    assert result.commands == ["npprune discover x"]


def test_a_memory_limit_is_kept_and_said(world: World) -> None:
    world.discover("whole", FEW)
    world.discover(data=FEW, memory=1e-6)
    assert world.said("warning") == ["memory: 1 image at a time"]
    assert np.array_equal(world.table().neurons, world.table("whole").neurons)


def test_other_errors_and_one_image_too_large_are_not_hidden() -> None:
    def fails(error: Exception) -> Any:
        def work(lo: int, hi: int) -> None:
            raise error

        return work

    with pytest.raises(RuntimeError, match="shapes"):
        memory.halving(fails(RuntimeError("shapes differ")), 8, 8)
    with pytest.raises(MemoryError):
        memory.halving(fails(MemoryError()), 8, 8)
    with pytest.raises(RuntimeError, match="can't allocate"):
        memory.halving(fails(RuntimeError("DefaultCPUAllocator: can't allocate memory")), 8, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process's memory")
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["cls", "patch"])
def test_the_estimate_is_above_the_measured_peak_and_near_it(scope: Scope) -> None:
    answer = FORK.SimpleQueue()
    process = FORK.Process(target=measure_peaks, args=(scope, answer))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    measured = answer.get()
    view, images, _ = large_search()
    points = Integral.of(scope).points
    fit = memory.images_that_fit(view, images[:1], points, 8.0, torch.device("cpu"))
    assert 0.2 < measured / (11 * 8.0 / fit) < 1


def test_how_many_points_is_said_and_decides_the_paths(world: World) -> None:
    """The default's points in block 0 are a setting like the others: with 6 asked for
    everywhere, a store of the default is another one."""
    found = world.discover(data=FEW, scope="patch").discovery
    assert found is not None
    assert text.integral(found) == "mapped-radau, 6 points (12 in block 0)"
    with pytest.raises(StoreError, match="settings"):
        world.discover(data=FEW, scope="patch", points=6)
    world.discover(
        data=FEW, scope="patch", quadrature="mapped-radau"
    )  # what `auto` stands for there
    for settings, integral in (
        ({"scope": "cls"}, "gauss-radau, 4 points"),
        ({"scope": "patch", "points": 1}, "mapped-radau, 1 point"),
        ({"scope": "patch", "method": "influence-pattern"}, "mapped-radau, 20 points"),
        (
            {"scope": "patch", "method": "knowledge-neuron"},
            "mapped-radau, 6 points (12 in block 0)",
        ),
        ({"scope": "patch", "quadrature": "left-riemann"}, "left-riemann, 20 points"),
        (
            {"scope": "patch", "quadrature": "gauss-radau"},
            "gauss-radau, 7 points (12 in block 0)",
        ),
    ):
        out = "-".join(map(str, settings.values()))
        summary = world.discover(out, FEW, **settings).discovery
        assert summary is not None
        assert text.integral(summary) == integral


def test_where_the_time_went(world: World) -> None:
    found = world.discover().discovery
    assert found is not None
    timing = found.timing
    assert timing["images"] == TOTAL
    assert timing["processes"] == 1
    parts = timing["reading"] + timing["search"] + timing["writing"]
    assert 0.5 * timing["seconds"] < parts <= timing["seconds"]
    said = world.said("info")[-1]
    assert said.startswith(f"{TOTAL} images in ")
    assert all(f"{part} " in said for part in ("reading", "search", "writing"))

"""The path store: done or not there, and the same bits every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npprune.core.attribution import votes
from npprune.errors import StoreError
from npprune.store.path_store import PathStore, ShardData, table_from_shards


def _shard(positions: list[int], label: int = 3, seed: int = 0) -> ShardData:
    """Paths that depend on each image's position alone: 4 blocks, 2 neurons."""
    paths = [
        np.random.default_rng([seed, p]).permuted(np.arange(4 * 9).reshape(4, 9) % 9, axis=1)
        for p in positions
    ]
    return ShardData(
        np.array([p[:, :2] for p in paths], dtype=np.int64).reshape(-1, 4, 2),
        np.array([1 / (p + 1) for p in positions]),
        np.array([label] * len(positions), dtype=np.int64),
        [f"img/{p}.jpg" for p in positions],
        positions,
    )


def test_a_shard_comes_back_as_written(tmp_path: Path) -> None:
    store = PathStore(tmp_path / "paths", "abc")
    data = _shard([0, 1, 2])
    data.skipped.append("img/bad.jpg")
    assert store.state(0) == "absent"
    store.write_shard(0, data)
    assert store.state(0) == "done"
    assert store.count() == 1
    assert sorted(p.name for p in store.folder.iterdir()) == ["00000.json", "00000.safetensors"]
    back = store.read_shard(0)
    np.testing.assert_array_equal(back.neurons, data.neurons)
    np.testing.assert_array_equal(back.scores, data.scores)
    np.testing.assert_array_equal(back.labels, data.labels)
    assert (back.ids, back.positions, back.skipped) == (data.ids, data.positions, ["img/bad.jpg"])
    assert back.neurons.dtype == np.int32
    assert back.scores.dtype == np.float64


def test_the_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    PathStore(tmp_path / "a", "abc").write_shard(0, _shard([0, 1]))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.store.test_paths import _shard\n"
        "from npprune.store.path_store import PathStore\n"
        "PathStore(sys.argv[2], 'abc').write_shard(0, _shard([0, 1]))\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).resolve().parents[2]), str(tmp_path / "b")],
        check=True,
    )
    for name in ("00000.json", "00000.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_a_shard_is_not_done(tmp_path: Path) -> None:
    store = PathStore(tmp_path)
    store.write_shard(0, _shard([0]))
    store.write_shard(1, _shard([1]))
    store.sidecar_path(0).unlink()  # killed between the tensors and the sidecar
    store.tensors_path(1).unlink()
    assert [store.state(0), store.state(1)] == ["absent", "absent"]
    store.write_shard(2, _shard([2]))
    with pytest.raises(StoreError, match=r"2 of 3 shards not done: 0 \(absent\), 1 \(absent\)"):
        store.read_all(3)


def test_a_changed_shard_is_damaged_and_never_read(tmp_path: Path) -> None:
    store = PathStore(tmp_path, "abc")
    for i in range(4):
        store.write_shard(i, _shard([i]))
    raw = bytearray(store.tensors_path(0).read_bytes())
    raw[-1] ^= 1
    store.tensors_path(0).write_bytes(raw)
    store.tensors_path(1).write_bytes(store.tensors_path(2).read_bytes())
    store.sidecar_path(2).write_text('{"half":')
    assert [store.state(i) for i in range(4)] == ["damaged", "damaged", "damaged", "done"]
    with pytest.raises(StoreError, match="3 of 4 shards not done") as caught:
        store.read_all(4)
    assert "only what is missing" in (caught.value.hint or "")
    with pytest.raises(StoreError, match=r"shard 0 of .* is damaged"):
        store.read_shard(0)
    store.write_shard(0, _shard([0]))
    assert store.state(0) == "done"


def test_a_shard_under_another_number_is_damaged(tmp_path: Path) -> None:
    store = PathStore(tmp_path)
    store.write_shard(0, _shard([0]))
    for source, to in (
        (store.tensors_path(0), store.tensors_path(1)),
        (store.sidecar_path(0), store.sidecar_path(1)),
    ):
        to.write_bytes(source.read_bytes())
    assert store.state(1) == "damaged"


def test_a_shard_of_other_settings_is_foreign(tmp_path: Path) -> None:
    PathStore(tmp_path, "abc").write_shard(0, _shard([0]))
    assert PathStore(tmp_path, "xyz").state(0) == "foreign"
    assert PathStore(tmp_path).state(0) == "done"


def test_the_table_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    one, many = PathStore(tmp_path / "1"), PathStore(tmp_path / "n")
    one.write_shard(0, _shard(list(range(6))))
    for i, positions in enumerate(([4, 1], [], [5, 0, 2], [3])):
        many.write_shard(i, _shard(positions))
    a, b = one.read_all(1), many.read_all(4)
    for name in ("neurons", "scores", "labels", "ids", "positions"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.neurons.dtype == a.labels.dtype == np.int64
    assert list(b.ids) == [f"img/{p}.jpg" for p in range(6)]
    assert len(b) == 6


def test_classes(tmp_path: Path) -> None:
    table = table_from_shards([_shard([0, 2], label=7), _shard([1], label=2)])
    assert table.classes == [2, 7]
    by_class = table.by_class()
    assert list(by_class) == [2, 7]
    assert list(by_class[7].ids) == ["img/0.jpg", "img/2.jpg"]
    assert len(table.where(99)) == 0


def test_wrong_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="image 1 occurs in two shards"):
        table_from_shards([_shard([0, 1]), _shard([1])])
    other = _shard([5])
    other.neurons = other.neurons[:, :3]
    with pytest.raises(StoreError, match="shards differ in blocks x neurons"):
        table_from_shards([_shard([0]), other])
    with pytest.raises(ValueError, match=r"a shard holds neurons \[n, L, K\]"):
        ShardData(np.zeros((2, 3, 1), int), np.zeros(2), np.zeros(2, int), ["a"], [0, 1])
    with pytest.raises(StoreError, match="0 of 0 shards"):
        PathStore(tmp_path).read_all(0)


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    PathStore(tmp_path).write_shard(0, _shard([0]))
    code = (
        "import sys; from npprune.store import path_store, runs, atomic, checkpoints, paper_files\n"
        "path_store.PathStore(sys.argv[1]).read_all(1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---------------------------------------------------------------- votes

NEURONS = np.array(  # 3 images, 2 blocks, 2 ranks
    [[[5, 1], [0, 2]], [[1, 5], [0, 3]], [[1, 4], [2, 0]]]
)
LABELS = np.array([8, 8, 9])


def test_votes_are_weighted_by_rank() -> None:
    first, second = votes.votes(NEURONS, [6, 4])
    np.testing.assert_array_equal(first, [0, 2.5, 0, 0, 0.5, 1.5])
    np.testing.assert_array_equal(second, [2.5, 0, 1.5, 0.5])
    first, second = votes.class_votes(NEURONS, LABELS, 9, [6, 4])
    np.testing.assert_array_equal(first, [0, 1, 0, 0, 0.5, 0])
    np.testing.assert_array_equal(votes.class_votes(NEURONS, LABELS, 1, [6, 4])[0], np.zeros(6))


def test_votes_agree_with_a_loop_and_not_with_the_order_of_images() -> None:
    rng = np.random.default_rng(0)
    paths = np.argsort(rng.random((50, 3, 20)), axis=2)[:, :, :7]
    slow = np.zeros((3, 20))
    for image in paths:
        for block in range(3):
            for rank, neuron in enumerate(image[block]):
                slow[block, neuron] += (7 - rank) / 7
    fast = votes.votes(paths, [20] * 3)
    np.testing.assert_allclose(fast, slow, rtol=1e-12)
    np.testing.assert_array_equal(fast, votes.votes(paths[::-1], [20] * 3))


def test_the_top_of_a_class() -> None:
    assert votes.class_top(NEURONS, LABELS, 8, 1) == [[1], [0]]  # 1 and 5 tie: lower index
    assert votes.class_top(NEURONS, LABELS, 8, 9) == [[1, 5], [0, 2, 3]]  # no vote, no place
    assert votes.class_top(NEURONS, LABELS, 77, 2) == [[], []]


def test_frequency_counts_images() -> None:
    assert votes.frequency(NEURONS) == [
        [(1, 1.0), (5, 2 / 3), (4, 1 / 3)],
        [(0, 1.0), (2, 2 / 3), (3, 1 / 3)],
    ]
    assert votes.frequency(NEURONS, limit=1) == [[(1, 1.0)], [(0, 1.0)]]


def test_wrong_votes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block 0: neurons must lie in 0\.\.4"):
        votes.votes(NEURONS, [5, 4])
    with pytest.raises(ValueError, match="paths of 2 blocks, but widths of 3"):
        votes.votes(NEURONS, [6, 4, 4])
    with pytest.raises(ValueError, match=r"must be \[images, blocks, K\], got shape \[3\]"):
        votes.votes(LABELS, [6])

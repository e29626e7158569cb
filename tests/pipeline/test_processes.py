"""Several processes on one run: the same bits as one, one message where it fails, resumable."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from npprune.cli import endings
from npprune.cli.app import run_app
from npprune.errors import PeerError
from npprune.pipeline.common.processes import Processes, backend
from npprune.pipeline.run import run_recipe
from npprune.recipe import load_recipe
from npprune.records import Manifest, from_json
from npprune.store.runs import RunFolder, read_plan
from tests.helpers.discovering import COUNTS, World, make_world
from tests.helpers.processes import PATIENCE, Team


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def command(world: World, *more: str, out: str = "run") -> list[str]:
    return [
        "discover", "auto", "--checkpoint", str(world.root / "w.safetensors"), "--num-heads", "3",
        "--data", f"folder:{world.images}", "--topk", "2", "--batch-size", "8",
        "--shard-size", "8", "--device", "cpu", "--out", str(world.root / out), *more,
    ]  # fmt: skip


def test_two_processes_give_the_bits_of_one(world: World) -> None:
    world.discover("one")
    (world.images / "class_1" / "notes.txt").write_text("not an image")
    team = Team(world.root, command(world, "--json"))
    assert team.end() == [0, 0], team.text("err0") + team.text("err1")
    assert world.files() == world.files("one")
    result = json.loads(team.text("out0"))
    assert result["discovery"]["images"] == sum(COUNTS)
    assert result["discovery"]["timing"]["images"] == sum(COUNTS)
    assert result["discovery"]["timing"]["processes"] == 2
    assert team.text("out1") == team.text("err1") == ""  # only rank 0 talks
    one, two = (
        from_json(Manifest, RunFolder(world.root / name).manifest_path.read_text())
        for name in ("one", "run")
    )
    assert one.settings_sha256 == two.settings_sha256


@pytest.mark.slow
def test_more_processes_than_shards(world: World) -> None:
    world.discover("one", shard_size=64)
    team = Team(world.root, command(world, "--shard-size", "64"), count=3)
    assert team.end() == [0, 0, 0], team.text("err0")
    assert world.files() == world.files("one")


@pytest.mark.slow
def test_one_of_two_killed_ends_both_and_the_same_command_resumes(world: World) -> None:
    world.discover("one")
    team = Team(world.root, command(world), pause=0.6)
    first = world.root / "run" / "paths" / "00001.json"  # rank 1's first shard
    deadline = time.monotonic() + PATIENCE
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    team.ranks[1].kill()
    assert team.end() == [2, -9]
    assert "bug" not in team.text("err0")
    partial = world.files()
    assert "00001.json" in partial
    assert "00003.json" not in partial
    team = Team(world.root, command(world))
    assert team.end() == [0, 0], team.text("err0")
    assert world.files() == world.files("one")


@pytest.mark.parametrize("holder", [True, False])
def test_what_rank_0_finds_wrong_ends_all_with_one_message(world: World, holder: bool) -> None:
    folder = RunFolder(world.root / "run")
    started = time.monotonic()
    if holder:
        with folder.lock():
            team = Team(world.root, command(world))
            codes = team.end()
        message = "is in use by process"
    else:
        world.discover(topk=1)
        team = Team(world.root, command(world))
        codes = team.end()
        message = "belongs to a run of other settings: `topk`: 1 -> 2"
    assert codes == [2, 2]
    assert time.monotonic() - started < 30
    assert team.text("err0").count("error: ") == 1
    assert message in team.text("err0")
    assert team.text("err1") == ""


def test_what_every_rank_finds_wrong_is_said_once(world: World) -> None:
    team = Team(world.root, command(world, "--topk", "4000"))
    assert team.end() == [2, 2]
    assert re.search(r"error: `(--)?topk` must be at most 48", team.text("err0"))
    assert team.text("err1") == ""


def test_what_only_rank_1_finds_wrong_is_said_by_it(world: World) -> None:
    (world.images / "class_1" / "5.png").write_bytes(b"not an image")  # in shard 1
    team = Team(world.root, command(world, "--on-bad-image", "error"))
    assert team.end() == [2, 2]
    assert "[rank 1] error: " in team.text("err1")
    assert "class_1/5.png" in team.text("err1")
    assert "error: " not in team.text("err0")


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--topk", "0"], "`--topk` must be at least 1"), (["--topk", "x"], "`--topk` must be a")],
)
@pytest.mark.parametrize(("rank", "local"), [(0, 0), (1, 1), (8, 0)])
def test_what_is_wrong_before_they_meet_is_said_once_a_machine(
    args: list[str], message: str, rank: int, local: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", 16)):
        monkeypatch.setenv(name, str(value))
    assert run_app(["discover", "x", "--data", "folder:x", *args]) == 2
    said = capsys.readouterr().err
    assert (message in said) == (local == 0)
    assert said.startswith("[rank 8] error: " if rank == 8 else "error: ") or local
    assert said == "" or local == 0


@pytest.mark.parametrize("command", ["bench", "export", "analyze", "explore"])
def test_what_one_process_does_is_refused_to_many(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_app([command, "x"]) == 2
    assert f"error: `npprune {command}` runs in one process" in capsys.readouterr().err


def test_who_says_nothing_waits_until_torchrun_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        endings.let_first_speak(2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == [2]


def recipe(world: World, name: str) -> Path:
    """A whole line: all axes under one budget, some images held out, healing."""
    images = f"folder:{world.images}"
    file = world.root / f"{name}.yaml"
    file.write_text(
        f"name: {name}\n"
        f"model: {{name: auto, checkpoint: {world.root}/w.safetensors, num_heads: 3}}\n"
        f"data: {{train: '{images}', calibration: '{images}', val: '{images}', batch_size: 8}}\n"
        "discover: {batch_size: 4, shard_size: 8, points: 2}\n"
        "prune: {target_macs: 0.6, round_to: 1, min_keep: 1, axes: [mlp, cls, heads, qk, tokens]}\n"
        "heal: {epochs: 1, batch_size: 4}\n"
        "evaluate: {latency: false}\nexport: null\ndevice: cpu\n"
    )
    return file


@pytest.mark.slow
def test_a_recipe_gives_the_network_of_one_process(world: World) -> None:
    """Statistics, harm, refit and evaluation are shared; the first process writes."""
    one = run_recipe(load_recipe(recipe(world, "one")), root=world.root)
    team = Team(world.root, ["run", str(recipe(world, "two")), "--root", str(world.root)])
    assert team.end() == [0, 0], team.text("err0") + team.text("err1")
    two = RunFolder(world.root / "reports" / "two").read_result()
    assert [v.name for v in two.variants] == ["two", "two_healed"]
    assert (world.root / "reports" / "two" / "report.html").is_file()
    assert team.text("err0").count("prune: wrote") == 1
    assert team.text("err1") == ""
    plans = [read_plan(world.root / "ckpt" / name) for name in ("one", "two")]
    assert plans[0].kept_widths < plans[0].widths
    for field in ("keep", "cls_keep", "heads", "query_dims", "merged", "last_for_read"):
        assert getattr(plans[0], field) == getattr(plans[1], field), field
    weights = [load_file(world.root / "ckpt" / n / "model.safetensors") for n in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-5)
    a, b = (r.variants[0].evaluation for r in (one, two))
    assert a is not None
    assert b is not None
    assert a.outcomes == b.outcomes
    assert a.dense == b.dense
    assert a.agreement == b.agreement
    assert b.probability_deviation.value == pytest.approx(a.probability_deviation.value, abs=1e-4)
    assert [f.image for f in a.flipped] == [f.image for f in b.flipped]


def test_one_of_two_killed_while_pruning_and_the_same_command_goes_on(world: World) -> None:
    args = [
        "prune", "auto", "--checkpoint", str(world.root / "w.safetensors"), "--num-heads", "3",
        "--calibration", f"folder:{world.images}", "--batch-size", "8", "--device", "cpu",
        "--keep", "0.5", "--round-to", "1", "--min-keep", "1", "--no-protect-paths",
        "--out", str(world.root / "ckpt"),
    ]  # fmt: skip
    team = Team(world.root, args, dies="prepared")  # its sums are there, the harm is not
    assert team.end() == [2, -9]
    said = "ended: another process of this run ended early; run the same command again to resume"
    assert said in team.text("err0")
    assert not (world.root / "ckpt").exists()
    team = Team(world.root, args)
    assert team.end() == [0, 0], team.text("err0") + team.text("err1")
    assert "statistics of 22 images found in" in team.text("err0")
    assert sum(read_plan(world.root / "ckpt").kept_widths) == 3 * 24


def test_what_all_find_wrong_in_a_plan_is_said_once(world: World) -> None:
    args = [
        "prune", "auto", "--checkpoint", str(world.root / "w.safetensors"), "--num-heads", "3",
        "--calibration", f"folder:{world.images}", "--batch-size", "8", "--device", "cpu",
        "--max-drop", "1", "--keep", "0.5", "--calibration-images", "5", "--round-to", "1",
        "--no-protect-paths", "--out", str(world.root / "ckpt"),
    ]  # fmt: skip
    team = Team(world.root, args)
    assert team.end() == [2, 2]
    assert "error: `--max-drop` needs at least 10 calibration images" in team.text("err0")
    assert team.text("err1") == ""


def test_one_process_alone_waits_for_nobody() -> None:
    alone = Processes()
    assert alone.on_first(lambda: 3) == alone.together(lambda: 3) == 3
    assert alone.sums([1.0, 2.0]) == [1.0, 2.0]
    assert alone.device("auto") == "auto"
    assert alone.gathered(3) == [3]
    assert alone.stretch(5) == range(5)


@pytest.mark.parametrize(("total", "count"), [(5, 2), (6, 3), (1, 3), (0, 2)])
def test_stretches_are_all_of_it_in_order(total: int, count: int) -> None:
    parts = [Processes(rank, count).stretch(total) for rank in range(count)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("gpus", "processes", "expected"),
    [(0, 2, "gloo"), (2, 2, "cpu:gloo,cuda:nccl"), (8, 4, "cpu:gloo,cuda:nccl"), (1, 2, "gloo")],
)
def test_gpus_talk_through_nccl_where_each_process_has_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert backend(processes) == expected


@pytest.mark.parametrize(
    ("message", "raised"),
    [("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", PeerError),
     ("CUDA out of memory", RuntimeError)],
)  # fmt: skip
def test_only_a_peer_that_is_gone_is_blamed_on_it(message: str, raised: type) -> None:
    def fails(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(message)

    loss = torch.ones((), requires_grad=True)
    loss.register_hook(fails)
    with pytest.raises(raised) as caught:
        Processes(0, 2, 0, 2).backward(2 * loss)
    assert caught.type is raised


# ---------------------------------------------------------------- torchrun itself


def torchrun(world: World, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "npprune",
        *command(world, *more),
    ]  # fmt: skip


@pytest.mark.slow
def test_torchrun(world: World) -> None:
    world.discover("one")
    done = finish(world, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["discovery"]["images"] == sum(COUNTS)
    assert world.files() == world.files("one")
    before = world.files()
    done = finish(world, "--topk", "0")  # found before they have met: said by the first alone
    assert done.returncode != 0
    assert done.stderr.count("error: `") == 1
    assert re.search(r"exitcode *: 2", done.stderr)
    assert world.files() == before


@pytest.mark.slow
def test_torchrun_with_one_process_killed(world: World) -> None:
    slow = ("--points", "128")
    world.discover("one", points=128)
    job = subprocess.Popen(torchrun(world, *slow), stderr=subprocess.PIPE, text=True)
    first = world.root / "run" / "paths" / "00001.json"  # rank 1's first shard
    deadline = time.monotonic() + PATIENCE
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(job.pid).children()
    victim = next(p for p in children if p.environ().get("RANK") == "1")
    victim.suspend()  # until a second job was refused
    second = finish(world, *slow)
    assert second.returncode != 0
    assert second.stderr.count("is in use by process") == 1
    victim.kill()
    _, said = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert "bug" not in said
    assert len(world.files()) < len(world.files("one"))
    assert finish(world, *slow).returncode == 0
    assert world.files() == world.files("one")


def finish(world: World, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun(world, *more), capture_output=True, text=True, timeout=180)

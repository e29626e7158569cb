"""What may be overwritten, what can be written, and what is only written into."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from npprune import files
from npprune.errors import StoreError, UnstoredError, UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `in` with a file, and other names of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w.bin").write_text("weights")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "file-link").symlink_to("in/w.bin")
    os.link(tmp_path / "in" / "w.bin", tmp_path / "second-name")
    return tmp_path


@pytest.mark.parametrize("out", ["in", "./in", "in/../in", "link", "in/w.bin", "link/w.bin",
                                 "file-link", "second-name"])  # fmt: skip
@pytest.mark.parametrize("read", ["in", "link"])
def test_an_input_by_any_name_is_refused(place: Path, out: str, read: str) -> None:
    with pytest.raises(UsageError, match=r"must not overwrite an input, got") as caught:
        files.refuse_overwriting(Path(out), ["absent", "vit_tiny", read, f"{read}/w.bin"])
    assert caught.value.hint
    assert (place / "in" / "w.bin").read_text() == "weights"


def test_only_a_folder_that_is_replaced_may_not_hold_an_input(place: Path) -> None:
    files.refuse_overwriting(Path(), ["in"])
    with pytest.raises(UsageError, match="it holds what is read"):
        files.refuse_overwriting(Path(), ["in/w.bin"], replaced=True)
    for out in ("out", "in/new.bin", "in/new"):
        files.refuse_overwriting(Path(out), ["in"], replaced=True)


def test_a_link_stays_and_its_file_is_written(place: Path) -> None:
    files.write_bytes(place / "file-link", b"new")
    assert (place / "file-link").is_symlink()
    assert (place / "in" / "w.bin").read_text() == "new"


def test_a_pipe_and_a_device_are_never_replaced(place: Path) -> None:
    os.mkfifo(place / "pipe")
    (place / "null").symlink_to("/dev/null")
    for name in ("pipe", "null", "/dev/null"):
        path = place / name
        assert files.is_stream(path)
        for write in (files.check_file, lambda p: files.write_bytes(p, b"x")):
            with pytest.raises(StoreError, match="a device or a pipe"):
                write(path)
    assert (place / "pipe").is_fifo()
    assert (place / "null").is_symlink()
    assert not any(map(files.is_stream, (place, place / "in" / "w.bin", place / "absent")))


def test_the_standard_output_by_its_names() -> None:
    assert files.is_stdout(Path("/dev/stdout"))
    assert files.is_stdout(Path("/dev/fd/1"))
    assert files.is_stream(Path("/dev/stdout"))
    assert not files.is_stdout(Path("stdout"))


def test_what_cannot_be_written_is_known_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.check_file(place / "new" / "deep" / "a.csv")
    files.check_folder(place / "new", replaced=True)
    assert not (place / "new").exists()
    with pytest.raises(UsageError, match="must be a file, got the folder"):
        files.check_file(place / "in")
    with pytest.raises(UsageError, match="must be a folder, got the file"):
        files.check_folder(place / "in" / "w.bin")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        files.check_file(place / "in" / "w.bin" / "x" / "a.csv")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match=r"cannot write .*: no permission"):
        files.check_folder(place / "new")


def test_a_mount_point_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "in")
    files.check_folder(place / "in")
    files.check_folder(place / "in" / "below", replaced=True)
    with pytest.raises(StoreError, match="a file system is mounted there"):
        files.check_folder(place / "in", replaced=True)


def test_a_staging_folder_is_known_as_a_leftover(place: Path) -> None:
    final = place / "m.onnx"
    with files.staging(final) as folder:
        assert files.is_leftover(folder)
        assert folder.parent == place
        (folder / "m.onnx").write_text("graph")
        (folder / "m.onnx.data").write_text("weights")
        files.publish(folder, final)
    assert final.read_text() == "graph"
    assert not folder.exists()


def test_what_a_killed_process_left_goes_and_what_a_living_one_fills_stays(place: Path) -> None:
    final = place / "m.bin"
    for other in (final, place / "other.bin"):
        files.temporary(other).write_text("half")
    dead = files.temporary(final)
    (dead / "deep").mkdir(parents=True)
    with files.staging(final) as living:
        files.write_bytes(final, b"whole")
        files.remove_leftovers(place)
        assert living.is_dir()
    assert final.read_bytes() == b"whole"
    assert not [p for p in place.iterdir() if files.is_leftover(p)]


def test_scratch_folders_of_killed_processes_go(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "in"))
    with files.scratch() as folder:
        dead = folder.with_name(folder.name[:-12] + "01234567.tmp")
        dead.mkdir()
        with files.scratch():
            assert folder.is_dir()
            assert not dead.exists()
    assert [p.name for p in (place / "in").iterdir()] == ["w.bin"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_in_one_step_or_comes_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    target, rename, calls = place / "in", os.rename, []

    def die(source: Path, to: Path) -> None:
        calls.append(to)
        if calls[1:]:
            raise KeyboardInterrupt
        rename(source, to)

    if not at_once:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", die)
    with contextlib.suppress(KeyboardInterrupt), files.replacing(target) as fresh:
        (fresh / "new").write_text("1")
    monkeypatch.setattr(os, "rename", rename)
    assert target.exists() == at_once
    with pytest.raises(ValueError, match="no"), files.replacing(target):  # noqa: PT012
        assert target.is_dir()
        raise ValueError("no")
    assert [p.name for p in target.iterdir()] == (["new"] if at_once else ["w.bin"])
    assert not [p for p in place.iterdir() if files.is_leftover(p)]


def test_what_could_not_be_stored_is_kept() -> None:
    with pytest.raises(UnstoredError, match="full") as caught, files.keeping([1, 2]):
        raise StoreError("full", hint="free some space")
    assert (caught.value.found, caught.value.hint) == ([1, 2], "free some space")
    with pytest.raises(UnstoredError), files.keeping(None):
        raise OSError("gone")

"""Files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npprune import files
from npprune.errors import StoreError
from npprune.records import ClassInfo, digest
from npprune.store import atomic


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    atomic.write_text(path, "één")
    atomic.write_text(path, "two")
    assert atomic.read_text(path) == "two"
    assert _names(path.parent) == ["a.txt"]


def test_new_files_have_the_usual_mode(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EDQUOT, "disk quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    path = tmp_path / "result.json"
    atomic.write_text(path, "old")

    def fail(target: Path, data: bytes) -> None:
        target.write_bytes(data[:1])  # half-written, then the disk is full
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_write_synced", fail)
    with pytest.raises(StoreError, match=words) as caught:
        atomic.write_text(path, "new")
    assert caught.value.message.startswith(f"cannot write `{path}`")
    assert caught.value.hint
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["result.json"]


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="no space left"):
        atomic.write_text(tmp_path / "a", "x")
    assert _names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
def test_a_real_limit_on_the_file_size(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from npprune.errors import StoreError; from npprune.store import atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic.write_bytes(Path(sys.argv[1]), bytes(5000))\n"
        "except StoreError as e: sys.stdout.write(e.message)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "larger than is allowed" in out.stdout
    assert _names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_really_full_device_is_named_as_such() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        Path("/dev/full").write_bytes(b"x" * 100_000)
    err = atomic.store_error(caught.value, Path("/dev/full"))
    assert "no space left on the device" in err.message


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="a file stands where a folder is needed"):
        atomic.write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(StoreError, match="part of the path is a file"):
        atomic.write_text(tmp_path / "file" / "b" / "a", "x")


def test_a_folder_where_a_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StoreError, match="a folder stands where a file is needed"):
        atomic.write_text(tmp_path / "a", "x")
    assert _names(tmp_path) == ["a"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="no permission"):
            atomic.write_text(tmp_path / "a", "x")
    finally:
        tmp_path.chmod(0o755)


def test_reading_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .* it does not exist"):
        atomic.read_text(tmp_path / "a")
    with pytest.raises(StoreError, match=r"cannot read .* it does not exist"):
        atomic.sha256_file(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match="not UTF-8"):
        atomic.read_text(tmp_path / "b")


def test_records_and_arrays(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "c.json", ClassInfo(3, "cat"))
    assert atomic.read_json(ClassInfo, tmp_path / "c.json") == ClassInfo(3, "cat")

    from safetensors.numpy import load_file

    array = np.arange(12.0).reshape(3, 4).T  # not contiguous
    atomic.write_safetensors(tmp_path / "x.safetensors", {"b": array, "a": np.zeros(2)})
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["b"], array)
    atomic.write_safetensors(tmp_path / "y.safetensors", {"a": np.zeros(2), "b": array})
    same = atomic.sha256_file(tmp_path / "x.safetensors")
    assert same == atomic.sha256_file(tmp_path / "y.safetensors")


def _never(folder: Path) -> str | None:
    return None


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out" / "a"
    with atomic.replace_folder(target, _never) as fresh:
        (fresh / "one").write_text("1")
        assert not target.exists()
    assert _names(target) == ["one"]
    with atomic.replace_folder(target, _never) as fresh:
        (fresh / "two").write_text("2")
    assert _names(target) == ["two"]
    assert _names(target.parent) == ["a"]


def test_a_folder_stays_as_it_was_when_filling_fails(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("1")
    with (  # noqa: PT012
        pytest.raises(StoreError, match="no space left"),
        atomic.replace_folder(target, _never) as fresh,
    ):
        (fresh / "new").write_text("2")
        raise OSError(errno.ENOSPC, "full")
    assert _names(target) == ["old"]
    assert _names(tmp_path) == ["a"]


def test_a_folder_comes_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("1")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)  # as on other systems
    rename = os.rename
    calls: list[Path] = []

    def second_fails(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        rename(source, to)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(StoreError), atomic.replace_folder(target, _never) as fresh:
        (fresh / "new").write_text("2")
    assert len(calls) == 3
    assert _names(target) == ["old"]
    assert _names(tmp_path) == ["a"]


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with (
        pytest.raises(StoreError, match="is not replaced: it is precious"),
        atomic.replace_folder(tmp_path, lambda _: "it is precious"),
    ):
        pytest.fail("the body must not run")
    with (
        pytest.raises(StoreError, match="is a file"),
        atomic.replace_folder(tmp_path / "mine", _never),
    ):
        pytest.fail("the body must not run")


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    files.temporary(tmp_path / "a.json").write_text("half")
    files.temporary(tmp_path / "b").mkdir()
    for name in ("a.json", ".hidden", "x.tmp", ".lock"):
        (tmp_path / name).write_text("x")
    atomic.remove_leftovers(tmp_path)
    atomic.remove_leftovers(tmp_path / "absent")
    assert _names(tmp_path) == [".hidden", ".lock", "a.json", "x.tmp"]


def test_paths_that_are_not_utf8_come_back_from_json(tmp_path: Path) -> None:
    record = ClassInfo(0, os.fsdecode(b"a\xff") if os.name == "posix" else "a")
    atomic.write_json(tmp_path / "class.json", record)
    assert atomic.read_json(ClassInfo, tmp_path / "class.json") == record
    assert len(digest(record)) == 64


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"index": 0, "name": "ant"}', encoding="utf-8-sig")
    assert atomic.read_json(ClassInfo, tmp_path / "plan.json") == ClassInfo(0, "ant")

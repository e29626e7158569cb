"""Text, JSON and sizes that strangers made."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from npprune.cli import app, predict
from npprune.cli.console import Output, say
from npprune.export.predict import Guess, Prediction
from npprune.untrusted import check_archive, out_of_memory, parse_json, shown

EVIL = "a\x1b[2J\x9b31m\u202egpj.exe\x07\r"


def test_text_that_is_shown_does_nothing() -> None:
    assert shown(EVIL) == "a\\x1b[2J\\x9b31m\\u202egpj.exe\\x07\\x0d"
    assert shown("é 猫 − tab\tline\n") == "é 猫 − tab\tline\n"


def test_no_escape_sequence_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("error", f"cannot read `{EVIL}`")
    output = Output(as_json=False)
    output.line(EVIL)
    output.table(EVIL, ("", EVIL), [(EVIL, EVIL)])
    output.warn([EVIL])
    with output.working() as emit:
        from npprune.pipeline.common.events import Event

        emit(Event("discover", EVIL, "warning"))
        emit(Event("discover", EVIL, "progress", 1, 1, "images"))
    text = "".join(capsys.readouterr())
    Output(as_json=True).document("report", {"html": EVIL, "markdown": ""})
    document = capsys.readouterr().out
    assert not set(text + document) & set("\x1b\x9b\x07\r\u202e")
    assert text.count("[2J") >= 7
    assert json.loads(document)["html"] == EVIL


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-x.png", "@SUM(A1)", "\t=1"])
def test_a_cell_is_no_formula(name: str) -> None:
    sink = io.StringIO()
    found = [Prediction(name, [Guess(0, name, 0.5, name)]), Prediction(name, [], name)]
    predict.WRITERS["csv"](sink, found, Path("m.onnx"))
    for row in sink.getvalue().splitlines()[1:]:
        assert not any(c.lstrip('"').startswith(("=", "+", "-", "@", "\t")) for c in row.split(","))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "NaN", "[Infinity]", "{", ""])
def test_what_is_no_json_is_one_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the parser's own words)
        parse_json(text)


def test_memory_that_is_used_up_is_known_by_every_librarys_words() -> None:
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(2**55, np.uint8)
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**55, dtype=torch.uint8)
    for error in (numpy_error.value, torch_error.value, RuntimeError("CUDA out of memory. Tried")):
        assert out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory")):
        assert not out_of_memory(other)


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    np.linalg.LinAlgError("Singular matrix"),
])  # fmt: skip
def test_the_users_world_ends_with_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fails)
    assert app.run_app(["env"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "hint: " in said


@pytest.mark.parametrize(("said", "rule"), [
    ({"WORLD_SIZE": "2"}, "lacks RANK, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment must be a count, got `two`"),
    ({"WORLD_SIZE": "0"}, "must be a count, got `0`"),
])  # fmt: skip
def test_an_environment_of_half_a_torchrun_is_refused(
    said: dict[str, str], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npprune.errors import UsageError
    from npprune.pipeline.common.processes import processes

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rule):
        processes()


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    packed = zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED)
    with packed as archive, archive.open("w.npy", "w", force_zip64=True) as member:
        for _ in range(300):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match="it would unpack to 300 MiB"):
        check_archive(tmp_path / "x.npz")
    (tmp_path / "text").write_text("no archive")
    check_archive(tmp_path / "text")


def test_the_parser_shows_no_escape_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_app([f"predict{EVIL}"]) == 2
    assert app.run_app(["report", f"none{EVIL}"]) == 2
    assert not set(capsys.readouterr().err) & set("\x1b\x9b\x07\u202e")
    assert sys.exc_info()[0] is None

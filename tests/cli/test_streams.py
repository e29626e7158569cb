"""Streams that are closed or lack characters, and terminals that are narrow."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from npprune.cli import app
from npprune.cli.console import Output
from npprune.cli.streams import PLAIN


@pytest.mark.parametrize(
    ("text", "encoding", "plain"),
    [
        ("−25.0 %, 58.6–65.3 … 2 ×", "ascii", "-25.0 %, 58.6-65.3 ... 2 x"),
        ("− é", "latin-1", "- é"),
        ("− – é", "cp1252", "- – é"),
        ("┌─┐│ ╭", "ascii", "+-+| +"),
        ("猫", "ascii", "\\u732b"),
        ("caf\udce9.png", "utf-8", "caf\\xe9.png"),
    ],
)
def test_what_an_encoding_lacks_is_written_plainly(text: str, encoding: str, plain: str) -> None:
    assert text.encode(encoding, PLAIN).decode(encoding) == plain


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_table_and_the_help_on_any_stream(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert app.run_app(["prune", "--help"]) == 0
    output = Output(as_json=False)
    output.table("Top-1 – dense", ("", "dense"), [("−1 ×", "62.0 % (4/8, 95 % 58.6–65.3)")])
    output.document("report", {"html": "", "markdown": ""})
    Output(as_json=True).document("report", {"html": "caf\udce9 −", "markdown": ""})
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "-1" in text
    assert '"caf\\udce9 \\u2212"' in text


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure(closed: str) -> None:
    command = f'"{sys.executable}" -m npprune --version {closed}'
    assert subprocess.run(command, shell=True, capture_output=True, timeout=300).returncode == 0


NAMES = ("top-1", "probability deviation, per image")
ROWS = [(NAMES[0], "100.0 % (12/12, 95 % 75.8–100.0)", "75.0 % (9/12, 95 % 46.8–91.1)", "−25.0 %"),
        (NAMES[1], "", "12.3 % (95 % −20.0 to 44.6)", "")]  # fmt: skip


@pytest.mark.parametrize("width", [20, 40, 50, 60, 80, 120])
def test_every_row_keeps_its_name_and_its_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    Output(as_json=False).table("Both", ("", "dense", "pruned", "change"), ROWS)
    out = capsys.readouterr().out
    assert "…" not in out
    assert "..." not in out
    words = out.split()
    for name in NAMES:
        assert set(name.split()) <= set(words)
    for number in ("100.0", "75.8–100.0", "46.8–91.1", "−25.0", "12.3"):
        assert number in out
    assert max(map(len, out.splitlines())) <= max(width, 40)


def test_a_stacked_row_says_what_its_values_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    header = ("block", "dense units", "of them kept")
    Output(as_json=False).table("Hidden units", header, [("0", "3072", "1536"), ("1", "3072", "")])
    assert capsys.readouterr().out.splitlines() == [
        "Hidden units", "block 0", "  dense units   3072", "  of them kept  1536", "block 1",
        "  dense units   3072",
    ]  # fmt: skip

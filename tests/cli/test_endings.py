"""Signals end the program with a word and a code of their own, from its first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from npprune.cli import app, endings

CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
# the signal comes when a module is loaded, or when the command has begun
PROGRAM = """
import os, signal, sys, importlib.abc
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
number, moment = int(sys.argv[1]), sys.argv[2]
class At(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == moment:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, At())
from npprune.__main__ import main
sys.argv = ["npprune", "env"]
main()
"""


@pytest.mark.parametrize("which", CODES)
@pytest.mark.parametrize("moment", ["typer", "npprune.cli.study", "npprune.pipeline.common.device"])
def test_a_signal_at_any_moment(which: signal.Signals, moment: str) -> None:
    args = [sys.executable, "-c", PROGRAM, str(int(which)), moment]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    code, word = CODES[which]
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == f"{word}; run the same command again to resume"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("which", CODES)
def test_what_a_library_makes_of_a_signal_is_no_bug(
    which: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallowed(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), which)
        except KeyboardInterrupt:
            raise RuntimeError("the callback failed") from None

    monkeypatch.setattr("npprune.cli.app.app", swallowed)
    monkeypatch.setattr(endings, "_came", [])
    handlers = {s: signal.getsignal(s) for s in CODES}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        endings.listen()
        assert app.run_app(["env"]) == CODES[which][0]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert CODES[which][1] in capsys.readouterr().err


def test_an_ignored_signal_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        endings.listen()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)

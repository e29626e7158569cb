"""How the program ends when it is told to: Ctrl-C and SIGTERM, each with a word and its exit code.

Nothing slow is imported here: signals are minded before the program itself is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {130: "interrupted", 143: "terminated"}

PATIENCE = 20.0  # seconds that the first of several processes has to say what is wrong

_came: list[int] = []  # the exit codes of the signals of this process, in order


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, unless whoever started this ignores them.

    Among several processes SIGTERM ends one at once: it may be waiting for the others.
    """
    owner = os.getpid()

    def come(number: int, _: FrameType | None) -> NoReturn:
        if os.getpid() != owner:  # a child that inherited this
            os._exit(CODES[signal.Signals(number)])
        _came.append(CODES[signal.Signals(number)])
        raise KeyboardInterrupt

    several = os.environ.get("WORLD_SIZE", "1") != "1"
    for which in CODES:
        ignored = signal.getsignal(which) in (signal.SIG_IGN, None)
        if not ignored and not (several and which == signal.SIGTERM):
            signal.signal(which, come)


def came() -> int | None:
    """The exit code of the signal that came last, or None."""
    return _came[-1] if _came else None


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, wherever a signal meets it."""
    try:
        return work()
    except KeyboardInterrupt:
        return told()


def told() -> int:
    """Say that the work was ended, and how to go on; returns the exit code."""
    code = came() or CODES[signal.SIGINT]
    if os.environ.get("RANK", "0") == "0" and sys.stderr is not None:
        sys.stderr.write(f"{WORDS[code]}; run the same command again to resume\n")
    return code


def let_first_speak(code: int) -> None:
    """Wait until torchrun, which ends all processes once one has failed, ends this one: the first,
    which says why they fail, may be slower."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(PATIENCE)


def leave(code: int) -> NoReturn:
    """Exit; a signal that comes now changes nothing any more."""
    for which in CODES:
        if signal.getsignal(which) not in (signal.SIG_IGN, None):
            signal.signal(which, lambda *_: os._exit(code))
    sys.exit(code)

"""What events look like off and on a terminal."""

from __future__ import annotations

import io
import sys
import types

import pytest
from rich.console import Console

from npprune.errors import plural
from npprune.pipeline.common.events import Event
from npprune.progress import Progress, duration, showing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(*, terminal: bool, first: int = 0, step: float = 1.0, total: int | None = 40) -> str:
    """The text of 40 images, `step` seconds each."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    clock = Clock()
    with Progress(console, clock=clock) as progress:
        progress.emit(Event("discover", "cpu, no GPU"))
        for done in range(first, 41):
            progress.emit(Event("discover", level="progress", done=done, total=total))
            if progress.bars and done == 20:
                progress.bars.refresh()
            clock.now += step
        progress.emit(Event("discover", "[x] odd", level="warning"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_sparse_lines_off_a_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "discover: cpu, no GPU"
    assert lines[1] == "discover: 4/40 images (10%), 1.0 images/s, 36 s left"
    assert lines[-2] == "discover: 40 images, 1.0 images/s"
    assert lines[-1] == "warning: [x] odd"
    assert len(lines) == 12


def test_fast_work_is_one_line() -> None:
    lines = shown(terminal=False, step=0.01).splitlines()
    assert lines[1:-1] == ["discover: 40 images, 100.0 images/s"]


def test_slow_work_says_so_every_ten_seconds() -> None:
    lines = shown(terminal=False, step=4.0).splitlines()
    assert lines[1] == "discover: 3/40 images (8%), 4.0 s per image, 2 min 28 s left"


def test_the_rate_of_a_resumed_run_counts_only_its_own_images() -> None:
    lines = shown(terminal=False, first=30).splitlines()
    assert lines[1] == "discover: 34/40 images (85%), 1.0 images/s, 6.0 s left"


def test_an_unknown_total() -> None:
    lines = shown(terminal=False, total=None).splitlines()
    assert lines[1] == "discover: 10 images, 1.0 images/s"


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "━" in text
    assert "20/40 images 1.0 images/s, 20 s left" in text
    assert "discover: 40 images, 1.0 images/s\n" in text
    assert text.rindex("━") < text.index("40 images,")


def test_quiet_is_silent() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console, quiet=True) as progress:
        progress.emit(Event("discover", "a word"))
        progress.emit(Event("discover", level="progress", done=1, total=1))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_is_singular() -> None:
    assert plural(1, "image") == "1 image"
    assert plural(1200, "image") == "1,200 images"
    assert plural(2, "class", "classes") == "2 classes"
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with Progress(console) as progress:
        progress.emit(Event("evaluate", level="progress", done=1, total=1))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "evaluate: 1 image\n"


def test_python_may_be_silent_but_for_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (None, False):  # pytest's stderr is no terminal
        with showing(progress) as emit:
            emit(Event("prune", "begun"))
            with pytest.warns(UserWarning, match="labels") as warned:
                emit(Event("prune", "labels are shifted", "warning"))
            assert warned[0].filename == __file__  # whoever called, not npprune's own lines
    assert capfd.readouterr() == ("", "")


def test_python_may_ask_for_progress_or_take_the_events(capfd: pytest.CaptureFixture[str]) -> None:
    with showing(True) as emit:
        emit(Event("prune", "begun"))
        emit(Event("heal", level="progress", done=5, total=5))
    assert capfd.readouterr() == ("", "prune: begun\nheal: 5 images\n")
    taken: list[Event] = []
    with showing(taken.append) as emit:
        emit(Event("prune", "begun"))
    assert taken == [Event("prune", "begun")]
    assert capfd.readouterr() == ("", "")


def test_a_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """One display, drawn anew, and empty at last; a file or widgets are not needed."""
    drawn: list[dict[str, str]] = []

    class Handle:
        def display(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            assert not drawn
            drawn.append(data)

        def update(self, data: dict[str, str], raw: bool) -> None:
            assert drawn
            drawn.append(data)

    display = types.ModuleType("IPython.display")
    display.DisplayHandle = Handle  # type: ignore[attr-defined]
    display.display = lambda *_: None  # type: ignore[attr-defined]
    package = types.ModuleType("IPython")
    package.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    clock = Clock()
    with Progress(Console(force_jupyter=True, width=80), clock=clock) as progress:
        for done in range(41):
            progress.emit(Event("<discover>", level="progress", done=done, total=40))
            clock.now += 0.1
    assert len(drawn) < 25  # not every image
    assert '&lt;discover&gt; <progress value="12" max="40"></progress> 12/40' in str(drawn)
    assert "<discover>: 12/40, 10.0 images/s, 2.8 s left" in str(drawn)
    assert drawn[-1] == {"text/plain": "", "text/html": ""}

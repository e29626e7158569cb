"""The pipeline's events as a person wants them: a bar on a terminal and in a notebook, sparse lines
elsewhere.

For the command line and the Python API.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from npprune.pipeline.common.events import Emit, Event
from npprune.untrusted import shown

QUIET_SECONDS = 10.0  # without a terminal: a line at least this often,
QUIET_SHARE = 0.1  # or at every tenth of the work,
LEAST_SECONDS = 1.0  # but never more often than this
CELL_SECONDS = 0.2  # a notebook's bars are not drawn more often


def duration(seconds: float) -> str:
    """Seconds in words as short as they can be: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Meter:
    """Rate and time left of one piece of work, from where this process began it."""

    begun: float
    first: int
    done: int
    total: int | None
    now: float
    shown: float  # when a line was last printed
    shown_done: int

    def rate(self) -> float | None:
        """Units a second, or None before there is anything to go by."""
        seconds = self.now - self.begun
        return (
            (self.done - self.first) / seconds if seconds > 0 and self.done > self.first else None
        )

    def counts(self) -> str:
        """`120/300`, or `120` where the total is unknown."""
        return f"{self.done}/{self.total}" if self.total is not None else str(self.done)

    def pace(self, unit: str) -> str:
        """`24.5 images/s, 7 s left`; empty while unknown."""
        rate = self.rate()
        if rate is None:
            return ""
        words = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s per {_one(unit)}"
        if self.total is not None and self.total > self.done:
            words += f", {duration((self.total - self.done) / rate)} left"
        return words


def _one(unit: str) -> str:
    """The singular: images -> image, batches -> batch, passes -> pass."""
    return unit[:-2] if unit.endswith(("ches", "sses")) else unit.removesuffix("s")


class Progress:
    """Shows events on a console (stderr). Use as a context manager; `emit` takes the events.

    `quiet` shows nothing. A finished piece of work leaves one line behind.
    """

    def __init__(
        self, console: Console, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console
        self.quiet = quiet
        self.clock = clock
        self.meters: dict[str, Meter] = {}
        self.tasks: dict[str, TaskID] = {}
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self.cell = CellBars(clock) if console.is_jupyter and not quiet else None
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[counts]} {task.fields[pace]}", markup=False),
        )
        self.bars = RichProgress(*columns, console=console, transient=True) if live else None

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars:
            self.bars.stop()
        if self.cell:
            self.cell.stop()

    def emit(self, event: Event) -> None:
        """Show one event."""
        if self.quiet:
            return
        if event.level == "progress":
            self._advance(event)
        elif event.level == "warning":
            self._print(Text.assemble(("warning: ", "yellow"), shown(event.message)))
        else:
            self._print(Text.assemble((f"{event.stage}: ", "bold"), shown(event.message)))

    def _print(self, text: Text, **options: Any) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal, **options)

    def _advance(self, event: Event) -> None:
        name = shown(f"{event.stage}: {event.message}" if event.message else event.stage)
        now = self.clock()
        meter = self.meters.get(name)
        if meter is None or event.done < meter.done:
            meter = Meter(now, event.done, event.done, event.total, now, now, event.done)
            self.meters[name] = meter
        meter.done, meter.total, meter.now = event.done, event.total, now
        finished = event.total is not None and event.done >= event.total
        note = shown(str(event.data.get("note", "")))
        if self.bars:
            self._bar(name, meter, event.unit, note)
        elif self.cell:
            self.cell.show(name, meter, ", ".join(filter(None, (meter.pace(event.unit), note))))
        elif not finished and self._due(meter):
            meter.shown, meter.shown_done = now, meter.done
            share = f" ({meter.done / meter.total:.0%})" if meter.total else ""
            words = f"{meter.counts()} {event.unit}{share}, {meter.pace(event.unit)}"
            self._print(Text(f"{name}: {', '.join(filter(None, (words.rstrip(', '), note)))}"))
        if finished:
            self._finish(name, meter, event.unit, note)

    @staticmethod
    def _due(meter: Meter) -> bool:
        waited = meter.now - meter.shown
        step = (meter.done - meter.shown_done) / meter.total if meter.total else 0.0
        return waited >= QUIET_SECONDS or (waited >= LEAST_SECONDS and step >= QUIET_SHARE)

    def _bar(self, name: str, meter: Meter, unit: str, note: str = "") -> None:
        assert self.bars is not None
        fields: dict[str, Any] = {
            "counts": f"{meter.counts()} {unit}",
            "pace": ", ".join(filter(None, (meter.pace(unit), note))),
        }
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=meter.total, **fields)
        self.bars.update(self.tasks[name], completed=meter.done, total=meter.total, **fields)

    def _finish(self, name: str, meter: Meter, unit: str, note: str = "") -> None:
        """Replace the bar with one line that stays.

        It gives the rate and no time: the meter began with the first report, after some work.
        """
        if self.bars and name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
            self.bars.refresh()
        if self.cell:
            self.cell.remove(name)
        del self.meters[name]
        words = (f"{meter.done} {_one(unit) if meter.done == 1 else unit}", meter.pace(unit), note)
        self._print(Text(f"{name}: {', '.join(filter(None, words))}"))


class CellBars:
    """Bars below a cell of a notebook, drawn anew in their place; no widgets are needed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from IPython.display import DisplayHandle

        self.clock, self.handle = clock, DisplayHandle()
        self.rows: dict[str, tuple[Meter, str]] = {}
        self.drawn: float | None = None  # when; None: never

    def show(self, name: str, meter: Meter, pace: str) -> None:
        """The state of one piece of work; drawn a few times a second."""
        self.rows[name] = meter, pace
        if self.drawn is None or self.clock() - self.drawn >= CELL_SECONDS:
            self._draw()

    def remove(self, name: str) -> None:
        """It is done."""
        if self.rows.pop(name, None) is not None and self.drawn is not None:
            self._draw()

    def stop(self) -> None:
        """No bar is left behind."""
        self.rows.clear()
        if self.drawn is not None:
            self._draw()

    def _draw(self) -> None:
        lines, bars = [], []
        for name, (meter, pace) in self.rows.items():
            words = ", ".join(filter(None, (meter.counts(), pace)))
            size = f' value="{meter.done}" max="{meter.total}"' if meter.total else ""
            lines.append(f"{name}: {words}")
            bars.append(f"<div>{escape(name)} <progress{size}></progress> {escape(words)}</div>")
        data = {"text/plain": "\n".join(lines), "text/html": "".join(bars)}
        draw = self.handle.display if self.drawn is None else self.handle.update
        draw(data, raw=True)
        self.drawn = self.clock()


@contextmanager
def showing(progress: bool | Emit | None) -> Iterator[Emit]:
    """An `Emit` for work that was asked for in Python.

    progress: a function that gets every event; True: a bar on a terminal or in a notebook, lines
        elsewhere; False: silence, and warnings as Python's; None: True where a bar can be seen.
    """
    if callable(progress):
        yield progress
        return
    console = Console(stderr=True, highlight=False, emoji=False)
    if progress is None:
        progress = console.is_terminal or console.is_jupyter
    if not progress:
        yield _only_warnings
        return
    with Progress(console) as bar:
        yield bar.emit


def _only_warnings(event: Event) -> None:
    if event.level == "warning":
        warnings.warn(event.message, stacklevel=_callers_line())


def _callers_line() -> int:
    """`stacklevel` of the line that called npprune: the one outside its outermost frame."""
    frame, depth, outermost = sys._getframe(1), 1, 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "npprune":
            outermost = depth
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return outermost + 1

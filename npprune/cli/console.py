"""The one output sink: data on stdout, talk on stderr.

With `--json`, stdout holds one JSON document and nothing else; whatever a library prints while
the work runs goes to stderr. In the ranks above 0 of a `torchrun` nothing is shown but errors.
`NO_COLOR` and `TERM=dumb` are respected by Rich.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from npprune.pipeline.common.events import Emit

WIDE_CELL = 20  # columns; a longer interval is broken at its comma, to fit three into 80
PLAIN_WIDTH = 120  # columns of a table that goes to a file or a pipe
STYLES = {"error": "bold red", "hint": "cyan", "warning": "yellow"}


def rank() -> int:
    """This process's rank under `torchrun`; 0 elsewhere."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


def say(label: str, message: str) -> None:
    """One line on stderr, `label: message`, or the message alone where the label is empty."""
    where = f"[rank {rank()}] " if rank() else ""
    text = Text(where)
    if label:
        text.append(f"{label}: ", style=STYLES.get(label, ""))
    text.append(message)
    _console(stderr=True).print(text, soft_wrap=True)


def show_error(message: str, hint: str | None = None) -> None:
    """`error: ...` and, where there is one, `hint: ...`."""
    say("error", message)
    if hint:
        say("hint", hint)


class _Console(Console):
    """A console whose reader may leave (`npprune ... | head`): the work goes on, unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        drop(self.file)


def drop(stream: IO[str]) -> None:
    """Send what is still written to a stream nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _console(*, stderr: bool) -> Console:
    """A console on the stream as it is now (tests and pipes replace it)."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return _Console(file=stream, highlight=False, emoji=False, width=width)


def _cell(text: str) -> Text:
    """`62.0 % (496/800, 95 % 58.6–65.3)`: the number, and below it what is in brackets."""
    value, bracket, detail = text.partition(" (")
    cell = Text(value)
    if bracket:
        detail = detail.removesuffix(")").replace("95 % ", "")  # the title says 95 %
        if len(detail) > WIDE_CELL:
            detail = detail.replace(", ", "\n", 1)
        cell.append("\n" + detail, style="dim")
    return cell


class Output:
    """What a command shows: tables and lines for people, or one JSON document.

    `as_json` True: the tables and lines are left out and `document` is printed. False: the
    reverse. `quiet` (torchrun ranks above 0) leaves out both.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.quiet = rank() > 0

    @property
    def width(self) -> int:
        """Columns of stdout."""
        return _console(stderr=False).width

    @contextmanager
    def working(self) -> Iterator[Emit]:
        """While the work runs: an `Emit` that shows progress, and stdout kept for data."""
        from npprune.cli.progress import Progress

        with redirect_stdout(sys.stderr), Progress(_console(stderr=True), self.quiet) as progress:
            yield progress.emit

    def document(self, kind: str, data: dict[str, Any]) -> None:
        """The JSON document of `--json`; `schema_version` and `kind` come first."""
        if not self.as_json or self.quiet:
            return
        from npprune.records import SCHEMA_VERSION

        plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        full = {"schema_version": SCHEMA_VERSION, "kind": kind, **data}
        text = json.dumps(full, indent=2, ensure_ascii=plain, allow_nan=False)
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            drop(sys.stdout)

    def line(self, text: str = "") -> None:
        """One line of data."""
        if not self.as_json and not self.quiet:
            _console(stderr=False).print(Text(text), soft_wrap=True)

    def warn(self, messages: Iterable[str]) -> None:
        """Warnings, on stderr."""
        if not self.quiet:
            for message in messages:
                say("warning", message)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers and never broken.

        What a number has in brackets (its interval) goes on a line of its own below it.
        """
        if self.as_json or self.quiet:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=i > 0)
        for label, *cells in rows:
            table.add_row(escape(label), *map(_cell, cells))
        console = _console(stderr=False)
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)

    def files(self, places: Iterable[tuple[str, str]]) -> None:
        """Where things lie: name and path, one a line, never wrapped."""
        places = list(places)
        width = max((len(name) for name, _ in places), default=0)
        for name, path in places:
            self.line(f"{name:<{width}}  {path}")

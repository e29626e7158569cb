"""The one output sink: data on stdout, talk on stderr.

With `--json`, stdout holds one JSON document and nothing else; whatever a library prints while
the work runs goes to stderr. In the ranks above 0 of a `torchrun` nothing is shown but errors.
`NO_COLOR` and `TERM=dumb` are respected by Rich.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from npprune.errors import UnstoredError
from npprune.untrusted import escaped, shown

if TYPE_CHECKING:
    from npprune.pipeline.common.events import Emit

P = ParamSpec("P")
T = TypeVar("T")

NAME_WIDTHS = (24, 14)  # columns of a row's name before it is broken between words
WIDE_CELLS = (20, 0)  # columns; a longer interval is broken at its comma, to fit three into 80
PLAIN_WIDTH = 120  # columns of a table that goes to a file or a pipe
_UNQUOTED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters that JSON may hold as they are."""
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
    console = _console(stderr=True)
    text.append(wrapped(shown(message), _room(console), "  ", len(text)))
    console.print(text, soft_wrap=True)


def show_error(message: str, hint: str | None = None) -> None:
    """`error: ...` and, where there is one, `hint: ...`."""
    say("error", message)
    if hint:
        say("hint", hint)


class _Console(Console):
    """A console whose reader may leave (`npprune ... | head`): the work continues, unseen."""

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


def _room(console: Console) -> int | None:
    """Columns of a terminal; None where lines go to a file or a pipe, which keeps them whole."""
    return console.width if console.is_terminal else None


def wrapped(text: str, width: int | None, indent: str = "", used: int = 0) -> str:
    """Text broken between words, its further lines indented. What stands in backticks is copied
    to be typed: it stays on one line where a line holds it. `used`: columns before the text."""
    if width is None or used + cell_len(text) <= width:
        return text
    lines, line, free = [], "", width - used
    for word in _words(text, width - cell_len(indent)):
        longer = f"{line} {word}" if line else word
        if line.strip() and cell_len(longer) > free:
            lines.append(line)
            longer, free = indent + word, width
        line = longer
    return "\n".join([*lines, line])


def _words(text: str, width: int) -> Iterator[str]:
    for word in re.findall(r"[^\s`]*`[^`]*`[^\s`]*|\S+", text):
        yield from [word] if cell_len(word) <= width else word.split()


def _cell(text: str, wide: int) -> Text:
    """`62.0 % (496/800, 95 % 58.6–65.3)`: the number, and below it what is in brackets, in two
    lines where it is longer than `wide`."""
    value, bracket, detail = text.partition(" (")
    cell = Text(value)
    if bracket:
        detail = detail.removesuffix(")").replace("95 % ", "")  # the title says 95 %
        if len(detail) > wide:
            detail = detail.replace(", ", "\n", 1)
        cell.append("\n" + detail, style="dim")
    return cell


def _least_width(header: Sequence[str], rows: Sequence[Sequence[str]], name: int, wide: int) -> int:
    """Columns that a table needs: its names broken between words, its numbers not at all."""
    widths = [max((len(word) for word in header[0].split()), default=0)]
    widths += [cell_len(name) for name in header[1:]]
    for label, *cells in rows:
        words = [min(cell_len(label), name), *map(cell_len, label.split())]
        widths[0] = max(widths[0], *words)
        for i, cell in enumerate(cells, 1):
            widths[i] = max(
                widths[i], *(cell_len(line) for line in _cell(cell, wide).plain.split("\n"))
            )
    return sum(widths) + 2 * (len(widths) - 1)


def _stacked(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Text]:
    """The rows one below the other, an empty cell left out."""
    width = max((cell_len(name) for name in header[1:]), default=0)
    for label, *cells in rows:
        yield Text(f"{header[0]} {label}".strip(), style="bold")
        for name, cell in zip(header[1:], cells, strict=True):
            if cell:
                yield Text(f"  {name:<{width}}  {cell.replace('95 % ', '')}")  # as in `_cell`


class Output:
    """What a command shows: tables and lines for people, or one JSON document.

    `as_json` True: the tables and lines are left out and `document` is printed. False: the
    reverse. `quiet` (torchrun ranks above 0) leaves out both.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.quiet = rank() > 0
        self.unstored: UnstoredError | None = None

    @property
    def width(self) -> int:
        """Columns of stdout."""
        return _console(stderr=False).width

    @contextmanager
    def working(self) -> Iterator[Emit]:
        """While the work runs: an `Emit` that shows progress, and stdout kept for data."""
        from npprune.progress import Progress

        with redirect_stdout(sys.stderr), Progress(_console(stderr=True), self.quiet) as progress:
            yield progress.emit

    def result(self, stage: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What the stage gives. Where that could not be stored at its end, it is given all the
        same, to be shown before `finish` says so."""
        try:
            return stage(*args, **kwargs)
        except UnstoredError as err:
            self.unstored = err
            found: T = err.found
            return found

    def finish(self) -> None:
        """After what was found is shown: the UnstoredError, if there was one."""
        if self.unstored is not None:
            raise self.unstored

    def document(self, kind: str, data: dict[str, Any]) -> None:
        """The JSON document of `--json`; `schema_version` and `kind` come first."""
        if not self.as_json or self.quiet:
            return
        from npprune.records import SCHEMA_VERSION

        full = {"schema_version": SCHEMA_VERSION, "kind": kind, **data}
        text = json.dumps(full, indent=2, ensure_ascii=False, allow_nan=False)
        try:
            text.encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:  # JSON has a way of its own to write what is missing
            text = json.dumps(full, indent=2, allow_nan=False)
        text = _UNQUOTED.sub(lambda m: "\\u" + escaped(m[0])[2:].zfill(4), text)
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            drop(sys.stdout)

    def line(self, text: str = "") -> None:
        """One line of data, never broken: a path, a command."""
        if not self.as_json and not self.quiet:
            _console(stderr=False).print(Text(shown(text)), soft_wrap=True)

    def text(self, text: str) -> None:
        """A sentence, broken between words on a terminal."""
        self.line(wrapped(shown(text), _room(_console(stderr=False))))

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and what is known of them, one a line; long ones are broken on a terminal."""
        rows = [(shown(name), shown(fact)) for name, fact in rows]
        used = max((cell_len(name) for name, _ in rows), default=0) + 2
        room = _room(_console(stderr=False))
        indent = " " * (used if room is None or used <= room // 2 else 2)
        for name, fact in rows:
            self.line(f"{name:<{used}}{wrapped(fact, room, indent, used)}")

    def warn(self, messages: Iterable[str]) -> None:
        """Warnings, on stderr."""
        if not self.quiet:
            for message in messages:
                say("warning", message)

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; the first column is text, the others are numbers and never broken.

        What a number has in brackets (its interval) goes on a line of its own below it. On a
        narrow terminal names and intervals take more lines; where even that is too wide, each row
        is a list: its name, and below it what the columns hold.
        """
        if self.as_json or self.quiet:
            return
        header = [shown(name) for name in header]
        rows = [[shown(cell) for cell in row] for row in rows]
        console = _console(stderr=False)
        title = wrapped(shown(title), _room(console))
        console.print(Text(title, style="bold"), soft_wrap=True)
        shapes = [(name, wide) for name in NAME_WIDTHS for wide in WIDE_CELLS]
        needed = (
            wide for n, wide in shapes if _least_width(header, rows, n, wide) <= console.width
        )
        if (wide := next(needed, None)) is None:
            for line in _stacked(header, rows):
                console.print(line, soft_wrap=True)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=i > 0)
        for label, *cells in rows:
            table.add_row(escape(label), *(_cell(cell, wide) for cell in cells))
        console.print(table)

    def files(self, places: Iterable[tuple[str, str]]) -> None:
        """Where things lie: name and path, one a line, never wrapped."""
        places = list(places)
        width = max((len(name) for name, _ in places), default=0)
        for name, path in places:
            self.line(f"{name:<{width}}  {path}")

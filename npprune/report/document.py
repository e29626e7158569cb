"""What a report consists of, before it is HTML or Markdown. A figure always has its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Cell:
    """A value and, smaller beside it, what qualifies it (interval, counts)."""

    value: str
    detail: str = ""

    @property
    def text(self) -> str:
        """Value and detail on one line."""
        return f"{self.value} ({self.detail})" if self.detail else self.value


@dataclass
class Table:
    """Rows below a header. `text` counts the leading columns that are words, not numbers."""

    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    text: int = 1


@dataclass
class Figure:
    """A picture and the numbers in it. `draw` gives inline SVG; it is called for HTML only.
    An empty title: the section's heading says it."""

    title: str
    caption: str
    draw: Callable[[], str]
    table: Table


@dataclass
class Picture:
    """A small picture as a data URI, what it shows, and lines below it."""

    source: str
    alt: str
    lines: list[str]


@dataclass
class Gallery:
    """Small pictures and the words that belong to them. Without pictures: `table`."""

    title: str
    caption: str
    pictures: list[Picture]
    table: Table


@dataclass
class Paragraph:
    """Plain text."""

    text: str


@dataclass
class Facts:
    """Pairs of name and value."""

    pairs: list[tuple[str, str]]


@dataclass
class Commands:
    """Commands to copy."""

    lines: list[str]


@dataclass
class Fold:
    """A table that is there for those who look for it."""

    title: str
    table: Table


@dataclass
class Missing:
    """A part the run does not have yet, and the command that adds it."""

    text: str
    command: str


@dataclass
class Card:
    """One key number: now and before."""

    label: str
    value: str
    before: str
    note: str = ""


Item = Table | Figure | Gallery | Paragraph | Facts | Commands | Fold | Missing


@dataclass
class Section:
    """A part of the report under a heading. `anchor` is its id in the page."""

    anchor: str
    title: str
    items: list[Item] = field(default_factory=list)


@dataclass
class Page:
    """A whole report."""

    title: str
    subtitle: str
    headline: list[str]
    warnings: list[str]
    cards: list[Card]
    sections: list[Section]
    source: str = "result.json"  # the file with all numbers


def cells(*values: str | Cell) -> list[Cell]:
    """A row: strings become cells without detail."""
    return [v if isinstance(v, Cell) else Cell(v) for v in values]

"""The report as Markdown: the same parts, figures as their tables."""

from __future__ import annotations

import re

from npprune.records import Result
from npprune.report import sections
from npprune.report.document import (
    Commands,
    Facts,
    Figure,
    Fold,
    Gallery,
    Item,
    Missing,
    Page,
    Paragraph,
    Table,
)
from npprune.report.text import clean


def render_markdown(result: Result) -> str:
    """A result as GitHub-flavoured Markdown. A pure function; ends in one newline."""
    return as_markdown(sections.build(result))


def as_markdown(page: Page) -> str:
    """A page as GitHub-flavoured Markdown; ends in one newline."""
    return "\n\n".join(_page(page)).rstrip() + "\n"


def escape(text: str) -> str:
    """Text that Markdown and the HTML in it leave alone, on one line."""
    text = clean(" ".join(text.split()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", text)
    text = re.sub(
        r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)",
        lambda m: m[0][0] + "&#8203;" + m[0][1:],
        text,
    )
    return re.sub(r"^(\d+)([.)])(?= )|^([+\-])(?= )", r"\1\\\2\3", text)


def code(text: str) -> str:
    """A code span that holds any text, backticks too."""
    text = clean(" ".join(text.split()))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _page(page: Page) -> list[str]:
    out = [f"# {escape(page.title)}", escape(page.subtitle)]
    out += [escape(line) for line in page.headline]
    if page.warnings:
        out.append("\n".join(f"- **Warning:** {escape(w)}" for w in page.warnings))
    for section in page.sections:
        out.append(f"## {escape(section.title)}")
        for item in section.items:
            out += _item(item)
    return out


def _item(item: Item) -> list[str]:
    if isinstance(item, Table):
        return ([escape(item.caption)] if item.caption else []) + [_table(item)]
    if isinstance(item, Figure | Gallery):
        title = [f"### {escape(item.title)}"] if item.title else []
        caption = [escape(item.caption)] if item.caption else []
        return [*title, *caption, *_item(item.table)]
    if isinstance(item, Fold):
        return [f"### {escape(item.title)}", *_item(item.table)]
    if isinstance(item, Facts):
        return ["\n".join(f"- {escape(name)}: {escape(value)}" for name, value in item.pairs)]
    if isinstance(item, Commands):
        longest = max(len(run) for run in re.findall(r"`*", "\n".join(item.lines)))
        fence = "`" * max(3, longest + 1)
        return ["\n".join([f"{fence}sh", *map(clean, item.lines), fence])]
    if isinstance(item, Missing):
        return [f"{escape(item.text)} Add it with {code(item.command)}"]
    assert isinstance(item, Paragraph)
    return [escape(item.text)]


def _table(table: Table) -> str:
    def line(values: list[str]) -> str:
        return "| " + " | ".join(values) + " |"

    rule = ["---" if i < table.text else "---:" for i in range(len(table.columns))]
    rows = [line([escape(c.text) for c in row]) for row in table.rows]
    return "\n".join([line([escape(c) for c in table.columns]), line(rule), *rows])

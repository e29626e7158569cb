"""The report as one self-contained HTML page."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from npprune.records import Result
from npprune.report import sections
from npprune.report.document import Item, Page
from npprune.report.text import clean

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def render_html(result: Result) -> str:
    """A result as a page that needs no network, no script and no other file.

    A pure function: equal results give equal bytes with the same matplotlib.
    """
    return as_html(sections.build(result))


def as_html(page: Page) -> str:
    """A page that needs no network, no script and no other file."""
    return _environment().get_template("report.html").render(page=page)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=PackageLoader("npprune.report"),
        autoescape=True,
        finalize=_one_line,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.tests["kind"] = _is_kind
    env.filters["svg"] = Markup  # drawn by us, its texts escaped by the SVG writer
    env.filters["bound"] = _bound
    return env


def _one_line(value: object) -> object:
    """Text from the result without control characters; what is markup already stays."""
    return clean(value) if type(value) is str else value


def _bound(value: str) -> Markup:
    """A sentence whose numbers stay on one line with what they are of."""
    from markupsafe import escape

    words = re.sub(r"(?<=\d) (?=%|points|×)", "\N{NO-BREAK SPACE}", clean(value))
    return escape(re.sub(r"(?<=\b95\N{NO-BREAK SPACE}%) (?=\S)", "\N{NO-BREAK SPACE}", words))


def _is_kind(item: Item, name: str) -> bool:
    return type(item).__name__ == name

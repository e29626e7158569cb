"""The report as one self-contained HTML page."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from npprune.records import Result
from npprune.report import sections
from npprune.report.document import Item

if TYPE_CHECKING:
    from jinja2 import Environment


def render_html(result: Result) -> str:
    """A result as a page that needs no network, no script and no other file.

    A pure function: equal results give equal bytes with the same matplotlib.
    """
    page = sections.build(result)
    html = _environment().get_template("report.html").render(page=page)
    return html.encode("utf-8", "replace").decode()  # a name may hold half a surrogate pair


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    env = Environment(
        loader=PackageLoader("npprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.tests["kind"] = _is_kind
    env.filters["svg"] = Markup  # drawn by us, its texts escaped by the SVG writer
    return env


def _is_kind(item: Item, name: str) -> bool:
    return type(item).__name__ == name

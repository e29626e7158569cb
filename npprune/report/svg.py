"""Matplotlib figures as inline SVG: small, the same bytes every time, coloured by the page.

Colours are written as marker values and replaced by CSS variables, so one picture serves the
light page, the dark one and the printer. Text stays text. No pyplot, no global state left behind.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import quoteattr

WIDTH = 9.6  # inches, the page's column
INK, MUTED, LINE = "#101112", "#606162", "#d0d1d2"
ACCENT, MARK, DENSE, PAPER, ON_ACCENT = "#2a6f97", "#c8553d", "#808182", "#fefdfc", "#fdfcfb"
SERIES = ["#2a6f98", "#c8553e", "#4f8a3d", "#8a5fa8", "#b8860c", "#2f8f8b", "#a04a6a", "#5b6b7b"]
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    ACCENT: "accent",
    MARK: "mark",
    DENSE: "dense",
    PAPER: "card",
    ON_ACCENT: "on-accent",
    **{color: f"s{i + 1}" for i, color in enumerate(SERIES)},
}
_SETTINGS: Any = {  # the keys are matplotlib's
    "svg.fonttype": "none",
    "svg.hashsalt": "npprune",
    "text.parse_math": False,  # class names may hold dollar signs
    "text.usetex": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout everywhere
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def picture(
    paint: Callable[[Any], None], *, width: float, height: float, alt: str, name: str
) -> str:
    """What `paint(figure)` draws on a matplotlib figure of width x height inches, as `<svg>`.

    `alt` is read aloud in its place; `name` makes the ids in it unique on the page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # a name may need glyphs the layout font lacks; the reader's browser has them
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        paint(figure)
        out = io.StringIO()
        # not `savefig`, which draws everything twice
        canvas.print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(out.getvalue(), alt, name)


def standalone(svg: str) -> str:
    """A picture made for a page as a file of its own: with fixed colours, on white."""
    colours = {name: colour for colour, name in _VARIABLES.items()}
    svg = re.sub(r"var\(--([a-z0-9-]+)\)", lambda m: colours[m[1]], svg)
    return svg.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1
    ).replace('style="', 'style="background:#ffffff;', 1)


def _inline(text: str, alt: str, name: str) -> str:
    """A standalone SVG file as an element of a page."""
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    width = float(box.group(1).split()[2])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    used = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', body)}
    # tags only: a class name in a text node stays what it is
    body = re.sub(r"<[^>]*>", lambda m: _tag(m[0], name, used), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    size = f'style="min-width:{width * 0.95:.0f}px;max-width:{width * 4 / 3:.0f}px"'
    return f'<svg viewBox="{box.group(1)}" role="img" aria-label={quoteattr(alt)} {size}>{body}\n'


def _tag(tag: str, name: str, used: set[str]) -> str:
    """One tag: ids unique on the page or gone, the page's font and its colours."""
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", tag)
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    return re.sub(
        r"#[0-9a-f]{6}\b",
        lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0],
        tag,
    )

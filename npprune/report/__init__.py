"""A result as HTML, Markdown, and rows for the terminal. Pure functions of `records.Result`:
no torch, no files, no clock."""

from npprune.report.analyses import five_numbers, learning_curve, pareto
from npprune.report.html import render_html
from npprune.report.markdown import render_markdown
from npprune.report.numbers import Summary, summary

__all__ = [
    "Summary",
    "five_numbers",
    "learning_curve",
    "pareto",
    "render_html",
    "render_markdown",
    "summary",
]

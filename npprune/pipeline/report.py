"""Report: a pure function of a run's `result.json`."""

from npprune.pipeline.common.results import render_report

__all__ = ["render_report"]

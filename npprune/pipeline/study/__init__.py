"""The study: criteria, selections and compensations on the same images."""

from npprune.pipeline.study.stage import study

__all__ = ["study"]

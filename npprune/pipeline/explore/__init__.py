"""The explorer: a folder of pages about a run's classes, neurons and images."""

from npprune.pipeline.explore.stage import Explored, explore_run

__all__ = ["Explored", "explore_run"]

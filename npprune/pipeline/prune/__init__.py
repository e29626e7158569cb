"""Pruning: what stays is chosen under a budget, and what remains is refitted."""

from npprune.pipeline.prune.stage import prune

__all__ = ["prune"]

"""Evaluation: the pruned network and the dense one on the same images."""

from npprune.pipeline.evaluate.stage import evaluate

__all__ = ["evaluate"]

"""Healing: a short distillation from the dense network."""

from npprune.pipeline.heal.stage import heal

__all__ = ["heal"]

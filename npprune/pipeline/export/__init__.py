"""Export: a checkpoint or a network as a file for others, compared with PyTorch."""

from npprune.pipeline.export.stage import export_checkpoint, export_model

__all__ = ["export_checkpoint", "export_model"]

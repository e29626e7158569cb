"""Discovery: the neuron path of every image, in shards that resume."""

from npprune.pipeline.discover.stage import discover

__all__ = ["discover"]

"""Analysis: what a run's paths say, and the paper's editing experiments."""

from npprune.pipeline.analyze.stage import analyze_paths, analyze_scores, analyze_similarity

__all__ = ["analyze_paths", "analyze_scores", "analyze_similarity"]

"""Atomic files: run folders, path stores, plans, checkpoints, and the paper's JSONL."""

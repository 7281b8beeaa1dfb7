"""Checkpoints, metrics.jsonl and weights/: written in the background, and read back."""

"""Checkpoints of a run: on disk, and in memory."""

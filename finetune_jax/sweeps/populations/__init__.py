"""Populations: many runs of one model in one process, side by side on an accelerator."""

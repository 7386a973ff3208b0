"""Tasks: `task.py` is the contract, every other file one task, found by its name."""

"""One run: setup, initial state, step, loop, checkpoints, result."""

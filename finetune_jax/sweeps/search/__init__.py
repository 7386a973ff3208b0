"""Search: spaces of values, proposals from finished trials, and pruning."""

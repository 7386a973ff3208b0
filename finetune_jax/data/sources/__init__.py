"""Data sources, one file each, found by name; each has `load(directory, argument)`."""

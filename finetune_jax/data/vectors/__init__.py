"""Feature vectors: rows of numbers without names."""

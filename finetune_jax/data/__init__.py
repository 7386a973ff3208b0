"""Data: sources, split strings, decoding, and batches in an order that is a function."""

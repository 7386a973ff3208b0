"""Exact metrics of a state: splits, other domains, distances, CKA, Fisher information."""

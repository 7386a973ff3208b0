"""Pieces that tasks are made of."""

"""Pretrained weights: addresses, readers, and the strict merge into a model."""

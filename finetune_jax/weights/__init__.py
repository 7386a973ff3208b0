"""Pretrained weights: addresses, file formats, name layouts, a strict merge."""

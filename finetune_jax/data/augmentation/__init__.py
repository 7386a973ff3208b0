"""Augmentations: pure functions on batches on the device."""

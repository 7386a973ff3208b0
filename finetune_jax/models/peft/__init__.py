"""Parameter-efficient wrappers around a model."""

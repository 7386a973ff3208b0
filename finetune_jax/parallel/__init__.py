"""Meshes, sharding, compilation, and executors that run compiled programs."""

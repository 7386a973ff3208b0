"""Layers, heads and stages that several model families are made of."""

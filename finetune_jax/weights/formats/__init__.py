"""Readers of weight files: safetensors, torch, npz, shards, word vectors."""

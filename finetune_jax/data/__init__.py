"""Data: sources, split strings, decoding, and batches in an order that is a function."""

from finetune_jax.core import registry

# A folder of the same name elsewhere on `sys.path` adds kinds of data.
__path__ = registry.open_path(__name__, __path__)

"""Data sources, one file each, found by name; each has `load(directory, argument)`."""

from finetune_jax.core import registry

# A folder of the same name elsewhere on `sys.path` adds sources.
__path__ = registry.open_path(__name__, __path__)

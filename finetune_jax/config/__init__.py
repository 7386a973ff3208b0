"""Every config key with its default, type and range; files, overrides, JSON."""

from finetune_jax.config.grids import grid as grid
from finetune_jax.config.loading import default as default
from finetune_jax.config.loading import differences as differences
from finetune_jax.config.loading import flat as flat
from finetune_jax.config.loading import from_json as from_json
from finetune_jax.config.loading import load as load
from finetune_jax.config.loading import resolve as resolve
from finetune_jax.config.loading import seeds as seeds
from finetune_jax.config.loading import tiny as tiny
from finetune_jax.config.loading import to_json as to_json
from finetune_jax.config.schema import Config as Config

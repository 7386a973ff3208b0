"""Plans of training: phases as data, and strategies that return them."""

from finetune_jax.plans.phase import Phase as Phase
from finetune_jax.plans.phase import as_config as as_config
from finetune_jax.plans.strategies import EVERYTHING as EVERYTHING
from finetune_jax.plans.strategies import ULMFIT_DECAY as ULMFIT_DECAY
from finetune_jax.plans.strategies import alternating as alternating
from finetune_jax.plans.strategies import bias_only as bias_only
from finetune_jax.plans.strategies import discriminative as discriminative
from finetune_jax.plans.strategies import full as full
from finetune_jax.plans.strategies import gradual as gradual
from finetune_jax.plans.strategies import head_only as head_only
from finetune_jax.plans.strategies import layerwise as layerwise
from finetune_jax.plans.strategies import linear_probe as linear_probe
from finetune_jax.plans.strategies import lora as lora
from finetune_jax.plans.strategies import norm_only as norm_only
from finetune_jax.plans.strategies import partial as partial
from finetune_jax.plans.strategies import progressive as progressive
from finetune_jax.plans.strategies import surgical as surgical
from finetune_jax.plans.strategies import together as together
from finetune_jax.plans.strategies import two_stage as two_stage

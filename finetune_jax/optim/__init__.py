"""The optax transformation of a phase: algorithms, schedules, clipping, regularisers."""

from finetune_jax.optim.optimizer import PhaseOptimizer as PhaseOptimizer
from finetune_jax.optim.optimizer import compile_phase as compile_phase

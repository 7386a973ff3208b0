"""Statistics of sweeps: intervals, tests, power, and spread by source of randomness."""

from finetune_jax.sweeps.statistics.hypotheses import (
    holm,
    sign_flip_test,
    smallest_p_value,
)
from finetune_jax.sweeps.statistics.intervals import (
    LEVEL,
    Components,
    Estimate,
    Improvement,
    estimate,
    improvement,
)
from finetune_jax.sweeps.statistics.sample_size import (
    MAX_SEEDS,
    POWER,
    detectable,
    examples_needed,
    power,
    seeds_needed,
)
from finetune_jax.sweeps.statistics.sources import Spread, spread_by_source

__all__ = [
    "LEVEL", "MAX_SEEDS", "POWER", "Components", "Estimate", "Improvement", "Spread",
    "detectable", "estimate", "examples_needed", "holm", "improvement", "power",
    "seeds_needed", "sign_flip_test", "smallest_p_value", "spread_by_source",
]  # fmt: skip

"""Comparisons between runs: paired by seed and by test example, answered in words."""

from finetune_jax.sweeps.comparison.answer import Comparison
from finetune_jax.sweeps.comparison.comparing import (
    Best,
    best_of,
    compare,
    compare_all,
    compare_each,
    spread,
)
from finetune_jax.sweeps.comparison.pairing import with_value
from finetune_jax.sweeps.comparison.runs import COSTS, Run, costs, open_run
from finetune_jax.sweeps.comparison.workdirs import compare_workdirs

__all__ = [
    "COSTS", "Best", "Comparison", "Run", "best_of", "compare", "compare_all",
    "compare_each", "compare_workdirs", "costs", "open_run", "spread", "with_value",
]  # fmt: skip

"""Comparisons between runs: paired by seed and by test example, answered in words."""

from finetune_jax.sweeps.comparison.answer import Comparison
from finetune_jax.sweeps.comparison.comparing import (
    adjusted,
    compare,
    compare_all,
    spread,
)
from finetune_jax.sweeps.comparison.runs import COSTS, Run, costs, open_run
from finetune_jax.sweeps.comparison.workdirs import compare_workdirs

__all__ = [
    "COSTS", "Comparison", "Run", "adjusted", "compare", "compare_all",
    "compare_workdirs", "costs", "open_run", "spread",
]  # fmt: skip

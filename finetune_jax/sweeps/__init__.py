"""Many runs: sweeps, searches and populations, and their tables."""

from finetune_jax.config.grids import grid as grid
from finetune_jax.sweeps.definition import Arm as Arm
from finetune_jax.sweeps.definition import Source as Source
from finetune_jax.sweeps.definition import Sweep as Sweep
from finetune_jax.sweeps.definition import by_source as by_source
from finetune_jax.sweeps.search.proposals import Search as Search
from finetune_jax.sweeps.search.pruning import Halving as Halving
from finetune_jax.sweeps.search.pruning import Median as Median
from finetune_jax.sweeps.search.pruning import Wilcoxon as Wilcoxon
from finetune_jax.sweeps.search.space import Choice as Choice
from finetune_jax.sweeps.search.space import Float as Float
from finetune_jax.sweeps.search.space import Int as Int

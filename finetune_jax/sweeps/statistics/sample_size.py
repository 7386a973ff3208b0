"""Power of a comparison, and the numbers of seeds and examples that it needs."""

import math
from collections.abc import Callable

from scipy import special

from finetune_jax.sweeps.statistics.intervals import (
    LEVEL,
    Components,
    root,
    scales,
    variance_of_mean,
)

POWER = 0.8
MAX_SEEDS, MAX_EXAMPLES = 1000, 10_000_000


def power(
    difference: float,
    components: Components,
    *,
    seeds: int,
    examples: int,
    level: float = LEVEL,
) -> float:
    """Returns the probability that the interval of a true difference excludes 0.

    Args:
        difference: True difference; with one seed, the mean difference of this seed.
        components: Variances of the differences.
        seeds: Number of seeds.
        examples: Number of examples; 1 if the metric is no mean over examples.
        level: Coverage of the interval.
    """
    by_seed, by_example = 0.0, components.example / examples
    if seeds > 1:
        by_seed = (components.seed + components.rest / examples) / seeds
    else:
        by_example += components.rest / examples
    variance, df = variance_of_mean(by_seed, by_example, (seeds, examples))
    if not variance:
        return float(difference != 0)
    shift = abs(difference) / math.sqrt(variance)
    critical = float(special.stdtrit(df, (1 + level) / 2))
    limit = critical * scales(df)
    above = special.ndtr(shift - limit) + special.ndtr(-shift - limit)
    return float(above.mean())


def seeds_needed(
    difference: float,
    components: Components,
    *,
    examples: int,
    level: float = LEVEL,
    wanted: float = POWER,
) -> int | None:
    """Returns the number of seeds that tell a difference from 0 with the wanted power.

    None if not even `MAX_SEEDS` do, for example because test examples are too few, or if
    the components come from one seed.
    """
    if math.isnan(components.seed):
        return None
    return _smallest(
        lambda seeds: power(
            difference, components, seeds=seeds, examples=examples, level=level
        ),
        wanted,
        MAX_SEEDS,
    )


def examples_needed(
    difference: float,
    components: Components,
    *,
    seeds: int,
    level: float = LEVEL,
    wanted: float = POWER,
) -> int | None:
    """Returns the number of examples that tell a difference from 0 with the wanted power.

    None if not even `MAX_EXAMPLES` do, because seeds are too few.
    """
    return _smallest(
        lambda examples: power(
            difference, components, seeds=seeds, examples=examples, level=level
        ),
        wanted,
        MAX_EXAMPLES,
    )


def detectable(
    components: Components,
    *,
    seeds: int,
    examples: int,
    level: float = LEVEL,
    wanted: float = POWER,
) -> float:
    """Returns the smallest true difference that is told from 0 with the wanted power."""

    def excess(difference: float) -> float:
        found = power(
            difference, components, seeds=seeds, examples=examples, level=level
        )
        return found - wanted

    found = (components.seed, components.example, components.rest)
    high = math.sqrt(sum(found if seeds > 1 else found[1:]))
    if not high:
        return 0.0
    while excess(high) < 0:
        high *= 2
    return root(excess, 0.0, high)


def _smallest(reached: Callable[[int], float], wanted: float, most: int) -> int | None:
    """Returns the smallest number, from 2 to `most`, that reaches a power, or None."""
    if reached(most) < wanted:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= wanted else (middle, high)
    return high

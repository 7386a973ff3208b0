"""Spread of a metric by its source of randomness."""

import dataclasses
import math
from collections.abc import Hashable, Mapping

import numpy as np
from scipy import special

from finetune_jax.sweeps.statistics.intervals import LEVEL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """The standard deviation of a metric that one source of randomness causes.

    Attributes:
        sd: Standard deviation.
        low: Lower end of its interval.
        high: Upper end of its interval.
        df: Degrees of freedom: different seeds, less one for each set of groups that
            share seeds.
        groups: Number of groups of runs that agree in all other sources.
    """

    sd: float
    low: float
    high: float
    df: int
    groups: int


def spread_by_source(
    values: Mapping[tuple[tuple[str, Hashable], ...], float], *, level: float = LEVEL
) -> dict[str, Spread]:
    """Returns the spread that each source of randomness causes, the largest first.

    Runs whose seeds differ in one source only form a group; the variances within groups
    are pooled. A source without such runs is left out; "all" is the spread over all runs.
    The intervals assume normal values, and that of "all" runs without a common seed.
    Source: Bouthillier et al. 2021, section 3.

    Args:
        values: Metric of each run, by its sorted pairs (source, seed).
        level: Coverage of the intervals.

    >>> runs = {(("init", i), ("order", o)): 2.0 * i + o for i in (0, 1) for o in (0, 1)}
    >>> {name: round(found.sd, 2) for name, found in spread_by_source(runs).items()}
    {'all': 1.29, 'init': 1.41, 'order': 0.71}
    """
    sources = sorted({name for seed in values for name, _ in seed})
    found = {"all": _pooled([dict(enumerate(values.values()))], level)}
    for source in sources:
        groups: dict[Hashable, dict[Hashable, float]] = {}
        for seed, value in values.items():
            others = tuple(pair for pair in seed if pair[0] != source)
            groups.setdefault(others, {})[dict(seed).get(source)] = value
        found[source] = _pooled(list(groups.values()), level)
    known = {name: spread for name, spread in found.items() if spread is not None}
    rest = sorted((name for name in known if name != "all"), key=lambda n: -known[n].sd)
    return {name: known[name] for name in ("all", *rest) if name in known}


def _pooled(groups: list[dict[Hashable, float]], level: float) -> Spread | None:
    """Returns the pooled standard deviation within groups; None without two values.

    Args:
        groups: Values of each group by the seed of the source.
        level: Coverage of the interval.
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    squares = sum(float(np.var(list(group.values()))) * len(group) for group in groups)
    variance = squares / sum(len(group) - 1 for group in groups)
    df = _distinct(groups)
    ends = special.chdtri(df, [(1 - level) / 2, (1 + level) / 2])
    low, high = np.sqrt(variance * df / ends)
    return Spread(
        sd=math.sqrt(variance), low=float(low), high=float(high), df=df,
        groups=len(groups),
    )  # fmt: skip


def _distinct(groups: list[dict[Hashable, float]]) -> int:
    """Returns the degrees of freedom of a pooled variance.

    A seed that several groups have in common tells the same thing in all of them, so
    groups that share seeds count as one.
    """
    merged: list[set[Hashable]] = []
    for group in groups:
        shared = [seeds for seeds in merged if seeds & group.keys()]
        apart = [seeds for seeds in merged if not seeds & group.keys()]
        merged = [*apart, set(group).union(*shared)]
    return sum(len(seeds) - 1 for seeds in merged)

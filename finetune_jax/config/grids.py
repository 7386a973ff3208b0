"""Combinations of values, for `config.population`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# (key, value) pairs that a member overrides.
Overrides = tuple[tuple[str, Any], ...]


def grid(values: Mapping[str, Sequence[Any]]) -> tuple[Overrides, ...]:
    """Returns a population of all combinations of some values, for `config.population`.

    >>> grid({"plan[0].peak_lr": (0.1, 1.0), "seed": (0,)})
    ((('plan[0].peak_lr', 0.1), ('seed', 0)), (('plan[0].peak_lr', 1.0), ('seed', 0)))

    Args:
        values: Values of each key, named as on the command line after `--config.`.
    """
    return tuple(
        tuple(zip(values, chosen)) for chosen in itertools.product(*values.values())
    )

"""Regularisers by name: penalties of the parameters that a regex matches.

A penalty is a function of one parameter `w`, its value at the start and its Fisher
information. L1 is a proximal step after the optimizer instead, because its gradient never
gives exact zeros. To add a penalty, write its function and name it in `PENALTIES`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, collected
from finetune_jax.core.pytrees import named


def _l2(w: jax.Array, start: Any, fisher: Any) -> jax.Array:
    """Returns |w|^2 / 2, whose gradient is w."""
    del start, fisher
    return jnp.sum(w * w) / 2


def _l2_sp(w: jax.Array, start: jax.Array, fisher: Any) -> jax.Array:
    """Returns |w - start|^2 / 2. Source: Li et al. 2018, equation 2."""
    del fisher
    return jnp.sum((w - start) ** 2) / 2


def _ewc(w: jax.Array, start: jax.Array, fisher: jax.Array) -> jax.Array:
    """Returns sum F (w - start)^2 / 2. Source: Kirkpatrick et al. 2017, equation 3."""
    return jnp.sum(fisher * (w - start) ** 2) / 2


PENALTIES: registry.Choices[Callable] = registry.Choices(
    "penalty", {"l2": _l2, "l2_sp": _l2_sp, "ewc": _ewc}
)
PROXIMAL = "l1"
# Penalties that read the parameters at the start, and their Fisher information.
READS_START = ("l2_sp", "ewc")
READS_FISHER = ("ewc",)


def entry_problems(entries: Sequence[Any]) -> list[Problem]:
    """Returns the problems of (name, strength, regex) entries; keys are relative."""
    problems = []
    for index, entry in enumerate(entries):
        key = f"regularise[{index}]"
        if not (isinstance(entry, tuple | list) and len(entry) == 3):
            text = f"{entry!r}; (name, strength, regex) is needed"
            problems.append(Problem(key, text))
            continue
        name, strength, pattern = entry
        with collected(problems):
            registry.choose({**PENALTIES, PROXIMAL: None}, name, key)
        with collected(problems):
            registry.check_regex(pattern, key)
        if type(strength) not in (int, float) or not 0 <= strength < math.inf:
            text = f"strength {strength!r}; a number from 0 is needed"
            problems.append(Problem(key, text))
    return problems


def match_problems(
    entries: Sequence[tuple[str, float, str]], trained: Iterable[str]
) -> list[Problem]:
    """Returns the entries whose regex matches no trained parameter."""
    trained = tuple(trained)
    return [
        Problem(
            f"regularise[{index}]",
            f"{name!r} over {pattern!r} matches no trained parameter"
            f"{registry.closest(pattern, trained)}",
        )
        for index, (name, _, pattern) in enumerate(entries)
        if not any(re.fullmatch(pattern, parameter) for parameter in trained)
    ]


def penalty(
    entries: Sequence[tuple[str, float, str]],
    params: Any,
    fixed: Mapping[str, Any],
    trained: Iterable[str],
) -> jax.Array:
    """Returns the sum of all penalties, weighed by their strengths.

    Args:
        entries: (name, strength, regex); the regex chooses among trained parameters.
        params: The tree of parameters.
        fixed: 'start' and 'fisher', by parameter name, where an entry reads them.
        trained: Names of the trained parameters.
    """
    leaves = named(params)
    total = jnp.zeros((), next(iter(leaves.values())).dtype)
    for kind, strength, pattern in entries:
        if kind == PROXIMAL:
            continue
        for name in sorted(trained):
            if re.fullmatch(pattern, name):
                start = fixed["start"][name] if kind in READS_START else None
                fisher = fixed["fisher"][name] if kind in READS_FISHER else None
                total += strength * PENALTIES[kind](leaves[name], start, fisher)
    return total


def l1_strength(entries: Sequence[tuple[str, float, str]], name: str) -> float:
    """Returns the strength of L1 on a parameter: the sum over entries that match it."""
    return sum(
        strength
        for kind, strength, pattern in entries
        if kind == PROXIMAL and re.fullmatch(pattern, name)
    )


def proximal(
    entries: Sequence[tuple[str, float, str]], scale: float
) -> optax.GradientTransformationExtraArgs:
    """Returns the last link of a chain over {name: leaf}: the proximal step of L1.

    After the update, values nearer to zero than `learning_rate * scale * strength` become
    zero, and all others move towards zero by that bound.

    Source: Parikh & Boyd 2014, section 6.5.2.
    """

    def update(updates, state, params=None, *, learning_rate, **extra):
        del extra
        assert params is not None

        def shrink(name, change, value):
            strength = l1_strength(entries, name)
            if not strength:
                return change
            bound = jnp.asarray(learning_rate * scale * strength, value.dtype)
            moved = value + change
            # value + (0 - value) is zero to the bit.
            shrunk = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - bound, 0)
            return shrunk - value

        changes = {n: shrink(n, updates[n], params[n]) for n in updates}
        return changes, state

    return optax.GradientTransformationExtraArgs(
        optax.init_empty_state,
        update,  # type: ignore[arg-type]
    )

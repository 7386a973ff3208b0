"""Plans of phases: lengths, rate groups and trained parameters of each phase."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from finetune_jax.config.fields import plain
from finetune_jax.config.loading import entry_dict
from finetune_jax.config.phase import Phase as Phase
from finetune_jax.core import registry
from finetune_jax.core.errors import (
    Problem,
    UserError,
    collected,
    listed,
    raise_if,
    under,
)


class Group(NamedTuple):
    """A rate group: parameters with one scale and one age of their optimizer state.

    Attributes:
        scale: Factor of the learning rate.
        cohort: Rank by age of the optimizer state, 0 for the oldest. Phases that start
            fresh have one cohort, so equal phases have equal groups.
    """

    scale: float
    cohort: int

    @property
    def label(self) -> str:
        """The group's key in the optimizer state."""
        return f"scale={self.scale!r},cohort={self.cohort}"


def plan_from_config(entries: Sequence[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Returns the phases of `config.plan`, checked one by one.

    Raises:
        UserError: Lists every wrong value and repeated phase name.
    """
    plan = tuple(Phase(**plain(entry)) for entry in entries)
    raise_if(plan_problems(plan))
    return plan


def plan_problems(plan: Sequence[Phase]) -> list[Problem]:
    """Returns wrong values of the phases of `config.plan`, and repeated names."""
    problems = [
        problem.under(f"config.plan[{index}]")
        for index, phase in enumerate(plan)
        for problem in phase.problems()
    ]
    names = [phase.name for phase in plan]
    problems += [
        Problem("config.plan", f"{names.count(name)} phases are named {name!r}")
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if not names:
        text = "no phase; plans.as_config(plans.head_only(steps=100)) makes one"
        problems.append(Problem("config.plan", text))
    return problems


def as_config(plan: Iterable[Phase]) -> tuple[ml_collections.ConfigDict, ...]:
    """Returns a plan as a config file has it: a tuple of ConfigDicts."""
    return tuple(entry_dict(Phase, phase) for phase in plan)


def durations(
    plan: Sequence[Phase], examples: int, batch_size: int
) -> tuple[Phase, ...]:
    """Returns the plan with `steps` and `warmup_steps` set in every phase.

    Args:
        plan: Phases with steps or epochs.
        examples: Number of training examples.
        batch_size: Examples in one update.

    >>> durations([Phase(epochs=2)], examples=100, batch_size=32)[0].steps
    7
    """
    phases = []
    problems = []
    for index, phase in enumerate(plan):
        if phase.steps is None:
            assert phase.epochs is not None
            updates = phase.epochs * examples / batch_size
            steps = math.ceil(updates) if updates < 2**31 else 2**31
            if steps >= 2**31:
                text = (
                    f"{phase.epochs} are too many; at most 2**31 updates are possible"
                )
                problems.append(Problem(f"config.plan[{index}].epochs", text))
            phase = dataclasses.replace(phase, steps=steps)
            if phase.warmup_steps > steps:
                text = (
                    f"{phase.warmup_steps} is more than the {steps} steps of phase "
                    f"{phase.name!r} ({phase.epochs} epochs of {examples} examples); "
                    "warmup_share gives a share of the phase instead"
                )
                problems.append(Problem(f"config.plan[{index}].warmup_steps", text))
        if phase.warmup_share:
            assert phase.steps is not None
            warmup = math.ceil(phase.warmup_share * phase.steps)
            phase = dataclasses.replace(phase, warmup_steps=warmup, warmup_share=0.0)
        phases.append(phase)
    raise_if(problems)
    return tuple(phases)


def phase_at(
    plan: Sequence[Phase], ends: Sequence[int], step: int
) -> tuple[int, int, int]:
    """Returns (index, first step, end) of the phase that owns update `step` (from 0).

    Args:
        plan: Phases with `steps` set.
        ends: Steps at which finished phases ended; a plateau may end one early.
        step: An update; past the end the last phase is returned.
    """
    first = 0
    for index, phase in enumerate(plan):
        end = ends[index] if index < len(ends) else first + (phase.steps or 0)
        if step < end or index == len(plan) - 1:
            return index, first, end
        first = end
    raise AssertionError("A plan has at least one phase.")


def scales(phase: Phase, names: Collection[str]) -> dict[str, float]:
    """Returns the scale of the learning rate of each parameter; 0.0 is frozen.

    Raises:
        UserError: Lists parameters that no rule matches, and rules that take none.
    """
    found: dict[str, float] = {}
    unmatched, taken = [], set()
    for name in names:
        for index, (pattern, scale) in enumerate(phase.rules):
            if re.fullmatch(pattern, name):
                found[name] = float(scale)
                taken.add(index)
                break
        else:
            unmatched.append(name)
    advice = (
        "; every parameter must match a rule and every rule a parameter, and ('.*', 0.0) "
        "as the last rule freezes the rest"
    )
    problems = []
    if unmatched:
        text = f"no rule matches {listed(unmatched)}{advice}"
        problems.append(Problem("rules", text))
    for index, (pattern, _) in enumerate(phase.rules):
        if index not in taken:
            shadowed = any(re.fullmatch(pattern, name) for name in names)
            reason = "earlier rules take all it matches" if shadowed else "no parameter"
            hint = "" if shadowed else registry.closest(pattern, names)
            text = f"{pattern!r} matches nothing ({reason}){hint}"
            problems.append(Problem(f"rules[{index}]", text))
    raise_if(problems)
    return found


def joined(plan: Sequence[Phase], index: int, names: Collection[str]) -> dict[str, int]:
    """Returns the phase in which the state of each trained parameter began.

    From that phase on, up to phase `index`, every phase trained the parameter and carried
    its state.
    """
    since: dict[str, int] = {}
    for position, phase in enumerate(plan[: index + 1]):
        before = since if phase.optimizer_state == "carry" else {}
        trained = [n for n, scale in scales(phase, names).items() if scale > 0]
        since = {name: before.get(name, position) for name in trained}
    return since


def groups(
    plan: Sequence[Phase], index: int, names: Collection[str]
) -> dict[str, Group]:
    """Returns the rate group of each trained parameter of phase `index`."""
    since = joined(plan, index, names)
    cohorts = {phase: rank for rank, phase in enumerate(sorted(set(since.values())))}
    scale = scales(plan[index], names)
    return {name: Group(scale[name], cohorts[since[name]]) for name in since}


def carried_cohorts(
    plan: Sequence[Phase], index: int, names: Collection[str]
) -> dict[int, int]:
    """Returns the previous phase's cohort that each cohort of a phase continues."""
    if index == 0:
        return {}
    old, new = (
        sorted(set(joined(plan, i, names).values())) for i in (index - 1, index)
    )
    return {new.index(phase): old.index(phase) for phase in new if phase in old}


def optimizer_state_moves(
    plan: Sequence[Phase], index: int, names: Collection[str]
) -> dict[str, list[str]]:
    """Returns parameters whose state is 'kept', 'new' or 'dropped' at a phase's start."""
    before, now = joined(plan, index - 1, names), joined(plan, index, names)
    kept = [name for name in now if now[name] < index]
    return {
        "kept": kept,
        "new": [name for name in now if now[name] == index],
        "dropped": [name for name in before if name not in kept],
    }


def check_plan(plan: Sequence[Phase], names: Collection[str]) -> None:
    """Checks a plan against a model's parameter names.

    Raises:
        UserError: Lists rules that match nothing, phases that train nothing, and state
            carried between different optimizers.
    """
    problems: list[Problem] = []
    for index, phase in enumerate(plan):
        place = f"config.plan[{index}]"
        before_problems = len(problems)
        with collected(problems), under(place):
            learns = any(scales(phase, names).values())
            if not learns and phase.batch_stats != "update_all":
                text = (
                    f"phase {phase.name!r} trains nothing; give a rule a scale above 0, "
                    "or set batch_stats='update_all' to move running averages only"
                )
                raise UserError(Problem("rules", text))
        if len(problems) > before_problems or phase.optimizer_state != "carry":
            continue
        before = plan[index - 1]
        fields = ("optimizer", "optimizer_args")
        if index == 0:
            text = "'carry', but phase 0 has no phase before it; use 'reset'"
        elif any(getattr(phase, name) != getattr(before, name) for name in fields):
            text = (
                f"'carry' takes the state of {before.optimizer!r} into "
                f"{phase.optimizer!r}; use one optimizer with the same arguments, or "
                "'reset'"
            )
        else:
            continue
        problems.append(Problem(f"{place}.optimizer_state", text))
    raise_if(problems)

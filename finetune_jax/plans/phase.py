"""Freezing and unfreezing as data: phases, plans and which parameters learn in them."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_jax.config import Config
from finetune_jax.config.loading import entry_of
from finetune_jax.config.schema import PHASE
from finetune_jax.core import registry
from finetune_jax.core.errors import (
    Problem,
    UserError,
    collected,
    listed,
    raise_if,
    under,
)

# Of float32, in which updates compute.
LARGEST = 3.4e38
BATCH_STATS = ("hold", "update", "update_all")
OPTIMIZER_STATE = ("reset", "carry")


def _not_static(name: str) -> Any:
    return dataclasses.field(default=PHASE[name], metadata={"static": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training in which a fixed set of parameters learns.

    Attributes:
        name: Stands in `metrics.jsonl` and in the report; unique in a plan.
        steps: Length in updates; give this or `epochs`.
        epochs: Length in passes over the training data.
        optimizer: A name in `optimizer.OPTIMIZERS`.
        optimizer_args: Its arguments, such as `{"b1": 0.9}`.
        peak_lr: The highest learning rate, reached at the end of the warm-up.
        schedule: A name in `schedules.SCHEDULES`.
        schedule_args: Its arguments, such as `{"power": 2.0}`.
        warmup_steps: Updates over which the rate rises linearly to `peak_lr`.
        end_lr_scale: The last rate as a share of `peak_lr`, where the schedule has one.
        clip_norm: Bound of the global norm of the trained parameters' gradient.
        clip_value: Bound of each value of the gradient.
        clip_adaptive: Bound of a unit's gradient as a share of the norm of its weights.
        fixed_batch: Whether every update sees the phase's first batch, as line searches
            need; with `data.batch_size` that of the training split it is all of it.
        accumulate_steps: Micro-batches that an update is cut into; divides the batch.
        weight_decay: Decoupled for adamw, added to the gradient for the others.
        decay: Regexes of the names that decay; by default no bias and no scale.
        regularise: (name in `regularisers.PENALTIES` or 'l1', strength, regex) each.
        rules: (regex over the full name, scale of the rate); first match wins, and a
            scale of 0.0 freezes.
        batch_stats: 'hold' moves no running average of BatchNorm, 'update' those of
            stages in which something learns, 'update_all' all.
        optimizer_state: 'reset' starts fresh, 'carry' keeps the state of parameters
            that the phase before trained too.
        plateau_metric: Ends the phase early when this metric, such as
            'validation/loss', stops improving; None never does.
        plateau_patience: Evaluations without improvement until then.
        plateau_min_change: A smaller change is no improvement.
        plateau_restore: Whether the phase leaves the parameters, running averages and
            optimizer state of its best evaluation of `plateau_metric` behind.
    """

    name: str = _not_static("name")
    steps: int | None = _not_static("steps")
    epochs: float | None = _not_static("epochs")
    optimizer: str = PHASE["optimizer"]
    optimizer_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peak_lr: float = _not_static("peak_lr")
    schedule: str = _not_static("schedule")
    schedule_args: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"static": False}
    )
    warmup_steps: int = _not_static("warmup_steps")
    end_lr_scale: float = _not_static("end_lr_scale")
    clip_norm: float | None = PHASE["clip_norm"]
    clip_value: float | None = PHASE["clip_value"]
    clip_adaptive: float | None = PHASE["clip_adaptive"]
    fixed_batch: bool = PHASE["fixed_batch"]
    accumulate_steps: int = PHASE["accumulate_steps"]
    weight_decay: float = PHASE["weight_decay"]
    decay: tuple[str, ...] = PHASE["decay"]
    regularise: tuple[tuple[Any, ...], ...] = PHASE["regularise"]
    rules: tuple[tuple[str, float], ...] = _not_static("rules")
    batch_stats: str = _not_static("batch_stats")
    optimizer_state: str = _not_static("optimizer_state")
    plateau_metric: str | None = _not_static("plateau_metric")
    plateau_patience: int = _not_static("plateau_patience")
    plateau_min_change: float = _not_static("plateau_min_change")
    plateau_restore: bool = _not_static("plateau_restore")

    @property
    def static(self) -> tuple[tuple[str, Any], ...]:
        """The fields that decide a compiled step, by themselves, as a hashable value.

        All are but those marked `static: False`: they are arguments of the step, of the
        loop alone, or known by what they give (`rules` by the groups of parameters).
        """
        return tuple(
            (field.name, _hashable(getattr(self, field.name)))
            for field in dataclasses.fields(self)
            if field.metadata.get("static", True)
        )

    def problems(self) -> list[str]:
        """Returns what is wrong with this phase by itself, a line each."""
        at_least = {"steps": 1, "warmup_steps": 0, "accumulate_steps": 1}
        at_least |= {"peak_lr": 0, "end_lr_scale": 0, "weight_decay": 0}
        at_least |= {"plateau_patience": 1, "plateau_min_change": 0}
        values = {name: getattr(self, name) for name in at_least}
        found = [
            f"{name}: {values[name]!r}; at least {bound} and finite is needed"
            for name, bound in at_least.items()
            if (value := values[name]) is not None
            and not bound <= value < (2**31 if isinstance(value, int) else LARGEST)
        ]
        if self.end_lr_scale > 1:
            found.append(f"end_lr_scale: {self.end_lr_scale!r}; at most 1 is needed")
        if (self.steps is None) == (self.epochs is None):
            found.append(
                f"steps: {self.steps}, epochs: {self.epochs}; give exactly one of them"
            )
        for name in ("epochs", "clip_norm", "clip_value", "clip_adaptive"):
            value = getattr(self, name)
            if value is not None and not 0 < value < LARGEST:
                found.append(f"{name}: {value!r}; more than 0 and finite is needed")
        clips = ("clip_norm", "clip_value", "clip_adaptive")
        given = [name for name in clips if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"{given[0]}: {', '.join(given)} are given; at most one is")
        if self.plateau_restore and self.plateau_metric is None:
            found.append("plateau_restore: without plateau_metric there is no best")
        if self.steps is not None and self.warmup_steps > self.steps:
            found.append(
                f"warmup_steps: {self.warmup_steps} is more than steps: {self.steps}"
            )
        for name, allowed in (
            ("batch_stats", BATCH_STATS),
            ("optimizer_state", OPTIMIZER_STATE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                hint = registry.closest(value, allowed)
                found.append(f"{name}: {value!r} is not one of {allowed}{hint}")
        return found + _rule_problems(self.rules, self.decay)


def _hashable(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


def _rule_problems(rules: Any, decay: Any) -> list[str]:
    found = []
    if not rules:
        found.append("rules: empty; ('.*', 1.0) trains everything")
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2):
            found.append(f"rules: {rule!r} is not a pair (regex, scale)")
        elif isinstance(rule[1], bool) or not isinstance(rule[1], (int, float)):
            found.append(f"rules: the scale in {rule!r} is not a number")
        elif not 0 <= rule[1] < LARGEST:
            found.append(f"rules: the scale in {rule!r} is not finite and >= 0")
    patterns = [r[0] for r in rules if isinstance(r, tuple | list) and len(r) == 2]
    for pattern in [*patterns, *decay]:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            found.append(
                f"rules, decay: {pattern!r} is not a regular expression: {error}"
            )
    return found


class Group(NamedTuple):
    """A rate group: parameters with one scale whose optimizer state is of one age.

    Attributes:
        scale: Of the learning rate.
        cohort: 0 for those whose state is oldest, 1 for the next, ... Phases that start
            fresh have one cohort, so equal phases have equal groups.
    """

    scale: float
    cohort: int

    @property
    def label(self) -> str:
        """The group's key in the optimizer state."""
        return f"scale={self.scale!r},cohort={self.cohort}"


def plan_from_config(entries: Iterable[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """Returns the phases of `config.plan`.

    Raises:
        UserError: Lists every unknown name, wrong value and repeated phase name.
    """
    entries = tuple(entries)
    if problems := plan_problems(entries):
        raise UserError(*problems)
    return tuple(_phase(entry) for entry in entries)


def _phase(entry: Mapping[str, Any]) -> Phase:
    fields = {name: entry[name] for name in entry}
    for name in ("optimizer_args", "schedule_args"):
        if name in fields:
            fields[name] = dict(fields[name])
    return Phase(**fields)


def plan_problems(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns what is wrong with the phases of `config.plan`, a line each."""
    known = {field.name for field in dataclasses.fields(Phase)}
    problems, names = [], []
    for index, entry in enumerate(entries):
        unknown = [name for name in entry if name not in known]
        problems += [
            f"config.plan[{index}].{name}: unknown{registry.closest(name, known)}"
            for name in unknown
        ]
        if not unknown:
            phase = _phase(entry)
            names.append(phase.name)
            problems += [f"config.plan[{index}].{text}" for text in phase.problems()]
    problems += [
        f"config.plan: {names.count(name)} phases are named {name!r}"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if not names and not problems:
        problems.append("config.plan: no phase; strategies.head_only() makes one")
    return problems


def as_config(plan: Iterable[Phase]) -> tuple[Config, ...]:
    """Returns a plan as `config.plan` holds it: a tuple of ConfigDicts."""
    return tuple(entry_of("plan", dataclasses.asdict(phase)) for phase in plan)


def durations(
    plan: Sequence[Phase], examples: int, batch_size: int
) -> tuple[Phase, ...]:
    """Returns the plan with `steps` set in every phase.

    Args:
        plan: Phases with steps or epochs.
        examples: In the training split.
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
                    f"{phase.name!r} ({phase.epochs} epochs of {examples} examples)"
                )
                problems.append(Problem(f"config.plan[{index}].warmup_steps", text))
        phases.append(phase)
    if problems:
        raise UserError(*problems)
    return tuple(phases)


def phase_at(
    plan: Sequence[Phase], ends: Sequence[int], step: int
) -> tuple[int, int, int]:
    """Returns (index, first step, end) of the phase that owns update `step` (from 0).

    Args:
        plan: Phases with `steps` set.
        ends: Where the phases that are over really ended; a plateau may end one early.
        step: An update; past the end the last phase is returned.
    """
    first = 0
    for index, phase in enumerate(plan):
        end = ends[index] if index < len(ends) else first + (phase.steps or 0)
        if step < end or index == len(plan) - 1:
            return index, first, end
        first = end
    raise AssertionError("A plan has at least one phase.")


def scales(phase: Phase, names: Iterable[str]) -> dict[str, float]:
    """Returns the scale of the learning rate of each parameter; 0.0 is frozen.

    Raises:
        UserError: Lists parameters that no rule matches, and rules that take none.
    """
    found: dict[str, float] = {}
    unmatched, taken = [], set()
    names = tuple(names)
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


def joined(plan: Sequence[Phase], index: int, names: Iterable[str]) -> dict[str, int]:
    """Returns for each parameter that learns in phase `index` the age of its state.

    That is the index of the phase from which on every phase trained and carried it.
    """
    names = tuple(names)
    since: dict[str, int] = {}
    for position, phase in enumerate(plan[: index + 1]):
        before = since if phase.optimizer_state == "carry" else {}
        trained = [n for n, scale in scales(phase, names).items() if scale > 0]
        since = {name: before.get(name, position) for name in trained}
    return since


def groups(plan: Sequence[Phase], index: int, names: Iterable[str]) -> dict[str, Group]:
    """Returns the rate group of each parameter that learns in phase `index`."""
    names = tuple(names)
    since = joined(plan, index, names)
    cohorts = {phase: rank for rank, phase in enumerate(sorted(set(since.values())))}
    scale = scales(plan[index], names)
    return {name: Group(scale[name], cohorts[since[name]]) for name in since}


def carried_cohorts(
    plan: Sequence[Phase], index: int, names: Iterable[str]
) -> dict[int, int]:
    """Returns which cohort of the phase before each cohort of phase `index` goes on."""
    names = tuple(names)
    if index == 0:
        return {}
    old, new = (
        sorted(set(joined(plan, i, names).values())) for i in (index - 1, index)
    )
    return {new.index(phase): old.index(phase) for phase in new if phase in old}


def optimizer_state_moves(
    plan: Sequence[Phase], index: int, names: Iterable[str]
) -> dict[str, list[str]]:
    """Returns whose optimizer state is 'kept', 'new' or 'dropped' on entering a phase."""
    names = tuple(names)
    before, now = joined(plan, index - 1, names), joined(plan, index, names)
    kept = [name for name in now if now[name] < index]
    return {
        "kept": kept,
        "new": [name for name in now if now[name] == index],
        "dropped": [name for name in before if name not in kept],
    }


def check_plan(plan: Sequence[Phase], names: Iterable[str]) -> None:
    """Checks a plan against a model's parameter names.

    Raises:
        UserError: All that does not fit: rules, a phase in which nothing learns and no
            running average moves, state carried between different optimizers.
    """
    names = tuple(names)
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
    if problems:
        raise UserError(*problems)

"""The optimizer of a phase: one optax transformation, and its learning rates.

The learning rate is an argument of `update`, not of the factory, so that phases which
differ in rate, schedule or length share one compiled step.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import Problem, UserError, collected, raise_if
from finetune_jax.core.pytrees import like, name_of, named
from finetune_jax.optim.algorithms import OPTIMIZERS, Algorithm
from finetune_jax.optim.penalty_path import ProbeOptions
from finetune_jax.optim.regularisers import PROXIMAL, proximal
from finetune_jax.optim.schedules import Plateau, make_schedule
from finetune_jax.plans.phase import Group, Phase


def by_name(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` over a flat dict {name: leaf} of the leaves that a mask leaves visible.

    optax replaces masked leaves by empty nodes. A state with empty nodes can be restored
    from the state of another mask without an error; a state of names cannot. `init` copies
    its result, because some states alias the parameters and could not be donated. A
    `value_fn` or `grad_fn` among the extra arguments takes a tree like the parameters, with
    an empty node for each masked leaf; a `grad_fn` returns such a tree.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return jax.tree.map(jnp.array, tx.init(named(params)))

    def update(updates, state, params=None, **extra):
        gradient, flat = named(updates), None if params is None else named(params)
        if "value_fn" in extra:
            value_fn, whole = extra["value_fn"], named(extra["grad"])
            extra["value_fn"] = lambda leaves: value_fn(like(updates, leaves))
            extra["grad"] = {name: whole[name] for name in gradient}
        if "grad_fn" in extra:
            grad_fn = extra["grad_fn"]
            extra["grad_fn"] = lambda leaves, i: named(
                grad_fn(like(updates, leaves), i)
            )
        new, state = tx.update(gradient, state, flat, **extra)
        return like(updates, new), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_rate(scale: float) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation to minus `scale` times the rate given to `update`."""

    def update(updates, state, params=None, *, learning_rate, **extra):
        del params, extra
        rate = -jnp.asarray(learning_rate * scale)
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(
        optax.init_empty_state,
        update,  # type: ignore[arg-type]
    )


def _accumulated(tx: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` applied to the mean of `steps` gradients in a row."""
    # MultiSteps' own gradient_transformation() would drop the extra arguments.
    dtype = jnp.result_type(float)  # MultiSteps' own default is float32.
    multi = optax.MultiSteps(tx, steps, accumulator_dtype=dtype)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)  # type: ignore


def decays(phase: Phase, name: str) -> bool:
    """Returns whether the phase's weight decay applies to a parameter."""
    return any(re.fullmatch(pattern, name) for pattern in phase.decay)


def _clip(phase: Phase) -> Any:
    """Returns the clipping of the gradient of all trained parameters."""
    if phase.clip_norm is not None:
        return optax.clip_by_global_norm(phase.clip_norm)
    if phase.clip_value is not None:
        return optax.clip(phase.clip_value)
    if phase.clip_adaptive is not None:
        # Source: Brock et al. 2021.
        return optax.adaptive_grad_clip(phase.clip_adaptive)
    return optax.identity()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseOptimizer:
    """Optimizer and schedule of a phase, their names and arguments resolved.

    Attributes:
        phase: The phase.
        algorithm: Algorithm of its optimizer.
        inner: Arguments of the algorithm for each rate group.
        outer: Arguments of `algorithm.around`.
        schedule: Function from the updates after the warm-up to the schedule over them.
    """

    phase: Phase
    algorithm: Algorithm
    inner: Mapping[str, Any]
    outer: Mapping[str, Any]
    schedule: Callable[[int], Callable]

    @property
    def plateau(self) -> Plateau | None:
        """The schedule that follows a metric, if it is such a one."""
        found = self.schedule(1)
        return found if isinstance(found, Plateau) else None

    @property
    def probe(self) -> ProbeOptions | None:
        """Options of a linear probe, if the phase is one."""
        is_probe = self.algorithm.evaluates == "all examples"
        return ProbeOptions(**self.inner) if is_probe else None

    @property
    def rates(self) -> str:
        """The learning rates, or the penalties of a linear probe, in words."""
        if self.probe is not None:
            return f"{len(self.probe.penalties)} L2 penalties"
        warmup = self.phase.warmup_steps
        rise = f", warm-up {warmup}" if warmup else ""
        return f"{self.phase.schedule} {self.phase.peak_lr:g}{rise}"

    @property
    def accumulates(self) -> bool:
        """Whether the optimizer takes one micro-batch after the other.

        One that evaluates other points takes the gradient of the whole update at once.
        """
        return self.phase.accumulate_steps > 1 and self.algorithm.evaluates == "nothing"

    def learning_rates(self) -> np.ndarray:
        """Returns the learning rate of every update of the phase, float32 [steps].

        The warm-up rises from `peak_lr / warmup_steps` to `peak_lr`, then the schedule
        runs over the remaining updates. A plateau's rates are without its drops.
        """
        phase = self.phase
        assert phase.steps is not None
        warmup = phase.warmup_steps
        rest = self.schedule(phase.steps - warmup)
        if warmup:
            start = phase.peak_lr / warmup
            rise = optax.linear_schedule(start, phase.peak_lr, warmup - 1)
            rest = optax.join_schedules([rise, rest], [warmup])
        rates = jax.vmap(lambda step: jnp.asarray(rest(step), jnp.float32))
        return np.asarray(rates(jnp.arange(phase.steps)))

    def transformation(
        self, groups: Mapping[str, Group]
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation of the phase over the whole tree of parameters.

        Its `update` also takes `learning_rate`. The nesting keeps frozen parameters out
        of the clipped norm, out of the accumulator, and their backward pass out of the
        program.

        Args:
            groups: Rate group of each trained parameter; all others are frozen.
        """
        inner: Any = optax.multi_transform(
            {
                group.label: self._group(group.scale)
                for group in sorted(set(groups.values()))
            },
            lambda leaves: {name: groups[name].label for name in leaves},
        )
        inner = optax.chain(_clip(self.phase), inner)
        if self.algorithm.around is not None:
            inner = registry.call(
                self.algorithm.around, self.outer, "optimizer_args", inner=inner
            )
        if self.accumulates:
            inner = _accumulated(inner, self.phase.accumulate_steps)

        def labels(tree):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "trained" if name_of(path) in groups else "frozen",
                tree,
            )

        return optax.multi_transform(
            {"frozen": optax.set_to_zero(), "trained": by_name(inner)}, labels
        )

    def _group(self, scale: float) -> Any:
        """Returns the transformation of a rate group."""
        phase = self.phase

        def decaying(leaves: Any) -> dict[str, bool]:
            return {name: decays(phase, name) for name in leaves}

        # Always the same links: state is carried between phases by its place in the chain.
        decay: Any = optax.identity()
        if phase.weight_decay:
            decay = optax.add_decayed_weights(phase.weight_decay, mask=decaying)
        core = self.algorithm.transformation(decay, _scale_by_rate(scale), self.inner)
        return by_name(optax.chain(core, proximal(phase.regularise, scale)))

    def problems(self) -> list[Problem]:
        """Returns the fields of the phase that the algorithm cannot work with."""
        phase = self.phase
        has_proximal = any(name == PROXIMAL for name, *_ in phase.regularise)
        if has_proximal and phase.optimizer == "schedule_free_adamw":
            text = (
                "l1 makes trained parameters zero, but schedule_free_adamw evaluates an "
                "average of them; choose another optimizer"
            )
            return [Problem("regularise", text)]
        does, needed = _NEEDED.get(self.algorithm.evaluates, ("", {}))
        does = f"{phase.optimizer} {does}"
        problems = [
            Problem(
                name, f"{getattr(phase, name)!r}, but {does} and needs {value!r}: {why}"
            )
            for name, (value, why) in needed.items()
            if getattr(phase, name) != value
        ]
        if has_proximal and self.algorithm.evaluates == "value":
            text = f"{does}, and a proximal step (l1) would leave it; use 'l2'"
            problems.append(Problem("regularise", text))
        return problems

    def group_problems(self, groups: Mapping[str, Group]) -> list[Problem]:
        """Returns whether the algorithm cannot work with the phase's rate groups."""
        found = set(groups.values())
        if self.algorithm.evaluates not in _NEEDED or found == {Group(1.0, 0)}:
            return []
        rates = sorted({group.scale for group in found})
        text = (
            f"{self.phase.optimizer} searches along one line for all trained parameters, "
            f"but the rules give {rates} and the state is of "
            f"{len({g.cohort for g in found})} ages; scales of 1.0 and "
            "optimizer_state='reset' are needed"
        )
        return [Problem("rules", text)]


# Fields of a phase as an algorithm that finds its own steps needs them, and why.
_OWN_STEPS = "it finds the length of a step itself"
_IN_LOSS = "a clipped gradient is not that of the loss"
_FINDS_STEPS: dict[str, tuple[Any, str]] = {
    "peak_lr": (1.0, _OWN_STEPS),
    "schedule": ("constant", _OWN_STEPS),
    "warmup_steps": (0, _OWN_STEPS),
    "warmup_share": (0.0, _OWN_STEPS),
    "clip_norm": (None, _IN_LOSS),
    "clip_value": (None, _IN_LOSS),
    "clip_adaptive": (None, _IN_LOSS),
}
_IN_ONE_UPDATE = "the fit is the only update of the phase"
# Behaviour of algorithms and the fields that they need, by `Algorithm.evaluates`.
_NEEDED: dict[str, tuple[str, dict[str, tuple[Any, str]]]] = {
    "value": (
        "searches along a line",
        {
            **_FINDS_STEPS,
            "weight_decay": (
                0.0,
                "regularise=(('l2', strength, '.*kernel'),) is in the loss",
            ),
            "fixed_batch": (True, "the loss must not change from step to step"),
        },
    ),
    "all examples": (
        "fits all examples at once",
        {
            **_FINDS_STEPS,
            "steps": (1, _IN_ONE_UPDATE),
            "weight_decay": (
                0.0,
                "it has penalties, optimizer_args={'penalties': ...}",
            ),
            "regularise": ((), "it has penalties, optimizer_args={'penalties': ...}"),
            "fixed_batch": (False, "every fit sees all examples"),
            "accumulate_steps": (1, _IN_ONE_UPDATE),
            "plateau_metric": (None, _IN_ONE_UPDATE),
            "batch_stats": ("hold", "features are computed with held statistics"),
        },
    ),
}


def compile_phase(phase: Phase) -> PhaseOptimizer:
    """Returns the optimizer and the schedule that a phase names.

    Raises:
        UserError: Lists unknown names and unsuitable arguments; keys are relative to the
            phase.
    """
    problems: list[Problem] = []
    schedule: Any = None
    with collected(problems):
        schedule = make_schedule(phase)
    with collected(problems):
        algorithm = registry.choose(OPTIMIZERS, phase.optimizer, "optimizer")
        takes = (
            inspect.signature(algorithm.around).parameters if algorithm.around else ()
        )
        outer = {k: v for k, v in phase.optimizer_args.items() if k in takes}
        compiled = PhaseOptimizer(
            phase=phase,
            algorithm=algorithm,
            inner={k: v for k, v in phase.optimizer_args.items() if k not in outer},
            outer=outer,
            schedule=schedule,
        )
        algorithm.check(phase.optimizer_args)
        compiled.transformation({"": Group(1.0, 0)})  # Checks names and kinds.
        raise_if(compiled.problems())
        if not problems:
            return compiled
    raise UserError(*problems)


def carried(old: Any, new: Any, cohorts: Mapping[int, int]) -> Any:
    """Returns a fresh optimizer state with the continued cohorts of the old one.

    A continued cohort keeps its moments and its count; a new one stays fresh.

    Args:
        old: State at the end of the phase before.
        new: What the phase's optimizer returned from `init`.
        cohorts: Old cohort by new cohort, from `carried_cohorts`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(old)
    before = {_place(path): leaf for path, leaf in leaves}

    def pick(path, leaf):
        cohort, inside = _place(path)
        if cohort is None or cohort not in cohorts:
            return leaf
        return before[cohorts[cohort], inside]

    return jax.tree_util.tree_map_with_path(pick, new)


def _place(path: tuple) -> tuple[int | None, str]:
    """Returns (cohort, path inside the state of its group) of a leaf of a state."""
    for depth, key in enumerate(path):
        label = str(getattr(key, "key", ""))
        if match := re.fullmatch(r"scale=.*,cohort=(\d+)", label):
            return int(match[1]), name_of(path[depth + 1 :])
    return None, name_of(path)

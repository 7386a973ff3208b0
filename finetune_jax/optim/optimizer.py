"""Optimizers by name, and the one transformation of a phase.

All of it is optax. The learning rate is an argument of `update`, not of the factory, so
that phases which differ in rate, schedule or length share one compiled step.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core import registry
from finetune_jax.core.pytrees import like, name_of, named
from finetune_jax.optim.algorithms import OPTIMIZERS, Algorithm
from finetune_jax.optim.regularisers import PROXIMAL, proximal
from finetune_jax.plans.phase import Group, Phase


def by_name(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` over a flat dict {name: leaf} of the leaves that a mask lets through.

    optax marks what a mask hides by nodes without leaves. A state that holds them can be
    restored from that of another mask without an error; a state of names cannot. What
    `init` returns is copied, because some states alias the parameters and could not be
    donated. A `value_fn` or `grad_fn` among the extra arguments is given a tree like the
    parameters, with a node without leaves for each that the mask hides; a `grad_fn`
    returns such a tree.
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
        lambda params: optax.EmptyState(),  # type: ignore[arg-type]
        update,  # type: ignore[arg-type]
    )


def _accumulated(tx: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` applied to the mean of `steps` gradients in a row."""
    # MultiSteps' own gradient_transformation() would drop the extra arguments.
    dtype = jnp.result_type(float)  # MultiSteps' own default is float32.
    multi = optax.MultiSteps(tx, steps, accumulator_dtype=dtype)
    return optax.GradientTransformationExtraArgs(multi.init, multi.update)  # type: ignore


def _algorithm(phase: Phase) -> Algorithm:
    where = f"config.plan, phase {phase.name!r}, optimizer"
    return registry.choose(OPTIMIZERS, phase.optimizer, where)


def _arguments(phase: Phase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the phase's arguments for the algorithm's groups, and for what is around."""
    outer = _algorithm(phase).around
    names = inspect.signature(outer).parameters if outer else ()
    inside = {k: v for k, v in phase.optimizer_args.items() if k not in names}
    return inside, {k: v for k, v in phase.optimizer_args.items() if k in names}


def _group_transformation(phase: Phase, scale: float):
    def decaying(leaves: Any) -> dict[str, bool]:
        return {name: decays(phase, name) for name in leaves}

    # Always the same links: state is carried between phases by its place in the chain.
    decay: Any = optax.identity()
    if phase.weight_decay:
        decay = optax.add_decayed_weights(phase.weight_decay, mask=decaying)
    core = registry.call(
        _algorithm(phase).make,
        _arguments(phase)[0],
        f"config.plan, phase {phase.name!r}, optimizer_args",
        decay=decay,
        rate=_scale_by_rate(scale),
    )
    return by_name(optax.chain(core, proximal(phase.regularise, scale)))


def decays(phase: Phase, name: str) -> bool:
    """Returns whether the phase's weight decay applies to a parameter."""
    return any(re.fullmatch(pattern, name) for pattern in phase.decay)


def make_optimizer(
    phase: Phase, groups: Mapping[str, Group]
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of a phase over the whole tree of parameters.

    Its `update` takes `learning_rate` besides. The nesting is what keeps frozen
    parameters out of the norm that is clipped, out of the accumulator, and their backward
    pass out of the program.

    Args:
        phase: Says optimizer, clipping, accumulation and decay.
        groups: Rate group of each parameter that learns; all others are frozen.

    Raises:
        UserError: No such optimizer, or arguments that it does not take.
    """
    inner: Any = optax.multi_transform(
        {
            group.label: _group_transformation(phase, group.scale)
            for group in sorted(set(groups.values()))
        },
        lambda leaves: {name: groups[name].label for name in leaves},
    )
    inner = optax.chain(_clip(phase), inner)
    if around := _algorithm(phase).around:
        where = f"config.plan, phase {phase.name!r}, optimizer_args"
        inner = registry.call(around, _arguments(phase)[1], where, inner=inner)
    if accumulates(phase):
        inner = _accumulated(inner, phase.accumulate_steps)

    def labels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if name_of(path) in groups else "frozen", tree
        )

    return optax.multi_transform(
        {"frozen": optax.set_to_zero(), "trained": by_name(inner)}, labels
    )


def _clip(phase: Phase) -> Any:
    """Returns the clipping of the whole gradient of what learns."""
    if phase.clip_norm is not None:
        return optax.clip_by_global_norm(phase.clip_norm)
    if phase.clip_value is not None:
        return optax.clip(phase.clip_value)
    if phase.clip_adaptive is not None:
        # Source: Brock et al. 2021.
        return optax.adaptive_grad_clip(phase.clip_adaptive)
    return optax.identity()


def evaluates(phase: Phase) -> str:
    """Returns what the optimizer computes at other points: see `Algorithm`."""
    return _algorithm(phase).evaluates


def accumulates(phase: Phase) -> bool:
    """Returns whether the optimizer takes one micro-batch after the other.

    One that looks at other points takes the gradient of the whole update at once.
    """
    return phase.accumulate_steps > 1 and evaluates(phase) == "nothing"


def check_optimizer(phase: Phase) -> list[str]:
    """Returns what is wrong with a phase's optimizer and schedule, a line each."""
    try:
        make_optimizer(phase, {"": Group(1.0, 0)})
    except ValueError as error:
        return [str(error)]
    proximal = any(name == PROXIMAL for name, *_ in phase.regularise)
    if proximal and phase.optimizer == "schedule_free_adamw":
        return [
            f"phase {phase.name!r}: l1 makes zeros of what is trained, but "
            "schedule_free_adamw evaluates an average of it; choose another optimizer"
        ]
    if evaluates(phase) != "value":
        return []
    searches = f"phase {phase.name!r}: {phase.optimizer} searches along a line"
    wanted = {
        "peak_lr": (1.0, "the length of a step is its own"),
        "schedule": ("constant", "the length of a step is its own"),
        "warmup_steps": (0, "the length of a step is its own"),
        "weight_decay": (
            0.0,
            "regularise=(('l2', strength, '.*kernel'),) is in the loss",
        ),
        "clip_norm": (None, "a clipped gradient is not that of the loss"),
        "clip_value": (None, "a clipped gradient is not that of the loss"),
        "clip_adaptive": (None, "a clipped gradient is not that of the loss"),
        "fixed_batch": (True, "the loss must not change from step to step"),
    }
    problems = [
        f"{searches}, and needs {name}={value!r}: {reason}"
        for name, (value, reason) in wanted.items()
        if getattr(phase, name) != value
    ]
    if proximal:
        problems.append(f"{searches}, and a proximal step (l1) would leave it")
    return problems


def check_groups(phase: Phase, groups: Mapping[str, Group]) -> list[str]:
    """Returns what is wrong with a phase's rate groups for its optimizer, a line each."""
    found = set(groups.values())
    if evaluates(phase) == "value" and found != {Group(1.0, 0)}:
        rates = sorted({group.scale for group in found})
        return [
            f"phase {phase.name!r}: {phase.optimizer} searches along one line for all "
            f"that learns, but its rules give {rates} and its state is of "
            f"{len({g.cohort for g in found})} ages; scales of 1.0 and "
            "optimizer_state='reset' are needed"
        ]
    return []


def carried(old: Any, new: Any, cohorts: Mapping[int, int]) -> Any:
    """Returns a fresh optimizer state with all that goes on taken from the old one.

    A cohort keeps its moments and its count whole; one that begins now stays fresh.

    Args:
        old: State at the end of the phase before.
        new: What the phase's optimizer returned from `init`.
        cohorts: Old cohort by new cohort, from `carried_cohorts`.
    """
    before = {_place(path): leaf for path, leaf in _leaves(old)}

    def pick(path, leaf):
        cohort, inside = _place(path)
        if cohort is None or cohort not in cohorts:
            return leaf
        return before[cohorts[cohort], inside]

    return jax.tree_util.tree_map_with_path(pick, new)


def _leaves(tree: Any) -> list:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _place(path: tuple) -> tuple[int | None, str]:
    """Returns (cohort, path inside the state of its group) of a leaf of a state."""
    for depth, key in enumerate(path):
        label = str(getattr(key, "key", ""))
        if match := re.fullmatch(r"scale=.*,cohort=(\d+)", label):
            return int(match[1]), name_of(path[depth + 1 :])
    return None, name_of(path)

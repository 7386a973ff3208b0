"""Learning-rate schedules, optimizers by name, and the one transformation of a phase.

All of it is optax. The learning rate is an argument of `update`, not of the factory, so
that phases which differ in rate, schedule or length share one compiled step.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune_jax import lookup
from finetune_jax.errors import UserError
from finetune_jax.plan import Group, Phase
from finetune_jax.trees import like, name_of, named


def _check_share(**values: float) -> None:
    wrong = {name: value for name, value in values.items() if not 0 <= value < 1}
    if wrong:
        raise UserError(f"optimizer_args: {wrong}; 0 or more and less than 1 is needed")


def _sgd(*, momentum: float = 0.0, nesterov: bool = False):
    _check_share(momentum=momentum)
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def _adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8):
    _check_share(b1=b1, b2=b2)
    if eps <= 0:
        raise UserError(f"optimizer_args: eps {eps}; more than 0 is needed")
    return optax.scale_by_adam(b1, b2, eps)


OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adam}
# For the others the decay is added to the gradient, as in torch.
DECOUPLED_DECAY = ("adamw",)


def _constant(*, peak: float, steps: int, end: float):
    del steps, end
    return optax.constant_schedule(peak)


def _linear(*, peak: float, steps: int, end: float):
    return optax.linear_schedule(peak, peak * end, steps)


def _cosine(*, peak: float, steps: int, end: float):
    return optax.cosine_decay_schedule(peak, max(steps, 1), end)


SCHEDULES = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rates(phase: Phase) -> np.ndarray:
    """Returns the learning rate of every update of a phase, float32 [steps].

    The warm-up rises from `peak_lr / warmup_steps` to `peak_lr`, then the schedule runs
    over the rest.
    """
    assert phase.steps is not None
    where = f"config.plan, phase {phase.name!r}, schedule"
    warmup = phase.warmup_steps
    rest = lookup.choose(SCHEDULES, phase.schedule, where)(
        peak=phase.peak_lr, steps=phase.steps - warmup, end=phase.end_lr_scale
    )
    if warmup:
        start = phase.peak_lr / warmup
        rise = optax.linear_schedule(start, phase.peak_lr, warmup - 1)
        rest = optax.join_schedules([rise, rest], [warmup])
    rates = jax.vmap(lambda step: jnp.asarray(rest(step), jnp.float32))
    return np.asarray(rates(jnp.arange(phase.steps)))


def by_name(tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` over a flat dict {name: leaf} of the leaves that a mask lets through.

    optax marks what a mask hides by nodes without leaves. A state that holds them can be
    restored from that of another mask without an error; a state of names cannot. What
    `init` returns is copied, because some states alias the parameters and could not be
    donated. A `value_fn` among the extra arguments is given a tree like the parameters,
    with a node without leaves for each that the mask hides.
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


def _group_transformation(phase: Phase, scale: float):
    where = f"config.plan, phase {phase.name!r}"
    core = lookup.call(
        lookup.choose(OPTIMIZERS, phase.optimizer, f"{where}, optimizer"),
        phase.optimizer_args,
        f"{where}, optimizer_args",
    )

    def decaying(leaves: Any) -> dict[str, bool]:
        return {name: decays(phase, name) for name in leaves}

    # Always three links: state is carried between phases by its place in the chain.
    decay: Any = optax.identity()
    if phase.weight_decay:
        decay = optax.add_decayed_weights(phase.weight_decay, mask=decaying)
    decoupled = phase.optimizer in DECOUPLED_DECAY
    links = (core, decay) if decoupled else (decay, core)
    return by_name(optax.chain(*links, _scale_by_rate(scale)))


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
    if phase.clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(phase.clip_norm), inner)
    if phase.accumulate_steps > 1:
        inner = _accumulated(inner, phase.accumulate_steps)

    def labels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if name_of(path) in groups else "frozen", tree
        )

    return optax.multi_transform(
        {"frozen": optax.set_to_zero(), "trained": by_name(inner)}, labels
    )


def check_optimizer(phase: Phase) -> list[str]:
    """Returns what is wrong with a phase's optimizer and schedule, a line each."""
    problems = []
    for check in (
        lambda: _group_transformation(phase, 1.0),
        lambda: lookup.choose(
            SCHEDULES, phase.schedule, f"config.plan, phase {phase.name!r}, schedule"
        ),
    ):
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    return problems


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

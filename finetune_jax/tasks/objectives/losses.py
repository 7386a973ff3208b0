"""Losses: one value per example, which the target weights and sums.

Classification losses take logits and a target [B, K] whose rows sum to 1, one-hot or soft.
Regression losses take predictions and targets [B, T] and are means over T.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core import registry
from finetune_jax.core.errors import UserError, raise_if


def widened(array: jax.Array) -> jax.Array:
    """Returns numbers of 32 bits or more."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def one_hot(label_B: jax.Array, classes: int, dtype: Any) -> jax.Array:
    """Returns the target [B, K] of class indices."""
    return jax.nn.one_hot(label_B, classes, dtype=dtype)


def smoothed(target_BxK: jax.Array, share: float) -> jax.Array:
    """Returns the target with a share of it spread evenly over all classes.

    Source: Szegedy et al. 2016, section 7.
    """
    smooth_BxK = optax.smooth_labels(target_BxK, jnp.asarray(share))
    return smooth_BxK.astype(target_BxK.dtype)


def cross_entropy(logits_BxK: jax.Array, target_BxK: jax.Array) -> jax.Array:
    """Returns the cross entropy of each example, [B]."""
    return optax.softmax_cross_entropy(logits_BxK, target_BxK)


def binary_cross_entropy(logits_BxK: jax.Array, target_BxK: jax.Array) -> jax.Array:
    """Returns the binary cross entropies of each example, summed over classes, [B].

    Every class is a binary decision of its own, one against the rest.
    """
    return optax.sigmoid_binary_cross_entropy(logits_BxK, target_BxK).sum(axis=-1)


def focal(
    logits_BxK: jax.Array, target_BxK: jax.Array, *, gamma: float = 2.0
) -> jax.Array:
    """Returns the cross entropy, class k weighted by (1 - p_k) ** gamma, [B].

    Args:
        logits_BxK: Unnormalised log probabilities.
        target_BxK: Target share of each class.
        gamma: How much less well-classified examples count; 0 is cross entropy.

    Source: Lin et al. 2017, section 3.2, with a softmax.
    """
    log_p_BxK = jax.nn.log_softmax(logits_BxK)
    # Powers of 1 - p have no gradient at p = 1, and near there log(1 - p) is lost in
    # rounding. Only the most probable class can be there, so its log(1 - p) is computed
    # from the other classes.
    best_B = jnp.argmax(logits_BxK, axis=-1)
    is_best_BxK = jax.nn.one_hot(best_B, logits_BxK.shape[-1], dtype=bool)
    others_Bx1 = jax.nn.logsumexp(log_p_BxK, axis=-1, where=~is_best_BxK, keepdims=True)
    p_BxK = jnp.exp(jnp.where(is_best_BxK, -1.0, log_p_BxK))
    log_rest_BxK = jnp.where(is_best_BxK, others_Bx1, jnp.log1p(-p_BxK))
    weight_BxK = jnp.exp(gamma * log_rest_BxK)
    return -jnp.sum(target_BxK * weight_BxK * log_p_BxK, axis=-1)


def sigmoid_focal(
    logits_BxK: jax.Array,
    target_BxK: jax.Array,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> jax.Array:
    """Returns the binary focal losses of each example, summed over classes, [B].

    Every class is a binary decision of its own, one against the rest.

    Args:
        logits_BxK: Log odds of each class.
        target_BxK: Target share of each class.
        alpha: Weight of positives; negatives have 1 - alpha; below 0 both have 1.
        gamma: How much less well-classified examples count.

    Source: Lin et al. 2017; torchvision.ops.sigmoid_focal_loss.
    """
    loss_BxK = optax.sigmoid_focal_loss(
        logits_BxK, target_BxK, alpha=alpha if alpha >= 0 else None, gamma=gamma
    )
    return loss_BxK.sum(axis=-1)


def mse(prediction_BxT: jax.Array, target_BxT: jax.Array) -> jax.Array:
    """Returns the mean squared error of each example, [B]."""
    return optax.squared_error(prediction_BxT, target_BxT).mean(axis=-1)


def mae(prediction_BxT: jax.Array, target_BxT: jax.Array) -> jax.Array:
    """Returns the mean absolute error of each example, [B]."""
    return jnp.abs(prediction_BxT - target_BxT).mean(axis=-1)


def huber(
    prediction_BxT: jax.Array, target_BxT: jax.Array, *, delta: float = 1.0
) -> jax.Array:
    """Returns the Huber loss of each example, [B].

    Args:
        prediction_BxT: Predictions in the units of the target.
        target_BxT: True values.
        delta: Error at which the loss turns from half the square to linear.
    """
    return optax.huber_loss(prediction_BxT, target_BxT, delta=delta).mean(axis=-1)


def divergence(
    teacher_BxK: jax.Array, logits_BxK: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Returns the divergence from a teacher's predictions, KL(teacher || own) T^2, [B].

    Both are logits, divided by the temperature T before the softmax; T^2 makes the
    gradient as large as at T = 1.

    Source: Hinton et al. 2015, section 2.
    """
    kind = jnp.promote_types(logits_BxK.dtype, jnp.float32)
    own_BxK = jax.nn.log_softmax(logits_BxK.astype(kind) / temperature)
    wanted_BxK = jax.nn.log_softmax(teacher_BxK.astype(kind) / temperature)
    apart_B = jnp.sum(jnp.exp(wanted_BxK) * (wanted_BxK - own_BxK), axis=-1)
    return apart_B * temperature**2


CLASSIFICATION = registry.Choices(
    "classification loss",
    {
        "cross_entropy": cross_entropy,
        "binary_cross_entropy": binary_cross_entropy,
        "focal": focal,
        "sigmoid_focal": sigmoid_focal,
    },
)
REGRESSION = registry.Choices(
    "regression loss", {"mse": mse, "mae": mae, "huber": huber}
)
LOSSES = {"classification": CLASSIFICATION, "regression": REGRESSION}
# Range of an argument, for every loss that has it.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": (lambda value: value <= 1, "at most 1"),
    "gamma": (lambda value: value >= 0, "at least 0"),
    "delta": (lambda value: value > 0, "more than 0"),
}


def is_cross_entropy(
    name: str, smoothing: float, class_weights: Sequence[float] | str
) -> bool:
    """Returns whether a classification loss is the plain cross entropy.

    Args:
        name: Name of the loss.
        smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class; empty or 'none' weighs all by 1.
    """
    return name == "cross_entropy" and not smoothing and class_weights in ("none", ())


def make_loss(
    kind: str, name: str, arguments: Mapping[str, Any]
) -> functools.partial[jax.Array]:
    """Returns the loss that `config.task.loss` and `config.task.loss_args` describe.

    Args:
        kind: A key of `LOSSES`.
        name: Name of the loss.
        arguments: Arguments of the loss by name; the others keep their defaults.

    Raises:
        UserError: No such loss for tasks of this kind, or arguments that do not fit it.
    """
    for other, table in LOSSES.items():
        if name in table and other != kind:
            raise UserError(
                f"config.task.loss: {name!r} is a loss of {other}; {kind} has "
                f"{', '.join(LOSSES[kind])}"
            )
    function = registry.choose(LOSSES[kind], name, "config.task.loss")
    where = "config.task.loss_args"
    if not hasattr(arguments, "keys"):
        raise UserError(f"{where}: {arguments!r} is not a dict of arguments by name")

    @functools.wraps(function)
    def bind(**values: Any) -> functools.partial[jax.Array]:
        return functools.partial(function, **{key: values[key] for key in arguments})

    # The first two parameters are the arrays, which are not in the config.
    arrays = dict.fromkeys(list(inspect.signature(function).parameters)[:2])
    bound = registry.call(bind, dict(arguments), where, **arrays)
    problems = [
        f"{where}.{key}: {value}; {needed} is needed"
        for key, value in bound.keywords.items()
        if key in RANGES
        for is_right, needed in [RANGES[key]]
        if not is_right(value)
    ]
    raise_if(problems, f"{where} does not fit:")
    return bound

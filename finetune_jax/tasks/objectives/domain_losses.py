"""Losses of several domains: weighting, sharing and adaptation.

Features and logits of two domains are [B, F] and [T, F]: numbers of examples may differ.
An example that could not be read has weight 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core.pytrees import named


def uncertainty_weighted(
    loss: jax.Array, log_variance: jax.Array, *, of_classes: bool
) -> jax.Array:
    """Returns the loss of a domain weighted by its trained uncertainty.

    Args:
        loss: Mean over examples: cross entropy for classes, squared error for numbers.
        log_variance: s = log sigma^2.
        of_classes: Whether to use exp(-s) loss + s / 2 instead of exp(-s) loss / 2 + s / 2.

    Source: Kendall et al. 2018, equations 7 and 10, with s for numerical stability as in
    their section 3.2.
    """
    factor = 1.0 if of_classes else 0.5
    return factor * jnp.exp(-log_variance) * loss + log_variance / 2


def pair_distance(models: Sequence[Mapping[str, jax.Array]]) -> jax.Array:
    """Returns sum |a - b|^2 / 2 over pairs of models and the parameters of the same name.

    Parameters of different shapes are not compared.

    Args:
        models: Parameters of each model by name.

    Source: Duong et al. 2015, section 3, for two models.
    """
    total = jnp.zeros(())
    for place, one in enumerate(models):
        for other in models[place + 1 :]:
            for name, leaf in one.items():
                if name in other and other[name].shape == leaf.shape:
                    total += jnp.sum((leaf - other[name]) ** 2) / 2
    return total


@jax.custom_vjp
def reverse_gradient(x: jax.Array, strength: jax.Array) -> jax.Array:
    """Returns x; its gradient is reversed and multiplied by `strength`.

    Source: Ganin et al. 2016, section 4.2, equation 19.
    """
    del strength
    return x


def _reverse_forward(x: jax.Array, strength: jax.Array) -> tuple[jax.Array, Any]:
    return x, strength


def _reverse_backward(strength: Any, cotangent: jax.Array) -> tuple[Any, Any]:
    turned = -jnp.asarray(strength, cotangent.dtype) * cotangent
    return turned, jnp.zeros_like(strength)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


def ramp(progress: jax.Array, gamma: float = 10.0) -> jax.Array:
    """Returns 2 / (1 + exp(-gamma p)) - 1, which grows from 0 to nearly 1.

    Source: Ganin et al. 2016, section 5.2.2.
    """
    return 2 / (1 + jnp.exp(-gamma * progress)) - 1


def discrimination(logit_B: jax.Array, *, is_source: bool) -> jax.Array:
    """Returns the domain classifier's cross entropy [B]; positive logits mean source."""
    target_B = jnp.full_like(logit_B, float(is_source))
    return optax.sigmoid_binary_cross_entropy(logit_B, target_B)


def _shares(weight_B: jax.Array) -> jax.Array:
    return weight_B / jnp.sum(weight_B)


def _squared_distances(one_BxF: jax.Array, other_TxF: jax.Array) -> jax.Array:
    # From differences: from products, distances of close features are lost in rounding.
    return jnp.sum((one_BxF[:, None] - other_TxF[None]) ** 2, axis=-1)


def mmd(
    source_BxF: jax.Array,
    target_TxF: jax.Array,
    weight_B: jax.Array,
    weight_T: jax.Array,
    *,
    scales: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> jax.Array:
    """Returns the squared maximum mean discrepancy of two domains' features.

    The kernel is a sum of Gaussians exp(-d^2 / (scale m)), where m is the mean d^2 of two
    different examples of either domain, without a gradient.

    Args:
        source_BxF: Features of the source.
        target_TxF: Features of the target.
        weight_B: Weights of the source's examples.
        weight_T: Weights of the target's examples.
        scales: Scales of the Gaussians.

    Source: Gretton et al. 2012, equation 5 (the biased estimate); Long et al. 2015,
    section 3.1; the scales are those of their implementation.
    """
    both = jnp.concatenate([source_BxF, target_TxF])
    weight = jnp.concatenate([weight_B, weight_T])
    # The squared difference of means is a quadratic form in these signed weights.
    sides = jnp.concatenate([_shares(weight_B), -_shares(weight_T)])
    distances = _squared_distances(both, both)
    pairs = weight[:, None] * weight[None]
    apart = jnp.sum(pairs) - jnp.sum(weight**2)
    mean = jax.lax.stop_gradient(jnp.sum(pairs * distances) / apart)
    # If all examples are equal, so are the domains.
    mean = jnp.where(mean > 0, mean, 1.0)
    kernel = sum(jnp.exp(-distances / (scale * mean)) for scale in scales)
    return sides @ kernel @ sides


def coral(
    source_BxF: jax.Array,
    target_TxF: jax.Array,
    weight_B: jax.Array,
    weight_T: jax.Array,
) -> jax.Array:
    """Returns |C_s - C_t|^2 / (4 F^2) of the covariances of two domains' features.

    Source: Sun & Saenko 2016, equations 1 to 3.
    """
    difference = _covariance(source_BxF, weight_B) - _covariance(target_TxF, weight_T)
    return jnp.sum(difference**2) / (4 * source_BxF.shape[-1] ** 2)


def _covariance(x_BxF: jax.Array, weight_B: jax.Array) -> jax.Array:
    weight_Bx1, examples = weight_B[:, None], jnp.sum(weight_B)
    mean_1xF = jnp.sum(weight_Bx1 * x_BxF, axis=0, keepdims=True) / examples
    centred_BxF = x_BxF - mean_1xF
    return (weight_Bx1 * centred_BxF).T @ centred_BxF / (examples - 1)


def confident(
    logits_BxK: jax.Array, *, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the cross entropy with confident pseudo-labels [B], and their mask [B].

    The pseudo-label is the most probable class; below the threshold the loss is 0. No
    gradient flows through the choice of the class.

    Source: Lee 2013, with a threshold as in Sohn et al. 2020, equation 4.
    """
    probability_BxK = jax.nn.softmax(jax.lax.stop_gradient(logits_BxK))
    label_B = jnp.argmax(probability_BxK, axis=-1)
    is_certain_B = jnp.max(probability_BxK, axis=-1) >= threshold
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxK, label_B)
    return jnp.where(is_certain_B, loss_B, 0.0), is_certain_B


def over_axis(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the rows of all devices under pmap; jit with shardings has them."""
    if axis_name is None:
        return x
    return jax.lax.all_gather(x, axis_name, tiled=True)


def flat(features: Any) -> jax.Array:
    """Returns a tree of features as one array [B, F]."""
    leaves = [
        leaf.reshape(leaf.shape[0], -1)
        for leaf in named(features).values()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.concatenate(leaves, axis=-1)

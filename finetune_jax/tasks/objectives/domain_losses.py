"""Losses between domains: how several are weighed, and how two are made alike.

Features and logits of two domains are [B, F] and [T, F]: numbers of examples may differ.
Weights say how much each example counts, 0 for one that could not be read.
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
    """Returns the loss of a domain weighed by its uncertainty, which learns.

    Args:
        loss: Mean over examples: of classes a cross entropy, of numbers the mean squared
            error.
        log_variance: s = log sigma^2.
        of_classes: Whether it is exp(-s) loss + s / 2, instead of exp(-s) loss / 2 + s / 2.

    Source: Kendall et al. 2018, equations 7 and 10, with s for numerical stability as in
    their section 3.2.
    """
    factor = 1.0 if of_classes else 0.5
    return factor * jnp.exp(-log_variance) * loss + log_variance / 2


def pair_distance(models: Sequence[Mapping[str, jax.Array]]) -> jax.Array:
    """Returns sum |a - b|^2 / 2 over pairs of models and the parameters of the same name.

    Parameters of other shapes have nothing in common.

    Args:
        models: Parameters of each by name.

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
    """Returns x; its gradient is turned round, and multiplied by `strength`.

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
    """Returns the cross entropy of telling a domain, [B]; positive logits say source."""
    target_B = jnp.full_like(logit_B, float(is_source))
    return optax.sigmoid_binary_cross_entropy(logit_B, target_B)


def _shares(weight_B: jax.Array) -> jax.Array:
    return weight_B / jnp.sum(weight_B)


def _squared_distances(one_BxF: jax.Array, other_TxF: jax.Array) -> jax.Array:
    # Of differences, not of products: those of near features would be lost in rounding.
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

    Its kernel is the sum of Gaussians exp(-d^2 / (scale m)), m being the mean d^2 of two
    different examples of either domain, through which no gradient goes.

    Args:
        source_BxF: Features.
        target_TxF: Features.
        weight_B: Of the source's examples.
        weight_T: Of the target's.
        scales: One Gaussian each.

    Source: Gretton et al. 2012, equation 5 (the biased estimate); Long et al. 2015,
    section 3.1; the scales are those of their implementation.
    """
    both = jnp.concatenate([source_BxF, target_TxF])
    weight = jnp.concatenate([weight_B, weight_T])
    # Their mean difference, squared, is that of the source's shares less the target's.
    sides = jnp.concatenate([_shares(weight_B), -_shares(weight_T)])
    distances = _squared_distances(both, both)
    pairs = weight[:, None] * weight[None]
    apart = jnp.sum(pairs) - jnp.sum(weight**2)
    mean = jax.lax.stop_gradient(jnp.sum(pairs * distances) / apart)
    # Where all examples are the same, so are the domains.
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
    """Returns the cross entropy with the class predicted, where that is certain, [B].

    And whether it is, [B]; where it is not, the loss is 0. No gradient goes through what
    the class is.

    Source: Lee 2013, with a threshold as in Sohn et al. 2020, equation 4.
    """
    probability_BxK = jax.nn.softmax(jax.lax.stop_gradient(logits_BxK))
    label_B = jnp.argmax(probability_BxK, axis=-1)
    is_certain_B = jnp.max(probability_BxK, axis=-1) >= threshold
    loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxK, label_B)
    return jnp.where(is_certain_B, loss_B, 0.0), is_certain_B


def over_axis(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the rows of all devices, where they are not there by themselves."""
    if axis_name is None:
        return x
    return jax.lax.all_gather(x, axis_name, tiled=True)


def flat(features: Any) -> jax.Array:
    """Returns features as [B, F], whatever they are made of."""
    leaves = [
        leaf.reshape(leaf.shape[0], -1)
        for leaf in named(features).values()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.concatenate(leaves, axis=-1)

"""Losses: one value an example, to be weighed and summed by the task."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits_BxK: jax.Array, label_B: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the cross entropy of each example, [B].

    Args:
        logits_BxK: Unnormalised log probabilities.
        label_B: Class indices.
        label_smoothing: Share of the target spread evenly over all classes.
            Source: Szegedy et al. 2016, section 7.
    """
    classes = logits_BxK.shape[-1]
    target_BxK = jax.nn.one_hot(label_B, classes, dtype=logits_BxK.dtype)
    target_BxK = optax.smooth_labels(target_BxK, jnp.asarray(label_smoothing))
    return optax.softmax_cross_entropy(logits_BxK, target_BxK.astype(logits_BxK.dtype))


LOSSES = {"cross_entropy": cross_entropy}

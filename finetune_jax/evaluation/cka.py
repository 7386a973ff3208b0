"""Centred kernel alignment (CKA) between the features of two states."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.models.modes import EVALUATION
from finetune_jax.tasks.task import Task

# Number of features whose products are computed at once: bounds memory; chosen by us.
GRAM_COLUMNS = 2**14


def stage_features(
    params: Any, batch_stats: Any, batch: dict, *, task: Task
) -> dict[str, jax.Array]:
    """Returns the output of every stage in evaluation, [B, F] each."""
    batch = task.prepare(batch, jax.random.key(0), EVALUATION)
    variables, found, x = {"params": params, "batch_stats": batch_stats}, {}, None
    for stage in task.models.stages:
        prefix, _, name = stage.rpartition("/")
        if name == task.models[prefix].stages[0]:
            x = batch["inputs"]
        x, _ = task.models.apply(variables, x, prefix=prefix, first=name, last=name)
        found[stage] = jnp.concatenate(
            [
                leaf.reshape(leaf.shape[0], -1)
                for leaf in jax.tree.leaves(x)
                if jnp.issubdtype(leaf.dtype, jnp.inexact)
            ],
            axis=-1,
        )
    return found


def gram(features_NxF: np.ndarray) -> np.ndarray:
    """Returns the products [N, N] of all pairs of examples, columns centred first.

    It is the double-centred H X X' H, H = I - 1/N, in float64. It is zero if the features
    vary by rounding only.
    """
    examples = len(features_NxF)
    found_NxN, total = np.zeros((examples, examples)), 0.0
    for start in range(0, features_NxF.shape[1], GRAM_COLUMNS):
        part_NxF = features_NxF[:, start : start + GRAM_COLUMNS].astype(np.float64)
        total += np.sum(part_NxF**2)
        part_NxF -= part_NxF.mean(axis=0)
        found_NxN += part_NxF @ part_NxF.T
    rounding = (examples * np.finfo(np.float64).eps) ** 2 * total
    return found_NxN if np.trace(found_NxN) > rounding else np.zeros_like(found_NxN)


def similarity(one_NxN: np.ndarray, other_NxN: np.ndarray) -> float:
    """Returns the linear CKA of two centred Gram matrices, between 0 and 1.

    CKA is undefined for constant features. Here two constant features have similarity
    1.0, a constant and a varying one 0.0.

    Source: Kornblith et al. 2019, section 3.
    """
    norms = np.linalg.norm(one_NxN), np.linalg.norm(other_NxN)
    if not all(norms):
        return float(norms[0] == norms[1])
    # Divided first: products of large features would overflow.
    return float(np.sum((one_NxN / norms[0]) * (other_NxN / norms[1])))

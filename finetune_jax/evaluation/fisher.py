"""Diagonal Fisher information of a model on the examples of a domain."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.pytrees import count, like, named, stage_of, whole
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Dataset
from finetune_jax.evaluation.other_domains import Domain, with_head
from finetune_jax.models.modes import EVALUATION
from finetune_jax.tasks.task import Task

# Values of the gradients of single examples on the device at once, and the most examples:
# bounds of memory, chosen by us.
GRADIENT_VALUES, MOST_GRADIENTS = 2**28, 32


def domain_fisher(
    domain: Domain, start: TrainState, *, examples: int, seed: int
) -> Any:
    """Returns the Fisher information on a domain's training examples, like the parameters.

    It belongs to the model with the domain's head. If that is the pretrained one, the run's
    own head gets zeros.

    Args:
        domain: Domain with training examples.
        start: State before the first update, on the host.
        examples: Largest number of examples.
        seed: Seed of the sampled examples and labels.
    """
    assert domain.train is not None
    head = domain.head_variables(start)
    params, batch_stats = with_head(start.params, start.batch_stats, head)
    found = named(
        fisher_information(
            domain.task, params, batch_stats, domain.train, examples=examples, seed=seed
        )
    )
    if domain.head == "pretrained":
        models = domain.task.models
        found |= {
            name: np.zeros_like(leaf)
            for name, leaf in named(start.params).items()
            if stage_of(name, models.prefixes) in models.heads
        }
    return like(start.params, found)


def fisher_information(
    task: Task,
    params: Any,
    batch_stats: Any,
    dataset: Dataset,
    *,
    examples: int,
    seed: int,
) -> Any:
    """Returns the diagonal of the Fisher information, a tree like the parameters.

    It is the mean over examples of the squared gradient of log p(y | x) in evaluation,
    y drawn from the model's own p(y | x): once for each example, by its place in the
    dataset.

    Args:
        task: Task with outputs 'logits'.
        params: Parameters on the host.
        batch_stats: Batch statistics on the host.
        dataset: Examples, not augmented.
        examples: Number of examples to sample without replacement; at most all are used.
        seed: Seed of the sampled examples and labels.

    Source: Kirkpatrick et al. 2017, equation 3; Martens 2020, section 5 (the labels of
    the data would give the "empirical" one, which is another).
    """
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:examples]
    size = int(np.clip(GRADIENT_VALUES // count(params), 1, MOST_GRADIENTS))
    total = {n: np.zeros(leaf.shape, np.float64) for n, leaf in named(params).items()}
    program = jax.jit(functools.partial(_squared_gradients, task=task, seed=seed))
    on_device = jax.device_put(jax.tree.map(whole, (params, batch_stats)))
    for start in range(0, len(drawn), size):
        places = drawn[start : start + size]
        padded = np.resize(places, size).astype(np.int32)
        batch = dataset.take(padded) | {"position": padded}
        batch["weight"] *= np.arange(size) < len(places)
        sums = named(program(*on_device, batch))
        for name, values in sums.items():
            total[name] += np.asarray(values, np.float64)
    mean = {name: values / len(drawn) for name, values in total.items()}
    return jax.tree.map(
        lambda leaf, values: values.astype(leaf.dtype), params, like(params, mean)
    )


def _squared_gradients(
    params: Any, batch_stats: Any, batch: Mapping, *, task: Task, seed: int
) -> Any:
    """Returns the sum over a batch of each example's squared gradient."""
    batch = task.prepare(dict(batch), jax.random.key(0), EVALUATION)

    def squares(example: dict) -> Any:
        rng = jax.random.fold_in(jax.random.key(seed), example["position"])

        def log_likelihood(params: Any) -> jax.Array:
            alone = jax.tree.map(lambda x: x[None], example)
            variables = {"params": params, "batch_stats": batch_stats}
            logits_K = task.outputs(variables, alone)["logits"][0]
            logits_K = logits_K.astype(jnp.promote_types(logits_K.dtype, jnp.float32))
            drawn = jax.random.categorical(rng, jax.lax.stop_gradient(logits_K))
            return jax.nn.log_softmax(logits_K)[drawn]

        gradient = jax.grad(log_likelihood)(params)
        return jax.tree.map(lambda g: g**2 * example["weight"], gradient)

    return jax.tree.map(lambda x: x.sum(axis=0), jax.vmap(squares)(batch))

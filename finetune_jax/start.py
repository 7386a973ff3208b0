"""The state before the first update: at random, from weights, by schemes."""

import functools

import jax
import jax.numpy as jnp

from finetune_jax.config import Config, seeds
from finetune_jax.data.dataset import Data
from finetune_jax.initialise import initialise, make_rules
from finetune_jax.lsuv import first_examples
from finetune_jax.parallel import run_once
from finetune_jax.pretrained.addresses import Weights, read_weights
from finetune_jax.pretrained.load import load_weights
from finetune_jax.state import TrainState
from finetune_jax.tasks.task import Task


def random_state(
    task: Task,
    seed: int,
    *,
    augmentation: int | None = None,
    dropout: int | None = None,
) -> TrainState:
    """Returns the state of a task before the first update, at random.

    Args:
        task: Has the models.
        seed: Of the parameters.
        augmentation: Seed of what updates draw for images; None is `seed`.
        dropout: Seed of what else they draw; None is `seed`.
    """
    params, batch_stats = task.init(jax.random.split(jax.random.key(seed))[0])
    keys = [
        jax.random.split(jax.random.key(seed if own is None else own))[1]
        for own in (augmentation, dropout)
    ]
    return TrainState.create(params, batch_stats, jnp.stack(keys))


def starting_state(
    task: Task, data: Data, config: Config, *, measure: bool = True
) -> tuple[TrainState, Weights | None]:
    """Returns the state before the first update, on the host, and its weights.

    Args:
        task: Has the models.
        data: Of the run.
        config: Of the run.
        measure: Whether schemes that run the model on examples do so.

    Raises:
        UserError: The weights cannot be read or do not fit, or a scheme fails.
    """
    drawn = seeds(config)
    of_updates = {name: drawn[name] for name in ("augmentation", "dropout")}
    own = run_once(lambda: random_state(task, drawn["init"], **of_updates))
    state, weights, init = own, None, config.init
    if init.pretrained is not None:
        weights = read_weights(init.pretrained)
        variables = load_weights(
            {"params": own.params, "batch_stats": own.batch_stats},
            weights,
            fresh=init.fresh,
            adapt_input=init.input_channels == "adapt",
            stem=task.stages[0],
        )
        state = own.replace(**variables)
    batch = functools.partial(first_examples, data, config)
    state = initialise(
        own,
        state,
        make_rules(init.schemes, init.pretrained),
        task=task,
        spec=data.spec,
        seed=drawn["init"],
        first_batch=batch if measure else None,
    )
    return state, weights

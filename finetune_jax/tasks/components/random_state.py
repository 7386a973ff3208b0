"""Random initial states of a task, and their shapes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.core.machine import uncollected
from finetune_jax.core.train_state import TrainState
from finetune_jax.models.layers.sizes import TooSmall, least_side
from finetune_jax.tasks.task import Task


def random_state(
    task: Task,
    seed: int,
    *,
    augmentation: int | None = None,
    dropout: int | None = None,
) -> TrainState:
    """Returns a random state of a task, before the first update.

    Args:
        task: Has the models.
        seed: Seed of the parameters.
        augmentation: Seed of the image augmentation; None is `seed`.
        dropout: Seed of the other random keys of updates; None is `seed`.
    """
    own = [seed if given is None else given for given in (augmentation, dropout)]
    return _state_of_keys(task, [_key_data(drawn) for drawn in (seed, *own)])


def shapes_of(task: Task, model: str = "the model") -> TrainState:
    """Returns the shapes of a task's states.

    Args:
        task: Has the models.
        model: Name of the model, for messages.

    Raises:
        UserError: Images are too small for a model.
    """
    try:
        with uncollected():
            return jax.eval_shape(lambda: random_state(task, 0))
    except TooSmall as error:
        raise _too_small(task, model, error.stage) from error


def _too_small(task: Task, model: str, stage: str) -> UserError:
    """Returns the error that names the models, the size and the least size."""
    leaves = [leaf.shape for leaf in jax.tree.leaves(task.batch_spec)]
    *_, height, width, channels = min(s for s in leaves if len(s) == 3)
    needed = []
    for prefix, module in task.models.modules.items():
        side = least_side(
            lambda x, module=module: module.init(jax.random.key(0), x, train=False),
            channels,
            min(height, width),
        )
        if side is None or side > min(height, width):
            least = "" if side is None else f" (at least {side}x{side})"
            needed.append(f"{repr(prefix) if prefix else model}{least}")
    return UserError(
        f"config.data.image_size: images of {height}x{width} pixels are too small for "
        f"{' and '.join(needed)}: stage {stage!r} leaves no pixels; set a larger "
        "config.data.image_size, or choose another config.model.name"
    )


def _key_data(seed: int) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed))


def _state_of_keys(task: Task, keys: Sequence[jax.Array]) -> TrainState:
    of_params, *of_updates = (
        jax.random.split(jax.random.wrap_key_data(data)) for data in keys
    )
    params, batch_stats = task.init(of_params[0])
    rng = jnp.stack([key[1] for key in of_updates])
    return TrainState.create(params, batch_stats, rng)

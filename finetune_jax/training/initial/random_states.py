"""A state at random, of which only what is wanted is drawn."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from finetune_jax.core.errors import UserError
from finetune_jax.core.machine import give_back_memory, memory, uncollected
from finetune_jax.core.pytrees import like, named, nbytes
from finetune_jax.core.train_state import TrainState
from finetune_jax.models.layers.initial_values import only_shapes
from finetune_jax.models.layers.sizes import TooSmall, least_side
from finetune_jax.parallel.devices import compiled_for_few
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
        with only_shapes(), uncollected():
            return jax.eval_shape(lambda: random_state(task, 0))
    except TooSmall as error:
        raise _too_small(task, model, error.stage) from error


def _too_small(task: Task, model: str, stage: str) -> UserError:
    """Returns the error that names the models, the size and the least size."""
    leaves = [leaf.shape for leaf in jax.tree.leaves(task.batch_spec)]
    *_, height, width, channels = min(s for s in leaves if len(s) == 3)
    needed = []
    for prefix, module in task.models.items():
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


class RandomStates:
    """What `random_state` returns, on the host; one compiled program for all seeds."""

    def __init__(self, task: Task, shapes: TrainState):
        """Takes the task and what its states look like, and compiles nothing yet."""
        self._task, self._shapes = task, shapes
        self._compiled: dict[tuple[str, ...], Callable] = {}

    def __call__(
        self, seeds: Mapping[str, int], wanted: Callable[[str], bool] | None = None
    ) -> TrainState:
        """Returns the state of the seeds 'init', 'augmentation' and 'dropout'.

        Args:
            seeds: Of all sources of randomness.
            wanted: Says of a leaf such as 'params/head/bias' whether it is drawn; of the
                others there are shapes only. None draws all.
        """
        keys = [_key_data(seeds[name]) for name in ("init", "augmentation", "dropout")]
        shapes = self._shapes
        names = named({"params": shapes.params, "batch_stats": shapes.batch_stats})
        drawn = tuple(name for name in names if wanted is None or wanted(name))
        if drawn not in self._compiled:
            # Not kept: with a function jax keeps all that it has traced of it.
            draw = functools.partial(_leaves_of_keys, self._task, drawn)
            self._compiled[drawn] = compiled_for_few(draw, keys)
        leaves, rest = self._compiled[drawn](keys)
        variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
        return rest.replace(**like(variables, {**named(variables), **leaves}))

    def check_size(self) -> None:
        """Checks that the states can be in this machine's memory.

        Raises:
            UserError: Parameters alone cannot.
        """
        needed, there = nbytes(self._shapes.params), memory()
        if needed > there:
            raise UserError(
                f"config.model: its parameters take {needed / 1e9:,.1f} GB, but this "
                f"machine has {there / 1e9:.1f} GB of memory; choose a smaller model"
            )

    def forget(self) -> None:
        """Frees the programs, which take more memory than some models do."""
        self._compiled.clear()
        give_back_memory()


def _leaves_of_keys(
    task: Task, wanted: Sequence[str], keys: Sequence[jax.Array]
) -> tuple[dict[str, jax.Array], TrainState]:
    """Returns some leaves of a random state by name, and the state without any."""
    state = _state_of_keys(task, keys)
    leaves = named({"params": state.params, "batch_stats": state.batch_stats})
    return {name: leaves[name] for name in wanted}, state.replace(
        params={}, batch_stats={}
    )

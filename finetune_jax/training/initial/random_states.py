"""Random initial states; only the requested parameters are sampled."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax

from finetune_jax.core.errors import UserError
from finetune_jax.core.machine import give_back_memory, memory
from finetune_jax.core.pytrees import like, named, nbytes
from finetune_jax.core.train_state import TrainState
from finetune_jax.parallel.compiling import FOR_FEW, compiled_for_few
from finetune_jax.parallel.devices import Devices
from finetune_jax.tasks.components.random_state import _key_data, _state_of_keys
from finetune_jax.tasks.task import Task


class RandomStates:
    """Samples random initial states, with one program for all seeds."""

    def __init__(self, task: Task, shapes: TrainState, devices: Devices):
        """Takes the task, the shapes of its states, and the devices of the run."""
        self._task, self._shapes, self._devices = task, shapes, devices
        self._compiled: dict[tuple[bool, tuple[str, ...]], Callable] = {}

    def __call__(
        self,
        seeds: Mapping[str, int],
        wanted: Callable[[str], bool] | None = None,
        *,
        on_host: bool = True,
    ) -> TrainState:
        """Returns the state of the seeds 'init', 'augmentation' and 'dropout'.

        Args:
            seeds: Seed of each source of randomness.
            wanted: Whether a leaf, such as 'params/head/bias', is sampled; the others
                are shapes only. None samples all.
            on_host: Whether the state is needed on the host. Otherwise a state that is
                divided over the devices of several processes is sampled there.
        """
        keys = [_key_data(seeds[name]) for name in ("init", "augmentation", "dropout")]
        shapes = self._shapes
        variables = {"params": shapes.params, "batch_stats": shapes.batch_stats}
        names = named(variables)
        drawn = tuple(name for name in names if wanted is None or wanted(name))
        on_host = on_host or not self._devices.divides_state
        if (on_host, drawn) not in self._compiled:
            # A partial of its own: jax keeps all traces of a function that lives.
            draw = functools.partial(_leaves_of_keys, self._task, drawn)
            self._compiled[on_host, drawn] = (
                compiled_for_few(draw, keys)
                if on_host
                else self._devices.jit_at_rest(draw, options=FOR_FEW)
            )
        leaves, rest = self._compiled[on_host, drawn](keys)
        return rest.replace(**like(variables, {**names, **leaves}))

    def check_size(self) -> None:
        """Checks that the parameters fit into this machine's memory.

        Raises:
            UserError: They do not fit.
        """
        needed, there = nbytes(self._shapes.params), memory()
        if needed > there:
            raise UserError(
                f"config.model: its parameters take {needed / 1e9:,.1f} GB, but this "
                f"machine has {there / 1e9:.1f} GB of memory; choose a smaller model"
            )

    def forget(self) -> None:
        """Frees the programs, which take more memory than some models."""
        self._compiled.clear()
        give_back_memory()


def _leaves_of_keys(
    task: Task, wanted: Sequence[str], keys: Sequence[jax.Array]
) -> tuple[dict[str, jax.Array], TrainState]:
    """Returns some leaves of a random state by name, and the state without leaves."""
    state = _state_of_keys(task, keys)
    leaves = named({"params": state.params, "batch_stats": state.batch_stats})
    return {name: leaves[name] for name in wanted}, state.replace(
        params={}, batch_stats={}
    )

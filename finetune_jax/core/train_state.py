"""State of a run that updates read and write."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from finetune_jax.core.pytrees import like, named


class TrainState(flax.struct.PyTreeNode):
    """State that an update reads and writes; donated to it.

    Attributes:
        step: Updates made so far, int32.
        params: Parameters by stage.
        batch_stats: Running averages of BatchNorm by stage; empty where there is none.
        opt_state: State of the phase's optimizer.
        rng: Data of two keys, of augmentation and of all else that updates draw; never
            changed, draws fold `step` into them.
        ema: Averaged weights by name, of parameters trained in any phase; may be empty.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: Any
    ema: Any

    @classmethod
    def create(cls, params: Any, batch_stats: Any, rng: Any) -> "TrainState":
        """Returns the state before the first update; the phase adds its optimizer's."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state={},
            rng=jax.random.key_data(rng),
            ema={},
        )


def averaged(state: TrainState, decay: float | None) -> Any:
    """Returns the averaged weights after an update; `state` has the new parameters.

    The decay is at most (1 + s) / (10 + s) at step s, so that the random start is soon
    forgotten. Source: tf.train.ExponentialMovingAverage.
    """
    if decay is None:
        return state.ema
    leaves = named(state.params)

    def moved(name, mean):
        leaf = leaves[name]
        step = state.step.astype(leaf.dtype)
        share = 1 - jnp.minimum(decay, (1 + step) / (10 + step)).astype(leaf.dtype)
        # A leaf that has not moved keeps its bits.
        return jnp.where(mean == leaf, leaf, mean + share * (leaf - mean))

    return {name: moved(name, mean) for name, mean in state.ema.items()}


def eval_params(state: TrainState, *, ema: bool = False) -> Any:
    """Returns the parameters that evaluation, the best checkpoint and exports use.

    Those of a schedule-free optimizer are an average that its state implies.

    Args:
        state: On the host or placed.
        ema: Whether to return the averaged weights instead.
    """
    if ema:
        return like(state.params, named(state.params) | state.ema)
    leaves = named(state.params)
    for node in jax.tree.leaves(state.opt_state, is_leaf=_is_schedule_free):
        if _is_schedule_free(node):
            for name, z in node.z.items():
                y = leaves[name]
                # Under pmap every leaf has a leading axis, and b1 only that.
                b1 = jnp.reshape(
                    node.b1, (*node.b1.shape, *[1] * (y.ndim - node.b1.ndim))
                )
                leaves[name] = (y - (1 - b1) * z) / b1
    return like(state.params, leaves)


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, optax.contrib.ScheduleFreeState)

"""One update and one evaluation: pure functions of (state, fixed, batch)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.state import TrainState
from finetune_jax.tasks.task import EVALUATION, Mode, Task


def train_step(
    state: TrainState,
    fixed: Any,
    batch: dict,
    learning_rate: jax.Array,
    progress: jax.Array,
    *,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    trained: Any,
    mode: Mode,
) -> tuple[TrainState, dict]:
    """Returns the state after one update and the metrics of the *old* parameters.

    The k micro-batches are unrolled. Their gradients are weighed by the weight of the
    whole update, over micro-batches and devices, so that the result is that of one batch.

    Args:
        state: Donated.
        fixed: Arrays that the loss reads and nobody updates.
        batch: Arrays [k, b, ...]: k micro-batches of b examples.
        learning_rate: Of this update.
        progress: Share of the phase that is over, in [0, 1).
        task: Has the loss.
        optimizer: Of the phase, from `make_optimizer`.
        trained: Tree of bools shaped like the parameters.
        mode: How the stages run.
    """
    gradients, weights, sums, batch_stats = _micro_gradients(
        state, fixed, batch, progress, task=task, trained=trained, mode=mode
    )

    def over_devices(tree):
        return jax.lax.psum(tree, mode.axis_name) if mode.axis_name else tree

    share = len(gradients) / over_devices(sum(weights))
    opt_state, total, updates = state.opt_state, None, None
    for gradient in gradients:
        # Only what learns is scaled and summed: the rest are zeros that nobody reads.
        gradient = jax.tree.map(
            lambda g, t: over_devices(g) * share if t else g, gradient, trained
        )
        updates, opt_state = optimizer.update(
            gradient, opt_state, state.params, learning_rate=learning_rate
        )
        part = [
            g for g, t in zip(jax.tree.leaves(gradient), jax.tree.leaves(trained)) if t
        ]
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    # Frozen leaves are not added to, not even zero: that could change their bits.
    params = jax.tree.map(
        lambda p, u, t: p + u if t else p, state.params, updates, trained
    )
    metrics = {
        name: over_devices(sum(s[name][0] for s in sums))
        / over_devices(sum(s[name][1] for s in sums))
        for name in sums[0]
    }
    metrics["grad_norm"] = optax.tree.norm(total) / len(gradients)
    state = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, metrics


def _micro_gradients(
    state: TrainState, fixed: Any, batch: dict, progress: jax.Array, *,
    task: Task, trained: Any, mode: Mode,
) -> tuple[list, list, list, Any]:  # fmt: skip
    """Returns (gradients of the totals, weights, metrics, batch statistics after).

    The lists have an entry a micro-batch; nothing is summed over devices yet.
    """
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    augment_rng, loss_rng = jax.random.split(rng)
    if mode.axis_name:
        loss_rng = jax.random.fold_in(loss_rng, jax.lax.axis_index(mode.axis_name))

    def objective(params, batch_stats, micro, rng):
        # Freezing in the loss, not in the gradient, lets XLA drop the backward pass.
        params = jax.tree.map(
            lambda p, t: p if t else jax.lax.stop_gradient(p), params, trained
        )
        (total, weight), (batch_stats, metrics) = task.loss(
            params, batch_stats, fixed, micro, rng=rng, progress=progress, mode=mode
        )
        return total, (weight, batch_stats, metrics)

    gradients, weights, sums = [], [], []
    batch_stats = state.batch_stats
    for index in range(jax.tree.leaves(batch)[0].shape[0]):
        micro = jax.tree.map(lambda array, i=index: array[i], batch)
        micro = task.prepare(micro, augment_rng, mode)
        gradient, (weight, batch_stats, metrics) = jax.grad(objective, has_aux=True)(
            state.params, batch_stats, micro, jax.random.fold_in(loss_rng, index)
        )
        gradients.append(gradient)
        weights.append(weight)
        sums.append(metrics)
    return gradients, weights, sums, batch_stats


def eval_step(
    params: Any, batch_stats: Any, fixed: Any, batch: dict, *, task: Task
) -> dict:
    """Returns the task's outputs for one batch, a row an example.

    Args:
        params: From `eval_params`.
        batch_stats: Running averages.
        fixed: Arrays that the task reads and nobody updates.
        batch: Arrays [b, ...].
        task: Has the outputs.
    """
    batch = task.prepare(batch, jax.random.key(0), EVALUATION)
    return task.outputs(params, batch_stats, fixed, batch)

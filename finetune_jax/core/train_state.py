"""What a run carries from update to update, on the device and beside it."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from finetune_jax.core.pytrees import like, named


class TrainState(flax.struct.PyTreeNode):
    """What an update reads and writes; donated to it.

    Attributes:
        step: Updates made so far, int32.
        params: Parameters by stage.
        batch_stats: Running averages of BatchNorm by stage; empty where there is none.
        opt_state: Of the optimizer of the phase.
        rng: Data of two keys, of augmentation and of all else that updates draw; never
            changed, draws fold `step` into them.
        ema: Averaged weights by name, of what learns in any phase; empty without them.
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
        # What has not moved keeps its bits.
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


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: what a checkpoint's metadata says besides the arrays.

    Attributes:
        phase: Index of the phase that the run is in; -1 before the first.
        ends: Where the phases before it ended.
        frozen_sha256: Digest of what each phase began so far keeps frozen, by name.
        best: Value of the metric that chooses the best checkpoint, if any yet.
        best_step: Its step.
        best_loss: Loss at that step, which decides ties of the metric.
        plateau_best: Best value of the phase's plateau metric.
        plateau_bad: Evaluations since without improvement.
        plateau_best_step: The step of that value.
        plateau_best_loss: Loss at that step.
        rate_best: Best value of the metric of the phase's 'plateau' schedule.
        rate_bad: Evaluations since without improvement.
        rate_drops: How often that schedule has lowered the rate.
        nonfinite: Updates so far that were not finite.
        anchor: Step of the last checkpoint that was due, to which a rollback goes.
        log_lines: Lines of `metrics.jsonl` up to this step.
    """

    phase: int = -1
    ends: list[int] = dataclasses.field(default_factory=list)
    frozen_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    plateau_best: float | None = None
    plateau_bad: int = 0
    plateau_best_step: int | None = None
    plateau_best_loss: float | None = None
    rate_best: float | None = None
    rate_bad: int = 0
    rate_drops: int = 0
    nonfinite: int = 0
    anchor: int = 0
    log_lines: int = 0

    def enter(self, phase: int) -> None:
        """Notes that a phase begins, whose plateaus know nothing yet."""
        self.phase = phase
        self.plateau_best, self.plateau_bad = None, 0
        self.plateau_best_step = self.plateau_best_loss = None
        self.rate_best, self.rate_bad, self.rate_drops = None, 0, 0

    def phase_is_over(self) -> bool:
        """Returns whether the phase has ended, so that the next one is to be entered."""
        return len(self.ends) > self.phase

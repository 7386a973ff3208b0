"""What a run carries from update to update, on the device and beside it."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


class TrainState(flax.struct.PyTreeNode):
    """What an update reads and writes; donated to it.

    Attributes:
        step: Updates made so far, int32.
        params: Parameters by stage.
        batch_stats: Running averages of BatchNorm by stage; empty where there is none.
        opt_state: Of the optimizer of the phase.
        rng: Key data of the run's key, never changed; draws fold `step` into it.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    rng: Any

    @classmethod
    def create(cls, params: Any, batch_stats: Any, rng: Any) -> "TrainState":
        """Returns the state before the first update; the phase adds its optimizer's."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state={},
            rng=jax.random.key_data(rng),
        )


def eval_params(state: TrainState) -> Any:
    """Returns the parameters that evaluation, the best checkpoint and exports use."""
    return state.params


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: what a checkpoint's metadata says besides the arrays.

    Attributes:
        phase: Index of the phase that the run is in; -1 before the first.
        ends: Where the phases before it ended.
        frozen_sha256: Digest of what each phase began so far keeps frozen, by name.
        best: Value of the metric that chooses the best checkpoint, if any yet.
        best_step: Its step.
        plateau_best: Best value of the phase's plateau metric.
        plateau_bad: Evaluations since without improvement.
        log_lines: Lines of `metrics.jsonl` up to this step.
    """

    phase: int = -1
    ends: list[int] = dataclasses.field(default_factory=list)
    frozen_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    plateau_best: float | None = None
    plateau_bad: int = 0
    log_lines: int = 0

    def phase_is_over(self) -> bool:
        """Returns whether the phase has ended, so that the next one is to be entered."""
        return len(self.ends) > self.phase

"""Progress of a run: what a checkpoint's metadata says, and where its seconds go."""

import dataclasses
from typing import Any

from finetune_jax.parallel.compiling import Cost


@dataclasses.dataclass(kw_only=True)
class Clock:
    """Seconds and updates of this attempt at a run.

    Attributes:
        compile_s: Tracing and compiling.
        train_s: Updates, without compiling and evaluation.
        wait_s: The part of `train_s` in which the device waited for data.
        updates: Updates made.
        examples: Examples that they took.
        cached_phases: Names of the phases whose updates read cached features.
        flops: Floating-point operations of the updates; None if unknown.
        memory_bytes: Most bytes that an update needs on one device; 0 if unknown.
    """

    compile_s: float = 0.0
    train_s: float = 0.0
    wait_s: float = 0.0
    updates: int = 0
    examples: int = 0
    cached_phases: list[str] = dataclasses.field(default_factory=list)
    flops: float | None = 0.0
    memory_bytes: int = 0

    def add_cost(self, cost: Cost | None, updates: int) -> None:
        """Adds the cost of some updates, each of which costs the same.

        Args:
            cost: Cost of an update; None if it is unknown.
            updates: Number of updates.
        """
        if cost is None or self.flops is None:
            self.flops = None
        else:
            self.flops += cost.flops * updates
            self.memory_bytes = max(self.memory_bytes, cost.memory_bytes)

    def since(self, then: "Clock") -> dict[str, float]:
        """Returns the time metrics of the updates since an earlier reading."""
        updates = max(self.updates - then.updates, 1)
        seconds = max(self.train_s - then.train_s, 1e-9)
        return {
            "time/step_s": seconds / updates,
            "time/data_wait": (self.wait_s - then.wait_s) / seconds,
        }


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Progress of a run, as saved in the metadata of a checkpoint.

    Attributes:
        phase: Index of the current phase; -1 before the first.
        ends: Last step of each finished phase.
        frozen_sha256: Digest of the frozen values of each phase begun so far, by name.
        best: Best value of the metric that chooses the best checkpoint; None before the
            first measurement.
        best_step: Step of the best value.
        best_loss: Loss at that step, which decides ties of the metric.
        plateau_best: Best value of the phase's plateau metric.
        plateau_bad: Evaluations since without improvement.
        plateau_best_step: The step of that value.
        plateau_best_loss: Loss at that step.
        rate_best: Best value of the metric of the phase's 'plateau' schedule.
        rate_bad: Evaluations since without improvement.
        rate_drops: Number of times that this schedule has lowered the rate.
        nonfinite: Number of updates so far that were not finite.
        anchor: Step of the last checkpoint that was due; a rollback restores it.
        log_lines: Lines of `metrics.jsonl` up to this step.
        refit: Set if the state was fitted to the validation split, too: a digest of this
            split, 'validation', and its 'metrics' before that.
        flops: Operations of all updates up to this step; None if unknown.
        memory_bytes: Most bytes that an update needed on one device; 0 if unknown.
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
    refit: dict[str, Any] | None = None
    flops: float | None = 0.0
    memory_bytes: int = 0

    def count(self, clock: Clock, before: Clock) -> None:
        """Adds the costs of the updates between two readings of a clock.

        Args:
            clock: The clock now.
            before: The same clock at the last checkpoint.
        """
        so_far, now, then = self.flops, clock.flops, before.flops
        if so_far is None or now is None or then is None:
            self.flops = None
        else:
            self.flops = so_far + now - then
        self.memory_bytes = max(self.memory_bytes, clock.memory_bytes)

    def enter(self, phase: int) -> None:
        """Notes that a phase begins, with plateaus that have seen nothing yet."""
        self.phase = phase
        self.plateau_best, self.plateau_bad = None, 0
        self.plateau_best_step = self.plateau_best_loss = None
        self.rate_best, self.rate_bad, self.rate_drops = None, 0, 0

    def phase_is_over(self) -> bool:
        """Returns whether the current phase has ended."""
        return len(self.ends) > self.phase

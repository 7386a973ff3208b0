"""Progress of a run: what a checkpoint's metadata says, and where its seconds go."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Clock:
    """Seconds of this attempt, and what they went into.

    Attributes:
        compile_s: Tracing and compiling.
        train_s: Updates, without compiling and evaluation.
        wait_s: The part of `train_s` in which the device waited for data.
        updates: Updates made.
    """

    compile_s: float = 0.0
    train_s: float = 0.0
    wait_s: float = 0.0
    updates: int = 0

    def since(self, then: "Clock") -> dict[str, float]:
        """Returns the metrics of the updates since an earlier reading."""
        updates = max(self.updates - then.updates, 1)
        seconds = max(self.train_s - then.train_s, 1e-9)
        return {
            "time/step_s": seconds / updates,
            "time/data_wait": (self.wait_s - then.wait_s) / seconds,
        }


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

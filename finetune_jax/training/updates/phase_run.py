"""The updates of one phase, a call of the compiled program after the other."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from finetune_jax.core.train_state import TrainState
from finetune_jax.parallel import watch
from finetune_jax.training.phases import PhaseSetup
from finetune_jax.training.preemption import Stop
from finetune_jax.training.updates.dispatch import Feed
from finetune_jax.training.updates.programs import Updates
from finetune_jax.training.updates.update_log import CallMetrics, UpdateLog


@dataclasses.dataclass(kw_only=True)
class PhaseRun:
    """The updates of a phase.

    Attributes:
        phase: The phase.
        first: First update of the phase.
        end: Update after the last one.
        batch_size: Examples in one update.
        step: Step of the current state.
        rates: Learning rate of each update, before a plateau lowers it.
        feed: Feed of examples.
        updates: Makes the programs.
        stop: Whether the run was asked to stop.
        update_log: Log of the updates' metrics.
        roll_back: Returns the placed state to continue from after an update that is not
            finite, with the step that it takes.
    """

    phase: PhaseSetup
    first: int
    end: int
    batch_size: int
    step: int
    rates: Sequence[float] | np.ndarray
    feed: Feed
    updates: Updates
    stop: Stop
    update_log: UpdateLog
    roll_back: Callable[[int], TrainState]

    def call(self, placed: TrainState, stop: int, *, rate_scale: float) -> TrainState:
        """Returns the placed state after one call, and logs the call before it.

        Args:
            placed: Placed state of step `step`; donated.
            stop: Step that the call must not pass.
            rate_scale: Factor of the learning rates.
        """
        begin, length = time.perf_counter(), self.end - self.first
        start, stop = self.step - self.first, stop - self.first
        rates = (np.asarray(self.rates[start:stop]) * rate_scale).astype(np.float32)
        progress = (np.arange(start, stop) / length).astype(np.float32)
        watch.begins(f"reading the examples of update {self.step + 1}")
        call = self.feed.call(rates, progress)
        waited = time.perf_counter() - begin
        watch.begins("compiling", watch.LONG)
        program, compile_s, cost = self.updates.program(
            self.phase, self.feed, placed, call
        )
        self.stop.at_risk = True
        rest = self.updates.fixed, *call.arguments
        watch.begins(f"update {self.step + call.updates}", watch.WAITING)
        placed, metrics = program(placed, *rest)
        if self.update_log.read():
            with watch.doing("going back to a checkpoint", watch.LONG):
                before = self.roll_back(self.step)
            placed, metrics = program(before, *rest)
        self.update_log.add(
            CallMetrics(
                step=self.step,
                updates=call.updates,
                phase=self.phase.phase.name,
                metrics=metrics,
                rates=rates,
                fixed=self.first if self.phase.phase.fixed_batch else None,
                batch=call.batch,
            )
        )
        took = time.perf_counter() - begin - compile_s
        if not compile_s:
            self.feed.took(took)
        clock = self.update_log.clock
        clock.updates += call.updates
        clock.add_cost(cost, call.updates)
        clock.examples += call.updates * self.batch_size
        clock.compile_s += compile_s
        clock.wait_s += waited
        clock.train_s += took
        self.step += call.updates
        return placed

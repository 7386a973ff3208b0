"""The loop over phases and updates: train, measure, save, in an order that is fixed."""

import dataclasses
import functools
import math
import time
from typing import Any

import numpy as np

from finetune_jax.core.errors import TrainingError
from finetune_jax.core.pytrees import digest, like, named
from finetune_jax.core.train_state import TrainState, eval_params
from finetune_jax.data.batches import BatchSource, Views, shortened
from finetune_jax.evaluation.evaluator import EvaluatedState, Evaluator
from finetune_jax.features.cache import (
    FrozenPrefix,
    TeacherOutputs,
    Teachers,
    frozen_prefix,
)
from finetune_jax.optim.optimizer import carried
from finetune_jax.parallel import watch
from finetune_jax.parallel.executor import LONGEST
from finetune_jax.plans.phase import carried_cohorts, optimizer_state_moves, phase_at
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import PhaseLine, Terminal
from finetune_jax.tasks.objectives.metrics import loss_beside, replaces
from finetune_jax.training import plateau
from finetune_jax.training.checkpoints.held import AnyCheckpoints
from finetune_jax.training.phases import PhaseSetup
from finetune_jax.training.preemption import Stop
from finetune_jax.training.progress import Clock, Progress
from finetune_jax.training.setup import Setup, refits
from finetune_jax.training.updates.nonfinite import Guard
from finetune_jax.training.updates.phase_run import PhaseRun
from finetune_jax.training.updates.probe_run import ProbeRun
from finetune_jax.training.updates.programs import Updates
from finetune_jax.training.updates.update_log import UpdateLog


class Preempted(Exception):
    """The run was asked to stop, and has saved its state."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """A run in progress.

    Attributes:
        setup: Setup of the run.
        evaluator: Measures states.
        checkpoints: Saved states.
        log: Log of the metrics.
        terminal: Terminal that a person reads.
        guard: Handles updates that are not finite.
        progress: Progress of the run.
        stop: Whether the run was asked to stop.
        updates: Makes updates.
        state: State to start from, on the host; None once the loop runs.
        clock: Clock of the run.
        measured: Latest value of each metric.
    """

    setup: Setup
    evaluator: Evaluator
    checkpoints: AnyCheckpoints
    log: MetricsLog
    terminal: Terminal
    guard: Guard
    progress: Progress
    stop: Stop
    updates: Updates
    state: TrainState | None
    clock: Clock = dataclasses.field(default_factory=Clock)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    _counted: Clock = dataclasses.field(default_factory=Clock)

    # The order of what happens at step s is part of the contract. Update s is made; its
    # metrics are read one update late, so that the device never waits; then the state is
    # evaluated, which may end the phase; then it is saved. A checkpoint thus knows all
    # that was logged up to its step, and a resumed run repeats nothing. Before update 0
    # the state is evaluated and saved too.
    def run(self) -> TrainState:
        """Returns the state after the last phase, on the host.

        Raises:
            TrainingError: An update is not finite, or a frozen value has changed.
            Preempted: The run was asked to stop, and has saved its state.
        """
        # No frame keeps a second reference: one copy in memory is enough.
        assert self.state is not None
        states, self.state = [self.state], None
        if not self.checkpoints.steps():
            self._measure_start(states[0])
        begin = self.progress.phase + self.progress.phase_is_over()
        for index in range(begin, len(self.setup.plan)):
            phase = self.setup.phase(index)
            if self.progress.phase_is_over():
                states.append(self._enter(states.pop(), index, phase))
            states.append(self._train(states, phase))
        return states.pop()

    def _measure_start(self, state: TrainState) -> None:
        """Measures and saves the state before update 0."""
        prefix = frozen_prefix(self.setup.task, state, self.setup.phase(0).mode)
        placed = self.setup.devices.place(state)
        splits = tuple(self.setup.data.held_out)
        self._measure(placed, prefix, self.setup.plan[0].name, 0, splits)
        self._save(state)

    def _enter(self, state: TrainState, index: int, phase: PhaseSetup) -> TrainState:
        """Returns the first state of a phase, and notes that the phase has begun."""
        setup, progress = self.setup, self.progress
        if index:
            moves = optimizer_state_moves(setup.plan, index, setup.names)
            counts = ", ".join(f"{key} {len(names)}" for key, names in moves.items())
            self.terminal.say(f"phase {phase.phase.name!r}: optimizer state {counts}")
        state = self._first_state(state, index, phase)
        progress.enter(index)
        progress.frozen_sha256[phase.phase.name] = digest(phase.frozen(state))
        return state

    def _first_state(
        self, state: TrainState, index: int, phase: PhaseSetup
    ) -> TrainState:
        """Returns the last state of a phase as the first one of phase `index`."""
        plan, names = self.setup.plan, self.setup.names
        carries = phase.phase.optimizer_state == "carry"
        moves = optimizer_state_moves(plan, index, names) if index else {}
        # Without the state of a schedule-free optimizer, its iterate means nothing.
        evaluated, leaves = named(eval_params(state)), named(state.params)
        dropped = moves.get("dropped", ()) if carries else leaves
        params = leaves | {name: evaluated[name] for name in dropped}
        state = state.replace(params=like(state.params, params))
        opt_state = self.updates.optimizer_state(phase, state.params)
        if carries:
            cohorts = carried_cohorts(plan, index, names)
            opt_state = carried(state.opt_state, opt_state, cohorts)
        return state.replace(opt_state=opt_state)

    def _train(self, states: list[TrainState], phase: PhaseSetup) -> TrainState:
        """Returns the last state of a phase, on the host.

        Args:
            states: The state to continue from, which is taken out of the list.
            phase: The phase, entered before.
        """
        state = states.pop()
        start = int(state.step)
        self._stop_if_pruned(start)
        _, first, end = phase_at(self.setup.plan, self.progress.ends, start)
        self.terminal.begin_phase(self._phase_line(end), start)
        prefix = frozen_prefix(self.setup.task, state, phase.mode)
        updates = self._updates(phase, prefix, state, first, end)
        # A second copy would take as much of a CPU's memory as the model.
        placed = self.setup.devices.place(state, own=True)
        del state
        lowered = phase.compiled.plateau
        while True:
            scale = lowered.scale(self.progress.rate_drops) if lowered else 1.0
            stop = self._next_stop(updates.step, end)
            placed = updates.call(placed, stop, rate_scale=scale)
            self.terminal.advance(
                updates.step,
                self._update_log.latest,
                train_s=self.clock.train_s,
                compile_s=self.clock.compile_s,
            )
            start = updates.step
            stopped = self.stop.agreed(is_last=updates.step == end)
            if stopped or self._is_due(updates.step, end):
                placed, last = self._pause(placed, prefix, updates)
                if stopped:
                    raise Preempted(f"stopped and saved at step {start}")
                if last is not None:
                    self.terminal.end_phase()
                    return last
                self._stop_if_pruned(start)

    def _stop_if_pruned(self, step: int) -> None:
        """Ends a run, of which updates are left, if its measured values are too bad.

        A resumed run asks again where it begins: a kill may have come before the answer.
        """
        if self.stop.is_pruned():
            raise Preempted(f"pruned and saved at step {step}")

    def _phase_line(self, end: int) -> PhaseLine:
        """Returns the place of the current phase, which ends at step `end`, in the run."""
        plan, index = self.setup.plan, self.progress.phase
        return PhaseLine(
            name=plan[index].name,
            index=index,
            phases=len(plan),
            end=end,
            total=end
            + sum(math.floor(later.steps or 0) for later in plan[index + 1 :]),
            steps_per_epoch=self._steps_per_epoch,
            batch_size=self.setup.config.data.batch_size,
        )

    @property
    def _steps_per_epoch(self) -> float:
        """Updates in which every training example is seen once."""
        return len(self.setup.data.train) / self.setup.config.data.batch_size

    def _updates(
        self,
        phase: PhaseSetup,
        prefix: FrozenPrefix | None,
        state: TrainState,
        first: int,
        end: int,
    ) -> PhaseRun | ProbeRun:
        """Returns the updates of a phase that continues from a state on the host."""
        start = int(state.step)
        if phase.compiled.probe is not None:
            assert prefix is not None
            return ProbeRun(
                setup=self.setup,
                phase=phase,
                options=phase.compiled.probe,
                refits=refits(self.setup, phase),
                prefix=prefix,
                evaluator=self.evaluator,
                step=start,
                end=end,
                clock=self.clock,
                log=self.log,
                say=self.terminal.say,
                note_refit=self._note_refit,
            )
        with self.terminal.working("computing outputs of frozen stages"):
            examples = self._examples(phase, prefix, state, end - start)
        return PhaseRun(
            phase=phase,
            first=first,
            end=end,
            batch_size=self.setup.config.data.batch_size,
            step=start,
            rates=phase.compiled.learning_rates(),
            feed=self.updates.feed(phase, examples, state, first, end),
            updates=self.updates,
            stop=self.stop,
            update_log=self._update_log,
            roll_back=functools.partial(self._rolled_back, phase),
        )

    def _note_refit(self, refit: dict[str, Any]) -> None:
        self.progress.refit = refit

    def _next_stop(self, step: int, end: int) -> int:
        """Returns the step before which nothing has to be measured or saved."""
        every = [self._evaluation_every, self.setup.config.checkpoint.every_steps]
        due = [(step // n + 1) * n for n in every if n]
        return min(end, step + LONGEST, *due)

    def _is_due(self, step: int, end: int) -> bool:
        """Returns whether the state of a step has to be measured or saved."""
        every = self._evaluation_every, self.setup.config.checkpoint.every_steps
        is_multiple = any(n and step % n == 0 for n in every)
        return step == end or is_multiple

    def _examples(
        self,
        phase: PhaseSetup,
        prefix: FrozenPrefix | None,
        state: TrainState,
        updates: int,
    ) -> BatchSource:
        """Returns the training split, with cached features where they replace inputs."""
        data, batch_size = self.setup.data, self.setup.config.data.batch_size
        store, is_taught = self.evaluator.store, self.setup.task.teachers is not None
        features = teachers = None
        if store is not None:
            cached = functools.partial(
                store.training,
                data.train,
                spec=data.spec,
                mode=phase.mode,
                views=self.setup.views,
                batch_size=batch_size // phase.phase.accumulate_steps,
                examples=(1 if phase.phase.fixed_batch else updates) * batch_size,
            )
            if is_taught:
                fixed = self.setup.devices.to_host(self.updates.fixed["task"])
                teachers = cached(Teachers(fixed=fixed, rng=state.rng))
            # Teachers see inputs, which features do not contain.
            if prefix is not None and is_taught == (teachers is not None):
                features = cached(prefix)
        if features is not None:
            self.clock.cached_phases.append(phase.phase.name)
        examples = features or self._uncached(prefix)
        if teachers is None:
            return examples
        return TeacherOutputs(examples=examples, outputs=teachers)

    def _uncached(self, prefix: FrozenPrefix | None) -> BatchSource:
        """Returns the training split without cached features."""
        data = self.setup.data
        if self.setup.views:
            return Views(dataset=data.train, views=self.setup.views)
        # Inputs of a frozen prefix have full length, as for the cache.
        return shortened(data.train) if prefix is None else data.train

    @functools.cached_property
    def _update_log(self) -> UpdateLog:
        return UpdateLog(
            log=self.log,
            every=self.setup.config.report.every_steps,
            clock=self.clock,
            refuse=lambda record: self.guard.refuse(record, self.progress),
        )

    def _rolled_back(self, phase: PhaseSetup, step: int) -> TrainState:
        """Returns the placed state of the last due checkpoint, renumbered as `step`."""
        progress = self.checkpoints.progress(self.progress.anchor)
        target = self.setup.target(progress)
        state = self.checkpoints.restore(self.progress.anchor, target)
        if progress.phase < self.progress.phase:
            state = self._first_state(state, self.progress.phase, phase)
        return self.setup.devices.place(state.replace(step=np.int32(step)))

    def _pause(
        self,
        placed: TrainState,
        prefix: FrozenPrefix | None,
        updates: PhaseRun | ProbeRun,
    ) -> tuple[TrainState, TrainState | None]:
        """Measures and saves a state, as is due.

        Args:
            placed: Placed state.
            prefix: Frozen prefix of the phase.
            updates: Updates of the phase.

        Returns:
            The placed state to continue with, and the state on the host if the phase is
            over, else None.
        """
        config, data, phase = self.setup.config, self.setup.data, updates.phase
        step, often = updates.step, self._evaluation_every
        watch.begins(f"measuring and saving at step {step}", watch.LONG)
        every = config.checkpoint.every_steps
        over, due = step == updates.end, bool(often) and step % often == 0
        begin = time.perf_counter()
        if self._update_log.read():
            placed = self._rolled_back(phase, step)
        self.clock.train_s += time.perf_counter() - begin
        name, restores = phase.phase.name, phase.phase.plateau_restore
        before = dataclasses.replace(self.progress)
        # If the phase's best state is to be restored, the other splits wait for it.
        all_splits = over and not restores
        if over or due:
            splits = tuple(data.held_out) if all_splits else ("validation",)
            self._measure(placed, prefix, name, step, splits)
            plateau.lower_rate(phase.compiled, self.progress, self.measured)
            ends = plateau.is_reached(phase.phase, self.progress, self.measured, step)
            over = ends or over
        state = self.setup.devices.at_rest(placed)
        if over:
            if restores and self.progress.plateau_best_step not in (None, step):
                state = self._best_of_phase(state)
                placed = self.setup.devices.place(state)
                if self.progress.best_step == step:  # The replaced state was the best.
                    self._set_best(before.best, before.best_step, before.best_loss)
            if not all_splits:
                self._measure(placed, prefix, name, step, ("test",))
            self._check_frozen(state, phase)
            self.progress.ends.append(step)
        self._save(state, due=over or due or bool(every and step % every == 0))
        return placed, state if over else None

    @property
    def _evaluation_every(self) -> int | None:
        """Steps between two evaluations within a phase; None if there are none."""
        config = self.setup.config
        if config.evaluate.every_epochs:
            examples = config.evaluate.every_epochs * len(self.setup.data.train)
            return math.ceil(examples / config.data.batch_size)
        return config.evaluate.every_steps

    def _measure(
        self,
        placed: TrainState,
        prefix: FrozenPrefix | None,
        phase: str,
        step: int,
        splits: tuple[str, ...],
    ) -> None:
        """Measures a state, logs the metrics, and notes whether it is the best."""
        held_out = self.setup.data.held_out
        wanted = {split: held_out[split] for split in splits if split in held_out}
        state = EvaluatedState(
            evaluator=self.evaluator,
            placed=placed,
            prefix=prefix,
            refit=self.progress.refit,
        )
        with self.terminal.working("measuring"):
            found = state.measure(wanted)
        if not found:
            return
        self.measured |= found
        epoch = step / self._steps_per_epoch
        self.terminal.metrics(step, phase, found, epoch=epoch)
        self.log.write({"step": step, "phase": phase, **found})
        name = self.setup.config.evaluate.best
        if name not in found:
            return
        value, loss = found[name], found.get(loss_beside(name))
        if replaces(name, value, self.progress.best, loss, self.progress.best_loss):
            self._set_best(value, step, loss)

    def _set_best(
        self, value: float | None, step: int | None, loss: float | None
    ) -> None:
        progress = self.progress
        progress.best, progress.best_step, progress.best_loss = value, step, loss

    def _best_of_phase(self, state: TrainState) -> TrainState:
        """Returns the state of the phase's best evaluation, with the current step."""
        best_step = self.progress.plateau_best_step
        assert best_step is not None
        best = self.checkpoints.restore(best_step, self.setup.target(self.progress))
        self.terminal.say(
            f"the state of step {best_step} is the phase's best, restored"
        )
        return best.replace(step=state.step)

    def _check_frozen(self, state: TrainState, phase: PhaseSetup) -> None:
        name = phase.phase.name
        before, after = self.progress.frozen_sha256[name], digest(phase.frozen(state))
        if before != after:
            raise TrainingError(
                f"Frozen values of phase {name!r} have changed: sha256 {before} at its "
                f"start, {after} at step {int(state.step)}. This is a defect of the "
                "program."
            )

    def _save(self, state: TrainState, *, due: bool = True) -> None:
        if due:  # A stop between due checkpoints must change nothing later.
            self.progress.anchor = int(state.step)
        self.progress.log_lines = self.log.lines
        self.progress.count(self.clock, self._counted)
        self._counted = dataclasses.replace(self.clock)
        self.checkpoints.save(state, self.progress)
        self.stop.at_risk = False

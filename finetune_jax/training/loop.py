"""The loop over phases and updates: train, measure, save, in an order that is fixed."""

import dataclasses
import functools
import math
import time

import numpy as np

from finetune_jax.core.errors import TrainingError
from finetune_jax.core.metric_names import is_better
from finetune_jax.core.pytrees import digest, like, named
from finetune_jax.core.train_state import TrainState, eval_params
from finetune_jax.data.batches import Examples, Shortened, Views
from finetune_jax.evaluation.evaluator import Evaluator
from finetune_jax.features.cache import Taught, teaching_part
from finetune_jax.optim.optimizer import carried
from finetune_jax.optim.schedules import (
    learning_rates,
    plateau_metric,
    plateau_scale,
    plateau_step,
)
from finetune_jax.plans.phase import carried_cohorts, optimizer_state_moves, phase_at
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import Terminal
from finetune_jax.tasks.objectives.metrics import loss_beside, replaces
from finetune_jax.training.checkpoint import Checkpoints, HeldCheckpoints
from finetune_jax.training.dispatch import LONGEST, Feed
from finetune_jax.training.nonfinite import Guard, Unread
from finetune_jax.training.preemption import Stop
from finetune_jax.training.programs import Updates
from finetune_jax.training.progress import Clock, Progress
from finetune_jax.training.setup import PhaseSetup, Setup


class Preempted(Exception):
    """The run was asked to stop, and has saved where it is."""


@dataclasses.dataclass(kw_only=True)
class Loop:
    """A run under way.

    Attributes:
        setup: What the run is.
        evaluator: Measures states; has what the loss reads and nobody updates.
        checkpoints: Where states are saved.
        log: Where metrics are written.
        terminal: Where a person is told.
        guard: What is done about updates that are not finite.
        progress: Where the run stands.
        stop: Tells whether the run shall save and stop.
        updates: Makes updates.
        state: On the host, as `progress` says; None while it lies on the devices only.
        clock: Counts seconds.
        measured: The metrics of the last evaluation.
    """

    setup: Setup
    evaluator: Evaluator
    checkpoints: Checkpoints | HeldCheckpoints
    log: MetricsLog
    terminal: Terminal
    guard: Guard
    progress: Progress
    stop: Stop
    updates: Updates
    state: TrainState | None
    clock: Clock = dataclasses.field(default_factory=Clock)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    _unread: Unread | None = None
    _logged: Clock = dataclasses.field(default_factory=Clock)

    # The order of what happens at step s is part of the contract. Update s is made; its
    # metrics are read one update late, so that the device never waits; then the state is
    # evaluated, which may end the phase; then it is saved. A checkpoint thus knows all
    # that was logged up to its step, and a resumed run repeats nothing. Before update 0
    # the state is evaluated and saved too.
    def run(self) -> None:
        """Makes the state that after the last phase.

        Raises:
            TrainingError: An update is not finite, or what is frozen has moved.
            Preempted: The run was asked to stop, and has saved.
        """
        if not self.checkpoints.steps():
            self._begin()
        begin = self.progress.phase + self.progress.phase_is_over()
        for index in range(begin, len(self.setup.plan)):
            phase = self.setup.phase(index)
            if self.progress.phase_is_over():
                self._enter(index, phase)
            self._train(phase)

    def taken(self) -> TrainState:
        """Returns the state, which the loop then holds no more."""
        state, self.state = self._held(), None
        return state

    def _held(self) -> TrainState:
        assert self.state is not None
        return self.state

    def _begin(self) -> None:
        """Measures and saves the state before update 0."""
        state = self._held()
        self.evaluator.freeze(self._first(self.setup.phase(0)), state)
        placed = self.setup.devices.place(state)
        splits = tuple(self.setup.data.held_out)
        self._measure(placed, self.setup.plan[0].name, 0, splits)
        self._save(state)

    def _enter(self, index: int, phase: PhaseSetup) -> None:
        """Makes the state what the phase begins with, and notes that it does."""
        setup, progress = self.setup, self.progress
        if index:
            moves = optimizer_state_moves(setup.plan, index, setup.names)
            counts = ", ".join(f"{key} {len(names)}" for key, names in moves.items())
            self.terminal.say(f"phase {phase.phase.name!r}: optimizer state {counts}")
        self.state = self._begun(self._held(), index, phase)
        progress.enter(index)
        progress.frozen_sha256[phase.phase.name] = digest(phase.frozen(self.state))

    def _begun(self, state: TrainState, index: int, phase: PhaseSetup) -> TrainState:
        """Returns the end of the phase before as what phase `index` begins with."""
        plan, names = self.setup.plan, self.setup.names
        carries = phase.phase.optimizer_state == "carry"
        moves = optimizer_state_moves(plan, index, names) if index else {}
        # Where the state of a schedule-free optimizer goes, its iterate means nothing.
        evaluated, leaves = named(eval_params(state)), named(state.params)
        goes = moves.get("dropped", ()) if carries else leaves
        params = leaves | {name: evaluated[name] for name in goes}
        state = state.replace(params=like(state.params, params))
        fresh = self.updates.optimizer_state(phase, state.params)
        if carries:
            fresh = carried(state.opt_state, fresh, carried_cohorts(plan, index, names))
        return state.replace(opt_state=fresh)

    def _train(self, phase: PhaseSetup) -> None:
        """Makes the state that at the end of a phase, entered before or just now."""
        start = step = int(self._held().step)
        _, first, end = phase_at(self.setup.plan, self.progress.ends, start)
        self.terminal.begin_phase(phase.phase.name, first, start, end)
        examples = self._examples(phase, self._held(), end - start)
        feed = self.updates.feed(phase, examples, self._held(), first, end)
        rates = learning_rates(phase.phase)
        shares = (np.arange(end - first) / (end - first)).astype(np.float32)
        # A second copy would take as much of a CPU's memory as the model.
        placed = self.setup.devices.place(self.taken(), own=True)
        while self.state is None:
            scale = plateau_scale(phase.phase, self.progress.rate_drops)
            coming = slice(step - first, self._next_stop(step, end) - first)
            scaled = (np.asarray(rates[coming]) * scale).astype(np.float32)
            placed, made = self._update(
                placed, phase, feed, step, scaled, shares[coming]
            )
            step += made
            placed = self._after(placed, phase, step, end)
        self.terminal.end_phase()

    def _next_stop(self, step: int, end: int) -> int:
        """Returns up to where updates may go before the state is measured or saved."""
        every = [self._evaluation_every, self.setup.config.checkpoint.every_steps]
        due = [(step // n + 1) * n for n in every if n]
        return min(end, step + LONGEST, *due)

    def _first(self, phase: PhaseSetup) -> str | None:
        """Returns the stage before which nothing depends on the phase's updates."""
        return self.setup.task.first_learning(phase.mode)

    def _examples(self, phase: PhaseSetup, state: TrainState, updates: int) -> Examples:
        """Returns the training split, or what frozen stages make of it where they do."""
        data, batch_size = self.setup.data, self.setup.config.data.batch_size
        if phase.phase.fixed_batch:
            updates = 1
        self.evaluator.freeze(self._first(phase), state)
        frozen, store = self.evaluator.frozen, self.evaluator.store
        is_taught, found, said = self.setup.task.is_taught, None, None
        if store is not None:
            kept = functools.partial(
                store.training,
                data.train,
                spec=data.spec,
                mode=phase.mode,
                views=self.setup.views,
                batch_size=batch_size // phase.phase.accumulate_steps,
                examples=updates * batch_size,
            )
            if is_taught:
                fixed = self.setup.devices.to_host(self.evaluator.fixed["task"])
                said = kept(teaching_part(fixed, state.rng))
            # Teachers see inputs, which are not there where a stage's stand for them.
            if frozen is not None and is_taught == (said is not None):
                found = kept(frozen)
        examples = self._uncached(phase) if found is None else found
        return examples if said is None else Taught(examples=examples, said=said)

    def _uncached(self, phase: PhaseSetup) -> Examples:
        """Returns the training split."""
        data = self.setup.data
        if self.setup.views:
            return Views(dataset=data.train, views=self.setup.views)
        # What stages that are computed on their own get is as long as what is kept.
        if data.spec.text is not None and self._first(phase) is None:
            return Shortened(dataset=data.train, options=data.spec.text.options)
        return data.train

    def _update(
        self,
        placed: TrainState,
        phase: PhaseSetup,
        feed: Feed,
        step: int,
        rates: np.ndarray,
        shares: np.ndarray,
    ) -> tuple[TrainState, int]:
        """Makes one call's updates from `step` on; reads the metrics of those before.

        Args:
            placed: The state.
            phase: The phase.
            feed: Gives the examples.
            step: The state's.
            rates: Learning rates of the updates that may be made.
            shares: Of the phase that is over before each.

        Returns:
            The placed state, and how many updates were made.
        """
        begin = time.perf_counter()
        call = feed.call(rates, shares)
        waited = time.perf_counter() - begin
        program, compile_s = self.updates.program(phase, feed, placed, call)
        self.stop.at_risk = True
        rest = self.evaluator.fixed, *call.arguments
        placed, metrics = program.call(placed, *rest)
        if self.read():
            placed, metrics = program.call(self._gone_back(phase, step), *rest)
        _, first, _ = phase_at(self.setup.plan, self.progress.ends, step)
        self._unread = Unread(
            step=step,
            updates=call.updates,
            phase=phase.phase.name,
            metrics=metrics,
            rates=rates,
            fixed=first if phase.phase.fixed_batch else None,
            batch=call.batch,
        )
        took = time.perf_counter() - begin - compile_s
        if not compile_s:
            feed.took(took)
        self.clock.updates += call.updates
        self.clock.compile_s += compile_s
        self.clock.wait_s += waited
        self.clock.train_s += took
        examples = self.clock.updates * self.setup.config.data.batch_size
        self.terminal.advance(call.updates, examples / self.clock.train_s)
        return placed, call.updates

    def read(self) -> bool:
        """Reads the last updates' metrics; returns whether the state is to go back.

        Raises:
            TrainingError: Loss or gradient is not finite, and that is not passed over.
        """
        if self._unread is None:
            return False
        unread, self._unread = self._unread, None
        times = self.clock.since(self._logged)
        for made in unread.read(self.setup.config.report.every_steps):
            if made.is_finite:
                self.log.write(made.line() | times)
                self._logged = dataclasses.replace(self.clock)
                continue
            self.guard.refuse(made, self.progress)
            if self.guard.policy == "rollback":
                return True
        return False

    def _gone_back(self, phase: PhaseSetup, step: int) -> TrainState:
        """Returns the placed state of the last checkpoint that was due, as of `step`."""
        progress = self.checkpoints.progress(self.progress.anchor)
        target = self.setup.target(progress)
        state = self.checkpoints.restore(self.progress.anchor, target)
        if progress.phase < self.progress.phase:
            state = self._begun(state, self.progress.phase, phase)
        return self.setup.devices.place(state.replace(step=np.int32(step)))

    def _after(
        self, placed: TrainState, phase: PhaseSetup, step: int, end: int
    ) -> TrainState:
        """Returns the placed state to go on with; measures and saves where that is due.

        Where the phase is over, the state is on the host, too.
        """
        config, data, often = self.setup.config, self.setup.data, self._evaluation_every
        over, due = step == end, bool(often) and step % often == 0
        stop = self.stop.asked()
        every = config.checkpoint.every_steps
        if not (over or due or stop or (every and step % every == 0)):
            return placed
        begin = time.perf_counter()
        if self.read():
            placed = self._gone_back(phase, step)
        self.clock.train_s += time.perf_counter() - begin
        name, restores = phase.phase.name, phase.phase.plateau_restore
        best = self._best()
        # Where the phase's best is to be restored, the other splits wait for it.
        at_once = over and not restores
        if over or due:
            splits = tuple(data.held_out) if at_once else ("validation",)
            self._measure(placed, name, step, splits)
            self._lower_rate_on_plateau(phase)
            over = self._plateau_is_reached(phase, step) or over
        state = self.setup.devices.to_host(placed)
        if over:
            if restores and self.progress.plateau_best_step not in (None, step):
                state = self._best_of_phase(state)
                placed = self.setup.devices.place(state)
                if self.progress.best_step == step:  # Which is not what is saved.
                    self._set_best(*best)
            if not at_once:
                self._measure(placed, name, step, ("test",))
            self._check_frozen(state, phase)
            self.progress.ends.append(step)
        self._save(state, due=over or due or bool(every and step % every == 0))
        if stop:
            raise Preempted(f"stopped and saved at step {step}")
        self.state = state if over else None
        return placed

    @property
    def _evaluation_every(self) -> int | None:
        """Steps between two evaluations, if there are any before the end of a phase."""
        config = self.setup.config
        if config.evaluate.every_epochs:
            examples = config.evaluate.every_epochs * len(self.setup.data.train)
            return math.ceil(examples / config.data.batch_size)
        return config.evaluate.every_steps

    def _measure(
        self, placed: TrainState, phase: str, step: int, splits: tuple[str, ...]
    ) -> None:
        held_out = self.setup.data.held_out
        wanted = {split: held_out[split] for split in splits if split in held_out}
        found = self.evaluator.measure(placed, wanted)
        if not found:
            return
        self.measured |= found
        self.terminal.metrics(step, phase, found)
        self.log.write({"step": step, "phase": phase, **found})
        name = self.setup.config.evaluate.best
        if name not in found:
            return
        value, loss = found[name], found.get(loss_beside(name))
        best, _, best_loss = self._best()
        if replaces(name, value, best, loss, best_loss):
            self._set_best(value, step, loss)

    def _best(self) -> tuple[float | None, int | None, float | None]:
        """Returns metric, step and loss of the best state so far."""
        progress = self.progress
        return progress.best, progress.best_step, progress.best_loss

    def _set_best(
        self, value: float | None, step: int | None, loss: float | None
    ) -> None:
        progress = self.progress
        progress.best, progress.best_step, progress.best_loss = value, step, loss

    def _best_of_phase(self, state: TrainState) -> TrainState:
        """Returns the state as it was at the phase's best evaluation, but for the step."""
        best_step = self.progress.plateau_best_step
        assert best_step is not None
        best = self.checkpoints.restore(best_step, self.setup.target(self.progress))
        self.terminal.say(
            f"the state of step {best_step} is the phase's best, restored"
        )
        return best.replace(step=state.step)

    def _lower_rate_on_plateau(self, phase: PhaseSetup) -> None:
        progress, name = self.progress, plateau_metric(phase.phase)
        if name in self.measured:
            before = progress.rate_best, progress.rate_bad, progress.rate_drops
            after = plateau_step(phase.phase, *before, self.measured[name])
            progress.rate_best, progress.rate_bad, progress.rate_drops = after

    def _plateau_is_reached(self, phase: PhaseSetup, step: int) -> bool:
        name, progress = phase.phase.plateau_metric, self.progress
        if name is None or name not in self.measured:
            return False
        value, loss = self.measured[name], self.measured.get(loss_beside(name))
        change, best = phase.phase.plateau_min_change, progress.plateau_best
        progress.plateau_bad += 1
        if is_better(name, value, best, change):
            progress.plateau_best, progress.plateau_bad = value, 0
        elif value != best or not replaces(
            name, value, best, loss, progress.plateau_best_loss
        ):
            return progress.plateau_bad >= phase.phase.plateau_patience
        # A tie with a lower loss is the state to restore, but no improvement.
        progress.plateau_best_step, progress.plateau_best_loss = step, loss
        return progress.plateau_bad >= phase.phase.plateau_patience

    def _check_frozen(self, state: TrainState, phase: PhaseSetup) -> None:
        name = phase.phase.name
        before, after = self.progress.frozen_sha256[name], digest(phase.frozen(state))
        if before != after:
            raise TrainingError(
                f"What phase {name!r} freezes has moved: sha256 {before} at its start, "
                f"{after} at step {int(state.step)}. This is a defect of the program."
            )

    def _save(self, state: TrainState, *, due: bool = True) -> None:
        if due:  # Whether the run was stopped here must change nothing later.
            self.progress.anchor = int(state.step)
        self.progress.log_lines = self.log.lines
        self.checkpoints.save(state, self.progress)
        self.stop.at_risk = False

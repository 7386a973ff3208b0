"""Makes the updates of a phase: their compiled programs, and the feed of examples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.batches import BatchSource, training_batches
from finetune_jax.data.domains import DomainMixture, mixed_batches
from finetune_jax.data.order import training_order
from finetune_jax.features.frozen_prefix import at_a_time
from finetune_jax.parallel.compiling import Cost
from finetune_jax.parallel.devices import stable_batch
from finetune_jax.parallel.executor import Executor
from finetune_jax.training.phases import PhaseSetup
from finetune_jax.training.setup import Setup
from finetune_jax.training.step import train_step
from finetune_jax.training.updates.dispatch import (
    Call,
    Feed,
    Scanned,
    Stepwise,
    everything,
    resident,
    stock_gradients,
    why_not_resident,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """Makes the updates of a run.

    Attributes:
        setup: Setup of the run.
        executor: Compiles the programs and runs them.
        fixed: Placed arrays that updates read and nobody updates.
        say: Prints a line for a person.
    """

    setup: Setup
    executor: Executor
    fixed: Any
    say: Callable[[str], None]
    _said: set[str] = dataclasses.field(default_factory=set)

    def feed(
        self,
        phase: PhaseSetup,
        examples: BatchSource | DomainMixture,
        state: TrainState,
        first: int,
        end: int,
    ) -> Feed:
        """Returns the feed of examples for the updates of a phase.

        Args:
            phase: The phase.
            examples: Training split, or the features that replace it.
            state: State that the phase continues from, on the host.
            first: First update of the phase.
            end: Update after the last one of the phase.
        """
        config, start = self.setup.config, int(state.step)
        seed, sampling = configs.seeds(config)["order"], config.data.sampling
        shape = {
            "batch_size": config.data.batch_size,
            "micro_batches": phase.phase.accumulate_steps,
            "views": self.setup.views,
        }
        why = self._why_stepwise(phase, examples, state)
        if why is None:
            assert not isinstance(examples, DomainMixture)
            whole = resident(examples)
            return Scanned(
                examples=examples,
                order=training_order(examples.label, seed, sampling),
                placed=self.executor.resident(whole, lambda: everything(whole)),
                start=start,
                pace=self.executor.pace(
                    (phase.program, str(config.task)), config.parallel.steps_per_call
                ),
                **shape,
            )
        if why not in self._said:
            self._said.add(why)
            self.say(f"one update per call (no scan): {why}")
        fixed = phase.phase.fixed_batch
        updates = range(first, first + 1) if fixed else range(start, end)
        if isinstance(examples, DomainMixture):
            parts = phase.phase.accumulate_steps
            make = functools.partial(
                mixed_batches, examples, seed=seed, micro_batches=parts
            )
        else:
            make = functools.partial(
                training_batches, examples, seed=seed, sampling=sampling, **shape
            )
        return Stepwise(make, self.setup.devices, updates, repeats=fixed)

    def _why_stepwise(
        self,
        phase: PhaseSetup,
        examples: BatchSource | DomainMixture,
        state: TrainState,
    ) -> str | None:
        """Returns why a call must make one update only; None if it may make more."""
        config = self.setup.config
        if config.parallel.steps_per_call == 1:
            return "config.parallel.steps_per_call=1"
        if phase.phase.fixed_batch:
            return "the batch is always the same"
        if config.nonfinite.policy == "rollback":
            return "config.nonfinite.policy=rollback"
        limit = config.data.memory_gb * 1e9
        if why := why_not_resident(examples, self.setup.devices, limit):
            return why
        assert not isinstance(examples, DomainMixture)
        if jax.default_backend() != "cpu":
            return None
        kinds = type(examples), type(getattr(examples, "examples", None))
        key = "stock gradients", phase.program, str(config.task), kinds
        stock = self.executor.once(
            key, lambda: self._stock_gradients(phase, examples, state)
        )
        if stock:
            return (
                f"{stock} gradients of convolutions are jax's own, which are "
                "slow in a loop on CPU; models.convolution.convolve has others"
            )
        return None

    def _stock_gradients(
        self, phase: PhaseSetup, examples: BatchSource, state: TrainState
    ) -> int:
        """Returns the number of convolution gradients that an update leaves to jax."""
        size = self.setup.config.data.batch_size
        batch = examples.take(np.zeros(size, int))
        batch["position"] = np.zeros(size, np.int32)
        parts = phase.phase.accumulate_steps
        batch = jax.tree.map(
            lambda x: x.reshape(parts, size // parts, *x.shape[1:]), batch
        )
        rest = batch, np.float32(0), np.float32(0)
        traced = jax.jit(self.step(phase)).trace(state, self.fixed, *rest)
        return stock_gradients(traced.jaxpr)

    def program(
        self, phase: PhaseSetup, feed: Feed, placed: TrainState, call: Call
    ) -> tuple[Callable, float, Cost | None]:
        """Returns the program of a call, the seconds that compiling took, and its cost.

        Args:
            phase: The phase.
            feed: Feed of the phase.
            placed: Placed state.
            call: Call of the feed.
        """
        # Averages and fixed arrays cover all phases, in which runs may differ.
        shared = tuple(placed.ema), tuple(self.fixed)
        # Updates may differ in the domains of their batches.
        leaves, names = jax.tree.flatten(call.arguments)
        shapes = names, tuple(leaf.shape for leaf in leaves)
        key = phase.program, str(self.setup.config.task), feed.kind, shared, shapes
        program, compile_s = self.executor.train_program(
            key,
            lambda: feed.program(self.step(phase)),
            (placed, self.fixed, *call.arguments),
            frozen=lambda: frozenset(phase.frozen(placed)),
            is_resident=isinstance(feed, Scanned),
        )
        return program, compile_s, self.executor.cost(key)

    def optimizer_state(self, phase: PhaseSetup, params: Any) -> Any:
        """Returns the initial state of a phase's optimizer, at rest as the parameters."""
        init = self.executor.once(
            ("optimizer", phase.program),
            lambda: self.setup.devices.jit_at_rest(phase.optimizer().init),
        )
        return init(params)

    def step(self, phase: PhaseSetup) -> Callable:
        """Returns an update of the phase as a function of its arguments."""
        config, views = self.setup.config, self.setup.views
        # The frozen prefix has the same bits whether its outputs are cached or not.
        is_cacheable = self.setup.data.spec.why_not_repeated(views) is None
        rows = stable_batch(self.setup.devices)
        micro = config.data.batch_size // phase.phase.accumulate_steps
        if is_cacheable:
            micro += -micro % rows
        static = phase.update(
            self.setup.task,
            config.evaluate.ema_decay,
            guarded=config.nonfinite.policy != "stop",
            views=views,
            rows=rows if is_cacheable else 1,
            at_a_time=at_a_time(self.setup.task, micro, rows),
        )
        return functools.partial(train_step, static=static)

"""How the updates of a phase are made: their compiled programs, and what feeds these."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.batches import Examples, training_batches
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import Mixture, mixed_batches
from finetune_jax.data.order import training_order
from finetune_jax.features.cache import Features, Taught
from finetune_jax.features.frozen_prefix import at_a_time
from finetune_jax.parallel.devices import Compiled
from finetune_jax.sweeps.vectorised import Together
from finetune_jax.training.dispatch import (
    Call,
    Feed,
    OwnPace,
    Pace,
    Scanned,
    Stepwise,
    everything,
    resident,
    stock_gradients,
    why_not_resident,
)
from finetune_jax.training.setup import PhaseSetup, Setup
from finetune_jax.training.step import train_step


@dataclasses.dataclass(kw_only=True)
class Updates:
    """Makes the updates of a run.

    Attributes:
        setup: Of the run.
        fixed: What updates read and nobody updates, placed.
        say: Tells a person.
        programs: Compiled so far, by what they depend on.
        inits: Likewise, of optimizers.
        told: What was said so far.
        stock: Gradients of convolutions that programs leave to jax, as `programs`.
        placed: The split that lies on the device, and where.
        together: Makes them for several runs at once; None makes them for one.
    """

    setup: Setup
    fixed: Any
    say: Callable[[str], None]
    programs: dict[Any, Compiled] = dataclasses.field(default_factory=dict)
    inits: dict[Any, Callable] = dataclasses.field(default_factory=dict)
    told: set[str] = dataclasses.field(default_factory=set)
    stock: dict[Any, int] = dataclasses.field(default_factory=dict)
    placed: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    together: Together | None = None

    def feed(
        self,
        phase: PhaseSetup,
        examples: Examples | Mixture,
        state: TrainState,
        first: int,
        end: int,
    ) -> Feed:
        """Returns what gives the phase's updates their examples.

        Args:
            phase: The phase.
            examples: The training split, or what stands for it.
            state: From which the phase goes on, on the host.
            first: The phase's first update.
            end: The update after its last.
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
            assert not isinstance(examples, Mixture)
            return Scanned(
                examples,
                training_order(examples.label, seed, sampling),
                self._placed(resident(examples)),
                start=start,
                pace=self._pace(phase),
                **shape,
            )
        if why not in self.told:
            self.told.add(why)
            self.say(f"every update is a call of its own: {why}")
        fixed = phase.phase.fixed_batch
        updates = {
            "start": first if fixed else start,
            "stop": first + 1 if fixed else end,
        }
        if isinstance(examples, Mixture):
            parts = phase.phase.accumulate_steps
            batches = mixed_batches(examples, seed=seed, micro_batches=parts, **updates)
        else:
            batches = training_batches(
                examples, seed=seed, sampling=sampling, **updates, **shape
            )
        return Stepwise(batches, self.setup.devices, repeats=fixed)

    def _pace(self, phase: PhaseSetup) -> Pace:
        """Returns how many updates the calls of a phase shall make."""
        chosen = self.setup.config.parallel.steps_per_call
        if self.together is None:
            return OwnPace(chosen)
        return self.together.pace((phase.program, str(self.setup.config.task)), chosen)

    def forget(self) -> None:
        """Gives back what the last update leaves behind."""
        self.programs.clear()
        self.placed.clear()

    def _placed(self, whole: Dataset | Features | Taught) -> Any:
        """Returns all of a split on the device; the one placed last is kept."""
        if not self.placed or self.placed[0][0] is not whole:
            placed = self.setup.devices.place(everything(whole))
            self.placed[:] = [(whole, placed)]
        return self.placed[0][1]

    def _why_stepwise(
        self, phase: PhaseSetup, examples: Examples | Mixture, state: TrainState
    ) -> str | None:
        """Returns why a call shall make one update only, or None if it may make more."""
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
        assert not isinstance(examples, Mixture)
        if jax.default_backend() != "cpu":
            return None
        kinds = type(examples), type(getattr(examples, "examples", None))
        key = phase.program, str(config.task), kinds
        if key not in self.stock:
            size = config.data.batch_size
            batch = examples.take(np.zeros(size, int))
            batch["position"] = np.zeros(size, np.int32)
            parts = phase.phase.accumulate_steps
            rows = size // parts
            batch = jax.tree.map(lambda x: x.reshape(parts, rows, *x.shape[1:]), batch)
            rest = batch, np.float32(0), np.float32(0)
            traced = jax.jit(self._step(phase)).trace(state, self.fixed, *rest)
            self.stock[key] = stock_gradients(traced.jaxpr)
        if self.stock[key]:
            return (
                f"{self.stock[key]} gradients of convolutions are jax's own, which are "
                "slow in a loop on CPU; models.convolution.convolve has others"
            )
        return None

    def program(
        self, phase: PhaseSetup, feed: Feed, placed: TrainState, call: Call
    ) -> tuple[Compiled, float]:
        """Returns the program for a call, and the seconds that compiling took just now.

        Args:
            phase: The phase.
            feed: Of the phase.
            placed: The state.
            call: From the feed.
        """
        # Averages and what is fixed are those of all phases, of which runs may differ.
        shared = tuple(placed.ema), tuple(self.fixed)
        # Updates may differ in the domains that they have.
        leaves, names = jax.tree.flatten(call.arguments)
        shapes = names, tuple(leaf.shape for leaf in leaves)
        key = phase.program, str(self.setup.config.task), feed.kind, shared, shapes
        if key in self.programs:
            return self.programs[key], 0.0
        step = feed.program(self._step(phase))
        if self.together is None:
            program = self.setup.devices.compile_train(
                step, placed, self.fixed, *call.arguments
            )
        else:
            program = self.together.train_program(
                step,
                frozenset(phase.frozen(placed)),
                resident=isinstance(feed, Scanned),
            )
        self.programs[key] = program
        return program, program.compile_s

    def optimizer_state(self, phase: PhaseSetup, params: Any) -> Any:
        """Returns the fresh state of a phase's optimizer, on the host."""
        if phase.program not in self.inits:
            self.inits[phase.program] = jax.jit(phase.optimizer().init)
        return jax.tree.map(np.asarray, self.inits[phase.program](params))

    def _step(self, phase: PhaseSetup) -> Callable:
        """Returns an update of the phase as a function of its arguments."""
        config, views = self.setup.config, self.setup.views
        # Whether what frozen stages give is kept or not, it is the same bits.
        kept = self.setup.data.spec.why_always_others(views) is None
        rows = self.setup.devices.whole_rows
        micro = config.data.batch_size // phase.phase.accumulate_steps
        if kept:
            micro += -micro % rows
        static = phase.update(
            self.setup.task,
            config.evaluate.ema_decay,
            guarded=config.nonfinite.policy != "stop",
            views=views,
            rows=rows if kept else 1,
            at_a_time=at_a_time(self.setup.task, micro, rows),
        )
        return functools.partial(train_step, static=static)

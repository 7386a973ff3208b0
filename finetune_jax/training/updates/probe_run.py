"""The one update of a linear probe: a fit of the trained parameters to all examples."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune_jax.core.errors import Problem, TrainingError, UserError
from finetune_jax.core.pytrees import digest, like, named, nbytes
from finetune_jax.core.train_state import TrainState
from finetune_jax.data.dataset import Dataset, unaugmented
from finetune_jax.evaluation.evaluator import Evaluator
from finetune_jax.features.cache import Features, FrozenPrefix
from finetune_jax.models.modes import EVALUATION
from finetune_jax.optim.optimizer import decays
from finetune_jax.optim.penalty_path import Fit, ProbeOptions, minimise
from finetune_jax.parallel import processes
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.tasks.objectives.metrics import replaces
from finetune_jax.tasks.task import StepContext, Task
from finetune_jax.training.phases import PhaseSetup
from finetune_jax.training.progress import Clock
from finetune_jax.training.setup import Setup

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    """The stages after a frozen prefix as functions of their trained leaves.

    Attributes:
        task: Task of the run.
        first: First stage after the prefix.
        variables: Variables of the stages from `first` on.
        penalised: Names of the leaves with a penalty.
        iterations: Largest number of iterations of a fit.
    """

    task: Task
    first: str
    variables: Mapping[str, Any]
    penalised: frozenset[str]
    iterations: int

    def fit(self, start: Leaves, examples: dict, penalty: float) -> Fit:
        """Returns the fit to features, labels and weights of some examples."""
        placed = jax.tree.map(jnp.asarray, examples)
        return minimise(
            lambda leaves: self._loss_and_gradient(leaves, self.variables, placed),
            start,
            penalised=self.penalised,
            penalty=penalty,
            iterations=self.iterations,
        )

    def metrics(self, leaves: Leaves, examples: dict, split: Dataset) -> dict:
        """Returns the metrics of leaves on a split, given the features of its examples."""
        rows = jax.tree.map(np.asarray, self._outputs(leaves, self.variables, examples))
        counts = examples["weight"] > 0
        rows = jax.tree.map(lambda row: row[counts], rows)
        return self.task.metrics(rows, split.kept().on_host())

    @functools.cached_property
    def _loss_and_gradient(self) -> Callable:
        context = StepContext(mode=EVALUATION, first=self.first)

        def mean_loss(leaves: Leaves, variables: Mapping, examples: dict) -> jax.Array:
            batch = self.task.models.unpacked(examples)
            loss = self.task.loss(_filled(variables, leaves), batch, context)
            return loss.total / loss.weight

        return jax.jit(jax.value_and_grad(mean_loss))

    @functools.cached_property
    def _outputs(self) -> Callable:
        @jax.jit
        def outputs(leaves: Leaves, variables: Mapping, examples: dict) -> dict:
            batch = self.task.models.unpacked(examples)
            variables = _filled(variables, leaves)
            return self.task.outputs(variables, batch, first=self.first)

        return outputs


@dataclasses.dataclass(kw_only=True)
class ProbeRun:
    """The fit of a linear probe, in the place of the updates of a phase.

    Attributes:
        setup: Setup of the run.
        phase: The phase.
        options: Options of the fit.
        refits: Whether to fit training and validation examples together at the end.
        prefix: Frozen prefix, whose outputs are the features.
        evaluator: Measures states, and computes features that are not cached.
        step: Step of the current state.
        end: Step after the fit.
        clock: Clock of the run.
        log: Log of the metrics.
        say: Prints a line for a person.
        note_refit: Takes the value of `Progress.refit`.
    """

    setup: Setup
    phase: PhaseSetup
    options: ProbeOptions
    refits: bool
    prefix: FrozenPrefix
    evaluator: Evaluator
    step: int
    end: int
    clock: Clock
    log: MetricsLog
    say: Callable[[str], None]
    note_refit: Callable[[dict[str, Any]], None]

    def call(self, placed: TrainState, stop: int, *, rate_scale: float) -> TrainState:
        """Returns the placed state after the fit; see `PhaseRun.call`."""
        del stop, rate_scale
        begin, name = time.perf_counter(), self.phase.phase.name
        state = self.setup.devices.to_host(placed)
        train, validation = self._examples(state)
        head = self._head(state)
        penalty, fits, told = self._chosen(head, state, train, validation)
        told = f"phase {name!r}: L2 penalty {penalty:.2g}{told}"
        if validation is not None and self.refits:
            self._note(_with_leaves(state, fits[-1].leaves))
            both = jax.tree.map(lambda a, b: np.concatenate([a, b]), train, validation)
            # The sum of the losses grows with the examples, the penalty does not.
            penalty *= len(train["label"]) / len(both["label"])
            fits.append(head.fit(fits[-1].leaves, both, penalty))
            told += f"; fitted again to {len(both['label']):,} examples of train and "
            told += "validation"
        if not math.isfinite(fits[-1].loss):
            raise TrainingError(
                f"Phase {name!r}: the loss of the fit is {fits[-1].loss}; look for inputs "
                "or weights that are not finite."
            )
        # Every process computes the fit by itself.
        fit = {"fit of the probe": digest(dict(fits[-1].leaves))}
        if lines := processes.differing("fit of the probe", fit):
            raise TrainingError(
                f"Phase {name!r}: {lines[0]}; processes on different hardware compute "
                "different bits. Use one process, or head_only()."
            )
        self.say(told)
        self.step += 1
        values = {"train/loss": fits[-1].loss, "train/l2": penalty}
        self.log.write({"step": self.step, "phase": name, **values})
        self.clock.updates += 1
        self.clock.examples += len(train["label"]) * sum(f.evaluations for f in fits)
        self.clock.train_s += time.perf_counter() - begin
        fitted = _with_leaves(state, fits[-1].leaves)
        return self.setup.devices.place(fitted, own=True)

    def _head(self, state: TrainState) -> _Head:
        """Returns the stages from the first trained one on."""
        stages = self.setup.task.models.stages
        later = stages[stages.index(self.prefix.first) :]
        trees = {"params": state.params, "batch_stats": state.batch_stats}
        return _Head(
            task=self.setup.task,
            first=self.prefix.first,
            variables={
                kind: {stage: tree[stage] for stage in later if stage in tree}
                for kind, tree in trees.items()
            },
            penalised=frozenset(
                name for name in self.phase.groups if decays(self.phase.phase, name)
            ),
            iterations=self.options.iterations,
        )

    def _examples(self, state: TrainState) -> tuple[dict[str, Any], dict | None]:
        """Returns features, labels and weights of the training and validation splits.

        Raises:
            UserError: They take more memory than the config allows.
        """
        data, limit = self.setup.data, self.setup.config.data.memory_gb
        splits = unaugmented(data.train, data.spec), data.held_out.get("validation")
        found = [None if s is None else self._rows(state, s) for s in splits]
        if (size := nbytes(found) / 1e9) > limit:
            text = (
                f"{limit:g}, but phase {self.phase.phase.name!r} needs all features in "
                f"memory, {size:.1f} GB; allow more, or train the head by head_only"
            )
            raise UserError(Problem("config.data.memory_gb", text))
        train, validation = found
        assert train is not None
        return train, validation

    def _rows(self, state: TrainState, split: Dataset) -> dict[str, Any]:
        """Returns features, labels and weights of all examples of a split."""
        whole, store = np.arange(len(split)), self.evaluator.store
        cached = split if store is None else store.held_out(split, self.prefix)
        if isinstance(cached, Features):
            return cached.take(whole)
        step = self.prefix.step(self.setup.task, EVALUATION)

        def features(*arguments: Any) -> dict[str, Any]:
            return {"features": step(*arguments)}

        place = self.setup.devices.place
        variables = place((state.params, state.batch_stats, state.rng))
        rows = self.evaluator.rows("features of a probe", features, variables, split)
        weight = split.readable(whole).astype(np.float32)
        return {**rows, "label": split.label, "weight": weight}

    def _chosen(
        self, head: _Head, state: TrainState, train: dict, validation: dict | None
    ) -> tuple[float, list[Fit], str]:
        """Returns the best penalty, all fits with its own last, and how it was chosen.

        The path goes from strong to weak penalties, each fit starting from the one before.
        """
        leaves = named(state.params)
        start: Leaves = {name: leaves[name] for name in self.phase.groups}
        penalties = sorted(self.options.penalties, reverse=True)
        if validation is None or len(penalties) == 1:
            return penalties[0], [head.fit(start, train, penalties[0])], ""
        split = self.setup.data.held_out["validation"]
        best_of = self.setup.config.evaluate.best or ""
        fits, best, name = [], None, "loss"
        for penalty in penalties:
            fits.append(head.fit(start, train, penalty))
            start = fits[-1].leaves
            found = head.metrics(start, validation, split)
            wanted = best_of.replace("/ema_", "/").removeprefix("validation/")
            name = wanted if wanted in found else "loss"
            value, loss = found[name], found["loss"]
            if best is None or replaces(name, value, best[0], loss, best[1]):
                best = value, loss, penalty, fits[-1]
        assert best is not None
        told = f", of {len(fits)} the best by validation/{name} {best[0]:.4f}"
        return best[2], [*(fit for fit in fits if fit is not best[3]), best[3]], told

    def _note(self, fitted: TrainState) -> None:
        """Measures the fit to the training split alone, before it is fitted again."""
        validation = self.setup.data.held_out["validation"]
        found = self.evaluator.measure(
            self.setup.devices.place(fitted),
            {"validation": validation},
            prefix=self.prefix,
        )
        self.note_refit({"validation": validation.sha256, "metrics": found})


def _filled(variables: Mapping[str, Any], leaves: Leaves) -> dict[str, Any]:
    """Returns variables with new values for some parameters."""
    params = variables["params"]
    return {**variables, "params": like(params, named(params) | dict(leaves))}


def _with_leaves(state: TrainState, leaves: Leaves) -> TrainState:
    """Returns the state one step later with new values for some parameters.

    Averaged weights begin anew at the fit.
    """
    params = like(state.params, named(state.params) | dict(leaves))
    ema = {name: leaves.get(name, leaf) for name, leaf in state.ema.items()}
    return state.replace(step=np.int32(state.step + 1), params=params, ema=ema)

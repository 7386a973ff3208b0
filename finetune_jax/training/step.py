"""One update and one evaluation: pure functions of (state, fixed, batch)."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core.pytrees import like, name_of, named, stage_of
from finetune_jax.core.train_state import TrainState, averaged
from finetune_jax.features.frozen_prefix import (
    as_kept,
    augmentation_key,
    part_by_part,
    with_frozen,
)
from finetune_jax.optim.regularisers import PENALTIES, penalty
from finetune_jax.tasks.task import Mode, Task

# Where the metrics of an update have norms of what learns, by stage; not logged.
NORMS = "norms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What is static about an update.

    Attributes:
        task: Has the loss.
        optimizer: Of the phase, from `make_optimizer`.
        trained: Names of the parameters that learn.
        mode: How the stages run.
        evaluates: What the optimizer computes at other points: see `Algorithm`.
        repeats: Whether every update draws the same, so that the loss stays the same.
        regularise: (name, strength, regex) of what is added to the loss.
        ema_decay: Of the averaged weights; None has none.
        guarded: Whether an update that is not finite leaves all but the step as it was.
        views: How many ways there are to augment an example; None augments it anew in
            every update. The places in a batch then are those of the views.
        rows: Frozen stages and teachers get a multiple of so many examples.
        at_a_time: How many they get at a time; None: all.
    """

    task: Task
    optimizer: optax.GradientTransformationExtraArgs
    trained: frozenset[str]
    mode: Mode
    evaluates: str = "nothing"
    repeats: bool = False
    regularise: tuple[tuple[str, float, str], ...] = ()
    ema_decay: float | None = None
    guarded: bool = False
    views: int | None = None
    rows: int = 1
    at_a_time: int | None = None

    @property
    def first(self) -> str | None:
        """The stage before which nothing depends on the update: see the task's."""
        return self.task.first_learning(self.mode)

    def over_devices(self, tree: Any) -> Any:
        """Returns the sum over devices, where it is not taken by itself."""
        axis_name = self.mode.axis_name
        return jax.lax.psum(tree, axis_name) if axis_name else tree

    def norms_by_stage(self, tree: Any) -> dict[str, jax.Array]:
        """Returns the norm of what learns, by stage."""
        leaves: dict[str, list] = {}
        for name, leaf in named(tree).items():
            if name in self.trained:
                leaves.setdefault(stage_of(name, self.task.prefixes), []).append(leaf)
        return {stage: optax.tree.norm(found) for stage, found in leaves.items()}

    def learns(self, params: Any) -> Any:
        """Returns a tree of bools shaped like the parameters."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: name_of(path) in self.trained, params
        )


def train_step(
    state: TrainState,
    fixed: Any,
    batch: dict,
    learning_rate: jax.Array,
    progress: jax.Array,
    *,
    static: Update,
) -> tuple[TrainState, dict]:
    """Returns the state after one update and the metrics of the *old* parameters.

    The k micro-batches are unrolled. Their gradients are weighed by the weight of the
    whole update, over micro-batches and devices, so that the result is that of one batch.

    Args:
        state: Donated.
        fixed: Arrays that the loss reads and nobody updates.
        batch: Arrays [k, b, ...]: k micro-batches of b examples.
        learning_rate: Of this update.
        progress: Share of the phase that is over, in [0, 1).
        static: The rest.
    """
    over_devices, trained = static.over_devices, static.learns(state.params)
    objective = _Objective(static, state, fixed, batch, progress)
    gradients, parts = objective.gradients(state.params)
    weight = over_devices(sum(part.weight for part in parts))
    share = len(parts) / weight
    # Only what learns is scaled and summed: the rest are zeros that nobody reads.
    gradients = [
        jax.tree.map(lambda g, t: over_devices(g) * share if t else g, g, trained)
        for g in gradients
    ]
    total = functools.reduce(
        lambda one, other: jax.tree.map(
            lambda a, b, t: a + b if t else a, one, other, trained
        ),
        gradients,
    )
    mean = jax.tree.map(lambda g, t: g / len(parts) if t else g, total, trained)
    updates, opt_state = None, state.opt_state
    if static.evaluates == "nothing":
        for gradient in gradients:
            updates, opt_state = static.optimizer.update(
                gradient, opt_state, state.params, learning_rate=learning_rate
            )
    else:
        extra = objective.elsewhere(mean, parts, weight)
        updates, opt_state = static.optimizer.update(
            mean, opt_state, state.params, learning_rate=learning_rate, **extra
        )
    # Frozen leaves are not added to, not even zero: that could change their bits.
    params = jax.tree.map(
        lambda p, u, t: p + u if t else p, state.params, updates, trained
    )
    metrics = _metrics(static, state.params, parts, mean)
    new = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=parts[-1].batch_stats,
        opt_state=opt_state,
    )
    new = new.replace(ema=averaged(new, static.ema_decay))
    if static.guarded:
        new = _if_finite(metrics, new, state, trained)
    return new, metrics


def _if_finite(
    metrics: dict, new: TrainState, old: TrainState, trained: Any
) -> TrainState:
    """Returns the new state, or the old one if loss or gradient are not finite."""
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    # Computed as without the choice, not fused with it: so both are the same bits.
    new = jax.lax.optimization_barrier(new)

    def chosen(one: Any, other: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), one, other)

    params = jax.tree.map(
        lambda n, o, t: jnp.where(finite, n, o) if t else o,
        new.params,
        old.params,
        trained,
    )
    return new.replace(
        params=params,
        batch_stats=chosen(new.batch_stats, old.batch_stats),
        opt_state=chosen(new.opt_state, old.opt_state),
        ema=chosen(new.ema, old.ema),
    )


def _metrics(static: Update, params: Any, parts: list, gradient: Any) -> dict:
    """Returns the metrics of an update, with the norms of what learns by stage."""
    over_devices = static.over_devices
    found: dict[str, Any] = {
        name: over_devices(sum(part.metrics[name][0] for part in parts))
        / over_devices(sum(part.metrics[name][1] for part in parts))
        for name in parts[0].metrics
    }
    norms = static.norms_by_stage(gradient)
    squares = [jnp.square(norm) for norm in norms.values()]
    found["grad_norm"] = jnp.sqrt(sum(squares, jnp.zeros(())))
    found[NORMS] = {"gradient": norms, "parameters": static.norms_by_stage(params)}
    return found


class _Part(NamedTuple):
    """What one micro-batch gives besides a gradient; nothing is summed over devices.

    Attributes:
        total: The loss is the sum of totals / the sum of weights.
        weight: See `total`.
        metrics: (total, weight) pairs.
        batch_stats: After the micro-batch.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict
    batch_stats: Any


class _Objective:
    """The loss of one update as a function of the parameters."""

    def __init__(
        self, static: Update, state: TrainState, fixed: Any, batch: dict, progress: Any
    ):
        """Prepares the micro-batches; they are the same at whatever point."""
        self.static, self.state, self.fixed = static, state, fixed
        self.progress = progress
        number = 0 if static.repeats else state.step
        _, for_rest = jax.random.wrap_key_data(state.rng)
        augment_rng = augmentation_key(state.rng, 0 if static.views else number)
        self.rng = jax.random.split(jax.random.fold_in(for_rest, number))[1]
        if axis_name := static.mode.axis_name:
            self.rng = jax.random.fold_in(self.rng, jax.lax.axis_index(axis_name))
        self.micro_batches = [
            self._prepared(
                jax.tree.map(lambda array, i=index: array[i], batch), augment_rng
            )
            for index in range(jax.tree.leaves(batch)[0].shape[0])
        ]
        sums = [static.task.whole(micro) for micro in self.micro_batches]
        if sums[0]:
            whole = jax.tree.map(lambda *parts: static.over_devices(sum(parts)), *sums)
            self.micro_batches = [m | {"whole": whole} for m in self.micro_batches]

    def _prepared(self, batch: dict, rng: jax.Array) -> dict:
        """Returns a micro-batch as the loss takes it."""
        static, state = self.static, self.state
        if "features" in batch:
            return batch
        batch = static.task.prepare(batch, rng, static.mode)
        if static.first is None and not static.task.is_taught:
            return batch
        whole = functools.partial(
            with_frozen, static.task, state, self.fixed["task"], static.first
        )
        make = functools.partial(part_by_part, whole, rows=static.at_a_time)
        if static.rows == 1:
            return make(batch)
        return as_kept(make, batch, state, static.rows)

    def total(
        self, params: Any, batch_stats: Any, index: int
    ) -> tuple[jax.Array, _Part]:
        """Returns the total of a micro-batch, for differentiation, and all of it."""
        static = self.static
        # Freezing in the loss, not in the gradient, lets XLA drop the backward pass.
        params = jax.tree.map(
            lambda p, t: p if t else jax.lax.stop_gradient(p),
            params,
            static.learns(params),
        )
        (total, weight), (batch_stats, metrics) = static.task.loss(
            params,
            batch_stats,
            self.fixed["task"],
            self.micro_batches[index],
            rng=jax.random.fold_in(self.rng, index),
            progress=self.progress,
            mode=static.mode,
            first=static.first,
        )
        if any(name in PENALTIES for name, *_ in static.regularise):
            added = penalty(static.regularise, params, self.fixed, static.trained)
            total += weight * added
            metrics = {**metrics, "penalty": (weight * added, weight)}
        return total, _Part(total, weight, metrics, batch_stats)

    def gradients(self, params: Any) -> tuple[list, list[_Part]]:
        """Returns the gradient of the total of each micro-batch, and what else it gave."""
        gradients, parts = [], []
        batch_stats = self.state.batch_stats
        for index in range(len(self.micro_batches)):
            gradient, part = jax.grad(self.total, has_aux=True)(
                params, batch_stats, index
            )
            batch_stats = part.batch_stats
            gradients.append(gradient)
            parts.append(part)
        return gradients, parts

    def elsewhere(
        self, gradient: Any, parts: list[_Part], weight: jax.Array
    ) -> dict[str, Any]:
        """Returns the extra arguments of an optimizer that looks at other points.

        Args:
            gradient: Of the loss at the parameters of the state.
            parts: What the micro-batches gave there.
            weight: Of the update, over devices.
        """
        over_devices, params = self.static.over_devices, self.state.params

        def loss_and_gradient(leaves):
            def local(leaves):
                filled = like(params, named(params) | named(leaves))
                batch_stats = self.state.batch_stats
                return sum(
                    self.total(filled, batch_stats, index)[0]
                    for index in range(len(self.micro_batches))
                )

            found = jax.value_and_grad(local)(leaves)
            return jax.tree.map(lambda x: over_devices(x) / weight, found)

        if self.static.evaluates == "gradient":
            return {"grad_fn": lambda leaves, step: loss_and_gradient(leaves)[1]}

        # A sum over devices cannot be differentiated on each of them.
        @jax.custom_vjp
        def value_fn(leaves):
            return loss_and_gradient(leaves)[0]

        value_fn.defvjp(
            loss_and_gradient,
            lambda gradient, cotangent: (
                jax.tree.map(lambda g: cotangent * g, gradient),
            ),
        )
        value = over_devices(sum(part.total for part in parts)) / weight
        return {"value": value, "grad": gradient, "value_fn": value_fn}

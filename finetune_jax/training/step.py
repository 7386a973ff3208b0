"""The training step: one update, a pure function of (state, fixed, batch)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from finetune_jax.core.pytrees import like, name_of, named, stage_of
from finetune_jax.core.train_state import TrainState, averaged
from finetune_jax.features.frozen_prefix import (
    as_cached,
    augmentation_key,
    in_chunks,
    with_frozen_outputs,
)
from finetune_jax.models.modes import Mode
from finetune_jax.optim.regularisers import PENALTIES, penalty
from finetune_jax.tasks.task import LossOutput, StepContext, Task

# Key of the norms by stage in the metrics of an update; they are not logged.
NORMS = "norms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """The static description of an update.

    Attributes:
        task: Has the loss.
        optimizer: Transformation of the phase, from `make_optimizer`.
        trained: Names of the trained parameters.
        mode: How the stages run.
        evaluates: What the optimizer computes at other points: see `Algorithm`.
        repeats: Whether every update uses the same random keys, so that the loss is the
            same function.
        regularise: (name, strength, regex) of the terms that are added to the loss.
        ema_decay: Decay of the averaged weights; None keeps no averages.
        guarded: Whether an update that is not finite changes nothing but the step.
        views: Number of augmented versions of each example; None augments anew in every
            update. Positions in a batch are then those of the versions.
        rows: The batch of frozen stages and teachers is padded to a multiple of this.
        at_a_time: Number of examples in a chunk of theirs; None: all.
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
        """The first stage that is not frozen: see `ModelSet.frozen_prefix_end`."""
        return self.task.models.frozen_prefix_end(self.mode)

    def over_devices(self, tree: Any) -> Any:
        """Returns the sum over devices under pmap; jit with shardings needs none."""
        axis_name = self.mode.axis_name
        return jax.lax.psum(tree, axis_name) if axis_name else tree

    def norms_by_stage(self, tree: Any) -> dict[str, jax.Array]:
        """Returns the norm of the trained leaves, by stage."""
        leaves: dict[str, list] = {}
        prefixes = self.task.models.prefixes
        for name, leaf in named(tree).items():
            if name in self.trained:
                leaves.setdefault(stage_of(name, prefixes), []).append(leaf)
        return {stage: optax.tree.norm(found) for stage, found in leaves.items()}

    def is_trained(self, params: Any) -> Any:
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

    The k micro-batches are unrolled. Their gradients are weighted by the weight of the
    whole update, over micro-batches and devices, so that the result is that of one batch.

    Args:
        state: Donated.
        fixed: Arrays that the loss reads and no update changes.
        batch: Arrays [k, b, ...]: k micro-batches of b examples.
        learning_rate: Learning rate of this update.
        progress: Finished share of the phase, in [0, 1).
        static: Static description of the update.
    """
    over_devices, trained = static.over_devices, static.is_trained(state.params)
    objective = _Objective(static, state, fixed, batch, progress)
    gradients, micro = objective.gradients(state.params)
    weight = over_devices(sum(loss.weight for loss in micro))
    share = len(micro) / weight
    # Only trained leaves are scaled and summed: the gradients of others are unused zeros.
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
    mean = jax.tree.map(lambda g, t: g / len(micro) if t else g, total, trained)
    updates, opt_state = None, state.opt_state
    if static.evaluates == "nothing":
        for gradient in gradients:
            updates, opt_state = static.optimizer.update(
                gradient, opt_state, state.params, learning_rate=learning_rate
            )
    else:
        extra = objective.elsewhere(mean, micro, weight)
        updates, opt_state = static.optimizer.update(
            mean, opt_state, state.params, learning_rate=learning_rate, **extra
        )
    # Frozen leaves are not added to, not even zero: that could change their bits.
    params = jax.tree.map(
        lambda p, u, t: p + u if t else p, state.params, updates, trained
    )
    metrics = _metrics(static, state.params, micro, mean)
    new = state.replace(
        step=state.step + 1,
        params=params,
        batch_stats=micro[-1].batch_stats,
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
    # Without the barrier XLA fuses the update with the choice, which changes its bits.
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


def _metrics(static: Update, params: Any, micro: list, gradient: Any) -> dict:
    """Returns the metrics of an update, with the norms of trained leaves by stage."""
    over_devices = static.over_devices
    found: dict[str, Any] = {
        name: over_devices(sum(loss.metrics[name][0] for loss in micro))
        / over_devices(sum(loss.metrics[name][1] for loss in micro))
        for name in micro[0].metrics
    }
    norms = static.norms_by_stage(gradient)
    squares = [jnp.square(norm) for norm in norms.values()]
    found["grad_norm"] = jnp.sqrt(sum(squares, jnp.zeros(())))
    found[NORMS] = {"gradient": norms, "parameters": static.norms_by_stage(params)}
    return found


class _Objective:
    """The loss of one update as a function of the parameters."""

    def __init__(
        self, static: Update, state: TrainState, fixed: Any, batch: dict, progress: Any
    ):
        """Prepares the micro-batches, which are the same for all parameters."""
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
        if static.task.domains is not None:
            each = [static.task.domains.totals(micro) for micro in self.micro_batches]
            if each[0]:
                totals = jax.tree.map(
                    lambda *values: static.over_devices(sum(values)), *each
                )
                self.micro_batches = [
                    m | {"totals": totals} for m in self.micro_batches
                ]

    def _prepared(self, batch: dict, rng: jax.Array) -> dict:
        """Returns a micro-batch as the loss takes it, from the first trained stage on."""
        static = self.static
        if "features" not in batch:
            batch = static.task.prepare(batch, rng, static.mode)
            if static.first is not None or static.task.teachers is not None:
                batch = self._with_frozen(batch)
        return static.task.models.unpacked(batch) if "features" in batch else batch

    def _with_frozen(self, batch: dict) -> dict:
        """Returns a prepared micro-batch with the outputs of frozen stages and teachers."""
        static, state = self.static, self.state
        whole = functools.partial(
            with_frozen_outputs, static.task, state, self.fixed["task"], static.first
        )
        make = functools.partial(in_chunks, whole, rows=static.at_a_time)
        if static.rows == 1:
            return make(batch)
        return as_cached(make, batch, state, static.rows)

    def total(
        self, params: Any, batch_stats: Any, index: int
    ) -> tuple[jax.Array, LossOutput]:
        """Returns the total of a micro-batch, for differentiation, and its loss."""
        static = self.static
        # Freezing in the loss, not in the gradient, lets XLA drop the backward pass.
        params = jax.tree.map(
            lambda p, t: p if t else jax.lax.stop_gradient(p),
            params,
            static.is_trained(params),
        )
        context = StepContext(
            rng=jax.random.fold_in(self.rng, index),
            progress=self.progress,
            mode=static.mode,
            first=static.first,
            fixed=self.fixed["task"],
        )
        variables = {"params": params, "batch_stats": batch_stats}
        loss = static.task.loss(variables, self.micro_batches[index], context)
        if any(name in PENALTIES for name, *_ in static.regularise):
            added = penalty(static.regularise, params, self.fixed, static.trained)
            added *= loss.weight
            metrics = {**loss.metrics, "penalty": (added, loss.weight)}
            loss = loss.replace(total=loss.total + added, metrics=metrics)
        return loss.total, loss

    def gradients(self, params: Any) -> tuple[list, list[LossOutput]]:
        """Returns the gradient of the total of each micro-batch, and its loss."""
        gradients, losses = [], []
        batch_stats = self.state.batch_stats
        for index in range(len(self.micro_batches)):
            gradient, loss = jax.grad(self.total, has_aux=True)(
                params, batch_stats, index
            )
            batch_stats = loss.batch_stats
            gradients.append(gradient)
            losses.append(loss)
        return gradients, losses

    def elsewhere(
        self, gradient: Any, micro: list[LossOutput], weight: jax.Array
    ) -> dict[str, Any]:
        """Returns the extra arguments of an optimizer that evaluates other points.

        Args:
            gradient: Gradient of the loss at the parameters of the state.
            micro: Losses of the micro-batches there.
            weight: Weight of the update, over devices.
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
        value = over_devices(sum(loss.total for loss in micro)) / weight
        return {"value": value, "grad": gradient, "value_fn": value_fn}

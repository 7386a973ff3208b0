"""The contract of a task, and the one way in which tasks apply their models.

The module of a task has `make`, which returns it, and `METRICS`, the names of what it
measures where the config does not say.
"""

import abc
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from finetune_jax.core.pytrees import part, with_part


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the stages of the models run. Static: a compiled step has one.

    Attributes:
        learning: Stages in which something learns, with the prefix of their model. They
            run as in training, all others as in evaluation.
        batch_stats: 'hold', 'update' or 'update_all', as in `Phase`.
        axis_name: The device axis under pmap; BatchNorm then averages over it.
    """

    learning: frozenset[str] = frozenset()
    batch_stats: str = "hold"
    axis_name: str | None = None

    def trains(self, stage: str) -> bool:
        """Returns whether a stage runs as in training (dropout, stochastic depth)."""
        return self.batch_stats == "update_all" or stage in self.learning

    def moves(self, stage: str) -> bool:
        """Returns whether the BatchNorms of a stage use and move batch statistics."""
        return self.batch_stats != "hold" and self.trains(stage)


EVALUATION = Mode()
# What `Task.taught` gives, in a batch.
TAUGHT = "taught"


class Task(abc.ABC):
    """What is learned: models, loss, outputs and metrics. Subclasses are frozen.

    Attributes:
        models: Modules by the prefix of their parameters; '' where there is one.
    """

    models: Mapping[str, nn.Module]

    @property
    @abc.abstractmethod
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each part of a batch, without the batch axis."""

    @property
    def train_batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The same of a training batch, which augmentation may still make smaller."""
        return self.batch_spec

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        """Returns random parameters and batch statistics."""

    def left_out(self) -> tuple[str, ...]:
        """Returns names of variables that weights may have besides those of the models.

        Such as the last stage of a classifier of which only the others are taken.
        """
        return ()

    def fixed(self, start: Any, *, training: bool = True) -> Any:
        """Returns what the loss reads and nobody updates.

        Args:
            start: The state before the first update. What is returned shares no buffer
                with it.
            training: Whether the loss will be asked for; otherwise what it alone reads
                may be left out.
        """
        del start, training
        return {}

    def fixed_shapes(self, start: Any) -> Any:
        """Returns the shapes of what `fixed` returns, without reading anything."""
        return jax.eval_shape(self.fixed, start)

    def check_fixed(self) -> list[str]:
        """Returns why what `fixed` would read cannot be learned from."""
        return []

    def fixed_sha256(self) -> dict[str, str]:
        """Returns the digest of each file that `fixed` reads, by its path."""
        return {}

    def fixed_layouts(self) -> Mapping[str, tuple[str, list[str]]]:
        """Returns layout and lines about the weights of each model that `fixed` reads.

        Raises:
            UserError: The weights cannot be read, or do not fit.
        """
        return {}

    @property
    def is_taught(self) -> bool:
        """Whether the loss reads `batch['taught']`."""
        return False

    def taught(self, fixed: Any, batch: dict) -> Any:
        """Returns what the loss reads of a prepared batch that no update changes.

        Arrays of one row an example. They are kept where the examples stay as they are.
        """
        del fixed, batch
        return {}

    def served(self) -> "Task":
        """Returns the task of a model that is trained: without what only the loss reads."""
        return self

    def prepare(self, batch: dict, rng: jax.Array, mode: Mode) -> dict:
        """Returns the batch as the models take it: normalised, in training augmented.

        Args:
            batch: As in `batch_spec`, and 'weight' [B] and 'position' [B], the place of
                each example in the update, from which its random key is drawn.
            rng: Key of the update.
            mode: EVALUATION augments nothing.
        """
        del rng, mode
        return batch

    @abc.abstractmethod
    def loss(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        rng: jax.Array,
        progress: jax.Array,
        mode: Mode,
        first: str | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, dict]]:
        """Returns ((total, weight), (batch_stats, metrics)) of a prepared batch.

        The loss is total / weight, over as many batches as are added up first; metrics
        are such pairs too. With `first`, `batch['features']` is that stage's input.
        """

    @abc.abstractmethod
    def outputs(
        self,
        params: Any,
        batch_stats: Any,
        fixed: Any,
        batch: dict,
        *,
        first: str | None = None,
    ) -> dict:
        """Returns arrays of one row an example, of a prepared batch in evaluation.

        With `first`, `batch['features']` is that stage's input.
        """

    def answers(self, outputs: dict) -> dict:
        """Returns what an exported model gives, of `outputs`; traced with them."""
        return outputs

    @abc.abstractmethod
    def metrics(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> dict[str, float]:
        """Returns the metrics of a split from the rows of all its examples.

        Args:
            outputs: Of all examples.
            batch: Their 'label', and 'note' where the source has notes; examples of one
                group stand one after another.
        """

    def check_splits(self, labels: Mapping[str, np.ndarray]) -> list[str]:
        """Returns what cannot be measured on some splits, given their labels by name."""
        del labels
        return []

    @abc.abstractmethod
    def records(
        self, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray]
    ) -> list[dict]:
        """Returns what a prediction says of each example, or group, ready for JSON."""

    def masks(self, outputs: dict[str, np.ndarray]) -> np.ndarray | None:
        """Returns the masks that a prediction has, uint8 [B, H, W]; None where it has none.

        They are as large as the images that the models take.
        """
        del outputs
        return None

    def first_learning(self, mode: Mode) -> str | None:
        """Returns the stage before which nothing depends on the update, if it has any.

        All stages before it run as in evaluation, so that what it gets from an example
        is always the same. There is none where the first stage learns, where nothing
        does, and where there is more than the one model without a prefix.
        """
        runs = [mode.trains(stage) for stage in self.stages]
        if tuple(self.models) != ("",) or True not in runs or runs[0]:
            return None
        return self.stages[runs.index(True)]

    def given(
        self,
        params: Any,
        batch_stats: Any,
        batch: dict,
        *,
        prefix: str = "",
        mode: Mode = EVALUATION,
        first: str | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Any, Any]:
        """Returns what a model gives of a prepared batch, and batch statistics of all.

        With `first`, `batch['features']` is that stage's input. Models drop by keys of
        their own.
        """
        variables = {"params": part(params, prefix)}
        variables["batch_stats"] = part(batch_stats, prefix)
        x = batch["features" if first else "inputs"]
        if rng is not None:
            rng = key_of(rng, prefix)
        y, moved = apply(self, prefix, variables, x, mode=mode, first=first, rng=rng)
        return y, with_part(batch_stats, prefix, moved)

    def with_features(
        self, params: Any, batch_stats: Any, batch: dict, *, first: str
    ) -> dict:
        """Returns a prepared batch with 'features', the input of a stage, for 'inputs'.

        Args:
            params: Of the stages before it, at least.
            batch_stats: Likewise.
            batch: Prepared.
            first: A stage from `first_learning`.
        """
        last = self.stages[self.stages.index(first) - 1]
        variables = {"params": params, "batch_stats": batch_stats}
        features, _ = apply(
            self, "", variables, batch["inputs"], mode=EVALUATION, last=last
        )
        rest = {name: array for name, array in batch.items() if name != "inputs"}
        # Computed on its own, as it is where it is kept: so both are the same bits.
        return {**rest, "features": jax.lax.optimization_barrier(features)}

    def learning(self, stages: frozenset[str]) -> frozenset[str]:
        """Returns the stages that run as in training where `stages` learn."""
        return stages

    def of_domain(self, domain: str) -> "Task":
        """Returns the task of one domain of several, of the same state."""
        raise NotImplementedError(
            f"{type(self).__name__} has one data set, not {domain}"
        )

    @property
    def shares(self) -> Mapping[str, int]:
        """Examples of each domain in an update, whose batch is a dict of theirs.

        Empty where there is one data set.
        """
        return {}

    def whole(self, batch: dict) -> dict:
        """Returns what the loss needs to know of a whole update, from a micro-batch.

        It is summed over micro-batches and devices, and each finds it in its 'whole'.

        Args:
            batch: Prepared.
        """
        del batch
        return {}

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of all models in order, with their prefixes."""
        return tuple(
            f"{prefix}/{stage}" if prefix else stage
            for prefix, module in self.models.items()
            for stage in _staged(module).stages
        )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of the models."""
        return tuple(self.models)

    @property
    def heads(self) -> tuple[str, ...]:
        """The last stage of each model, with its prefix."""
        return tuple(
            f"{prefix}/{_staged(module).stages[-1]}".removeprefix("/")
            for prefix, module in self.models.items()
        )


def _staged(module: nn.Module) -> Any:
    """Returns a model: that modules have stages is not known of their type."""
    return module


def key_of(rng: jax.Array, prefix: str) -> jax.Array:
    """Returns the key of one model, which no other model changes."""
    return jax.random.fold_in(rng, zlib.crc32(prefix.encode())) if prefix else rng


def with_taught(task: Task, fixed: Any, batch: dict) -> dict:
    """Returns a prepared batch with what `Task.taught` says of it, if it has not got it."""
    if not task.is_taught or TAUGHT in batch:
        return batch
    # Computed on its own, as it is where it is kept: so both are the same bits.
    inputs = jax.lax.optimization_barrier(batch["inputs"])
    said = task.taught(fixed, {**batch, "inputs": inputs})
    return {**batch, TAUGHT: jax.lax.optimization_barrier(said)}


def apply(
    task: Task,
    prefix: str,
    variables: Mapping[str, Any],
    x: Any,
    *,
    mode: Mode,
    first: str | None = None,
    last: str | None = None,
    rng: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Returns the output of a model of a task: see `apply_model`."""
    module = task.models[prefix]
    return apply_model(
        module, prefix, variables, x, mode=mode, first=first, last=last, rng=rng
    )


def apply_model(
    model: nn.Module,
    prefix: str,
    variables: Mapping[str, Any],
    x: Any,
    *,
    mode: Mode,
    first: str | None = None,
    last: str | None = None,
    rng: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Returns the output of a model and its batch statistics after.

    The mode of every stage is set here, for any model: an interceptor rewrites what
    BatchNorm and dropout are told at their call. It sees paths within this one apply
    only, so the model's prefix is added.

    Args:
        model: The model.
        prefix: Of its stages in the mode.
        variables: 'params' and 'batch_stats' of this model.
        x: Input of stage `first`.
        mode: How the stages run.
        first: The stage to begin with; None is the first.
        last: The stage to end with; None is the last.
        rng: Key for dropout; None where nothing is dropped.
    """

    def set_mode(next_call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and module.path:
            stage = f"{prefix}/{module.path[0]}" if prefix else module.path[0]
            if "use_running_average" in kwargs:
                kwargs = {**kwargs, "use_running_average": not mode.moves(stage)}
                if mode.axis_name and hasattr(module, "axis_name"):
                    object.__setattr__(module, "axis_name", mode.axis_name)
            if "deterministic" in kwargs:
                kwargs = {**kwargs, "deterministic": not mode.trains(stage)}
        return next_call(*args, **kwargs)

    has_stats = bool(jax.tree.leaves(variables.get("batch_stats", {})))
    with nn.intercept_methods(set_mode):
        y, moved = model.apply(
            variables,
            x,
            first=first,
            last=last,
            train=mode != EVALUATION,
            rngs={} if rng is None else {"dropout": rng},
            mutable=["batch_stats"] if has_stats else [],
        )
    return y, moved.get("batch_stats", variables.get("batch_stats", {}))

"""How the stages of a model run: training or evaluation mode, stage by stage."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the stages of the models run. Static: a compiled step has one mode.

    Attributes:
        learning: Stages with a trained parameter, with the prefix of their model. They
            run in training mode, all others in evaluation mode.
        batch_stats: 'hold', 'update' or 'update_all', as in `Phase`.
        axis_name: The device axis under pmap; BatchNorm then averages over it.
    """

    learning: frozenset[str] = frozenset()
    batch_stats: str = "hold"
    axis_name: str | None = None

    def trains(self, stage: str) -> bool:
        """Returns whether a stage runs in training mode (dropout, stochastic depth)."""
        return self.batch_stats == "update_all" or stage in self.learning

    def moves(self, stage: str) -> bool:
        """Returns whether the BatchNorms of a stage use and move batch statistics."""
        return self.batch_stats != "hold" and self.trains(stage)


EVALUATION = Mode()


def model_key(rng: jax.Array, prefix: str) -> jax.Array:
    """Returns the random key of one model; it does not depend on the other models."""
    return jax.random.fold_in(rng, zlib.crc32(prefix.encode())) if prefix else rng


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
    """Returns the output of a model and its updated batch statistics.

    The mode of every stage is set here, for any model: an interceptor rewrites the
    `use_running_average` and `deterministic` arguments of BatchNorm and dropout. It sees
    paths within this one apply only, so the model's prefix is added.

    Args:
        model: The model.
        prefix: Prefix of the model's stages in the mode.
        variables: 'params' and 'batch_stats' of this model.
        x: Input of stage `first`.
        mode: How the stages run.
        first: The stage to begin with; None is the first.
        last: The stage to end with; None is the last.
        rng: Key for dropout; None runs without dropout.
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

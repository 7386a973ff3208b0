"""What all models share: running some of their stages, and normalising."""

from typing import Any

import flax.linen as nn
import jax


def run_stages(
    model: nn.Module, x: Any, *, first: str | None, last: str | None, train: bool
) -> Any:
    """Returns `x` after the stages from `first` to `last`, both included.

    Args:
        model: Has `stages`, and a submodule of each of these names.
        x: Input of stage `first`; whatever passes between stages is a pytree.
        first: None is the model's first stage.
        last: None is the model's last stage.
        train: Whether dropout and BatchNorm run as in training, where nothing sets it
            stage by stage.
    """
    names: tuple[str, ...] = model.stages  # type: ignore[attr-defined]
    start = 0 if first is None else names.index(first)
    stop = len(names) if last is None else names.index(last) + 1
    for name in names[start:stop]:
        x = getattr(model, name)(x, train=train)
    return x


class GlobalPool(nn.Module):
    """The mean over all places; a stage of its own, so that maps stay reachable."""

    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool) -> jax.Array:
        """Returns features [B, C]."""
        del train
        return x_BxHxWxC.mean(axis=(1, 2))


def batch_norm(
    dtype: Any,
    param_dtype: Any,
    name: str | None = None,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> nn.BatchNorm:
    """Returns a BatchNorm whose mode is given at the call, as the policy of a phase needs.

    Momentum and epsilon are torch's (0.1 there is 0.9 here). The running variance is that
    of the batch without Bessel's correction, unlike torch's.
    """
    return nn.BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )

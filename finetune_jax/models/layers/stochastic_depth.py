"""Stochastic depth: residual blocks that are left out at random in training.

Source: Huang et al. 2016, with the rule of linear decay; a mask for every example, and
what is kept divided by its chance, as timm's `drop_path` has it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax

from finetune_jax.core.errors import UserError


def stage_rates(last: float, blocks: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Returns the rates of the blocks of each stage, from 0 in the first to `last`.

    >>> stage_rates(0.5, (2, 1))
    ((0.0, 0.25), (0.5,))

    Args:
        last: Rate of the last block.
        blocks: Of each stage.

    Raises:
        UserError: `last` is not in [0, 1).
    """
    if not 0 <= last < 1:
        raise UserError(f"config.model.stochastic_depth: {last} is not in [0, 1)")
    steps = max(sum(blocks) - 1, 1)
    starts = [sum(blocks[:stage]) for stage in range(len(blocks))]
    return tuple(
        tuple(last * (start + block) / steps for block in range(count))
        for start, count in zip(starts, blocks)
    )


def drop_residual(residual: jax.Array, rate: float, *, train: bool) -> jax.Array:
    """Returns the residual of a block, zero for a share `rate` of the examples.

    To be called in a compact module; it has no parameters.

    Args:
        residual: Of maps [B, H, W, C] or of tokens [B, T, D].
        rate: The share.
        train: Whether any is dropped.
    """
    if not rate:
        return residual
    drop = nn.Dropout(rate, broadcast_dims=tuple(range(1, residual.ndim)))
    return drop(residual, deterministic=not train)

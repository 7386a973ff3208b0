"""Stochastic depth: residuals are dropped at random in training.

Source: Huang et al. 2016, with linear decay. Each example has its own mask, and a kept
residual is divided by its probability, as in timm's `drop_path`.
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
        blocks: Number of blocks of each stage.

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

    Must be called in a compact module.

    Args:
        residual: Maps [B, H, W, C] or tokens [B, T, D].
        rate: Share of the examples.
        train: Whether residuals are dropped.
    """
    if not rate:
        return residual
    drop = nn.Dropout(rate, broadcast_dims=tuple(range(1, residual.ndim)))
    return drop(residual, deterministic=not train)

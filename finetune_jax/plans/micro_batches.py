"""Checks that micro-batches and devices divide a batch."""

from collections.abc import Sequence
from typing import Any

from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.plans.phase import Phase

BATCH_SIZE = "config.data.batch_size"


def check_batch(
    batch_size: int,
    plan: Sequence[Phase],
    devices: int,
    key: str = BATCH_SIZE,
    *,
    mix: Sequence[Any] = (),
) -> None:
    """Checks that accumulation and devices divide the examples of an update.

    Args:
        batch_size: Examples in one update.
        plan: Phases of the run.
        devices: Devices that share a batch.
        key: Config key that the number of examples comes from.
        mix: `config.data.mix`, for which every device needs whole pairs of examples in
            every micro-batch; empty needs none.

    Raises:
        UserError: Lists every phase in which they do not, or divide a pair.
    """
    raise_if(
        Problem(
            key,
            f"{_divided(batch_size, phase, devices)}; the examples must be divisible by "
            "accumulate_steps * devices",
        )
        for phase in plan
        if batch_size % (phase.accumulate_steps * devices)
    )
    raise_if(
        Problem(
            key,
            f"{_divided(batch_size, phase, devices)}; config.data.mix needs an even "
            "number of examples on every device in every micro-batch",
        )
        for phase in plan
        if mix and batch_size // (phase.accumulate_steps * devices) % 2
    )


def _divided(batch_size: int, phase: Phase, devices: int) -> str:
    return (
        f"{batch_size} examples in {phase.accumulate_steps} micro-batches over "
        f"{devices} devices in phase {phase.name!r}"
    )

"""Checks that micro-batches and devices divide a batch."""

from collections.abc import Sequence
from typing import Any

from finetune_jax.core.errors import problems_error
from finetune_jax.plans.phase import Phase


def check_pairs(
    entries: Sequence[Any], batch_size: int, plan: Sequence[Phase], devices: int
) -> None:
    """Checks that every device gets whole pairs in every micro-batch.

    Args:
        entries: `config.data.mix`.
        batch_size: Divided by micro-batches and devices.
        plan: All phases.
        devices: Of the run.

    Raises:
        UserError: Lists every phase in which a pair would be torn.
    """
    problems = [
        f"phase {phase.name!r}: {batch_size} examples in {phase.accumulate_steps} "
        f"micro-batches over {devices} devices"
        for phase in plan
        if entries and batch_size // (phase.accumulate_steps * devices) % 2
    ]
    if problems:
        raise problems_error(
            "config.data.batch_size: data.mix needs an even number of examples on every "
            "device in every micro-batch:",
            problems,
        )


def check_batch(
    batch_size: int,
    plan: tuple[Phase, ...],
    devices: int,
    whose: str = "config.data.batch_size",
) -> None:
    """Checks that devices and accumulation divide the batch.

    Args:
        batch_size: Number of examples in one update.
        plan: Phases of the run.
        devices: Number of devices that a batch is divided among.
        whose: What the message blames.

    Raises:
        UserError: Lists every phase in which they do not.
    """
    problems = [
        f"phase {phase.name!r}: {batch_size} examples in {phase.accumulate_steps} "
        f"micro-batches over {devices} devices"
        for phase in plan
        if batch_size % (phase.accumulate_steps * devices)
    ]
    if problems:
        raise problems_error(
            f"{whose} must be divided by accumulate_steps * devices:",
            problems,
        )

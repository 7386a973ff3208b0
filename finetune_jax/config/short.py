"""A short version of a config: the same model, task and phases, few updates and data."""

import math
import re

from finetune_jax.config.parallel import LAUNCH
from finetune_jax.config.schema import Config

STEPS = 10
EVALUATION_EVERY, CHECKPOINT_EVERY = 4, 3
EXAMPLES = 256
LEAST_BATCH, EVALUATION_BATCH = 8, 32
# The most virtual devices that the processes of a short run have together.
MOST_DEVICES = 8


def device_count(config: Config) -> int:
    """Returns the number of devices, at least two, that a short run needs.

    It is the product of the mesh axes other than 'data', if that is even and small.
    """
    needed = config.parallel.fsdp * config.parallel.model
    return needed if needed % 2 == 0 and needed <= MOST_DEVICES else 2


def needed_devices(config: Config) -> int:
    """Returns the least number of devices that a run needs."""
    parallel = config.parallel
    return parallel.devices or parallel.fsdp * parallel.model


def short_overrides(
    config: Config, devices: int, *, small: bool = True
) -> dict[str, str]:
    """Returns the overrides that make a run short, as {key: text}.

    Every phase has an evaluation and several checkpoints inside. Batches are smaller, but
    divide into the same micro-batches.

    Args:
        config: The whole config.
        devices: Number of devices of the short run.
        small: Whether batches and splits are reduced, too.
    """
    found = {
        "evaluate.every_steps": EVALUATION_EVERY,
        "evaluate.every_epochs": None,
        "checkpoint.every_steps": CHECKPOINT_EVERY,
        "report.every_steps": 1,
        "report.tensorboard": False,
        "report.wandb": None,
        "parallel.devices": devices,
        "init.fisher_examples": min(config.init.fisher_examples, EXAMPLES),
    }
    if config.evaluate.cka:
        found["evaluate.cka"] = min(config.evaluate.cka, EXAMPLES)
    if devices % (config.parallel.fsdp * config.parallel.model):
        found |= {"parallel.fsdp": devices, "parallel.model": 1}
    found |= {f"parallel.{name}": None for name in LAUNCH}  # It is on one machine.
    for index, phase in enumerate(config.plan):
        steps = min(phase.steps or STEPS, STEPS)
        found[f"plan[{index}].steps"] = steps
        found[f"plan[{index}].epochs"] = None
        found[f"plan[{index}].warmup_steps"] = min(phase.warmup_steps, steps // 2)
    if small:
        found |= _sizes(config, devices) | _splits(config)
    return {key: str(value) for key, value in found.items()}


def _sizes(config: Config, devices: int) -> dict[str, int]:
    """Returns the sizes of batches."""
    parts = math.lcm(*(phase.accumulate_steps for phase in config.plan)) * devices
    domains = max(len(config.data.domains), 1)
    batch = math.ceil(LEAST_BATCH * domains / parts) * parts
    return {
        "data.batch_size": min(config.data.batch_size, batch),
        "evaluate.batch_size": min(config.evaluate.batch_size, EVALUATION_BATCH),
    }


def _splits(config: Config) -> dict[str, str]:
    """Returns the splits, those that are named whole cut to their first examples."""
    places = {"data": config.data} | {
        f"data.domains[{index}]": domain
        for index, domain in enumerate(config.data.domains)
    }
    found = {}
    for place, section in places.items():
        for name in ("train", "validation", "test"):
            split = section[name]
            # Counts and shares of classes could not be met by few examples.
            is_chosen = name == "train" and (
                section["per_class"] or section["sampling"] == "balanced"
            )
            if split and re.fullmatch(r"\w+", split) and not is_chosen:
                found[f"{place}.{name}"] = f"{split}[:{EXAMPLES}]"
    return found

"""The strict merge of weights into a model: what does not fit is an error, all at once."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from finetune_jax.errors import problems_error
from finetune_jax.lookup import closest
from finetune_jax.pretrained.addresses import Weights
from finetune_jax.trees import like, named


def load_weights(
    variables: Mapping[str, Any],
    weights: Weights,
    *,
    fresh: Sequence[str] = (),
    adapt_input: bool = False,
    stem: str = "",
) -> dict[str, Any]:
    """Returns `variables` with every leaf taken from the weights.

    Args:
        variables: 'params' and 'batch_stats' at their initial values.
        weights: In this project's layout: `params/...` and `batch_stats/...`.
        fresh: Regexes of the names, without 'params/', that keep their initial value.
        adapt_input: Fits the kernels of stage `stem` to another number of channels:
            their mean over the channels, so that grey images give what they gave.
        stem: The model's first stage.

    Raises:
        UserError: Lists every leaf that the weights lack or have in another shape, every
            tensor that is not used, and every regex in `fresh` that matches nothing.
    """
    saved = weights.tensors
    names = named(dict(variables))
    problems, used = [], set()

    def is_fresh(name: str) -> bool:
        short = name.partition("/")[2]
        return any(re.fullmatch(pattern, short) for pattern in fresh)

    merged = {}
    for name, leaf in names.items():
        merged[name] = leaf
        if is_fresh(name):
            continue
        if name not in saved:
            near = closest(name, saved.keys() - names.keys())
            problems.append(f"{name}: not in the weights{near}")
            continue
        used.add(name)
        value = saved[name]
        in_stem = name.startswith(f"params/{stem}/") and value.ndim == 4
        if adapt_input and in_stem and value.shape != leaf.shape:
            value = _other_channels(value, leaf.shape[2])
        if value.shape != leaf.shape:
            problems.append(f"{name}: model {leaf.shape}, weights {value.shape}")
        merged[name] = np.asarray(value, leaf.dtype)
    problems += [
        f"{name}: in the weights, but not in the model{closest(name, names)}"
        for name in sorted(saved.keys() - used)
        if not is_fresh(name)
    ]
    everything = [name.partition("/")[2] for name in (*names, *saved)]
    problems += [
        f"config.init.fresh: {pattern!r} matches nothing{closest(pattern, everything)}"
        for pattern in fresh
        if not any(re.fullmatch(pattern, name) for name in everything)
    ]
    if problems:
        raise problems_error(
            f"{weights.address} does not fit the model, {len(problems)} problems:",
            problems,
            "Name what should keep its initial value in config.init.fresh, such as "
            "('head/.*',); config.init.input_channels='adapt' fits a stem to other "
            "channels.",
        )
    return jax.tree.map(np.asarray, like(dict(variables), merged))


def _other_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    mean = kernel.mean(axis=2, keepdims=True) * (kernel.shape[2] / channels)
    return np.repeat(mean, channels, axis=2)

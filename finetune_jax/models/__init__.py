"""Models: one family a file, each with `MODELS`, its constructors by name.

A model is a Linen module with an ordered tuple `stages`, made of one submodule a stage,
and takes `classes`, `head`, `dtype` and `param_dtype` besides arguments of its own. It
knows no task, no config and no data.
"""

import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from finetune_jax import lookup


def make_model(name: str, arguments: Mapping[str, Any], **given: Any) -> nn.Module:
    """Returns a model by its name.

    Args:
        name: A key of `MODELS` in one of the modules here.
        arguments: What `config.model` says besides the name.
        **given: `classes`, `dtype`, `param_dtype`.

    Raises:
        UserError: No such model, or arguments that it does not take.
    """
    constructors = {
        model: constructor
        for module in lookup.modules(sys.modules[__name__]).values()
        for model, constructor in getattr(module, "MODELS", {}).items()
    }
    constructor = lookup.choose(constructors, name, "config.model.name")
    arguments = {k: v for k, v in arguments.items() if not k.startswith("lora_")}
    return lookup.call(constructor, arguments, "config.model", **given)

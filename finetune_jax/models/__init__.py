"""Models: one family a file, each with `MODELS`, its constructors by name.

A model is a Linen module with an ordered tuple `stages`, made of one submodule a stage,
and takes `classes`, `head`, `dtype` and `param_dtype` besides arguments of its own. It
knows no task, no config and no data.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.models.peft.lora import with_lora


def constructors() -> dict[str, tuple[str, Callable]]:
    """Returns the module and the constructor of every model, by the model's name."""
    return {
        model: (family, constructor)
        for family, module in registry.modules(sys.modules[__name__]).items()
        for model, constructor in getattr(module, "MODELS", {}).items()
    }


def make_model(
    name: str,
    arguments: Mapping[str, Any],
    *,
    around: Callable[[nn.Module], Any] = lambda module: module,
    **given: Any,
) -> nn.Module:
    """Returns a model by its name.

    Args:
        name: A key of `MODELS` in one of the modules here.
        arguments: What `config.model` says besides the name.
        around: Makes another of the model, before it gets low-rank updates.
        **given: `classes`, `dtype`, `param_dtype`.

    Raises:
        UserError: No such model, or arguments that it does not take.
    """
    known = {model: made for model, (_, made) in constructors().items()}
    constructor = registry.choose(known, name, "config.model.name")
    lora = {k: v for k, v in arguments.items() if k.startswith("lora_")}
    arguments = {k: v for k, v in arguments.items() if k not in lora}
    module = registry.call(constructor, arguments, "config.model", **given)
    return registry.call(with_lora, lora, "config.model", module=around(module))


def dtypes(precision: str) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` of a model; parameters have 32 bits or 64.

    Args:
        precision: In which the model computes: 'float32', 'bfloat16' or 'float64'.
    """
    wide = "float64" if precision == "float64" else "float32"
    return {"dtype": jnp.dtype(precision), "param_dtype": jnp.dtype(wide)}


def model_of(
    described: Mapping[str, Any], *, classes: int, precision: str, **given: Any
) -> nn.Module:
    """Returns the model that a section like `config.model` describes.

    Args:
        described: Its name, and arguments; `classes` there is not looked at.
        classes: Logits.
        precision: As `dtypes` takes it.
        **given: Other arguments that are not the section's.

    Raises:
        UserError: No such model, or arguments that it does not take.
    """
    apart = ("name", "classes")
    arguments = {key: value for key, value in described.items() if key not in apart}
    given = {**given, **dtypes(precision)}
    return make_model(described["name"], arguments, classes=classes, **given)


def stages_of(name: str, arguments: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Returns the stages of a model that have parameters, in order: the last is the head.

    Args:
        name: As `make_model` takes it.
        arguments: What `config.model` says besides; None is nothing.

    Raises:
        UserError: No such model, or arguments that it does not take.

    >>> stages_of("mlp", {"hidden": (8, 8)})
    ('stage1', 'stage2', 'head')
    """
    apart = ("name", "classes", "head")
    own = {
        key: value
        for key, value in dict(arguments or {}).items()
        if key not in apart and not key.startswith("lora_")
    }
    # A config file asks for this. Its initialisation by shape would tell as well, but
    # starts jax, and the number of host threads is set only once the config is known.
    model: Any = make_model(name, {**own, "head": {}}, classes=1).bind({})
    return tuple(
        stage
        for stage in model.stages
        if getattr(getattr(model, stage), "has_parameters", True)
    )

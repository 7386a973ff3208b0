"""Linen models in named stages: one family a file, each with `MODELS`.

`MODELS` has the constructors by name. A model has an ordered tuple `stages` and one
submodule for each stage. It takes `classes`, `head`, `dtype` and `param_dtype` besides
arguments of its own, and knows no task, no config and no data.

A folder `finetune_jax/models/` elsewhere on `sys.path`, without `__init__.py`, adds the
families of its modules.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from finetune_jax.core import registry
from finetune_jax.models.peft.lora import with_lora

__path__ = registry.open_path(__name__, __path__)


def constructors() -> dict[str, tuple[str, Callable]]:
    """Returns the family's module name and the constructor of every model, by its name."""
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
        arguments: Arguments of the model, as `config.model` has them besides the name.
        around: Wraps the model, before it gets low-rank updates.
        **given: Arguments that are not the user's: `classes`, `dtype`, `param_dtype`.

    Raises:
        UserError: The model is unknown, or does not take the arguments.
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
        precision: Precision of the computation: 'float32', 'bfloat16' or 'float64'.
    """
    wide = "float64" if precision == "float64" else "float32"
    return {"dtype": jnp.dtype(precision), "param_dtype": jnp.dtype(wide)}


def model_of(
    described: Mapping[str, Any], *, classes: int, precision: str, **given: Any
) -> nn.Module:
    """Returns the model that a section like `config.model` describes.

    Args:
        described: Name and arguments of the model; its `classes` is ignored.
        classes: Number of logits.
        precision: Precision of the computation, as in `dtypes`.
        **given: Further arguments that are not the user's.

    Raises:
        UserError: The model is unknown, or does not take the arguments.
    """
    apart = ("name", "classes")
    arguments = {key: value for key, value in described.items() if key not in apart}
    given = {**given, **dtypes(precision)}
    return make_model(described["name"], arguments, classes=classes, **given)


def stages_of(name: str, arguments: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Returns the stages of a model that have parameters, in order: the last is the head.

    Args:
        name: Name of the model.
        arguments: Arguments of the model, as `config.model` has them; None for none.

    Raises:
        UserError: The model is unknown, or does not take the arguments.

    >>> stages_of("mlp", {"hidden": (8, 8)})
    ('stage1', 'stage2', 'head')
    """
    apart = ("name", "classes", "head")
    own = {
        key: value
        for key, value in dict(arguments or {}).items()
        if key not in apart and not key.startswith("lora_")
    }
    # Config files call this. Initialising the model by shape would start jax, but the
    # number of host threads is set only once the config is known.
    model: Any = make_model(name, {**own, "head": {}}, classes=1).bind({})
    return tuple(
        stage
        for stage in model.stages
        if getattr(getattr(model, stage), "has_parameters", True)
    )

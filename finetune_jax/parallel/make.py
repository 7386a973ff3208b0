"""Makes the devices that `config.parallel` asks for."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.core.pytrees import named
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.mesh import MeshDevices
from finetune_jax.parallel.pmap import PmapDevices
from finetune_jax.parallel.sharding import (
    AXES,
    DATA,
    KEY,
    MIB,
    Sharding,
    parameter_problems,
    rule_problems,
)

_PLANNED: contextvars.ContextVar[Sequence[Any] | None] = contextvars.ContextVar(
    "devices to plan for", default=None
)


@contextlib.contextmanager
def devices_to_plan_for(devices: Sequence[Any]) -> Iterator[None]:
    """Has `make_devices` take devices that can be compiled for, but not computed on."""
    before = _PLANNED.set(devices)
    try:
        yield
    finally:
        _PLANNED.reset(before)


def make_devices(asked: Any) -> Devices:
    """Returns the devices that `config.parallel` asks for.

    Args:
        asked: Section `config.parallel`.

    Raises:
        UserError: More devices than there are, a number that `fsdp` * `model` does not
            divide, sharding rules that are invalid whatever the model is.
    """
    mode, fsdp, model = asked.mode, asked.fsdp, asked.model
    there = _PLANNED.get() or jax.devices()
    count = len(there) if asked.devices is None else asked.devices
    problems = rule_problems(asked.sharding)
    if count > len(there):
        text = f"{count}, but there are {len(there)} devices"
        problems.append(Problem("config.parallel.devices", text))
    elif count < len(there) and jax.process_count() > 1:
        text = (
            f"{count}, but {jax.process_count()} processes have {len(there)} devices, and "
            "all of them are used; start fewer processes"
        )
        problems.append(Problem("config.parallel.devices", text))
    for name, size in (("fsdp", fsdp), ("model", model)):
        key = f"config.parallel.{name}"
        if size < 1:
            problems.append(Problem(key, f"{size}; more than 0 is needed"))
        elif mode == "pmap" and size > 1:
            problems.append(Problem(key, "pmap repeats all parameters; use jit"))
        elif count % size:
            problems.append(Problem(key, f"{size} does not divide {count} devices"))
    if not problems and count % (fsdp * model):
        text = f"{model}, but {count} devices are not a multiple of fsdp * model = "
        problems.append(Problem("config.parallel.model", f"{text}{fsdp} * {model}"))
    if mode == "pmap" and not problems:
        problems += [
            Problem(f"{KEY}[{index}]", "pmap repeats all parameters; use jit")
            for index, (_, spec) in enumerate(asked.sharding)
            if isinstance(spec, tuple) and DATA in spec
        ]
    raise_if(problems)
    mesh = jax.make_mesh(
        (count // (fsdp * model), fsdp, model),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=there[:count],
    )
    if mode == "pmap":
        return PmapDevices(mesh=mesh)
    rules = Sharding(rules=asked.sharding, min_bytes=asked.fsdp_min_mb * MIB)
    return MeshDevices(mesh=mesh, rules=rules)


def for_parameters(devices: Devices, params: Any, heads: Mapping[str, int]) -> Devices:
    """Returns devices whose sharding rules know the parameters of the run.

    Args:
        devices: Devices from `make_devices`.
        params: Tree of the parameters or of their shapes.
        heads: Number of attention heads of each stage that has some.

    Raises:
        UserError: Lists the sharding rules that do not fit the parameters.
    """
    if not isinstance(devices, MeshDevices):
        return devices
    shapes = {name: leaf.shape for name, leaf in named(params).items()}
    rules = devices.rules
    raise_if(parameter_problems(rules.rules, devices.mesh.shape, shapes, heads))
    rules = dataclasses.replace(rules, names=frozenset(shapes))
    return dataclasses.replace(devices, rules=rules)

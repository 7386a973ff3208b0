"""Makes the devices that `config.parallel` asks for."""

from typing import Any

import jax
from jax.sharding import AxisType

from finetune_jax.core.errors import UserError
from finetune_jax.parallel.devices import Devices
from finetune_jax.parallel.mesh import MeshDevices
from finetune_jax.parallel.pmap import PmapDevices


def make_devices(asked: Any) -> Devices:
    """Returns the devices that `config.parallel` asks for.

    Args:
        asked: Section `config.parallel`.

    Raises:
        UserError: More devices than there are, or a number that `fsdp` does not divide.
    """
    mode, devices, fsdp = asked.mode, asked.devices, asked.fsdp
    there = jax.devices()
    count = len(there) if devices is None else devices
    if count > len(there):
        raise UserError(
            f"config.parallel.devices: {count}, but there are {len(there)} devices"
        )
    if mode == "pmap" and fsdp > 1:
        raise UserError("config.parallel.fsdp: pmap repeats all parameters; use jit")
    if count % fsdp:
        raise UserError(f"config.parallel.fsdp: {fsdp} does not divide {count} devices")
    mesh = jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=there[:count],
    )
    return PmapDevices(mesh=mesh) if mode == "pmap" else MeshDevices(mesh=mesh)

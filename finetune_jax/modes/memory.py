"""The part of `--mode=plan` on memory and communication, for more than one device."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.backend
from rich.console import Console
from rich.table import Table

from finetune_jax.config.schema import Parallel
from finetune_jax.core.errors import Problem, UserError
from finetune_jax.parallel.collectives import Traffic
from finetune_jax.parallel.make import devices_to_plan_for
from finetune_jax.training.setup import Setup
from finetune_jax.training.updates.memory import (
    UpdateMemory,
    memory_limit,
    savings,
    update_memory,
)

# Virtual devices, for which programs are compiled; each has threads of its own.
MOST_PLANNED = 1024
# Without these the compiler for TPUs asks the network for the TPU that it runs on.
_NO_TPU_HOST = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


@contextlib.contextmanager
def planned_devices(asked: Parallel) -> Iterator[None]:
    """Has plans be for devices that need not be there, and prints a line about them.

    Args:
        asked: Section `config.parallel`.

    Raises:
        UserError: There is no such topology, or no compiler for it.
    """
    if asked.topology is not None:
        devices = _topology(asked.topology)
        # A program in the cache could only be read by the devices that it is for.
        jax.config.update("jax_enable_compilation_cache", False)
        print(f"devices  {len(devices)} of the topology {asked.topology}")
        with devices_to_plan_for(devices):
            yield
        return
    if asked.devices is not None and 1 < asked.devices <= MOST_PLANNED:
        if _make_cpu_devices(asked.devices):
            print(f"devices  {asked.devices} CPU devices stand for those of the run")
    yield


def _make_cpu_devices(count: int) -> bool:
    """Returns whether jax has made CPU devices in place of devices that are not there.

    If jax has started already, there are the devices that there are.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return False
    if len(jax.devices()) < count:  # There are GPUs or TPUs, but too few.
        jax.extend.backend.clear_backends()
        jax.config.update("jax_platforms", "cpu")
    return jax.default_backend() == "cpu"


def _topology(name: str) -> list[Any]:
    """Returns the devices of a TPU topology, which can only be compiled for."""
    key = "config.parallel.topology"
    if importlib.util.find_spec("libtpu") is None:
        text = (
            f"{name!r} needs the compiler for TPUs, which is not installed; "
            ".venv/bin/python -m pip install libtpu (700 MB)"
        )
        raise UserError(Problem(key, text))
    from jax.experimental import topologies

    # A process that has these variables later would be taken for one on a TPU.
    added = [variable for variable in _NO_TPU_HOST if variable not in os.environ]
    os.environ.update({variable: _NO_TPU_HOST[variable] for variable in added})
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu")
    except Exception as error:  # The compiler has no class of its own for it.
        reason = str(error).partition("\n")[0]
        text = f"no topology {name!r}, such as 'v5e:2x4': {reason}"
        raise UserError(Problem(key, text)) from error
    finally:
        for variable in added:
            del os.environ[variable]
    return list(found.devices)


def print_memory(setup: Setup) -> None:
    """Prints memory and communication of the update of each phase.

    For one device nothing is compiled and printed, unless the config says how much memory
    it has.
    """
    devices, limit = setup.devices, memory_limit(setup)
    if devices.count == 1 and setup.config.parallel.device_memory_gb is None:
        return
    table = Table(show_lines=True)
    for title in (
        "phase", "parameters", "optimizer state", "other state", "batch", "temporaries",
        "sum",
    ):  # fmt: skip
        table.add_column(title, overflow="fold")
    names: dict[object, list[str]] = {}
    found: dict[object, tuple[int, UpdateMemory]] = {}
    for index, phase in enumerate(setup.phases):
        if phase.compiled.probe is None:  # A fit has no updates.
            names.setdefault(phase.program, []).append(phase.phase.name)
            if phase.program not in found:
                found[phase.program] = index, update_memory(setup, index)
    for program, (_, memory) in found.items():
        parts = (
            memory.parameters, memory.optimizer, memory.other, memory.batch,
            memory.temporaries + memory.results, memory.total,
        )  # fmt: skip
        table.add_row(", ".join(names[program]), *map(_size, parts))
    sizes = " x ".join(f"{size} {axis}" for axis, size in devices.mesh.shape.items())
    print(f"memory   of an update on each device of {devices.count} ({sizes})")
    if devices.platform == "cpu":
        print(
            "         temporaries are those of the CPU compiler; others need more or less"
        )
    console = Console(soft_wrap=True)
    Console(width=None if console.is_terminal else 160).print(table)
    for program, (_, memory) in found.items():
        print(f"traffic  {', '.join(names[program])}: {_traffic(memory.traffic)}")
    for index, memory in found.values():
        if limit is not None and memory.total > limit:
            _print_savings(setup, index, memory, limit)


def _print_savings(
    setup: Setup, index: int, memory: UpdateMemory, limit: float
) -> None:
    """Prints how much too large a phase is, and what saves memory."""
    print(
        f"warning: phase {setup.plan[index].name!r} needs {_size(memory.total)} on "
        f"each device, which has {_size(limit)}; changes that save memory:"
    )
    for saving in savings(setup, index, memory):
        about = "about " if saving.is_estimate else ""
        fits = "" if memory.total - saving.nbytes > limit else ", which is enough"
        print(f"  {saving.change}: {about}{_size(saving.nbytes)} less{fits}")


def _traffic(traffic: dict[str, Traffic]) -> str:
    """Returns the collectives of an update in words."""
    parts = [
        f"{found.count:,} {kind} ({_size(found.nbytes)})"
        for kind, found in traffic.items()
    ]
    return f"{', '.join(parts) or 'no collectives'} in an update, results on one device"


def _size(nbytes: float) -> str:
    """Returns a number of bytes with its unit.

    >>> _size(131_400_000), _size(900)
    ('131.4 MB', '0.9 kB')
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, factor = next((u for u in units if nbytes >= u[1]), units[-1])
    return f"{nbytes / factor:.1f} {unit}"

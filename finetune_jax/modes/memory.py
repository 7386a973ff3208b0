"""The part of `--mode=plan` on memory and communication, for more than one device."""

import jax
import jax.extend.backend
from rich.console import Console
from rich.table import Table

from finetune_jax.config.schema import Parallel
from finetune_jax.parallel.collectives import Traffic
from finetune_jax.training.setup import Setup
from finetune_jax.training.updates.memory import (
    UpdateMemory,
    memory_limit,
    savings,
    update_memory,
)

# Virtual devices, for which programs are compiled; each has threads of its own.
MOST_PLANNED = 1024


def plan_devices(asked: Parallel) -> str | None:
    """Has jax make CPU devices in place of devices that are not there.

    If jax has started already, there are the devices that there are.

    Args:
        asked: Section `config.parallel`.

    Returns:
        A line that says so; None if the devices of the run are there.
    """
    if asked.devices is None or not 1 < asked.devices <= MOST_PLANNED:
        return None
    try:
        jax.config.update("jax_num_cpu_devices", asked.devices)
    except RuntimeError:
        return None
    if len(jax.devices()) < asked.devices:  # There are GPUs or TPUs, but too few.
        jax.extend.backend.clear_backends()
        jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != "cpu":
        return None
    return f"devices  {asked.devices} CPU devices stand for those of the run"


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
    if devices.mesh.devices.flat[0].platform == "cpu":
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

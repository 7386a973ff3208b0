"""The section `config.parallel`."""

import dataclasses

from finetune_jax.config.fields import Section, key

# Keys that say how a process was started, not what it computes.
LAUNCH = ("coordinator", "processes", "process", "local_devices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Section):
    """Devices."""

    mode: str = key("jit", "How updates are distributed.", choices=("jit", "pmap"))
    devices: int | None = key(None, "Number of devices; None is all.", above=0)
    fsdp: int = key(1, "Devices over which parameters are sharded.", above=0)
    model: int = key(
        1, "Devices that compute one layer together, divided by `sharding`.", above=0
    )
    sharding: tuple = key(
        ((".*", "fsdp"),),
        "Sharding rules: pairs (regex over parameter names, spec); first match wins.",
    )
    fsdp_min_mb: float = key(
        4.0, "MiB of the smallest array that the spec 'fsdp' divides.", least=0
    )
    device_memory_gb: float | None = key(
        None, "Memory of a device for --mode=plan; None asks the device.", above=0
    )
    topology: str | None = key(
        None, "TPU that --mode=plan compiles for, such as 'v5e:2x4'; needs libtpu."
    )
    steps_per_call: int | None = key(
        None, "Updates in one compiled call; None is as many as take 0.2 s.", above=0
    )
    coordinator: str | None = key(
        None, "Address HOST:PORT of process 0; None is that of the cluster."
    )
    processes: int | None = key(
        None,
        "Number of processes; None is as many as the cluster has started.",
        above=0,
    )
    process: int | None = key(None, "Index of this process, from 0.", least=0)
    local_devices: tuple | None = key(
        None, "Ids of the accelerators of this process; None is all of its share."
    )
    join_timeout_s: float = key(
        300.0, "Seconds in which all processes must have joined.", above=0
    )
    hang_timeout_s: float = key(
        60.0,
        "Seconds without progress after which several processes end: of an update, the "
        "reading of a batch, or a machine that does not answer.",
        above=0,
    )
    work_timeout_s: float = key(
        1800.0,
        "The same for work without signs of progress, such as compiling or opening data.",
        above=0,
    )

"""Joins the processes of a run before jax starts: from the config, or from a cluster."""

import contextlib
import dataclasses
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_jax.core.errors import Problem, UserError, raise_if
from finetune_jax.parallel import meeting, processes, watch

# Variables that a task of SLURM has, if srun has started it.
SLURM = (
    "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_LOCALID",
)  # fmt: skip
VIRTUAL_DEVICES = "--xla_force_host_platform_device_count="
# Seconds after the limit of joining in which jax would end the process by a signal.
_JAX_LATER_S = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process was started.

    Attributes:
        started_by: 'config.parallel', 'JAX_*', 'SLURM', 'Open MPI' or 'TPU'; '' for one
            process alone.
        coordinator: Address HOST:PORT of process 0; None leaves it to jax.
        processes: Number of processes; None leaves it to jax, as on TPU.
        process: Index of this process; None leaves it to jax.
        local_devices: Ids of the accelerators of this process; None is all.
        notes: Lines for a person.
    """

    started_by: str = ""
    coordinator: str | None = None
    processes: int | None = 1
    process: int | None = 0
    local_devices: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Whether the run is this process alone."""
        return self.processes == 1


def launch_of(
    asked: Any, environment: Mapping[str, str], *, tpu: bool = True
) -> Launch:
    """Returns how this process was started.

    The config comes first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    and JAX_LOCAL_DEVICE_IDS, then what SLURM, Open MPI or a TPU host says.

    Args:
        asked: Section `config.parallel`.
        environment: Environment variables.
        tpu: Whether to look for a TPU host, which imports jax.

    Raises:
        UserError: Some of the values are missing, or are not numbers.
    """
    problems: list[Problem] = []

    def number(key: str, variable: str) -> int | None:
        value = getattr(asked, key)
        if value is not None or variable not in environment:
            return value
        if environment[variable].isdigit():
            return int(environment[variable])
        problems.append(Problem(variable, f"{environment[variable]!r} is no number"))
        return None

    given = {
        "coordinator": asked.coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
        "processes": number("processes", "JAX_NUM_PROCESSES"),
        "process": number("process", "JAX_PROCESS_ID"),
    }
    own = asked.local_devices
    if own is None and (ids := environment.get("JAX_LOCAL_DEVICE_IDS")):
        parts = [part.strip() for part in ids.split(",")]
        if all(part.isdigit() for part in parts):
            own = tuple(map(int, parts))
        else:
            text = f"{ids!r}; numbers with commas between them are needed"
            problems.append(Problem("JAX_LOCAL_DEVICE_IDS", text))
    cluster = _of_cluster(environment, tpu)
    raise_if(problems)
    if given["processes"] == 1 and not given["process"]:
        return Launch(local_devices=own)
    missing = [key for key, value in given.items() if value is None]
    has_address_only = len(missing) == 2 and given["coordinator"] is not None
    if len(missing) == 3 or (has_address_only and cluster.started_by):
        if own is None:
            own = cluster.local_devices
        # An address alone replaces that of the cluster, whose host names need not resolve.
        address = given["coordinator"]
        return dataclasses.replace(cluster, coordinator=address, local_devices=own)
    if missing:
        raise UserError(
            *[Problem(f"config.parallel.{key}", "missing") for key in missing],
            advice="Several processes need coordinator, processes and process, in the "
            "config or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.",
        )
    in_config = asked.processes is not None
    return Launch(
        started_by="config.parallel" if in_config else "JAX_*",
        local_devices=own,
        **given,
    )


def _of_cluster(environment: Mapping[str, str], tpu: bool) -> Launch:
    """Returns how a cluster has started this process; alone if none has."""
    tasks: str | None
    if "OMPI_COMM_WORLD_SIZE" in environment:
        name, local = "Open MPI", environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")
        count, index = environment["OMPI_COMM_WORLD_SIZE"], "OMPI_COMM_WORLD_RANK"
        tasks = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    elif all(key in environment for key in SLURM):
        name, local = "SLURM", environment["SLURM_LOCALID"]
        count, index = environment["SLURM_NTASKS"], "SLURM_PROCID"
        node = int(environment.get("SLURM_NODEID", "0"))
        tasks = _tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE"), node)
    elif "SLURM_JOB_ID" in environment:
        missing = [key for key in SLURM if key not in environment]
        note = (
            f"SLURM_JOB_ID is set, but not {', '.join(missing)}: srun has not started this "
            "process, so the run has one process"
        )
        return Launch(notes=(note,))
    elif tpu and _is_tpu_host(environment):
        return Launch(started_by="TPU", processes=None, process=None)
    else:
        return Launch()
    if count == "1":
        return Launch()
    return Launch(
        started_by=name,
        processes=int(count),
        process=int(environment[index]),
        local_devices=gpus_of_task(int(local), int(tasks or 1), environment),
        notes=_gpu_notes(name, tasks, environment),
    )


def _gpu_notes(
    name: str, tasks: str | None, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Returns lines about GPUs whose division among the tasks of a node is doubtful."""
    key, count = "config.parallel.local_devices", len(visible_gpus(environment))
    if count and tasks is None:
        return (
            f"{name} does not say how many tasks this node has: each one takes all GPUs "
            f"that it sees, unless {key} is set",
        )
    if count > int(tasks or 1) and count % int(tasks or 1):
        rest = count % int(tasks or 1)
        return (
            f"{tasks} tasks leave {rest} of {count} GPUs of this node idle; see {key}",
        )
    return ()


def _tasks_of_node(text: str | None, node: int) -> str | None:
    """Returns the tasks of a node, from a list such as '2(x3),1'.

    >>> _tasks_of_node("2(x3),1", 2), _tasks_of_node("2(x3),1", 3)
    ('2', '1')
    """
    found: list[str] = []
    for part in text.split(",") if text else ():
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())) is None:
            return None
        found += [match[1]] * int(match[2] or 1)
    return found[node] if node < len(found) else None


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu") not in ("", "tpu"):
        return False
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return running_in_cloud_tpu_vm


def gpus_of_task(
    local: int, tasks: int, environment: Mapping[str, str]
) -> tuple[int, ...] | None:
    """Returns the GPUs of one of several tasks on a node; None if there are none.

    jax by itself gives a task the one GPU of its number, seven of eight being idle where a
    node has one task. Here a task gets all GPUs that it sees, unless all tasks of the node
    see the same ones, which they then divide.

    Args:
        local: Index of the task on its node.
        tasks: Number of tasks on the node.
        environment: Environment variables.
    """
    count = len(visible_gpus(environment))
    if count == 0:
        return None
    bound = {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"} & environment.keys()
    if tasks > 1 and not bound and count >= tasks:
        share = count // tasks
        return tuple(range(local * share, (local + 1) * share))
    return tuple(range(count))


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the GPUs that a process sees, as they stand in CUDA_VISIBLE_DEVICES.

    >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"})
    ('2', '3')
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
        return tuple(map(str, range(count)))
    ids = tuple(part.strip() for part in visible.split(",") if part.strip())
    return ids[: ids.index("-1")] if "-1" in ids else ids  # CUDA ignores the rest.


def virtual_cpu_devices(environment: Mapping[str, str]) -> int:
    """Returns the number of devices that the CPU is divided into."""
    found = re.search(rf"{VIRTUAL_DEVICES}(\d+)", environment.get("XLA_FLAGS", ""))
    given = environment.get("JAX_NUM_CPU_DEVICES") or (found[1] if found else "1")
    if not given.isdigit():
        raise UserError(Problem("JAX_NUM_CPU_DEVICES", f"{given!r} is no number"))
    return int(given)


def join(asked: Any, launch: Launch) -> list[str]:
    """Joins the processes of a run, and returns lines for a person.

    One process whose CPU is divided into several devices joins itself: its reductions over
    devices then have the same order, and so the same bits, as those of several processes.
    It cannot where jax has computed already, as in a notebook.

    Args:
        asked: Section `config.parallel`.
        launch: How this process was started.

    Raises:
        UserError: The processes cannot be joined, or do not fit together.
    """
    devices = virtual_cpu_devices(os.environ)
    if launch.is_alone and (devices == 1 or _has_started()):
        return list(launch.notes)
    # XLA divides reductions by the number of host threads.
    threads = max(int(os.environ.get("NPROC") or 1), devices * (launch.processes or 1))
    os.environ["NPROC"] = str(threads)
    import jax

    # jax would swallow the signals that ask a run to stop.
    jax.config.update("jax_enable_preemption_service", False)
    _standard_output_for_python_only()
    if launch.is_alone:
        address = f"127.0.0.1:{meeting.free_port()}"
        _initialize(address, 1, 0, asked.join_timeout_s, bind=address)
        return list(launch.notes)
    begin, address = time.monotonic(), launch.coordinator or _address_of(launch)
    if address and launch.processes is not None and launch.process is not None:
        who = launch.processes, launch.process
        address = meeting.meet(address, *who, asked.join_timeout_s)
    with _ends_after(asked.join_timeout_s, launch, address):
        _initialize(
            address,
            launch.processes,
            launch.process,
            asked.join_timeout_s,
            local_devices=launch.local_devices,
            hang_s=asked.hang_timeout_s,
        )
    count = processes.count()
    if count == 1:
        return list(launch.notes)
    watch.start(hang_s=asked.hang_timeout_s, work_s=asked.work_timeout_s)
    here = jax.local_device_count()
    found = processes.gathered("devices", here)
    if len(set(found)) > 1:
        lines = [f"process {index} has {there}" for index, there in enumerate(found)]
        raise UserError(
            f"config.parallel: {'; '.join(lines)} devices; all processes need the same "
            "number of devices"
        )
    each = f"{here} device{'s' * (here > 1)} each, {jax.default_backend()}"
    took = f"joined in {time.monotonic() - begin:.1f} s"
    joined = f"{count} processes with {each}, started by {launch.started_by}, {took}"
    return [*launch.notes, joined]


def _has_started() -> bool:
    """Returns whether jax has devices already, with which processes cannot be joined."""
    module = sys.modules.get("jax._src.xla_bridge")
    return module is not None and module.backends_are_initialized()


def leave() -> None:
    """Waits for all processes at the end of a run, and parts from them."""
    if processes.count() == 1:
        return
    processes.wait_for_all("the end of the run")
    watch.stop()
    import jax

    with contextlib.suppress(Exception):  # The run is over; nothing depends on it.
        jax.distributed.shutdown()


def _initialize(
    address: str | None,
    count: int | None,
    index: int | None,
    join_s: float,
    *,
    local_devices: tuple[int, ...] | None = None,
    hang_s: float = 60,
    bind: str | None = None,
) -> None:
    import jax

    if address and bind is None and meeting.is_loopback(address.rpartition(":")[0]):
        bind = address  # Not on the network.
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=local_devices,
            initialization_timeout=int(join_s + _JAX_LATER_S),
            # Our own watch comes first, which says what has happened.
            heartbeat_timeout_seconds=int(hang_s + 30),
            coordinator_bind_address=bind,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"config.parallel: the processes cannot be joined: {error}"
        ) from error


def _address_of(launch: Launch) -> str | None:
    """Returns the address that jax derives from a job of a cluster; None for TPUs."""
    from jax._src import clusters

    known = {"SLURM": clusters.SlurmCluster, "Open MPI": clusters.OmpiCluster}
    if launch.started_by not in known:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return known[launch.started_by].get_coordinator_address(None, port)


@contextlib.contextmanager
def _ends_after(seconds: float, launch: Launch, address: str | None) -> Iterator[None]:
    """Ends the process with a message if a block takes too long, before jax aborts it."""

    def end() -> None:
        print(
            "error: config.parallel.processes: not all processes have joined, started by "
            f"{launch.started_by}, within {seconds:g} s (config.parallel.join_timeout_s); "
            f"all of them must reach {address or 'the first host'}: open the ports "
            "between the hosts",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _standard_output_for_python_only() -> None:
    """Has libraries in C++ write to standard error: gloo reports connections."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(kept, "w", buffering=1, errors="backslashreplace")

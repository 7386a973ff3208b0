"""How a process finds out with which others it runs, before jax starts."""

import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from finetune_jax.core.errors import UserError
from finetune_jax.parallel import meeting
from finetune_jax.parallel.joining import (
    Launch,
    gpus_of_task,
    launch_of,
    virtual_cpu_devices,
)
from finetune_jax.parallel.meeting import meet

NOTHING = {
    "coordinator": None, "processes": None, "process": None, "local_devices": None
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
JAX = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}  # fmt: skip
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def asked(**given):
    return SimpleNamespace(**NOTHING | given)


def test_without_a_cluster_a_process_is_alone():
    assert launch_of(asked(), {}) == Launch()
    assert launch_of(asked(), {}).is_alone


def test_config_and_environment_give_the_same():
    address, count, index = JAX.values()
    given = asked(coordinator=address, processes=int(count), process=int(index))
    of_config, of_environment = launch_of(given, {}), launch_of(asked(), JAX)
    assert of_config.started_by == "config.parallel"
    assert of_environment.started_by == "JAX_*"
    for name in ("coordinator", "processes", "process"):
        assert getattr(of_config, name) == getattr(of_environment, name)
    # The config comes first.
    assert launch_of(asked(process=0), JAX).process == 0


def test_missing_values_are_all_named():
    with pytest.raises(UserError) as error:
        launch_of(asked(processes=2), {})
    assert "config.parallel.coordinator: missing" in str(error.value)
    assert "config.parallel.process: missing" in str(error.value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID: 'two' is no number"):
        launch_of(asked(), JAX | {"JAX_PROCESS_ID": "two"})


def test_clusters_are_recognised():
    slurm = launch_of(asked(), SLURM)
    assert (slurm.started_by, slurm.processes, slurm.process) == ("SLURM", 4, 3)
    mpi = launch_of(asked(), OPEN_MPI)
    assert (mpi.started_by, mpi.processes, mpi.process) == ("Open MPI", 2, 1)
    # Names of nodes need not resolve if an address is given.
    address = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
    assert launch_of(asked(), SLURM | address).coordinator == "10.0.0.1:1234"
    assert launch_of(asked(), SLURM | {"SLURM_NTASKS": "1"}).is_alone
    # Tasks that are runs of their own.
    assert launch_of(asked(processes=1), SLURM).is_alone
    with pytest.raises(UserError, match="config.parallel.coordinator: missing"):
        launch_of(asked(processes=2), SLURM)


def test_a_shell_on_a_node_of_a_job_is_alone_and_says_so():
    shell = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
    found = launch_of(asked(), shell)
    assert found.is_alone and "SLURM_STEP_NODELIST: srun has not" in found.notes[0]


@pytest.mark.parametrize(
    "local, tasks, environment, wanted",
    [
        (0, 1, GPUS, tuple(range(8))),  # jax itself would take the first one.
        (3, 8, GPUS, (3,)),
        (1, 2, GPUS, (4, 5, 6, 7)),
        (1, 2, GPUS | {"SLURM_GPUS_PER_TASK": "8"}, tuple(range(8))),
        (3, 4, {"CUDA_VISIBLE_DEVICES": "5"}, (0,)),
        (0, 2, {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_a_task_gets_its_share_of_the_gpus(local, tasks, environment, wanted):
    assert gpus_of_task(local, tasks, environment) == wanted


def test_idle_gpus_and_unknown_tasks_are_told():
    three = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,3"} | GPUS
    (note,) = launch_of(asked(), three).notes
    assert "3 tasks leave 2 of 8 GPUs of this node idle" in note
    del three["SLURM_STEP_TASKS_PER_NODE"]
    (note,) = launch_of(asked(), three).notes
    assert "does not say how many tasks this node has" in note
    assert launch_of(asked(), SLURM | GPUS).notes == ()


def test_ids_and_counts_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS: '0,x'"):
        launch_of(asked(), SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,x"})
    with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES: 'two'"):
        virtual_cpu_devices({"JAX_NUM_CPU_DEVICES": "two"})


def test_given_devices_replace_the_share():
    given = asked(local_devices=(2, 5))
    assert launch_of(given, SLURM | GPUS).local_devices == (2, 5)
    environment = SLURM | GPUS | {"JAX_LOCAL_DEVICE_IDS": "1,3"}
    assert launch_of(asked(), environment).local_devices == (1, 3)


@pytest.mark.parametrize(
    "address, told",
    [
        ("nowhere", "is not HOST:PORT"),
        ("host.invalid:1234", "the host 'host.invalid' is unknown here"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(address, told):
    with pytest.raises(UserError, match=told):
        meet(address, 2, 1, 1)


@pytest.fixture
def address(monkeypatch, no_network):
    """An address on this machine, which processes of this test may connect to."""
    monkeypatch.undo()
    return f"127.0.0.1:{meeting.free_port()}"


def came(address, *processes, seconds=10):
    """Returns what each process (count, index) gets at a meeting: address, or message."""

    def come(process):
        try:
            return meet(address, *process, seconds)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(come, processes))


def test_processes_meet_and_get_the_same_address(address):
    first, *others = came(address, (3, 0), (3, 1), (3, 2))
    assert others == [first, first] and first.startswith("127.0.0.1:")
    assert first != address


def test_a_process_of_another_run_is_refused_and_harms_nobody(address):
    found = came(address, (2, 0), (3, 1), (2, 7), seconds=2)
    assert "process 0 waits for 2 processes, not 3" in found[1]
    assert "7 is no index of 2 processes" in found[2]
    assert "process 1 has not come within 2 s" in found[0]
    one, two, other = came(address, (2, 0), (2, 1), (3, 2), seconds=5)
    assert one == two and one.startswith("127.0.0.1:")
    assert "not 3; another run" in other or "nobody answers" in other


def test_missing_processes_are_named_by_all(address):
    found = came(address, (4, 0), (4, 2), seconds=1)
    assert all("process 1, 3 has not come within 1 s" in text for text in found)
    (alone,) = came(address, (2, 1), seconds=1)
    assert f"nobody answers at {address}" in alone and "process 1 has tried" in alone


def test_a_taken_port_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match="taken, maybe by another run"):
            meet(taken, 2, 0, 1)

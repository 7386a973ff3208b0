"""Processes of one run on one machine start, get signals and end together."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from finetune_jax.parallel import launch

ROOT = pathlib.Path(__file__).parents[2]
BEGIN = """
import os, signal, sys, time
me = int(os.environ["JAX_PROCESS_ID"])
got = []
def on_signal(number, frame):
    got.append(number)
    print("got", signal.Signals(number).name, flush=True)
def until_stopped():
    while not got:
        time.sleep(0.01)
    time.sleep(0.3)  # A second signal would come now.
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, on_signal)
print("ready", os.getpid(), flush=True)
"""


def started(does, *, processes=2, **options):
    """Returns processes that say that they are ready and then do something."""
    program = (sys.executable, "-c", BEGIN + does)
    return launch.start([], processes=processes, program=program, **options)


def until(is_so, seconds=10):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.01)


def ready(job):
    until(lambda: all("ready" in job.output(i) for i in range(len(job.processes))))


@pytest.mark.parametrize(
    "statuses, expected",
    [((0, 0), 0), ((0, 75), 75), ((75, 75, 75), 75), ((3, 0), 3), ((75, 1), 1)],
)
def test_the_status_is_that_of_the_run(statuses, expected):
    does = f"sys.exit({statuses}[me])"
    with started(does, processes=len(statuses)) as job:
        assert job.wait(20) == expected


def test_the_first_failure_decides_and_a_signal_counts_as_in_a_shell():
    does = "os.kill(os.getpid(), 9) if me == 1 else (time.sleep(0.5), sys.exit(4))"
    with started(does) as job:
        assert job.wait(20) == 128 + signal.SIGKILL
    assert list(job.statuses.items()) == [(1, -9), (0, 4)]


def test_each_process_has_its_place_and_its_devices(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_a=1"
    )
    names = [
        "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES",
        "JAX_PLATFORMS", "XLA_FLAGS",
    ]  # fmt: skip
    does = f"print(me, *[os.environ[name] for name in {names}])"
    with started(does, processes=3, devices=2) as job:
        assert job.wait(20) == 0
    found = [job.output(index).splitlines()[1].split() for index in range(3)]
    addresses = {words.pop(1) for words in found}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    assert found == [[str(index), "3", "2", "cpu", "--xla_a=1"] for index in range(3)]


def test_two_jobs_at_a_time_have_ports_of_their_own():
    does = "print(os.environ['JAX_COORDINATOR_ADDRESS'])"
    with started(does) as one, started(does) as other:
        assert one.wait(20) == other.wait(20) == 0
    assert one.output(0).splitlines()[1] != other.output(0).splitlines()[1]


def test_a_signal_goes_to_one_process_or_to_all():
    with started("until_stopped()", processes=3) as job:
        ready(job)
        job.signal(1, signal.SIGUSR1)
        until(lambda: job.running() == [0, 2])
        job.signal(None, signal.SIGTERM)
        assert job.wait(10) == 75
    got = [job.output(index).split()[2:] for index in range(3)]
    assert got == [["got", "SIGTERM"], ["got", "SIGUSR1"], ["got", "SIGTERM"]]


def test_if_one_fails_the_others_end():
    stubborn = "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True))\n"
    does = stubborn + "if me == 1: sys.exit(4)\nwhile True: time.sleep(60)"
    with started(does, processes=3, grace_s=0.5) as job:
        assert job.wait(20) == 4
    assert job.statuses == {1: 4, 0: -9, 2: -9}
    assert job.output(0).split()[2:] == ["no"]


def test_a_process_that_ends_by_itself_in_time_is_not_signalled():
    does = "time.sleep(0.5 * (me == 0)); sys.exit(2 + me)"
    with started(does) as job:
        assert job.wait(20) == 3
    assert job.statuses == {1: 3, 0: 2} and "got" not in job.output(0)


def test_a_time_limit_ends_all():
    with started("until_stopped()") as job:
        with pytest.raises(TimeoutError, match=r"processes \[0, 1\]"):
            job.wait(0.5)
        assert all(process.poll() is not None for process in job.processes)


def test_an_error_in_the_block_leaves_no_process():
    with pytest.raises(ZeroDivisionError), started("until_stopped()") as job:
        ready(job)
        print(1 / 0)
    assert [process.poll() for process in job.processes] == [-9, -9]


LAUNCHER = """
import sys
from finetune_jax.parallel import launch
sys.exit(launch.run([], processes=3, program=(sys.executable, "-c", sys.argv[1])))
"""


@pytest.fixture
def launcher():
    """Returns a function that starts the launcher as a program of its own."""
    begun = []

    def start(does):
        command = [sys.executable, "-c", LAUNCHER, BEGIN + does]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            command, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        begun.append(process)
        lines = [process.stdout.readline() for _ in range(3)]
        pids = [int(line.split()[-1]) for line in lines]
        return process, lines, pids

    yield start
    for process in begun:
        process.kill()
        process.stdout.close()
        process.wait()


@pytest.mark.parametrize("number", launch.FORWARDED)
def test_the_launcher_forwards_each_signal_once(launcher, number):
    process, lines, _ = launcher("until_stopped()")
    assert sorted(line.split("ready")[0] for line in lines) == ["", "[1] ", "[2] "]
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    got = [f"{prefix}got {number.name}" for prefix in ("", "[1] ", "[2] ")]
    assert sorted(output.splitlines()) == sorted(got)


def test_processes_do_not_outlive_the_launcher(launcher):
    process, _, pids = launcher("until_stopped()")
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.wait()
    until(lambda: not any(is_alive(pid) for pid in pids))


def is_alive(pid):
    """Returns whether a process runs; a zombie, which nobody waits for, does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_the_script_refuses_no_processes():
    script = ROOT / "scripts" / "launch_local.py"
    command = [sys.executable, str(script), "-n", "0", "--", "--mode=plan"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "-n: 0; at least 1 is needed" in done.stderr

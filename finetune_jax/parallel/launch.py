"""Starts the processes of a run on this machine, and ends them together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from finetune_jax.parallel.joining import VIRTUAL_DEVICES

PROGRAM = (sys.executable, "-m", "finetune_jax.main")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Exit status of a run that was stopped by a signal and has saved.
STOPPED = 75
# Seconds in which the others may end by themselves after one process has failed, since
# processes tell one another, which takes up to 7 s; and then again between SIGTERM and
# SIGKILL.
GRACE_S = 10.0
_POLL_S = 0.02
# Linux ends a process that has called this when its parent ends, also by SIGKILL. It
# stays in force over exec. In a function between fork and exec it could deadlock, since
# the parent has threads.
_BOUND = """\
import ctypes, os, signal, sys
if prctl := getattr(ctypes.CDLL(None), "prctl", None):
    prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class Job:
    """The processes of one run.

    Attributes:
        processes: One `subprocess.Popen` for each process, by index.
        statuses: Exit status by index, of processes that have ended, in order of ends.
    """

    def __init__(self, grace_s: float = GRACE_S):
        """Starts empty; a process may outlive one that failed by `grace_s` seconds."""
        self.processes: list[subprocess.Popen] = []
        self.statuses: dict[int, int] = {}
        self._grace_s = grace_s
        self._failed_at: float | None = None
        self._sent = 0
        self._lines: list[list[str]] = []
        self._readers: list[threading.Thread] = []

    def add(self, process: subprocess.Popen, prefix: str | None) -> None:
        """Adds a process, and a thread that collects its output.

        Args:
            process: Process that has just started.
            prefix: Printed before each line; None prints nothing.
        """
        self.processes.append(process)
        self._lines.append([])
        if process.stdout is not None:
            given = (process.stdout, self._lines[-1], prefix)
            reader = threading.Thread(target=_collect, args=given, daemon=True)
            self._readers.append(reader)
            reader.start()

    def output(self, index: int) -> str:
        """Returns the lines that a process has printed, stdout and stderr together."""
        return "".join(self._lines[index])

    def signal(self, index: int | None, number: int) -> None:
        """Sends a signal to one process, or to all (None), if they have not ended."""
        chosen = self.processes if index is None else [self.processes[index]]
        for process in chosen:
            process.send_signal(number)

    def kill(self, index: int) -> None:
        """Sends SIGKILL to a process."""
        self.signal(index, signal.SIGKILL)

    def running(self) -> list[int]:
        """Returns the indices of processes that run, and ends all if one has failed."""
        for index, process in enumerate(self.processes):
            if index not in self.statuses and process.poll() is not None:
                self.statuses[index] = process.returncode
        left = [i for i in range(len(self.processes)) if i not in self.statuses]
        if any(status not in (0, STOPPED) for status in self.statuses.values()):
            self._end(left)
        return left

    def _end(self, left: Sequence[int]) -> None:
        """Signals processes that outlive a failed one for too long."""
        now = time.monotonic()
        if self._failed_at is None:
            self._failed_at = now
        due = int((now - self._failed_at) / self._grace_s) if self._grace_s else 2
        for number in (signal.SIGTERM, signal.SIGKILL)[self._sent : due]:
            for index in left:
                self.signal(index, number)
        self._sent = max(self._sent, due)

    def wait(
        self, timeout_s: float | None = None, asked: list[int] | None = None
    ) -> int:
        """Waits until all processes have ended; returns the exit status of the run.

        Args:
            timeout_s: Seconds after which all processes are killed; None is no bound.
            asked: Signals to forward, which a handler may append to.

        Raises:
            TimeoutError: Processes ran for longer; names them.
        """
        begin = time.monotonic()
        while left := self.running():
            while asked:
                self.signal(None, asked.pop(0))
            if timeout_s is not None and time.monotonic() - begin > timeout_s:
                self.close()
                raise TimeoutError(
                    f"processes {left} ran for more than {timeout_s:g} s"
                )
            time.sleep(_POLL_S)
        for reader in self._readers:
            reader.join(1.0)  # A grandchild may hold the pipe.
        return self.status()

    def status(self) -> int:
        """Returns the status of all: the first failure, or 75 if one stopped, or 0."""
        for status in self.statuses.values():
            if status not in (0, STOPPED):
                return status if status > 0 else 128 - status
        return STOPPED if STOPPED in self.statuses.values() else 0

    def close(self) -> None:
        """Kills the processes that run, and those that they have started."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _collect(stream: IO[str], lines: list[str], prefix: str | None) -> None:
    """Appends the lines of a stream to a list, and prints them after a prefix."""
    with stream:
        for line in stream:
            lines.append(line)
            if prefix is not None:
                end = "" if line.endswith("\n") else "\n"
                print(f"{prefix}{line}", end=end, flush=True)


@contextlib.contextmanager
def start(
    arguments: Sequence[str],
    *,
    processes: int = 2,
    devices: int | None = 1,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = PROGRAM,
    grace_s: float = GRACE_S,
    echo: bool = False,
    prefix: str = "",
) -> Iterator[Job]:
    """Yields the running processes of one run on this machine; ends them at the end.

    It must be called in a thread that lives as long as the processes: Linux ends them
    with the thread.

    Args:
        arguments: Arguments of the program.
        processes: Number of processes.
        devices: Virtual CPU devices of each process; None gives process i accelerator i.
        env: Environment variables besides those of this process.
        program: Command without the arguments.
        grace_s: Seconds that processes may outlive one that failed.
        echo: Whether to print the output; lines of processes other than 0 begin with
            their index, as in `[1] `.
        prefix: Printed before each line.
    """
    job = Job(grace_s)
    bound = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid())]
    with free_port() as port, contextlib.closing(job):
        for index in range(processes):
            # A terminal gets the progress bar; in a file lines would mix.
            inherits = echo and not (index or prefix) and sys.stdout.isatty()
            process = subprocess.Popen(
                [*bound, *program, *arguments],
                env=_environment(index, port, processes, devices) | dict(env or {}),
                # Ctrl-C then reaches this process only, which forwards it.
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=None if inherits else subprocess.PIPE,
                stderr=None if inherits else subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
            )
            begin = f"{prefix}[{index}] " if index else prefix
            job.add(process, begin if echo else None)
        yield job


def run(arguments: Sequence[str], **options: Any) -> int:
    """Runs processes with their output shown and signals forwarded; returns the status.

    Args:
        arguments: Arguments of the program.
        options: Other arguments of `start`.
    """
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: asked.append(got))
        for number in FORWARDED
    }
    try:
        with start(arguments, echo=True, **options) as job:
            return job.wait(asked=asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """Yields a free port, reserved until the end of the block.

    The socket does not listen. gRPC's servers share ports by default, so process 0 can
    use this one, and no other user or program is given it.
    """
    with socket.socket() as reserved:
        for option in (socket.SO_REUSEPORT, socket.SO_REUSEADDR):
            reserved.setsockopt(socket.SOL_SOCKET, option, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _environment(
    index: int, port: int, processes: int, devices: int | None
) -> dict[str, str]:
    """Returns the environment of a process."""
    found = dict(os.environ) | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    if devices is None:
        # One process has all of them.
        return found | ({"JAX_LOCAL_DEVICE_IDS": str(index)} if processes > 1 else {})
    # jax accepts one way only to set the number of virtual devices.
    flags = re.sub(rf"{VIRTUAL_DEVICES}\d+", "", found.pop("XLA_FLAGS", "")).strip()
    found |= {"XLA_FLAGS": flags} if flags else {}
    return found | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}

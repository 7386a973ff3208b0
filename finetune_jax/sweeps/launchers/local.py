"""Starts workers on this machine, and starts those again that are killed."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from finetune_jax.core.errors import Problem, raise_if
from finetune_jax.parallel import joining
from finetune_jax.parallel import launch as processes
from finetune_jax.sweeps import claims
from finetune_jax.sweeps.launchers.launch import QUIET, Launch

# How often a worker is started again after it was killed.
RESTARTS = 3
_POLL_S = 0.05
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

# Starts a worker; the argument is the prefix of its lines.
Start = Callable[[str], contextlib.AbstractContextManager[processes.Job]]


def run(launch: Launch) -> int:
    """Runs workers until all have ended; returns 0, 75 if they were stopped, or 1.

    SIGTERM, SIGINT and SIGUSR1 are forwarded. A worker that is killed is started again,
    while the others go on.

    Args:
        launch: Workers to start.

    Raises:
        UserError: Numbers are invalid, or a worker needs more GPUs than there are.
    """
    check(launch)
    for line in notes(launch):
        print(line, flush=True)
    shared = {**launch.environment(), QUIET: "1"}
    starts = [_start_of(launch, shared | own) for own in environments(launch)]
    return supervise(starts, restarts=RESTARTS)


def lines(launch: Launch) -> list[str]:
    """Returns the command of each worker, for a shell.

    Args:
        launch: Workers.

    Raises:
        UserError: Numbers are invalid, or a worker needs more GPUs than there are.
    """
    check(launch)
    return [launch.command(own) for own in environments(launch)]


def check(launch: Launch) -> None:
    """Checks that the workers can be started here.

    Raises:
        UserError: Lists all problems.
    """
    problems, gpus = launch.problems(), _gpus(os.environ)
    if gpus and launch.processes > len(gpus):
        problems.append(
            Problem(
                "processes", f"{launch.processes}, but there are {len(gpus)} GPUs here"
            )
        )
    raise_if(problems)


def notes(launch: Launch) -> list[str]:
    """Returns lines for a person about devices that are shared or idle."""
    gpus, wanted = len(_gpus(os.environ)), launch.jobs * launch.processes
    if gpus:
        places = gpus // launch.processes
        idle = gpus - min(launch.jobs, places) * launch.processes
        if launch.jobs > places:
            return [
                f"{launch.jobs} workers share {gpus} GPUs, so jax does not reserve their "
                f"memory; --jobs={places} gives each worker its own"
            ]
        if idle >= launch.processes:
            return [f"{idle} of {gpus} GPUs are idle; --jobs={places} uses them"]
        return []
    cores, threads = len(os.sched_getaffinity(0)), wanted * launch.threads
    if threads > cores:
        return [
            f"{launch.jobs} workers have {threads} threads together on {cores} cores; "
            "fewer workers may be as fast"
        ]
    return []


def environments(launch: Launch) -> list[dict[str, str]]:
    """Returns for each worker the variables that give it its GPUs."""
    gpus = _gpus(os.environ)
    if not gpus:
        return [{}] * launch.jobs
    places = len(gpus) // launch.processes
    found = []
    for index in range(launch.jobs):
        first = index % places * launch.processes
        own = ",".join(gpus[first : first + launch.processes])
        is_shared = launch.jobs > places and not os.environ.keys() & _SHARED.keys()
        found.append({"CUDA_VISIBLE_DEVICES": own} | (_SHARED if is_shared else {}))
    return found


def _gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the GPUs that workers may use, as in CUDA_VISIBLE_DEVICES."""
    if environment.get("JAX_PLATFORMS") == "cpu":
        return ()
    return joining.visible_gpus(environment)


def _start_of(launch: Launch, env: dict[str, str]) -> Start:
    """Returns a function that starts a worker."""
    # Processes on the CPU keep the number of devices that the environment gives.
    is_cpu = not _gpus(os.environ) and launch.processes > 1
    devices = joining.virtual_cpu_devices(os.environ) if is_cpu else None
    return lambda prefix: processes.start(
        (),
        program=launch.worker,
        processes=launch.processes,
        devices=devices,
        env=env,
        echo=True,
        prefix=prefix,
    )


def supervise(starts: Sequence[Start], *, restarts: int) -> int:
    """Runs workers with their output shown and signals forwarded.

    Returns:
        0 if all have ended with 0, 75 if all others were stopped and have saved, else 1.

    Args:
        starts: A function for each worker that starts it.
        restarts: How often a worker is started again after it was killed.
    """
    asked: list[int] = []
    with _signals_to(asked), contextlib.ExitStack() as stack:
        workers = [_Worker(k, start, stack, restarts) for k, start in enumerate(starts)]
        sent = 0
        while any([worker.runs(asked) for worker in workers]):
            for number in asked[sent:]:
                sent += 1
                for worker in workers:
                    worker.job.signal(None, number)
            time.sleep(_POLL_S)
    found = {worker.status for worker in workers}
    if not found <= {0, processes.STOPPED}:
        return 1
    return processes.STOPPED if processes.STOPPED in found else 0


class _Worker:
    """A worker and its processes.

    Attributes:
        job: Its processes.
        status: Its exit status; None while it runs.
    """

    def __init__(
        self, index: int, start: Start, stack: contextlib.ExitStack, restarts: int
    ):
        """Starts the worker; its processes end with the stack at the latest."""
        self._prefix, self._start, self._stack = f"[{index}] ", start, stack
        self._left, self._most = restarts, restarts
        self._enter()

    def _enter(self) -> None:
        self.status: int | None = None
        self.job = self._stack.enter_context(self._start(self._prefix))

    def runs(self, asked: Collection[int]) -> bool:
        """Returns whether the worker runs, after it was started again if it was killed.

        Args:
            asked: Signals that asked all workers to stop.
        """
        if self.status is not None:
            return False
        if self.job.running():
            return True
        self.status = self.job.wait()
        if self.status - 128 in asked:  # It had no handler of signals yet.
            self.status = processes.STOPPED
        if self.status in (0, processes.STOPPED):
            return False
        was_killed = self.status > 128 or self.status == claims.LOST
        text = f"worker ended {_how(self.status)}"
        if was_killed and not asked and self._left:
            self._left -= 1
            count = self._most - self._left
            self._tell(f"{text}; it is started again ({count} of {self._most})")
            self._enter()
            return True
        self._tell(text)
        return False

    def _tell(self, text: str) -> None:
        print(f"{self._prefix}{text}", flush=True)


def _how(status: int) -> str:
    """Returns how a process has ended.

    >>> _how(3), _how(137)
    ('with exit status 3', 'by SIGKILL')
    """
    if status > 128 and status - 128 in set(signal.Signals):
        return f"by {signal.Signals(status - 128).name}"
    # The exit status of a worker also tells that members have failed.
    why = ", as members have failed or by the error above" if status == 1 else ""
    return f"with exit status {status}{why}"


@contextlib.contextmanager
def _signals_to(asked: list[int]) -> Iterator[None]:
    """Has the signals that are forwarded be appended to a list in the block."""
    before = {
        number: signal.signal(number, lambda got, _: asked.append(got))
        for number in processes.FORWARDED
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

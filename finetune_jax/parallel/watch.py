"""Ends all processes of a run together: after an error, a signal, a death, or a hang.

A process that fails tells the others why, and all end at once. A thread in each process
watches: it reads what the others tell, and process 0 compares how far all of them are.
Without such a thread a process that hangs in Python, such as in a read from a file system
that is gone, is never noticed, and an exception in one process hangs the others.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

# Kinds of work by how long it may take: an update or the reading of a batch; what takes
# long without progress, such as compiling; and waiting for other processes or the device.
STEP, LONG, WAITING = "step", "long", "waiting"
# Seconds between two looks of the watching thread, and between two reports of it.
EVERY_S, REPORT_S = 0.5, 3.0
# Seconds that a process waits for the others to read why it ends.
GRACE_S = 3.0
_END = "end"
# Parts of the messages with which collectives and the coordinator fail if another process
# is gone.
_SIGNS_OF_DEATH = ("Gloo", "NCCL", "UNAVAILABLE", "coordination service")


@dataclasses.dataclass
class _Activity:
    """Work of the main thread.

    Attributes:
        what: Name of the work, for messages.
        kind: STEP, LONG or WAITING.
        since: Time of its begin.
    """

    what: str = "starting"
    kind: str = LONG
    since: float = dataclasses.field(default_factory=time.monotonic)


def _state() -> Any:
    """Returns jax's state of the joined processes."""
    return sys.modules["jax._src.distributed"].global_state


_NOW = _Activity()
_WATCHER: "_Watcher | None" = None


def begins(what: str, kind: str = STEP) -> None:
    """Notes what the main thread is doing from now on."""
    _NOW.what, _NOW.kind, _NOW.since = what, kind, time.monotonic()


@contextlib.contextmanager
def doing(what: str, kind: str = LONG) -> Iterator[None]:
    """Notes what the main thread is doing in a block."""
    before = _NOW.what, _NOW.kind
    begins(what, kind)
    try:
        yield
    finally:
        begins(*before)


def start(*, hang_s: float, work_s: float) -> None:
    """Starts the thread that watches, once the processes are joined.

    Args:
        hang_s: Seconds that an update, a batch, or a wait of all processes may take.
        work_s: Seconds that other work may take, such as compiling.
    """
    global _WATCHER
    _WATCHER = _Watcher(hang_s=hang_s, work_s=work_s)
    _WATCHER.start()


def stop() -> None:
    """Ends the thread that watches; the processes then end by themselves."""
    global _WATCHER
    if _WATCHER is not None:
        _WATCHER.over.set()
        _WATCHER.join()
        _WATCHER = None


def is_on() -> bool:
    """Returns whether several processes are watched."""
    return _WATCHER is not None


def leave(status: int, text: str, *, own: bool = True) -> NoReturn:
    """Ends this process and all others; the first one that leaves says why.

    Args:
        status: Exit status of all processes.
        text: Message for a person.
        own: Whether the reason lies in this process. Otherwise another one is asked for
            its reason first.
    """
    state = _state()
    client, index = state.client, state.process_id
    if own:
        message = {"process": index, "status": status, "text": text}
        with contextlib.suppress(
            Exception
        ):  # Another was faster, or process 0 is gone.
            client.key_value_set(_END, json.dumps(message))
    told = _told(client, 0 if own else GRACE_S)
    if told is not None and told["process"] != index:
        status = told["status"]
        if told["text"] == text:  # Such as a mistake in the config, which all find.
            text = text if index == 0 else ""
        elif not own:
            text = f"ended, since process {told['process']} did: {told['text']}"
    if text:
        prefix = f"process {index}: " if index else ""
        print(f"{prefix}{text}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        client.key_value_set(f"left/{index}", "")
        if index == 0:
            _wait_for_leavers(client, state.num_processes)
    sys.stdout.flush()
    os._exit(status)


def _told(client: Any, seconds: float) -> dict[str, Any] | None:
    """Returns why another process ends; None if none has said it in some seconds."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            return json.loads(client.key_value_try_get(_END))
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)


def _wait_for_leavers(client: Any, count: int) -> None:
    """Waits until the other processes know why they end: process 0 keeps the message."""
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until:
        if len(client.key_value_dir_get("left/")) >= count:
            return
        time.sleep(0.05)


class _Watcher(threading.Thread):
    """Reads what other processes tell, and finds those that hang."""

    def __init__(self, *, hang_s: float, work_s: float):
        """Takes the limits of `start`."""
        super().__init__(name="watch", daemon=True)
        self._limits = {STEP: hang_s, LONG: work_s, WAITING: None}
        self._hang_s = hang_s
        self.over = threading.Event()
        state = _state()
        self._client: Any = state.client
        self._index, self._count = state.process_id, state.num_processes
        self._reported = -REPORT_S
        self._reports = 0
        # Last report of each process, and the time at which it came.
        self._seen: dict[int, tuple[int, float]] = {}

    def run(self) -> None:
        """Looks twice a second."""
        while not self.over.wait(EVERY_S):
            told = _told(self._client, 0)
            if told is not None and told["process"] != self._index:
                leave(told["status"], "", own=False)
            if (text := self._own_hang()) is not None:
                leave(1, text)
            if time.monotonic() - self._reported >= REPORT_S:
                self._exchange()

    def _own_hang(self) -> str | None:
        """Returns a message if the main thread has made no progress for too long."""
        took, limit = time.monotonic() - _NOW.since, self._limits[_NOW.kind]
        if limit is None or took < limit:
            return None
        key = "hang_timeout_s" if _NOW.kind == STEP else "work_timeout_s"
        return (
            f"error: process {self._index} has made no progress for {took:.0f} s "
            f"({_NOW.what}); config.parallel.{key} is {limit:g}. Look at its file system "
            "and its data; if this work takes longer, raise the key."
        )

    def _exchange(self) -> None:
        """Reports how far this process is; process 0 compares all reports."""
        self._reported = time.monotonic()
        self._reports += 1
        waited = time.monotonic() - _NOW.since if _NOW.kind == WAITING else 0.0
        mine = {"number": self._reports, "waited": waited, "what": _NOW.what}
        try:
            key = f"report/{self._index}"
            self._client.key_value_set(key, json.dumps(mine), allow_overwrite=True)
            found = (
                dict(self._client.key_value_dir_get("report/"))
                if self._index == 0
                else {}
            )
        except Exception as error:
            self._coordinator_is_silent(error)
            return
        self._seen[0] = (0, time.monotonic())  # The coordinator has answered.
        if self._index == 0:
            self._judge(
                {int(k.rpartition("/")[2]): json.loads(v) for k, v in found.items()}
            )

    def _coordinator_is_silent(self, error: Exception) -> None:
        silent = time.monotonic() - self._seen.get(0, (0, time.monotonic()))[1]
        if silent > self._hang_s:
            leave(1, f"error: process 0 has not answered for {silent:.0f} s: {error}")

    def _judge(self, reports: dict[int, Any]) -> None:
        """Ends the run if a process is silent, or if all wait for one another."""
        now = time.monotonic()
        for process, report in reports.items():
            if self._seen.get(process, (0, 0.0))[0] != report["number"]:
                self._seen[process] = report["number"], now
            silent = now - self._seen[process][1]
            if process and silent > self._hang_s:
                leave(
                    1,
                    f"error: process {process} has not answered for {silent:.0f} s, last "
                    f"seen {report['what']}; config.parallel.hang_timeout_s is "
                    f"{self._hang_s:g}. Its machine is gone, or its network.",
                )
        waited = min(report["waited"] for report in reports.values())
        if len(reports) == self._count and waited > self._hang_s:
            lines = [f"process {p} {reports[p]['what']}" for p in sorted(reports)]
            leave(
                1,
                f"error: all processes have waited for {waited:.0f} s: "
                f"{'; '.join(lines)}. config.parallel.hang_timeout_s is {self._hang_s:g}; "
                "raise it if one update takes longer.",
            )


def ended(error: Exception, message: str | None, status: int) -> NoReturn:
    """Ends all processes after an exception in this one.

    Args:
        error: The exception.
        message: Message for a person; None shows the traceback.
        status: Exit status.
    """
    text = str(error)
    if message is None and any(sign in text for sign in _SIGNS_OF_DEATH):
        if _told(_state().client, GRACE_S) is not None:
            leave(status, "", own=False)
        leave(status, f"error: another process is gone, and left no message ({text})")
    if message is None:
        traceback.print_exception(error)
        message = f"error: {type(error).__name__}: {text}"
    leave(status, message)

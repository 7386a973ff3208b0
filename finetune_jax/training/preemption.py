"""Preemption: signals of a scheduler or a person that ask a run to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STATUS = 75


class Stop:
    """Whether a run was asked to stop, and whether it would lose updates.

    Attributes:
        at_risk: Whether updates were made that no checkpoint contains yet.
    """

    def __init__(self) -> None:
        """Starts without a request."""
        self.at_risk = False
        self._asked = threading.Event()

    def ask(self) -> None:
        """Asks the run to save and stop."""
        self._asked.set()

    def asked(self) -> bool:
        """Returns whether the run was asked to stop."""
        return self._asked.is_set()


@contextlib.contextmanager
def stop_on_signals(
    grace_s: float, advice: Callable[[], str] = lambda: "run it again to continue"
) -> Iterator[Stop]:
    """Yields a `Stop` that is set when a signal arrives.

    If nothing is at risk, as while starting, compiling and reporting, a signal ends the
    program at once with status 75. So do a second signal and the end of the grace period,
    at the cost of the updates since the last checkpoint. A thread handles signals, since
    Python's handlers wait while the main thread compiles. Outside the main thread no
    signal can be caught.

    Args:
        grace_s: Seconds in which the run may save after it was asked to stop.
        advice: Returns how to continue, for the message of a program that ends at once.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The handler does nothing: the number of each signal is written to the pipe.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(reader, stop, grace_s, advice), name="signals", daemon=True
    )
    watcher.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, stop: Stop, grace_s: float, advice: Callable[[], str]) -> None:
    """Acts on the signals whose numbers come; returns when the pipe is closed."""
    timer = None
    while numbers := os.read(reader, 1):
        if numbers[0] not in SIGNALS:
            continue
        if stop.asked():
            _leave("a second signal", advice)
        if not stop.at_risk:
            _leave(signal.Signals(numbers[0]).name, advice)
        stop.ask()
        why = f"no checkpoint within {grace_s:g} s of the signal"
        timer = threading.Timer(grace_s, _leave, [why, advice])
        timer.daemon = True
        timer.start()
    if timer is not None:
        timer.cancel()


def _leave(why: str, advice: Callable[[], str]) -> None:
    """Ends the program; what was saved stays, since it may be killed at any moment."""
    print(f"\nstopped: {why}; {advice()}", file=sys.stderr, flush=True)
    os._exit(EXIT_STATUS)

"""Preemption: signals of a scheduler or a person that ask a run to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from finetune_jax.parallel import processes, watch
from finetune_jax.parallel.exchange import AnyProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STATUS = 75


class Stop:
    """Whether a run was asked to stop, and whether it would lose updates.

    Attributes:
        at_risk: Whether updates were made that no checkpoint contains yet.
        judge: Returns whether the values measured so far end the run early, as in a search;
            None never does. Process 0 calls it, after each evaluation but the last.
    """

    def __init__(self) -> None:
        """Starts without a request."""
        self.at_risk = False
        self.judge: Callable[[], bool] | None = None
        self._asked = threading.Event()
        self._any_process: Callable[[bool], bool] | None = None

    def ask(self) -> None:
        """Asks the run to save and stop."""
        self._asked.set()

    def asked(self) -> bool:
        """Returns whether this process was asked to stop."""
        return self._asked.is_set()

    def is_pruned(self) -> bool:
        """Returns whether measured values end the run, the same in all processes."""
        judge = self.judge
        return judge is not None and processes.agreed("pruning", judge)

    def agreed(self, *, is_last: bool = False) -> bool:
        """Returns whether the run is to stop now.

        With several processes all of them get the same answer in the same call, and a
        request to any of them counts, one call later.

        Args:
            is_last: Whether requests count in this call, since no other follows soon.
        """
        if processes.count() == 1:
            return self.asked()
        if self._any_process is None:
            self._any_process = AnyProcess()
        asked = self._any_process(self.asked())
        return self._any_process(self.asked()) or asked if is_last else asked


@contextlib.contextmanager
def stop_on_signals(
    grace_s: float, advice: Callable[[], str] = lambda: "run it again to continue"
) -> Iterator[Stop]:
    """Yields a `Stop` that is set when a signal arrives.

    If nothing is at risk, as while starting, compiling and reporting, a signal ends the
    program at once with status 75. So do a second Ctrl-C and the end of the grace period,
    at the cost of the updates since the last checkpoint. Other signals after the first
    one are ignored: srun sends one when one of several tasks has ended.

    A thread handles signals, since Python's handlers wait while the main thread compiles.
    Outside the main thread no signal can be caught.

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
        # srun sends SIGTERM to the other tasks once one has left with status 75, which all
        # of them are about to do.
        is_one = processes.count() == 1
        for number, handler in before.items():
            signal.signal(number, handler if is_one else signal.SIG_IGN)
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
            if numbers[0] == signal.SIGINT and processes.count() == 1:
                _leave("a second signal", advice)
            continue
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
    text = f"stopped: {why}; {advice()}"
    if watch.is_on():
        watch.leave(EXIT_STATUS, text)
    # In a sweep `sys.stderr` is the log of the member.
    print(f"\n{text}", file=sys.__stderr__, flush=True)
    os._exit(EXIT_STATUS)

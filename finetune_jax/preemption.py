"""Being asked to stop: signals that a scheduler or a person sends."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STATUS = 75


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a signal has come.

    A second signal ends the program at once with status 75; what was saved stays.
    Outside the main thread no signal can be caught and the answer stays no.
    """
    asked = threading.Event()

    def note(number, frame):
        del number, frame
        if asked.is_set():
            os._exit(EXIT_STATUS)
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

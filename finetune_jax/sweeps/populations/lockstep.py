"""Cooperative threads in lockstep, whose requests are answered in groups.

Each worker runs in a thread of its own, but never two at a time: one runs until it asks for
something, then the next. So workers may share any object, and the order of events is the
same in every repetition.
"""

import contextvars
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request of a worker.

    Attributes:
        signature: Requests with equal signatures are answered together.
        given: Arguments of this request.
        answer: Returns the responses to a list of arguments of such requests.
        urgency: Requests of higher urgency are answered first.
    """

    signature: Hashable
    given: Any
    answer: Callable[[list[Any]], list[Any]]
    urgency: int = 0


class Lockstep:
    """Runs workers and answers their requests."""

    def __init__(self) -> None:
        """Starts without workers."""
        self._running: _Worker | None = None
        self.rounds = 0  # Number of groups of requests answered so far.

    def ask(self, request: Request) -> Any:
        """Returns the response to a request; called by a worker inside `run`."""
        assert self._running is not None
        self._running.since = self.rounds
        return self._running.ask(request)

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs all workers to their ends.

        When every unfinished worker waits for a response, the most urgent requests are
        answered: one group after the other, the longest waiting first, before any of
        these workers is answered again. Workers that differ in one request so meet again
        at the next.

        Raises:
            BaseException: Exception of a worker or of an answer. All other workers are
                then stopped where they wait.
        """
        threads = [_Worker(work) for work in works]
        try:
            for thread in threads:
                self._go_on(thread, None)
            while waiting := [t for t in threads if t.request is not None]:
                for asked in _most_urgent(waiting):
                    first = asked[0].request
                    assert first is not None
                    given = [t.request.given for t in asked if t.request]
                    answers = first.answer(given)
                    self.rounds += 1
                    for thread, answer in zip(asked, answers, strict=True):
                        self._go_on(thread, answer)
        finally:
            for thread in threads:
                self._running = thread
                thread.end()
            self._running = None

    def _go_on(self, thread: "_Worker", answer: Any) -> None:
        self._running = thread
        thread.go_on(answer)
        if thread.error is not None:
            raise thread.error


def _most_urgent(waiting: "list[_Worker]") -> "list[list[_Worker]]":
    """Returns the groups of requests to answer next, in order."""
    groups: dict[Hashable, list[_Worker]] = {}
    for thread in waiting:
        assert thread.request is not None
        groups.setdefault(thread.request.signature, []).append(thread)

    def urgency(group: list[_Worker]) -> int:
        return max(t.request.urgency for t in group if t.request is not None)

    highest = max(map(urgency, groups.values()))
    chosen = [group for group in groups.values() if urgency(group) == highest]
    return sorted(chosen, key=lambda group: min(t.since for t in group))


class _Stopped(BaseException):
    """Raised in a waiting worker to stop it; must not be caught."""


class _Worker:
    """A worker that stands still, except within `go_on`.

    Attributes:
        request: Request that it waits for; None before its start and after its end.
        error: Exception that ended it, if any.
        since: Round in which it began to wait.
    """

    def __init__(self, work: Callable[[], None]):
        """Stores the function and a copy of the context variables.

        A new thread does not inherit these.
        """
        self.request: Request | None = None
        self.error: BaseException | None = None
        self.since = 0
        self._work, self._answer, self._runs = work, None, False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        around = contextvars.copy_context()
        self._thread = threading.Thread(
            target=around.run, args=(self._live,), name="lockstep", daemon=True
        )

    def go_on(self, answer: Any) -> None:
        """Runs the worker until its next request or its end."""
        self._answer, self.request, self._runs = answer, None, True
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._wait()

    def _wait(self) -> None:
        self._back.acquire()
        self._runs = False

    def end(self) -> None:
        """Stops the worker if it waits."""
        if self._runs:  # The wait for it was interrupted.
            self._wait()
        while self.request is not None:
            self.go_on(_Stopped())
        if self._thread.ident is not None:
            self._thread.join()

    def ask(self, request: Request) -> Any:
        """Returns the response, in the worker's thread."""
        self.request = request
        self._back.release()
        self._turn.acquire()
        if isinstance(self._answer, _Stopped):
            raise self._answer
        return self._answer

    def _live(self) -> None:
        self._turn.acquire()
        try:
            self._work()
        except BaseException as error:  # Raised again by `Lockstep.run`.
            self.error = error
        finally:
            self._back.release()

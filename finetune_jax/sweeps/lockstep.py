"""Several pieces of work in lockstep: what they ask for is answered for many at once.

Each runs in a thread of its own, but never two at a time: one runs up to where it asks
for something, then the next. So they may share what they like, and the order of all that
happens is the same whenever it is repeated.
"""

import contextvars
import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a piece of work waits for.

    Attributes:
        signature: Requests of equal ones are answered together.
        given: What the answer depends on besides.
        answer: Returns the answers for what some such requests have given.
        urgency: Others of a higher one are answered before, and may come to ask the same.
    """

    signature: Hashable
    given: Any
    answer: Callable[[list[Any]], list[Any]]
    urgency: int = 0


class Lockstep:
    """Runs pieces of work, and answers what they ask for."""

    def __init__(self) -> None:
        """Nothing runs."""
        self._running: _Thread | None = None
        self.rounds = 0  # How often some requests were answered.

    def ask(self, request: Request) -> Any:
        """Returns the answer; to be called by a piece of work that `run` runs."""
        assert self._running is not None
        self._running.since = self.rounds
        return self._running.ask(request)

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Runs all to their ends.

        When all that are not at their end wait for an answer, the most urgent get it: one
        group after the other, that which has waited longest first, before any of them is
        answered again. So those that differ in one request ask the next one at once.

        Raises:
            BaseException: What a piece of work or an answer has raised. All others end
                where they wait.
        """
        threads = [_Thread(work) for work in works]
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

    def _go_on(self, thread: "_Thread", answer: Any) -> None:
        self._running = thread
        thread.go_on(answer)
        if thread.error is not None:
            raise thread.error


def _most_urgent(waiting: "list[_Thread]") -> "list[list[_Thread]]":
    """Returns the groups that are to be answered next, in order."""
    groups: dict[Hashable, list[_Thread]] = {}
    for thread in waiting:
        assert thread.request is not None
        groups.setdefault(thread.request.signature, []).append(thread)

    def urgency(group: list[_Thread]) -> int:
        return max(t.request.urgency for t in group if t.request is not None)

    highest = max(map(urgency, groups.values()))
    chosen = [group for group in groups.values() if urgency(group) == highest]
    return sorted(chosen, key=lambda group: min(t.since for t in group))


class _Left(BaseException):
    """Ends a piece of work where it waits; nothing but `finally` is to see it."""


class _Thread:
    """A piece of work that stands still, except within `go_on`.

    Attributes:
        request: What it waits for; None before its begin and after its end.
        error: What has ended it, if anything did.
        since: The round in which it began to wait.
    """

    def __init__(self, work: Callable[[], None]):
        """Takes the work, and what is set around it, for which no thread looks else."""
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
        """Runs the work up to its next request or its end."""
        self._answer, self.request, self._runs = answer, None, True
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._wait()

    def _wait(self) -> None:
        self._back.acquire()
        self._runs = False

    def end(self) -> None:
        """Ends the work where it waits, if it does."""
        if self._runs:  # Whoever waited for it was interrupted.
            self._wait()
        while self.request is not None:
            self.go_on(_Left())
        if self._thread.ident is not None:
            self._thread.join()

    def ask(self, request: Request) -> Any:
        """Returns the answer, in the thread."""
        self.request = request
        self._back.release()
        self._turn.acquire()
        if isinstance(self._answer, _Left):
            raise self._answer
        return self._answer

    def _live(self) -> None:
        self._turn.acquire()
        try:
            self._work()
        except BaseException as error:  # Raised again where the work is run.
            self.error = error
        finally:
            self._back.release()

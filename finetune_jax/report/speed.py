"""Speed of a phase and the time that it still takes, without compiling."""

import dataclasses
import time
from collections.abc import Callable

# No estimate before the updates of a phase have taken this long.
_LEAST_S = 2.0


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Clocks when an update was known to be finished.

    Attributes:
        step: Step after the update.
        train_s: Seconds of all updates.
        wall_s: Seconds of all work except compiling.
    """

    step: int
    train_s: float
    wall_s: float


class Speed:
    """Measures from the second call of a phase, whose first one compiles."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Starts without an estimate; `clock` returns seconds."""
        self._clock = clock
        self._first: _Reading | None = None
        self._last: _Reading | None = None

    def add(self, step: int, *, train_s: float, compile_s: float) -> None:
        """Notes that the updates up to a step are finished.

        Args:
            step: Step after the last finished update.
            train_s: Seconds of updates so far.
            compile_s: Seconds of compiling so far.
        """
        reading = _Reading(step, train_s, self._clock() - compile_s)
        self._first = self._first or reading
        if self._last is None or step > self._last.step:
            self._last = reading

    def updates_per_s(self) -> float | None:
        """Returns the updates per second of training; None while that is unknown."""
        if (found := self._elapsed()) is None:
            return None
        steps, train_s, _ = found
        return steps / train_s

    def seconds_left(self, end: int) -> float | None:
        """Returns the seconds until step `end`, with measurements as frequent as so far."""
        if self._last is None or (found := self._elapsed()) is None:
            return None
        steps, _, wall_s = found
        return max(end - self._last.step, 0) * wall_s / steps

    def _elapsed(self) -> tuple[int, float, float] | None:
        """Returns steps, seconds of training and of all work; None if too few."""
        if self._first is None or self._last is None:
            return None
        steps = self._last.step - self._first.step
        train_s = self._last.train_s - self._first.train_s
        if not steps or train_s < _LEAST_S:
            return None
        return steps, train_s, self._last.wall_s - self._first.wall_s


def duration(seconds: float) -> str:
    """Returns a duration in words, rounded to what an estimate is worth.

    >>> duration(41), duration(250), duration(10_000), duration(400_000)
    ('41 s', '4 min', '2 h 47 min', '4 d 15 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"

"""Progress of a run for a person: a bar on a terminal, lines with times elsewhere."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from finetune_jax.core.metric_names import is_of_class
from finetune_jax.parallel import processes
from finetune_jax.report.speed import Speed, duration

# Seconds without a line after which one is printed, where there is no terminal.
EVERY_S = 30.0
# Longest line where there is no terminal.
_WIDTH = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseLine:
    """The place of a phase in its run.

    Attributes:
        name: Name of the phase.
        index: Number of the phase, from 0.
        phases: Number of phases.
        end: Step after its last update.
        total: Step after the last update of the run.
        steps_per_epoch: Updates in which every training example is seen once.
        batch_size: Examples of an update.
    """

    name: str
    index: int
    phases: int
    end: int
    total: int
    steps_per_epoch: float
    batch_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatestUpdate:
    """The latest update whose metrics are known.

    Attributes:
        step: Step after it.
        loss: Training loss.
        rate: Learning rate.
    """

    step: int
    loss: float
    rate: float


class Terminal:
    """Prints lines and the progress of a phase; process 0 of several alone does."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        label: str = "",
        parent: "Terminal | None" = None,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Finds out whether standard output is a terminal.

        Args:
            quiet: Whether only warnings and progress are shown.
            label: Begins lines of progress; '' for a run alone.
            parent: Terminal of a population, whose members together print a line in
                `every_s` seconds; None for a run alone.
            every_s: Seconds between two lines of progress.
            clock: Returns the time in seconds.
        """
        self._quiet, self._label, self._every_s = quiet, label, every_s
        self._clock = clock
        self._console = Console(highlight=False, soft_wrap=True)
        self._is_first = processes.is_first()
        self._is_live = self._console.is_terminal and not quiet and self._is_first
        self._bar: Progress | None = None
        self._task = None
        self._phase: PhaseLine | None = None
        self._speed = Speed(clock)
        self._root: Terminal = parent or self
        self._printed = clock()
        self._compile_s, self._compiled = 0.0, list[float]()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Prints a line that begins with 'warning:'."""
        self._print(f"warning: {text}")

    def tell(self, notes: Iterable[str], warnings: Iterable[str]) -> None:
        """Prints what a reader should know of the data."""
        for text in notes:
            self.say(text)
        for text in warnings:
            self.warn(text)

    def _print(self, text: str) -> None:
        if not self._is_first:
            return
        self._root._printed = self._clock()
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def _timed(self, text: str) -> str:
        """Returns a line with the time of day, which nobody needs beside a bar."""
        return text if self._is_live else f"{time.strftime('%H:%M:%S')}  {text}"

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Prints a line every half minute while a block runs that prints none.

        Args:
            what: Work of the block, such as 'measuring'.
        """
        if self._quiet or self._is_live:
            yield
            return
        begin, over = self._clock(), threading.Event()

        def beat() -> None:
            while not over.wait(self._every_s):
                passed = duration(self._clock() - begin)
                self._print(self._timed(f"still {what}, for {passed}"))

        thread = threading.Thread(target=beat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def begin_phase(self, phase: PhaseLine, step: int) -> None:
        """Starts the progress of a phase.

        Args:
            phase: Place of the phase in its run.
            step: Step at which it starts or is resumed.
        """
        self.end_phase()
        self._phase, self._speed = phase, Speed(self._clock)
        if self._is_live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[about]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._name(phase), total=phase.total, completed=step, about=""
            )

    def advance(
        self,
        step: int,
        latest: LatestUpdate | None,
        *,
        train_s: float,
        compile_s: float,
    ) -> None:
        """Shows that updates were made: moves the bar, or prints a line if it is time.

        Args:
            step: Step of the state.
            latest: Latest update whose metrics are known.
            train_s: Seconds of updates so far.
            compile_s: Seconds of compiling so far.
        """
        if compile_s > self._compile_s:
            self._compiled.append(compile_s - self._compile_s)
            self._compile_s = compile_s
            if len(self._compiled) == 2:
                self.say("batches differ in shape: one program is compiled for each")
        if latest is None or self._phase is None:
            return
        self._speed.add(latest.step, train_s=train_s, compile_s=compile_s)
        if self._bar is not None and self._task is not None:
            about = "  ".join(self._parts(self._phase, latest, step))
            self._bar.update(self._task, completed=step, about=about)
        elif self._clock() - self._root._printed >= self._every_s:
            phase = self._phase
            parts = [
                *filter(None, [self._label]),
                f"step {latest.step:,} of {phase.total:,}",
                self._name(phase),
                *self._parts(phase, latest, latest.step),
            ]
            self._print(self._timed("  ".join(parts)))

    @staticmethod
    def _name(phase: PhaseLine) -> str:
        place = f" ({phase.index + 1} of {phase.phases})" if phase.phases > 1 else ""
        return f"{phase.name}{place}"

    def _parts(self, phase: PhaseLine, latest: LatestUpdate, step: int) -> list[str]:
        """Returns epoch, loss and rate, and once they are known speed and time left."""
        parts = [
            f"epoch {step / phase.steps_per_epoch:.1f}",
            f"loss {latest.loss:.4f}",
            f"rate {latest.rate:.3g}",
        ]
        if (speed := self._speed.updates_per_s()) is not None:
            parts.append(f"{speed * phase.batch_size:,.0f} examples/s")
        if (left := self._speed.seconds_left(phase.end)) is not None:
            is_last = phase.index + 1 == phase.phases
            where = "" if is_last else " in this phase"
            parts.append(f"{duration(left)} left{where}")
        return parts

    def end_phase(self) -> None:
        """Takes the bar away, and says how many programs were compiled, if several."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if len(self._compiled) > 1 and self._phase is not None:
            count, seconds = len(self._compiled), sum(self._compiled)
            self.say(f"{self._phase.name}: {count} programs compiled, {seconds:.0f} s")
        self._phase, self._compiled = None, []

    def metrics(
        self, step: int, phase: str, values: Mapping[str, float], *, epoch: float
    ) -> None:
        """Prints metrics, without those of single classes; long lines are folded."""
        begin = self._timed(f"step {step:>6}  epoch {epoch:>5.1f}  {phase:<12}")
        parts = [
            f"{name} {value:.4f}"
            for name, value in values.items()
            if not is_of_class(name)
        ]
        width = self._console.width if self._is_live else _WIDTH
        self.say("\n".join(folded(begin, parts, width)))


def folded(begin: str, parts: Iterable[str], width: int) -> list[str]:
    """Returns lines of at most `width` characters; parts stand under one another.

    >>> folded("step 1", ["loss 0.1", "accuracy 0.9"], 20)
    ['step 1  loss 0.1', '        accuracy 0.9']
    """
    lines, indent = [begin], " " * len(begin)
    is_empty = True
    for part in parts:
        if not is_empty and len(lines[-1]) + 2 + len(part) > width:
            lines.append(indent)
        lines[-1] += f"  {part}"
        is_empty = False
    return lines

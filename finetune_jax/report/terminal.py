"""Progress of a run for a person: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from finetune_jax.core.metric_names import is_of_class


class Terminal:
    """Prints lines, and shows how far the phase is where somebody looks."""

    def __init__(self, *, quiet: bool = False):
        """Finds out whether standard output is a terminal.

        Args:
            quiet: Whether warnings alone are shown.
        """
        self._quiet = quiet
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = None

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
        self._console.print(text, markup=False)
        sys.stdout.flush()

    def begin_phase(self, name: str, first: int, step: int, end: int) -> None:
        """Starts the bar of a phase.

        Args:
            name: Name of the phase.
            first: Its first update.
            step: Where it starts or is taken up again.
            end: The update after its last.
        """
        self.end_phase()
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                name, total=end - first, completed=step - first, rate=""
            )

    def advance(self, updates: int, examples_per_s: float) -> None:
        """Moves the bar on."""
        if self._bar is not None and self._task is not None:
            rate = f"{examples_per_s:,.0f} examples/s"
            self._bar.update(self._task, advance=updates, rate=rate)

    def end_phase(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def metrics(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """Prints one line of metrics, without those of single classes."""
        shown = "  ".join(
            f"{name} {value:.4f}"
            for name, value in values.items()
            if not is_of_class(name)
        )
        self.say(f"step {step:>6}  {phase:<12}  {shown}")

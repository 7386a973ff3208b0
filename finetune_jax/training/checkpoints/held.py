"""Checkpoints in memory, for runs that are short or not to be resumed."""

import copy
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from finetune_jax.core.pytrees import whole
from finetune_jax.core.train_state import TrainState
from finetune_jax.parallel import processes
from finetune_jax.training.checkpoints.checkpoint import Checkpoints, superfluous
from finetune_jax.training.progress import Progress


class HeldCheckpoints:
    """Checkpoints in memory, for a run that is too short to be resumed."""

    def __init__(self, *, keep: int):
        """Takes the number of newest checkpoints to keep."""
        self._keep = keep
        self._held: dict[int, tuple[TrainState, Progress]] = {}

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self._held)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Keeps a state, at rest, and the progress of the run."""
        # Arrays over processes are those of the next update, which it donates.
        state = jax.tree.map(lambda leaf: np.asarray(whole(leaf)), state)
        self._held[int(state.step)] = state, copy.deepcopy(progress)
        for old in superfluous(self.steps(), progress, self._keep):
            del self._held[old]

    def progress(self, step: int) -> Progress:
        """Returns the progress of the run at a checkpoint."""
        return copy.deepcopy(self._held[step][1])

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Returns the state of a checkpoint, on the host."""
        del target
        return self._held[step][0]

    def write(self, folder: pathlib.Path) -> None:
        """Saves all checkpoints in a folder, as `Checkpoints` does.

        Raises:
            TrainingError: A checkpoint cannot be written.
        """
        checkpoints = Checkpoints(folder, keep=len(self._held))
        try:
            self.save_in(checkpoints)
        finally:
            checkpoints.close()

    def save_in(self, checkpoints: Checkpoints) -> None:
        """Saves all checkpoints in others.

        Raises:
            TrainingError: A checkpoint cannot be written.
        """
        for step in self.steps():
            checkpoints.save(*self._held[step])

    def close(self) -> None:
        """Returns at once; nothing is pending."""


class DeferredCheckpoints:
    """Checkpoints that are held in memory until a run has lasted some seconds.

    Saving takes longer than training a head. A run that is killed before starts anew.
    """

    def __init__(
        self, open_folder: Callable[[], Checkpoints], *, keep: int, hold_s: float
    ):
        """Starts with no checkpoint.

        Args:
            open_folder: Opens the folder of the checkpoints.
            keep: Number of newest checkpoints to keep.
            hold_s: Seconds from now in which checkpoints stay in memory.
        """
        self._open, self._until = open_folder, time.monotonic() + hold_s
        self._held = HeldCheckpoints(keep=keep)
        self._saved: Checkpoints | None = None

    @property
    def _now(self) -> "Checkpoints | HeldCheckpoints":
        return self._saved or self._held

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return self._now.steps()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves a state, at rest, and the progress of the run."""
        if self._saved is None and processes.agreed(
            "holding checkpoints", lambda: time.monotonic() > self._until
        ):
            self.write()
        self._now.save(state, progress)

    def progress(self, step: int) -> Progress:
        """Returns the progress of the run at a checkpoint."""
        return self._now.progress(step)

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Returns the state of a checkpoint, on the host."""
        return self._now.restore(step, target)

    def write(self) -> None:
        """Saves the checkpoints that are held in memory.

        Raises:
            TrainingError: A checkpoint cannot be written.
        """
        if self._saved is None:
            self._saved = self._open()
            self._held.save_in(self._saved)
            self._held = HeldCheckpoints(keep=1)

    def newest(
        self, target: Callable[[Progress], TrainState], warn: Callable[[str], None]
    ) -> None:
        """Returns None: there is no checkpoint yet; see `Checkpoints.newest`."""

    def close(self) -> None:
        """Waits for pending writes; checkpoints in memory are lost."""
        self._now.close()


AnyCheckpoints = Checkpoints | HeldCheckpoints | DeferredCheckpoints


def flush(checkpoints: AnyCheckpoints) -> None:
    """Saves checkpoints that are held in memory for some time.

    Raises:
        TrainingError: A checkpoint cannot be written.
    """
    if isinstance(checkpoints, DeferredCheckpoints):
        checkpoints.write()

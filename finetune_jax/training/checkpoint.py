"""Checkpoints: orbax saves and restores; what is restored is checked to the bit.

A checkpoint has the state and a JSON of metadata, which is read first because it says in
which phase the state was and so what structure it has. The metadata holds the digest of
every leaf and of itself: orbax alone restores damaged arrays in silence.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import orbax.checkpoint as ocp

from finetune_jax.core.errors import TrainingError, problems_error, why_not_written
from finetune_jax.core.machine import give_back_memory
from finetune_jax.core.pytrees import leaf_digests, named
from finetune_jax.core.registry import closest
from finetune_jax.core.train_state import TrainState
from finetune_jax.training.progress import Progress


class DamagedCheckpoint(TrainingError):
    """A checkpoint whose files are incomplete, unreadable or changed."""


class Checkpoints:
    """The checkpoints of one run: the first, the best and the newest ones stay."""

    def __init__(self, folder: pathlib.Path, *, keep: int, read_only: bool = False):
        """Opens a folder.

        Args:
            folder: `checkpoints/` of a workdir.
            keep: How many of the newest stay.
            read_only: Whether it is left as it is. Otherwise it is made if need be, and
                leftovers of killed saves go.
        """
        self.folder = folder.absolute()
        self._keep = keep
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                create=not read_only, cleanup_tmp_directories=not read_only
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that there are, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves a state and where the run stands; returns when it lies on the disk.

        Args:
            state: On the host.
            progress: Best step and log lines included.

        Raises:
            TrainingError: It cannot be written; those before are whole.
        """
        step = int(state.step)
        tree = _as_dict(state)
        meta = {
            "progress": dataclasses.asdict(progress),
            "leaves": leaf_digests(tree),
        }
        meta["sha256"] = _digest(meta)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)
        )
        try:
            with _without_tracebacks():
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises whatever the disk leads to.
            raise TrainingError(
                f"checkpoint {step} cannot be saved in {self.folder}: "
                f"{why_not_written(error)}"
            ) from error
        for old in _superfluous(self.steps(), progress, self._keep):
            self._manager.delete(old)
        give_back_memory()

    def progress(self, step: int) -> Progress:
        """Returns where the run stood at a checkpoint.

        Raises:
            DamagedCheckpoint: Its metadata cannot be read or has changed.
        """
        return Progress(**self._meta(step)["progress"])

    def _meta(self, step: int) -> dict:
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = dict(self._manager.restore(step, args=args)["meta"])
            found = meta.pop("sha256")
        except Exception as error:  # Orbax raises whatever the damage leads to.
            raise DamagedCheckpoint(
                f"checkpoint {step}: its metadata cannot be read: {error}"
            ) from error
        if _digest(meta) != found:
            raise DamagedCheckpoint(
                f"checkpoint {step}: its metadata has changed since it was written"
            )
        return meta

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Returns the state of a checkpoint, every bit checked, on the host.

        Args:
            step: One of `steps()`.
            target: A state of the structure that the checkpoint's phase has.

        Raises:
            UserError: The checkpoint's structure is not that of the target; lists names.
            DamagedCheckpoint: Its files are incomplete or have changed.
        """
        meta, wanted = self._meta(step), _as_dict(target)
        saved, names = set(meta["leaves"]), set(named(wanted))
        problems = [
            f"{n}: not in the checkpoint{closest(n, saved)}" for n in names - saved
        ]
        problems += [f"{n}: only in the checkpoint" for n in saved - names]
        if problems:
            raise problems_error(
                f"Checkpoint {step} in {self.folder} is of another phase or model:",
                sorted(problems),
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            state = self._manager.restore(step, args=args)["state"]
            leaves = named(state)
        except Exception as error:  # Orbax raises whatever the damage leads to.
            raise DamagedCheckpoint(
                f"checkpoint {step}: its state cannot be read: {error}"
            ) from error
        found = leaf_digests(state)
        changed = [n for n in leaves if found[n] != meta["leaves"].get(n)]
        if changed or set(leaves) != names:
            raise DamagedCheckpoint(
                f"checkpoint {step}: changed since it was written: {changed[:5]}"
            )
        shapes = named(wanted)
        problems = [
            f"{n}: model {shapes[n].shape}, checkpoint {leaves[n].shape}"
            for n in sorted(names)
            if (leaves[n].shape, leaves[n].dtype) != (shapes[n].shape, shapes[n].dtype)
        ]
        if problems:
            raise problems_error(
                f"Checkpoint {step} in {self.folder} is of another model:", problems
            )
        give_back_memory()
        return TrainState(**state)

    def newest(
        self, target: Callable[[Progress], TrainState], warn: Callable[[str], None]
    ) -> tuple[TrainState, Progress] | None:
        """Returns the newest whole checkpoint, or None if there is none.

        A damaged one is reported, set aside, and the one before it used.

        Args:
            target: Returns a state of the structure that fits some progress.
            warn: Told about every damaged checkpoint.
        """
        for step in reversed(self.steps()):
            try:
                progress = self.progress(step)
                return self.restore(step, target(progress)), progress
            except DamagedCheckpoint as error:
                aside = self.folder.parent / "damaged" / str(step)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                shutil.move(self.folder / str(step), aside)
                self._manager.reload()
                warn(f"damaged, moved to {aside}: {error}")
        return None

    def close(self) -> None:
        """Waits for what is being written and lets go of the folder."""
        with _without_tracebacks():
            self._manager.close()


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keeps orbax's threads from printing the error that `save` raises once more.

    Threads of a failed save report to the event loop that the save has closed, up to the
    end of the process; these reports stay hidden after the block too.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def without_closed_loop(found: Any) -> None:
        is_closed_loop = isinstance(found.exc_value, RuntimeError)
        if not (is_closed_loop and str(found.exc_value) == "Event loop is closed"):
            hook(found)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = without_closed_loop
    try:
        yield
        sys.unraisablehook = hook
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


class HeldCheckpoints:
    """The same of a run that is too short to be taken up again: kept in memory."""

    def __init__(self, *, keep: int):
        """Takes how many of the newest stay."""
        self._keep = keep
        self._held: dict[int, tuple[TrainState, Progress]] = {}

    def steps(self) -> list[int]:
        """Returns the steps that there are, in order."""
        return sorted(self._held)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Keeps a state, on the host, and where the run stands."""
        self._held[int(state.step)] = state, copy.deepcopy(progress)
        for old in _superfluous(self.steps(), progress, self._keep):
            del self._held[old]

    def progress(self, step: int) -> Progress:
        """Returns where the run stood."""
        return copy.deepcopy(self._held[step][1])

    def restore(self, step: int, target: TrainState) -> TrainState:
        """Returns a state as it was kept, on the host."""
        del target
        return self._held[step][0]

    def write(self, folder: pathlib.Path) -> None:
        """Saves all of them in a folder, as `Checkpoints` does.

        Raises:
            TrainingError: They cannot be written.
        """
        checkpoints = Checkpoints(folder, keep=len(self._held))
        try:
            for step in self.steps():
                checkpoints.save(*self._held[step])
        finally:
            checkpoints.close()

    def close(self) -> None:
        """Nothing is being written."""


def _superfluous(steps: list[int], progress: Progress, keep: int) -> list[int]:
    """Returns the steps that need not stay: neither first, best, due, nor among newest."""
    kept = {0, progress.best_step, progress.plateau_best_step, progress.anchor}
    return [step for step in steps[:-keep] if step not in kept]


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}  # type: ignore


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()

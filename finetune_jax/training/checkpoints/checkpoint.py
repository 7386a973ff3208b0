"""Checkpoints: orbax saves and restores them; restored states are checked to the bit.

A checkpoint has the state and JSON metadata. The metadata is read first, because the phase
in it implies the structure of the state. It holds the digest of every leaf and of itself:
orbax alone restores damaged arrays in silence.

Parameters and batch statistics that are those of checkpoint 0 are not stored again: the
metadata lists them under `shared`, and a scalar is stored in their place. In the same way
checkpoint 0 can leave out values of a weight file, listed under `reloaded`.

Of several processes, process 0 saves and tells the others when it has, and each restores by
itself: orbax's own barriers hang all of them for 20 minutes if one fails.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from finetune_jax.core.errors import (
    TrainingError,
    UserError,
    listed,
    raise_if,
    why_not_written,
)
from finetune_jax.core.machine import give_back_memory
from finetune_jax.core.pytrees import leaf_digests, like, named, nbytes
from finetune_jax.core.registry import closest
from finetune_jax.core.train_state import TrainState
from finetune_jax.parallel import processes, watch
from finetune_jax.parallel.exchange import on_first_process
from finetune_jax.training.progress import Progress


class DamagedCheckpoint(TrainingError):
    """A checkpoint whose files are incomplete, unreadable or changed."""


class DamagedStart(TrainingError):
    """Checkpoint 0, whose values later checkpoints share, is damaged or missing."""


# Stored in place of a leaf that is stored elsewhere.
ELSEWHERE = np.zeros((), np.uint8)
# Leaves are shared with checkpoint 0 if they make up this part of a state's bytes.
LEAST_SHARED = 0.1
# Seconds in which all processes must see a checkpoint of process 0: network file systems
# keep the content of folders for some time.
SEEN_WITHIN_S = 90.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reloaded:
    """Values of checkpoint 0 that stay in the weight file of the run.

    Attributes:
        names: Names of the leaves, such as 'params/stem/conv/kernel'.
        load: Returns the state before the first update, with these values.
        where: Address of the weights, for messages.
    """

    names: frozenset[str]
    load: Callable[[], TrainState]
    where: str


class Checkpoints:
    """The checkpoints of one run: the first, the best and the newest ones are kept.

    With several processes all of them call its methods; `read_only` ones need not agree.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        keep: int,
        read_only: bool = False,
        reloaded: Reloaded | None = None,
    ):
        """Opens a folder.

        Args:
            folder: `checkpoints/` of a workdir.
            keep: Number of newest checkpoints to keep.
            read_only: Whether the folder is left unchanged. Otherwise it is made if need
                be, and leftovers of killed saves are removed.
            reloaded: Values that checkpoint 0 leaves out; None stores all.
        """
        self.folder = folder.absolute()
        self._keep = keep
        self._reloaded = reloaded
        self._start_leaves: dict[str, str] | None = None
        self._loaded: TrainState | None = None
        self._is_shared = processes.count() > 1 and not read_only
        if not read_only:
            make = functools.partial(self.folder.mkdir, parents=True, exist_ok=True)
            processes.agreed("the folder of checkpoints", make)
        index, alone = processes.index(), ocp.options.MultiprocessingOptions()
        if processes.count() > 1:
            alone = ocp.options.MultiprocessingOptions(
                primary_host=index,
                active_processes={index},
                barrier_sync_key_prefix=f"process{index}",
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=not read_only and processes.is_first(),
                multiprocessing_options=alone,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves a state and the progress of the run; returns when both are on the disk.

        Args:
            state: State at rest.
            progress: Progress of the run at this state.

        Raises:
            TrainingError: The checkpoint cannot be written; earlier ones are whole.
        """
        step = int(state.step)
        if self._is_shared:
            state = on_first_process(state)
        what = f"saving checkpoint {step}"
        with watch.doing(what):
            processes.agreed(what, lambda: self._save(step, state, progress))
        self._see(step)

    def _see(self, step: int) -> None:
        """Waits until this process sees a checkpoint of process 0."""
        if not self._is_shared or processes.is_first():
            return
        until = time.monotonic() + SEEN_WITHIN_S
        while True:
            self._manager.reload()
            if step in self._manager.all_steps():
                return
            if time.monotonic() > until:
                raise TrainingError(
                    f"process {processes.index()} does not see checkpoint {step} in "
                    f"{self.folder}, which process 0 has saved {SEEN_WITHIN_S:g} s ago; "
                    "is the workdir on a file system that all processes share?"
                )
            time.sleep(0.1)

    def _save(self, step: int, state: TrainState, progress: Progress) -> None:
        tree = dict(vars(state))
        leaves = leaf_digests(tree)
        meta: dict[str, Any] = {
            "progress": dataclasses.asdict(progress),
            "leaves": leaves,
            **self._left_out(step, tree, leaves),
        }
        meta["sha256"] = _digest(meta)
        stored = _without(tree, _names_left_out(meta))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(stored), meta=ocp.args.JsonSave(meta)
        )
        try:
            with _without_tracebacks():
                self._manager.save(step, args=args, force=True)
                self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises exceptions of many types.
            raise TrainingError(
                f"checkpoint {step} cannot be saved in {self.folder}: "
                f"{why_not_written(error)}"
            ) from error
        for old in superfluous(self.steps(), progress, self._keep):
            self._manager.delete(old)
        give_back_memory()

    def _left_out(
        self, step: int, tree: dict[str, Any], leaves: dict[str, str]
    ) -> dict[str, list[str]]:
        """Returns the entry of the metadata that lists leaves stored elsewhere."""
        if step == 0:
            names = sorted(self._reloaded.names) if self._reloaded else []
            return {"reloaded": names} if names else {}
        if self._start_leaves is None:
            # Without a start the state is stored whole.
            self._start_leaves = self._meta(0)["leaves"] if 0 in self.steps() else {}
        names = [
            name
            for name, sha256 in leaves.items()
            if name.startswith(("params/", "batch_stats/"))
            and self._start_leaves.get(name) == sha256
        ]
        arrays = named(tree)
        size = nbytes([arrays[name] for name in names])
        return {"shared": names} if size > LEAST_SHARED * nbytes(tree) else {}

    def progress(self, step: int) -> Progress:
        """Returns the progress of the run at a checkpoint.

        Raises:
            DamagedCheckpoint: The metadata cannot be read, or has changed.
        """
        return Progress(**self._meta(step)["progress"])

    def _meta(self, step: int) -> dict:
        try:
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = dict(self._manager.restore(step, args=args)["meta"])
            found = meta.pop("sha256")
        except Exception as error:  # Orbax raises exceptions of many types.
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
            step: Step of a checkpoint.
            target: State with the structure of the checkpoint's phase.

        Raises:
            UserError: Checkpoint and target differ in structure; lists the names.
            DamagedCheckpoint: The files are incomplete, or have changed.
            DamagedStart: Checkpoint 0, which has values of this one, is damaged.
        """
        meta, wanted = self._meta(step), dict(vars(target))
        saved, names = set(meta["leaves"]), set(named(wanted))
        problems = [
            f"{n}: not in the checkpoint{closest(n, saved)}" for n in names - saved
        ]
        problems += [f"{n}: only in the checkpoint" for n in saved - names]
        raise_if(
            sorted(problems),
            f"Checkpoint {step} in {self.folder} was saved in another phase or by "
            "another model:",
        )
        try:
            stored = _without(wanted, _names_left_out(meta))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
            state = self._manager.restore(step, args=args)["state"]
            leaves = named(state) | self._elsewhere(step, meta, target)
            state = like(wanted, leaves)
        except (DamagedStart, UserError):
            raise
        except Exception as error:  # Orbax raises exceptions of many types.
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
        raise_if(
            problems, f"Checkpoint {step} in {self.folder} was saved by another model:"
        )
        give_back_memory()
        return TrainState(**state)

    def _reloaded_start(self) -> TrainState:
        """Returns the state before the first update, with values of the weight file."""
        assert self._reloaded is not None
        if self._loaded is None:
            self._loaded = self._reloaded.load()
        return self._loaded

    def _elsewhere(
        self, step: int, meta: dict[str, Any], target: TrainState
    ) -> dict[str, Any]:
        """Returns the leaves of a checkpoint that are stored elsewhere.

        Raises:
            DamagedStart: Checkpoint 0 is damaged.
            UserError: The weight file is not that of the run.
        """
        names = _names_left_out(meta)
        if not names:
            return {}
        if "shared" in meta:
            try:
                start = self.restore(0, target.replace(opt_state={}))
            except DamagedCheckpoint as error:
                raise DamagedStart(
                    f"checkpoint {step} shares values with checkpoint 0 in {self.folder}, "
                    f"which cannot be read ({error}); bring it back from a copy, or give "
                    "another --workdir"
                ) from error
        else:
            if self._reloaded is None:
                raise DamagedCheckpoint(
                    f"checkpoint {step}: values of a weight file are not in it"
                )
            start = self._reloaded_start()
        leaves = named(dict(vars(start)))
        found = {name: leaves[name] for name in names}
        digests = leaf_digests(found)
        changed = [name for name in names if digests[name] != meta["leaves"][name]]
        if changed and self._reloaded is not None:
            raise UserError(
                f"config.checkpoint.params: {self.folder} leaves frozen values to "
                f"{self._reloaded.where}, which has others now: {listed(changed, 5)}; "
                "bring back the weights that the run began with"
            )
        return found

    def newest(
        self, target: Callable[[Progress], TrainState], warn: Callable[[str], None]
    ) -> tuple[TrainState, Progress] | None:
        """Returns the newest whole checkpoint, or None if there is none.

        A damaged one is reported and moved aside, and the one before it is used.

        Args:
            target: Returns a state with the structure that some progress implies.
            warn: Prints a warning.
        """
        found: dict[int, tuple[TrainState, Progress]] = {}

        def restored(step: int) -> tuple[TrainState, Progress]:
            progress = self.progress(step)
            return self.restore(step, target(progress)), progress

        def choose() -> int | None:
            for step in reversed(self.steps()):
                if self._is_whole(step, restored, found, warn):
                    return step
            return None

        if self._is_shared:
            if self._reloaded is not None:  # By a program that all processes run.
                self._reloaded_start()
            step = processes.agreed("the newest checkpoint", choose)
        else:
            step = choose()
        if step is None:
            self._manager.reload()
            return None
        self._see(step)
        return found.get(step) or restored(step)

    def _is_whole(
        self,
        step: int,
        restored: Callable[[int], tuple[TrainState, Progress]],
        found: dict[int, tuple[TrainState, Progress]],
        warn: Callable[[str], None],
    ) -> bool:
        """Returns whether a checkpoint is whole, and restores it into `found` if so."""
        try:
            found[step] = restored(step)
            return True
        except DamagedCheckpoint as error:
            aside = self.folder.parent / "damaged" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(self.folder / str(step), aside)
            self._manager.reload()
            warn(f"damaged, moved to {aside}: {error}")
            return False

    def close(self) -> None:
        """Waits for pending writes and closes the folder."""
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


def delete_all_but(folder: pathlib.Path, steps: Collection[int]) -> None:
    """Deletes the checkpoints of a finished run, except for some steps and the first."""
    for place in folder.iterdir():
        if place.name.isdigit() and int(place.name) not in {0, *steps}:
            shutil.rmtree(place)


def superfluous(steps: list[int], progress: Progress, keep: int) -> list[int]:
    """Returns the steps to delete: neither first, best, due, nor among the newest."""
    kept = {0, progress.best_step, progress.plateau_best_step, progress.anchor}
    return [step for step in steps[:-keep] if step not in kept]


def _names_left_out(meta: Mapping[str, Any]) -> set[str]:
    """Returns the names of the leaves that a checkpoint does not store itself."""
    return {*meta.get("shared", ()), *meta.get("reloaded", ())}


def _without(tree: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns a tree with a scalar in place of some leaves."""
    leaves = named(tree)
    return like(tree, leaves | dict.fromkeys(names, ELSEWHERE))


def _digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()

"""Updates whose loss or gradient is NaN or infinite: what is kept of them for a person.

`config.nonfinite.policy` says what a run does about them. 'stop' stops it. 'skip' leaves
the state as it was before the update, but for its step: no parameter, running average or
accumulator has a trace of it. 'rollback' goes back to the last checkpoint that was due and
passes over the examples since, as Chowdhery et al. 2022 did by hand.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.errors import NotFinite
from finetune_jax.core.files import write_json
from finetune_jax.core.pytrees import named
from finetune_jax.data.batches import training_positions
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import Mixture
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import Terminal
from finetune_jax.training.progress import Progress
from finetune_jax.training.step import NORMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """An update that was made.

    Attributes:
        step: The state's after it.
        phase: Its name.
        metrics: With the norms by stage.
        rate: The learning rate.
        update: Number of the update whose examples it took.
        batch: Returns its arrays [k, b, ...] on the host, as the step takes them.
    """

    step: int
    phase: str
    metrics: Mapping[str, Any]
    rate: np.float32
    update: int
    batch: Callable[[], Mapping[str, np.ndarray]]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return all(math.isfinite(float(self.metrics[k])) for k in ("loss", "grad_norm"))

    def line(self) -> dict[str, Any]:
        """Returns what is logged of it."""
        found: dict[str, Any] = {"step": self.step, "phase": self.phase}
        for name, value in self.metrics.items():
            if name != NORMS:
                found[f"train/{name}"] = float(value)
        return found | {"train/learning_rate": float(self.rate)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unread:
    """Updates that one call has made, and whose metrics nobody has read yet.

    Attributes:
        step: The state's before them.
        updates: How many they are.
        phase: Its name.
        metrics: Of each, on the device; of one update without an axis for updates.
        rates: Learning rates.
        fixed: The update whose examples all of them took; None took their own.
        batch: Returns the arrays of one of them on the host.
    """

    step: int
    updates: int
    phase: str
    metrics: Mapping[str, Any]
    rates: np.ndarray
    fixed: int | None
    batch: Callable[[int], Mapping[str, np.ndarray]]

    def read(self, every: int) -> Iterator[Made]:
        """Yields the updates that are not finite or whose step `every` divides."""
        metrics = jax.device_get(self.metrics)
        if not np.ndim(metrics["loss"]):
            metrics = jax.tree.map(lambda value: np.asarray(value)[None], metrics)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
        for index in range(self.updates):
            step = self.step + index + 1
            if finite[index] and step % every:
                continue
            yield Made(
                step=step,
                phase=self.phase,
                metrics=jax.tree.map(lambda values, i=index: values[i], metrics),
                rate=self.rates[index],
                update=step - 1 if self.fixed is None else self.fixed,
                batch=functools.partial(self.batch, index),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """What a run does about updates that are not finite.

    Attributes:
        policy: 'stop', 'skip' or 'rollback'.
        limit: How many of them there may be, unless it stops at the first.
        config: Of the run.
        dataset: The training split.
        log: Gets a line for each.
        terminal: Tells them.
        folder: Gets a folder for each, with the batch and what it gave.
    """

    policy: str
    limit: int
    config: Config
    dataset: Dataset | Mixture
    log: MetricsLog
    terminal: Terminal
    folder: pathlib.Path

    def refuse(self, made: Made, progress: Progress) -> None:
        """Keeps, counts and tells an update that is not finite.

        Args:
            made: The update.
            progress: Counts it.

        Raises:
            NotFinite: The policy is to stop, or there were too many of them.
        """
        place = self._keep(made, progress.anchor)
        progress.nonfinite += 1
        norms = made.metrics[NORMS]["gradient"]
        found = (
            f"loss {float(made.metrics['loss']):g}, norms of the gradient "
            + ", ".join(f"{stage} {float(norm):.3g}" for stage, norm in norms.items())
            + f" at step {made.step}, phase {made.phase!r}"
        )
        stops = self.policy == "stop"
        if stops or progress.nonfinite > self.limit:
            many = "" if stops else f" This is number {progress.nonfinite}."
            raise NotFinite(
                f"Not finite: {found}.{many} Its batch and examples are in {place}; the "
                f"last checkpoint that was due is that of step {progress.anchor}. Lower "
                "peak_lr, or set clip_norm, in a new workdir; or have such updates "
                "passed over: config.nonfinite.policy."
            )
        back = f"back to that of step {progress.anchor}"
        done = "left out" if self.policy == "skip" else back
        self.terminal.warn(f"not finite, {done}: {found}; see {place}")
        line = {"step": made.step, "phase": made.phase}
        self.log.write({**line, "train/nonfinite": progress.nonfinite})

    def _keep(self, made: Made, checkpoint: int) -> pathlib.Path:
        """Writes what the update got and gave; returns the folder of it."""
        place = self.folder / str(made.step)
        place.mkdir(parents=True, exist_ok=True)
        np.savez(place / "batch.npz", allow_pickle=False, **named(made.batch()))
        norms = {
            kind: {stage: str(float(norm)) for stage, norm in of_stage.items()}
            for kind, of_stage in made.metrics[NORMS].items()
        }
        found = {
            "step": made.step,
            "phase": made.phase,
            "learning_rate": float(made.rate),
            "loss": str(float(made.metrics["loss"])),
            "norms": norms,
            "checkpoint": checkpoint,
            "examples": self._examples(made.update),
        }
        write_json(place / "update.json", found)
        return place

    def _examples(self, update: int) -> dict[str, str] | list[str]:
        """Returns the names of the examples of an update."""
        config, dataset = self.config, self.dataset
        seed = configs.seeds(config)["order"]
        if isinstance(dataset, Mixture):
            return dataset.examples_of(update, dataset.orders(seed))
        positions = training_positions(
            dataset.label,
            seed=seed,
            batch_size=config.data.batch_size,
            update=update,
            sampling=config.data.sampling,
        )
        return {str(p): dataset.name(int(p)) for p in positions}

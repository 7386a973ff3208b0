"""Updates whose loss or gradient is NaN or infinite: saved and reported.

`config.nonfinite.policy` is 'stop', which stops the run; 'skip', which restores the state
before the update but for its step, so that no parameter, running average or accumulator has
a trace of it; or 'rollback', which restores the last checkpoint that was due and skips the
examples since, as Chowdhery et al. 2022 did by hand.
"""

import dataclasses
import pathlib

import numpy as np

from finetune_jax import config as configs
from finetune_jax.config import Config
from finetune_jax.core.errors import NotFinite
from finetune_jax.core.files import write_json
from finetune_jax.core.pytrees import named
from finetune_jax.data.dataset import Dataset
from finetune_jax.data.domains import DomainMixture
from finetune_jax.data.order import training_order
from finetune_jax.parallel import processes
from finetune_jax.report.metrics_log import MetricsLog
from finetune_jax.report.terminal import Terminal
from finetune_jax.training.progress import Progress
from finetune_jax.training.step import NORMS
from finetune_jax.training.updates.update_log import UpdateRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """Handles updates that are not finite.

    Attributes:
        policy: 'stop', 'skip' or 'rollback'.
        limit: Largest number of such updates, unless the policy is 'stop'.
        config: Config of the run.
        dataset: Training split.
        log: Log that gets a line for each.
        terminal: Terminal that shows them.
        folder: Folder that gets the batch and the metrics of each.
    """

    policy: str
    limit: int
    config: Config
    dataset: Dataset | DomainMixture
    log: MetricsLog
    terminal: Terminal
    folder: pathlib.Path

    def refuse(self, record: UpdateRecord, progress: Progress) -> bool:
        """Saves and reports an update that is not finite; returns whether to roll back.

        Args:
            record: The update.
            progress: Progress of the run, whose counter rises.

        Raises:
            NotFinite: The policy is 'stop', or there were more than `limit`.
        """
        place = self._keep(record, progress.anchor)
        # The others might end the run before process 0 has written all.
        processes.wait_for_all("the update that is not finite")
        progress.nonfinite += 1
        norms = record.metrics[NORMS]["gradient"]
        found = (
            f"loss {float(record.metrics['loss']):g}, norms of the gradient "
            + ", ".join(f"{stage} {float(norm):.3g}" for stage, norm in norms.items())
            + f" at step {record.step}, phase {record.phase!r}"
        )
        stops = self.policy == "stop"
        if stops or progress.nonfinite > self.limit:
            many = "" if stops else f" This is number {progress.nonfinite}."
            raise NotFinite(
                f"Not finite: {found}.{many} Its batch and examples are in {place}; the "
                f"last checkpoint that was due is that of step {progress.anchor}. Lower "
                "peak_lr, or set clip_norm, in a new workdir; or set "
                "config.nonfinite.policy=skip."
            )
        back = f"back to that of step {progress.anchor}"
        done = "left out" if self.policy == "skip" else back
        self.terminal.warn(f"not finite, {done}: {found}; see {place}")
        line = {"step": record.step, "phase": record.phase}
        self.log.write({**line, "train/nonfinite": progress.nonfinite})
        return self.policy == "rollback"

    def _keep(self, record: UpdateRecord, checkpoint: int) -> pathlib.Path:
        """Writes the batch and the metrics of an update; returns the folder."""
        place = self.folder / str(record.step)
        if not processes.is_first():
            return place
        place.mkdir(parents=True, exist_ok=True)
        np.savez(place / "batch.npz", allow_pickle=False, **named(record.batch()))
        norms = {
            kind: {stage: str(float(norm)) for stage, norm in of_stage.items()}
            for kind, of_stage in record.metrics[NORMS].items()
        }
        found = {
            "step": record.step,
            "phase": record.phase,
            "learning_rate": float(record.rate),
            "loss": str(float(record.metrics["loss"])),
            "norms": norms,
            "checkpoint": checkpoint,
            "examples": self._examples(record.update),
        }
        write_json(place / "update.json", found)
        return place

    def _examples(self, update: int) -> dict[str, str] | list[str]:
        """Returns the names of the examples of an update."""
        config, dataset = self.config, self.dataset
        seed = configs.seeds(config)["order"]
        if isinstance(dataset, DomainMixture):
            return dataset.examples_of(update, dataset.orders(seed))
        order = training_order(dataset.label, seed, config.data.sampling)
        size = config.data.batch_size
        positions = order(update * size, (update + 1) * size)
        return {str(p): dataset.name(int(p)) for p in positions}

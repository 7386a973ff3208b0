"""Finished runs: their metrics, seeds and costs."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_jax.core.errors import UserError
from finetune_jax.report.workdir import read_json, read_manifest
from finetune_jax.sweeps.definition import SOURCES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        folder: Workdir.
        seed: Sorted pairs (source of randomness, seed); () if unknown.
        result: Content of `result.json`.
        names: Names of metrics in this run, by their names elsewhere, if these differ.
    """

    folder: pathlib.Path
    seed: tuple[tuple[str, int], ...]
    result: Mapping[str, Any]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """Returns a metric of the best state; None if it is absent or not finite."""
        value = (self.result.get("best") or {}).get(self.name_of(metric))
        return value if value is not None and math.isfinite(value) else None

    def name_of(self, metric: str) -> str:
        """Returns the name that a metric has in this run."""
        return self.names.get(metric, metric)


def open_run(folder: pathlib.Path) -> Run:
    """Returns the run in a workdir.

    Raises:
        UserError: It has not finished, or is a population.
    """
    result = read_json(folder / "result.json")
    if result is None:
        started = (folder / "config.json").is_file()
        what = "has not finished" if started else "holds no run"
        raise UserError(f"{folder}: {what} (no result.json in it)")
    if (folder / "members").is_dir():
        raise UserError(
            f"{folder}: a population; give the workdirs of members, such as "
            f"{folder / 'members' / '000'}"
        )
    manifest = read_manifest(folder) or {}
    seed = (result.get("sweep") or {}).get("seed", manifest.get("seed", ()))
    if isinstance(seed, int):
        seed = dict.fromkeys(SOURCES, seed)
    return Run(folder=folder, seed=tuple(sorted(dict(seed).items())), result=result)


def _megabytes(disk_bytes: Mapping[str, int] | None) -> float | None:
    """Returns the size of the checkpoints of a run in MB, None if they were deleted."""
    return disk_bytes["checkpoints"] / 1e6 if disk_bytes else None


# Costs of a run, by the heading of their column.
COSTS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "updates": lambda result: result.get("steps"),
    "train_s": lambda result: result.get("train_s"),
    "wall_s": lambda result: result.get("wall_s"),
    "trained": lambda result: (result.get("cost") or {}).get("trained_parameters"),
    "GFLOP": lambda result: (result.get("cost") or {}).get("gflop"),
    "memory_mb": lambda result: (result.get("cost") or {}).get("memory_mb"),
    "disk_mb": lambda result: _megabytes(result.get("disk_bytes")),
}


def costs(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each cost of some runs; None where no run has it.

    Args:
        results: Content of `result.json` of each run.
    """
    found: dict[str, float | None] = {}
    for name, cost in COSTS.items():
        values = [value for one in results if (value := cost(one)) is not None]
        found[name] = sum(values) / len(values) if values else None
    return found
